"""How a rank runs its part of an op.

Most ops run as they are on local tensors. The ones here carry sizes that must become local, or look things up by global
index: an embedding whose rows are split looks up the rows it has and gives zero for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from costmodel.layout import Layout, Shard, local_shape
from passes.dims import ExpandedOp
from passes.emit import Emitter
from passes.randomness import emit_uniform
from passes.rules.call import Call, map_operands
from passes.rules.create import FILLS, IOTAS
from passes.rules.view import RESHAPES

aten = torch.ops.aten


@dataclass(frozen=True)
class LocalOp:
    """An op to be run on local operands, and the layouts it runs under."""

    emit: Emitter
    node: fx.Node
    call: Call
    op: ExpandedOp
    operands: tuple[fx.Node, ...]
    operand_layouts: tuple[Layout, ...]
    result_layouts: tuple[Layout, ...]
    result_shapes: tuple[tuple[int, ...], ...]

    def as_is(self, *, args: Sequence[Any] | None = None, **changed: Any) -> fx.Node:
        """The op on the local operands; `changed` replaces arguments by name."""
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        local_args, kwargs = map_operands(self.node, lambda index, _: self.operands[index])
        positional = list(local_args)
        for name, value in changed.items():
            index = names.index(name)
            if index < len(positional):
                positional[index] = value
            else:
                kwargs[name] = value
        return self.emit.call(self.node.target, *positional, **kwargs)

    def operand_start(self, operand: int, dim: int) -> fx.Node | None:
        """Global index of the first local entry of an operand's dim, None where the dim is whole."""
        return _start(self.emit, self.op.operands[operand], self.operand_layouts[operand], dim)

    def result_start(self, result: int, dim: int) -> fx.Node | None:
        """The same for a result."""
        return _start(self.emit, self.op.results[result], self.result_layouts[result], dim)


def _start(emit: Emitter, dims: Sequence[Sequence[int]], layout: Layout, dim: int) -> fx.Node | None:
    first = sum(len(d) for d in dims[:dim])
    axes = [a for a, placement in enumerate(layout) if placement == Shard(first)]
    inner = [a for a, p in enumerate(layout) if isinstance(p, Shard) and first < p.dim < first + len(dims[dim])]
    assert not inner, "an indexed dim is split below its outermost atom"
    if not axes:
        return None
    expanded = [size for d in dims for size in d]
    local = local_shape(expanded, layout, emit.topology.sizes)
    length = 1
    for place in range(first, first + len(dims[dim])):
        length *= local[place]
    return emit.call(aten.mul.Tensor, emit.coordinate(axes), length)


def global_indices(emit: Emitter, dims: Sequence[Sequence[int]], layout: Layout, dim: int) -> fx.Node:
    """The global indices of a dim's local entries, int64, whatever atoms of the dim are split."""
    first = sum(len(d) for d in dims[:dim])
    atoms = dims[dim]
    expanded = [size for d in dims for size in d]
    local = local_shape(expanded, layout, emit.topology.sizes)[first : first + len(atoms)]
    total: fx.Node | None = None
    stride = 1
    for k in range(len(atoms) - 1, -1, -1):
        index = emit.call(aten.arange.start, 0, local[k], dtype=torch.int64, device=torch.device("cpu"))
        axes = [a for a, placement in enumerate(layout) if placement == Shard(first + k)]
        if axes:
            start = emit.call(aten.mul.Tensor, emit.coordinate(axes), local[k])
            index = emit.call(aten.add.Tensor, index, start)
        if stride != 1:
            index = emit.call(aten.mul.Tensor, index, stride)
        index = emit.view(index, [local[k]] + [1] * (len(atoms) - 1 - k))
        total = index if total is None else emit.call(aten.add.Tensor, index, total)
        stride *= atoms[k]
    if total is None:
        return emit.call(aten.arange.start, 0, 1, dtype=torch.int64, device=torch.device("cpu"))
    size = 1
    for n in local:
        size *= n
    return emit.view(emit.call(aten.expand.default, total, list(local)), [size])


Localizer = Callable[[LocalOp], fx.Node]
LOCAL: dict[Any, Localizer] = {}


def localizer(*targets: Any) -> Callable[[Localizer], Localizer]:
    """Register how `targets` run locally."""

    def register(function: Localizer) -> Localizer:
        for target in targets:
            LOCAL[target] = function
        return function

    return register


def run_locally(op: LocalOp) -> fx.Node:
    """Emit the op on local operands."""
    return LOCAL.get(op.call.target, LocalOp.as_is)(op)


@localizer(*RESHAPES)
def _reshape(op: LocalOp) -> fx.Node:
    return op.emit.view(op.operands[0], op.result_shapes[0])


@localizer(aten.expand.default)
def _expand(op: LocalOp) -> fx.Node:
    return op.emit.call(aten.expand.default, op.operands[0], list(op.result_shapes[0]))


@localizer(*FILLS)
def _fill(op: LocalOp) -> fx.Node:
    if "_like" in str(op.call.target):
        return op.as_is()
    if op.call.target is aten.scalar_tensor.default:
        return op.as_is()
    return op.as_is(size=list(op.result_shapes[0]))


@localizer(*IOTAS)
def _iota(op: LocalOp) -> fx.Node:
    facts = op.call.results[0]
    assert facts is not None
    if not any(isinstance(placement, Shard) for placement in op.result_layouts[0]):
        return op.as_is()
    emit = op.emit
    index = global_indices(emit, op.op.results[0], op.result_layouts[0], 0)
    start, step = op.call.get("start", 0), op.call.get("step", 1)
    if facts.dtype != torch.int64:
        index = emit.call(torch.ops.prims.convert_element_type.default, index, facts.dtype)
    if step != 1:
        index = emit.call(aten.mul.Tensor, index, step)
    return emit.call(aten.add.Tensor, index, start) if start else index


@localizer(torch.ops.autopar.uniform.default)
def _uniform(op: LocalOp) -> fx.Node:
    """Over the expanded shape: each dim of it is one atom, of which a rank has one range."""
    emit, layout = op.emit, op.result_layouts[0]
    shape = [size for dim in op.op.results[0] for size in dim]
    local = local_shape(shape, layout, emit.topology.sizes)
    starts: list[fx.Node | int] = []
    for place, length in enumerate(local):
        axes = [a for a, placement in enumerate(layout) if placement == Shard(place)]
        starts.append(emit.call(aten.mul.Tensor, emit.coordinate(axes), length) if axes else 0)
    values = emit_uniform(emit.graph, op.operands[0], op.call.get("salt"), local, starts, shape, emit.meta)
    return emit.view(values, op.result_shapes[0])


def _in_range(op: LocalOp, indices: fx.Node, start: fx.Node, length: int) -> tuple[fx.Node, fx.Node]:
    """(local indices, clamped into range; which of them are ours)."""
    emit = op.emit
    local = emit.call(aten.sub.Tensor, indices, start)
    low = emit.call(aten.ge.Scalar, local, 0)
    high = emit.call(aten.lt.Scalar, local, length)
    return emit.call(aten.clamp.default, local, 0, length - 1), emit.call(aten.logical_and.default, low, high)


def _masked(op: LocalOp, x: fx.Node, mask: fx.Node) -> fx.Node:
    emit = op.emit
    zero = emit.call(aten.scalar_tensor.default, 0, dtype=x.meta["val"].dtype, device=torch.device("cpu"))
    return emit.call(aten.where.self, mask, x, zero)


@localizer(aten.embedding.default)
def _embedding(op: LocalOp) -> fx.Node:
    start = op.operand_start(0, 0)
    weight, indices = op.operands
    if start is None:
        return op.emit.call(aten.embedding.default, weight, indices)
    local, mine = _in_range(op, indices, start, op.emit.shape(weight)[0])
    rows = op.emit.call(aten.embedding.default, weight, local)
    return _masked(op, rows, op.emit.call(aten.unsqueeze.default, mine, -1))


@localizer(aten.embedding_dense_backward.default)
def _embedding_dense_backward(op: LocalOp) -> fx.Node:
    start = op.result_start(0, 0)
    if start is None:
        return op.as_is()
    emit = op.emit
    gradient, indices = op.operands
    rows = op.result_shapes[0][0]
    local, mine = _in_range(op, indices, start, rows)
    padding = op.call.get("padding_idx", -1)
    if padding >= 0:
        mine = emit.call(aten.logical_and.default, mine, emit.call(aten.ne.Scalar, indices, padding))
    gradient = _masked(op, gradient, emit.call(aten.unsqueeze.default, mine, -1))
    return emit.call(aten.embedding_dense_backward.default, gradient, local, rows, -1, False)


@localizer(aten.gather.default)
def _gather(op: LocalOp) -> fx.Node:
    dim = op.call.get("dim") % max(1, len(op.call.operands[0].shape))
    start = op.operand_start(0, dim) if op.call.operands[0].shape else None
    if start is None:
        return op.as_is()
    source, index = op.operands
    local, mine = _in_range(op, index, start, op.emit.shape(source)[dim])
    return _masked(op, op.emit.call(aten.gather.default, source, dim, local), mine)


@localizer(aten.index_select.default)
def _index_select(op: LocalOp) -> fx.Node:
    dim = op.call.get("dim") % len(op.call.operands[0].shape)
    start = op.operand_start(0, dim)
    if start is None:
        return op.as_is()
    source, index = op.operands
    local, mine = _in_range(op, index, start, op.emit.shape(source)[dim])
    picked = op.emit.call(aten.index_select.default, source, dim, local)
    rank = len(op.call.operands[0].shape)
    return _masked(op, picked, op.emit.view(mine, [-1 if d == dim else 1 for d in range(rank)]))


@localizer(aten.slice.Tensor)
def _slice(op: LocalOp) -> fx.Node:
    dim = op.call.get("dim", 0) % len(op.call.operands[0].shape)
    result = op.call.results[0]
    assert result is not None
    if op.call.operands[0].shape[dim] == result.shape[dim]:
        return op.operands[0]
    return op.as_is()


@localizer(aten.slice_backward.default, aten.select_backward.default)
def _input_sizes(op: LocalOp) -> fx.Node:
    return op.as_is(input_sizes=list(op.result_shapes[0]))


@localizer(aten.repeat.default)
def _repeat(op: LocalOp) -> fx.Node:
    target, source = op.result_shapes[0], op.emit.shape(op.operands[0])
    lead = len(target) - len(source)
    repeats = [*target[:lead], *(b // a if a else 1 for a, b in zip(source, target[lead:], strict=True))]
    return op.emit.call(aten.repeat.default, op.operands[0], repeats)


@localizer(aten.native_group_norm.default)
def _group_norm(op: LocalOp) -> fx.Node:
    return op.as_is(N=op.emit.shape(op.operands[0])[0])
