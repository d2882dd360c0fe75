"""A space as numbers alone, seconds and bytes: start at `price.py`."""
