"""Dims of a program unified, alike layers folded, and how a tensor can lie on a mesh axis: start at `analysis.py`."""
