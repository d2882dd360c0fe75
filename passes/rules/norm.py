"""Normalisation ops that torch keeps in one piece."""

from __future__ import annotations

import torch

from passes.rules.call import Call
from passes.rules.form import Dims, Form, FormBuilder
from passes.rules.table import rule

aten = torch.ops.aten


def _dims(build: FormBuilder, call: Call, reduce: str | None = None) -> tuple[Dims, Dims, Dims]:
    """Rows and normalised dims of `input`, and the dims of the saved statistics."""
    shape = call.facts("input").shape
    normalized = len(call.get("normalized_shape"))
    rows = build.dims(shape[: len(shape) - normalized], reduce=reduce)
    inner = build.dims(shape[len(shape) - normalized :], whole=True)
    return rows, inner, rows + ((),) * normalized


@rule(aten.native_layer_norm.default)
def _layer_norm(call: Call) -> Form:
    build = FormBuilder()
    rows, inner, statistics = _dims(build, call)
    operands: list[Dims] = [rows + inner] + [inner] * (len(call.operands) - 1)
    return build.form(operands, [rows + inner, statistics, statistics])


@rule(aten._fused_rms_norm.default)
def _rms_norm(call: Call) -> Form:
    build = FormBuilder()
    rows, inner, statistics = _dims(build, call)
    return build.form([rows + inner] + [inner] * (len(call.operands) - 1), [rows + inner, statistics])


@rule(aten.native_layer_norm_backward.default)
def _layer_norm_backward(call: Call) -> Form:
    build = FormBuilder()
    rows, inner, statistics = _dims(build, call, reduce="sum")
    operands: list[Dims] = [rows + inner, rows + inner, statistics, statistics]
    operands += [inner] * (len(call.operands) - 4)
    return build.form(operands, [rows + inner, inner, inner])


@rule(aten._fused_rms_norm_backward.default)
def _rms_norm_backward(call: Call) -> Form:
    build = FormBuilder()
    rows, inner, statistics = _dims(build, call, reduce="sum")
    return build.form(
        [rows + inner, rows + inner, statistics] + [inner] * (len(call.operands) - 3), [rows + inner, inner]
    )


@rule(aten.native_group_norm.default)
def _group_norm(call: Call) -> Form:
    build = FormBuilder()
    shape = call.operands[0].shape
    batch = build.factor(shape[0])
    dims = (batch, *build.dims(shape[1:], whole=True))
    groups = build.factor(call.get("group"), whole=True)
    operands: list[Dims] = [dims] + [(dims[1],)] * (len(call.operands) - 1)
    return build.form(operands, [dims, (batch, groups), (batch, groups)])
