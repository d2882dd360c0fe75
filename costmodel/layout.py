"""Layouts: where the parts of one tensor live on a mesh.

A `Layout` holds one placement per mesh axis, DTensor's three kinds: `Replicate()`, `Shard(dim)` and `Partial(op)`.
Shards are even: a dim is split only by axes whose sizes divide it. Where several axes shard one dim, the axis that
comes first in the mesh splits first (DTensor's order for `Shard`).

Written the way people write them: `S(0)R` is dim 0 split over axis 0 and whole on axis 1, `P` a sum still to be taken,
`P(max)` a maximum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same values."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of the axis holds one of equal, contiguous parts of `dim`."""

    dim: int

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank holds a term; the value is their `op` ("sum" or "max") over the axis."""

    op: str = "sum"

    def __str__(self) -> str:
        return "P" if self.op == "sum" else f"P({self.op})"


Placement = Replicate | Shard | Partial
Layout = tuple[Placement, ...]


def layout_text(layout: Layout) -> str:
    """`S(0)R` and the like."""
    return "".join(map(str, layout))


_PLACEMENT = re.compile(r"R|S\((\d+)\)|P(?:\((max|sum)\))?")


def parse_layout(text: str) -> Layout:
    """The layout that `layout_text` writes so.

    Raises:
        ValueError: text that is no layout.
    """
    placements: list[Placement] = []
    end = 0
    for match in _PLACEMENT.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        if match[0] == "R":
            placements.append(Replicate())
        elif match[1] is not None:
            placements.append(Shard(int(match[1])))
        else:
            placements.append(Partial(match[2] or "sum"))
    if end != len(text) or not text:
        raise ValueError(f"{text!r} is no layout; write one placement per mesh axis, R, S(dim) or P, as in 'RS(0)'")
    return tuple(placements)


def ways(layout: Layout, axis_sizes: Sequence[int], dim: int) -> int:
    """How many parts `dim` is split into."""
    parts = 1
    for placement, size in zip(layout, axis_sizes, strict=True):
        if placement == Shard(dim):
            parts *= size
    return parts


def is_gather(source: Layout, target: Layout, axis_sizes: Sequence[int]) -> bool:
    """Whether a rank has more of a tensor in `target` than in `source`, with nothing to add up."""

    def parts(layout: Layout) -> int:
        return math.prod(size for placed, size in zip(layout, axis_sizes, strict=True) if isinstance(placed, Shard))

    return not any(isinstance(placed, Partial) for placed in source) and parts(source) > parts(target)


def local_shape(shape: Sequence[int], layout: Layout, axis_sizes: Sequence[int]) -> tuple[int, ...]:
    """Shape of one rank's part of a tensor of `shape`.

    Raises:
        ValueError: a dim is split by axes whose sizes do not divide it.
    """
    local = list(shape)
    for axis, (placement, size) in enumerate(zip(layout, axis_sizes, strict=True)):
        if isinstance(placement, Shard):
            if local[placement.dim] % size:
                raise ValueError(
                    f"dim {placement.dim} of {tuple(shape)} under {layout_text(layout)}: "
                    f"{local[placement.dim]} does not divide over the {size} ranks of axis {axis}"
                )
            local[placement.dim] //= size
    return tuple(local)
