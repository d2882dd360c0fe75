"""An error that is raised is told once: torch logs a traceback of its own where an op fails on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


def _is_other(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed while attempting to run")


@contextmanager
def told_once() -> Iterator[None]:
    """Inside, torch does not log what it raises from ops on fake tensors."""
    _LOGGER.addFilter(_is_other)
    try:
        yield
    finally:
        _LOGGER.removeFilter(_is_other)
