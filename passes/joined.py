"""Batches put behind one another, as entries of a dim of their own.

    cat([chosen, rejected])              ->    cat of (1, b) each, view(2 b)
    x[:b], x[b:], and cat's gradients    ->    view(2, b), of which entries 0 and 1
    slice_backward                       ->    view(1, b), slice_backward to (2, b), view(2 b)

A cat holds the dim that it joins along whole, so of `2 b` samples an axis that splits the batch could split none, and
every rank would compute all that follows. Where `b` is a dim of its own, each rank has its samples of either batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.emit import Emitter, emitter_like, relax_views
from passes.graphs import graph_module
from passes.program import Program
from passes.walks import following

aten = torch.ops.aten


@dataclass(frozen=True)
class _Run:
    """Whole batches of a tensor's dim 0: from which on, up to which."""

    start: int
    end: int


def split_joined(program: Program) -> Program:
    """The program with such batches. It keeps its fingerprint."""
    old = program.graph.graph
    of_batch = program.batch_dims
    batches = {node.meta["val"].shape[dim] for node, dim in of_batch.items()}
    if len(batches) != 1 or (batch := batches.pop()) < 2:
        return program
    joined = _joined(old, of_batch, batch)
    if not joined:
        return program
    lengths, behind = {node.meta["val"].shape[0] for node in joined}, following(old, joined)
    emit = emitter_like(old)
    new: dict[fx.Node, fx.Node] = {}
    for node in old.nodes:
        emit.meta = {key: node.meta.get(key, "") for key in ("phase", "module", "source")}
        run = _run(node, batch, lengths) if node in behind else None
        arguments: Any = node.args
        if node in joined:
            entries = [_apart(emit, new[part], batch) for part in arguments[0]]
            made = emit.call(aten.cat.default, entries)
        elif run is not None and node.target is aten.slice.Tensor:
            made = emit.call(aten.slice.Tensor, _apart(emit, new[arguments[0]], batch), 0, run.start, run.end)
        elif run is not None:
            grad, sizes = _apart(emit, new[arguments[0]], batch), arguments[1]
            apart = [sizes[0] // batch, batch, *sizes[1:]]
            made = emit.call(aten.slice_backward.default, grad, apart, 0, run.start, run.end, 1)
        else:
            new[node] = emit.graph.node_copy(node, new.__getitem__)
            continue
        new[node] = emit.view(made, node.meta["val"].shape)
    module = graph_module(program.graph, emit.graph)
    relax_views(module.graph)
    module.graph.lint()
    module.recompile()
    return replace(program, graph=module)


def _joined(graph: fx.Graph, of_batch: Collection[fx.Node], batch: int) -> set[fx.Node]:
    """What forward joins along dim 0 of whole batches that follow from the inputs'."""
    joined, lengths, follow = set[fx.Node](), {batch}, following(graph, of_batch)
    for node in graph.nodes:
        if node.target is not aten.cat.default or node.meta.get("phase") != "forward":
            continue
        parts: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        if dim % node.meta["val"].dim() or len(parts) < 2 or not follow.issuperset(parts):
            continue
        if all(part.meta["val"].shape[0] in lengths for part in parts):
            joined.add(node)
            lengths.add(node.meta["val"].shape[0])
    return joined


def _run(node: fx.Node, batch: int, lengths: Collection[int]) -> _Run | None:
    """The batches that a slice of joined ones takes, or that it is the gradient of."""
    arguments: Any = node.args
    if node.target is aten.slice.Tensor:
        length = arguments[0].meta["val"].shape[0] if arguments[0].meta["val"].dim() else 0
        given: list[Any] = list(arguments[1:])
        dim, start, end, step = given + [0, None, None, 1][len(given) :]
    elif node.target is aten.slice_backward.default:
        sizes, dim, start, end, step = arguments[1:]
        length = sizes[0]
    else:
        return None
    start, end, _ = slice(start, end).indices(length)
    cuts = dim % node.meta["val"].dim() == 0 and step == 1 and length in lengths
    if not cuts or start >= end or start % batch or end % batch:
        return None
    return _Run(start // batch, end // batch)


def _apart(emit: Emitter, node: fx.Node, batch: int) -> fx.Node:
    """`(n b, ...)` as `(n, b, ...)`."""
    value: Tensor = node.meta["val"]
    return emit.view(node, [value.shape[0] // batch, batch, *value.shape[1:]])
