"""Whole training runs priced, with what no plan does yet: start at `setup.py`, then `candidate.py`."""
