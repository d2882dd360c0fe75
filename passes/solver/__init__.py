"""Numbers in, picks out: no graph, tensor or mesh. Start at `problem.py`, then `solve.py`."""
