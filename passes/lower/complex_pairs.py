"""Complex numbers travel between ranks as pairs of real ones.

Gloo and NCCL have no complex types, and of torch's functional collectives `all_to_all_single` does not see to that
(torch 2.13). Sums and averages of pairs are those of the numbers, and a last dim of two leaves dim 0 as it was, along
which collectives cut and join.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from passes.program.local import COLLECTIVES, WAIT

aten = torch.ops.aten


def as_pairs(gm: fx.GraphModule) -> None:
    """Rewrites the collectives of complex tensors in `gm` to those of their parts, in place."""
    graph = gm.graph
    sending = [n for n in graph.nodes if n.target in COLLECTIVES and any(_is_complex(s) for s in n.all_input_nodes)]
    for node in sending:
        for sent in node.all_input_nodes:
            if _is_complex(sent):
                with graph.inserting_before(node):
                    node.replace_input_with(sent, _split(graph, sent))
        _joined(graph, node)
    if sending:
        graph.lint()
        gm.recompile()


def _is_complex(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.is_complex()


def _split(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The parts of what may be a conjugate that was not computed yet."""
    value = node.meta["val"].resolve_conj()
    whole = graph.call_function(aten.resolve_conj.default, (node,))
    whole.meta = {**node.meta, "val": value}
    parts = graph.call_function(aten.view_as_real.default, (whole,))
    parts.meta = {**node.meta, "val": torch.view_as_real(value)}
    return parts


def _joined(graph: fx.Graph, received: fx.Node) -> None:
    """Puts numbers together again behind the waits for what `received` gives."""
    value = received.meta["val"]
    if isinstance(value, torch.Tensor):
        received.meta = {**received.meta, "val": _real(value)}
    else:
        received.meta = {**received.meta, "val": [_real(each) for each in value]}
    for user in list(received.users):
        if user.target is operator.getitem:
            _joined(graph, user)
        elif user.target is WAIT and _is_complex(user):
            user.meta = {**user.meta, "val": _real(user.meta["val"])}
            readers = list(user.users)
            with graph.inserting_after(user):
                numbers = graph.call_function(aten.view_as_complex.default, (user,))
            numbers.meta = {**user.meta, "val": torch.view_as_complex(user.meta["val"])}
            for reader in readers:
                reader.replace_input_with(user, numbers)


def _real(value: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(value) if value.is_complex() else value
