"""A plan's items with its tensors numbered: who writes and reads what, how large it is, and what each op costs.

A *slot* is one tensor on one rank in one layout: the result of an op, what a move brings, or what lies there from the
start. Ops of one site cost the same and have results of one size, so both are worked out once per site.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import fx

from costmodel.compute import op_s
from costmodel.layout import Layout, Partial, Replicate, local_shape
from passes.analysis.dims import Value
from passes.analysis.fusion import Fused
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import Option, StoredOption
from passes.play.itinerary import itinerary, returned
from passes.price.conversion import given_state
from passes.price.per_rank import local_work
from passes.rules.matmul import PRODUCTS
from passes.rules.work import INLINED, VIEWS
from passes.space.space import Space

Fusing = Literal["view", "pointwise", "reduction", "kernel"]
"""How an op treats memory: names a buffer anew, fuses with its readers, fuses what it reads, or neither."""

_ATTENTION = ("attention", "attention_backward")


@dataclass(frozen=True, slots=True)
class OpCost:
    """What every op of a site takes on one rank."""

    seconds: float
    kind: Literal["matmul", "attention", "other"]
    fusing: Fusing
    result_bytes: tuple[int, ...]
    operands: float = 0.0
    """Elements that a matrix product reads."""
    launches: float = 0.0
    """Kernels that are started: a share of one where several ops are one kernel."""


Costs = dict[tuple[int, int], OpCost]
"""By site and the number of its option."""


@dataclass(slots=True)
class Slot:
    """One tensor on one rank; `producer` is the item that makes it, -1 for what exists from the start. `gathered`: a
    stored parameter, gathered whole. `era`: the phase that it is made for, "" for both."""

    node: fx.Node
    bytes: int
    producer: int
    era: str
    gathered: bool = False
    stored: bool = False


@dataclass(frozen=True)
class Tracks:
    """Items in program order; `reads[i]` and `writes[i]` are the slots of item i."""

    items: tuple[Run | Move, ...]
    slots: tuple[Slot, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    costs: dict[int, OpCost]
    leaving: tuple[tuple[int, str, bool], ...]
    """What the step gives: slot, phase, and whether it is a parameter's gradient."""

    def treats(self, index: int, compiled: Fused) -> Fusing:
        """How an item uses memory. Ops that are not compiled read all operands and write all results; only views do
        not."""
        item = self.items[index]
        if isinstance(item, Move):
            return "kernel"
        fusing = self.costs[item.site].fusing
        runs = compiled if isinstance(compiled, bool) else compiled(item.node)
        return fusing if runs or fusing == "view" else "kernel"

    def fused_again(self, compiled: Fused) -> frozenset[int]:
        """Items that compute a pointwise op again inside the ops that read it, whose cost they are part of."""
        found = set()
        written = [False] * len(self.slots)
        for index in range(len(self.items) - 1, -1, -1):
            item, fusing = self.items[index], self.treats(index, compiled)
            made = any(written[slot] for slot in self.writes[index])
            if fusing == "kernel" or (fusing == "view" and made):
                for slot in self.reads[index]:
                    written[slot] = True
            elif isinstance(item, Run) and item.again and fusing == "pointwise" and not made:
                found.add(index)
        return frozenset(found)

    @cached_property
    def multiplied(self) -> frozenset[int]:
        """Slots that backward reads only as operands of matrix products, possibly through views."""
        late, alone = [False] * len(self.slots), [True] * len(self.slots)
        for slot, _, _ in self.leaving:
            alone[slot] = False
        for index in range(len(self.items) - 1, -1, -1):
            item, made = self.items[index], self.writes[index]
            named = not item.steps if isinstance(item, Move) else self.costs[item.site].fusing == "view"
            product = isinstance(item, Run) and item.node.target in PRODUCTS
            for slot in self.reads[index]:
                if named:
                    late[slot] |= any(late[each] for each in made)
                    alone[slot] &= all(alone[each] for each in made)
                elif item.phase == "backward":
                    late[slot] = True
                    alone[slot] &= product
        return frozenset(slot for slot, read in enumerate(late) if read and alone[slot])


def tracks(space: Space, assignment: Sequence[int], known: Costs | None = None) -> Tracks:
    """Number the tensors of the plan that gives site i option `assignment[i]`.

    known: of the same sites, from plans that compute other ops again; what is found is added.
    """
    made, known = _Slots(space, assignment), {} if known is None else known
    operands_of = space.analysis.flow.operands
    reads: list[tuple[int, ...]] = []
    writes: list[tuple[int, ...]] = []
    costs: dict[int, OpCost] = {}
    items = tuple(itinerary(space, assignment))
    for index, item in enumerate(items):
        if isinstance(item, Move):
            reads.append((made.find(item.value, item.era, item.source),))
            writes.append((made.by_move(item, index),))
            continue
        cost = costs.get(item.site)
        if cost is None:
            key = (item.site, assignment[item.site])
            cost = known.get(key)
            if cost is None:
                cost = known[key] = op_cost(space, item.site, item.option)
            costs[item.site] = cost
        operands = zip(operands_of[item.node], item.option.operands, strict=True)
        reads.append(tuple(made.find(node, item.phase, where) for node, where in operands))
        writes.append(made.by_op(item, cost.result_bytes, index))
    source = space.analysis.flow.source
    leaving = tuple(
        (made.find(source.get(out.node, out.node), out.phase, out.target), out.phase, out.stores)
        for out in returned(space, assignment)
    )
    return Tracks(items, tuple(made.slots), tuple(reads), tuple(writes), costs, leaving)


class _Slots:
    """Slots, numbered as they are made."""

    def __init__(self, space: Space, assignment: Sequence[int]) -> None:
        self.slots: list[Slot] = []
        self._space, self._assignment, self._flow = space, assignment, space.analysis.flow
        self._at: dict[fx.Node, list[tuple[str, Layout | StoredOption, int]]] = defaultdict(list)
        """Of a node, its slots as they were made: for which phase, how they lie, and their numbers."""
        self._bytes: dict[tuple[Value, Layout | StoredOption], int] = {}

    def by_move(self, move: Move, index: int) -> int:
        """What a move brings."""
        value = self._flow.value[move.value]
        made = self._new(move.value, move.era, move.target, self._bytes_of(value, move.target), index)
        self.slots[made].gathered = self._space.sites[value.op].kind == "stored" and move.reader is not None
        return made

    def by_op(self, run: Run, sizes: Sequence[int], index: int) -> tuple[int, ...]:
        """What an op gives, as far as something reads it."""
        results = run.option.results
        if not (len(sizes) > 1 or isinstance(run.node.meta["val"], list | tuple)):
            return tuple(self._new(run.node, run.era, results[0], size, index) for size in sizes)
        picked = ((self._flow.picked.get((run.node, number)), number) for number in range(len(sizes)))
        return tuple(
            self._new(node, run.era, results[number], sizes[number], index)
            for node, number in picked
            if node is not None
        )

    def find(self, node: fx.Node, era: str, where: Layout | StoredOption) -> int:
        """A node's slot that lies so: one made for the phase, else one for all; or what is there from the start."""
        found = None
        for made_for, made, number in reversed(self._at[node]):  # few: a comparison of each is less than a hash
            if made == where:
                if made_for == era:
                    return number
                if found is None and not made_for:
                    found = number
        return self._given(node, where) if found is None else found

    def _given(self, node: fx.Node, where: Layout | StoredOption) -> int:
        value = self._flow.value[node]
        site = self._space.sites[value.op]
        assert site.kind != "op", f"{node.name}: read as {where} before it is there"
        given = given_state(site.options[self._assignment[value.op]], 0)
        assert where == given, f"{node.name}: not at {where}"
        number = self._new(node, "", where, self._bytes_of(value, where), -1)
        self.slots[number].stored = True
        return number

    def _new(self, node: fx.Node, era: str, where: Layout | StoredOption, size: int, producer: int) -> int:
        self._at[node].append((era, where, len(self.slots)))
        self.slots.append(Slot(node, size, producer, era))
        return len(self.slots) - 1

    def _bytes_of(self, value: Value, where: Layout | StoredOption) -> int:
        key = (value, where)
        if key not in self._bytes:
            self._bytes[key] = part_bytes(self._space, value, where)
        return self._bytes[key]


def kept_bytes(space: Space, laid: Tracks, slot: int) -> int:
    """Bytes of a slot that is kept for backward. With fp8 products, what these alone read takes one byte per
    element."""
    made = laid.slots[slot]
    if not space.fp8:
        return made.bytes
    itemsize = space.itemsize_of(space.analysis.flow.value[made.node])
    in_fp8 = itemsize == 2 and not made.gathered and slot in laid.multiplied
    return made.bytes // itemsize if in_fp8 else made.bytes


def part_bytes(space: Space, value: Value, where: Layout | StoredOption) -> int:
    """Size of one rank's part of a value."""
    sizes = space.topology.sizes
    if isinstance(where, StoredOption):
        itemsize = where.dtypes.stored.itemsize if where.dtypes is not None else space.itemsize_of(value)
        return math.prod(where.storage.padded_shape(sizes)) * itemsize
    plain = tuple(Replicate() if isinstance(p, Partial) else p for p in where)
    return math.prod(local_shape(space.shape_of(value), plain, sizes)) * space.itemsize_of(value)


def op_cost(space: Space, site_index: int, option: Option) -> OpCost:
    """Cost of an op of a site under `option`, on one rank."""
    site = space.sites[site_index]
    call = site.call
    assert call is not None
    work, results = local_work(site, option, space.topology.sizes)
    seconds = op_s(work, space.topology.device)
    kind: Literal["matmul", "attention", "other"] = "other"
    if work.kind == "matmul":
        kind = "matmul"
    elif work.kind in _ATTENTION:
        kind = "attention"
    sizes = tuple(
        math.prod(shape) * facts.dtype.itemsize if facts is not None else 0
        for shape, facts in zip(results, call.results, strict=True)
    )
    fusing: Fusing = "kernel"
    if call.target in VIEWS:
        fusing = "view"
    elif torch.Tag.pointwise in getattr(call.target, "tags", ()) or call.target in INLINED or not call.operands:
        fusing = "pointwise"
    elif work.kind == "reduction":
        fusing = "reduction"
    read = work.batch * (work.m * work.k + work.k * work.n) if call.target in PRODUCTS else 0.0
    return OpCost(seconds, kind, fusing, sizes, read, 0.0 if work.kind == "view" else work.launches)
