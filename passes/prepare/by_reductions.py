"""Softmax, argmax and max over a vocabulary as reductions along it.

    softmax(x)               ->    exp(x - amax(x)) / sum(exp(x - amax(x)))
    its gradient             ->    p * (grad - sum(p * grad))
    argmax(x)                ->    amax of (n - i where x[i] is the largest, else 0), taken from n
    max(x)                   ->    argmax(x), sum(x where i is that, else 0)
    its gradient             ->    grad where i is that, else 0

The ops themselves need the dim whole, so that logits which a tensor axis splits would be exchanged. Where each rank has
some of the classes, a maximum and a sum of one number per row are. Only dims are taken that a product with a weight
made wider than what it read: attention's scores and a router's few experts stay one op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from passes.analysis.dims import is_getitem
from passes.program.emit import Emitter, ProgramWriter
from passes.program.program import Program
from passes.program.walks import made_of
from passes.rules.call import call_of, operand_nodes
from passes.rules.matmul import PRODUCTS
from passes.rules.table import rule_of
from passes.rules.view import RESHAPES

aten = torch.ops.aten
_SOFTMAX, _BACKWARD, _ARGMAX = aten._softmax.default, aten._softmax_backward_data.default, aten.argmax.default
_MAX, _SCATTER = aten.max.dim, aten.scatter.src
_ALONG = {_SOFTMAX, aten._log_softmax.default}
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def by_reductions(program: Program) -> Program:
    """The program with softmax and argmax over a vocabulary, and their gradients, written as reductions. The
    fingerprint is kept."""
    taken = _taken(program)
    if not taken:
        return program
    emit = ProgramWriter(program)
    new, most = emit.new, dict[fx.Node, fx.Node]()

    def write(node: fx.Node) -> fx.Node | None:
        arguments: Any = node.args
        if node not in taken or node.target is _MAX:  # whose results are written one by one
            return None
        if is_getitem(node):
            x, dim, *rest = arguments[0].args
            keep, dim = bool(rest and rest[0]), dim % x.meta["val"].dim()
            if arguments[0] not in most:
                most[arguments[0]] = _argmax(emit, new[x], dim, keep=True)
            made = index = most[arguments[0]]
            if not arguments[1]:  # the value
                made = emit.call(aten.sum.dim_IntList, _where_it_is(emit, index, new[x], dim), [dim], True)
            return made if keep else emit.view(made, node.meta["val"].shape)
        if node.target is _SCATTER:
            return _where_it_is(emit, new[arguments[2]], new[arguments[3]], arguments[1], node.meta["val"].shape)
        if node.target is _SOFTMAX:
            return _softmax(emit, new[arguments[0]], arguments[1], node.meta["val"].dtype)
        if node.target is _BACKWARD:
            return _softmax_backward(emit, new[arguments[0]], new[arguments[1]], *arguments[2:])
        keep = bool(arguments[2]) if len(arguments) > 2 else bool(node.kwargs.get("keepdim", False))
        return _argmax(emit, new[arguments[0]], arguments[1], keep)

    return emit.written(write)


def _taken(program: Program) -> set[fx.Node]:
    """Softmaxes, argmaxes and maxima along dims that a product made wider, and gradients of these."""
    graph = program.graph.graph
    held = set(program.placeholders_of("parameter", "buffer"))
    found: set[fx.Node] = set()
    for node in graph.nodes:
        arguments: Any = node.args
        if node.target is _BACKWARD:
            if arguments[1] in found:
                found.add(node)
        elif is_getitem(node):
            if arguments[0] in found:
                found.add(node)
        elif node.target is _SCATTER:
            if _is_gradient(node, found):
                found.add(node)
        elif node.target in (_SOFTMAX, _MAX) or (
            node.target is _ARGMAX and len(arguments) > 1 and arguments[1] is not None
        ):
            value: Tensor = arguments[0].meta["val"]
            if value.dim() and value.dtype.is_floating_point and _is_widened(arguments[0], arguments[1], held):
                found.add(node)
    return found


def _is_gradient(node: fx.Node, found: set[fx.Node]) -> bool:
    """Whether a node puts one number into zeros, where a maximum that was found is."""
    base, dim, index, source = cast(Any, node.args)
    shape = node.meta["val"].shape
    one = [1 if d == dim % len(shape) else size for d, size in enumerate(shape)]
    if base.target is not aten.full.default or base.args[1] != 0 or index.meta["val"].shape != torch.Size(one):
        return False
    while index.target in (aten.unsqueeze.default, *RESHAPES):
        index = index.args[0]
    return index in found and is_getitem(index) and source.meta["val"].shape == torch.Size(one)


def _is_widened(node: fx.Node, dim: int, held: set[fx.Node]) -> bool:
    """Whether entries along a dim are those of a dim that a product with a weight made, larger than what it summed."""
    waiting = [(node, dim % node.meta["val"].dim())]
    seen: set[tuple[fx.Node, int]] = set()
    while waiting:
        at, d = waiting.pop()
        rule = rule_of(at.target) if at.op == "call_function" else None
        if rule is None or (at, d) in seen or not isinstance(at.meta["val"], Tensor):
            continue
        seen.add((at, d))
        form, operands = rule(call_of(at)), operand_nodes(at)
        dims = form.results[0][d]
        if len(dims) != 1 or (dims[0] in form.whole and at.target not in _ALONG):
            continue
        read = [
            (operand, k, one) for operand, of in zip(operands, form.operands, strict=True) for k, one in enumerate(of)
        ]
        have = [(operand, k) for operand, k, one in read if one == dims]
        if at.target not in PRODUCTS:
            waiting += have
        elif len(have) == 1 and _follows_from(have[0][0], held):
            summed = max((size for f, size in enumerate(form.sizes) if f in form.reduces), default=1)
            if form.sizes[dims[0]] > summed:
                return True
    return False


def _follows_from(node: fx.Node, held: set[fx.Node]) -> bool:
    """Whether a tensor is made of parameters and buffers alone."""
    leaves = [each for each in made_of([node]) if each.op == "placeholder"]
    return bool(leaves) and held.issuperset(leaves)


def _cast(emit: Emitter, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    return x if x.meta["val"].dtype == dtype else emit.call(aten._to_copy.default, x, dtype=dtype)


def _softmax(emit: Emitter, x: fx.Node, dim: int, dtype: torch.dtype) -> fx.Node:
    x = _cast(emit, x, torch.float32) if x.meta["val"].dtype in _LOW_PRECISION else x
    most = emit.call(aten.amax.default, x, [dim], True)
    each = emit.call(aten.exp.default, emit.call(aten.sub.Tensor, x, most))
    total = emit.call(aten.sum.dim_IntList, each, [dim], True)
    return _cast(emit, emit.call(aten.div.Tensor, each, total), dtype)


def _softmax_backward(emit: Emitter, grad: fx.Node, out: fx.Node, dim: int, dtype: torch.dtype) -> fx.Node:
    if grad.meta["val"].dtype in _LOW_PRECISION:
        grad, out = _cast(emit, grad, torch.float32), _cast(emit, out, torch.float32)
    each = emit.call(aten.mul.Tensor, grad, out)
    total = emit.call(aten.sum.dim_IntList, each, [dim], True)
    return _cast(emit, emit.call(aten.sub.Tensor, each, emit.call(aten.mul.Tensor, out, total)), dtype)


def _argmax(emit: Emitter, x: fx.Node, dim: int, keep: bool) -> fx.Node:
    """The first of the largest; the first that is not a number, where there is one, as torch has it.

    Whole numbers are compared between ranks: not all collectives tell what is not a number from what is small.
    """
    value: Tensor = x.meta["val"]
    dim %= value.dim()
    count = value.shape[dim]
    places = emit.call(aten.arange.default, count, dtype=torch.int64, device=torch.device("cpu"))
    behind = emit.call(aten.add.Tensor, emit.call(aten.neg.default, places), count)
    behind = emit.view(behind, [count, *[1] * (value.dim() - dim - 1)])
    largest = emit.call(aten.eq.Tensor, x, emit.call(aten.amax.default, x, [dim], True))
    zero = emit.call(aten.full.default, [], 0, dtype=torch.int64, device=torch.device("cpu"))
    score = emit.call(aten.where.self, largest, behind, zero)
    unknown, above = emit.call(aten.ne.Tensor, x, x), emit.call(aten.add.Tensor, behind, count)
    most = emit.call(aten.amax.default, emit.call(aten.where.self, unknown, above, score), [dim], keep)
    less = emit.call(aten.sub.Tensor, most, count)
    most = emit.call(aten.where.self, emit.call(aten.gt.Scalar, most, count), less, most)
    return emit.call(aten.add.Tensor, emit.call(aten.neg.default, most), count)


def _where_it_is(emit: Emitter, index: fx.Node, x: fx.Node, dim: int, shape: Sequence[int] = ()) -> fx.Node:
    """`x` at places of a dim, zero elsewhere; both with a size of 1 there, or `x` with `shape`'s."""
    shape = tuple(shape) or emit.shape(x)
    dim %= len(shape)
    places = emit.call(aten.arange.default, shape[dim], dtype=torch.int64, device=torch.device("cpu"))
    places = emit.view(places, [shape[dim], *[1] * (len(shape) - dim - 1)])
    zero = emit.call(aten.full.default, [], 0, dtype=x.meta["val"].dtype, device=torch.device("cpu"))
    return emit.call(aten.where.self, emit.call(aten.eq.Tensor, index, places), x, zero)
