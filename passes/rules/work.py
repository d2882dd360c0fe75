"""What a rank computes for one op: an op on local shapes as the cost model's `Work`."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import fx

from costmodel.compute import Work, attention, matmul
from passes.program.precision import dtype_text
from passes.program.routed_ops import PUT_ROWS, ROUTED_MM, ROUTED_MM_WEIGHT, TAKE_ROWS
from passes.rules.call import Call
from passes.rules.view import RESHAPES

aten = torch.ops.aten

VIEWS = {
    *RESHAPES,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
    aten.slice.Tensor,
    aten.select.int,
}
"""Ops that move nothing: layouts of one buffer. (A reshape that must copy is priced where it is fused.)"""


def is_view_op(target: object) -> bool:
    """Whether an op returns a view of its operand."""
    return target in VIEWS or (isinstance(target, torch._ops.OpOverload) and target.is_view)


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view of its operand, or an item of what a view op returns."""
    return is_view_op(node.target) or (node.target is operator.getitem and is_view_op(node.all_input_nodes[0].target))


def base_of(node: fx.Node) -> fx.Node:
    """The node whose storage `node` is a view of; the node itself where it is no view."""
    while is_view(node):
        (node,) = node.all_input_nodes
    return node


GATHERS = {aten.embedding.default, aten.gather.default, aten.index.Tensor, aten.index_select.default, TAKE_ROWS}
_SCATTERS = {aten.embedding_dense_backward.default, aten.scatter_add.default, aten.index_put.default, PUT_ROWS}
_PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1)}
"""Matrix products -> their factors among the operands."""
_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_LEAST_SHARE = 0.03
"""Of what a fused op's tensors move at least: enough for the solver to prefer the layout that makes it small."""
COPIED = {
    aten.clone.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.slice_backward.default,
    aten._to_copy.default,
}
"""Ops that copy, and fuse as pointwise ops do."""
INLINED = {aten.clone.default, aten._to_copy.default}
"""Those of them that a compiled reader computes as it reads."""

Shape = tuple[int, ...]


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


class Traffic(Protocol):
    """Shares of the bytes of operands and results that an op really moves."""

    @property
    def reads(self) -> tuple[float, ...]:
        """Per operand."""

    @property
    def writes(self) -> tuple[float, ...]:
        """Per result."""

    @property
    def launch(self) -> float:
        """Its share of a kernel's launch."""


def is_reduction(target: object) -> bool:
    """Whether an op sums or compares along a dim, or normalises by such a sum."""
    text = str(target)
    return any(word in text for word in ("sum", "mean", "amax", "norm", "softmax", "var"))


def _fused(call: Call, operands: Sequence[Shape], results: Sequence[Shape], traffic: Traffic, dtype: str) -> Work:
    """What an op of a pointwise chain or a reduction moves."""
    read, written = 0.0, 0.0
    for share, shape, fact in zip(traffic.reads, operands, call.operands, strict=True):
        read += max(share, _LEAST_SHARE) * _bytes(shape, fact.dtype)
    for share, shape, made in zip(traffic.writes, results, call.results, strict=True):
        written += max(share, _LEAST_SHARE) * _bytes(shape, made.dtype) if made is not None else 0.0
    kind = "reduction" if is_reduction(call.target) else "pointwise"
    if call.target in GATHERS:
        kind, read = "gather", written
    return Work(0, read, written, kind, dtype, launches=traffic.launch)


def work_of(call: Call, operands: Sequence[Shape], results: Sequence[Shape], traffic: Traffic | None = None) -> Work:
    """The work of `call` on one rank, on operands and results of these local shapes.

    `traffic`: what of them really moves (`passes/analysis/fusion.py`); None: all.
    """
    target = call.target
    made = next((facts.dtype for facts in call.results if facts is not None), torch.float32)
    dtype, item = dtype_text(made), made.itemsize
    if target in VIEWS:
        return Work(0, 0, 0, "view", dtype)
    if target in _PRODUCTS:
        a, b = (operands[k] for k in _PRODUCTS[target])
        *batch, m, inner = a
        return matmul(m, b[-1], inner, batch=math.prod(batch), dtype=dtype, item_bytes=item)
    if target in (ROUTED_MM, ROUTED_MM_WEIGHT):
        return _routed(call, operands, results[0], dtype, item)
    if target in (_FLASH, _FLASH_BACKWARD):
        return _attention(call, operands, dtype, item)
    if traffic is not None:
        return _fused(call, operands, results, traffic, dtype)
    return _alone(call, operands, results, dtype)


def _attention(call: Call, operands: Sequence[Shape], dtype: str, item: int) -> Work:
    backward = call.target is _FLASH_BACKWARD
    q, k = operands[1:3] if backward else operands[:2]
    batch, heads, queries, width = q
    return attention(
        batch,
        heads,
        queries,
        k[2],
        width,
        kv_heads=k[1],
        causal=bool(call.get("is_causal", False)),
        seen=call.seen,
        backward=backward,
        dtype=dtype,
        item_bytes=item,
    )


def _alone(call: Call, operands: Sequence[Shape], results: Sequence[Shape], dtype: str) -> Work:
    """What an op does that is neither a matrix product nor fused with its neighbours."""
    target = call.target
    read = sum(_bytes(shape, facts.dtype) for shape, facts in zip(operands, call.operands, strict=True))
    written = sum(
        _bytes(shape, facts.dtype) for shape, facts in zip(results, call.results, strict=True) if facts is not None
    )
    elements = max([math.prod(shape) for shape in (*operands, *results)], default=0)
    if target in GATHERS:
        return Work(0, 2 * written, written, "gather", dtype)
    if target in _SCATTERS:
        return Work(0, read, written, "scatter", dtype)
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return Work(0, read, written, "pointwise", dtype)
    if not operands:
        return Work(0, 0, written, "pointwise", dtype)
    if is_reduction(target):
        return Work(elements, read, written, "reduction", dtype)
    if target in (aten.convolution.default, aten.convolution_backward.default):
        return _convolution(call, operands, results, Work(0, read, written, "matmul", dtype))
    if target in COPIED:
        return Work(0, read, written, "copy", dtype)
    return Work(elements, read, written, "unknown", dtype)


def _convolution(call: Call, operands: Sequence[Shape], results: Sequence[Shape], work: Work) -> Work:
    """The product that libraries make of it: each position of the result (transposed: of the input) has a row, a column
    for each value of the kernel that meets it. Backward takes as many products for the input's gradient, where that is
    wanted, and for the weight's. Products of groups are narrow: none that tensor cores are fast at.
    """
    backward = call.target is aten.convolution_backward.default
    y, x, weight = operands[:3] if backward else (results[0], *operands[:2])
    products = sum(made is not None for made in call.results[:2]) if backward else 1
    transposed = bool(call.get("transposed"))
    met = x if transposed else y
    work = replace(work, flops=2.0 * products * math.prod(met) * math.prod(weight[1:]))
    if call.get("groups", 1) != 1:
        return work
    k, n = (weight[0], math.prod(weight[1:])) if transposed else (math.prod(weight[1:]), weight[0])
    return replace(work, m=math.prod(met) // max(1, met[1]), n=n, k=k, batch=products)


def _routed(call: Call, operands: Sequence[Shape], result: Shape, dtype: str, item: int) -> Work:
    """Products of each expert's rows, as many for one expert as for another.

    A rank that has some of the experts multiplies its share of the rows, and moves all of them to where the kernel
    wants them and back.
    """
    rows, k = operands[0]
    weight = call.target is ROUTED_MM_WEIGHT
    experts, n = (result[0], result[2]) if weight else (operands[1][0], operands[1][2])
    every = call.operands[2].shape[1] - 1
    each = max(1, rows // every)
    m, inner = (k, each) if weight else (each, k)
    work = matmul(m, n, inner, batch=experts, dtype=dtype, item_bytes=item)
    if experts == every:
        return work
    moved = rows * (k + n) * item
    return replace(work, bytes_read=work.bytes_read + moved, bytes_written=work.bytes_written + moved)
