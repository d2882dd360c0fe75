"""What an emitted program holds in memory when it runs op by op: counted on its graph, for tests."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from passes.lower.partition import split
from passes.program.local import WAIT, LocalProgram

aten = torch.ops.aten
ALIASES = {WAIT, aten._unsafe_view.default, aten.reshape.default}


def owner(node: fx.Node) -> fx.Node:
    """The node whose buffer a node's value lies in."""
    while node.op == "call_function":
        target: Any = node.target
        if target is operator.getitem:
            parent = node.all_input_nodes[0]
            if not getattr(parent.target, "is_view", False):
                return node
            node = parent
        elif target not in ALIASES and not getattr(target, "is_view", False):
            return node
        node = node.all_input_nodes[0]
    return node


def size_of(node: fx.Node) -> int:
    """Bytes of the tensor a node yields; 0 where it yields several, which are picked one by one."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def live_peak(gm: fx.GraphModule, beside: int, there: Iterable[fx.Node] = ()) -> tuple[int, str]:
    """The most bytes alive while `gm` runs, and the node that runs then; inputs go after their last use.

    `beside` is alive all along and counts the placeholders `there` too.
    """
    nodes = list(gm.graph.nodes)
    owners = {node: owner(node) for node in nodes}
    skipped = {owners[node] for node in there}
    last = {}
    for index, node in enumerate(nodes):
        for each in (node, *node.all_input_nodes):
            last[owners[each]] = index
    ends: dict[int, list[fx.Node]] = defaultdict(list)
    for node, index in last.items():
        ends[index].append(node)
    inputs = [node for node in nodes if node.op == "placeholder" and node not in skipped]
    alive, most, where = beside + sum(map(size_of, inputs)), 0, ""
    for index, node in enumerate(nodes):
        if node.op == "call_function" and owners[node] is node:
            alive += size_of(node)
        if alive > most:
            most, where = alive, f"{node.meta.get('phase')}: {node.target} in {node.meta.get('module')}"
        alive -= sum(size_of(gone) for gone in ends[index] if gone not in skipped and gone.op != "get_attr")
    return most, where


def step_peak(local: LocalProgram) -> tuple[int, str]:
    """The most bytes of one micro-batch and the node that runs then: parameters and inputs, and what comes and goes.

    The model's outputs are dropped as backward begins; of `model(...).loss` only a scalar is left.
    """
    halves = split(local)
    assert halves.backward is not None
    given = list(halves.forward.graph.find_nodes(op="placeholder"))
    rest = sum(map(size_of, given))
    forward = live_peak(halves.forward, rest, given)
    names = {node.name for node in given}
    inputs = [node for node in halves.backward.graph.find_nodes(op="placeholder") if node.name in names]
    return max(forward, live_peak(halves.backward, rest, inputs))
