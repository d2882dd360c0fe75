"""How a rank runs its part of an op.

Most ops run as they are on local tensors. The ones here carry sizes that must become local, or look things up by global
index: an embedding whose rows are split looks up the rows it has and gives zero for the others.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from costmodel.layout import Layout, Partial, Shard, local_shape
from passes.dims import ExpandedOp
from passes.emit import Emitter, Parts
from passes.errors import UnsupportedOpError
from passes.fakes import DynamicOutputShapeException
from passes.routed_ops import PUT_ROWS, ROUTED_MM, ROUTED_MM_WEIGHT, TAKE_ROWS
from passes.rules.call import Call, Operand, call_of, map_operands
from passes.rules.create import FILLS, IOTAS
from passes.rules.view import RESHAPES
from passes.rules.window import UPSAMPLE_BACKWARDS
from passes.uniform import emit_uniform

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
        try:
            return self.emit.call(self.node.target, *positional, **kwargs)
        except DynamicOutputShapeException:  # it runs whole, so its result is the program's
            return self.emit.known(self.node.meta["val"], self.node.target, *positional, **kwargs)

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


def run_locally(op: LocalOp) -> fx.Node:
    """Emit the op on local operands. Several results may come as `Parts`, which stand for the node that yields them."""
    target = op.call.target
    run = LOCAL.get(target) or LOCAL.get(str(target)) or LocalOp.as_is
    return cast(fx.Node, run(op))


@localizer(*RESHAPES, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _reshape(op: LocalOp) -> fx.Node:
    return op.emit.view(op.operands[0], op.result_shapes[0])


@localizer(aten.view_as_complex.default)
def _view_as_complex(op: LocalOp) -> fx.Node:
    """Pairs are read where they stand, which a slice of uneven rows (a padded dim's) has at odd places."""
    x = op.operands[0]
    value = x.meta["val"]
    paired = value.stride(-1) == 1 and not any(n % 2 for n in (*value.stride()[:-1], value.storage_offset()))
    return op.emit.call(aten.view_as_complex.default, x if paired else op.emit.contiguous(x))


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


def in_dtype(number: float, dtype: torch.dtype) -> float:
    """A number as `arange` of that dtype takes it: cut to a whole one for whole numbers."""
    return number if dtype.is_floating_point else int(number)


@localizer(*IOTAS)
def _iota(op: LocalOp) -> fx.Node:
    facts = op.call.results[0]
    assert facts is not None
    if not any(isinstance(placement, Shard) for placement in op.result_layouts[0]):
        return op.as_is()
    emit = op.emit
    index = global_indices(emit, op.op.results[0], op.result_layouts[0], 0)
    start, step = in_dtype(op.call.get("start", 0), facts.dtype), in_dtype(op.call.get("step", 1), facts.dtype)
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
    if op.call.get("padded") is not None:  # numbers are those of the tensor without its padding
        sizes = list(zip(op.op.results[0], op.call.get("size"), strict=True))
        assert not any(size % math.prod(dim[1:]) for dim, size in sizes), "a dim is padded below its outermost atom"
        shape = [n for dim, size in sizes for n in ((size // math.prod(dim[1:]), *dim[1:]) if dim else ())]
    starts: list[fx.Node | int] = []
    for place, length in enumerate(local):
        axes = [a for a, placement in enumerate(layout) if placement == Shard(place)]
        starts.append(emit.call(aten.mul.Tensor, emit.coordinate(axes), length) if axes else 0)
    salt = call_of(op.node).get("salt")  # layers share a call, not its number
    values = emit_uniform(emit.graph, op.operands[0], salt, local, starts, shape, emit.meta)
    return emit.view(values, op.result_shapes[0])


def once(op: LocalOp, operand: int) -> fx.Node:
    """An operand that is added to a sum of which every rank has a term: itself on one rank, zero on the others."""
    added = op.operands[operand]
    given, made = op.operand_layouts[operand], op.result_layouts[0]
    axes = [a for a in range(len(made)) if isinstance(made[a], Partial) and not isinstance(given[a], Partial)]
    if not axes:
        return added
    return _masked(op, added, op.emit.call(aten.eq.Scalar, op.emit.coordinate(axes), 0))


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
        return _masked(op, found, beside(mine))
    low, high = emit.call(aten.ge.Scalar, indices, 0), emit.call(aten.lt.Scalar, indices, length)
    zero, none = (emit.call(aten.scalar_tensor.default, x, dtype=dtype, device=cpu) for x in (0, math.nan))
    other = emit.call(aten.where.self, emit.call(aten.logical_and.default, low, high), zero, none)
    return emit.call(aten.where.self, beside(mine), found, beside(other))


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
    values = _masked(op, values, _beside(op, mine, dim, rank))
    return emit.call(op.call.target, base, [None] * dim + [local], values, True)


@localizer(aten.index_add.default)
def _index_add(op: LocalOp) -> fx.Node:
    if len(op.call.operands) < 3 or not op.call.operands[0].shape:
        return op.as_is()
    dim = op.call.get("dim") % len(op.call.operands[0].shape)
    emit, base, (_, index, source) = op.emit, once(op, 0), op.operands
    start = op.operand_start(0, dim)
    if start is not None:
        index, mine = _in_range(op, index, start, emit.shape(base)[dim])
        source = _masked(op, source, _beside(op, mine, dim, len(emit.shape(source))))
    return emit.call(aten.index_add.default, base, dim, index, source, alpha=op.call.get("alpha", 1))


@localizer(aten.scatter_add.default)
def _scatter_add(op: LocalOp) -> fx.Node:
    if not op.call.operands[0].shape:
        return op.as_is()
    dim = op.call.get("dim") % len(op.call.operands[0].shape)
    emit, base, (_, index, source) = op.emit, once(op, 0), op.operands
    start = op.operand_start(0, dim)
    if start is not None:
        index, mine = _in_range(op, index, start, emit.shape(base)[dim])
        source = _masked(op, source, mine)
    return emit.call(aten.scatter_add.default, base, dim, index, source)


@localizer(aten.addmm.default, aten.baddbmm.default)
def _added(op: LocalOp) -> fx.Node:
    return replace(op, operands=(once(op, 0), *op.operands[1:])).as_is()


# ------------------------------------------------------------------------------------------------------------- windows
def _local_groups(op: LocalOp, x: tuple[int, ...], y: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """How many groups of channels our part of a convolution has: dim 1 of the weight is one group's channels."""
    return (y if op.call.get("transposed") else x)[1] // weight[1]


@localizer(aten.convolution.default)
def _convolution(op: LocalOp) -> fx.Node:
    shape = op.emit.shape
    groups = _local_groups(op, shape(op.operands[0]), op.result_shapes[0], shape(op.operands[1]))
    biased = (*op.operands[:2], once(op, 2)) if len(op.operands) > 2 else op.operands
    return replace(op, operands=biased).as_is(groups=groups)


@localizer(aten.convolution_backward.default)
def _convolution_backward(op: LocalOp) -> fx.Node:
    gradient, x, weight = map(op.emit.shape, op.operands)
    changed: dict[str, Any] = {"groups": _local_groups(op, x, gradient, weight)}
    if op.call.get("bias_sizes") is not None:
        changed["bias_sizes"] = [gradient[1]]
    return op.as_is(**changed)


@localizer(*UPSAMPLE_BACKWARDS)
def _upsample_backward(op: LocalOp) -> fx.Node:
    return op.as_is(input_size=list(op.result_shapes[0]))


# ------------------------------------------------------------------------------------------------------ routed experts
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
    return _masked(op, back, emit.view(mine, (ours.rows, 1)))


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


@localizer(aten.slice.Tensor)
def _slice(op: LocalOp) -> fx.Node:
    dim = op.call.get("dim", 0) % len(op.call.operands[0].shape)
    result = op.call.results[0]
    assert result is not None
    if op.call.operands[0].shape[dim] == result.shape[dim]:
        return op.operands[0]
    return op.as_is()


@localizer(aten.slice_scatter.default)
def _slice_scatter(op: LocalOp) -> fx.Node:
    dim = op.call.get("dim", 0)
    size, part = (facts.shape[dim] for facts in op.call.operands)
    return op.as_is(start=0, end=sys.maxsize) if size == part else op.as_is()


@localizer(aten.slice_backward.default)
def _slice_backward(op: LocalOp) -> fx.Node:
    dim, sizes = op.call.get("dim"), list(op.result_shapes[0])
    whole = op.call.get("input_sizes")[dim]
    if op.call.operands[0].shape[dim] == whole:  # from the first, also where that is said from the end
        return op.as_is(input_sizes=sizes, start=0, end=sys.maxsize)
    return op.as_is(input_sizes=sizes)


@localizer(
    aten.select_backward.default,
    aten.diagonal_backward.default,
    aten.unfold_backward.default,
)
def _input_sizes(op: LocalOp) -> fx.Node:
    return op.as_is(input_sizes=list(op.result_shapes[0]))


def _storage_order(op: LocalOp) -> list[int]:
    """The dims of operand 0 in the order in which the model's tensor had them in memory.

    Raises:
        UnsupportedOpError: that tensor was no permutation of a row-major one.
    """
    value = next(node for node in op.node.all_input_nodes).meta["val"]
    order = sorted(range(value.dim()), key=lambda d: (-value.stride(d), d))
    if not value.permute(order).is_contiguous() or value.storage_offset():
        raise UnsupportedOpError(
            f"{op.node.meta.get('source', '')}: {op.call.target} of a tensor with strides {value.stride()} for shape "
            f"{tuple(value.shape)}: it reads memory that is not the tensor's own; call .contiguous() before it"
        )
    return order


@localizer(aten.as_strided.default, aten.as_strided_scatter.default)
def _as_strided(op: LocalOp) -> fx.Node:
    """Strides count elements in the memory of the model's own tensor, whatever ours look like."""
    emit, order = op.emit, _storage_order(op)
    memory = emit.contiguous(emit.call(aten.permute.default, op.operands[0], order))
    made = replace(op, operands=(memory, *op.operands[1:])).as_is()
    if op.call.target is aten.as_strided.default:
        return made
    return emit.call(aten.permute.default, made, [order.index(d) for d in range(len(order))])


@localizer(aten.repeat.default)
def _repeat(op: LocalOp) -> fx.Node:
    target, source = op.result_shapes[0], op.emit.shape(op.operands[0])
    lead = len(target) - len(source)
    repeats = [*target[:lead], *(b // a if a else 1 for a, b in zip(source, target[lead:], strict=True))]
    return op.emit.call(aten.repeat.default, op.operands[0], repeats)


# ------------------------------------------------------------------------ kernels that do not look at operands' strides
def _row_major(op: LocalOp) -> LocalOp:
    """The op on operands in row-major memory, where capture saw them so and a transpose of a rank's part is not."""
    return replace(op, operands=tuple(map(op.emit.contiguous, op.operands)))


@localizer(aten._weight_norm_interface.default, aten._weight_norm_interface_backward.default)
def _of_row_major(op: LocalOp) -> fx.Node:
    return _row_major(op).as_is()


@localizer(aten.native_group_norm.default, aten.native_group_norm_backward.default)
def _group_norm(op: LocalOp) -> fx.Node:
    images = [x.meta["val"] for x in op.operands if len(op.emit.shape(x)) == 4]
    channels_last = images and all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
    return (op if channels_last else _row_major(op)).as_is(N=op.emit.shape(op.operands[0])[0])


@localizer(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
def _attention(op: LocalOp) -> fx.Node:
    """A head's entries lie side by side; the log-sum-exp and a mask are read by their strides."""
    mask = op.call.get("attn_mask")

    def side_by_side(index: int, x: fx.Node) -> fx.Node:
        shape = op.emit.shape(x)
        read_so = len(shape) == 4 and mask != Operand(index) and shape[-1] > 1
        return op.emit.contiguous(x) if read_so and x.meta["val"].stride(-1) != 1 else x

    return replace(op, operands=tuple(side_by_side(i, x) for i, x in enumerate(op.operands))).as_is()
