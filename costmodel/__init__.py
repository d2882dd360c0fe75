"""Seconds and bytes from shapes, layouts and hardware: no graphs, no solver. Start at `hardware.py`."""
