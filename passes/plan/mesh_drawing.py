"""How a tensor lies on the mesh, as a picture: a grid of ranks, each with the part of the tensor that it holds.

columns   ranks of the last axis          in a cell, the tensor: dim 0 from top to bottom, the other dims from
rows      ranks of the axes before it     left to right; what the rank holds is filled
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

_PLACEMENT = re.compile(r"R|S\((\d+)[^)]*\)|P(?:\(\w+\))?")
_MOST = 4
"""Ranks drawn of an axis: parts of a tensor stay large enough to see."""
_THINNEST = 0.12


@dataclass(frozen=True)
class Cell:
    """One rank: its place on the grid, and its part of the tensor as shares of height and width."""

    row: int
    column: int
    top: float
    left: float
    height: float
    width: float
    partial: bool = False


@dataclass(frozen=True)
class MeshDrawing:
    """A grid of cells; `more` says which axes have more ranks than are drawn."""

    rows: int
    columns: int
    cells: tuple[Cell, ...]
    more: str = ""


def mesh_drawing(layout: str, axes: Sequence[tuple[str, int]], first: str = "") -> MeshDrawing:
    """The picture of `layout` ("S(0)R"), a placement per axis; axes that `first` splits cut before the others do.

    At rest, a state axis cuts what the axes that split for compute leave: there `first` is the layout in compute.
    """
    placed = [_dim(match) for match in _PLACEMENT.finditer(layout)]
    before = [_dim(match) for match in _PLACEMENT.finditer(first or layout)]
    sizes = [min(size, _MOST) for _, size in axes]
    order = sorted(range(len(sizes)), key=lambda axis: (before[axis] or 0) < 0 or before[axis] is None)
    cells = []
    for rank in product(*map(range, sizes)):
        start, length = [0.0, 0.0], [1.0, 1.0]
        for axis in order:
            dim = placed[axis]
            if dim is not None and dim >= 0:
                side = min(dim, 1)
                length[side] /= sizes[axis]
                start[side] += rank[axis] * length[side]
        row = 0
        for axis in range(len(sizes) - 1):
            row = row * sizes[axis] + rank[axis]
        shown = [max(_THINNEST, share) for share in length]
        start = [min(begin, 1 - share) for begin, share in zip(start, shown, strict=True)]
        cells.append(Cell(row, rank[-1], start[0], start[1], shown[0], shown[1], -1 in placed))
    more = ", ".join(
        f"{name} has {size} ranks" for (name, size), shown in zip(axes, sizes, strict=True) if size > shown
    )
    rows = len(cells) // sizes[-1]
    return MeshDrawing(rows, sizes[-1], tuple(cells), more and f"{_MOST} are drawn of each axis: {more}")


def _dim(match: re.Match[str]) -> int | None:
    """The dim that a placement splits; None for a whole tensor, -1 for a partial sum."""
    if match[1] is not None:
        return int(match[1])
    return -1 if match[0].startswith("P") else None
