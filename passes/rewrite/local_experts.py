"""Products of routed experts on one rank's part: of its blocks of rows, or of the rows of the experts that it has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from costmodel.layout import Shard
from passes.program.routed_ops import PUT_ROWS, ROUTED_MM, ROUTED_MM_WEIGHT, TAKE_ROWS
from passes.rewrite.local_op import LocalOp, localizer, masked, once

aten = torch.ops.aten


def _our_bounds(op: LocalOp, experts: int, expert: fx.Node | None) -> fx.Node:
    """Where each of a rank's experts finds its rows, counted from the first of the rank's rows in that block."""
    emit, rows, bounds = op.emit, op.operands[0], op.operands[-1]
    place = len(op.op.operands[-1][0])
    axes = [a for a, placement in enumerate(op.operand_layouts[0]) if placement == Shard(place)]
    if axes and place < len(op.op.operands[0][0]):
        length = emit.shape(rows)[0] // emit.shape(bounds)[0]
        start = emit.call(aten.mul.Tensor, emit.coordinate(axes), length)
        bounds = emit.call(aten.clamp.default, emit.call(aten.sub.Tensor, bounds, start), 0, length)
    if expert is not None:
        places = emit.call(aten.arange.start, 0, experts + 1, dtype=torch.int64, device=torch.device("cpu"))
        bounds = emit.call(aten.index_select.default, bounds, 1, emit.call(aten.add.Tensor, places, expert))
    same = bounds.meta["val"].dtype == torch.int32
    return bounds if same else emit.call(aten._to_copy.default, bounds, dtype=torch.int32)


@dataclass(frozen=True)
class _OurRows:
    """Where a rank's experts find their rows: `ends` per local expert, counted from row `first` (None: from 0)."""

    ends: fx.Node
    first: fx.Node | None
    rows: int


def _one_block(op: LocalOp, bounds: fx.Node, split: bool) -> _OurRows:
    emit, (_, cuts) = op.emit, op.emit.shape(bounds)
    bounds = emit.view(bounds, (cuts,))
    first = emit.call(aten.slice.Tensor, bounds, 0, 0, 1) if split else None
    ends = emit.call(aten.slice.Tensor, bounds, 0, 1, cuts)
    ends = ends if first is None else emit.call(aten.sub.Tensor, ends, first)
    return _OurRows(ends, first, emit.shape(op.operands[0])[0])


def _brought(op: LocalOp, x: fx.Node, ours: _OurRows) -> fx.Node:
    """The rows of `x` from ours on, where the local experts look for them."""
    if ours.first is None:
        return x
    emit = op.emit
    places = emit.call(aten.arange.start, 0, ours.rows, dtype=torch.int64, device=torch.device("cpu"))
    places = emit.call(aten.clamp.default, emit.call(aten.add.Tensor, places, ours.first), 0, ours.rows - 1)
    return emit.call(aten.index_select.default, x, 0, places)


def _returned(op: LocalOp, x: fx.Node, ours: _OurRows) -> fx.Node:
    """The rows back in their places, zero where they are not ours."""
    if ours.first is None:
        return x
    emit = op.emit
    places = emit.call(aten.arange.start, 0, ours.rows, dtype=torch.int64, device=torch.device("cpu"))
    places = emit.call(aten.sub.Tensor, places, ours.first)
    experts = emit.shape(ours.ends)[0]
    count = emit.call(aten.slice.Tensor, ours.ends, 0, experts - 1, experts)
    mine = emit.call(
        aten.logical_and.default, emit.call(aten.ge.Scalar, places, 0), emit.call(aten.lt.Tensor, places, count)
    )
    back = emit.call(aten.index_select.default, x, 0, emit.call(aten.clamp.default, places, 0, ours.rows - 1))
    return masked(op, back, emit.view(mine, (ours.rows, 1)))


def _aligned(op: LocalOp, x: fx.Node) -> fx.Node:
    """Its kernels want rows of matrices to start at multiples of 16 bytes."""
    step = 16 // x.meta["val"].dtype.itemsize
    pads = [-n % step for n in op.emit.shape(x)[1:]]
    if not any(pads):
        return x
    return op.emit.call(aten.constant_pad_nd.default, x, [n for pad in reversed(pads) for n in (0, pad)])


def _has_kernel(op: LocalOp, bounds: fx.Node) -> bool:
    return op.operands[0].meta["val"].dtype == torch.bfloat16 and op.emit.shape(bounds)[0] == 1


@localizer(ROUTED_MM)
def _routed_mm(op: LocalOp) -> fx.Node:
    emit, (rows, matrices, _) = op.emit, op.operands
    expert = op.operand_start(1, 0)
    bounds = _our_bounds(op, emit.shape(matrices)[0], expert)
    if not _has_kernel(op, bounds):
        return replace(op, operands=(rows, matrices, bounds)).as_is()
    ours = _one_block(op, bounds, expert is not None)
    rows, aligned = _aligned(op, _brought(op, rows, ours)), _aligned(op, matrices)
    made = emit.call(aten._grouped_mm.default, rows, aligned, ours.ends)
    if emit.shape(aligned)[2] != emit.shape(matrices)[2]:
        made = emit.call(aten.slice.Tensor, made, 1, 0, emit.shape(matrices)[2])
    return _returned(op, made, ours)


@localizer(ROUTED_MM_WEIGHT)
def _routed_mm_weight(op: LocalOp) -> fx.Node:
    emit, (rows, gradient, _) = op.emit, op.operands
    expert = op.result_start(0, 0)
    bounds = _our_bounds(op, op.result_shapes[0][0], expert)
    if not _has_kernel(op, bounds):
        return replace(op, operands=(rows, gradient, bounds)).as_is()
    ours = _one_block(op, bounds, expert is not None)
    rows, gradient = (_aligned(op, emit.contiguous(_brought(op, x, ours))) for x in (rows, gradient))
    made = emit.call(aten._grouped_mm.default, emit.call(aten.t.default, rows), gradient, ours.ends)
    for dim, size in enumerate(op.result_shapes[0]):
        if emit.shape(made)[dim] != size:
            made = emit.call(aten.slice.Tensor, made, dim, 0, size)
    return made


def _our_index(op: LocalOp) -> fx.Node:
    """Where the rank's rows stand in its own blocks."""
    start = op.operand_start(0, 0)
    return op.operands[1] if start is None else op.emit.call(aten.sub.Tensor, op.operands[1], start)


@localizer(TAKE_ROWS)
def _take_rows(op: LocalOp) -> fx.Node:
    return op.emit.call(aten.index.Tensor, op.operands[0], [_our_index(op)])


@localizer(PUT_ROWS)
def _put_rows(op: LocalOp) -> fx.Node:
    adds = bool(op.call.get("accumulate"))
    base = once(op, 0) if adds else op.operands[0]
    return op.emit.call(aten.index_put.default, base, [_our_index(op)], op.operands[2], adds)
