"""Weights are prepared again for backward.

Forward computes small things from parameters alone: a transpose, a view, a cast. Where backward reads such a value, it
would have to be kept, gathered weight and all, from forward to backward. `prepare_again` gives backward copies of
these nodes, computed from the parameters as stored, so that state sharding gathers a weight once per phase and frees
it after use.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from passes.program.program import Program
from passes.rules.work import VIEWS

aten = torch.ops.aten
_CHEAP = VIEWS | {aten._to_copy.default, aten.clone.default, torch.ops.prims.convert_element_type.default}


def prepare_again(program: Program) -> Program:
    """The program with views and casts of parameters repeated in backward, where backward reads them."""
    graph = program.graph.graph
    parameters = set(program.placeholders_of("parameter", "buffer"))
    chains: set[fx.Node] = set()
    copies: dict[fx.Node, fx.Node] = {}

    def again(node: fx.Node, reader: fx.Node) -> fx.Node:
        if node not in chains:
            return node
        if node not in copies:
            arguments = {source: again(source, reader) for source in node.all_input_nodes}
            with graph.inserting_before(reader):
                copies[node] = graph.node_copy(node, lambda source: arguments[source])
            copies[node].meta = {**node.meta, "phase": "backward"}
        return copies[node]

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.meta.get("phase") == "forward":
            sources = node.all_input_nodes
            if node.target in _CHEAP and sources and all(s in parameters or s in chains for s in sources):
                chains.add(node)
        else:
            for source in node.all_input_nodes:
                if source in chains:
                    node.replace_input_with(source, again(source, node))
    graph.eliminate_dead_code()
    program.graph.recompile()
    return replace(program)
