"""Products of groups of rows with a matrix each: the routed experts of a mixture.

A split of the blocks leaves each rank whole blocks; of the experts, the rows of its own (a partial sum: the others'
rows are zero); of the rows, a range of them, of whatever experts these are.
"""

from __future__ import annotations

from passes.program.routed_ops import PUT_ROWS, ROUTED_MM, ROUTED_MM_WEIGHT, TAKE_ROWS
from passes.rules.call import Call
from passes.rules.form import Form, FormBuilder
from passes.rules.table import rule


@rule(ROUTED_MM)
def _routed_mm(call: Call) -> Form:
    (size, k), (count, _, n), (parts, cuts) = (facts.shape for facts in call.operands)
    build = FormBuilder()
    blocks, rows = build.factor(parts, leading=True), build.factor(size // parts, leading=True)
    experts = build.factor(count, leading=True, reduce="sum")
    inner, outer, bounds = build.factor(k, reduce="sum"), build.factor(n), build.factor(cuts, whole=True)
    return build.form(
        [((*blocks, *rows), inner), (experts, inner, outer), (blocks, bounds)], [((*blocks, *rows), outer)]
    )


@rule(ROUTED_MM_WEIGHT)
def _routed_mm_weight(call: Call) -> Form:
    (size, k), (_, n), (parts, cuts) = (facts.shape for facts in call.operands)
    build = FormBuilder()
    blocks = build.factor(parts, leading=True, reduce="sum")
    rows = build.factor(size // parts, leading=True, reduce="sum")
    experts = build.factor(cuts - 1, leading=True)
    inner, outer, bounds = build.factor(k), build.factor(n), build.factor(cuts, whole=True)
    return build.form(
        [((*blocks, *rows), inner), ((*blocks, *rows), outer), (blocks, bounds)], [(experts, inner, outer)]
    )


@rule(TAKE_ROWS)
def _take_rows(call: Call) -> Form:
    x, index, parts = call.operands[0].shape, call.operands[1].shape, call.get("blocks")
    build = FormBuilder()
    blocks = build.factor(parts, leading=True)
    source, rows = build.factor(x[0] // parts, whole=True), build.factor(index[0] // parts)
    rest = build.dims(x[1:])
    return build.form([((*blocks, *source), *rest), ((*blocks, *rows),)], [((*blocks, *rows), *rest)], linear=[[0]])


@rule(PUT_ROWS)
def _put_rows(call: Call) -> Form:
    x, index, parts = call.operands[0].shape, call.operands[1].shape, call.get("blocks")
    adds = bool(call.get("accumulate"))
    build = FormBuilder()
    blocks = build.factor(parts, leading=True)
    target = build.factor(x[0] // parts, whole=True)
    rows = build.factor(index[0] // parts, whole=not adds, reduce="sum" if adds else None)
    rest = build.dims(x[1:])
    return build.form(
        [((*blocks, *target), *rest), ((*blocks, *rows),), ((*blocks, *rows), *rest)],
        [((*blocks, *target), *rest)],
        linear=[[0, 2]] if adds else [],
    )
