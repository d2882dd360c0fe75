"""The program of one rank: local shapes, and collectives where layouts change: start at `rewrite.py`."""
