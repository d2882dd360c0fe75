"""A step played on one rank: a compute stream, and a communication stream per mesh axis.

    compute        |  layer 0  |   layer 1   | ... |        backward        | optimizer |
    dp     g0 | g1 |   g2 |                        |  r3 | r2 |     r1 | r0 |

Ops run in the program's order. A collective waits for its axes' streams (all of them, where it runs over several) and
then runs beside compute, as a runtime with asynchronous collectives has it, and beside those of other axes, with which
it shares the links inside nodes or those between them:

    stored parameters are gathered while the layer before computes (never earlier: two layers' worth is in memory)
    gradients are reduced behind backward, and what is done to them then is put off; the optimizer waits for them
    activations are sent as soon as they are there, and their reader waits

Compute that waits is what makes communication *exposed*: each moment of waiting is laid to the collective that runs
then on the way to what is waited for. So `step = compute + slowed + exposed + optimizer`, and a collective's exposed
and hidden seconds add up to its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from costmodel.compute import addition_s
from costmodel.memory import OptimizerSpec
from costmodel.memory import optimizer as optimizer_of
from passes.analysis.fusion import Fused
from passes.analysis.moves import Move
from passes.play.clocks import KINDS, Event, Played
from passes.play.footprint import Footprint, Times, footprint
from passes.play.player import Player
from passes.play.tracks import Tracks, tracks
from passes.price.price import update_s
from passes.space.space import Space, trained
from passes.space.words import Words

Role = Literal["parameter", "gradient", "activation"]
"""What a collective moves."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a micro-batch, or `count` alike ones: then `bytes` is of each, seconds are of all.

    `tensors` go together as one, and `bytes` is of them all; `value` names them, `reason` tells of the first.

    `bytes` is the full buffer on one rank: what is gathered, what is reduced. `start_s` is that of the first.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    seconds: float
    phase: str
    exposed_s: float
    hidden_s: float
    role: Role
    source: str
    module: str
    value: str
    reason: str
    tensors: int = 1
    count: int = 1
    start_s: float = 0.0

    @property
    def group(self) -> str:
        """`dp,tp`."""
        return _group(self.axes)

    @property
    def names(self) -> list[str]:
        """What is moved together in it; a gradient by its parameter's name."""
        return [name.removeprefix("gradient of ") for name in self.value.split(", ")]


@dataclass(frozen=True)
class Schedule:
    """What a step takes; all but `step_time_s` and `optimizer_s` is of one micro-batch, `compute_s` on average."""

    step_time_s: float
    micro_batch_s: float
    optimizer_s: float
    added_s: float
    """What it takes to add a further micro-batch's gradients to those before."""
    accumulate: int
    compute_s: float
    compute_by_kind: Mapping[str, float]
    """Seconds of "matmul", "attention" and "other"."""
    contention_s: float
    """What compute takes longer because collectives keep some of the device busy."""
    exposed_s: Mapping[str, float]
    """Group of axes ("tp", "dp,tp") -> seconds that compute waits for its collectives."""
    hidden_s: Mapping[str, float]
    collectives: tuple[Collective, ...]
    """In the order in which the program issues them."""
    peak_memory_bytes: int
    peak_moment: str
    memory: Footprint
    events: tuple[Event, ...] = ()
    forward_s: float = 0.0
    """Of `micro_batch_s`, until backward begins."""
    kernels: float = 0.0
    """That the host launches, collectives among them."""
    layers: tuple[tuple[str, str, float], ...] = ()
    """(phase, layer, start) whenever compute enters another layer; "" is what no repeated layer is part of."""


def play(
    space: Space,
    assignment: Sequence[int],
    *,
    optimizer: str | OptimizerSpec = "adamw",
    accumulate: int = 1,
    compiled: Fused = True,
    events: bool = False,
    laid: Tracks | None = None,
) -> Schedule:
    """The step of the plan that gives site i option `assignment[i]`: `accumulate` micro-batches and an update.

    `compiled`: chains of pointwise ops are one kernel, all or those of some nodes. `events`: keep the timeline.
    `laid`: `tracks(space, assignment)`, where it is at hand.

    Raises:
        ValueError: an unknown optimizer, or no micro-batch.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; a step has at least 1 micro-batch")
    spec = optimizer_of(optimizer)
    words = Words(space)
    found = tracks(space, assignment) if laid is None else laid
    player = Player(space, words, found, events, compiled)
    player.play()
    optimizer_s, added_s = _optimizer_s(space, assignment, spec), _added_s(space, assignment)
    average_s = added_s * (accumulate - 1) / accumulate
    collectives = _Ledger(player, words).collectives()
    exposed: dict[tuple[str, ...], float] = defaultdict(float)
    hidden: dict[tuple[str, ...], float] = defaultdict(float)
    for each in collectives:
        exposed[each.axes] += each.exposed_s
        hidden[each.axes] += each.hidden_s
    times = Times(player.op_start_s, player.steps_of(), player.forward_end_s, player.now_s, player.passes)
    memory = footprint(
        space, assignment, found, times, words, spec, accumulate=accumulate, fused=compiled, keep_buffers=events
    )
    return Schedule(
        step_time_s=accumulate * (player.now_s + average_s) + optimizer_s,
        micro_batch_s=player.now_s,
        optimizer_s=optimizer_s,
        added_s=added_s,
        accumulate=accumulate,
        compute_s=player.compute_s + average_s,
        compute_by_kind={**player.by_kind, "other": player.by_kind.get("other", 0.0) + average_s},
        contention_s=player.contention_s,
        exposed_s={_group(axes): seconds for axes, seconds in exposed.items()},
        hidden_s={_group(axes): seconds for axes, seconds in hidden.items()},
        collectives=collectives,
        peak_memory_bytes=memory.bytes,
        peak_moment=player.moment_text(memory.moment_s),
        memory=memory,
        events=tuple(player.events),
        forward_s=player.forward_end_s,
        kernels=player.launched + sum(each.count for each in collectives),
        layers=player.layers(),
    )


def _group(axes: Sequence[str]) -> str:
    return ",".join(axes)


def _optimizer_s(space: Space, assignment: Sequence[int], spec: OptimizerSpec) -> float:
    """The update of what a rank stores of each parameter."""
    device = space.topology.device
    return sum(
        site.count * (device.update_s + update_s(shape, site.stored_itemsize, spec, device))
        for site, shape in trained(space, assignment)
    )


def _added_s(space: Space, assignment: Sequence[int]) -> float:
    """The addition of what a rank has of each parameter's gradient, an op each as autograd runs it."""
    device = space.topology.device
    return sum(
        site.count * addition_s(math.prod(shape), site.stored_itemsize, site.stored_itemsize, device)
        for site, shape in trained(space, assignment)
    )


# -- ledger ------------------------------------------------------------------------------------------------------------


class _Ledger:
    """Says every collective that was played."""

    def __init__(self, player: Player, words: Words) -> None:
        self.player = player
        self.words = words
        self.names = [axis.name for axis in player.space.topology.axes]
        self.groups: dict[tuple[int, ...], tuple[str, ...]] = {}
        self.texts: dict[object, tuple[str, str]] = {}

    def collectives(self) -> tuple[Collective, ...]:
        """In program order, alike ones of a move as one; the player keeps their events, where it keeps any."""
        found: list[Collective] = []
        for index, item in enumerate(self.player.tracks.items):
            if not isinstance(item, Move):
                continue
            alike: dict[object, list[Played]] = defaultdict(list)
            for i in self.player.of_item.get(index, ()):
                played = self.player.played[i]
                if played.counts and played.step.is_collective:
                    alike[id(played.step), played.also, played.exposed_s, played.slowed_s].append(played)
            for copies in alike.values():
                one = self._said(item, copies[0], len(copies))
                found.append(one)
                if self.player.keep_events:
                    self.player.events += [event for each in copies for event in _events(one, each)]
        return tuple(found)

    def _said(self, item: Move, played: Played, count: int) -> Collective:
        """What is moved and why, over which axes, and what that takes."""
        step, node = played.step, item.place
        value, reason = self._texts(item, played)
        took_s = step.seconds + played.slowed_s
        exposed_s = min(played.exposed_s, took_s)
        return Collective(
            kind=KINDS.get(step.kind, step.kind),
            axes=self.groups.setdefault(step.axes, tuple(self.names[axis] for axis in step.axes)),
            bytes=step.full_bytes,
            seconds=count * took_s,
            phase=item.phase,
            exposed_s=count * exposed_s,
            hidden_s=count * (took_s - exposed_s),
            role=self._role(item, played),
            source=node.meta.get("source", ""),
            module=node.meta.get("module", ""),
            value=value,
            reason=reason,
            tensors=1 + len(played.also),
            count=count,
            start_s=played.start_s,
        )

    def _texts(self, item: Move, played: Played) -> tuple[str, str]:
        """What is moved, and why."""
        folding, step = self.player.space.folding, played.step
        made, reader = folding.of.get(item.value), folding.of.get(item.reader) if item.reader else None
        key = (made, reader, item.stores, step)
        if key not in self.texts:
            self.texts[key] = self.words.moved(item), self.words.reason(item, step)
        value, reason = self.texts[key]
        others = [self.words.moved(self.player.tracks.items[other]) for other in played.also]  # type: ignore[arg-type]
        values = list(dict.fromkeys([value, *others]))
        more = f", and {len(values) - 1} more with it" if len(values) > 1 else ""
        return ", ".join(values), reason + more

    def _role(self, item: Move, played: Played) -> Role:
        if self.words.gradient_of(item):
            return "gradient"
        tracks = self.player.tracks
        return "parameter" if tracks.slots[tracks.writes[played.item][0]].gathered else "activation"


def _events(one: Collective, played: Played) -> list[Event]:
    """A collective, or one of those it says, on the timeline of each of its axes."""
    return [
        Event(axis, played.start_s, played.end_s, one.reason, one.kind, one.phase, one.module, one.source, one.bytes)
        for axis in one.axes
    ]
