"""The step in time: ops and moves in the order they run, on their streams, with memory: start at `schedule.py`."""
