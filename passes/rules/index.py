"""Look-ups by index: embedding, gather, scatter and advanced indexing."""

from __future__ import annotations

from typing import Any

import torch

from passes.rules.call import Call, Operand
from passes.rules.form import Dims, Form, FormBuilder, broadcast, replaced
from passes.rules.table import rule, whole_form

aten = torch.ops.aten

EMBEDDINGS = frozenset({aten.embedding.default, aten.embedding_dense_backward.default})
"""Look-ups in a vocabulary, and their gradient."""


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
    if not linear:
        build.whole |= {f for dim in places for f in dim} | set(vocabulary)
    return build.form([(*places, hidden), places], [(vocabulary, hidden)], linear)


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
    if not source:
        return whole_form(call)
    dim = call.get("dim") % len(source)
    build = FormBuilder()
    dims = tuple(
        build.factor(size, leading=d == dim, reduce="sum" if d == dim else None) for d, size in enumerate(source)
    )
    picked = build.dims(call.operands[1].shape)
    return build.form([dims, picked], [(*dims[:dim], *(picked or ((),)), *dims[dim + 1 :])], [[0]])


@rule(aten.scatter.value, aten.scatter.src, aten.scatter.reduce, aten.scatter.value_reduce, aten.scatter_reduce.two)
def _scatter(call: Call) -> Form:
    """Dims beside the scattered one are split where source and index agree on them."""
    return _scattered(call, adds=False)


@rule(aten.scatter_add.default)
def _scatter_add(call: Call) -> Form:
    """What is added may come in parts, and each rank may keep a range of the rows that it goes to."""
    return _scattered(call, adds=True)


def _scattered(call: Call, *, adds: bool) -> Form:
    shape = call.operands[0].shape
    others = [operand.shape for operand in call.operands[1:]]
    if not shape:
        return FormBuilder().form([() for _ in call.operands], [()])
    dim = call.get("dim") % len(shape)
    adds = adds and all(other == others[0] for other in others)
    build = FormBuilder()
    dims = tuple(
        build.factor(size, leading=True, whole=not adds)
        if d == dim
        else build.factor(size, whole=any(other[d] != size for other in others))
        for d, size in enumerate(shape)
    )
    along = build.factor(others[0][dim], whole=not adds, reduce="sum" if adds else None)
    operands: list[Dims] = [dims]
    for other in others:
        operands.append(
            tuple(
                along
                if d == dim and other[d] == others[0][d]
                else dims[d]
                if d != dim and other[d] == shape[d]
                else build.factor(other[d], whole=True)
                for d in range(len(shape))
            )
        )
    return build.form(operands, [dims], [[0, 2]] if call.target is aten.scatter_add.default else [])


@rule(aten.index_add.default)
def _index_add(call: Call) -> Form:
    shape, source = call.facts("self").shape, call.facts("source").shape
    if not shape or not call.facts("index").shape:
        return whole_form(call)
    dim = call.get("dim") % len(shape)
    build = FormBuilder()
    dims = tuple(build.factor(size, leading=d == dim) for d, size in enumerate(shape))
    added = build.factor(source[dim], reduce="sum")
    return build.form([dims, (added,), replaced(dims, dim, added)], [dims], [[0, 2]])


@rule(
    aten.index_copy.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    aten.index_reduce.default,
)
def _index_copy(call: Call) -> Form:
    """Dims beside the indexed one may be split."""
    shape, index = call.facts("self").shape, call.facts("index").shape
    if not shape or not index:
        return whole_form(call)
    dim = call.get("dim") % len(shape)
    build = FormBuilder()
    dims = build.dims(shape, whole=[dim])
    copied = build.factor(index[0], whole=True)
    operands: list[Dims] = [dims, (copied,)]
    if len(call.operands) > 2:
        source = call.operands[2].shape
        operands.append(replaced(dims, dim, copied) if source else ())
    return build.form(operands, [dims])


def _index_dims(
    call: Call, build: FormBuilder, *, loop: str | None, indexed: dict[str, Any]
) -> tuple[Dims, list[Dims], Dims]:
    """Dims of an indexed tensor, of its index tensors, and of the result of indexing.

    `loop`: how the parts of a split of the indices recombine. `indexed`: what is special about the one dim looked up,
    where there is one; several are kept whole.
    """
    shape = call.operands[0].shape
    indices = call.get("indices")
    placed = [(d, call.operands[index.index].shape) for d, index in enumerate(indices) if isinstance(index, Operand)]
    looked_up = torch.broadcast_shapes(*(s for _, s in placed))
    over = build.dims(looked_up, reduce=loop)
    positions = [d for d, _ in placed]
    special: dict[str, Any] = indexed if len(placed) == 1 else {"whole": True}
    dims = tuple(build.factor(size, **(special if d in positions else {})) for d, size in enumerate(shape))
    index_dims = [broadcast(over, s) for _, s in placed]
    rest = [dims[d] for d in range(len(shape)) if d not in positions]
    before = positions[0] if positions == list(range(positions[0], positions[-1] + 1)) else 0
    return dims, index_dims, (*rest[:before], *over, *rest[before:])


def _is_mask(call: Call) -> bool:
    return any(operand.dtype in (torch.bool, torch.uint8) for operand in call.operands[1:])


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(call: Call) -> Form:
    if _is_mask(call):
        return whole_form(call)
    build = FormBuilder()
    dims, index_dims, result = _index_dims(call, build, loop=None, indexed={"leading": True, "reduce": "sum"})
    return build.form([dims, *index_dims], [result], [[0]])


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(call: Call) -> Form:
    if any(operand.dtype in (torch.bool, torch.uint8) for operand in call.operands[1:-1]):
        return whole_form(call)
    build = FormBuilder()
    adds = bool(call.get("accumulate", False))
    dims, index_dims, picked = _index_dims(
        call, build, loop="sum" if adds else None, indexed={"leading": True} if adds else {"whole": True}
    )
    if not adds:
        build.whole |= {f for index in index_dims for dim in index for f in dim}
    value_dims = broadcast(picked, call.operands[-1].shape)
    return build.form([dims, *index_dims, value_dims], [dims], [[0, len(index_dims) + 1]] if adds else [])
