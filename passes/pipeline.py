"""The compiler from a captured program to a plan: solve each candidate, play its step, keep the best that fits.

    program -analyse-> Analysis -search_space, per strategy-> Space -price-> Problem -solve-> picks -play-> Schedule

The solver adds up costs; what overlaps only the schedule knows. So under `auto` several solutions compete, the named
strategies among them, and the schedule decides. A plan that a simpler one ties is not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from costmodel.hardware import Hardware, Topology, hardware, topology
from costmodel.layout import Layout
from costmodel.memory import OPTIMIZERS, OptimizerSpec
from passes.analysis import Analysis, analyse
from passes.errors import NoFeasiblePlanError
from passes.local import LocalProgram, Storage
from passes.masks import use_causal_flag
from passes.named import STRATEGIES, check_strategy
from passes.plan import Baseline, Bound, Plan, assignment_of, baseline, make_plan
from passes.price import Budgeted, Priced, price
from passes.program import Program
from passes.randomness import own_randomness
from passes.rewrite import rewrite
from passes.schedule import Schedule, play
from passes.solve import Solution, solve
from passes.space import Space, search_space
from passes.weights import prepare_again

_TIE = 1e-3
"""Relative step time within which the simpler plan is taken."""
_SIMPLEST_FIRST = ("ddp", "fsdp", "megatron", "auto")
_HIDDEN_SHARES = (1.0, 0.3, 0.05)
"""What `auto` counts of the time that state gathers and gradient reductions take: all of it, or what often stays
exposed behind compute, or next to nothing. Each gives a proposal; the schedule judges them."""

Progress = Callable[[str], None]


def prepare(program: Program) -> Program:
    """What is done to a captured program before it is planned."""
    return prepare_again(own_randomness(use_causal_flag(program)))


@dataclass(frozen=True)
class Request:
    """What a plan is asked for, beside the program and the mesh.

    `budget_bytes`: per device; None: what the hardware has, less its reserve.
    `stored`: parameters that already lie somewhere.
    """

    strategy: str = "auto"
    budget_bytes: int | None = None
    optimizer: str = "adamw"
    accumulate: int = 1
    pins: Mapping[str, Layout] = field(default_factory=dict)
    stored: Mapping[str, Storage] | None = None


@dataclass(frozen=True)
class Candidate:
    """A solution under one strategy, and its step as played."""

    strategy: str
    space: Space
    assignment: tuple[int, ...]
    solution: Solution
    schedule: Schedule


def on_mesh(hardware_: str | Hardware | None, axes: Sequence[tuple[str, int]]) -> Topology:
    """The mesh laid over the hardware, the last axis innermost."""
    return topology(hardware(hardware_), tuple(axes))


def compile_plan(
    program: Program,
    topology_: Topology,
    batch_axes: Sequence[int],
    request: Request,
    *,
    options: Mapping[str, Any] | None = None,
    example: str = "",
    progress: Progress = lambda stage: None,
) -> Plan:
    """The best plan found for `program` (as `prepare` left it).

    `options` and `example` are kept in the plan as they are.

    Raises:
        NoFeasiblePlanError: nothing fits; says by how much, what is largest, and the nearest change that would fit.
        ValueError: an unknown strategy, a pin that cannot be, a batch that the batch axes do not divide.
    """
    check_strategy(request.strategy)
    progress("analysing the graph")
    analysis = analyse(program)
    budget = request.budget_bytes if request.budget_bytes is not None else int(topology_.device.usable_bytes)
    found: dict[str, list[Candidate]] = {}
    reasons: dict[str, str] = {}
    names = _SIMPLEST_FIRST if request.stored is None else (request.strategy,)
    for name in names:
        progress(f"solving {name}")
        try:
            found[name] = _candidates(analysis, topology_, batch_axes, request, name, budget)
        except NoFeasiblePlanError as error:
            reasons[name] = str(error)
    asked = _SIMPLEST_FIRST if request.strategy == "auto" and request.stored is None else (request.strategy,)
    competing = [candidate for name in asked for candidate in found.get(name, [])]
    chosen = _best(competing, budget)
    if chosen is None:
        raise NoFeasiblePlanError(_why_nothing_fits(competing, reasons, budget, topology_))
    baselines = {name: _as_baseline(found.get(name, []), reasons.get(name, ""), budget) for name in STRATEGIES[1:]}
    bound = Bound(
        chosen.solution.seconds,
        chosen.solution.bound_s,
        f"of the summed costs under {chosen.strategy!r}; the schedule chose among {len(competing)} solutions",
    )
    return make_plan(
        chosen.space,
        chosen.assignment,
        chosen.schedule,
        bound=bound,
        baselines={name: b for name, b in baselines.items() if b is not None},
        budget_bytes=budget,
        notes=program.notes,
        strategy=chosen.strategy,
        options=dict(options or {}),
        example=example,
    )


def local_program(program: Program, plan: Plan, topology_: Topology, pins: Mapping[str, Layout]) -> LocalProgram:
    """One rank's program under `plan`, which was made with `pins`.

    Raises:
        PlanMismatchError: the plan is for another graph or mesh.
    """
    names = [axis.name for axis in topology_.axes]
    batch_axes = [names.index(name) for name in plan.batch_axes]
    space = search_space(program, topology_, batch_axes, strategy=plan.strategy, pins=pins)
    return rewrite(space, assignment_of(plan, space))


def _candidates(
    analysis: Analysis, topology_: Topology, batch_axes: Sequence[int], request: Request, name: str, budget: int
) -> list[Candidate]:
    space = search_space(
        analysis.program,
        topology_,
        batch_axes,
        request.stored,
        strategy=name,
        pins=request.pins,
        analysis=analysis,
    )
    spec = OPTIMIZERS[request.optimizer]
    shares = _HIDDEN_SHARES if name == "auto" else _HIDDEN_SHARES[:1]
    unique: dict[tuple[int, ...], Candidate] = {}
    for share in shares:
        candidate = _solved_within(space, name, spec, request.accumulate, budget, share)
        unique.setdefault(candidate.assignment, candidate)
    return list(unique.values())


def _solved_within(
    space: Space, name: str, optimizer: OptimizerSpec, accumulate: int, budget: int, share: float
) -> Candidate:
    """The solution whose played peak fits, where there is one: the solver's sum of bytes is tightened by what the
    schedule finds on top of it, until both agree."""
    limit = math.inf
    kept = Budgeted(int(optimizer.state_bytes_per_param + optimizer.master_bytes_per_param))
    last: Candidate | None = None
    for _ in range(4):
        priced = price(space, limit, kept, state_share=share)
        try:
            solution = solve(priced.problem)
        except NoFeasiblePlanError:
            break
        last = _played(space, name, priced, solution, optimizer, accumulate)
        over = last.schedule.peak_memory_bytes - budget
        if over <= 0:
            return last
        limit = min(limit, solution.bytes) - over
        if limit <= 0:
            break
    assert last is not None
    return last


def _played(
    space: Space, name: str, priced: Priced, solution: Solution, optimizer: OptimizerSpec, accumulate: int
) -> Candidate:
    assignment = priced.assignment(solution.picks, len(space.sites))
    schedule = play(space, assignment, optimizer=optimizer, accumulate=accumulate)
    return Candidate(name, space, assignment, solution, schedule)


def _best(candidates: Sequence[Candidate], budget: int) -> Candidate | None:
    """The fastest that fits; candidates come simplest first, and a later one must be faster by more than a tie."""
    best: Candidate | None = None
    for candidate in candidates:
        if candidate.schedule.peak_memory_bytes > budget:
            continue
        if best is None or candidate.schedule.step_time_s < best.schedule.step_time_s * (1 - _TIE):
            best = candidate
    return best


def _as_baseline(candidates: Sequence[Candidate], reason: str, budget: int) -> Baseline | None:
    if candidates:
        return baseline(candidates[0].schedule, budget)
    return Baseline(math.inf, 0, False, reason) if reason else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def _why_nothing_fits(
    candidates: Sequence[Candidate], reasons: Mapping[str, str], budget: int, topology_: Topology
) -> str:
    if not candidates:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    nearest = min(candidates, key=lambda c: c.schedule.peak_memory_bytes)
    schedule = nearest.schedule
    needed = schedule.peak_memory_bytes
    top = schedule.memory.top[0]
    kinds = ", ".join(
        f"{kind} {_gib(size)}" for kind, size in sorted(schedule.memory.by_kind.items(), key=lambda i: -i[1])
    )
    return (
        f"no plan fits in {_gib(budget)} per device: the smallest found ({nearest.strategy}) needs {_gib(needed)}, "
        f"{_gib(needed - budget)} too much, at {schedule.peak_moment}. By kind: {kinds}. Largest tensor: {top.name} "
        f"({_gib(top.bytes)}). {_what_would_fit(schedule, budget, topology_)}"
    )


def _what_would_fit(schedule: Schedule, budget: int, topology_: Topology) -> str:
    """The smallest change that would fit, by the parts of the peak that scale with the batch and with the ranks."""
    by_kind = dict(schedule.memory.by_kind)
    at_rest = sum(by_kind.get(kind, 0) for kind in ("parameters", "gradients", "optimizer"))
    rest = schedule.peak_memory_bytes - at_rest
    ways = [f"Options(memory_budget={schedule.peak_memory_bytes}), if the device has that much"]
    if at_rest < budget and rest > 0:
        ways.insert(0, f"a batch per rank {math.ceil(rest / (budget - at_rest))} times smaller")
    elif at_rest > 0:
        ranks = topology_.ranks * math.ceil(at_rest / max(1, budget - min(rest, budget // 2)))
        ways.insert(0, f"about {ranks} ranks instead of {topology_.ranks} to share parameters and optimizer states")
    return "What would fit: " + "; or ".join(ways) + "."
