"""A step as it is played: what runs when on the compute stream and on the communication stream of each mesh axis.

See `schedule` for what is played. Layers that stand for others (`Program.repeated`) are played as often as there are
layers, until the streams stand as they did a layer before; from there on each layer takes as long as the last one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from costmodel.reshard import Step
from passes.analysis.fusion import Fused
from passes.analysis.moves import Move, Run
from passes.play.blocks import Block, blocks
from passes.play.clocks import Arrival, Clocks, Event, Running
from passes.play.issue import issue_points
from passes.play.tracks import Tracks
from passes.rules.call import op_text
from passes.space.space import Space
from passes.space.words import Words

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


class Player(Clocks):
    """Plays the items of a step in order, layers that stand for others as often as there are layers."""

    def __init__(self, space: Space, words: Words, tracks: Tracks, keep_events: bool, compiled: Fused = True) -> None:
        super().__init__(space, tracks, keep_events)
        self.words = words
        self.issue = issue_points(words, tracks)
        self.fused = tracks.fused_again(compiled)
        self.blocks = blocks(tracks, space.program.repeated, self.issue, self.fused)
        self.passes: dict[Block, list[float]] = {}
        """When each run through a block began."""
        self.ahead: dict[Block, int] = {}
        """How many steps had been issued when the first began."""
        self.left: dict[Block, list[dict[int, Arrival]]] = {}
        """What each run but the last leaves for the step's end."""
        self.op_start_s = [0.0] * (len(tracks.items) + 1)
        self.in_backward = False

    def play(self) -> None:
        items = self.tracks.items
        index = 0
        for block in self.blocks:
            self._play(index, block.start)
            self._repeat(block)
            index = block.end
        self._play(index, len(items))
        self.send(self.issue[len(items)])
        for slot, kept in self._leaving():
            if kept is not None:
                self.arrivals[slot] = kept
            if slot in self.arrivals:
                self.wait_for(slot)
        for axis, free_s in enumerate(self.free_s):
            self.idle_until(free_s, self.last_on[axis])
        self.op_start_s[len(items)] = self.now_s
        if not self.in_backward:
            self.forward_end_s = self.now_s

    def _play(self, start: int, end: int) -> None:
        """Run some items."""
        items, tracks = self.tracks.items, self.tracks
        for index in range(start, end):
            item = items[index]
            self.send(self.issue[index])
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
                self.wait_for(slot, early_s if slot == in_parts else 0.0)
            self.op_start_s[index] = self.now_s
            if seconds:
                self.compute(seconds, cost.kind)
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
        done = self.played[settled.played : settled.played + size]
        pattern = self.played[last.played :]
        since = marks[-_SETTLED].played
        still_open = [replace(each) for each in self.played[since:]]  # what comes may wait for these, or slow them down
        for run in range(1, runs + 1):
            later_s = run * period_s
            for each in pattern:
                after = each.after
                if after is not None and after >= oldest:
                    after += run * size
                self.of_item[each.item].append(len(self.played))
                start_s, end_s = each.start_s + later_s, each.end_s + later_s
                self.played.append(replace(each, start_s=start_s, end_s=end_s, after=after))
            marks.append(replace(last, now_s=last.now_s + later_s))
        for i, each in enumerate(self.played[since:]):
            each.went_as(done[i % size])
        for each, as_yet in zip(self.played[len(self.played) - len(still_open) :], still_open, strict=True):
            each.went_as(as_yet)

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
