"""Tokens sorted by expert, or taken in turns, within each part of the batch: start at `token_blocks.py`."""
