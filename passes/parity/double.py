"""Programs in double precision: the same ops in float64, which tell a rounding from a mistake.

A layout that is wrong is as wrong in float64; what rounding makes of a step shrinks by the ratio of the roundings,
2^-29, however much the model blows it up.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from passes.program.graphs import graph_module
from passes.program.local import LocalProgram

_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def doubled(value: Any) -> Any:
    """`value`, a tensor or a tree with tensors, with what is single in double precision."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(_WIDE.get(t.dtype, t.dtype)), value)


def in_double(local: LocalProgram) -> LocalProgram:
    """The ranks' program, and the program it was made from, with every float32 a float64."""
    program = replace(local.program, graph=_graph_in_double(local.program.graph))
    return replace(local, graph=_graph_in_double(local.graph), program=program)


def _graph_in_double(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes ask for wide dtypes, hold wide constants and say so."""
    graph, new, held = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Any]()
    for node in module.graph.nodes:
        made = new[node] = graph.node_copy(node, new.__getitem__)
        made.args, made.kwargs = pytree.tree_map_only(torch.dtype, lambda d: _WIDE.get(d, d), (made.args, made.kwargs))
        if "val" in node.meta:
            made.meta["val"] = doubled(node.meta["val"])
        if node.op == "get_attr":
            held[node.target] = doubled(attrgetter(node.target)(module))
    return graph_module(held, graph, class_name="Step")
