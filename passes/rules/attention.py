"""Fused attention kernels: batch and heads split; queries too, where no causal mask ties them to their position."""

from __future__ import annotations

import torch

from passes.rules.call import Call, Operand
from passes.rules.form import Dims, Form, FormBuilder, broadcast
from passes.rules.table import rule

aten = torch.ops.aten


def _dims(build: FormBuilder, call: Call) -> tuple[Dims, Dims, Dims, Dims]:
    """Dims of query, key, value and the log-sum-exp; keys' heads may be a divisor of the queries'."""
    query, key, value = (call.facts(name).shape for name in ("query", "key", "value"))
    reduce = "sum"
    batch = build.factor(query[0])
    kv_heads = build.factor(key[1])
    groups = build.factor(query[1] // key[1], reduce=reduce)
    causal = bool(call.get("is_causal", False))
    rows = build.factor(query[2], whole=causal, reduce=None if causal else reduce)
    columns = build.factor(key[2], whole=True)
    inner, inner_v = build.factor(query[3], whole=True), build.factor(value[3], whole=True)
    heads = kv_heads + groups
    return (
        (batch, heads, rows, inner),
        (batch, kv_heads, columns, inner),
        (batch, kv_heads, columns, inner_v),
        (batch, rows, heads),
    )


def _mask_dims(shape: tuple[int, ...], query: Dims, key: Dims) -> Dims:
    return broadcast((query[0], query[1], query[2], key[2]), shape)


def _lse_dims(call: Call, facts_shape: tuple[int, ...], lse: Dims) -> Dims:
    """The kernel gives (batch, queries, heads) in memory but (batch, heads, queries) as shape, by version."""
    query = call.facts("query").shape
    batch, rows, heads = lse
    return (batch, heads, rows) if facts_shape == (query[0], query[1], query[2]) else (batch, rows, heads)


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _forward(call: Call) -> Form:
    build = FormBuilder()
    query, key, value, lse = _dims(build, call)
    operands = [query, key, value]
    if isinstance(call.get("attn_mask"), Operand):
        operands.append(_mask_dims(call.facts("attn_mask").shape, query, key))
    lse_facts = call.results[1]
    assert lse_facts is not None
    output = (query[0], query[1], query[2], value[3])
    return build.form(operands, [output, _lse_dims(call, lse_facts.shape, lse)])


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _backward(call: Call) -> Form:
    build = FormBuilder()
    query, key, value, lse = _dims(build, call)
    output = (query[0], query[1], query[2], value[3])
    operands = [output, query, key, value, output, _lse_dims(call, call.facts("logsumexp").shape, lse)]
    if isinstance(call.get("attn_mask"), Operand):
        operands.append(_mask_dims(call.facts("attn_mask").shape, query, key))
    return build.form(operands, [query, key, value])
