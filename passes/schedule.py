"""A step played on one rank: a compute stream, and a communication stream per mesh axis.

    compute        |  layer 0  |   layer 1   | ... |        backward        | optimizer |
    dp     g0 | g1 |   g2 |                        |  r3 | r2 |     r1 | r0 |

Ops run in the program's order. A collective waits for its axes' streams (all of them, where it runs over several) and
then runs beside compute, as a runtime with asynchronous collectives has it:

    stored parameters are gathered while the layer before computes (never earlier: two layers' worth is in memory)
    gradients are reduced behind backward, and what is done to them then is put off; the optimizer waits for them
    activations are sent as soon as they are there, and their reader waits

Compute that waits is what makes communication *exposed*: each moment of waiting is laid to the collective that runs
then on the way to what is waited for. So `step = compute + slowed + exposed + optimizer`, and a collective's exposed
and hidden seconds add up to its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from costmodel.compute import update_traffic_s
from costmodel.memory import OptimizerSpec
from costmodel.memory import optimizer as optimizer_of
from passes.footprint import Footprint, Times, footprint
from passes.fusion import Fused
from passes.moves import Move
from passes.player import KINDS, Event, Played, Player
from passes.space import Space, trained
from passes.tracks import Tracks, tracks
from passes.words import Words

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
        return ",".join(self.axes)


@dataclass(frozen=True)
class Schedule:
    """What a step takes; all but `step_time_s` and `optimizer_s` is of one micro-batch."""

    step_time_s: float
    micro_batch_s: float
    optimizer_s: float
    accumulate: int
    compute_s: float
    compute_by_kind: Mapping[str, float]
    """Seconds of "matmul", "attention" and "other"."""
    contention_s: float
    """What compute takes longer because collectives keep some of the device busy."""
    exposed_s: Mapping[str, float]
    """Group of axes ("tp", "dp,tp") -> seconds that compute waits for its collectives."""
    hidden_s: Mapping[str, float]
    stream_busy_s: Mapping[str, float]
    collectives: tuple[Collective, ...]
    """In the order in which the program issues them."""
    peak_memory_bytes: int
    peak_moment: str
    memory: Footprint
    events: tuple[Event, ...] = ()
    forward_s: float = 0.0
    """Of `micro_batch_s`, until backward begins."""
    layers: tuple[tuple[str, str, float], ...] = ()
    """(phase, layer, start) whenever compute enters another layer; "" is what no repeated layer is part of."""

    @property
    def exposed_total_s(self) -> float:
        """Seconds that compute waits, over all groups."""
        return sum(self.exposed_s.values())


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
    player = Player(space, words, found, events)
    player.play()
    update_s = _update_s(space, assignment, spec)
    collectives = _ledger(player, words)
    exposed: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    for each in collectives:
        exposed[each.group] += each.exposed_s
        hidden[each.group] += each.hidden_s
    times = Times(player.op_start_s, player.steps_of(), player.forward_end_s, player.now_s, player.passes)
    memory = footprint(
        space, assignment, found, times, words, spec, accumulate=accumulate, fused=compiled, keep_buffers=events
    )
    busy = {"compute": player.compute_s + player.contention_s}
    busy |= {axis.name: busy_s for axis, busy_s in zip(space.topology.axes, player.busy_s, strict=True)}
    return Schedule(
        step_time_s=accumulate * player.now_s + update_s,
        micro_batch_s=player.now_s,
        optimizer_s=update_s,
        accumulate=accumulate,
        compute_s=player.compute_s,
        compute_by_kind=dict(player.by_kind),
        contention_s=player.contention_s,
        exposed_s=dict(exposed),
        hidden_s=dict(hidden),
        stream_busy_s=busy,
        collectives=collectives,
        peak_memory_bytes=memory.bytes,
        peak_moment=player.moment_text(memory.moment_s),
        memory=memory,
        events=tuple(player.events),
        forward_s=player.forward_end_s,
        layers=player.layers(),
    )


def _update_s(space: Space, assignment: Sequence[int], spec: OptimizerSpec) -> float:
    """The update of what a rank stores of each parameter."""
    device, states = space.topology.device, spec.state_bytes_per_param + spec.master_bytes_per_param
    return sum(
        site.count * (device.update_s + update_traffic_s(elements / site.count, site.stored_itemsize, states, device))
        for site, elements in trained(space, assignment)
    )


# -- ledger ------------------------------------------------------------------------------------------------------------


def _ledger(player: Player, words: Words) -> tuple[Collective, ...]:
    """Every collective, in program order."""
    names = [axis.name for axis in player.space.topology.axes]
    groups: dict[tuple[int, ...], tuple[str, ...]] = {}
    texts: dict[object, tuple[str, str]] = {}
    folding = player.space.folding

    def say(item: Move, played: Played) -> partial[Collective]:
        """All of a collective but when it runs and what waits for it: what is moved and why, over which axes."""
        step, node = played.step, item.place
        made, reader = folding.of.get(item.value), folding.of.get(item.reader) if item.reader else None
        key = (made, reader, item.stores, step)
        if key not in texts:
            texts[key] = words.moved(item), words.reason(item, step)
        value, reason = texts[key]
        others = [words.moved(player.tracks.items[other]) for other in played.also]  # type: ignore[arg-type]
        values = list(dict.fromkeys([value, *others]))
        if len(values) > 1:
            reason = f"{reason}, and {len(values) - 1} more with it"
        role: Role = "activation"
        if words.gradient_of(item):
            role = "gradient"
        elif player.tracks.slots[player.tracks.writes[played.item][0]].gathered:
            role = "parameter"
        return partial(
            Collective,
            kind=KINDS.get(step.kind, step.kind),
            axes=groups.setdefault(step.axes, tuple(names[axis] for axis in step.axes)),
            bytes=step.full_bytes,
            seconds=step.seconds,
            phase=item.phase,
            role=role,
            source=node.meta.get("source", ""),
            module=node.meta.get("module", ""),
            value=", ".join(values),
            reason=reason,
            tensors=1 + len(played.also),
        )

    found = []
    for index, item in enumerate(player.tracks.items):
        if not isinstance(item, Move):
            continue
        said: dict[object, partial[Collective]] = {}
        for i in player.of_item[index]:
            played = player.played[i]
            step = played.step
            told = (id(step), played.also)  # copies of a layer share their steps
            if not played.counts or not step.is_collective:
                continue
            if told not in said:
                said[told] = say(item, played)
            exposed_s = min(played.exposed_s, step.seconds)
            one = said[told](exposed_s=exposed_s, hidden_s=step.seconds - exposed_s, start_s=played.start_s)
            found.append(one)
            if player.keep_events:
                player.events += [
                    Event(
                        axis, played.start_s, played.end_s, one.reason, one.kind, one.phase, one.module, one.source,
                        one.bytes,
                    )
                    for axis in one.axes
                ]  # fmt: skip
    return tuple(found)
