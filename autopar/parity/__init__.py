"""`verify`: a planned step against the unmodified model: start at `verify.py`."""
