"""Costs of a deep model from a few shallow ones: everything a schedule tells, as numbers that are linear in depth.

    sample(space, assignment, schedule, laid)   numbers of one depth, by name
    Profile                                 numbers of the whole model, and of what no repeated layer is part of

The peak of memory is not linear in depth, but the bytes alive at a given place of the step are: each place is a number
of its own, and the peak is their largest (`candidate_memory.sharded_peak_bytes`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.fusion import Fused
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption
from passes.play.schedule import Schedule
from passes.play.tracks import Tracks, kept_bytes
from passes.program.program import Program
from passes.program.walks import following
from passes.rules.work import INLINED, VIEWS
from passes.runs.expert_parallel import expert_numbers
from passes.space.space import Space, trained_elements
from passes.space.words import Words

PLACES = ("forward", "last layers", "first layers", "end", "update")
"""Where memory may peak: until backward reaches a repeated layer; in the last one or two; in the first two; after; as
the optimizer updates."""


@dataclass(frozen=True)
class Profile:
    """One micro-batch on one rank, at full depth; seconds, bytes and counts by name (`NAMES`)."""

    layers: int
    whole: Mapping[str, float]
    outside: Mapping[str, float]

    def layer(self, name: str) -> float:
        """Average over the repeated layers."""
        return (self.whole.get(name, 0.0) - self.outside.get(name, 0.0)) / self.layers if self.layers else 0.0

    def total(self, prefix: str) -> float:
        """Sum over the names that begin with `prefix`."""
        return sum(max(0.0, value) for name, value in self.whole.items() if name.startswith(prefix))

    def layer_total(self, prefix: str) -> float:
        """The same, of one layer."""
        return sum(self.layer(name) for name in self.whole if name.startswith(prefix))

    @property
    def saved_bytes(self) -> float:
        """Activations that one layer keeps for backward."""
        return self.layer("alive.forward") - self.layer("rest")


def profile(samples: Sequence[Mapping[str, float]], weights: Sequence[float], outside: Sequence[float],
            layers: int) -> Profile:  # fmt: skip
    """The whole as weighted sums of `samples`; see `autopar.runs.shallow`."""
    names = {name for sample_ in samples for name in sample_}

    def combined(shares: Sequence[float]) -> dict[str, float]:
        return {name: sum(w * s.get(name, 0.0) for w, s in zip(shares, samples, strict=True)) for name in names}

    return Profile(layers, combined(weights), combined(outside))


def sample(
    space: Space, assignment: Sequence[int], schedule: Schedule, laid: Tracks, compiled: Fused = True
) -> dict[str, float]:
    """The numbers of one plan, played as `compiled`, of one micro-batch but for `optimizer_s` and what is alive.

    seconds     micro_s, forward_s, optimizer_s, added_s, slowed_s; compute.PHASE.KIND (PHASE "again": forward ops that
                run again in backward; "within": those that do so within their readers, where they take no time of
                their own); windowed.PHASE (of attention, where it sees a window);
                exposed.ROLE.PHASE.GROUP, hidden.ROLE.PHASE.GROUP
    bytes       alive.PLACE, bare.PLACE (the same but for parameters' gradients, where buffers were kept), rest (all
                step long), states (of it, what the optimizer keeps), gradients (of what it updates), boundary (what one
                layer passes to the next), keys (attention's keys and values, before they are repeated for groups of
                heads), gathered (activations that forward gathers and keeps whole for backward), spared (of those,
                where a rank keeps its own part alone)
    counts      kernels (that the host launches), elements (of parameters on this rank in compute; `bytes`: theirs;
                `tied`: those of parameters that are in several modules; `trained elements`, `trained tied`: of those
                that have gradients), stored (at rest; `stored bytes`: theirs), operands (of matrix products)
    experts     see `expert_numbers`
    """
    found: dict[str, float] = defaultdict(float)
    words = Words(space)
    found["micro_s"], found["forward_s"] = schedule.micro_batch_s, schedule.forward_s
    found["optimizer_s"], found["slowed_s"] = schedule.optimizer_s, schedule.contention_s
    found["added_s"], found["kernels"] = schedule.added_s, schedule.kernels
    within = laid.fused_again(compiled)
    for index, item in enumerate(laid.items):
        if isinstance(item, Run):
            cost = laid.costs[item.site]
            phase = "within" if index in within else "again" if item.again else item.phase
            found[f"compute.{phase}.{cost.kind}"] += cost.seconds
            if cost.kind == "attention" and _sees_a_window(space, item):
                found[f"windowed.{phase}"] += cost.seconds
            if cost.kind == "attention" and phase == "forward":
                found["keys"] += sum(_unrepeated_bytes(laid, slot) for slot in laid.reads[index][1:3])
    for each in schedule.collectives:
        end = f"{each.role}.{each.phase}.{each.group}"
        found[f"exposed.{end}"] += each.exposed_s
        found[f"hidden.{end}"] += each.hidden_s
    _alive(found, schedule)
    found["gradients"] = sum(size * count for size, count in trained_elements(space, assignment).items())
    _counts(found, space, assignment)
    found["operands"] = sum(cost.operands * space.sites[site].count for site, cost in laid.costs.items())
    _between(found, space, words, laid)
    gathered = _gathered(found, space, laid)
    return {**found, **expert_numbers(space, assignment, laid, schedule, gathered)}


def _sees_a_window(space: Space, item: Run) -> bool:
    """Whether an attention goes through fewer blocks than a causal one."""
    call = space.sites[item.site].call
    return call is not None and call.seen is not None


def _unrepeated_bytes(laid: Tracks, slot: int) -> int:
    """Of keys or values, as few as views and copies made them of."""
    least = laid.slots[slot].bytes
    while (made := laid.slots[slot].producer) >= 0:
        item = laid.items[made]
        if not isinstance(item, Run) or not (item.node.target in VIEWS or item.node.target in INLINED):
            break
        (slot,) = laid.reads[made]
        least = min(least, laid.slots[slot].bytes)
    return least


_ALWAYS = ("parameters", "buffers", "inputs", "optimizer")
"""Kinds of memory that are there all step long."""


def _alive(found: dict[str, float], schedule: Schedule) -> None:
    found["rest"] = sum(schedule.memory.by_kind.get(kind, 0) for kind in _ALWAYS)
    found["states"] = schedule.memory.by_kind.get("optimizer", 0)
    backward = [start for phase, layer, start in schedule.layers if phase == "backward" and layer]
    entered = _entered(schedule)
    update = schedule.micro_batch_s
    moments = []
    for name, timeline in (("alive", schedule.memory.timeline), ("bare", schedule.memory.bare)):
        moments += [(name, moment, alive) for moment, alive in timeline if moment < update]
        found[f"{name}.update"] = timeline[-1][1] if timeline else 0
    if len(entered) < 3:  # too few layers to tell places apart
        for name, _, alive in moments:
            for place in PLACES[:2]:
                found[f"{name}.{place}"] = max(found[f"{name}.{place}"], alive)
        return
    after = [s for phase, layer, s in schedule.layers if phase == "backward" and not layer and s > backward[-1]]
    end, first = min(after, default=math.inf), entered[-2]
    # As many layers whatever the depth; between the ends memory changes by as much from layer to layer.
    last_end = entered[1 if len(entered) <= 4 else 2]
    for name, moment, alive in moments:
        if moment < entered[0]:
            place = PLACES[0]
        elif moment >= end:
            place = PLACES[3]
        elif moment >= first:
            place = PLACES[2]
        elif moment < last_end:
            place = PLACES[1]
        else:
            continue
        found[f"{name}.{place}"] = max(found[f"{name}.{place}"], alive)


def _entered(schedule: Schedule) -> list[float]:
    """When backward first enters each repeated layer, from the last one to the first.

    What backward computes again of all layers may come before the loss, in forward's order (scales made of weights):
    that is no backward of theirs. Nor is what one layer makes for those behind it (a table that all of them read).
    """
    order = [layer for phase, layer, _ in schedule.layers if phase == "forward" and layer]
    visits = [
        (layer, start)
        for i, (phase, layer, start) in enumerate(schedule.layers)
        if phase == "backward" and layer and (i == 0 or schedule.layers[i - 1][1] != layer)
    ]
    if visits and order and visits[0][0] != order[-1]:
        last = [i for i, (layer, _) in enumerate(visits) if layer == order[-1]]
        visits = visits[last[0] + 1 if len(last) > 1 else 0 :]
    entered: list[float] = []
    for layer in reversed(dict.fromkeys(order)):
        after = [start for visited, start in visits if visited == layer and (not entered or start > entered[-1])]
        entered += after[:1]
    return entered


def _counts(found: dict[str, float], space: Space, assignment: Sequence[int]) -> None:
    sizes = space.topology.sizes
    tied = set(space.program.aliases.values())
    for index, site in enumerate(space.sites):
        option, parameter = site.options[assignment[index]], site.parameter
        if not isinstance(option, StoredOption) or site.kind not in ("stored", "given"):
            continue
        if parameter is not None:
            computed = math.prod(option.storage.computed_shape(sizes)) * site.count
            for of in ("", "trained ") if parameter.requires_grad else ("",):
                found[f"{of}elements"] += computed
                found[f"{of}tied"] += computed * (parameter.name in tied)
            found["bytes"] += computed * site.itemsize
            stored = math.prod(option.storage.padded_shape(sizes)) * site.count
            found["stored"] += stored
            found["stored bytes"] += stored * site.stored_itemsize


def _between(found: dict[str, float], space: Space, words: Words, laid: Tracks) -> None:
    """Bytes of activations that repeated layers read from the layer before them.

    Tables that no parameter goes into (rotary angles, masks, constants) are none: every stage makes its own.
    """
    seen: set[tuple[str, int]] = set()
    of_parameters = _of_parameters(space.program)
    for index, item in enumerate(laid.items):
        if not isinstance(item, Run) or item.phase != "forward":
            continue
        here = words.layer(item.node.meta.get("module", ""))
        if not here:
            continue
        for slot in laid.reads[index]:
            made = laid.slots[slot]
            if made.producer < 0 or made.gathered or made.node not in of_parameters or (here, slot) in seen:
                continue
            seen.add((here, slot))
            other = words.layer(made.node.meta.get("module", ""))
            if other and other != here:
                found["boundary"] += made.bytes


def _of_parameters(program: Program) -> set[fx.Node]:
    """Nodes that follow from a parameter."""
    return following(program.graph.graph, program.placeholders_of("parameter"))


def _gathered(found: dict[str, float], space: Space, laid: Tracks) -> dict[str, float]:
    """Bytes of activations that forward gathers and backward reads as they are, and what keeping a rank's own part of
    them alone spares; gives the former by the module that they are gathered for."""
    by_module: dict[str, float] = defaultdict(float)
    items = tuple(zip(laid.items, laid.reads, laid.writes, strict=True))
    late = {slot for item, read, _ in items if item.phase == "backward" for slot in read}
    for item, read, made in items:
        if not isinstance(item, Move) or item.phase == "backward" or made[0] not in late:
            continue
        if not laid.slots[made[0]].gathered and any(step.kind == "all_gather" for step in item.steps):
            whole = laid.slots[made[0]].bytes
            found["gathered"] += whole
            by_module[item.place.meta.get("module", "")] += whole
            part = laid.slots[read[0]].bytes / whole if whole else 0.0
            found["spared"] += kept_bytes(space, laid, made[0]) * (1 - part)
    return by_module
