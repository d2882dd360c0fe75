"""The steps of a reshard as nodes of a rank's graph.

Collectives work on a tensor's expanded shape (one dim per atom), where a layout is a plain one; reshapes between that
and the rank's own shape cost nothing.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from costmodel.layout import Layout, local_shape
from costmodel.reshard import Step
from costmodel.state import chunks
from passes.analysis.dims import own_shape
from passes.program.emit import Emitter
from passes.program.local import TOGETHER, Storage
from passes.program.precision import dtype_named

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def emit_steps(
    emit: Emitter,
    x: fx.Node,
    steps: Sequence[Step],
    dims: Sequence[Sequence[int]],
    storage: Storage | None = None,
    padding: Sequence[int] = (),
) -> fx.Node:
    """Bring `x`, the part of a tensor whose dims consist of atoms of sizes `dims`, through `steps`.

    `storage` and `padding` are those of the `StoredOption` that the steps come from or go to, if any.
    """
    for step in steps:
        if step.kind == "cast" or step.kind.startswith("state_"):
            (x,) = emit_together(emit, [x], [[step]], [(storage, padding)])
        else:
            x = _expanded_step(emit, x, step, dims)
    return x


def emit_together(
    emit: Emitter,
    xs: Sequence[fx.Node],
    paths: Sequence[Sequence[Step]],
    stored: Sequence[tuple[Storage | None, Sequence[int]]],
) -> list[fx.Node]:
    """Bring several parts through steps that differ in sizes alone; each collective is issued once, for all of them.

    `stored`: per part, storage and padding of the `StoredOption` that it comes from or goes to, if any.
    """
    parts = list(xs)
    dims = [storage.state_dim if storage is not None else 0 for storage, _ in stored]
    for steps in zip(*paths, strict=True):
        first = steps[0]
        if first.kind == "cast":
            parts = [emit.call(aten._to_copy.default, x, dtype=dtype_named(first.dtype)) for x in parts]
            continue
        if first.kind in _PADDING:
            parts = [_PADDING[first.kind](emit, x, padding) for x, (_, padding) in zip(parts, stored, strict=True)]
            continue
        ranks, name = emit.group(first.axes)
        if first.kind == "all_reduce":
            parts = _collected(emit, c10d.all_reduce.default, parts, first.op, name)
            continue
        parts = [_moved(emit, x, dim, 0) for x, dim in zip(parts, dims, strict=True)]
        if first.kind == "state_slice":
            parts = [_state_slice(emit, x, step) for x, step in zip(parts, steps, strict=True)]
        elif first.kind == "state_gather":
            parts = _collected(emit, c10d.all_gather_into_tensor.default, parts, ranks, name)
            for index, (storage, _) in enumerate(stored):
                assert storage is not None
                rows = storage.computed_shape(emit.topology.sizes)[dims[index]]
                parts[index] = _unpadded(emit, parts[index], first, rows)
        elif first.kind == "state_scatter":
            padded = [_padded(emit, x, first.axes) for x in parts]
            parts = _collected(emit, c10d.reduce_scatter_tensor.default, padded, first.op, ranks, name)
        else:
            raise AssertionError(first)
        parts = [_moved(emit, x, 0, dim) for x, dim in zip(parts, dims, strict=True)]
    return parts


def emit_packed(emit: Emitter, xs: Sequence[fx.Node], steps: Sequence[Step]) -> list[fx.Node]:
    """Add up partial sums packed into one tensor, by the single step that each of them would take."""
    (step,) = steps
    _, name = emit.group(step.axes)
    shapes = [emit.shape(x) for x in xs]
    packed = emit.call(
        aten.cat.default, [emit.view(x, (math.prod(shape),)) for x, shape in zip(xs, shapes, strict=True)]
    )
    made = emit.call(c10d.all_reduce.default, packed, step.op, name)
    made.meta["packed"] = len(xs)
    summed = emit.wait(made)
    ends = itertools.accumulate(map(math.prod, shapes))
    return [
        emit.view(emit.call(aten.slice.Tensor, summed, 0, end - math.prod(shape), end), shape)
        for end, shape in zip(ends, shapes, strict=True)
    ]


def _collected(emit: Emitter, collective: Any, xs: Sequence[fx.Node], *rest: Any) -> list[fx.Node]:
    """The results of one collective over `xs`."""
    xs = [emit.contiguous(x) for x in xs]
    if len(xs) == 1:
        return [emit.wait(emit.call(collective, xs[0], *rest))]
    made = emit.call(TOGETHER[collective], list(xs), *rest)
    items = [emit.call(operator.getitem, made, index) for index in range(len(xs))]
    return [emit.wait(item) for item in items]


def _with_padding(emit: Emitter, x: fx.Node, padding: Sequence[int]) -> fx.Node:
    zeros = [n for each in reversed(padding) for n in (0, each)]
    return emit.call(aten.constant_pad_nd.default, x, zeros, 0)


def _without_padding(emit: Emitter, x: fx.Node, padding: Sequence[int]) -> fx.Node:
    for dim, each in enumerate(padding):
        x = emit.call(aten.slice.Tensor, x, dim, 0, emit.shape(x)[dim] - each) if each else x
    return emit.contiguous(x)


_PADDING = {"state_pad": _with_padding, "state_cut": _without_padding}


def _moved(emit: Emitter, x: fx.Node, source: int, target: int) -> fx.Node:
    """Dim `source` moved to place `target`, in row-major memory: chunks of another dim than 0 are moved as rows."""
    return emit.contiguous(emit.move_dim(x, source, target)) if source != target else x


def _local(emit: Emitter, dims: Sequence[Sequence[int]], layout: Layout) -> tuple[int, ...]:
    return local_shape([size for dim in dims for size in dim], layout, emit.topology.sizes)


def _expanded_step(emit: Emitter, x: fx.Node, step: Step, dims: Sequence[Sequence[int]]) -> fx.Node:
    before, after = _local(emit, dims, step.before), _local(emit, dims, step.after)
    ranks, name = emit.group(step.axes)
    if step.kind == "all_reduce":
        return emit.wait(emit.call(c10d.all_reduce.default, emit.contiguous(x), step.op, name))
    x = emit.view(x, before)
    if step.kind == "all_gather":
        assert step.source is not None
        x = emit.contiguous(_to_front(emit, x, step.source))
        x = emit.wait(emit.call(c10d.all_gather_into_tensor.default, x, ranks, name))
        x = _from_front(emit, x, step.source, after)
    elif step.kind == "reduce_scatter":
        assert step.target is not None
        x = emit.contiguous(_to_front(emit, x, step.target))
        x = emit.wait(emit.call(c10d.reduce_scatter_tensor.default, x, step.op, ranks, name))
        x = _from_front(emit, x, step.target, after)
    elif step.kind == "slice":
        assert step.target is not None
        d = step.target
        x = emit.view(x, (*before[:d], ranks, before[d] // ranks, *before[d + 1 :]))
        place = emit.view(emit.coordinate(step.axes), (1,))
        x = emit.view(emit.call(aten.index_select.default, x, d, place), after)
    elif step.kind == "all_to_all":
        x = _all_to_all(emit, x, step, before, after)
    else:
        raise AssertionError(step)
    # Row-major, as the ops' own results are: fused kernels rely on it (CPU attention is silently wrong otherwise).
    return emit.view(emit.contiguous(x), own_shape(dims, after))


def _to_front(emit: Emitter, x: fx.Node, dim: int) -> fx.Node:
    """Dim `dim` first; dims of size 1 before it are no obstacle."""
    shape = emit.shape(x)
    if math.prod(shape[:dim]) == 1:
        return emit.view(x, (shape[dim], *shape[:dim], *shape[dim + 1 :]))
    return emit.move_dim(x, dim, 0)


def _from_front(emit: Emitter, x: fx.Node, dim: int, shape: Sequence[int]) -> fx.Node:
    if math.prod(shape[:dim]) == 1:
        return emit.view(x, shape)
    return emit.move_dim(x, 0, dim)


def _all_to_all(emit: Emitter, x: fx.Node, step: Step, before: Sequence[int], after: Sequence[int]) -> fx.Node:
    ranks, name = emit.group(step.axes)
    source, target = step.source, step.target
    assert source is not None
    assert target is not None
    x = emit.view(x, (*before[:target], ranks, before[target] // ranks, *before[target + 1 :]))
    x = emit.contiguous(emit.move_dim(x, target, 0))
    shape = emit.shape(x)
    ones = [1] * ranks
    x = emit.wait(emit.call(c10d.all_to_all_single.default, x, ones, ones, name))
    x = emit.view(x, shape)
    x = emit.move_dim(x, 0, source)
    return emit.view(x, after)


def _runs(emit: Emitter, rows: int, axes: Sequence[int]) -> list[tuple[int, int]]:
    """The padded chunks of a group end to end, as runs of (rows of the tensor, rows of padding)."""
    parts = chunks(rows, [emit.topology.sizes[axis] for axis in axes])
    runs: list[tuple[int, int]] = []
    for part in parts:
        if runs and not runs[-1][1]:
            runs[-1] = (runs[-1][0] + part, parts[0] - part)
        elif runs and not part:
            runs[-1] = (runs[-1][0], runs[-1][1] + parts[0])
        else:
            runs.append((part, parts[0] - part))
    return runs


def _unpadded(emit: Emitter, x: fx.Node, step: Step, rows: int) -> fx.Node:
    """What a gather of padded chunks brought, without the padding."""
    kept, start = [], 0
    for real, padding in _runs(emit, rows, step.axes):
        if real:
            kept.append((start, start + real))
        start += real + padding
    if kept in ([(0, emit.shape(x)[0])], []):  # nothing to cut off, or a parameter with no rows at all
        return x
    parts = [emit.call(aten.slice.Tensor, x, 0, first, last) for first, last in kept]
    return parts[0] if len(parts) == 1 else emit.call(aten.cat.default, parts)


def _padded(emit: Emitter, x: fx.Node, axes: Sequence[int]) -> fx.Node:
    """The chunks of a group end to end, each padded to the largest."""
    runs = _runs(emit, emit.shape(x)[0], axes)
    if len(runs) == 1:
        (_, padding), rank = runs[0], len(emit.shape(x))
        return emit.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1) + [0, padding], 0) if padding else x
    pieces, start = [], 0
    for real, padding in runs:
        piece = emit.call(aten.slice.Tensor, x, 0, start, start + real)
        pads = [0, 0] * (len(emit.shape(x)) - 1) + [0, padding]
        pieces.append(emit.call(aten.constant_pad_nd.default, piece, pads, 0) if padding else piece)
        start += real
    return emit.call(aten.cat.default, pieces)


def _state_slice(emit: Emitter, x: fx.Node, step: Step) -> fx.Node:
    ranks, _ = emit.group(step.axes)
    x = _padded(emit, x, step.axes)
    rows, *rest = emit.shape(x)
    x = emit.view(x, (ranks, rows // ranks, *rest))
    place = emit.view(emit.coordinate(step.axes), (1,))
    return emit.view(emit.call(aten.index_select.default, x, 0, place), (rows // ranks, *rest))
