"""The module a user trains, and a call of it: start at `module.py`, then `call.py`."""
