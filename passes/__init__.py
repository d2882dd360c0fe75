"""The compiler: a training step as one graph in, a plan and one rank's program out. Start at `planner/pipeline.py`."""
