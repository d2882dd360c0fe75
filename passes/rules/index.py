"""Look-ups by index: embedding, gather, scatter and advanced indexing."""

from __future__ import annotations

import torch

from passes.rules.call import Call, Operand
from passes.rules.form import Dims, Form, FormBuilder
from passes.rules.table import rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def _embedding(call: Call) -> Form:
    weight, indices = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    vocabulary = build.factor(weight[0], leading=True, reduce="sum")
    hidden = build.factor(weight[1])
    places = build.dims(indices)
    return build.form([(vocabulary, hidden), places], [(*places, hidden)], [[0]])


@rule(aten.embedding_dense_backward.default)
def _embedding_dense_backward(call: Call) -> Form:
    gradient, indices = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    places = build.dims(indices, reduce="sum")
    hidden = build.factor(gradient[-1])
    vocabulary = build.factor(call.get("num_weights"), leading=True)
    linear = [] if call.get("scale_grad_by_freq") else [[0]]
    form = build.form([(*places, hidden), places], [(vocabulary, hidden)], linear)
    return form if linear else Form(form.operands, form.results, form.sizes, form.whole | set(form.reduces))


@rule(aten.gather.default)
def _gather(call: Call) -> Form:
    source, index = call.operands[0].shape, call.operands[1].shape
    if not source:
        return FormBuilder().form([(), ()], [()], [[0]])
    dim = call.get("dim") % len(source)
    build = FormBuilder()
    along = build.factor(source[dim], leading=True, reduce="sum")
    picked = build.factor(index[dim])
    dims, places = [], []
    for d, (a, b) in enumerate(zip(source, index, strict=True)):
        if d == dim:
            dims.append(along)
            places.append(picked)
        elif a == b:
            shared = build.factor(a)
            dims.append(shared)
            places.append(shared)
        else:
            dims.append(build.factor(a, whole=True))
            places.append(build.factor(b, whole=True))
    return build.form([tuple(dims), tuple(places)], [tuple(places)], [[0]])


@rule(aten.index_select.default)
def _index_select(call: Call) -> Form:
    source = call.operands[0].shape
    dim = call.get("dim") % len(source)
    build = FormBuilder()
    dims = tuple(
        build.factor(size, leading=d == dim, reduce="sum" if d == dim else None) for d, size in enumerate(source)
    )
    picked = build.dims(call.operands[1].shape)
    return build.form([dims, picked], [(*dims[:dim], *(picked or ((),)), *dims[dim + 1 :])], [[0]])


@rule(aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.scatter.reduce, aten.scatter_reduce.two)
def _scatter(call: Call) -> Form:
    """Dims beside the scattered one are split where source and index agree on them."""
    shape = call.operands[0].shape
    others = [operand.shape for operand in call.operands[1:]]
    if not shape:
        return FormBuilder().form([() for _ in call.operands], [()])
    dim = call.get("dim") % len(shape)
    build = FormBuilder()
    dims = tuple(
        build.factor(size, whole=d == dim or any(other[d] != size for other in others)) for d, size in enumerate(shape)
    )
    operands: list[Dims] = [dims]
    for other in others:
        operands.append(
            tuple(
                dims[d] if d != dim and other[d] == shape[d] else build.factor(other[d], whole=True)
                for d in range(len(shape))
            )
        )
    linear = [[0, 2]] if call.target is aten.scatter_add.default else []
    return build.form(operands, [dims], linear)


def _index_dims(call: Call, build: FormBuilder, shape: tuple[int, ...], reduce: bool) -> tuple[Dims, list[Dims], Dims]:
    """Dims of an indexed tensor, of its index tensors, and of the result of indexing."""
    indices = call.get("indices")
    placed = [(d, call.operands[index.index].shape) for d, index in enumerate(indices) if isinstance(index, Operand)]
    broadcast = torch.broadcast_shapes(*(s for _, s in placed))
    loop = build.dims(broadcast, reduce="sum" if reduce else None)
    indexed = {d for d, _ in placed}
    dims = tuple(build.factor(size, whole=d in indexed) for d, size in enumerate(shape))
    index_dims = [
        tuple(loop[len(broadcast) - len(s) + i] if size > 1 else () for i, size in enumerate(s)) for _, s in placed
    ]
    positions = [d for d, _ in placed]
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    rest = [dims[d] for d in range(len(shape)) if d not in indexed]
    if adjacent:
        before = positions[0]
        result = (*rest[:before], *loop, *rest[before:])
    else:
        result = (*loop, *rest)
    return dims, index_dims, tuple(result)


@rule(aten.index.Tensor)
def _index(call: Call) -> Form:
    build = FormBuilder()
    if any(operand.dtype == torch.bool for operand in call.operands[1:]):
        dims = build.dims(call.operands[0].shape, whole=True)
        operands = [dims, *(build.dims(operand.shape, whole=True) for operand in call.operands[1:])]
        return build.form(operands, [build.dims(r.shape, whole=True) for r in call.results if r])
    dims, index_dims, result = _index_dims(call, build, call.operands[0].shape, reduce=False)
    return build.form([dims, *index_dims], [result], [[0]])


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(call: Call) -> Form:
    build = FormBuilder()
    accumulate = bool(call.get("accumulate", False))
    values = call.operands[-1].shape
    if any(operand.dtype == torch.bool for operand in call.operands[1:-1]):
        operands = [build.dims(operand.shape, whole=True) for operand in call.operands]
        return build.form(operands, [operands[0]])
    dims, index_dims, picked = _index_dims(call, build, call.operands[0].shape, reduce=False)
    # A split of the index loop would leave the parts to be added up; kept whole, as the base must be added once.
    loop = {f for index in index_dims for dim in index for f in dim}
    skip = len(picked) - len(values)
    value_dims = tuple(picked[skip + i] if size > 1 else () for i, size in enumerate(values))
    build.whole |= loop
    form = build.form([dims, *index_dims, value_dims], [dims], [])
    return Form(
        form.operands,
        form.results,
        form.sizes,
        form.whole,
        {},
        (frozenset({0, len(form.operands) - 1}),) if accumulate else (),
    )
