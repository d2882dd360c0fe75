"""Pointwise ops: every dim is a factor; operands broadcast from the right."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from passes.rules.call import Call, Operand
from passes.rules.form import Form, FormBuilder, broadcast
from passes.rules.table import POINTWISE, rule, whole_form

aten = torch.ops.aten
prims = torch.ops.prims

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor}
_COPIES = {
    aten.neg.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
    aten._conj.default,
    aten.mul.Scalar,
    aten.div.Scalar,
}


def broadcast_form(call: Call, linear: Iterable[Iterable[int]] = ()) -> Form:
    """Form of an op whose results all have the operands' broadcast shape; the whole form where they have not."""
    shape = torch.broadcast_shapes(*(operand.shape for operand in call.operands))
    if any(result is None or result.shape != shape for result in call.results):
        return whole_form(call)
    build = FormBuilder()
    dims = build.dims(shape)
    operands = [broadcast(dims, operand.shape) for operand in call.operands]
    return build.form(operands, [dims for _ in call.results], linear)


def pointwise(call: Call) -> Form:
    """Any pointwise op, and in which operands it is linear.

    A product with a tensor is, but lets no partial sum through: adding up first costs one collective of the same size,
    and each choice less counts on every axis. A product with a scalar (a loss's scale) does.
    """
    linear: list[list[int]] = []
    tensors = range(len(call.operands))
    if call.is_float:
        if call.target in _SUMS:
            if isinstance(call.get("other"), Operand):
                linear = [list(tensors)]
        elif call.target in _PRODUCTS:
            linear = [[i] for i in tensors if all(not call.operands[j].shape for j in tensors if j != i)]
        elif call.target is aten.div.Tensor:
            linear = [] if call.get("rounding_mode") or any(f.shape for f in call.operands[1:]) else [[0]]
        elif call.target in _COPIES:
            linear = [[0]]
    if call.target is aten.where.self and all(facts.dtype.is_floating_point for facts in call.operands[1:]):
        linear = [[1, 2]]
    if call.target is aten.masked_fill.Scalar and call.get("value") == 0:
        linear = [[0]]
    return broadcast_form(call, linear)


POINTWISE.append(pointwise)
rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.floor_divide.default,
    aten.polar.default,
    aten.complex.default,
    aten._conj.default,
)(pointwise)
