"""Products by the library that runs them fastest: a rewrite of a rank's graph for CPU ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from costmodel.products import is_for_onednn

aten = torch.ops.aten
_BY_ONEDNN: dict[Any, Any] = {
    aten.mm.default: torch.ops.autopar.mm.default,
    aten.addmm.default: torch.ops.autopar.addmm.default,
}


def for_onednn(gm: fx.GraphModule) -> None:
    """Has oneDNN run those products of `gm` that are faster by it here, in place."""
    for node in gm.graph.nodes:
        if node.target in _BY_ONEDNN:
            *bias, a, b = (operand.meta["val"] for operand in node.args)
            to_every_row = all(each.shape == b.shape[1:] for each in bias)
            if to_every_row and not node.kwargs and is_for_onednn(a, b):
                node.target = _BY_ONEDNN[node.target]
    gm.recompile()
