"""A rank's program as compiled callables: halves, regions, Inductor: start at `lower.py`."""
