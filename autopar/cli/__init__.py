"""The command line: `autopar`, and `python -m autopar`."""

from __future__ import annotations

from autopar.cli.main import main

__all__ = ["main"]
