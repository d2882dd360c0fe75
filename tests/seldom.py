"""Imported for its effect: Python's garbage collector walks all of torch seldom.

By default it does so after most captures and plans, for a tenth of the tests' CPU time, and forks copy what they walk.
What tests leave behind is small.
"""

from __future__ import annotations

import gc

gc.set_threshold(20_000, 10, 100)
