"""Fake tensors: the one file that knows where torch keeps them, and that it logs what it raises from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

__all__ = ["DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode", "told_once"]

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


def _is_other(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed while attempting to run")


@contextmanager
def told_once() -> Iterator[None]:
    """Inside, torch does not log a traceback of its own for what it raises from ops on fake tensors."""
    _LOGGER.addFilter(_is_other)
    try:
        yield
    finally:
        _LOGGER.removeFilter(_is_other)
