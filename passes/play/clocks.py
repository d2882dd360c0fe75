"""The clocks of a step: where compute stands, when each axis' communication stream is free, and who waits for whom.

Compute and collectives slow each other down while they run side by side: a collective takes a share of the SMs and of
the memory rate. A wait is laid to the collective that runs then, which is what reports call exposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from costmodel.collectives import collective_s, taken_shares
from costmodel.reshard import Step
from passes.analysis.moves import Move
from passes.play.by_parts import by_parts
from passes.play.tracks import Tracks
from passes.space.space import Space

KINDS = {"state_gather": "all_gather", "state_scatter": "reduce_scatter"}
"""Steps of stored state -> the collective that does them."""


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


@dataclass(slots=True)
class Played:
    """A step of a move, or one of several moves together, as it ran.

    `own` is the move's own share of it. `after` is the collective it had to wait for last, if any. `also`: the other
    moves that take part, whose entries are no collectives of their own. `slowed_s`: what it takes longer than alone.
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
    slowed_s: float = 0.0

    def went_as(self, other: Played) -> None:
        """It took as long, and as much longer, as the same step in another layer, and compute waited as long."""
        self.end_s = self.start_s + other.end_s - other.start_s
        self.exposed_s, self.slowed_s = other.exposed_s, other.slowed_s


class Arrival(NamedTuple):
    """When a moved tensor is there: at `at_s`, after the collective `after` (its index among `played`), with `slices_s`
    seconds of local slices left to do by then."""

    at_s: float
    after: int | None
    slices_s: float


_ARRIVED = Arrival(0.0, None, 0.0)


class Running(NamedTuple):
    """A collective that runs beside compute, and its shares of the SMs and of the memory rate."""

    start_s: float
    end_s: float
    sms: float
    memory: float

    def since(self, at_s: float) -> Running:
        """The same on a clock that starts at `at_s`; a collective that has begun by then begins there."""
        return self._replace(start_s=max(0.0, self.start_s - at_s), end_s=self.end_s - at_s)

    def later(self, by_s: float) -> Running:
        """The same, `by_s` later."""
        return self._replace(start_s=self.start_s + by_s, end_s=self.end_s + by_s)


class Clocks:
    """Seconds from the step's start: `now_s` is where compute stands, `free_s` when each axis' stream is free again."""

    def __init__(self, space: Space, tracks: Tracks, keep_events: bool) -> None:
        self.space = space
        self.tracks = tracks
        self.by_parts = by_parts(space, tracks)
        axes = len(space.topology.axes)
        self.now_s = 0.0
        self.free_s = [0.0] * axes
        self.last_on: list[int | None] = [None] * axes
        """The last collective on each axis' stream."""
        self.compute_s = 0.0
        self.contention_s = 0.0
        self.by_kind: dict[str, float] = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
        self.launched = 0.0
        """Kernels of ops."""
        self.played: list[Played] = []
        self.of_item: dict[int, list[int]] = {}
        """Item -> its entries in `played`."""
        self.arrivals: dict[int, Arrival] = {}
        """By slot, of what moves bring."""
        self.running: list[Running] = []
        """Collectives that may still run."""
        self.forward_end_s = 0.0
        self.events: list[Event] = []
        self.keep_events = keep_events
        self.shares: dict[tuple[int, ...], tuple[float, float]] = {}
        """Axes -> what a collective over them takes from compute."""

    def compute(self, seconds: float, kind: str) -> None:
        """Compute runs for `seconds`, longer beside collectives: products and attention by the SMs that those take,
        the rest by their share of the memory rate."""
        self.compute_s += seconds
        self.by_kind[kind] += seconds
        start = now = self.now_s
        if not self.running:
            self.now_s = start + seconds
            return
        left, in_memory = seconds, kind == "other"
        self.running = [run for run in self.running if run.end_s > now]
        while left > 0.0:
            now_on = [run for run in self.running if run.start_s <= now < run.end_s]
            share = sum(run.memory if in_memory else run.sms for run in now_on)
            bounds = [bound for run in self.running for bound in (run.start_s, run.end_s) if bound > now]
            rate = 1.0 - min(0.9, share)
            until = min(bounds, default=math.inf)
            if left <= rate * (until - now):
                now += left / rate
                break
            left -= rate * (until - now)
            now = until
        self.now_s = now
        self.contention_s += now - start - seconds

    def send(self, moves: Sequence[int]) -> None:
        """Issue moves, those of a bucket together."""
        for _, group in groupby(moves, key=self._bucket):
            self._send_together(list(group))

    def _bucket(self, index: int) -> int:
        """What tells moves apart that do not go together."""
        move = self.tracks.items[index]
        assert isinstance(move, Move)
        return move.bucket if move.bucket >= 0 else -1 - index

    def _send_together(self, indices: Sequence[int]) -> None:
        """Issue the steps of moves that go together, now."""
        moves: list[Move] = [self.tracks.items[index] for index in indices]  # type: ignore[misc]
        arrival = self._operands_of(indices)
        for own in zip(*(move.steps for move in moves), strict=True):
            step = self._merged(own)
            if step.is_collective:
                arrival = self._collective(indices, step, own, arrival)
            else:
                arrival = self._local_step(indices, step, own, arrival)
        for index in indices:
            (target,) = self.tracks.writes[index]
            self.arrivals[target] = arrival
            arrival = arrival._replace(slices_s=0.0)  # they are done once, for all of these

    def _operands_of(self, indices: Sequence[int]) -> Arrival:
        """When the operands of moves that go together are there, so that they can start."""
        ready_s, after = self.now_s - self.by_parts.sent_early_s.get(indices[0], 0.0), None
        slices_s = self.by_parts.added_s.get(indices[0], 0.0)
        for index in indices:
            (source,) = self.tracks.reads[index]
            if source in self.arrivals:
                arrival = self.arrivals[source]
                slices_s += arrival.slices_s
                if arrival.at_s > ready_s or after is None:
                    ready_s, after = max(arrival.at_s, ready_s), arrival.after
        return Arrival(ready_s, after, slices_s)

    def _local_step(self, indices: Sequence[int], step: Step, own: Sequence[Step], arrival: Arrival) -> Arrival:
        """A slice, cast or the like: done at once, or by whoever waits for what it is made of."""
        if arrival.after is None:
            start_s = self.now_s
            self.compute(step.seconds, "other")
            done = arrival._replace(at_s=self.now_s)
        else:
            start_s = arrival.at_s
            done = arrival._replace(slices_s=arrival.slices_s + step.seconds)
        self._record(indices, step, own, start_s, done.at_s, arrival.after)
        return done

    def _collective(self, indices: Sequence[int], step: Step, own: Sequence[Step], arrival: Arrival) -> Arrival:
        """A collective, on the streams of its axes as soon as they are free, and beside what others send."""
        start_s, after = arrival.at_s, arrival.after
        for axis in self.streams_of(step):
            if self.free_s[axis] > start_s:
                start_s, after = self.free_s[axis], self.last_on[axis]
        slowed_s = self._beside_others(step, start_s)
        end_s = start_s + step.seconds + slowed_s
        early = bool(self.by_parts.sent_early_s.get(indices[0], 0.0))
        if early:  # the last part is sent when it is made
            end_s = max(end_s, self.now_s + step.seconds / self.space.topology.sizes[step.axes[0]])
        number = self._record(indices, step, own, start_s, end_s, after, slowed_s)
        for axis in self.streams_of(step):
            self.free_s[axis], self.last_on[axis] = end_s, number
        if step.axes not in self.shares:
            self.shares[step.axes] = taken_shares(step.axes, self.space.topology)
        sms, memory = self.shares[step.axes]
        if early or indices[0] in self.by_parts.gathers:
            sms = 0.0
        if sms or memory:
            self.running.append(Running(start_s, end_s, sms, memory))
        return Arrival(end_s, number, arrival.slices_s)

    def _beside_others(self, step: Step, start_s: float) -> float:
        """Seconds that a collective from `start_s` on takes longer, as those on other streams use the same links.

        Each gets half of the rate while both run, so both take longer by what the shorter one takes alone. On another
        stream it is the last collective issued that ends so much later.
        """
        longer_s, own = 0.0, self.streams_of(step)
        others = {last for axis, last in enumerate(self.last_on) if last is not None and axis not in own}
        for last in others:
            beside = self.played[last]
            shared_s = min(step.seconds, beside.end_s - start_s)
            if shared_s > 0.0 and self._crosses_nodes(beside.step) == self._crosses_nodes(step):
                longer_s += shared_s
                self._delay(last, shared_s)
        return longer_s

    def _delay(self, number: int, by_s: float) -> None:
        """The collective with this number, the last on its streams, ends later."""
        first = self.played[number]
        for axis in self.streams_of(first.step):
            self.free_s[axis] += by_s
        sms, memory = self.shares[first.step.axes]
        self.running.append(Running(first.end_s, first.end_s + by_s, sms, memory))
        for each in self.played[number : number + 1 + len(first.also)]:
            each.end_s += by_s
            each.slowed_s += by_s
            for slot in self.tracks.writes[each.item]:
                if (arrival := self.arrivals.get(slot, _ARRIVED)).after == number:
                    self.arrivals[slot] = arrival._replace(at_s=arrival.at_s + by_s)

    def _crosses_nodes(self, step: Step) -> bool:
        """Whether a collective is bound by links between nodes, or by those inside."""
        return any(self.space.topology.axes[axis].crosses_nodes for axis in step.axes)

    def streams_of(self, step: Step) -> Sequence[int]:
        """The streams that a collective occupies: on a CPU all, as its cores do what any collective does."""
        return range(len(self.free_s)) if self.space.topology.device.is_cpu else step.axes

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
        self, indices: Sequence[int], step: Step, own: Sequence[Step], start_s: float, end_s: float, after: int | None,
        slowed_s: float = 0.0,
    ) -> int:  # fmt: skip
        """Notes a step of moves that go together; the number of the first one's entry."""
        number = len(self.played)
        for index, mine in zip(indices, own, strict=True):
            first = index == indices[0]
            also = tuple(indices[1:]) if first else ()
            self.of_item.setdefault(index, []).append(len(self.played))
            self.played.append(
                Played(index, step, mine, start_s, end_s, after, also=also, counts=first, slowed_s=slowed_s)
            )
        return number

    def wait_for(self, slot: int, early_s: float = 0.0) -> None:
        """Compute goes on when `slot` is there, or `early_s` before, but not before what brings it starts."""
        ready_s, after, slices_s = self.arrivals.pop(slot)
        if early_s and after is not None:
            ready_s = max(self.played[after].start_s, ready_s - early_s)
        self.idle_until(ready_s, after)
        if slices_s:
            start_s = self.now_s
            self.compute(slices_s, "other")
            if self.keep_events:
                phase = "backward" if self.forward_end_s else "forward"
                what = "local work on what was brought"
                self.events.append(Event("compute", start_s, self.now_s, what, "other", phase))
        self.arrivals[slot] = _ARRIVED

    def idle_until(self, until_s: float, collective: int | None) -> None:
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
