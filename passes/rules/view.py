"""Views and copies that move dims: each element keeps its value."""

from __future__ import annotations

import torch

from passes.rules.call import Call
from passes.rules.form import Dims, Form, FormBuilder, broadcast, replaced, view_dims, without
from passes.rules.table import rule

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def _shapes(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return call.operands[0].shape, call.result.shape


@rule(*RESHAPES)
def _reshape(call: Call) -> Form:
    build = FormBuilder()
    source, target = view_dims(build, *_shapes(call))
    return build.form([source], [target], [[0]])


@rule(aten.t.default)
def _t(call: Call) -> Form:
    build = FormBuilder()
    dims = build.dims(call.operands[0].shape)
    return build.form([dims], [dims[::-1]], [[0]])


@rule(aten.transpose.int)
def _transpose(call: Call) -> Form:
    build = FormBuilder()
    dims = build.dims(call.operands[0].shape)
    moved = list(dims)
    if dims:
        a, b = call.get("dim0"), call.get("dim1")
        moved[a], moved[b] = moved[b], moved[a]
    return build.form([dims], [tuple(moved)], [[0]])


@rule(aten.permute.default)
def _permute(call: Call) -> Form:
    build = FormBuilder()
    dims = build.dims(call.operands[0].shape)
    return build.form([dims], [tuple(dims[d] for d in call.get("dims"))], [[0]])


@rule(
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def _size_one_dims(call: Call) -> Form:
    source, target = _shapes(call)
    build = FormBuilder()
    dims = build.dims(source)
    kept = iter([dim for dim in dims if dim])
    return build.form([dims], [tuple(next(kept) if size != 1 else () for size in target)], [[0]])


@rule(aten.expand.default)
def _expand(call: Call) -> Form:
    source, target = _shapes(call)
    build = FormBuilder()
    dims = build.dims(target)
    return build.form([broadcast(dims, source)], [dims], [[0]])


@rule(aten.slice.Tensor, aten.slice_backward.default)
def _slice(call: Call) -> Form:
    """Dims whose size changes are whole; the others keep their factor."""
    source, target = _shapes(call)
    build = FormBuilder()
    dims = tuple(build.factor(a, whole=a != b) for a, b in zip(source, target, strict=True))
    made = tuple(d if a == b else build.factor(b, whole=True) for d, a, b in zip(dims, source, target, strict=True))
    return build.form([dims], [made], [[0]])


@rule(aten.constant_pad_nd.default)
def _pad(call: Call) -> Form:
    """Dims with a pad are whole, also where one end takes what the other gives: their entries move."""
    source, target = _shapes(call)
    pads = call.get("pad")
    moved = {len(source) - 1 - i // 2 for i, pad in enumerate(pads) if pad}
    build = FormBuilder()
    dims = build.dims(source, whole=moved)
    made = tuple(build.factor(target[d], whole=True) if d in moved else dim for d, dim in enumerate(dims))
    return build.form([dims], [made], [] if call.get("value", 0) else [[0]])


@rule(aten.select.int)
def _select(call: Call) -> Form:
    source = call.operands[0].shape
    dim = call.get("dim") % len(source)
    build = FormBuilder()
    dims = build.dims(source, whole=[dim])
    return build.form([dims], [without(dims, dim)], [[0]])


@rule(aten.select_backward.default)
def _select_backward(call: Call) -> Form:
    _, target = _shapes(call)
    dim = call.get("dim") % len(target)
    build = FormBuilder()
    dims = build.dims(target, whole=[dim])
    return build.form([without(dims, dim)], [dims], [[0]])


@rule(aten.cat.default)
def _cat(call: Call) -> Form:
    shape = call.result.shape
    dim = call.get("dim", 0) % len(shape)
    build = FormBuilder()
    dims = build.dims(shape, whole=[dim])
    operands: list[Dims] = []
    for operand in call.operands:
        if operand.shape == (0,):
            operands.append(((),))
            continue
        operands.append(replaced(dims, dim, build.factor(operand.shape[dim], whole=True)))
    return build.form(operands, [dims], [range(len(operands))])


@rule(aten.stack.default)
def _stack(call: Call) -> Form:
    shape = call.result.shape
    dim = call.get("dim", 0) % len(shape)
    build = FormBuilder()
    dims = build.dims(shape, whole=[dim])
    return build.form([without(dims, dim)] * len(call.operands), [dims], [range(len(call.operands))])


@rule(aten.repeat.default)
def _repeat(call: Call) -> Form:
    source, target = _shapes(call)
    build = FormBuilder()
    skip = len(target) - len(source)
    made: list[tuple[int, ...]] = [build.factor(size) for size in target[:skip]]
    operand = []
    for a, b in zip(source, target[skip:], strict=True):
        copies = build.factor(b // a) if a else ()
        inner = build.factor(a)
        operand.append(inner)
        made.append(copies + inner)
    return build.form([tuple(operand)], [tuple(made)], [[0]])


@rule(aten.slice_scatter.default)
def _slice_scatter(call: Call) -> Form:
    whole, part = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    dims = tuple(build.factor(a, whole=a != b) for a, b in zip(whole, part, strict=True))
    inner = tuple(d if a == b else build.factor(b, whole=True) for d, a, b in zip(dims, whole, part, strict=True))
    return build.form([dims, inner], [dims], [[0, 1]])


@rule(aten.select_scatter.default)
def _select_scatter(call: Call) -> Form:
    shape = call.operands[0].shape
    dim = call.get("dim") % len(shape)
    build = FormBuilder()
    dims = build.dims(shape, whole=[dim])
    return build.form([dims, without(dims, dim)], [dims], [[0, 1]])


@rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(call: Call) -> Form:
    source = call.operands[0].shape
    dim = call.get("dim", 0) % len(source)
    build = FormBuilder()
    dims = build.dims(source, whole=[dim])
    results = [replaced(dims, dim, build.factor(facts.shape[dim], whole=True)) for facts in call.results if facts]
    return build.form([dims], results, [[0]])


@rule(aten.unbind.int)
def _unbind(call: Call) -> Form:
    source = call.operands[0].shape
    dim = call.get("dim", 0) % len(source)
    build = FormBuilder()
    dims = build.dims(source, whole=[dim])
    return build.form([dims], [without(dims, dim) for _ in call.results], [[0]])
