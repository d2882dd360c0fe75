"""A program's graph as lookups, made once per analysis: what each op reads, and which value a node stands for.

Schedules of one program are made many times over (one per mesh, strategy and recompute mode); the graph stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from passes.analysis.dims import Value, is_getitem, value_of
from passes.analysis.layers import Folding
from passes.program.program import Program
from passes.rules.call import operand_nodes


@dataclass(frozen=True)
class Flow:
    """Lookups by node. Results that several getitems pick are those of the first."""

    nodes: tuple[fx.Node, ...]
    """In graph order, without the output."""
    source: Mapping[fx.Node, fx.Node]
    """Of a getitem, the first that picks the same."""
    picked: Mapping[tuple[fx.Node, int], fx.Node]
    """(op, result) -> the first getitem that picks it."""
    op: Mapping[fx.Node, fx.Node]
    """The op that gives a value: of a result that is picked from several, the op that gives them all."""
    operands: Mapping[fx.Node, tuple[fx.Node, ...]]
    """Of an op (no getitem), the tensors it reads, in the order they are passed."""
    value: Mapping[fx.Node, Value]


def flow_of(program: Program, folding: Folding) -> Flow:
    """The lookups of a program."""
    source: dict[fx.Node, fx.Node] = {}
    picked: dict[tuple[fx.Node, int], fx.Node] = {}
    op: dict[fx.Node, fx.Node] = {}
    operands: dict[fx.Node, tuple[fx.Node, ...]] = {}
    nodes = []
    for node in program.graph.graph.nodes:
        if node.op == "output":
            continue
        nodes.append(node)
        op[node] = node
        if is_getitem(node):
            source[node] = picked.setdefault((node.args[0], node.args[1]), node)
            op[node] = node.args[0]
        elif node.op == "call_function":
            operands[node] = tuple(source.get(operand, operand) for operand in operand_nodes(node))
    return Flow(tuple(nodes), source, picked, op, operands, {node: value_of(node, folding) for node in op})
