"""Look-ups by global index on one rank's part: rows that it has are looked up, for others it has zeros, and so the sum
over ranks is the whole result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from passes.rewrite.local_op import LocalOp, localizer, masked, once
from passes.rules.call import Operand

aten = torch.ops.aten


def _in_range(op: LocalOp, indices: fx.Node, start: fx.Node, length: int) -> tuple[fx.Node, fx.Node]:
    """(local indices, clamped into range; which of them are ours)."""
    emit = op.emit
    local = emit.call(aten.sub.Tensor, indices, start)
    low = emit.call(aten.ge.Scalar, local, 0)
    high = emit.call(aten.lt.Scalar, local, length)
    return emit.call(aten.clamp.default, local, 0, length - 1), emit.call(aten.logical_and.default, low, high)


def _ours(
    op: LocalOp, found: fx.Node, indices: fx.Node, mine: fx.Node, length: int,
    beside: Callable[[fx.Node], fx.Node] = lambda mask: mask,
) -> fx.Node:  # fmt: skip
    """What was looked up of a dim of `length` where the index is this rank's own, zero where it is another's.

    No number where it is no rank's: torch raises there, a graph cannot. Whole numbers are zero there too. `beside`
    makes a mask over the indices broadcast against what was found.
    """
    emit, cpu, dtype = op.emit, torch.device("cpu"), found.meta["val"].dtype
    if not dtype.is_floating_point:
        return masked(op, found, beside(mine))
    low, high = emit.call(aten.ge.Scalar, indices, 0), emit.call(aten.lt.Scalar, indices, length)
    zero, none = (emit.call(aten.scalar_tensor.default, x, dtype=dtype, device=cpu) for x in (0, math.nan))
    other = emit.call(aten.where.self, emit.call(aten.logical_and.default, low, high), zero, none)
    return emit.call(aten.where.self, beside(mine), found, beside(other))


@localizer(aten.embedding.default)
def _embedding(op: LocalOp) -> fx.Node:
    start = op.operand_start(0, 0)
    weight, indices = op.operands
    if start is None:
        return op.emit.call(aten.embedding.default, weight, indices)
    emit = op.emit
    local, mine = _in_range(op, indices, start, emit.shape(weight)[0])
    rows = emit.call(aten.embedding.default, weight, local)
    beside = functools.partial(emit.call, aten.unsqueeze.default, dim=-1)
    return _ours(op, rows, indices, mine, op.call.operands[0].shape[0], beside)


@localizer(aten.embedding_dense_backward.default)
def _embedding_dense_backward(op: LocalOp) -> fx.Node:
    start = op.result_start(0, 0)
    rows = op.result_shapes[0][0]
    if start is None:
        return op.as_is(num_weights=rows)
    emit = op.emit
    gradient, indices = op.operands
    local, mine = _in_range(op, indices, start, rows)
    padding = op.call.get("padding_idx", -1)
    if padding >= 0:
        mine = emit.call(aten.logical_and.default, mine, emit.call(aten.ne.Scalar, indices, padding))
    gradient = masked(op, gradient, emit.call(aten.unsqueeze.default, mine, -1))
    return emit.call(aten.embedding_dense_backward.default, gradient, local, rows, -1, False)


@localizer(aten.gather.default)
def _gather(op: LocalOp) -> fx.Node:
    dim = op.call.get("dim") % max(1, len(op.call.operands[0].shape))
    start = op.operand_start(0, dim) if op.call.operands[0].shape else None
    if start is None:
        return op.as_is()
    source, index = op.operands
    local, mine = _in_range(op, index, start, op.emit.shape(source)[dim])
    found = op.emit.call(aten.gather.default, source, dim, local)
    return _ours(op, found, index, mine, op.call.operands[0].shape[dim])


@localizer(aten.index_select.default)
def _index_select(op: LocalOp) -> fx.Node:
    if not op.call.operands[0].shape:
        return op.as_is()
    dim = op.call.get("dim") % len(op.call.operands[0].shape)
    start = op.operand_start(0, dim)
    if start is None:
        return op.as_is()
    source, index = op.operands
    local, mine = _in_range(op, index, start, op.emit.shape(source)[dim])
    picked = op.emit.call(aten.index_select.default, source, dim, local)
    beside = functools.partial(_beside, op, dim=dim, rank=len(op.call.operands[0].shape))
    return _ours(op, picked, index, mine, op.call.operands[0].shape[dim], beside)


def _indexed(op: LocalOp) -> tuple[int, int, fx.Node | None]:
    """(dim looked up, operand that indexes it, first global index of our part of it) of `index` and `index_put`.

    Where several dims are indexed they are whole, and the start is None.
    """
    placed = [(d, index.index) for d, index in enumerate(op.call.get("indices")) if isinstance(index, Operand)]
    if len(placed) > 1:
        return -1, -1, None
    (dim, operand) = placed[0]
    return dim, operand, op.operand_start(0, dim)


def _not_negative(op: LocalOp, index: fx.Node, length: int) -> fx.Node:
    """Indices from the end, as advanced indexing allows them, counted from the start."""
    emit = op.emit
    from_end = emit.call(aten.lt.Scalar, index, 0)
    return emit.call(aten.where.self, from_end, emit.call(aten.add.Tensor, index, length), index)


def _beside(op: LocalOp, mask: fx.Node, dim: int, rank: int) -> fx.Node:
    """A mask over the indices, which stand at `dim` of a tensor of `rank` dims, made to broadcast against it."""
    shape = op.emit.shape(mask)
    return op.emit.view(mask, [1] * dim + list(shape) + [1] * (rank - dim - len(shape)))


@localizer(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(op: LocalOp) -> fx.Node:
    dim, operand, start = _indexed(op)
    if start is None:
        return op.as_is()
    emit, source = op.emit, op.operands[0]
    index = _not_negative(op, op.operands[operand], op.call.operands[0].shape[dim])
    local, mine = _in_range(op, index, start, emit.shape(source)[dim])
    picked = emit.call(aten.index.Tensor, source, [None] * dim + [local])
    beside = functools.partial(_beside, op, dim=dim, rank=len(emit.shape(picked)))
    return _ours(op, picked, index, mine, op.call.operands[0].shape[dim], beside)


@localizer(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(op: LocalOp) -> fx.Node:
    if not op.call.get("accumulate", False):
        return op.as_is()
    emit, base, values = op.emit, once(op, 0), op.operands[-1]
    dim, operand, start = _indexed(op)
    if start is None:
        return replace(op, operands=(base, *op.operands[1:])).as_is()
    index = _not_negative(op, op.operands[operand], op.call.operands[0].shape[dim])
    local, mine = _in_range(op, index, start, emit.shape(base)[dim])
    rank = len(emit.shape(base)) - 1 + len(emit.shape(index))
    values = masked(op, values, _beside(op, mine, dim, rank))
    return emit.call(op.call.target, base, [None] * dim + [local], values, True)


@localizer(aten.index_add.default)
def _index_add(op: LocalOp) -> fx.Node:
    shape = op.call.operands[0].shape
    if len(op.call.operands) < 3 or not shape:
        return op.as_is()
    dim = op.call.get("dim") % len(shape)
    base, index, source = _added_rows(op, dim, lambda mask: _beside(op, mask, dim, len(op.emit.shape(op.operands[2]))))
    return op.emit.call(aten.index_add.default, base, dim, index, source, alpha=op.call.get("alpha", 1))


@localizer(aten.scatter_add.default)
def _scatter_add(op: LocalOp) -> fx.Node:
    shape = op.call.operands[0].shape
    if not shape:
        return op.as_is()
    dim = op.call.get("dim") % len(shape)
    base, index, source = _added_rows(op, dim, lambda mask: mask)
    return op.emit.call(aten.scatter_add.default, base, dim, index, source)


def _added_rows(op: LocalOp, dim: int, beside: Callable[[fx.Node], fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(what is added to, local indices in its `dim`, what is added: zero where that goes to another rank's rows).

    `beside` makes a mask over the indices broadcast against what is added.
    """
    base, (_, index, source) = once(op, 0), op.operands
    start = op.operand_start(0, dim)
    if start is None:
        return base, index, source
    index, mine = _in_range(op, index, start, op.emit.shape(base)[dim])
    return base, index, masked(op, source, beside(mine))
