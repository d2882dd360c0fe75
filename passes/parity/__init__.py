"""Every rank of a program played in one process, and the first node that differs: start at `simulate.py`."""
