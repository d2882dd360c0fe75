"""Collectives as gloo runs them fast: a rewrite of a rank's graph for CPU ranks.

    reduce_scatter          all_to_all of the chunks, then their sum
    reduce_scatter of many  the same of one packed tensor
    all_reduce of many      all_reduce of one packed tensor

Gloo reduces whole tensors for a reduce-scatter and then drops what is another rank's, and it takes a list one tensor
after the other. What a rank sends stays what a ring's reduce-scatter sends. NCCL groups a list without packing it, so a
graph for CUDA stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from passes.local import TOGETHER, WAIT

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
_SCATTER, _REDUCE = c10d.reduce_scatter_tensor.default, c10d.all_reduce.default
_TERMS: dict[Any, Any] = {"sum": aten.sum.dim_IntList, "avg": aten.mean.dim}


def for_gloo(gm: fx.GraphModule) -> None:
    """Rewrites the collectives of `gm` that gloo is slow at, in place."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.target is TOGETHER[_REDUCE]:
            _reduced(graph, node)
        elif node.target in (_SCATTER, TOGETHER[_SCATTER]) and node.args[1] in _TERMS:
            _scattered(graph, node)
    graph.lint()
    gm.recompile()


def _reduced(graph: fx.Graph, node: fx.Node) -> None:
    operands: Any = node.args[0]
    shapes = [_shape(x) for x in operands]
    with graph.inserting_before(node):
        packed = _call(node, aten.cat.default, [_call(node, aten.view.default, x, [-1]) for x in operands])
        made = _call(node, _REDUCE, packed, *node.args[1:])
    waits = _waits(node)
    with graph.inserting_before(waits[0]):
        whole = _call(node, WAIT, made)
        parts = _call(node, aten.split_with_sizes.default, whole, [shape.numel() for shape in shapes])
    _replace(graph, node, waits, parts, shapes)


def _scattered(graph: fx.Graph, node: fx.Node) -> None:
    operands, op, ranks, group = node.args
    assert isinstance(ranks, int)
    waits = _waits(node)
    shapes = [_shape(wait) for wait in waits]
    with graph.inserting_before(node):
        xs: Any = operands if node.target is not _SCATTER else [operands]
        rows = [_call(node, aten.view.default, x, [ranks, _shape(x).numel() // ranks]) for x in xs]
        packed = rows[0] if len(rows) == 1 else _call(node, aten.cat.default, rows, 1)
        made = _call(node, c10d.all_to_all_single.default, packed, [1] * ranks, [1] * ranks, group)
    with graph.inserting_before(waits[0]):
        whole = _call(node, _TERMS[op], _call(node, WAIT, made), [0])
        parts = _call(node, aten.split_with_sizes.default, whole, [shape.numel() for shape in shapes])
    _replace(graph, node, waits, parts, shapes)


def _waits(node: fx.Node) -> list[fx.Node]:
    """The waits for what a collective brings, one per tensor."""
    items = [user for user in node.users if user.target is operator.getitem]
    items.sort(key=lambda item: item.args[1])  # type: ignore[arg-type, return-value]
    waits = [user for item in items or [node] for user in item.users]
    if any(wait.target is not WAIT for wait in waits):
        raise AssertionError(f"{node.name}: a collective's result is read before it is waited for")
    return waits


def _replace(
    graph: fx.Graph, node: fx.Node, waits: Sequence[fx.Node], parts: fx.Node, shapes: Sequence[torch.Size]
) -> None:
    """Puts `parts` in `shapes` where the results of the collective `node` were waited for."""
    for index, (wait, shape) in enumerate(zip(waits, shapes, strict=True)):
        with graph.inserting_before(wait):
            part = _call(wait, operator.getitem, parts, index)
            wait.replace_all_uses_with(_call(wait, aten.view.default, part, list(shape)))
        items = wait.all_input_nodes
        graph.erase_node(wait)
        if items[0] is not node:
            graph.erase_node(items[0])
    graph.erase_node(node)


def _shape(node: fx.Node) -> torch.Size:
    size: torch.Size = node.meta["val"].shape
    return size


def _call(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node, with the metadata of `like` but its own fake value."""
    made = like.graph.call_function(target, args)
    made.meta = dict(like.meta)
    with torch.no_grad():
        made.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
    return made
