"""What a graph gives, what its nodes are made of, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx


def results_of(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph's output tuple holds: nodes, and None."""
    results: Any = graph.output_node().args[0]
    return tuple(results)


def made_of(
    roots: Iterable[Any],
    stop: Callable[[fx.Node], bool] = lambda node: False,
    instead: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> dict[fx.Node, None]:
    """`roots` and all nodes that they are made of; a node where `stop` is true is included, but not what it is made of.

    `instead`: nodes that are looked at in the place of others.
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
    """`roots` and all that follows from them."""
    found = set(roots)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
