"""What integers a captured node can hold, as far as the ops that made it tell."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_POSITIONS = {
    aten.topk.default: (2, -1),
    aten.sort.default: (1, -1),
    aten.sort.stable: (2, -1),
    aten.max.dim: (1, None),
    aten.min.dim: (1, None),
}
"""Ops whose second result is positions along a dim: where that is among the arguments, and its default."""
_MOVES = {
    aten.alias.default, aten.clone.default, aten.detach.default, aten.expand.default, aten.flip.default,
    aten.gather.default, aten.permute.default, aten.repeat.default, aten.select.int, aten.slice.Tensor,
    aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int, aten.unsqueeze.default, aten.view.default,
}  # fmt: skip
"""Ops whose elements are some of their first operand's."""


def positions_below(node: fx.Node) -> int | None:
    """The least n for which every element is known to be one of 0..n-1; None where the ops do not tell."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return None
    if node.meta["val"].dtype is torch.bool:
        return 2
    if target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        known = _POSITIONS.get(source.target)  # type: ignore[call-overload]
        return _size(source, *known) if known is not None and index == 1 else None
    if target in (aten.argmax.default, aten.argmin.default):
        return _size(node, 1, None) if len(node.args) > 1 and node.args[1] is not None else None
    if target in _MOVES:
        return positions_below(_operand(node))
    if target is aten._to_copy.default:
        value = node.meta["val"]
        below = positions_below(_operand(node))
        return below if below is None or not value.dtype.is_floating_point or below <= 256 else None
    return None


def _operand(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _size(node: fx.Node, place: int, default: int | None) -> int | None:
    """Size of the first operand's dim that the argument at `place` names."""
    dim: Any = node.kwargs.get("dim", node.args[place] if len(node.args) > place else default)
    shape = _operand(node).meta["val"].shape
    return int(shape[dim]) if isinstance(dim, int) and shape else None
