"""From an unmodified model and a batch to the step as one functional ATen graph: start at `capture.py`."""
