"""Candidates for a plan: under each strategy, and each way to compute again what does not fit, what the solver proposes
and the schedule makes of it."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from costmodel.collectives import taken_shares
from costmodel.hardware import Topology
from costmodel.memory import OPTIMIZERS
from passes.analysis import analyse
from passes.blocks import NotPeriodicError
from passes.decisions import without
from passes.errors import NoFeasiblePlanError
from passes.fusion import Fused
from passes.local import Storage
from passes.named import alike_axes
from passes.pad import Pad
from passes.price import Budgeted, Priced, price
from passes.program import Program
from passes.recompute import Mode, Recomputation, recomputation
from passes.repeat import is_worth_repeating
from passes.routing import has_routed, route_by_blocks, token_parts
from passes.schedule import Schedule, play
from passes.solve import Solution, solve
from passes.space import Pin, Space, search_space
from passes.uneven import Padding, Paddings, stored_pads, uneven_dims, used_pads

Progress = Callable[[str], None]
BY_HAND = ("ddp", "fsdp", "megatron")
SIMPLEST_FIRST = (*BY_HAND, "auto")
_TIE = 1e-3
"""Relative step time within which the simpler plan is taken."""
HIDDEN_SHARES = (1.0, 0.3, 0.05)
"""What `auto` counts of the time that state gathers and gradient reductions take: all of it, or what often stays
exposed behind compute, or next to nothing. Each gives a proposal; the schedule judges them."""
_SOLUTION_S = 15.0
"""Seconds of the processor that one solution within a budget may take, or of a strategy that was not asked for."""
_LEFT_OUT_S = 30.0
"""Seconds of the processor after which no further padded dim is left out to see whether that is faster."""
_TIGHTENED = 4
"""How often a problem is solved, each time within fewer bytes, until its step fits."""
_AUTO: tuple[Mode, ...] = ("pointwise", "selective", "widening", "full")
"""What `recompute="auto"` tries, each only where the one before does not fit at its fastest: to compute pointwise ops
again costs next to nothing, as they fuse with what reads them."""


@dataclass(frozen=True)
class Request:
    """What a plan is asked for, beside the program and the mesh.

    `budget_bytes`: per device; None: what the hardware has, less its reserve.
    `recompute`: a mode of `passes/recompute.py`, or "auto": the least that fits. `compiled`: whether the step runs
    compiled, which takes less memory. `stored`: parameters that already lie somewhere. `reshard`, `regather`: see
    `Recomputation`; None: "auto" decides by time and memory, or memory alone.
    """

    strategy: str = "auto"
    budget_bytes: int | None = None
    optimizer: str = "adamw"
    accumulate: int = 1
    recompute: Mode | Literal["auto"] = "auto"
    reshard: bool | None = None
    regather: bool | None = None
    compiled: bool = True
    pins: Mapping[str, Pin] = field(default_factory=dict)
    stored: Mapping[str, Storage] | None = None
    async_tp: bool = False
    """Products beside collectives of activations go in parts with them."""
    without: tuple[tuple[str, str], ...] = ()
    """Choices ruled out: (place, option), as a plan's `decisions` has them."""

    def budget_on(self, topology: Topology) -> int:
        """Bytes that a device may use."""
        return self.budget_bytes if self.budget_bytes is not None else int(topology.device.usable_bytes)


@dataclass(frozen=True)
class Origin:
    """How a candidate was found: what the solver proved, and of what.

    `share`: what was counted of the time of state gathers and gradient reductions. `joined`: as in `Search`.
    `recomputed`: what the costs were of; the step as played may compute more again, or keep gathered parameters.
    """

    solution: Solution
    share: float
    joined: bool
    recomputed: Recomputation


@dataclass(frozen=True)
class Candidate:
    """A solution under one strategy, and its step as played.

    `unbound`: the budget kept nothing from being faster. `untried`: the pads that there was no time to leave out.
    """

    strategy: str
    space: Space
    assignment: tuple[int, ...]
    schedule: Schedule
    padding: Padding
    origin: Origin
    unbound: bool
    untried: tuple[Pad, ...] = ()

    @property
    def recompute(self) -> Mode:
        """What backward computes again."""
        return self.space.recomputed.mode


class PaddingsOf:
    """The program's paddings under each strategy: routed experts depend on how many parts the tokens have.

    `rules`: those of calls that no table knows, where they have been found (`Plan.rules`). `fused`: as in `analyse`.
    """

    def __init__(
        self,
        program: Program,
        sizes: Sequence[int],
        batch_axes: tuple[int, ...],
        rules: Mapping[str, str] | None = None,
        *,
        fused: Fused = True,
    ) -> None:
        self._program, self._sizes, self._batch_axes = program, sizes, batch_axes
        self._rules, self._fused = rules, fused
        self._routed = has_routed(program)
        self._known: dict[tuple[int, bool], Paddings] = {}

    @property
    def program(self) -> Program:
        """What they are paddings of."""
        return self._program

    def on(self, sizes: Sequence[int], batch_axes: tuple[int, ...]) -> PaddingsOf:
        """The same program's on another mesh; what is analysed already is not analysed again."""
        other = PaddingsOf(self._program, sizes, batch_axes, self._rules, fused=self._fused)
        other._known = self._known
        return other

    def under(self, strategy: str, repeated_keys: bool = False) -> Paddings:
        """The paddings that plans under `strategy` are made from; `repeated_keys`: see `Paddings`."""
        parts = token_parts(self._program, strategy, self._sizes, self._batch_axes) if self._routed else 1
        if (parts, repeated_keys) not in self._known:
            if repeated_keys:
                whole = self.under(strategy).whole
            else:
                whole = analyse(route_by_blocks(self._program, parts), self._rules, fused=self._fused)
            made = Paddings(whole, self._rules, self._fused, repeated_keys=repeated_keys)
            self._known[parts, repeated_keys] = made
        return self._known[parts, repeated_keys]

    def may_repeat_keys(self, strategy: str) -> bool:
        """Whether plans under `strategy` may repeat keys and values of grouped attention: where that helps to split."""
        parts = math.prod(size for axis, size in enumerate(self._sizes) if axis not in self._batch_axes)
        return strategy in ("auto", "megatron") and parts > 1 and is_worth_repeating(self._program, parts)


@dataclass(frozen=True)
class _Posed:
    """What is solved under a strategy, with these dims padded. After `end_s` (seconds of the processor) solutions
    within a budget are what is found at once, with the gap they have."""

    strategy: str
    padding: Padding
    space: Space
    priced: Priced
    end_s: float


@dataclass
class _Enough:
    """Where to stop: a step of `step_s` fits, and solutions that cost `cost_s` fit or would take no less than that."""

    step_s: float
    cost_s: dict[float, float] = field(default_factory=lambda: defaultdict(lambda: math.inf))
    """By share."""


@dataclass(frozen=True)
class Search:
    """Candidates for one program and mesh; of each kind, `auto` makes `most` proposals at most.

    budgeted_s: seconds of the processor that the solutions of a strategy within a budget may take together.
    joined: axes that are alike choose together. fastest_s: the step of the fastest plan known to fit; what is slower
    before it fits is not looked at further.
    """

    paddings: PaddingsOf
    topology: Topology
    batch_axes: tuple[int, ...]
    request: Request
    budget: float
    progress: Progress = lambda stage: None
    most: int = len(HIDDEN_SHARES)
    budgeted_s: float = 60.0
    joined: bool = False
    fastest_s: float = math.inf

    def candidates(self, name: str) -> list[Candidate]:
        """Solutions under a strategy, the simplest first.

        Over several tensor axes, or several that split the batch, `auto` first has them choose together: what a mesh
        with one axis of as many ranks has, this one has, so no solution is missed for a sum of costs that a richer
        choice lowers and the schedule does not.

        Raises:
            NoFeasiblePlanError: there is none.
        """
        if name != "auto" or max(map(len, alike_axes(self.topology.sizes, self.batch_axes))) < 2:
            return self._padded(name)
        try:
            joined = replace(self, joined=True)._padded(name)
        except (NoFeasiblePlanError, ValueError):  # a pin may tell the axes apart
            return self._padded(name)
        chosen = best(joined, self.budget) or smallest(joined)
        plainly = self.paddings.under(name)
        needed = stored_pads(plainly.whole, self.request.stored or {}, self.topology.sizes)
        alone = uneven_dims(plainly.whole, self.topology.sizes, self.batch_axes, name, alone=True)
        apart = self._tried(name, plainly, needed)
        if chosen.padding.pads != needed or chosen.padding.repeated_keys:
            apart += self._tried(name, self.paddings.under(name, chosen.padding.repeated_keys), chosen.padding.pads)
        if (pads := plainly.join(needed, alone)) not in (needed, chosen.padding.pads):
            apart += self._tried(name, plainly, pads)
        return [*joined, *apart]

    def _padded(self, name: str) -> list[Candidate]:
        """Solutions under a strategy with dims padded where that helps.

        A named strategy pads what it wants to split and cannot otherwise. `auto` pads where that is faster, dim by dim,
        the one with the most padding first.

        Raises:
            NoFeasiblePlanError: there is none.
        """
        plainly = self.paddings.under(name)
        paddings = self.paddings.under(name, self.paddings.may_repeat_keys(name))
        needed = stored_pads(paddings.whole, self.request.stored or {}, self.topology.sizes)
        uneven = uneven_dims(paddings.whole, self.topology.sizes, self.batch_axes, name)
        wanted = paddings.join(needed, uneven)
        if wanted == needed and paddings is plainly:
            return self._solved(name, plainly, needed)
        tried: dict[tuple[Pad, ...], list[Candidate]] = {}
        for each in self._tried(name, paddings, wanted):
            used = paddings.join(needed, used_pads(each.padding, each.space, each.assignment))
            tried.setdefault(used, []).append(each)
        padded = []
        for used, found in tried.items():
            if used == wanted:
                padded += found
            elif used != needed or paddings is not plainly:
                padded += self._tried(name, paddings, used) or found
        if name != "auto":
            return padded if best(padded, self.budget) else self._solved(name, plainly, needed)
        if not padded:
            return self._solved(name, plainly, needed)
        needed = stored_pads(plainly.whole, self.request.stored or {}, self.topology.sizes)
        plain = self._tried(name, plainly, needed)
        chosen = best([*plain, *padded], self.budget)
        end_s, untried = time.process_time() + _LEFT_OUT_S, set()
        for pad in sorted({p for each in padded for p in each.padding.pads}, key=lambda p: (p.size / p.padded, p.node)):
            if chosen is None or pad not in chosen.padding.pads or pad in needed:
                continue
            if time.process_time() > end_s:
                untried.add(pad)
                continue
            fewer = tuple(p for p in chosen.padding.pads if p != pad)
            padded += self._tried(name, paddings, fewer, HIDDEN_SHARES[:1])
            chosen = best([*plain, *padded], self.budget)
        padded = [replace(each, untried=tuple(p for p in each.padding.pads if p in untried)) for each in padded]
        return [*plain, *padded]

    def _tried(
        self, name: str, paddings: Paddings, pads: tuple[Pad, ...], shares: Sequence[float] | None = None
    ) -> list[Candidate]:
        """Solutions with these dims padded; none where nothing fits, a pin asks for what only others allow, or layers
        that are alike would differ, which only the whole graph could play."""
        try:
            return self._solved(name, paddings, pads, shares)
        except (NoFeasiblePlanError, NotPeriodicError, ValueError):
            return []

    def _solved(
        self, name: str, paddings: Paddings, pads: tuple[Pad, ...], shares: Sequence[float] | None = None
    ) -> list[Candidate]:
        """Solutions with these dims padded, those that compute the least again first."""
        request, padding = self.request, paddings.of(pads)
        self.progress(f"solving {name}" + (f", {len(pads)} dims padded" if pads else ""))
        modes = _AUTO if request.recompute == "auto" else (request.recompute,)
        either = (False, True) if request.regather is None else (request.regather,)
        if name not in ("auto", "megatron") or all(axis in self.batch_axes for axis in range(len(self.topology.sizes))):
            either = either[:1]  # state is gathered there, no activations
        space = search_space(
            padding.analysis.program,
            self.topology,
            self.batch_axes,
            request.stored,
            strategy=name,
            pins=request.pins,
            recompute=modes[0],
            reshard=request.reshard is not False,
            joined=self.joined,
            analysis=padding.analysis,
        )
        space = without(replace(space, async_tp=request.async_tp), request.without)
        shares = shares or HIDDEN_SHARES[: self.most if name == "auto" else 1]
        unique: dict[tuple[Mode, bool, tuple[int, ...]], Candidate] = {}
        regathering_suffices = False
        enough = _Enough(self.fastest_s)
        end_s = time.process_time() + self.budgeted_s
        optimizer = Budgeted(int(OPTIMIZERS[request.optimizer].state_bytes_per_param))
        known: dict[tuple[int, int], float] = {}
        for mode, regather in itertools.product(modes, either):
            if regather and regathering_suffices:
                continue
            recomputed = space.recomputed
            if mode != recomputed.mode:
                recomputed = replace(recomputation(padding.analysis, mode), reshard=recomputed.reshard)
            space = replace(space, recomputed=replace(recomputed, regather=regather))
            priced = price(space, optimizer, known)
            posed = _Posed(name, padding, space, priced, end_s)
            unbound = True
            for share in shares:
                candidate = self._fitting(posed, share, enough)
                if candidate is None:
                    unbound = False
                    continue
                unbound = unbound and candidate.unbound
                unique.setdefault((mode, regather, candidate.assignment), candidate)
            if unbound and regather == either[0]:
                break  # nothing that takes less memory is needed
            regathering_suffices = regathering_suffices or unbound
        return list(unique.values())

    def _fitting(self, posed: _Posed, share: float, enough: _Enough) -> Candidate | None:
        """The solution whose played peak fits, where there is one that costs less than is enough: the solver's sum of
        bytes is tightened by what the schedule finds on top of it, until both agree, or what does not fit yet is slower
        than a plan that does.

        None where all cost more than is enough and the cheapest does not fit. A cheapest that fits is played whatever
        it costs: what is computed again may hide behind what is sent, which no sum of costs knows.
        """
        limit = math.inf
        last: Candidate | None = None
        for _ in range(_TIGHTENED):
            try:
                left_s: float | None = min(_SOLUTION_S, max(posed.end_s - time.process_time(), 1.0))
                if math.isinf(limit):
                    left_s = None if posed.strategy == self.request.strategy else _SOLUTION_S
                problem = posed.priced.weighed(share, limit)
                solution = solve(problem, time_limit_s=left_s, below_s=enough.cost_s[share])
            except NoFeasiblePlanError:
                break
            costs_more = solution.bound_s >= enough.cost_s[share]
            assignment = posed.priced.assignment(solution.picks, len(posed.space.sites))
            if last is not None and assignment == last.assignment:
                break
            last, quickest_s = self._played(posed, share, assignment, solution, unlimited=math.isinf(limit))
            over = last.schedule.peak_memory_bytes - self.budget
            if over <= 0:
                enough.step_s = min(enough.step_s, last.schedule.step_time_s)
            if over <= 0 or (quickest_s >= enough.step_s and not math.isinf(limit)):
                enough.cost_s[share] = min(enough.cost_s[share], solution.seconds)
                return last
            if costs_more:
                return None
            limit = min(limit, solution.bytes) - over
            if limit <= 0:
                break
        if last is None:
            given = "the pins and the strategy leave" if self.request.pins else "the strategy leaves"
            raise NoFeasiblePlanError(f"{given} no way from some op to the next")
        return last

    def _played(
        self, posed: _Posed, share: float, assignment: tuple[int, ...], solution: Solution, *, unlimited: bool
    ) -> tuple[Candidate, float]:
        """The solution's step with weight gradients behind what is sent; with all at once, where what waits would not
        fit; and the seconds of the quicker one. `unlimited`: nothing was left out for its bytes."""
        quickest_s = math.inf
        for postpone in (True, False):
            space = replace(posed.space, recomputed=replace(posed.space.recomputed, postpone=postpone))
            schedule = as_asked(space, assignment, self.request)
            quickest_s = min(quickest_s, schedule.step_time_s)
            fits = schedule.peak_memory_bytes <= self.budget
            if fits or not any(c.role == "activation" and c.phase == "backward" for c in schedule.collectives):
                break  # the latter: nothing waited
        origin = Origin(solution, share, self.joined, posed.space.recomputed)
        unbound = unlimited and postpone and fits
        candidate = Candidate(posed.strategy, space, assignment, schedule, posed.padding, origin, unbound)
        return candidate, quickest_s


def best(found: Sequence[Candidate], budget: float) -> Candidate | None:
    """The fastest that fits; candidates come simplest first, and a later one must be faster by more than a tie."""
    chosen: Candidate | None = None
    for candidate in found:
        if candidate.schedule.peak_memory_bytes > budget:
            continue
        if chosen is None or candidate.schedule.step_time_s < chosen.schedule.step_time_s * (1 - _TIE):
            chosen = candidate
    return chosen


def with_parameters_kept(found: Sequence[Candidate], budget: float, request: Request) -> list[Candidate]:
    """Candidates whose gathered parameters stay from forward to backward, where that can be the fastest that fits.

    A candidate gains no more by it than its backward waits for parameters and is slowed down by gathers beside compute,
    and the fewer bytes alive are those at rest and every gathered parameter. Where they do not fit beside what is kept
    for backward, more of that is gathered or computed again.
    """
    kept: list[Candidate] = []
    for candidate in found:
        fastest = best([*found, *kept], budget)
        enough_s = math.inf if fastest is None else fastest.schedule.step_time_s * (1 - _TIE)
        gathers = [c for c in candidate.schedule.collectives if c.role == "parameter" and c.phase == "backward"]
        slowing = {axes: _slowing(axes, candidate.space.topology) for axes in {c.axes for c in gathers}}
        taken_s = sum(c.exposed_s + slowing[c.axes] * c.hidden_s for c in gathers)
        least_s = candidate.schedule.step_time_s - request.accumulate * taken_s
        at_rest = sum(candidate.schedule.memory.by_kind.get(kind, 0) for kind in ("parameters", "optimizer"))
        may_fit = at_rest + sum(c.count * c.bytes for c in gathers) <= budget
        if not gathers or not may_fit or least_s >= enough_s:
            continue
        modes = _AUTO[_AUTO.index(candidate.recompute) :] if request.recompute == "auto" else (candidate.recompute,)
        regather = candidate.space.recomputed.regather
        sends = any(c.role == "activation" and c.kind == "all_gather" for c in candidate.schedule.collectives)
        either = (regather, True) if request.regather is None and sends and not regather else (regather,)
        for again in either:
            for mode in modes:
                kept.append(_kept(candidate, mode, again, request))
                schedule = kept[-1].schedule
                if schedule.peak_memory_bytes <= budget or schedule.step_time_s >= enough_s:
                    break
            if kept[-1].recompute == modes[0]:
                break  # nothing had to be computed again
    return kept


def _kept(candidate: Candidate, mode: Mode, regather: bool, request: Request) -> Candidate:
    """The candidate's layouts with gathered parameters kept for backward, which computes again what `mode` says and,
    where `regather`, gathers activations again."""
    recomputed = candidate.space.recomputed
    if mode != candidate.recompute:
        again = recomputation(candidate.padding.analysis, mode)
        recomputed = replace(again, postpone=recomputed.postpone)
    space = replace(candidate.space, recomputed=replace(recomputed, reshard=False, regather=regather))
    return replace(candidate, space=space, schedule=as_asked(space, candidate.assignment, request))


def as_asked(space: Space, assignment: Sequence[int], request: Request, *, events: bool = False) -> Schedule:
    """The step as it is played with the optimizer, micro-batches and compiler that were asked for; `events`: see
    `play`."""
    return play(
        space,
        assignment,
        optimizer=OPTIMIZERS[request.optimizer],
        accumulate=request.accumulate,
        events=events,
        compiled=request.compiled,
    )


def _slowing(axes: Sequence[str], topology: Topology) -> float:
    """The share of the device that a collective over axes takes from compute beside it, at most."""
    return max(taken_shares([topology.axis(name) for name in axes], topology))


def smallest(found: Sequence[Candidate]) -> Candidate:
    """The one that takes the least memory."""
    return min(found, key=lambda candidate: candidate.schedule.peak_memory_bytes)
