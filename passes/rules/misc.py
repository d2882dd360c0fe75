"""Ops that fit no other family: spectra, complex numbers, diagonals, windows as views, look-ups in sorted lists."""

from __future__ import annotations

import torch

from passes.rules.call import Call, Operand
from passes.rules.form import Dims, Form, FormBuilder, broadcast, replaced
from passes.rules.table import rule, whole_form

aten = torch.ops.aten


@rule(aten.view_as_real.default, aten.view_as_complex.default)
def _pairs(call: Call) -> Form:
    """A complex number is a last dim of two."""
    result = call.result.shape
    build = FormBuilder()
    real = call.target is aten.view_as_complex.default
    dims = build.dims(result if real else call.operands[0].shape)
    pairs: Dims = (*dims, build.factor(2, whole=True))
    return build.form([pairs], [dims], [[0]]) if real else build.form([dims], [pairs], [[0]])


@rule(aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)
def _spectrum(call: Call) -> Form:
    source, result = call.operands[0].shape, call.result.shape
    along = {d % len(source) for d in call.get("dim")}
    build = FormBuilder()
    dims = build.dims(source, whole=along)
    made = tuple(build.factor(n, whole=True) if d in along else dims[d] for d, n in enumerate(result))
    return build.form([dims], [made])


@rule(aten.diagonal.default)
def _diagonal(call: Call) -> Form:
    source, result = call.operands[0].shape, call.result.shape
    pair = {call.get("dim1", 0) % len(source), call.get("dim2", 1) % len(source)}
    build = FormBuilder()
    dims = build.dims(source, whole=pair)
    kept = tuple(dims[d] for d in range(len(source)) if d not in pair)
    return build.form([dims], [(*kept, build.factor(result[-1], whole=True))], [[0]])


@rule(aten.diagonal_backward.default)
def _diagonal_backward(call: Call) -> Form:
    source, result = call.operands[0].shape, call.result.shape
    pair = {call.get("dim1") % len(result), call.get("dim2") % len(result)}
    build = FormBuilder()
    dims = build.dims(result, whole=pair)
    kept = tuple(dims[d] for d in range(len(result)) if d not in pair)
    return build.form([(*kept, build.factor(source[-1], whole=True))], [dims], [[0]])


@rule(aten.unfold.default)
def _unfold(call: Call) -> Form:
    source, result = call.operands[0].shape, call.result.shape
    if not source:
        return whole_form(call)
    dim = call.get("dimension") % len(source)
    build = FormBuilder()
    dims = build.dims(source, whole=[dim])
    windows = build.factor(result[dim], whole=True)
    size = build.factor(result[-1], whole=True)
    return build.form([dims], [(*replaced(dims, dim, windows), size)], [[0]])


@rule(aten.unfold_backward.default)
def _unfold_backward(call: Call) -> Form:
    source, result = call.operands[0].shape, call.result.shape
    dim = call.get("dim") % len(result)
    build = FormBuilder()
    dims = build.dims(result, whole=[dim])
    windows, size = build.factor(source[dim], whole=True), build.factor(source[-1], whole=True)
    return build.form([(*replaced(dims, dim, windows), size)], [dims], [[0]])


@rule(aten.searchsorted.Tensor)
def _searchsorted(call: Call) -> Form:
    ordered, values = call.facts("sorted_sequence").shape, call.facts("self").shape
    build = FormBuilder()
    dims = build.dims(values)
    batch = dims[:-1] if len(ordered) > 1 else ()
    ranks = build.factor(ordered[-1], whole=True)
    operands: list[Dims] = [(*batch, ranks), dims]
    if isinstance(call.get("sorter"), Operand):
        operands.append((*batch, ranks))
    return build.form(operands, [dims])


@rule(aten.bucketize.Tensor)
def _bucketize(call: Call) -> Form:
    build = FormBuilder()
    dims = build.dims(call.operands[0].shape)
    return build.form([dims, build.dims(call.operands[1].shape, whole=True)], [dims])


@rule(aten.histc.default)
def _histc(call: Call) -> Form:
    """Counts add up, where the bins do not depend on the data."""
    result = call.result.shape
    build = FormBuilder()
    fixed = call.get("min", 0) != call.get("max", 0)
    dims = build.dims(call.operands[0].shape, whole=not fixed, reduce="sum")
    return build.form([dims], [build.dims(result, whole=True)])


@rule(aten.glu.default)
def _glu(call: Call) -> Form:
    source, result = call.operands[0].shape, call.result.shape
    return _halves(source, result, call.get("dim", -1), backward=False)


@rule(aten.glu_backward.default)
def _glu_backward(call: Call) -> Form:
    gradient, source = call.operands[0].shape, call.operands[1].shape
    return _halves(source, gradient, call.get("dim"), backward=True)


def _halves(source: tuple[int, ...], half: tuple[int, ...], dim: int, *, backward: bool) -> Form:
    dim %= len(source)
    build = FormBuilder()
    dims = build.dims(source, whole=[dim])
    made = replaced(dims, dim, build.factor(half[dim], whole=True))
    return build.form([made, dims], [dims]) if backward else build.form([dims], [made])


@rule(aten.linalg_cross.default)
def _cross(call: Call) -> Form:
    result = call.result.shape
    build = FormBuilder()
    dims = build.dims(result, whole=[call.get("dim", -1) % len(result)])
    return build.form([broadcast(dims, facts.shape) for facts in call.operands], [dims])


@rule(aten._weight_norm_interface.default)
def _weight_norm(call: Call) -> Form:
    v, g = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    dims = tuple(build.factor(n, whole=d != call.get("dim", 0)) for d, n in enumerate(v))
    norms = broadcast(dims, g)
    return build.form([dims, norms], [dims, norms])


@rule(aten._weight_norm_interface_backward.default)
def _weight_norm_backward(call: Call) -> Form:
    v, g = call.operands[1].shape, call.operands[2].shape
    build = FormBuilder()
    dims = tuple(build.factor(n, whole=d != call.get("dim")) for d, n in enumerate(v))
    norms = broadcast(dims, g)
    return build.form([dims, dims, norms, norms], [dims, norms])


@rule(
    aten.bincount.default,
    aten.nonzero.default,
    aten.nonzero_static.default,
    aten.masked_select.default,
    aten.masked_scatter.default,
    aten.masked_scatter_backward.default,
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten._ctc_loss.Tensor,
    aten._ctc_loss.default,
    aten._ctc_loss_backward.Tensor,
    aten._ctc_loss_backward.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten._cdist_forward.default,
    aten._cdist_backward.default,
    aten._embedding_bag.default,
    aten.put.default,
    aten.take.default,
    aten.randperm.default,
    aten.tril_indices.default,
    aten.triu_indices.default,
)
def _whole(call: Call) -> Form:
    """What a part of them gives says nothing about the whole."""
    return whole_form(call)
