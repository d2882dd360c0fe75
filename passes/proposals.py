"""Candidates for a plan: under each strategy, and each way to compute again what does not fit, what the solver proposes
and the schedule makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from costmodel.hardware import Topology
from costmodel.layout import Layout
from costmodel.memory import OPTIMIZERS
from passes.analysis import Analysis
from passes.errors import NoFeasiblePlanError
from passes.local import Storage
from passes.price import Budgeted, price
from passes.recompute import Mode, recomputation
from passes.schedule import Schedule, play
from passes.solve import Solution, solve
from passes.space import Space, search_space

SIMPLEST_FIRST = ("ddp", "fsdp", "megatron", "auto")
_TIE = 1e-3
"""Relative step time within which the simpler plan is taken."""
_HIDDEN_SHARES = (1.0, 0.3, 0.05)
"""What `auto` counts of the time that state gathers and gradient reductions take: all of it, or what often stays
exposed behind compute, or next to nothing. Each gives a proposal; the schedule judges them."""
_AUTO: tuple[Mode, ...] = ("pointwise", "selective", "full")
"""What `recompute="auto"` tries, each only where the one before does not fit at its fastest: to compute pointwise ops
again costs next to nothing, as they fuse with what reads them."""


@dataclass(frozen=True)
class Request:
    """What a plan is asked for, beside the program and the mesh.

    `budget_bytes`: per device; None: what the hardware has, less its reserve.
    `recompute`: a mode of `passes/recompute.py`, or "auto": the least that fits. `compiled`: whether the step runs
    compiled, which takes less memory. `stored`: parameters that already lie somewhere.
    """

    strategy: str = "auto"
    budget_bytes: int | None = None
    optimizer: str = "adamw"
    accumulate: int = 1
    recompute: Mode | Literal["auto"] = "auto"
    compiled: bool = True
    pins: Mapping[str, Layout] = field(default_factory=dict)
    stored: Mapping[str, Storage] | None = None

    def budget_on(self, topology: Topology) -> int:
        """Bytes that a device may use."""
        return self.budget_bytes if self.budget_bytes is not None else int(topology.device.usable_bytes)


@dataclass(frozen=True)
class Candidate:
    """A solution under one strategy, and its step as played; `unbound`: the budget kept nothing from being faster."""

    strategy: str
    space: Space
    assignment: tuple[int, ...]
    solution: Solution
    schedule: Schedule
    unbound: bool

    @property
    def recompute(self) -> Mode:
        """What backward computes again."""
        return self.space.recomputed.mode


def proposals(
    analysis: Analysis,
    topology: Topology,
    batch_axes: Sequence[int],
    request: Request,
    name: str,
    budget: float,
    *,
    most: int = len(_HIDDEN_SHARES),
) -> list[Candidate]:
    """Solutions under strategy `name`, those that compute the least again first; of each, `auto` makes `most` at most.

    Raises:
        NoFeasiblePlanError: the strategy and the pins leave an op without a layout.
    """
    modes = _AUTO if request.recompute == "auto" else (request.recompute,)
    space = search_space(
        analysis.program,
        topology,
        batch_axes,
        request.stored,
        strategy=name,
        pins=request.pins,
        recompute=modes[0],
        analysis=analysis,
    )
    shares = _HIDDEN_SHARES[:most] if name == "auto" else _HIDDEN_SHARES[:1]
    unique: dict[tuple[Mode, tuple[int, ...]], Candidate] = {}
    for mode in modes:
        if mode != modes[0]:
            space = replace(space, recomputed=recomputation(analysis, mode))
        found = [_solved_within(space, name, request, budget, share) for share in shares]
        for candidate in found:
            unique.setdefault((mode, candidate.assignment), candidate)
        if all(candidate.unbound for candidate in found):
            break
    return list(unique.values())


def _solved_within(space: Space, name: str, request: Request, budget: float, share: float) -> Candidate:
    """The solution whose played peak fits, where there is one: the solver's sum of bytes is tightened by what the
    schedule finds on top of it, until both agree."""
    spec = OPTIMIZERS[request.optimizer]
    limit = math.inf
    last: Candidate | None = None
    for _ in range(4):
        priced = price(space, limit, Budgeted(int(spec.state_bytes_per_param)), state_share=share)
        try:
            solution = solve(priced.problem)
        except NoFeasiblePlanError:
            break
        assignment = priced.assignment(solution.picks, len(space.sites))
        if last is not None and assignment == last.assignment:
            break
        schedule = play(space, assignment, optimizer=spec, accumulate=request.accumulate, compiled=request.compiled)
        over = schedule.peak_memory_bytes - budget
        last = Candidate(name, space, assignment, solution, schedule, unbound=over <= 0 and math.isinf(limit))
        if over <= 0:
            return last
        limit = min(limit, solution.bytes) - over
        if limit <= 0:
            break
    if last is None:
        raise NoFeasiblePlanError("the pins and the strategy leave no way from some op to the next")
    return last


def best(found: Sequence[Candidate], budget: float) -> Candidate | None:
    """The fastest that fits; candidates come simplest first, and a later one must be faster by more than a tie."""
    chosen: Candidate | None = None
    for candidate in found:
        if candidate.schedule.peak_memory_bytes > budget:
            continue
        if chosen is None or candidate.schedule.step_time_s < chosen.schedule.step_time_s * (1 - _TIE):
            chosen = candidate
    return chosen


def smallest(found: Sequence[Candidate]) -> Candidate:
    """The one that takes the least memory."""
    return min(found, key=lambda candidate: candidate.schedule.peak_memory_bytes)
