"""CUDA's fused attention in place of the CPU's, in a captured graph: padded, repeated, masked as its kernels want."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.nn.attention import SDPBackend

aten = torch.ops.aten
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Attention kernels want the mask's rows and the heads' dims to start at multiples of 16 bytes.
ALIGNED_ELEMENTS = 8

Kernel = Literal["flash", "efficient", "cudnn"]
_FORWARD: dict[Kernel, Any] = {
    "flash": aten._scaled_dot_product_flash_attention.default,
    "efficient": aten._scaled_dot_product_efficient_attention.default,
    "cudnn": aten._scaled_dot_product_cudnn_attention.default,
}
_BACKWARD: dict[Kernel, Any] = {
    "flash": aten._scaled_dot_product_flash_attention_backward.default,
    "efficient": aten._scaled_dot_product_efficient_attention_backward.default,
    "cudnn": aten._scaled_dot_product_cudnn_attention_backward.default,
}
_RESULTS: dict[Kernel, tuple[int, int, int, int]] = {
    "flash": (0, 1, 6, 7), "efficient": (0, 1, 2, 3), "cudnn": (0, 1, 6, 7)
}  # fmt: skip
"""Where among a kernel's results are its output, the scores' log-sum-exp, the random seed and its offset."""


def retarget_attention(graph: fx.Graph, node: fx.Node, device: torch.device) -> None:
    """Replaces the CPU's flash attention `node`, and its backward, by the kernel of CUDA that eager would take."""
    if any(user.target is not operator.getitem for user in node.users):
        raise AssertionError(f"{node.name}: its backward takes it whole")
    items = {user.args[1]: user for user in node.users}
    backward = list(items[1].users) if 1 in items else []
    attention = _attention(node, device)
    write = _Writer(graph, node)
    with graph.inserting_before(node):
        operands = attention.operands(write)
        results = attention.forward(write, operands, trained=bool(backward))
        items[0].replace_all_uses_with(write.narrowed(results[0], attention.shapes[2][-1]))
    for old in backward:
        write = _Writer(graph, old)
        with graph.inserting_before(old):
            made = attention.backward(write, old.args[0], operands, results)
        for user in list(old.users):
            with graph.inserting_before(user):
                user.replace_all_uses_with(attention.gradient(write, made, user.args[1]))
            graph.erase_node(user)
        graph.erase_node(old)
    for item in items.values():
        graph.erase_node(item)
    graph.erase_node(node)


@dataclass(frozen=True)
class _Attention:
    """What an attention of the graph is given, and the kernel that takes its place."""

    given: tuple[fx.Node, ...]
    mask: Any
    dropout: float
    causal: bool
    scale: float
    kernel: Kernel

    @property
    def shapes(self) -> list[torch.Size]:
        """Of query, key and value."""
        return [operand.meta["val"].shape for operand in self.given]

    @property
    def repeats(self) -> int:
        """Query heads per head of keys and values, for the memory-efficient kernel, which wants as many of both."""
        return self.shapes[0][1] // self.shapes[1][1] if self.kernel == "efficient" else 1

    def operands(self, write: _Writer) -> list[Any]:
        """Query, key, value and mask as the kernel takes them."""
        shapes = self.shapes
        aligned = [write.aligned(each, shape[-1]) for each, shape in zip(self.given, shapes, strict=True)]
        aligned[1:] = [self._repeated(write, each, shape) for each, shape in zip(aligned[1:], shapes[1:], strict=True)]
        if self.mask is None:
            return [*aligned, None]
        scores = (*shapes[0][:3], shapes[1][2])
        return [*aligned, write.mask(self.mask, scores, self.given[0].meta["val"].dtype)]

    def forward(self, write: _Writer, operands: Sequence[Any], *, trained: bool) -> list[fx.Node]:
        """Output, log-sum-exp, seed and offset."""
        *qkv, mask = operands
        if self.kernel == "flash":
            arguments: tuple[Any, ...] = self.dropout, self.causal, False
        else:
            arguments = mask, trained, self.dropout, self.causal
        made = write.call(_FORWARD[self.kernel], *qkv, *arguments, scale=self.scale)
        return [write.call(operator.getitem, made, index) for index in _RESULTS[self.kernel]]

    def backward(self, write: _Writer, tangent: Any, operands: Sequence[Any], results: Sequence[fx.Node]) -> fx.Node:
        """The gradients, as the kernel makes them."""
        *qkv, mask = operands
        output, logsumexp, *random = results
        lengths = self.shapes[0][2], self.shapes[1][2]
        if self.kernel == "flash":
            arguments: tuple[Any, ...] = output, logsumexp, None, None, *lengths, self.dropout, self.causal, *random
        elif self.kernel == "cudnn":
            arguments = output, logsumexp, *random, mask, None, None, *lengths, self.dropout, self.causal
        else:
            wanted = [True, True, True, False]  # not the mask's
            arguments = mask, output, logsumexp, *random, self.dropout, wanted, self.causal
        given = write.aligned(tangent, self.shapes[2][-1])
        return write.call(_BACKWARD[self.kernel], given, *qkv, *arguments, scale=self.scale)

    def gradient(self, write: _Writer, made: fx.Node, index: Any) -> fx.Node:
        """That of query, key or value, from what the kernel's backward made."""
        shape = self.shapes[index]
        gradient = write.narrowed(write.call(operator.getitem, made, index), shape[-1])
        if index == 0 or self.repeats == 1:
            return gradient
        gradient = write.call(aten.reshape.default, gradient, [shape[0], shape[1], self.repeats, shape[2], shape[3]])
        return write.call(aten.sum.dim_IntList, gradient, [2])

    def _repeated(self, write: _Writer, operand: Any, shape: Sequence[int]) -> Any:
        """Keys or values for each query head."""
        if self.repeats == 1:
            return operand
        rows, heads, length, width = shape[0], shape[1], shape[2], shape[3] + -shape[3] % ALIGNED_ELEMENTS
        each = write.call(aten.unsqueeze.default, operand, 2)
        each = write.call(aten.expand.default, each, [rows, heads, self.repeats, length, width])
        return write.call(aten.reshape.default, each, [rows, heads * self.repeats, length, width])


def _attention(node: fx.Node, device: torch.device) -> _Attention:
    given: Any = node.args[:3]
    values = [operand.meta["val"] for operand in given]
    mask, dropout, causal = (_argument(node, name) for name in ("attn_mask", "dropout_p", "is_causal"))
    scale = _argument(node, "scale")
    kernel = kernel_of([v.shape for v in values], values[0].dtype, mask is not None, dropout, causal, device)
    return _Attention(given, mask, dropout, causal, values[0].shape[-1] ** -0.5 if scale is None else scale, kernel)


@dataclass(frozen=True)
class _Writer:
    """Writes calls with the metadata of `like`, without its fake value."""

    graph: fx.Graph
    like: fx.Node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node where the graph inserts."""
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {key: value for key, value in self.like.meta.items() if key != "val"}
        return made

    def aligned(self, operand: Any, width: int) -> Any:
        """`operand`, whose last dim has `width` entries, with zeros up to what kernels want."""
        short = -width % ALIGNED_ELEMENTS
        return operand if not short else self.call(aten.constant_pad_nd.default, operand, [0, short], 0.0)

    def narrowed(self, result: fx.Node, width: int) -> fx.Node:
        """`result` without what `aligned` added."""
        return result if width % ALIGNED_ELEMENTS == 0 else self.call(aten.slice.Tensor, result, -1, 0, width)

    def mask(self, mask: Any, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """`mask` as the memory-efficient kernel takes it: added to scores, rows aligned, of the scores' `shape`."""
        keys = mask.meta["val"].shape[-1]
        if mask.meta["val"].dtype == torch.bool:
            zero = self.call(aten.scalar_tensor.default, 0.0, dtype=dtype, device=mask.meta["val"].device)
            never = self.call(aten.scalar_tensor.default, float("-inf"), dtype=dtype, device=mask.meta["val"].device)
            mask = self.call(aten.where.self, mask, zero, never)
        if short := -keys % ALIGNED_ELEMENTS:
            mask = self.call(aten.constant_pad_nd.default, mask, [0, short], 0.0)
            mask = self.call(aten.slice.Tensor, mask, -1, 0, keys)
        return self.call(aten.expand.default, mask, list(shape))


def kernel_of(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, mask: bool, dropout: float, causal: bool, device: torch.device
) -> Kernel:
    """Flash attention for half precision without a mask, cuDNN's where eager would take it, else the memory-efficient.

    torch knows which this device has and which is fastest; where none is there to ask, flash. A causal mask over more
    keys than queries, or fewer, begins at the first of both in eager; in flash attention it ends at the last.
    """
    head_dim, value_dim = shapes[0][-1], shapes[2][-1]
    uneven = causal and shapes[0][-2] != shapes[1][-2]
    if mask or uneven or dtype not in FLASH_DTYPES or head_dim != value_dim or head_dim > 256:
        return "efficient"
    if not torch.cuda.is_available():
        return "flash"
    short = -head_dim % ALIGNED_ELEMENTS
    query, key, value = (
        torch.empty((1, *shape[1:-1], head_dim + short), dtype=dtype, device=device, requires_grad=True)
        for shape in shapes
    )
    grouped = shapes[0][1] != shapes[1][1]
    chosen = torch._fused_sdp_choice(query, key, value, None, dropout, causal, enable_gqa=grouped)
    if chosen == SDPBackend.CUDNN_ATTENTION.value and not short:
        return "cudnn"
    return "flash" if chosen in (SDPBackend.FLASH_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value) else "efficient"


def _argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of an op's call, or its default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            if index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, argument.default_value)
    raise AssertionError(f"{node.target} has no argument {name}")
