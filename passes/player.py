"""The clocks of a step: what runs when on the compute stream and on the communication stream of each mesh axis.

See `schedule` for what is played. Layers that stand for others (`Program.repeated`) are played as often as there are
layers, until the streams stand as they did a layer before; from there on each layer takes as long as the last one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from torch import fx

from costmodel.collectives import collective_s, taken_shares
from costmodel.reshard import Step
from passes.blocks import Block, blocks
from passes.by_parts import by_parts
from passes.fusion import Fused
from passes.issue import issue_points
from passes.moves import Move, Run
from passes.rules.call import op_text
from passes.space import Space
from passes.tracks import Tracks
from passes.words import Words

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


_SETTLED = 3
"""Runs through layers that have to be alike, before those that follow count as copies."""


@dataclass(frozen=True)
class _Mark:
    """Where the clocks stand as a run through a block begins; the last three as seen from `now_s`."""

    now_s: float
    played: int
    compute_s: float
    contention_s: float
    by_kind: dict[str, float]
    launched: float
    free_s: tuple[float, ...]
    running: tuple[Running, ...]
    arrivals: dict[int, tuple[float, float]]

    def is_like(self, other: _Mark) -> bool:
        """Whether what follows takes as long."""
        if self.arrivals.keys() != other.arrivals.keys() or len(self.running) != len(other.running):
            return False
        return all(
            math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-13)
            for mine, theirs in zip(self._figures(), other._figures(), strict=True)
        )

    def _figures(self) -> list[float]:
        arrivals = [figure for slot in sorted(self.arrivals) for figure in self.arrivals[slot]]
        return [*self.free_s, *(figure for run in self.running for figure in run), *arrivals]


class Player:
    """The clocks: `now_s` is where compute stands, `free_s` when each axis' stream is free again."""

    def __init__(self, space: Space, words: Words, tracks: Tracks, keep_events: bool, compiled: Fused = True) -> None:
        self.space = space
        self.words = words
        self.tracks = tracks
        self.issue = issue_points(words, tracks)
        self.fused = tracks.fused_again(compiled)
        self.by_parts = by_parts(space, tracks)
        self.blocks = blocks(tracks, space.program.repeated, self.issue, self.fused)
        self.passes: dict[Block, list[float]] = {}
        """When each run through a block began."""
        self.ahead: dict[Block, int] = {}
        """How many steps had been issued when the first began."""
        self.left: dict[Block, list[dict[int, Arrival]]] = {}
        """What each run but the last leaves for the step's end."""
        axes = len(space.topology.axes)
        self.now_s = 0.0
        self.free_s = [0.0] * axes
        self.last_on: list[int | None] = [None] * axes
        self.compute_s = 0.0
        self.contention_s = 0.0
        self.by_kind: dict[str, float] = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
        self.launched = 0.0
        """Kernels of ops."""
        self.played: list[Played] = []
        self.of_item: dict[int, list[int]] = {}
        self.arrivals: dict[int, Arrival] = {}
        """By slot, of what moves bring."""
        self.running: list[Running] = []
        """Collectives that may still run."""
        self.op_start_s = [0.0] * (len(tracks.items) + 1)
        self.in_backward = False
        self.forward_end_s = 0.0
        self.events: list[Event] = []
        self.keep_events = keep_events
        self.shares: dict[tuple[int, ...], tuple[float, float]] = {}
        """Axes -> what a collective over them takes from compute."""

    def play(self) -> None:
        items = self.tracks.items
        index = 0
        for block in self.blocks:
            self._play(index, block.start)
            self._repeat(block)
            index = block.end
        self._play(index, len(items))
        self._send_all(self.issue[len(items)])
        for slot, kept in self._leaving():
            if kept is not None:
                self.arrivals[slot] = kept
            if slot in self.arrivals:
                self._await(slot)
        for axis, free_s in enumerate(self.free_s):
            self._wait(free_s, self.last_on[axis])
        self.op_start_s[len(items)] = self.now_s
        if not self.in_backward:
            self.forward_end_s = self.now_s

    def _play(self, start: int, end: int) -> None:
        """Run some items."""
        items, tracks = self.tracks.items, self.tracks
        for index in range(start, end):
            item = items[index]
            self._send_all(self.issue[index])
            if isinstance(item, Move):
                self.op_start_s[index] = self.now_s
                continue
            if not self.in_backward and item.phase == "backward":
                self.in_backward, self.forward_end_s = True, self.now_s
            cost = tracks.costs[item.site]
            seconds = 0.0
            if index not in self.fused:  # what runs again within its readers is part of theirs
                seconds = self.by_parts.products_s.get(index, cost.seconds)
                self.launched += cost.launches
            late = [slot for slot in tracks.reads[index] if slot in self.arrivals]
            if late and (cost.fusing == "view" or self._only_gradients(item.node)):
                self._put_off(index, late, seconds)
                continue
            in_parts, early_s = self.by_parts.early_s.get(index, (-1, 0.0))
            for slot in late:
                self._await(slot, early_s if slot == in_parts else 0.0)
            self.op_start_s[index] = self.now_s
            if seconds:
                self._compute(seconds, cost.kind)
                if self.keep_events:
                    self._note(item, self.op_start_s[index], cost.kind)

    # -- layers that stand for others ----------------------------------------------------------------------------------

    def _repeat(self, block: Block) -> None:
        """Run through a block as often as there are layers; once runs are alike, the rest are copies of the last."""
        unit = {slot for i in range(block.start, block.end) for slot in self.tracks.writes[i]}
        leaving = [slot for slot, _, _ in self.tracks.leaving if slot in unit]
        earlier = set(block.back.values()) - unit
        read = {slot for i in range(block.start, block.end) for slot in self.tracks.reads[i]} - unit - earlier
        outside = {slot: self.arrivals[slot] for slot in read if slot in self.arrivals}
        left = self.left.setdefault(block, [])
        times_s: list[float] = []
        marks: list[_Mark] = []
        alike = 0
        for run in range(block.more + 1):
            mark = self._mark(block)
            alike = alike + 1 if marks and mark.is_like(marks[-1]) else 0
            marks.append(mark)
            self._play(block.start, block.end)
            if run == 0:
                times_s = self.op_start_s[block.start : block.end]
            if run == block.more:
                break
            left.append({slot: self.arrivals[slot] for slot in leaving if slot in self.arrivals})
            if alike >= _SETTLED:
                self._copy(block, marks, block.more - run)
                break
            self._step_back(block, leaving)
            self.arrivals |= outside
        self.passes[block], self.ahead[block] = [mark.now_s for mark in marks], marks[0].played
        if block.phase == "forward":  # the first run is that of the unit itself, the last is backward's
            self.op_start_s[block.start : block.end] = times_s

    def _step_back(self, block: Block, leaving: Sequence[int]) -> None:
        """What the unit brought is now what the layers before it brought, and what lies behind it is the unit's."""
        moved = {slot: self.arrivals.pop(slot) for slot in block.back if slot in self.arrivals}
        for slot, value in moved.items():
            if slot not in leaving:
                self.arrivals[block.back[slot]] = value

    def _mark(self, block: Block) -> _Mark:
        """Where the clocks stand."""
        now = self.now_s
        slots = {*block.back, *block.back.values()}
        return _Mark(
            now,
            len(self.played),
            self.compute_s,
            self.contention_s,
            dict(self.by_kind),
            self.launched,
            tuple(max(0.0, free_s - now) for free_s in self.free_s),
            tuple(run.since(now) for run in self.running if run.end_s > now),
            {s: (max(0.0, x.at_s - now), x.slices_s) for s, x in self.arrivals.items() if s in slots},
        )

    def _copy(self, block: Block, marks: list[_Mark], runs: int) -> None:
        """Go on as if the last run had been made `runs` times more."""
        last, settled = marks[-1], marks[-1 - _SETTLED]
        period_s, size = self.now_s - last.now_s, len(self.played) - last.played
        oldest = marks[1].played
        done = [each.exposed_s for each in self.played[settled.played : settled.played + size]]
        pattern = self.played[last.played :]
        since = marks[-_SETTLED].played
        open_s = [each.exposed_s for each in self.played[since:]]  # what comes may still wait for these
        for run in range(1, runs + 1):
            later_s = run * period_s
            for each in pattern:
                after = each.after
                if after is not None and after >= oldest:
                    after += run * size
                self.of_item[each.item].append(len(self.played))
                start_s, end_s = each.start_s + later_s, each.end_s + later_s
                self.played.append(
                    Played(
                        each.item, each.step, each.own, start_s, end_s, after, each.exposed_s, each.also, each.counts
                    )
                )
            marks.append(replace(last, now_s=last.now_s + later_s))
        for i, each in enumerate(self.played[since:]):
            each.exposed_s = done[i % size]
        for each, exposed_s in zip(self.played[len(self.played) - len(open_s) :], open_s, strict=True):
            each.exposed_s = exposed_s

        def moved(arrival: Arrival, run: int) -> Arrival:
            at_s, after, slices_s = arrival
            after = after + run * size if after is not None and after >= oldest else after
            return Arrival(at_s + run * period_s if at_s >= marks[1].now_s else at_s, after, slices_s)

        left = self.left[block]
        left += [{slot: moved(value, run) for slot, value in left[-1].items()} for run in range(1, runs)]
        for slot in block.back:
            if slot in self.arrivals:
                self.arrivals[slot] = moved(self.arrivals[slot], runs)
        later_s = runs * period_s
        self.now_s += later_s
        self.op_start_s[block.start : block.end] = [at_s + later_s for at_s in self.op_start_s[block.start : block.end]]
        self.free_s = [free_s + later_s for free_s in self.free_s]
        self.last_on = [i + runs * size if i is not None and i >= oldest else i for i in self.last_on]
        self.running = [run.later(later_s) for run in self.running]
        self.compute_s += runs * (self.compute_s - last.compute_s)
        self.contention_s += runs * (self.contention_s - last.contention_s)
        for kind, seconds in last.by_kind.items():
            self.by_kind[kind] += runs * (self.by_kind[kind] - seconds)
        self.launched += runs * (self.launched - last.launched)

    def _leaving(self) -> Iterator[tuple[int, Arrival | None]]:
        """What the step gives, in order; layers that others stand for behind those."""
        ends: dict[int, Block] = {}
        for slot, _, _ in self.tracks.leaving:
            for block in self.left:
                if block.start <= self.tracks.slots[slot].producer < block.end:
                    ends[slot] = block
        last = {block: slot for slot, block in ends.items()}
        for slot, _, _ in self.tracks.leaving:
            yield slot, None
            if slot in ends and last[ends[slot]] == slot:
                for run in reversed(self.left[ends[slot]]):
                    yield from run.items()

    def layers(self) -> tuple[tuple[str, str, float], ...]:
        """(phase, layer, seconds) of each time that compute enters another layer."""
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
        """(step, start, end) of the steps of each move, by item: of the layers in the graph."""
        found = {}
        for index, steps in self.of_item.items():
            item = self.tracks.items[index]
            assert isinstance(item, Move)
            block = next((b for b in self.blocks if b.start <= index < b.end), None)
            forward = block is not None and block.phase == "forward"
            own = steps[: len(item.steps)] if forward else steps[-len(item.steps) :]
            later_s = 0.0
            if block is not None and not forward:
                runs_s = self.passes[block]
                if own[0] < self.ahead[block]:  # issued before the first run, for that one
                    later_s = runs_s[-1] - runs_s[0]
            found[index] = [
                (self.played[i].own, self.played[i].start_s + later_s, self.played[i].end_s + later_s) for i in own
            ]
        return found

    def _compute(self, seconds: float, kind: str) -> None:
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
            self._compute(step.seconds, "other")
            done = arrival._replace(at_s=self.now_s)
        else:
            start_s = arrival.at_s
            done = arrival._replace(slices_s=arrival.slices_s + step.seconds)
        self._record(indices, step, own, start_s, done.at_s, arrival.after)
        return done

    def _collective(self, indices: Sequence[int], step: Step, own: Sequence[Step], arrival: Arrival) -> Arrival:
        """A collective, on the streams of its axes as soon as they are free."""
        start_s, after = arrival.at_s, arrival.after
        for axis in self.streams_of(step):
            if self.free_s[axis] > start_s:
                start_s, after = self.free_s[axis], self.last_on[axis]
        end_s = start_s + step.seconds
        early = bool(self.by_parts.sent_early_s.get(indices[0], 0.0))
        if early:  # the last part is sent when it is made
            end_s = max(end_s, self.now_s + step.seconds / self.space.topology.sizes[step.axes[0]])
        number = self._record(indices, step, own, start_s, end_s, after)
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
        self, indices: Sequence[int], step: Step, own: Sequence[Step], start_s: float, end_s: float, after: int | None
    ) -> int:
        """Notes a step of moves that go together; the number of the first one's entry."""
        number = len(self.played)
        for index, mine in zip(indices, own, strict=True):
            first = index == indices[0]
            also = tuple(indices[1:]) if first else ()
            self.of_item.setdefault(index, []).append(len(self.played))
            self.played.append(Played(index, step, mine, start_s, end_s, after, also=also, counts=first))
        return number

    def _only_gradients(self, node: fx.Node) -> bool:
        """Whether an op works on a finished gradient on its way out, and on nothing else."""
        operands = node.all_input_nodes
        return bool(operands) and all(self.words.gradient(operand) is not None for operand in operands)

    def _put_off(self, index: int, late: Sequence[int], seconds: float) -> None:
        """A view, or what is still to do to a gradient: nothing waits for it now; whoever reads its result does."""
        last = max((self.arrivals[slot] for slot in late), key=lambda arrival: arrival.at_s)
        self.op_start_s[index] = max(self.now_s, last.at_s)
        for slot in self.tracks.writes[index]:
            self.arrivals[slot] = last._replace(slices_s=last.slices_s + seconds)

    def _await(self, slot: int, early_s: float = 0.0) -> None:
        """Compute goes on when `slot` is there, or `early_s` before, but not before what brings it starts."""
        ready_s, after, slices_s = self.arrivals.pop(slot)
        if early_s and after is not None:
            ready_s = max(self.played[after].start_s, ready_s - early_s)
        self._wait(ready_s, after)
        if slices_s:
            start_s = self.now_s
            self._compute(slices_s, "other")
            if self.keep_events:
                phase = "backward" if self.forward_end_s else "forward"
                what = "local work on what was brought"
                self.events.append(Event("compute", start_s, self.now_s, what, "other", phase))
        self.arrivals[slot] = _ARRIVED

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
        """A description of what runs at `at_s`."""
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
