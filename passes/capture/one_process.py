"""`torch.distributed` as a model finds it that runs in one process: not initialised.

That is so for the thread that asks for it: others may be saving a checkpoint or watching the ranks meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import distributed_c10d as c10d

_here = threading.local()


class _Hidden(c10d._World):
    """The world of process groups, whose default one a thread that is alone does not see."""

    @property
    def default_pg(self) -> Any:
        return None if getattr(_here, "alone", False) else self._default_pg

    @default_pg.setter
    def default_pg(self, value: Any) -> None:
        self._default_pg = value


@contextmanager
def as_one_process() -> Iterator[None]:
    """Inside, `torch.distributed` is not initialised: a model that would exchange something between ranks, as
    `SyncBatchNorm` does, computes what it does on one device."""
    c10d._world.__class__ = _Hidden
    before = getattr(_here, "alone", False)
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = before
