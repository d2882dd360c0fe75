"""Products of groups of rows with a matrix each: the routed experts of a mixture.

Rows are sorted by expert, and `offs[e]` is where the rows of expert e end. A split of the experts leaves each rank the
rows of its own (a partial sum: the others' rows are zero); a split of the rows leaves it a range of them, of whatever
experts these are.
"""

from __future__ import annotations

import torch

from passes.rules.call import Call
from passes.rules.form import Form, FormBuilder
from passes.rules.table import rule

GROUPED = (torch.ops.aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
GROUPED_BACKWARD = ("transformers.grouped_mm_fallback_backward.default",)


@rule(*GROUPED)
def _grouped(call: Call) -> Form:
    """Of `_grouped_mm`'s shapes, rows x stack of matrices is known; any other is whole."""
    first, second = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    if len(first) != 2 or len(second) != 3 or len(call.operands) != 3:
        operands = [build.dims(facts.shape, whole=True) for facts in call.operands]
        return build.form(operands, [build.dims(facts.shape, whole=True) for facts in call.results if facts])
    rows, inner = build.factor(first[0], leading=True), build.factor(first[1], reduce="sum")
    experts, outer = build.factor(second[0], leading=True, reduce="sum"), build.factor(second[2])
    ends = build.factor(second[0], whole=True)
    return build.form([(rows, inner), (experts, inner, outer), (ends,)], [(rows, outer)])


@rule(*GROUPED_BACKWARD)
def _grouped_backward(call: Call) -> Form:
    first, second = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    rows, inner = build.factor(first[0], leading=True, reduce="sum"), build.factor(first[1])
    experts, outer = build.factor(second[0], leading=True, reduce="sum"), build.factor(second[2], reduce="sum")
    ends = build.factor(second[0], whole=True)
    return build.form(
        [(rows, inner), (experts, inner, outer), (ends,), (rows, outer)], [(rows, inner), (experts, inner, outer)]
    )
