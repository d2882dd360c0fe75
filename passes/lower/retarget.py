"""A captured step on another device: constants are made there, attention takes that device's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from passes.lower.cuda_attention import CPU_ATTENTION, retarget_attention
from passes.program.fakes import DynamicOutputShapeException, FakeTensorMode
from passes.program.graphs import graph_module


def retarget(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of `gm` that runs on `device`: constants made there, attention by its kernels, fake values renewed.

    On the CPU, a copy as it is.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    moved = graph_module(gm, graph)
    for node, original in zip(graph.nodes, gm.graph.nodes, strict=True):
        node.meta = dict(original.meta)
    if device.type == "cpu":
        return moved
    for node in graph.nodes:
        if node.op == "get_attr":
            setattr(moved, node.target, getattr(moved, node.target).to(device))
        elif node.op == "call_function":
            _move_constants(node, device)
    if device.type == "cuda":
        for node in list(graph.nodes):
            if node.target is CPU_ATTENTION:
                retarget_attention(graph, node, device)
    graph.lint()
    moved.recompile()
    _renew_values(moved, device)
    return moved


def _move_constants(node: fx.Node, device: torch.device) -> None:
    """Makes on `device` what `node` would make on the CPU."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) and argument.type == "cpu" else argument

    node.args = fx.node.map_aggregate(node.args, moved)
    node.kwargs = fx.node.map_aggregate(dict(node.kwargs), moved)
    makes = isinstance(node.target, torch._ops.OpOverload) and not node.all_input_nodes
    if makes and any(argument.name == "device" for argument in node.target._schema.arguments):  # type: ignore[union-attr]
        node.kwargs = {**node.kwargs, "device": device}


def _renew_values(gm: fx.GraphModule, device: torch.device) -> None:
    """Computes the nodes' fake values again, on `device`; a shape that follows from values is the one there was."""

    def there(value: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    class Renew(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            try:
                result = super().run_node(n)
            except DynamicOutputShapeException:
                result = tree_map_only(torch.Tensor, there, n.meta["val"])
            if n.op != "output":
                n.meta["val"] = result
            return result

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        inputs = [there(node.meta["val"]) for node in gm.graph.find_nodes(op="placeholder")]
        del mode
        Renew(gm).run(*inputs)
