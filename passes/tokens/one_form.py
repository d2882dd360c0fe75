"""`one_form`: products of routed experts, whichever op the model used, as `routed_mm` and `routed_mm_weight`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.program.adder import AdderBefore, adder_before
from passes.program.graphs import drop_unread
from passes.program.program import Program
from passes.program.routed_ops import ROUTED_MM, ROUTED_MM_WEIGHT
from passes.rules.call import operand_nodes

aten = torch.ops.aten

_FALLBACK = "transformers.grouped_mm_fallback.default"
_FALLBACK_BACKWARD = "transformers.grouped_mm_fallback_backward.default"


def one_form(program: Program) -> Program:
    """The program with every grouped product as `routed_mm` and `routed_mm_weight`, of one block."""
    graph = program.graph.graph
    bounds: dict[fx.Node, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        made = _product(node, bounds)
        if made is None:
            continue
        changed = True
        if isinstance(made, tuple):
            for user in list(node.users):
                which: Any = user.args[1]
                user.replace_all_uses_with(made[which])
        else:
            node.replace_all_uses_with(made)
    if changed:
        drop_unread(graph)
        program.graph.recompile()
    return program


def _product(node: fx.Node, bounds: dict[fx.Node, fx.Node]) -> fx.Node | tuple[fx.Node, fx.Node] | None:
    """What stands for a grouped product: one node, or one per result; None for anything else."""
    name = str(node.target)
    if name not in (_FALLBACK, _FALLBACK_BACKWARD) and node.target is not aten._grouped_mm.default:
        return None
    operands = operand_nodes(node)
    if node.target is aten._grouped_mm.default and len(operands) != 3:  # without groups, or with a bias
        return None
    ranks = [operand.meta["val"].dim() for operand in operands]
    add = adder_before(node)
    if ranks[:2] == [2, 3]:
        cuts = _bounds(operands[2], bounds)
        if name != _FALLBACK_BACKWARD:
            return add(ROUTED_MM, operands[0], operands[1], cuts)
        rows, matrices, _, gradient = operands
        back = add(ROUTED_MM, gradient, add(aten.transpose.int, matrices, -2, -1), cuts)
        return back, add(ROUTED_MM_WEIGHT, rows, gradient, cuts)
    if ranks[:2] == [2, 2]:
        return add(ROUTED_MM_WEIGHT, _transposed(operands[0], add), operands[1], _bounds(operands[2], bounds))
    if ranks[:2] == [3, 2]:
        matrices = add(aten.transpose.int, operands[0], -2, -1)
        made = add(ROUTED_MM, _transposed(operands[1], add), matrices, _bounds(operands[2], bounds))
        return add(aten.t.default, made)
    return None


def _transposed(x: fx.Node, add: AdderBefore) -> fx.Node:
    """A matrix transposed; what it is the transpose of, where it is one."""
    turned = x.target is aten.t.default or (x.target is aten.transpose.int and x.args[1] != x.args[2])
    return x.args[0] if turned else add(aten.t.default, x)  # type: ignore[return-value]


def _bounds(ends: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """Where each expert's rows begin and end, beside where they end."""
    if ends not in known:
        add = adder_before(ends.next, ends)
        whole = ends if ends.meta["val"].dtype == torch.int32 else add(aten._to_copy.default, ends, dtype=torch.int32)
        row = add(aten.view.default, whole, [1, ends.meta["val"].shape[0]])
        known[ends] = add(aten.constant_pad_nd.default, row, [1, 0], 0)
    return known[ends]
