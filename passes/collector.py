"""Python's garbage collector while a graph is captured or planned.

A captured step is some hundred thousand objects on top of torch's own, all alive until the plan is made. A full
collection walks them all, finds next to nothing, and takes as long as a stage of planning.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """What is there already is left out of collections meanwhile; what is made anew is collected as ever.

    Afterwards all is as it was: enabled or not, thresholds, and what the user froze. (Where the user froze objects,
    nothing is done, as there is no way back to just those.)
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
