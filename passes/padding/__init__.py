"""Dims made larger where a mesh axis does not divide them, with the same results: start at `pad.py`."""
