"""Masks travel between ranks as bytes.

Inductor lowers a collective with the promotion of types that arithmetic has: a bool beside an integer, the number of
ranks, becomes an int64, and what reads the mask then finds no mask (torch 2.13).
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_MOVES = (
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,  # of a look-up, where one rank at most has an entry true
)


def as_bytes(gm: fx.GraphModule) -> None:
    """Rewrites the gathers, exchanges and scattered sums of a bool tensor in `gm` to those of uint8, in place."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.target in _MOVES and node.meta["val"].dtype == torch.bool:
            with graph.inserting_before(node):
                node.update_arg(0, _cast(graph, node.all_input_nodes[0], torch.uint8))
            node.meta = {**node.meta, "val": node.meta["val"].to(torch.uint8)}
            for wait in list(node.users):
                wait.meta = {**wait.meta, "val": wait.meta["val"].to(torch.uint8)}
                with graph.inserting_after(wait):
                    mask = _cast(graph, wait, torch.bool)
                wait.replace_all_uses_with(mask, delete_user_cb=lambda user, mask=mask: user is not mask)
    graph.lint()
    gm.recompile()


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
    return cast
