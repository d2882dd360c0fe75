"""Puts this folder on the path, so that tests can import their helpers (`ranks`) and processes they start can too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [
    path for path in (str(Path(__file__).parent.parent), str(Path(__file__).parent)) if path not in sys.path
]
