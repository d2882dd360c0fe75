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

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from torch import fx

from costmodel.collectives import collective_s
from costmodel.memory import OptimizerSpec
from costmodel.memory import optimizer as optimizer_of
from costmodel.reshard import Step
from passes.footprint import Footprint, Times, footprint
from passes.moves import Move, Run
from passes.space import Space
from passes.strategies import StoredOption
from passes.tracks import Tracks, tracks
from passes.words import Words, op_text

KINDS = {"state_gather": "all_gather", "state_scatter": "reduce_scatter"}
"""Steps of stored state -> the collective that does them."""


_OP_BY_OP = 80 / 28
"""On a CPU torch's optimizers run op by op: AdamW's mul, lerp, mul, addcmul, sqrt, div, add and addcdiv move 80 bytes
of an fp32 parameter, its gradient and its states, where one kernel moves 28."""


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


@dataclass(frozen=True, slots=True)
class Event:
    """Something that runs on a stream ("compute", or an axis), for a timeline."""

    stream: str
    start_s: float
    end_s: float
    name: str
    kind: str
    phase: str = "forward"
    module: str = ""
    source: str = ""
    bytes: int = 0
    """Of a collective: the full buffer on one rank."""


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
    compiled: bool = True,
    events: bool = False,
) -> Schedule:
    """The step of the plan that gives site i option `assignment[i]`: `accumulate` micro-batches and an update.

    `compiled`: chains of pointwise ops are one kernel. `events`: keep the timeline.

    Raises:
        ValueError: an unknown optimizer, or no micro-batch.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; a step has at least 1 micro-batch")
    spec = optimizer_of(optimizer)
    words = Words(space)
    found = tracks(space, assignment)
    player = _Player(space, words, found, events)
    player.play()
    update_s = _update_s(space, assignment, spec)
    collectives = _ledger(player, words)
    exposed: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    for each in collectives:
        exposed[each.group] += each.exposed_s
        hidden[each.group] += each.hidden_s
    times = Times(player.op_start_s, player.steps_of(), player.forward_end_s, player.now_s)
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
    """The update of a rank's own state: read and write the parameter and the states, read the gradient."""
    moved = 0.0
    for index, site in enumerate(space.sites):
        if site.given is None or site.given.kind != "parameter" or not site.given.requires_grad:
            continue
        option = site.options[assignment[index]]
        assert isinstance(option, StoredOption)
        elements = math.prod(option.storage.padded_shape(space.topology.sizes)) * site.count
        moved += elements * (3 * site.stored_itemsize + 2 * (spec.state_bytes_per_param + spec.master_bytes_per_param))
    device = space.topology.device
    if device.is_cpu:
        moved *= _OP_BY_OP
    return moved / (device.memory_bytes_per_s * device.memory_efficiency)


# -- when a move is issued ---------------------------------------------------------------------------------------------


def issue_points(space: Space, words: Words, found: Tracks) -> list[list[int]]:
    """Per item, the moves to issue right before it (by item), in program order; the last entry is the step's end.

    A bucket is issued as one, where its first gather or its last gradient is. A parameter's gather is issued where the
    gathers of the layer before begin (what lies between repeated layers counts as one layer, and each module as one
    where no layer repeats). An activation is sent where its layer's ops begin or right after it was made, whichever is
    later; one that was kept from forward, where its reader's module begins. A gradient is sent as soon as it is there.
    """
    items = found.items
    issue: list[list[int]] = [[] for _ in range(len(items) + 1)]
    ends = {x.bucket: index for index, x in enumerate(items) if isinstance(x, Move) and x.bucket >= 0}
    layer_start = module_start = 0
    layer: object = None
    module: object = None
    unit: object = None
    unit_start, unit_before = 0, 0
    for index, item in enumerate(items):
        node = item.node if isinstance(item, Run) else item.reader
        if node is not None:
            name, phase = node.meta.get("module", ""), item.phase
            here = (phase, words.instance(name))
            if here != layer:
                layer, layer_start = here, index
            if (phase, name) != module:
                module, module_start = (phase, name), index
        if isinstance(item, Run):
            continue
        gathered = found.slots[found.writes[index][0]].gathered
        if item.reader is None or (item.bucket >= 0 and not gathered):
            issue[ends.get(item.bucket, index)].append(index)
            continue
        producer = found.slots[found.reads[index][0]].producer
        if gathered:
            assert isinstance(layer, tuple)
            outside = words.layers and "*" not in words.pattern(name)
            if (here := (layer[0], "" if outside else layer[1])) != unit:
                unit, unit_before, unit_start = here, unit_start, index
            first = unit_before
        elif producer >= 0 and items[producer].phase == item.phase:
            first = layer_start
        else:
            first = module_start
        issue[max(first, producer + 1)].append(index)
    return issue


# -- playing -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Played:
    """A step of a move, or one of several moves together, as it ran.

    `own` is the move's own share of it. `after` is the collective it had to wait for last, if any. `also`: the other
    moves that take part, whose entries are no collectives of their own.
    """

    item: int
    step: Step
    own: Step
    start_s: float
    end_s: float
    after: int | None
    exposed_s: float = 0.0
    also: tuple[int, ...] = ()
    counts: bool = True


class _Player:
    """The clocks: `now_s` is where compute stands, `free_s` when each axis' stream is free again."""

    def __init__(self, space: Space, words: Words, found: Tracks, keep_events: bool) -> None:
        self.space = space
        self.words = words
        self.tracks = found
        self.issue = issue_points(space, words, found)
        self.fused = found.fused_again()
        axes = len(space.topology.axes)
        self.now_s = 0.0
        self.free_s = [0.0] * axes
        self.last_on: list[int | None] = [None] * axes
        self.busy_s = [0.0] * axes
        self.compute_s = 0.0
        self.contention_s = 0.0
        self.by_kind: dict[str, float] = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
        self.played: list[_Played] = []
        self.of_item: dict[int, list[int]] = {}
        self.brought: dict[int, tuple[float, int | None, float]] = {}
        """Slot that a move brings -> when it is there, its last collective, seconds of local slices still to do."""
        self.running: list[tuple[float, float, float]] = []
        """Collectives that may still run: start, end, share of the device that they keep busy."""
        self.op_start_s = [0.0] * (len(found.items) + 1)
        self.forward_end_s = 0.0
        self.events: list[Event] = []
        self.keep_events = keep_events
        device, machine = space.topology.device, space.topology.hardware
        self.shares = [
            min(0.9, (machine.inter_node if axis.crosses_nodes else machine.intra_node).sms / device.sm_count)
            for axis in space.topology.axes
        ]

    def play(self) -> None:
        items, found = self.tracks.items, self.tracks
        forward = True
        for index, item in enumerate(items):
            self._send_all(self.issue[index])
            if isinstance(item, Move):
                self.op_start_s[index] = self.now_s
                continue
            if forward and item.phase == "backward":
                forward, self.forward_end_s = False, self.now_s
            cost = found.costs[item.site]
            seconds = 0.0 if index in self.fused else cost.seconds
            late = [slot for slot in found.reads[index] if slot in self.brought]
            if late and (cost.fusing == "view" or self._only_gradients(item.node)):
                self._put_off(index, late, seconds)
                continue
            for slot in late:
                self._await(slot)
            self.op_start_s[index] = self.now_s
            if seconds:
                self._compute(seconds, cost.kind)
                if self.keep_events:
                    self._note(item, self.op_start_s[index], cost.kind)
        self._send_all(self.issue[len(items)])
        for slot in [slot for slot, _, _ in found.leaving if slot in self.brought]:
            self._await(slot)
        for axis, free_s in enumerate(self.free_s):
            self._wait(free_s, self.last_on[axis])
        self.op_start_s[len(items)] = self.now_s
        if forward:
            self.forward_end_s = self.now_s

    def layers(self) -> tuple[tuple[str, str, float], ...]:
        """When compute enters another layer."""
        found: list[tuple[str, str, float]] = []
        for index, item in enumerate(self.tracks.items):
            if isinstance(item, Run) and self.tracks.costs[item.site].seconds:
                here = item.phase, self.words.layer(item.node.meta.get("module", ""))
                if not found or found[-1][:2] != here:
                    found.append((*here, self.op_start_s[index]))
        return tuple(found)

    def _note(self, item: Run, start_s: float, kind: str) -> None:
        """Keep that an op ran from `start_s` to now."""
        node = item.node
        module, source = node.meta.get("module", ""), node.meta.get("source", "")
        name = f"{module}: {op_text(node.target)}" if module else op_text(node.target)
        again = ", computed again" if item.again else ""
        self.events.append(Event("compute", start_s, self.now_s, name + again, kind, item.phase, module, source))

    def steps_of(self) -> dict[int, list[tuple[Step, float, float]]]:
        """(step, start, end) of the steps of each move, by item."""
        return {
            item: [(self.played[i].own, self.played[i].start_s, self.played[i].end_s) for i in steps]
            for item, steps in self.of_item.items()
        }

    def _compute(self, seconds: float, kind: str) -> None:
        """Compute runs for `seconds`, longer beside collectives."""
        self.compute_s += seconds
        self.by_kind[kind] += seconds
        start = now = self.now_s
        if not self.running:
            self.now_s = start + seconds
            return
        left = seconds
        self.running = [run for run in self.running if run[1] > now]
        while left > 0.0:
            share = sum(run[2] for run in self.running if run[0] <= now < run[1])
            bounds = [bound for run in self.running for bound in run[:2] if bound > now]
            rate = 1.0 - min(0.9, share)
            until = min(bounds, default=math.inf)
            if left <= rate * (until - now):
                now += left / rate
                break
            left -= rate * (until - now)
            now = until
        self.now_s = now
        self.contention_s += now - start - seconds

    def _send_all(self, moves: Sequence[int]) -> None:
        """Issue moves, those of a bucket together."""
        for _, group in groupby(moves, key=self._bucket):
            self._send(list(group))

    def _bucket(self, index: int) -> int:
        """What tells moves apart that do not go together."""
        move = self.tracks.items[index]
        assert isinstance(move, Move)
        return move.bucket if move.bucket >= 0 else -1 - index

    def _send(self, indices: Sequence[int]) -> None:
        """Issue the steps of moves that go together, now."""
        moves: list[Move] = [self.tracks.items[index] for index in indices]  # type: ignore[misc]
        ready_s, last, slices_s = self.now_s, None, 0.0
        for index in indices:
            (source,) = self.tracks.reads[index]
            if source in self.brought:
                came_s, after, sliced_s = self.brought[source]
                slices_s += sliced_s
                if came_s > ready_s or last is None:
                    ready_s, last = max(came_s, ready_s), after
        for together in zip(*(move.steps for move in moves), strict=True):
            step = self._merged(together)
            if not step.is_collective:
                if last is None:
                    start_s = self.now_s
                    self._compute(step.seconds, "other")
                    ready_s = self.now_s
                else:  # done by whoever waits for what is brought
                    start_s, slices_s = ready_s, slices_s + step.seconds
                self._record(indices, step, together, start_s, ready_s, last)
                continue
            start_s = ready_s
            for axis in step.axes:
                if self.free_s[axis] > start_s:
                    start_s, last = self.free_s[axis], self.last_on[axis]
            ready_s = start_s + step.seconds
            last = self._record(indices, step, together, start_s, ready_s, last)
            for axis in step.axes:
                self.free_s[axis], self.last_on[axis] = ready_s, last
                self.busy_s[axis] += step.seconds
            share = max(self.shares[axis] for axis in step.axes)
            if share:
                self.running.append((start_s, ready_s, share))
        for position, index in enumerate(indices):
            (target,) = self.tracks.writes[index]
            self.brought[target] = (ready_s, last, slices_s if position == 0 else 0.0)

    def _merged(self, steps: Sequence[Step]) -> Step:
        """Steps that go together as one."""
        first = steps[0]
        if len(steps) == 1:
            return first
        size = sum(step.full_bytes for step in steps)
        if not first.is_collective:
            return replace(first, full_bytes=size, seconds=sum(step.seconds for step in steps))
        kind = KINDS.get(first.kind, first.kind)
        return replace(first, full_bytes=size, seconds=collective_s(kind, size, first.axes, self.space.topology))

    def _record(
        self, indices: Sequence[int], step: Step, own: Sequence[Step], start_s: float, end_s: float, after: int | None
    ) -> int:
        """Notes a step of moves that go together; the number of the first one's entry."""
        number = len(self.played)
        for index, mine in zip(indices, own, strict=True):
            first = index == indices[0]
            also = tuple(indices[1:]) if first else ()
            self.of_item.setdefault(index, []).append(len(self.played))
            self.played.append(_Played(index, step, mine, start_s, end_s, after, also=also, counts=first))
        return number

    def _only_gradients(self, node: fx.Node) -> bool:
        """Whether an op works on a finished gradient on its way out, and on nothing else."""
        operands = node.all_input_nodes
        return bool(operands) and all(self.words.gradient(operand) is not None for operand in operands)

    def _put_off(self, index: int, late: Sequence[int], seconds: float) -> None:
        """A view, or what is still to do to a gradient: nothing waits for it now; whoever reads its result does."""
        ready_s, last, slices_s = max((self.brought[slot] for slot in late), key=lambda brought: brought[0])
        self.op_start_s[index] = max(self.now_s, ready_s)
        for slot in self.tracks.writes[index]:
            self.brought[slot] = (ready_s, last, slices_s + seconds)

    def _await(self, slot: int) -> None:
        """Compute goes on when `slot` is there."""
        ready_s, last, slices_s = self.brought.pop(slot)
        self._wait(ready_s, last)
        if slices_s:
            start_s = self.now_s
            self._compute(slices_s, "other")
            if self.keep_events:
                phase = "backward" if self.forward_end_s else "forward"
                what = "local work on what was brought"
                self.events.append(Event("compute", start_s, self.now_s, what, "other", phase))
        self.brought[slot] = (0.0, None, 0.0)

    def _wait(self, until_s: float, collective: int | None) -> None:
        """Idle until `until_s`; each moment is laid to the collective that runs then."""
        end_s = until_s
        while end_s > self.now_s and collective is not None:
            each = self.played[collective]
            start_s = max(each.start_s, self.now_s)
            if end_s > start_s and each.step.is_collective:
                each.exposed_s += min(end_s, each.end_s) - start_s
                end_s = start_s
            collective = each.after
        self.now_s = max(self.now_s, until_s)

    def moment_text(self, at_s: float) -> str:
        """What runs at a moment."""
        if at_s >= self.now_s:
            return "the optimizer's update"
        costs = self.tracks.costs
        runs = [i for i, x in enumerate(self.tracks.items) if isinstance(x, Run) and costs[x.site].seconds]
        runs.sort(key=lambda i: self.op_start_s[i])
        starts = [self.op_start_s[i] for i in runs]
        item = self.tracks.items[runs[max(0, bisect.bisect_right(starts, at_s) - 1)]]
        assert isinstance(item, Run)
        meta = item.node.meta
        where = f" in {meta['module']}" if meta.get("module") else ""
        again = " again" if item.again else ""
        return f"{item.phase}: {op_text(item.node.target)}{again}{where}"


# -- ledger ------------------------------------------------------------------------------------------------------------


def _ledger(player: _Player, words: Words) -> tuple[Collective, ...]:
    """Every collective, in program order."""
    names = [axis.name for axis in player.space.topology.axes]
    groups: dict[tuple[int, ...], tuple[str, ...]] = {}
    texts: dict[object, tuple[str, str]] = {}
    found = []
    for index, item in enumerate(player.tracks.items):
        if not isinstance(item, Move):
            continue
        node: fx.Node = item.place
        role: Role = "activation"
        if words.gradient_of(item):
            role = "gradient"
        elif player.tracks.slots[player.tracks.writes[index][0]].gathered:
            role = "parameter"
        module, source = node.meta.get("module", ""), node.meta.get("source", "")
        for i in player.of_item[index]:
            played = player.played[i]
            step = played.step
            if not step.is_collective or not played.counts:
                continue
            folding = player.space.folding
            made, reader = folding.of.get(item.value), folding.of.get(item.reader) if item.reader else None
            key = (made, reader, item.stores, step)
            if key not in texts:
                texts[key] = words.moved(item), words.reason(item, step)
            value, reason = texts[key]
            others = [words.moved(player.tracks.items[other]) for other in played.also]  # type: ignore[arg-type]
            values = list(dict.fromkeys([value, *others]))
            if len(values) > 1:
                reason = f"{reason}, and {len(values) - 1} more with it"
            axes = groups.setdefault(step.axes, tuple(names[axis] for axis in step.axes))
            exposed_s = min(played.exposed_s, step.seconds)
            kind = KINDS.get(step.kind, step.kind)
            found.append(
                Collective(
                    kind=kind,
                    axes=axes,
                    bytes=step.full_bytes,
                    seconds=step.seconds,
                    phase=item.phase,
                    exposed_s=exposed_s,
                    hidden_s=step.seconds - exposed_s,
                    role=role,
                    source=source,
                    module=module,
                    value=", ".join(values),
                    reason=reason,
                    tensors=1 + len(played.also),
                    start_s=played.start_s,
                )
            )
            if player.keep_events:
                player.events += [
                    Event(axis, played.start_s, played.end_s, reason, kind, item.phase, module, source, step.full_bytes)
                    for axis in axes
                ]
    return tuple(found)
