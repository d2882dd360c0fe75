"""A captured step on another device: constants are made there, attention takes that device's kernels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from passes.graphs import graph_module

aten = torch.ops.aten
FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Attention kernels want the mask's rows and the heads' dims to start at multiples of 16 bytes.
ALIGNED_ELEMENTS = 8


def retarget(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of `gm` that runs on `device`: constants made there, attention by its kernels, fake values renewed.

    On the CPU, a copy as it is.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    moved = graph_module(gm, graph)
    for node, original in zip(graph.nodes, gm.graph.nodes, strict=True):
        node.meta = dict(original.meta)
    if device.type == "cpu":
        return moved
    for node in graph.nodes:
        if node.op == "get_attr":
            setattr(moved, node.target, getattr(moved, node.target).to(device))
        elif node.op == "call_function":
            _move_constants(node, device)
    if device.type == "cuda":
        for node in list(graph.nodes):
            if node.target is aten._scaled_dot_product_flash_attention_for_cpu.default:
                _retarget_attention(graph, node, device)
    graph.lint()
    moved.recompile()
    _renew_values(moved, device)
    return moved


def _move_constants(node: fx.Node, device: torch.device) -> None:
    """Makes on `device` what `node` would make on the CPU."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) and argument.type == "cpu" else argument

    node.args = fx.node.map_aggregate(node.args, moved)
    node.kwargs = fx.node.map_aggregate(dict(node.kwargs), moved)
    makes = isinstance(node.target, torch._ops.OpOverload) and not node.all_input_nodes
    if makes and any(argument.name == "device" for argument in node.target._schema.arguments):  # type: ignore[union-attr]
        node.kwargs = {**node.kwargs, "device": device}


def _argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of an op's call, or its default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, argument.default_value)
    raise AssertionError(f"{node.target} has no argument {name}")


def _retarget_attention(graph: fx.Graph, node: fx.Node, device: torch.device) -> None:
    """Replaces the CPU's flash attention, and its backward, by one of CUDA's (`_kernel` says which)."""
    query, key, value = node.args[:3]
    mask = _argument(node, "attn_mask")
    shapes = [operand.meta["val"].shape for operand in (query, key, value)]  # type: ignore[union-attr]
    dtype = query.meta["val"].dtype  # type: ignore[union-attr]
    value_dim = shapes[2][-1]
    options = {"scale": _argument(node, "scale")}
    if options["scale"] is None:
        options["scale"] = shapes[0][-1] ** -0.5
    dropout, causal = _argument(node, "dropout_p"), _argument(node, "is_causal")
    kernel = _kernel(shapes, dtype, mask is not None, dropout, causal, device)
    repeats = shapes[0][1] // shapes[1][1] if kernel == "efficient" else 1  # the others take fewer keys than queries
    backward = [u for u in node.users if u.target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default]
    if backward:
        raise AssertionError(f"{node.name}: its backward takes it whole")
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    backward = [u for u in items[1].users if u is not None] if 1 in items else []

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = {key: value for key, value in position.meta.items() if key != "val"}
        return made

    def aligned(operand: Any, width: int) -> Any:
        short = -width % ALIGNED_ELEMENTS
        return operand if not short else call(aten.constant_pad_nd.default, operand, [0, short], 0.0)

    def narrowed(result: fx.Node, width: int) -> fx.Node:
        return result if width % ALIGNED_ELEMENTS == 0 else call(aten.slice.Tensor, result, -1, 0, width)

    def repeated(operand: Any, shape: Sequence[int]) -> Any:
        """Keys or values for each query head."""
        if repeats == 1:
            return operand
        rows, heads, length, width = shape[0], shape[1], shape[2], shape[3] + -shape[3] % ALIGNED_ELEMENTS
        operand = call(
            aten.expand.default, call(aten.unsqueeze.default, operand, 2), [rows, heads, repeats, length, width]
        )
        return call(aten.reshape.default, operand, [rows, heads * repeats, length, width])

    def added(result: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Gradients of repeated keys or values, summed over their repetitions."""
        if repeats == 1:
            return result
        result = call(aten.reshape.default, result, [shape[0], shape[1], repeats, shape[2], shape[3]])
        return call(aten.sum.dim_IntList, result, [2])

    position = node
    with graph.inserting_before(node):
        operands = [aligned(operand, shape[-1]) for operand, shape in zip((query, key, value), shapes, strict=True)]
        operands[1:] = [repeated(operand, shape) for operand, shape in zip(operands[1:], shapes[1:], strict=True)]
        if mask is not None:
            mask = _mask(call, mask, (*shapes[0][:3], shapes[1][2]), dtype)
        if kernel == "flash":
            forward = call(
                aten._scaled_dot_product_flash_attention.default, *operands, dropout, causal, False, **options
            )
        else:
            fused = {
                "cudnn": aten._scaled_dot_product_cudnn_attention.default,
                "efficient": aten._scaled_dot_product_efficient_attention.default,
            }
            forward = call(fused[kernel], *operands, mask, bool(backward), dropout, causal, **options)
        picks = (0, 1, 2, 3) if kernel == "efficient" else (0, 1, 6, 7)
        output, logsumexp, seed, offset = (call(operator.getitem, forward, pick) for pick in picks)
        result = narrowed(output, value_dim)
    items[0].replace_all_uses_with(result)
    lengths = shapes[0][2], shapes[1][2]
    for position in backward:
        with graph.inserting_before(position):
            given = aligned(position.args[0], value_dim), *operands
            if kernel == "flash":
                made = call(
                    aten._scaled_dot_product_flash_attention_backward.default,
                    *given, output, logsumexp, None, None, *lengths, dropout, causal, seed, offset, **options,
                )  # fmt: skip
            elif kernel == "cudnn":
                made = call(
                    aten._scaled_dot_product_cudnn_attention_backward.default,
                    *given, output, logsumexp, seed, offset, mask, None, None, *lengths, dropout, causal, **options,
                )  # fmt: skip
            else:
                made = call(
                    aten._scaled_dot_product_efficient_attention_backward.default,
                    *given, mask, output, logsumexp, seed, offset, dropout, [True, True, True, False], causal,
                    **options,
                )  # fmt: skip
            for user in list(position.users):
                index: Any = user.args[1]
                with graph.inserting_before(user):
                    gradient = narrowed(call(operator.getitem, made, index), shapes[index][-1])
                    user.replace_all_uses_with(gradient if index == 0 else added(gradient, shapes[index]))
                graph.erase_node(user)
        graph.erase_node(position)
    for item in items.values():
        graph.erase_node(item)
    graph.erase_node(node)


def _kernel(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, mask: bool, dropout: float, causal: bool, device: torch.device
) -> Literal["flash", "efficient", "cudnn"]:
    """Flash attention for half precision without a mask, cuDNN's where eager would take it, else the memory-efficient.

    torch knows which is fastest on this device; where none is there to ask, flash.
    """
    head_dim, value_dim = shapes[0][-1], shapes[2][-1]
    if mask or dtype not in FLASH_DTYPES or head_dim != value_dim or head_dim > 256:
        return "efficient"
    if head_dim % ALIGNED_ELEMENTS or not torch.cuda.is_available():
        return "flash"
    query, key, value = (
        torch.empty((1, *shape[1:]), dtype=dtype, device=device, requires_grad=True) for shape in shapes
    )
    grouped = shapes[0][1] != shapes[1][1]
    chosen = torch._fused_sdp_choice(query, key, value, None, dropout, causal, enable_gqa=grouped)
    return "cudnn" if chosen == SDPBackend.CUDNN_ATTENTION.value else "flash"


def _mask(call: Callable[..., fx.Node], mask: Any, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
    """`mask` as the memory-efficient kernel takes it: added to the scores, its rows aligned, of the scores' `shape`."""
    keys = mask.meta["val"].shape[-1]
    if mask.meta["val"].dtype == torch.bool:
        zero = call(aten.scalar_tensor.default, 0.0, dtype=dtype, device=mask.meta["val"].device)
        never = call(aten.scalar_tensor.default, float("-inf"), dtype=dtype, device=mask.meta["val"].device)
        mask = call(aten.where.self, mask, zero, never)
    if short := -keys % ALIGNED_ELEMENTS:
        mask = call(aten.constant_pad_nd.default, mask, [0, short], 0.0)
        mask = call(aten.slice.Tensor, mask, -1, 0, keys)
    return call(aten.expand.default, mask, list(shape))


def _renew_values(gm: fx.GraphModule, device: torch.device) -> None:
    """Computes the nodes' fake values again, on `device`."""

    class Renew(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                n.meta["val"] = result
            return result

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            for value in (node.meta["val"] for node in gm.graph.find_nodes(op="placeholder"))
        ]
        del mode
        Renew(gm).run(*inputs)
