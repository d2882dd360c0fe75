"""A sum with a scaled term, in two ops: `a + alpha b` as Inductor is to read it.

Inductor makes `addmm` of a sum and a product of matrices, and drops the sum's `alpha`: numbers that are wrong, and no
error (torch 2.11 to 2.13). A factor of its own is kept. Fused, the two ops round as the one does.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def with_scales_apart(graph: fx.Graph) -> None:
    """Have each sum with an `alpha` add its scaled second term instead."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        alpha, term = node.kwargs.get("alpha", 1), node.args[1]
        if alpha == 1 or not isinstance(term, fx.Node):
            continue
        with graph.inserting_before(node):
            scaled = graph.call_function(aten.mul.Scalar, (term, alpha))
        scaled.meta = {**node.meta, "val": aten.mul.Scalar(term.meta["val"], alpha)}
        node.update_arg(1, scaled)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "alpha"}
