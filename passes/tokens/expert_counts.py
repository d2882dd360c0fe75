"""Recognises how many rows each expert has: what tensor a count is of, in any of the ways that models write one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.rules.call import call_of

aten = torch.ops.aten

CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
SAME_ENTRIES = {aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, *CASTS}
"""Ops whose result has the entries of their operand in the same order."""


def counted_entries(counts: fx.Node, experts: int) -> Any:
    """The tensor in which `counts` counts each of the numbers below `experts`; None where it counts nothing so.

    Models write `histc`, `bincount` (which capture made a sum of ones), or the sum of a one-hot tensor.
    """
    if counts.op != "call_function" or counts.meta["val"].shape != (experts,):
        return None
    call, args = call_of(counts), counts.args
    if counts.target is aten.histc.default:
        return args[0] if call.get("min", 0) == 0 and call.get("max", 0) in (experts - 1, experts) else None
    if counts.target in (aten.scatter_add.default, aten.index_add.default) and len(args) == 4:
        ones = _number(args[0]) == 0 and _number(args[3]) == 1 and call.get("alpha", 1) == 1
        return args[2] if ones else None
    if counts.target is aten.sum.dim_IntList:
        rank = len(call.operands[0].shape)
        all_but_last = sorted(d % rank for d in call.get("dim") or ()) == list(range(rank - 1))
        return _one_hot_entries(past(args[0], CASTS), experts) if all_but_last else None
    return None


def whole_numbers(node: Any) -> fx.Node:
    """The tensor of whole numbers that a node is a cast or view of."""
    while node.op == "call_function" and node.target in SAME_ENTRIES and not _is_float(node.args[0]):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def _one_hot_entries(node: fx.Node, experts: int) -> Any:
    """The tensor that a node is the one-hot encoding of, with classes below `experts` in a last dim of their own."""
    if node.target is not aten.eq.Tensor:
        return None
    sides: list[Any] = list(node.args)
    counting = [k for k, side in enumerate(sides) if side.meta["val"].dim() == 1 and counts_up(side, experts)]
    beside = sides[1 - counting[0]] if len(counting) == 1 else None
    return beside if beside is not None and beside.meta["val"].shape[-1] == 1 else None


def _number(node: Any) -> Any:
    """The number that all entries of a tensor are; None where that is not known."""
    node = past(node, {aten.expand.default, *SAME_ENTRIES})
    return node.args[1] if node.target is aten.full.default else None


def past(node: Any, targets: Any) -> fx.Node:
    """The first node, back along first operands, that is no call of `targets`."""
    while node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def counts_up(node: fx.Node, size: int) -> bool:
    """Whether a node is 0, 1, ... up to `size` - 1."""
    call = call_of(node) if node.op == "call_function" else None
    if call is None or "arange" not in str(node.target):
        return False
    return (call.get("start", 0), call.get("end"), call.get("step", 1)) == (0, size, 1)
