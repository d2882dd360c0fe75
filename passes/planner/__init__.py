"""Of many candidates the fastest that fits, as a plan: start at `pipeline.py`."""
