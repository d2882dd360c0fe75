"""Matrix products."""

from __future__ import annotations

import torch

from passes.rules.call import Call
from passes.rules.form import Form, einsum_form
from passes.rules.table import RULES, rule

aten = torch.ops.aten

EQUATIONS = {
    aten.mm.default: "mk,kn->mn",
    aten.bmm.default: "bmk,bkn->bmn",
    aten.mv.default: "mk,k->m",
    aten.dot.default: "k,k->",
    aten.linear.default: "mk,nk->mn",
}

PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default})
"""The ops whose arithmetic tensor parallelism splits."""


def _product(call: Call) -> Form:
    equation = EQUATIONS[call.target]
    return einsum_form(equation, [operand.shape for operand in call.operands], [[0], [1]])


for _target in EQUATIONS:
    RULES[_target] = _product


@rule(aten.addmm.default)
def _addmm(call: Call) -> Form:
    bias = "n" if len(call.operands[0].shape) == 1 else "mn"
    if 1 in call.operands[0].shape:
        bias = {0: "", 1: "n", 2: "mn"}[len(call.operands[0].shape)]
    equation = f"{bias},mk,kn->mn"
    form = einsum_form(equation, [operand.shape for operand in call.operands])
    # The bias is added once, so a split of k (which would add it on every rank) is not allowed.
    return Form(form.operands, form.results, form.sizes, form.whole | set(form.reduces), {}, form.linear)
