"""A plan as data, and what is told of it: JSON, reports, plots: start at `plan.py`."""
