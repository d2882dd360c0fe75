"""What a command prints, and how: tables as wide as the terminal, colour and a progress bar only where one looks on.

Reports go to standard output, everything else to standard error. Libraries that write to standard output by themselves
are kept off it (`clean_output`), so that `--json` is JSON and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from autopar.stages import Stages
from passes.plan.tables import Row, table_width, terminal_width, text_rows, text_table

_LIBRARY_LOGGERS = ("torch._subclasses.fake_tensor",)
"""What logs a stack for an error that is raised anyway, and then told in one line."""
_STYLES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}


def coloured() -> bool:
    """Whether standard output shows colour: a terminal, unless NO_COLOR or TERM=dumb says otherwise."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, style: str) -> str:
    """`text` in a style, where colour shows."""
    return f"\033[{_STYLES[style]}m{text}\033[0m" if coloured() else text


def table(
    rows: Sequence[Row], headers: Row, *, shrink: Sequence[int] = (0,), right: Sequence[int] = (), indent: int = 0
) -> str:
    """A table that fits the width: where it would not, columns `shrink` give way."""
    return "\n".join(text_table(rows, headers, terminal_width(), shrink=shrink, right=right, indent=indent))


def table_rows(
    rows: Sequence[Row], headers: Row, *, shrink: Sequence[int] = (0,), last: Sequence[int] = (),
    right: Sequence[int] = (), indent: int = 0,
) -> tuple[str, list[str]]:  # fmt: skip
    """The head of such a table, and each of its rows, which may be several lines."""
    head, bodies = text_rows(rows, headers, terminal_width(), shrink=shrink, last=last, right=right, indent=indent)
    return "\n".join(head), ["\n".join(body) for body in bodies]


def fits(rows: Sequence[Row], indent: int = 0) -> bool:
    """Whether a table of these rows is no wider than the terminal."""
    return table_width(rows, indent) <= terminal_width()


def wrapped(text: str, indent: int = 0) -> str:
    """`text` in lines that fit the width, each indented."""
    edge = " " * indent
    return textwrap.fill(text, terminal_width(), initial_indent=edge, subsequent_indent=edge, break_on_hyphens=False)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and no stacks from libraries inside, unless TORCH_LOGS asks for them."""
    loggers = [] if os.environ.get("TORCH_LOGS") else [logging.getLogger(name) for name in _LIBRARY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def clean_output() -> Iterator[None]:
    """Standard output, as C libraries see it too, is thrown away inside."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def progress() -> Stages:
    """What says which stage begins: a bar on a terminal, a line each on standard error elsewhere."""
    return Stages()
