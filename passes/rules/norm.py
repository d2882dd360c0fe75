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


@rule(aten.native_group_norm_backward.default)
def _group_norm_backward(call: Call) -> Form:
    """Operands: gradient, input, mean, rstd and, where there is one, weight; weight and bias sum over the batch."""
    build = FormBuilder()
    shape = call.operands[1].shape
    batch = build.factor(shape[0], reduce="sum")
    dims = (batch, *build.dims(shape[1:], whole=True))
    groups = build.factor(call.get("group"), whole=True)
    made: list[Dims] = [dims, (dims[1],), (dims[1],)]
    operands: list[Dims] = [dims, dims, (batch, groups), (batch, groups)]
    operands += [(dims[1],)] * (len(call.operands) - 4)
    return build.form(operands, [m if facts else () for m, facts in zip(made, call.results, strict=True)])


_BATCH_NORMS = (
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
)


@rule(*_BATCH_NORMS)
def _batch_norm(call: Call) -> Form:
    """Channels are apart; statistics are taken over all else. Those not saved (in evaluation) have no entries."""
    build = FormBuilder()
    shape = call.operands[0].shape
    channels = build.factor(shape[1])
    dims: Dims = (build.factor(shape[0], whole=True), channels, *build.dims(shape[2:], whole=True))
    if any(facts.shape == (0,) for facts in call.results if facts):
        build.whole |= set(channels)
    none: Dims = (build.factor(0, whole=True),)
    results: list[Dims] = [
        dims if i == 0 else (channels,) if facts and facts.shape == (shape[1],) else none if facts else ()
        for i, facts in enumerate(call.results)
    ]
    return build.form([dims, *[(channels,) for _ in call.operands[1:]]], results)


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(call: Call) -> Form:
    build = FormBuilder()
    shape = call.operands[0].shape
    channels = build.factor(shape[1], reduce="sum")
    dims: Dims = (build.factor(shape[0], whole=True), channels, *build.dims(shape[2:], whole=True))
    if any(facts.shape == (0,) for facts in call.operands):
        build.whole |= set(channels)
    none: Dims = (build.factor(0, whole=True),)
    operands = [dims if facts.shape == shape else (channels,) if facts.shape[0] else none for facts in call.operands]
    made: list[Dims] = [dims, (channels,), (channels,)]
    return build.form(operands, [m if facts else () for m, facts in zip(made, call.results, strict=True)])
