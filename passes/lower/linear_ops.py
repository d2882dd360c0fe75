"""Which ops may run once on a sum in the place of once on each of its terms: exchanges of gradients held back."""

from __future__ import annotations

import operator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx

from passes.program.local import COLLECTIVES, WAIT
from passes.rules.work import is_view_op

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
_REDUCTIONS = {
    c10d.all_reduce.default,
    c10d.all_reduce_coalesced.default,
    c10d.reduce_scatter_tensor.default,
    c10d.reduce_scatter_tensor_coalesced.default,
}
_OF_ALL = {
    WAIT,
    operator.getitem,
    aten.cat.default,
    aten.stack.default,
    aten.clone.default,
    aten.neg.default,
    aten._to_copy.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
}
"""Linear in all their tensors at once."""
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_SCALED = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_PICKED = {aten.index.Tensor, aten.index_select.default, aten.gather.default}


def is_linear(node: fx.Node, fixed: AbstractSet[fx.Node]) -> bool:
    """Whether `op(a + b) = op(a) + op(b)` for the operands that differ from term to term, as all but `fixed` do.

    What is not known to be is taken not to be.
    """
    target: Any = node.target
    if isinstance(val := node.meta.get("val"), torch.Tensor) and not (val.is_floating_point() or val.is_complex()):
        return False
    varying = [x for x in node.all_input_nodes if x not in fixed]
    args: Any = node.args
    if target in _REDUCTIONS:
        return args[1] in ("sum", "avg")
    if target in COLLECTIVES or target in _OF_ALL or is_view_op(node.target):
        return len(varying) == len(node.all_input_nodes)
    if target in _SUMS:
        return len(args) == 2 and all(x in varying for x in args)
    if target in _SCALED:
        left, right = args
        if target in (aten.mul.Tensor, aten.mul.Scalar) and left not in varying:
            left, right = right, left
        return left in varying and right not in varying
    if target in _PICKED:
        return varying == [args[0]]
    if target is aten.constant_pad_nd.default:
        return len(args) < 3 or args[2] == 0
    return False
