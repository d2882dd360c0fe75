"""What a graph gives, what its nodes are made of, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def results_of(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph's output tuple holds: nodes, and None."""
    results: Any = graph.output_node().args[0]
    return tuple(results)


def made_of(
    roots: Iterable[Any],
    stop: Callable[[fx.Node], bool] = lambda node: False,
    instead: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> dict[fx.Node, None]:
    """`roots` and all nodes that they depend on. A node where `stop` is true is included, but not what it depends on.

    `instead`: node -> the node that is followed in its place.
    """
    found: dict[fx.Node, None] = {}
    stack = [root for root in roots if isinstance(root, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            if not stop(node):
                stack.extend(instead.get(operand, operand) for operand in node.all_input_nodes)
    return found


def following(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """`roots` and all nodes that depend on them."""
    found = set(roots)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def cut_of(node: fx.Node) -> tuple[int, int] | None:
    """(start, end) of the rows along dim 0 that a slice takes, is the gradient of, or writes."""
    arguments: Any = node.args
    rows = node.meta["val"].shape[0] if node.meta["val"].dim() else 0
    if node.target is aten.slice.Tensor:
        rows = arguments[0].meta["val"].shape[0] if rows else 0
        given: list[Any] = list(arguments[1:])
    else:
        given = list(arguments[2:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    if not rows or dim % node.meta["val"].dim() or step != 1:
        return None
    start, end, _ = slice(start, end).indices(rows)
    return (start, end) if start < end else None
