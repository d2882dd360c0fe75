"""Ops that make tensors from sizes alone."""

from __future__ import annotations

import torch

from passes.rules.call import Call
from passes.rules.form import Form, FormBuilder
from passes.rules.table import rule

aten = torch.ops.aten

FILLS = (
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.scalar_tensor.default,
)
IOTAS = (aten.arange.default, aten.arange.start, aten.arange.start_step, torch.ops.prims.iota.default)


@rule(*FILLS)
def _fill(call: Call) -> Form:
    """Operands, if any, give only dtype and device; `_like` operands share the result's dims."""
    shape = call.result.shape
    build = FormBuilder()
    dims = build.dims(shape)
    operands = [dims if operand.shape == shape else build.dims(operand.shape, whole=True) for operand in call.operands]
    return build.form(operands, [dims])


@rule(*IOTAS)
def _iota(call: Call) -> Form:
    build = FormBuilder()
    return build.form([], [build.dims(call.result.shape)])


@rule(torch.ops.aten.eye.default, torch.ops.aten.eye.m)
def _whole(call: Call) -> Form:
    build = FormBuilder()
    return build.form([], [build.dims(call.result.shape, whole=True)])
