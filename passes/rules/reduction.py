"""Reductions and ops that run along dims: what they run along is summed, recombined by max, or kept whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.rules.call import Call
from passes.rules.form import Dims, Form, FormBuilder, replaced
from passes.rules.table import rule, whole_form

aten = torch.ops.aten


_LAST = {aten.mode.default, aten.kthvalue.default}
"""Reductions along the last dim where none is named."""


def _reduced_dims(call: Call, rank: int) -> set[int]:
    dim = call.get("dim", -1 if call.target in _LAST else None)
    if dim is None or (dim == [] and call.target is not aten.any.dims):
        return set(range(rank))
    return {d % rank for d in (dim if isinstance(dim, Sequence) else [dim])} if rank else set()


def _reduction(call: Call, reduce: str | None, linear: bool) -> Form:
    """`reduce` None: the reduced dims cannot be split."""
    source = call.operands[0].shape
    reduced = _reduced_dims(call, len(source))
    build = FormBuilder()
    dims = tuple(
        build.factor(size, whole=d in reduced and reduce is None, reduce=reduce if d in reduced else None)
        for d, size in enumerate(source)
    )
    keep = call.get("keepdim", False)
    result: Dims = tuple(() if d in reduced else dims[d] for d in range(len(source)) if keep or d not in reduced)
    return build.form([dims], [result for _ in call.results], [[0]] if linear else ())


@rule(aten.sum.default, aten.sum.dim_IntList)
def _sum(call: Call) -> Form:
    return _reduction(call, "sum", linear=call.is_float)


@rule(aten.amax.default, aten.max.default)
def _amax(call: Call) -> Form:
    return _reduction(call, "max", linear=False)


@rule(aten.mean.default, aten.mean.dim)
def _mean(call: Call) -> Form:
    return _reduction(call, None, linear=True)


@rule(
    aten.amin.default,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.default,
    aten.all.dim,
    aten.prod.default,
    aten.prod.dim_int,
    aten.var.correction,
    aten.var_mean.correction,
    aten.std.correction,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.max.dim,
    aten.min.dim,
    aten.min.default,
    aten.nansum.default,
    aten.median.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
    aten.count_nonzero.default,
    aten.count_nonzero.dim_IntList,
    aten.aminmax.default,
    aten.std_mean.correction,
)
def _whole_reduction(call: Call) -> Form:
    return _reduction(call, None, linear=False)


def along(call: Call, dims: Sequence[int], linear: Sequence[Sequence[int]] = ()) -> Form:
    """Operands and results of one shape; every dim but `dims` may be split."""
    shape = call.operands[0].shape
    kept_whole = {d % len(shape) for d in dims} if shape else set()
    build = FormBuilder()
    factors = build.dims(shape, whole=kept_whole)
    operands = [factors if operand.shape == shape else () for operand in call.operands]
    assert all(operand.shape in (shape, ()) for operand in call.operands), call
    return build.form(operands, [factors for _ in call.results], linear)


@rule(
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.argsort.default,
    aten.argsort.stable,
    aten._log_softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
    aten.cumprod.default,
    aten.sort.default,
    aten.sort.stable,
    aten.logcumsumexp.default,
)
def _runs_along_dim(call: Call) -> Form:
    return along(call, [call.get("dim", -1)])


@rule(aten.cumsum.default)
def _cumsum(call: Call) -> Form:
    return along(call, [call.get("dim")], [[0]] if call.is_float else ())


@rule(aten.flip.default)
def _flip(call: Call) -> Form:
    return along(call, call.get("dims"), [[0]])


@rule(aten.roll.default)
def _roll(call: Call) -> Form:
    return along(call, call.get("dims") or range(len(call.operands[0].shape)), [[0]])


@rule(aten.triu.default, aten.tril.default)
def _triangle(call: Call) -> Form:
    return along(call, [-2, -1], [[0]])


@rule(aten.topk.default)
def _topk(call: Call) -> Form:
    source = call.operands[0].shape
    if not source:
        return whole_form(call)
    dim = call.get("dim", -1) % len(source)
    build = FormBuilder()
    dims = build.dims(source, whole=[dim])
    result = replaced(dims, dim, build.factor(call.get("k"), whole=True))
    return build.form([dims], [result, result])
