"""What is joined and then added up in place keeps what else is read of its parts apart.

Inductor has the operands of a `cat` written right into its result, and an all-reduce of that run in place. What else
reads a part reads a view of the same memory, which may hold the sum by then: numbers that are wrong, and no error
(torch 2.13). Such a part is copied into the `cat`; one without other readers needs no copy.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.rules.work import is_view_op

aten = torch.ops.aten
_c10d = torch.ops._c10d_functional
_IN_PLACE = {_c10d.all_reduce.default, _c10d.all_reduce_coalesced.default}
"""Collectives that Inductor has write where they read."""


def with_parts_apart(graph: fx.Graph) -> None:
    """Copy the inputs of a `cat` that other ops read too, where the result of the `cat` is added to in place."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        if _is_added_up(node):
            parts = node.args[0]
            assert isinstance(parts, list | tuple)
            with graph.inserting_before(node):
                node.update_arg(0, [_copied(graph, part) if is_shared(part) else part for part in parts])


def _is_added_up(node: fx.Node) -> bool:
    """Whether a collective writes in place what a node gives, or a view or copy of it."""
    through = (user for user in node.users if is_view_op(user.target) or user.target is aten.clone.default)
    return any(user.target in _IN_PLACE for user in node.users) or any(map(_is_added_up, through))


def is_shared(part: fx.Node) -> bool:
    """Whether the tensor that `part` is, or is a view of, has readers other than one `cat`."""
    while len(part.users) == 1 and is_view_op(part.target):
        part = part.all_input_nodes[0]
    return len(part.users) > 1


def _copied(graph: fx.Graph, part: fx.Node) -> fx.Node:
    """The same values, by ops that no pass of Inductor's takes out, as it does a clone: a column more, and less."""
    value = part.meta["val"]
    wider = graph.call_function(aten.constant_pad_nd.default, (part, [0, 1]))
    wider.meta = {**part.meta, "val": aten.constant_pad_nd.default(value, [0, 1])}
    dim, size = value.dim() - 1, value.shape[-1]
    made = graph.call_function(aten.slice.Tensor, (wider, dim, 0, size))
    made.meta = {**part.meta, "val": aten.slice.Tensor(wider.meta["val"], dim, 0, size)}
    return made
