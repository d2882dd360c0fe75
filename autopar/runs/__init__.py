"""`search` and `price`: whole training runs, and a verdict on them: start at `search.py`."""
