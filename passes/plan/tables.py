"""Tables for a terminal, never wider than it: where one would be, chosen columns give way and their cells wrap."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from tabulate import tabulate

_NARROWEST = 10
"""Columns that give way keep so many characters."""
_GAP = 2
_BREAKS = ((r"(?<=[,;:]) ", " "), (r" ", " "), (r"(?=[./])|(?<=,)(?=\S)", ""), (r"(?=_)", ""))
"""Where a cell is broken, best first: between parts of a list, words, and parts of a name; and what joins them."""

Row = Sequence[str]


def terminal_width() -> int:
    """Columns to write in: the terminal's, at least 80; 100 where there is none; at most 140."""
    return min(140, max(80, shutil.get_terminal_size((100, 24)).columns))


def table_width(rows: Sequence[Row], indent: int = 2) -> int:
    """Columns that a table of these rows, one of them its headers, takes."""
    return indent + sum(max(map(len, column)) for column in zip(*rows, strict=True)) + _GAP * (len(rows[0]) - 1)


def text_table(
    rows: Sequence[Row], headers: Row, width: int, *, shrink: Sequence[int] = (0,), last: Sequence[int] = (),
    right: Iterable[int] = (), indent: int = 2, narrowest: int = _NARROWEST,
) -> list[str]:  # fmt: skip
    """Lines of a table; see `text_rows`."""
    head, bodies = text_rows(
        rows, headers, width, shrink=shrink, last=last, right=right, indent=indent, narrowest=narrowest
    )
    return [*head, *(line for body in bodies for line in body)]


def text_rows(
    rows: Sequence[Row], headers: Row, width: int, *, shrink: Sequence[int] = (0,), last: Sequence[int] = (),
    right: Iterable[int] = (), indent: int = 2, narrowest: int = _NARROWEST,
) -> tuple[list[str], list[list[str]]]:  # fmt: skip
    """Lines of a table's head, and those of each row.

    Where the table is wider than `width`, columns `shrink` give way, the widest first: their cells take several lines.
    Where that is not enough, columns `last` do too.
    `right`: columns that end at one edge, as numbers do. `narrowest`: what those that give way keep.
    """
    columns = range(len(headers))
    widths = [max(len(row[c]) for row in [headers, *rows]) for c in columns]
    over = table_width([headers, *rows], indent) - width
    for giving in (shrink, last):
        while over > 0 and (wide := [c for c in giving if widths[c] > max(narrowest, len(headers[c]))]):
            widths[max(wide, key=lambda c: widths[c])] -= 1
            over -= 1
    cells = [[broken(cell, widths[c]) for c, cell in enumerate(row)] for row in rows]
    widths = [max([len(headers[c]), *(len(line) for row in cells for line in row[c])]) for c in columns]
    heights = [max(map(len, row)) for row in cells]
    lines = [
        [lines[n] if n < len(lines) else "" for lines in row]
        for row, height in zip(cells, heights, strict=True)
        for n in range(height)
    ]
    numbers = set(right)
    align = ["right" if c in numbers else "left" for c in columns]
    # The header is a row like others: tabulate makes columns with real headers wider than they need to be.
    body = [headers, ["-" * each for each in widths], *lines]
    text = tabulate(body, tablefmt="plain", colalign=align, disable_numparse=True, preserve_whitespace=True)
    head_1, head_2, *rest = [f"{' ' * indent}{line}".rstrip() for line in text.splitlines()]
    found = []
    for height in heights:
        found.append(rest[:height])
        rest = rest[height:]
    return [head_1, head_2], found


def broken(text: str, width: int, level: int = 0) -> list[str]:
    """`text` in lines of at most `width`; what goes on inside a name is indented, and what cannot be broken is cut."""
    if len(text) <= width:
        return [text]
    if level == len(_BREAKS):
        return [cut(text, width)]
    pattern, glue = _BREAKS[level]
    edge = "" if glue else "  "
    lines: list[str] = []
    line = ""
    for part in re.split(pattern, text):
        joined = f"{line}{glue}{part}" if line else f"{edge if lines else ''}{part}"
        if len(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        *whole, line = broken(f"{edge if lines else ''}{part}", width, level + 1)
        lines += whole
    return [*lines, line]


def cut(text: str, width: int) -> str:
    """`text`, its middle left out where it is wider than `width`."""
    if len(text) <= width:
        return text
    left = max(1, (width - 1) // 3)
    return f"{text[:left]}~{text[len(text) - (width - 1 - left) :]}"


def wrapped_lines(text: str, width: int, indent: str) -> list[str]:
    """`text` in lines of at most `width`, each indented; words are not broken."""
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
