"""`settle_order`: nodes in an order that does not depend on how the model happened to iterate.

Many models make masks and rotary tables `for kind in set(config.layer_types)`. Python's hashes of strings differ from
process to process, so ranks would capture the same ops in different orders, and a plan would not fit its own model.

Such ops follow from inputs and buffers alone. What depends on parameters stays where it is; each run of other nodes
between is put in the order in which it is first read, depth first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx

Text = Callable[[fx.Node, dict[fx.Node, str]], str]
"""A node's op and arguments as text, given those of its operands."""


def settle_order(graph: fx.Graph, free: Mapping[fx.Node, str], text: Text) -> None:
    """Puts nodes that depend on the placeholders `free` alone in an order that is the same in every process, in place.

    `free` has these placeholders' names, and `text` says what a node computes.

    By names, not by places: the order is the same in a model with more layers.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    digests = {node: f"input {name}" for node, name in free.items()}
    for before, run in list(_runs(graph, digests, text)):
        inside = set(run)

        def first_read(node: fx.Node) -> tuple[float, str]:
            readers = [places[user] for user in node.users if user not in digests]
            return min(readers, default=float("inf")), digests[node]

        last = before
        for node in _depth_first(sorted((n for n in run if inside.isdisjoint(n.users)), key=first_read), inside):
            last.append(node)
            last = node


def _runs(graph: fx.Graph, digests: dict[fx.Node, str], text: Text) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Longest runs of nodes that depend on known ones alone, each with the node before it; fills `digests`."""
    before, run = graph._root, []
    for node in graph.nodes:
        if _is_movable(node) and all(operand in digests for operand in node.all_input_nodes):
            digests[node] = hashlib.sha256(text(node, digests).encode()).hexdigest()
            run.append(node)
            continue
        if len(run) > 1:
            yield before, run
        before, run = node, []
    if len(run) > 1:
        yield before, run


def _is_movable(node: fx.Node) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op in ("call_function", "get_attr") and not random


def _depth_first(sinks: list[fx.Node], inside: set[fx.Node]) -> Iterator[fx.Node]:
    """`sinks` and what they follow from, each node after its operands."""
    done: set[fx.Node] = set()
    for sink in sinks:
        stack = [sink]
        while stack:
            node = stack[-1]
            waiting = [n for n in node.all_input_nodes if n in inside and n not in done]
            if waiting:
                stack.append(waiting[0])
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                yield node
