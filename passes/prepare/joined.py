"""Batches put behind one another, as entries of a dim of their own.

    cat([chosen, rejected])              ->    cat of (1, b) each, view(2 b)
    x[:b], x[b:], and cat's gradients    ->    view(2, b), of which entries 0 and 1
    slice_backward                       ->    view(1, b), slice_backward to (2, b), view(2 b)

A cat holds the dim that it joins along whole, so of `2 b` samples an axis that splits the batch could split none, and
every rank would compute all that follows. Where `b` is a dim of its own, each rank has its samples of either batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.program.emit import Emitter, ProgramWriter
from passes.program.program import Program
from passes.program.walks import cut_of, following

aten = torch.ops.aten


@dataclass(frozen=True)
class _Run:
    """Whole batches of a tensor's dim 0: from which on, up to which."""

    start: int
    end: int


def split_joined(program: Program) -> Program:
    """The program with the batches that a `cat` joins as a dim of their own. The fingerprint is kept."""
    graph, batch = program.graph.graph, program.batch_size
    if batch is None or batch < 2:
        return program
    joined = _joined(graph, program.batch_dims, batch)
    if not joined:
        return program
    lengths, behind = {node.meta["val"].shape[0] for node in joined}, following(graph, joined)
    emit = ProgramWriter(program)

    def write(node: fx.Node) -> fx.Node | None:
        run = _run(node, batch, lengths) if node in behind else None
        arguments: Any = node.args
        if node in joined:
            made = emit.call(aten.cat.default, [_apart(emit, emit.new[part], batch) for part in arguments[0]])
        elif run is None:
            return None
        else:
            given = _apart(emit, emit.new[arguments[0]], batch)
            if node.target is aten.slice.Tensor:
                made = emit.call(aten.slice.Tensor, given, 0, run.start, run.end)
            else:
                apart = [arguments[1][0] // batch, batch, *arguments[1][1:]]
                made = emit.call(aten.slice_backward.default, given, apart, 0, run.start, run.end, 1)
        return emit.view(made, node.meta["val"].shape)

    return emit.written(write)


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
    if node.target not in (aten.slice.Tensor, aten.slice_backward.default) or (cut := cut_of(node)) is None:
        return None
    whole: Any = node.args[0] if node.target is aten.slice.Tensor else node
    (start, end), length = cut, whole.meta["val"].shape[0]
    return _Run(start // batch, end // batch) if length in lengths and not (start % batch or end % batch) else None


def _apart(emit: Emitter, node: fx.Node, batch: int) -> fx.Node:
    """`(n b, ...)` as `(n, b, ...)`."""
    value: Tensor = node.meta["val"]
    return emit.view(node, [value.shape[0] // batch, batch, *value.shape[1:]])
