"""`torch.autocast` around a call: its dtype is part of what is captured, and nothing of ours runs under it.

A model is captured on the CPU, whatever it will run on, so the ops that are cast are those of autocast on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_KINDS = ("cuda", "cpu")


def autocast_dtype() -> torch.dtype | None:
    """The dtype that `torch.autocast` computes in here; None where it is off."""
    return next((torch.get_autocast_dtype(kind) for kind in _KINDS if torch.is_autocast_enabled(kind)), None)


@contextmanager
def autocast_as(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, `torch.autocast` is on with `dtype` on the CPU, or off everywhere."""
    before = [(kind, torch.is_autocast_enabled(kind)) for kind in _KINDS]
    try:
        for kind, _ in before:
            torch.set_autocast_enabled(kind, False)
        if dtype is None:
            yield
        else:
            with torch.autocast("cpu", dtype, cache_enabled=False):
                yield
    finally:
        for kind, was in before:
            torch.set_autocast_enabled(kind, was)
