"""Collectives of activations that go in parts beside products, where `Space.async_tp` asks for it.

torch's micro-pipelined tensor parallelism cuts a product in as many parts as the axis has ranks, n. Of a product of m
seconds and a collective of c:

    all_gather -> products      each part is multiplied when it has come, a rank's own first:
                                the products end at max(start + m, gathered + m / n)
    product -> reduce_scatter   each part is sent when it is made:
                                all is there at max(first part made + c, last part made + c / n), then it is added

Copies between ranks that share memory take none of the SMs. Parts are slower products: each has 1 / n of the rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch

from costmodel.compute import matmul, op_s, pointwise
from costmodel.reshard import Step
from passes.analysis.moves import Move, Run
from passes.play.tracks import Tracks
from passes.price.per_rank import local_work
from passes.rules.view import RESHAPES
from passes.space.space import Space

aten = torch.ops.aten
_ROWS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}
"""The operand of a product that is cut."""


@dataclass(frozen=True)
class ByParts:
    """By item: products take `products_s`, and do not wait for the last `early_s` of the slot of what they multiply;
    reduce-scatters start `sent_early_s` before their products end, and `added_s` is what the sum of their parts takes.
    """

    products_s: Mapping[int, float] = field(default_factory=dict)
    early_s: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    sent_early_s: Mapping[int, float] = field(default_factory=dict)
    added_s: Mapping[int, float] = field(default_factory=dict)
    gathers: frozenset[int] = frozenset()


def by_parts(space: Space, found: Tracks) -> ByParts:
    """What goes in parts."""
    if not space.async_tp:
        return ByParts()
    readers: dict[int, list[int]] = defaultdict(list)
    for index, slots in enumerate(found.reads):
        for slot in dict.fromkeys(slots):
            readers[slot].append(index)
    products_s: dict[int, float] = {}
    early_s: dict[int, tuple[int, float]] = {}
    sent_early_s: dict[int, float] = {}
    added_s: dict[int, float] = {}
    gathers: set[int] = set()
    leaving = {slot for slot, _, _ in found.leaving}
    for index, item in enumerate(found.items):
        step = _step_of(space, item)
        if step is None:
            continue
        parts = space.topology.sizes[step.axes[0]]
        if step.kind == "all_gather":
            (slot,) = found.writes[index]
            fed = _fed(found, readers, slot)
            left_s = 0.0
            for product, read in reversed(fed):
                products_s[product] = _in_parts_s(space, found, product, parts)
                left_s += products_s[product]
                early_s[product] = read, left_s * (1 - 1 / parts)
            if fed:
                gathers.add(index)
        else:
            (slot,) = found.reads[index]
            maker = _maker(found, readers, slot, leaving)
            if maker is not None:
                products_s[maker] = _in_parts_s(space, found, maker, parts)
                sent_early_s[index] = products_s[maker] * (1 - 1 / parts)
                added_s[index] = op_s(pointwise(step.full_bytes, step.full_bytes / parts), space.topology.device)
    return ByParts(products_s, early_s, sent_early_s, added_s, frozenset(gathers))


def _step_of(space: Space, item: Run | Move) -> Step | None:
    """The one step of an activation's move that can go in parts: over an axis inside a node that splits no batch."""
    if not isinstance(item, Move) or item.bucket >= 0 or item.stores or len(item.steps) != 1:
        return None
    (step,) = item.steps
    if step.kind not in ("all_gather", "reduce_scatter") or len(step.axes) != 1 or step.ranks == 1:
        return None
    (axis,) = step.axes
    return None if axis in space.batch_axes or space.topology.axes[axis].crosses_nodes else step


def _fed(found: Tracks, readers: Mapping[int, Sequence[int]], slot: int) -> list[tuple[int, int]]:
    """The products whose rows are a slot's, as it is or reshaped, in program order: item, and the slot it reads."""
    fed: list[tuple[int, int]] = []
    todo = [slot]
    while todo:
        here = todo.pop()
        for index in readers[here]:
            item = found.items[index]
            if not isinstance(item, Run):
                continue
            if item.node.target in RESHAPES:
                todo += found.writes[index]
            elif _rows_of(found, index) == here:
                fed.append((index, here))
    return sorted(fed)


def _maker(found: Tracks, readers: Mapping[int, Sequence[int]], slot: int, leaving: set[int]) -> int | None:
    """The product that made a slot, which then was reshaped at most and that nothing else reads; None: no product."""
    while True:
        index = found.slots[slot].producer
        if index < 0 or len(readers[slot]) != 1 or slot in leaving:
            return None
        item = found.items[index]
        if not isinstance(item, Run):
            return None
        if item.node.target in RESHAPES:
            (slot,) = found.reads[index]
            continue
        return index if _rows_of(found, index) is not None else None


def _rows_of(found: Tracks, index: int) -> int | None:
    """The slot of the operand that a product's rows are; None for what is no product."""
    item = found.items[index]
    if not isinstance(item, Run) or item.node.target not in _ROWS:
        return None
    return found.reads[index][_ROWS[item.node.target]]


def _in_parts_s(space: Space, found: Tracks, index: int, parts: int) -> float:
    """Seconds of a product in `parts` of its rows, one after the other."""
    item = found.items[index]
    assert isinstance(item, Run)
    work, _ = local_work(space.sites[item.site], item.option, space.topology.sizes)
    item_bytes = round(work.bytes_written / (work.batch * work.m * work.n))
    part = matmul(ceil(work.m / parts), work.n, work.k, batch=work.batch, dtype=work.dtype, item_bytes=item_bytes)
    return parts * op_s(part, space.topology.device)
