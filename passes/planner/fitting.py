"""What the solver proposes and the schedule makes of it: solutions whose step, as played, fits in memory.

    bytes that the solver may count -> solve -> play -> so much over the budget -> fewer bytes

Many are looked for and one is chosen. So each is solved for a few seconds at most, and the chosen one again until it is
proved (`looked_at_longer`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from costmodel.hardware import Topology
from costmodel.memory import OPTIMIZERS
from passes.errors import NoFeasiblePlanError
from passes.padding.pad import Pad
from passes.padding.paddings import Padding
from passes.play.schedule import Schedule, play
from passes.play.tracks import Costs, tracks
from passes.price.price import Priced, price
from passes.program.local import Storage
from passes.solver.linear import Near
from passes.solver.solve import PROVED_GAP, Solution, solve
from passes.space.recompute import Mode, Recomputation
from passes.space.space import Pin, Space

TIE = 1e-3
"""Relative step time within which the simpler plan is taken."""
_UNBOUND_S = 15.0
"""Seconds of the processor that a solution without a budget may take, of a strategy that was not asked for."""
_QUICK_S = 2.0
"""Seconds of the processor that one of many solutions within a budget may take."""
_PROOF_S = 30.0
"""Seconds of the processor that the proof of the chosen one may take."""
_TIGHTENED = 4
"""How often a problem is solved, each time within fewer bytes, until its step fits."""
_HOPELESS = 1.03
"""How much slower than a step that fits one may be that does not fit, for what fits of its kind to be looked for still:
it would be slower, but may gain by what is tried on it then."""
_LEAST_SLOPE = 0.3
"""Bytes that a step's peak is taken to fall by, at least, for each that the solver counts less."""


@dataclass(frozen=True)
class Request:
    """What a plan is asked for, besides the program and the mesh.

    `budget_bytes`: per device; None: what the hardware has, less its reserve. `recompute`: a mode of
    `passes/space/recompute.py`, or "auto": the least that fits. `compiled`: whether the step runs compiled, which takes
    less memory. `stored`: parameters whose storage is given. `reshard`, `regather`: see `Recomputation`; None: "auto"
    decides by time and memory, or memory alone.
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
    """How a candidate was found: the solution, and the problem that it solves.

    `share`: the share of the time of state gathers and gradient reductions that the costs count. `joined`: as in
    `Search`. `recomputed`: what the costs were computed for; the step as played may recompute more, or keep gathered
    parameters. `limit_bytes`: the solver's memory budget.
    """

    solution: Solution
    share: float
    joined: bool
    recomputed: Recomputation
    limit_bytes: float = math.inf


@dataclass(frozen=True)
class Candidate:
    """A solution under one strategy, and its step as played.

    `unbound`: the budget did not keep it from being faster. `untried`: pads that there was no time to leave out.
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


@dataclass(frozen=True)
class Posed:
    """A problem under one strategy, with these dims padded, whose step is to be played within `budget` bytes; `costs`:
    see `tracks`."""

    request: Request
    budget: float
    strategy: str
    joined: bool
    padding: Padding
    space: Space
    priced: Priced
    costs: Costs


@dataclass
class Enough:
    """When to stop: a step of `step_s` is known to fit, and solutions that cost `cost_s` or more cannot improve on
    it."""

    step_s: float
    cost_s: dict[float, float] = field(default_factory=lambda: defaultdict(lambda: math.inf))
    """By share."""


def fitting(posed: Posed, share: float, enough: Enough) -> Candidate | None:
    """A solution whose played peak fits in the budget; None where all cost more than is enough and the cheapest does
    not fit.

    The solver only knows a sum of bytes, so its budget is tightened by what the played peak exceeds it, until the peak
    fits or the solution is slower than a plan that does. The cheapest solution is played whatever it costs, if it fits:
    recomputation may hide behind communication, which a sum of costs does not see.

    Raises:
        NoFeasiblePlanError: there is no solution at all.
    """
    limit = math.inf
    last: Candidate | None = None
    tighter = Near()
    for turn in range(_TIGHTENED):
        most_s: float | None = _QUICK_S
        if math.isinf(limit):
            most_s = None if posed.strategy == posed.request.strategy else _UNBOUND_S
        try:
            problem = posed.priced.weighed(share, limit)
            near = None if math.isinf(limit) else tighter
            solution = solve(problem, time_limit_s=most_s, below_s=enough.cost_s[share], near=near)
        except NoFeasiblePlanError:
            break
        costs_more = solution.bound_s >= enough.cost_s[share]
        assignment = posed.priced.assignment(solution.picks, len(posed.space.sites))
        if last is not None and assignment == last.assignment:
            break
        before = last
        origin = Origin(solution, share, posed.joined, posed.space.recomputed, limit)
        last, quickest_s = _played(posed, assignment, origin)
        over = last.schedule.peak_memory_bytes - posed.budget
        if over <= 0:
            enough.step_s = min(enough.step_s, last.schedule.step_time_s)
        if over <= 0 or quickest_s >= enough.step_s * (_HOPELESS if math.isinf(limit) else 1.0):
            enough.cost_s[share] = min(enough.cost_s[share], solution.seconds)
            return last
        if costs_more:
            return None
        limit = min(limit, solution.bytes) - over / (_slope(before, last) if turn + 2 == _TIGHTENED else 1.0)
        if limit <= 0:
            break
    if last is None:
        given = "the pins and the strategy leave" if posed.request.pins else "the strategy leaves"
        raise NoFeasiblePlanError(f"{given} no way from some op to the next")
    return last


def _slope(before: Candidate | None, last: Candidate) -> float:
    """Bytes by which the played peak fell per byte that the solver saved; 1 where that is not known."""
    if before is None:
        return 1.0
    counted = before.origin.solution.bytes - last.origin.solution.bytes
    fell = before.schedule.peak_memory_bytes - last.schedule.peak_memory_bytes
    return min(max(fell / counted, _LEAST_SLOPE), 1.0) if counted > 0 else 1.0


def _played(posed: Posed, assignment: tuple[int, ...], origin: Origin) -> tuple[Candidate, float]:
    """The solution's step with weight gradients behind what is sent; with all at once, where what waits would not
    fit; and the seconds of the quicker one."""
    quickest_s = math.inf
    for postpone in (True, False):
        space = replace(posed.space, recomputed=replace(posed.space.recomputed, postpone=postpone))
        schedule = as_asked(space, assignment, posed.request, costs=posed.costs)
        quickest_s = min(quickest_s, schedule.step_time_s)
        fits = schedule.peak_memory_bytes <= posed.budget
        if fits or not any(c.role == "activation" and c.phase == "backward" for c in schedule.collectives):
            break  # the latter: nothing waited
    unbound = math.isinf(origin.limit_bytes) and postpone and fits
    candidate = Candidate(posed.strategy, space, assignment, schedule, posed.padding, origin, unbound)
    return candidate, quickest_s


def looked_at_longer(chosen: Candidate, request: Request, budget: float) -> list[Candidate]:
    """The chosen candidate proved further, as far as time allows, after a cheaper solution that fits, if one is found.

    As in `fitting`, a cheaper solution whose played peak does not fit is sought again within fewer bytes. Whatever fits
    in as many bytes costs no less than the bound.
    """
    origin, known = chosen.origin, chosen.origin.solution
    space = replace(chosen.space, recomputed=origin.recomputed)
    priced = price(space, OPTIMIZERS[request.optimizer], {})
    posed = Posed(request, budget, chosen.strategy, origin.joined, chosen.padding, space, priced, {})
    end_s = time.process_time() + _PROOF_S
    limit, bound_s, near = origin.limit_bytes, known.bound_s, Near()
    cheaper: list[Candidate] = []
    for _ in range(_TIGHTENED):
        left_s = end_s - time.process_time()
        if left_s <= 0 or limit <= 0:
            break
        try:
            problem = priced.weighed(origin.share, limit)
            solution = solve(problem, gap=PROVED_GAP, time_limit_s=left_s, known=[known.picks], near=near)
        except NoFeasiblePlanError:
            break
        if known.bytes <= limit:
            bound_s = max(bound_s, solution.bound_s)
        if solution.seconds >= known.seconds:
            break
        assignment = priced.assignment(solution.picks, len(space.sites))
        played, _ = _played(posed, assignment, replace(origin, solution=solution, limit_bytes=limit))
        over = played.schedule.peak_memory_bytes - budget
        if over <= 0:
            cheaper = [replace(played, untried=chosen.untried)]
            break
        limit = min(limit, solution.bytes) - over
    proved = replace(known, bound_s=min(bound_s, known.seconds))
    return [*cheaper, replace(chosen, origin=replace(origin, solution=proved))]


def as_asked(
    space: Space, assignment: Sequence[int], request: Request, *, events: bool = False, costs: Costs | None = None
) -> Schedule:
    """The step as it is played with the optimizer, micro-batches and compiler that were asked for; `events`: see
    `play`, `costs`: see `tracks`."""
    return play(
        space,
        assignment,
        optimizer=OPTIMIZERS[request.optimizer],
        accumulate=request.accumulate,
        events=events,
        compiled=request.compiled,
        laid=tracks(space, assignment, costs),
    )


def best(found: Sequence[Candidate], budget: float) -> Candidate | None:
    """The fastest that fits. Candidates come simplest first; a later one must be faster by more than a tie."""
    chosen: Candidate | None = None
    for candidate in found:
        if candidate.schedule.peak_memory_bytes > budget:
            continue
        if chosen is None or candidate.schedule.step_time_s < chosen.schedule.step_time_s * (1 - TIE):
            chosen = candidate
    return chosen


def smallest(found: Sequence[Candidate]) -> Candidate:
    """The one that takes the least memory."""
    return min(found, key=lambda candidate: candidate.schedule.peak_memory_bytes)
