"""Ops of routed experts, in the form that sharding wants: rows in blocks, and within a block sorted by expert.

`routed_mm` and `routed_mm_weight` are a product and its gradient by the matrices; `take_rows` and `put_rows` look rows
up and put them back, where the rows of a block come from and go to that block alone. A batch that is split over ranks
is one block per rank, so that each rank routes its own tokens.

    rows [S, k]           S = blocks x rows of a block
    bounds [blocks, E+1]  int32: in block b, rows bounds[b, e] to bounds[b, e+1] belong to expert e; rows
                          after the last bound may hold anything
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from costmodel.products import is_for_onednn, product

_SCHEMAS = {
    "routed_mm": "(Tensor rows, Tensor matrices, Tensor bounds) -> Tensor",
    "routed_mm_weight": "(Tensor rows, Tensor gradient, Tensor bounds) -> Tensor",
    "take_rows": "(Tensor x, Tensor index, int blocks) -> Tensor",
    "put_rows": "(Tensor x, Tensor index, Tensor values, int blocks, bool accumulate) -> Tensor",
}


_STEP = 32
"""oneDNN multiplies rows in steps of so many: it makes code for each shape that it meets and keeps it, ten MiB and more
where groups have any number of rows."""


def _groups(rows: Tensor, bounds: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every group that has rows."""
    step = rows.shape[0] // bounds.shape[0]
    return [
        (e, block * step + first, block * step + last)
        for block, cuts in enumerate(bounds.tolist())
        for e, (first, last) in enumerate(pairwise(cuts))
        if first < last
    ]


def _in_steps(a: Tensor, b: Tensor, rows: int) -> int:
    """How many of a group's rows oneDNN multiplies: whole steps of them where it is the faster library, else none."""
    return rows - rows % _STEP if is_for_onednn(a, b) else 0


@torch.library.custom_op("autopar::routed_mm", mutates_args=(), schema=_SCHEMAS["routed_mm"])
def _routed_mm(rows: Tensor, matrices: Tensor, bounds: Tensor) -> Tensor:
    made = rows.new_zeros(rows.shape[0], matrices.shape[2])
    for expert, first, last in _groups(rows, bounds):
        matrix = matrices[expert]
        cut = first + _in_steps(rows[first:last], matrix, last - first)
        if first < cut:
            made[first:cut] = product(rows[first:cut], matrix)
        if cut < last:
            made[cut:last] = torch.mm(rows[cut:last], matrix)
    return made


@_routed_mm.register_fake
def _(rows: Tensor, matrices: Tensor, bounds: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@torch.library.custom_op("autopar::routed_mm_weight", mutates_args=(), schema=_SCHEMAS["routed_mm_weight"])
def _routed_mm_weight(rows: Tensor, gradient: Tensor, bounds: Tensor) -> Tensor:
    made = rows.new_zeros(bounds.shape[1] - 1, rows.shape[1], gradient.shape[1])
    for expert, first, last in _groups(rows, bounds):
        cut = first + _in_steps(rows[first:last].T, gradient[first:last], last - first)
        if first < cut:
            made[expert] += product(rows[first:cut].T, gradient[first:cut])
        if cut < last:
            made[expert].addmm_(rows[cut:last].T, gradient[cut:last])
    return made


@_routed_mm_weight.register_fake
def _(rows: Tensor, gradient: Tensor, bounds: Tensor) -> Tensor:
    return rows.new_empty(bounds.shape[1] - 1, rows.shape[1], gradient.shape[1])


@torch.library.custom_op("autopar::take_rows", mutates_args=(), schema=_SCHEMAS["take_rows"])
def _take_rows(x: Tensor, index: Tensor, blocks: int) -> Tensor:
    return x[index]


@_take_rows.register_fake
def _(x: Tensor, index: Tensor, blocks: int) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


@torch.library.custom_op("autopar::put_rows", mutates_args=(), schema=_SCHEMAS["put_rows"])
def _put_rows(x: Tensor, index: Tensor, values: Tensor, blocks: int, accumulate: bool) -> Tensor:
    return torch.index_put(x, [index], values, accumulate)


@_put_rows.register_fake
def _(x: Tensor, index: Tensor, values: Tensor, blocks: int, accumulate: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


ROUTED_MM = torch.ops.autopar.routed_mm.default
ROUTED_MM_WEIGHT = torch.ops.autopar.routed_mm_weight.default
TAKE_ROWS = torch.ops.autopar.take_rows.default
PUT_ROWS = torch.ops.autopar.put_rows.default
