"""What forward values stay in memory for backward, and what is computed again there: a decision per site.

    mode        computed again, where that leaves fewer bytes to keep
    none        views, constants, and what is made of parameters by casts and views
    pointwise   also pointwise ops and copies, which Inductor fuses with what reads them
    selective   also the attention core and its softmax
    widening    pointwise ops, softmax, and products inside a repeated block that give more than they read: what spreads
                into an FFN or experts, scores of attention, heads from a latent
    full        also everything inside a repeated block, so that little but the blocks' inputs is kept

What one block hands to the next in forward is never computed again: it would take a chain through all blocks, whose
links would be there at once, as backward asks for the last first.

The choice is a minimum cut over the values of one batch, whole tensors, alike layers as one. It depends on the graph
alone, not on the mesh, so one decision holds for prices, schedule and emitted program: `itinerary` runs the sites of
`again` once more in backward. What a collective of forward brought is kept as it came, unless a plan gathers
activations again (`regather`); parameters are gathered for each phase, unless a plan keeps them gathered.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import fx

from passes.analysis.analysis import Analysis, OpenSite
from passes.analysis.dims import Value, is_getitem
from passes.program.routed_ops import ROUTED_MM
from passes.program.uniform import UNIFORM
from passes.rules.call import Call
from passes.rules.work import is_view_op
from passes.space.cut import UNBOUNDED, Values, cheapest_cut, reached

aten = torch.ops.aten

Mode = Literal["none", "pointwise", "selective", "widening", "full"]
"""From the least computed again to the most."""

COPIES = {
    aten._to_copy.default,
    aten.clone.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.split_with_sizes.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.full_like.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.empty.memory_format,
    aten.scalar_tensor.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.tril.default,
    aten.triu.default,
    aten.repeat.default,
    aten.flip.default,
}
"""Ops that are not pointwise and cost no more than reading what they read."""
ATTENTION = {
    aten.bmm.default,
    aten.baddbmm.default,
    aten._softmax.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
_LEFT_OPERAND = {
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.bmm.default: 0,
    aten.baddbmm.default: 1,
    ROUTED_MM: 0,
}
"""Products, and which operand is their left side."""


@dataclass(frozen=True)
class Recomputation:
    """What `mode` makes of one graph: forward values that are kept, and forward sites that run again in backward.

    `reshard`: parameters gathered for forward are freed there and gathered again for backward, as FSDP2 does by
    default; else they stay from their forward gather to their last reader in backward (ZeRO-2's time, more memory).
    `regather`: activations that forward gathered are freed there and gathered again for backward, so that a rank keeps
    its part of them alone (arXiv 2205.05198, section 4.2.2); else they stay.
    `postpone`: weight gradients wait until something is sent (`passes/play/postpone.py`): less time, more memory.
    """

    mode: Mode
    held: frozenset[Value]
    again: frozenset[int]
    reshard: bool = True
    regather: bool = False
    postpone: bool = True


def is_cheap_op(target: object) -> bool:
    """Whether an op costs about what reading its operands costs."""
    if target is operator.getitem or target is UNIFORM or target in COPIES or is_view_op(target):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def block_of(node: fx.Node) -> str:
    """The outermost repeated module (`model.layers.3`) that ran the op, or ""."""
    parts = str(node.meta.get("module", "")).split(".")
    for end, part in enumerate(parts, 1):
        if part.isdigit():
            return ".".join(parts[:end])
    return ""


def recomputation(analysis: Analysis, mode: Mode, also: frozenset[int] = frozenset()) -> Recomputation:
    """What forward keeps for backward under `mode`, and which forward sites run again there.

    `also`: sites that may run again beside those that the mode allows.
    """
    network = _Network(analysis, mode, also)
    kept = cheapest_cut(network.values, network.demands)
    found = reached(network.values, network.demands, kept)
    name = network.names
    again = frozenset(name[index].op for index in found - kept)
    return Recomputation(mode, frozenset(name[index] for index in kept), again)


class _Network:
    """The forward values as numbers: what keeping each takes, and what it can be computed again from."""

    def __init__(self, analysis: Analysis, mode: Mode, also: frozenset[int] = frozenset()) -> None:
        places = analysis.places
        forward = [i for i, place in enumerate(places) if place.kind == "op" and place.phase == "forward"]
        self.names = [
            Value(i, result)
            for i in forward
            for result, facts in enumerate(places[i].call.results)  # type: ignore[union-attr]
            if facts is not None
        ]
        number = {value: index for index, value in enumerate(self.names)}
        sources: dict[int, list[int]] = defaultdict(list)
        asked: dict[int, None] = {}
        for wire in analysis.wires:
            if wire.value not in number:
                continue
            for port in wire.ports:
                if port.phase == "backward":
                    asked[number[wire.value]] = None
                else:
                    sources[port.site].append(number[wire.value])
        self.demands = tuple(asked)
        of_weights = _of_weights(analysis)
        allowed = _allowed(analysis, mode) | of_weights | also
        sizes, origins = [], []
        for value in self.names:
            place = places[value.op]
            size = prod(analysis.shape_of(value)) * analysis.itemsize_of(value) * place.count
            free = value.op in of_weights or is_view_op(place.call.target)  # type: ignore[union-attr]
            # One byte more, so that values of no size count too.
            sizes.append(UNBOUNDED if free else size + 1)
            origins.append(sources[value.op] if value.op in allowed else None)
        self.values = Values(sizes, origins)


def _of_weights(analysis: Analysis) -> frozenset[int]:
    """Forward sites made of parameters and buffers by cheap ops alone; backward makes them from its own gather."""
    operands: dict[int, set[int]] = defaultdict(set)
    for wire in analysis.wires:
        for port in wire.ports:
            operands[port.site].add(wire.value.op)
    chain = {i for i, place in enumerate(analysis.places) if place.kind == "stored"}
    stored = frozenset(chain)
    for index, place in enumerate(analysis.places):
        cheap = place.kind == "op" and place.phase == "forward" and is_cheap_op(place.call.target)  # type: ignore[union-attr]
        if cheap and operands[index] and operands[index] <= chain:
            chain.add(index)
    return frozenset(chain - stored)


def _allowed(analysis: Analysis, mode: Mode) -> frozenset[int]:
    """Forward sites that may be computed again."""
    inside = _inside_blocks(analysis) if mode != "none" else {}
    found = set()
    for index, place in enumerate(analysis.places):
        if place.kind != "op" or place.phase != "forward":
            continue
        assert place.call is not None
        target = place.call.target
        if is_view_op(target) or not place.call.operands:
            found.add(index)
        elif mode != "none" and inside.get(index, True):
            of_mode = {
                "selective": target in ATTENTION,
                "widening": target is aten._softmax.default or (index in inside and _widens(place.call)),
                "full": index in inside,
            }
            if of_mode.get(mode, False) or is_cheap_op(target):
                found.add(index)
    return frozenset(found)


def _widens(call: Call) -> bool:
    """Whether an op is a product whose result has more entries than its left side, which is the activation where the
    other is a weight.

    To compute it again costs least for what that frees: its operations are its entries times what they are summed over.
    """
    if call.target not in _LEFT_OPERAND or call.results[0] is None:
        return False
    return prod(call.results[0].shape) > prod(call.operands[_LEFT_OPERAND[call.target]].shape)


def _inside_blocks(analysis: Analysis) -> dict[int, bool]:
    """Forward sites in a repeated block; True where only the block itself reads them in forward."""
    found: dict[int, bool] = {}
    for index, place in enumerate(analysis.places):
        if not _is_forward_op(place):
            continue
        nodes = analysis.folding.members[index]
        if all(block_of(node) for node in nodes):
            found[index] = all(_read_inside(node, block_of(node)) for node in nodes)
    return found


def _is_forward_op(place: OpenSite) -> bool:
    return place.kind == "op" and place.phase == "forward"


def _read_inside(node: fx.Node, block: str) -> bool:
    for user in node.users:
        if is_getitem(user):
            if not _read_inside(user, block):
                return False
        elif user.op == "output" or (user.meta.get("phase") != "backward" and block_of(user) != block):
            return False
    return True
