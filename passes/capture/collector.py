"""Python's garbage collector while a graph is captured or planned, or many are, for a search.

A captured step is some hundred thousand objects on top of torch's own, all alive until the plan is made. A full
collection walks them all, finds next to nothing, and takes as long as a stage of planning.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 20_000
"""So many new objects are collected at a time: Python's own 700 or 2,000 are few where a schedule makes 100,000."""
_depth = 0
"""How many `settled` are under way, one within the other."""


@contextmanager
def settled() -> Iterator[None]:
    """What is there already is left out of collections meanwhile; what is made anew is collected, if less often.

    Within another, what was made since that began is left out too, until the outermost ends: what a search keeps of
    its captures is not walked again for each that follows.

    Afterwards all is as it was: enabled or not, thresholds, and what the user froze. (Where the user froze objects,
    nothing is done, as there is no way back to just those.)
    """
    global _depth
    if not _depth and gc.get_freeze_count():  # it counts by walking them all
        yield
        return
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(max(before[0], _YOUNG) if before[0] else 0, *before[1:])
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        gc.set_threshold(*before)
        if not _depth:
            gc.unfreeze()
