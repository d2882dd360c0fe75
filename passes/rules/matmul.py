"""Matrix products.

They are linear in either operand, but no partial sum is let through: to add up first is never dearer than to multiply
a term on every rank, and each choice less counts on every axis.
"""

from __future__ import annotations

import torch

from passes.program.routed_ops import ROUTED_MM, ROUTED_MM_WEIGHT
from passes.rules.call import Call
from passes.rules.form import Form, FormBuilder, broadcast, einsum_form
from passes.rules.table import RULES, rule

aten = torch.ops.aten

EQUATIONS = {
    aten.mm.default: "mk,kn->mn",
    aten.bmm.default: "bmk,bkn->bmn",
    aten.mv.default: "mk,k->m",
    aten.dot.default: "k,k->",
}

PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, ROUTED_MM, ROUTED_MM_WEIGHT})
"""The ops whose arithmetic tensor parallelism splits: products of one matrix, or of a stack of experts' matrices."""


def _product(call: Call) -> Form:
    equation = EQUATIONS[call.target]
    return einsum_form(equation, [operand.shape for operand in call.operands])


for _target in EQUATIONS:
    RULES[_target] = _product


@rule(aten.addmm.default)
def _addmm(call: Call) -> Form:
    (m, k), n = call.operands[1].shape, call.operands[2].shape[1]
    build = FormBuilder()
    rows, inner, columns = build.factor(m), build.factor(k, reduce="sum"), build.factor(n)
    full = (rows, columns)
    added = broadcast(full, call.operands[0].shape)
    return build.form([added, (rows, inner), (inner, columns)], [full])


@rule(aten.baddbmm.default)
def _baddbmm(call: Call) -> Form:
    (b, m, k), n = call.operands[1].shape, call.operands[2].shape[2]
    build = FormBuilder()
    batch, rows, inner, columns = build.factor(b), build.factor(m), build.factor(k, reduce="sum"), build.factor(n)
    full = (batch, rows, columns)
    added = broadcast(full, call.operands[0].shape)
    return build.form([added, (batch, rows, inner), (batch, inner, columns)], [full])
