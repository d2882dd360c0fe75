"""`LocalOp`: an op as one rank runs it, and the table of what runs in its place (`localizer`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from costmodel.layout import Layout, Partial, Shard, local_shape
from passes.analysis.dims import ExpandedOp
from passes.program.emit import Emitter, Parts
from passes.rules.call import Call, map_operands

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
        return self.emit.call_again(self.node, *positional, **kwargs)  # what depends on values runs whole

    def operand_start(self, operand: int, dim: int) -> fx.Node | None:
        """Global index of the first local entry of an operand's dim, None where the dim is whole."""
        return _start(self.emit, self.op.operands[operand], self.operand_layouts[operand], dim)

    def result_start(self, result: int, dim: int) -> fx.Node | None:
        """The same for a result."""
        return _start(self.emit, self.op.results[result], self.result_layouts[result], dim)


def _start(emit: Emitter, dims: Sequence[Sequence[int]], layout: Layout, dim: int) -> fx.Node | None:
    if not dims[dim]:  # of size 1; what stands at that place is the next dim's
        return None
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


Localizer = Callable[[LocalOp], "fx.Node | Parts"]
LOCAL: dict[Any, Localizer] = {}


def localizer(*targets: Any) -> Callable[[Localizer], Localizer]:
    """Register how `targets` run locally."""

    def register(function: Localizer) -> Localizer:
        for target in targets:
            LOCAL[target] = function
        return function

    return register


def once(op: LocalOp, operand: int) -> fx.Node:
    """An operand that is added to a sum of which every rank has a term: itself on one rank, zero on the others."""
    added = op.operands[operand]
    given, made = op.operand_layouts[operand], op.result_layouts[0]
    axes = [a for a in range(len(made)) if isinstance(made[a], Partial) and not isinstance(given[a], Partial)]
    if not axes:
        return added
    return masked(op, added, op.emit.call(aten.eq.Scalar, op.emit.coordinate(axes), 0))


def masked(op: LocalOp, x: fx.Node, mask: fx.Node) -> fx.Node:
    emit = op.emit
    zero = emit.call(aten.scalar_tensor.default, 0, dtype=x.meta["val"].dtype, device=torch.device("cpu"))
    return emit.call(aten.where.self, mask, x, zero)
