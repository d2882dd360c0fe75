"""How a rank runs its part of an op.

Most ops run as they are on local tensors. The ones here carry sizes that must become local; those that look things up
by global index are in `look_ups`, products of routed experts in `local_experts`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from costmodel.layout import Shard, local_shape
from passes.errors import UnsupportedOpError
from passes.program.uniform import emit_uniform
from passes.rewrite import local_experts as _registers_experts  # noqa: F401
from passes.rewrite import look_ups as _registers_look_ups  # noqa: F401
from passes.rewrite.local_op import LOCAL, LocalOp, global_indices, localizer, once
from passes.rules.call import Operand, call_of
from passes.rules.create import FILLS, IOTAS
from passes.rules.view import RESHAPES
from passes.rules.window import UPSAMPLE_BACKWARDS

aten = torch.ops.aten


def run_locally(op: LocalOp) -> fx.Node:
    """Emit the op on local operands. Several results may come as `Parts`, which stand for the node that yields them."""
    run = LOCAL.get(op.call.target, LocalOp.as_is)
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


@localizer(aten.addmm.default, aten.baddbmm.default)
def _added(op: LocalOp) -> fx.Node:
    return replace(op, operands=(once(op, 0), *op.operands[1:])).as_is()


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
