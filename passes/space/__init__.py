"""What can be chosen on a mesh: options of each site under a strategy, pins, recompute: start at `space.py`."""
