"""The compiler from a captured program to a plan: solve each candidate, play its step, keep the best that fits.

    program -shorten-> a few layers -analyse-> Analysis
    Analysis -search_space, per strategy-> Space -price-> Problem -solve-> picks -play-> Schedule

Where an axis does not divide a dim that it might split, the program with that dim padded competes too.

The solver adds up costs; what overlaps only the schedule knows. So under `auto` several solutions compete, the named
strategies among them, and the schedule decides. A plan that a simpler one ties is not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from costmodel.hardware import Hardware, Topology, topology
from costmodel.memory import ALLOCATION_BYTES, gib
from costmodel.presets import hardware
from passes.errors import NoFeasiblePlanError
from passes.padding.paddings import PaddingsOf
from passes.plan.plan import Baseline, Bound, Plan, check_plan
from passes.planner.decisions import assignment_of
from passes.planner.fitting import Candidate, Request, as_asked, best, looked_at_longer, smallest
from passes.planner.infeasible import Smaller, what_is_needed, why_nothing_fits
from passes.planner.make_plan import baseline, make_plan
from passes.planner.plan_notes import plan_notes
from passes.planner.proposals import BY_HAND, SIMPLEST_FIRST, Progress, Search, with_parameters_kept
from passes.play.blocks import NotPeriodicError
from passes.play.timeline import Timeline, timeline_of
from passes.prepare.by_reductions import by_reductions
from passes.prepare.chunks import split_chunks
from passes.prepare.joined import split_joined
from passes.prepare.masks import use_causal_flag
from passes.prepare.randomness import own_randomness
from passes.prepare.shorten import shorten
from passes.prepare.weights import prepare_again
from passes.program.local import LocalProgram
from passes.program.program import Program
from passes.rewrite.rewrite import rewrite
from passes.space.named import alike_axes, check_strategy
from passes.space.pins import PinError, pinned_layouts
from passes.space.recompute import Mode
from passes.space.space import Pin, Space, search_space
from passes.tokens.one_form import one_form

__all__ = ["Manner", "Progress", "Request", "compile_plan", "local_program", "on_mesh", "prepare"]


@dataclass(frozen=True)
class Manner:
    """How a plan is looked for, and what comes with it; none of this decides which is found.

    `progress` is told each stage. `diagnose`: where nothing fits, plan what would, too. `smaller` gives the program of
    a smaller batch, to say whether that would fit. `keep_timeline`: the plan has its step's timeline.
    """

    progress: Progress = lambda stage: None
    diagnose: bool = True
    smaller: Smaller | None = None
    keep_timeline: bool = False


def prepare(program: Program) -> Program:
    """What is done to a captured program before it is planned."""
    program = split_joined(split_chunks(one_form(own_randomness(use_causal_flag(program)))))
    return prepare_again(by_reductions(program))


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
    manner: Manner | None = None,
    known: dict[str, list[Candidate]] | None = None,
) -> Plan:
    """The best plan found for `program` (as `prepare` left it).

    `options` and `example` are kept in the plan as they are. `known`: candidates by strategy that earlier calls found,
    which differed in the strategy asked for alone; what this one finds is added.

    Raises:
        NoFeasiblePlanError: nothing fits; says by how much, what is largest, what conflicts, and what would fit.
        ValueError: an unknown strategy, a pin that cannot be, a batch that the batch axes do not divide.
    """
    check_strategy(request.strategy)
    asked = _Asked(topology_, tuple(batch_axes), request, dict(options or {}), example, manner or Manner())
    asked.manner.progress("analysing the graph")
    try:
        # a pin may name one layer alone
        plan, chosen = _compiled(program if request.pins else shorten(program), asked, {} if known is None else known)
    except NotPeriodicError:
        plan, chosen = _compiled(program, asked, {})  # what is known is of the shorter program
    if not asked.manner.keep_timeline:
        return plan
    if chosen.space.program.repeated:
        space = space_of(program, plan, topology_, request.pins)
        space = replace(space, async_tp=request.async_tp)
        chosen = replace(chosen, space=space, assignment=assignment_of(plan, space))
    return replace(plan, timeline=_timeline(chosen, request))


@dataclass(frozen=True)
class _Asked:
    """What `compile_plan` was asked for, of whichever program."""

    topology: Topology
    batch_axes: tuple[int, ...]
    request: Request
    options: Mapping[str, Any]
    example: str
    manner: Manner


def _compiled(program: Program, asked: _Asked, found: dict[str, list[Candidate]]) -> tuple[Plan, Candidate]:
    """The plan, and the candidate that it is; `found`: candidates by strategy, to which new ones are added."""
    request = asked.request
    paddings = PaddingsOf(program, asked.topology.sizes, asked.batch_axes, fused=request.compiled)
    budget = request.budget_on(asked.topology)
    search = Search(paddings, asked.topology, asked.batch_axes, request, budget, asked.manner.progress)
    reasons = _look(search, found)
    competing = [candidate for name in _competing(request) for candidate in found.get(name, [])]
    competing += _with_parameters_kept(competing, search)
    chosen = best(competing, budget)
    if chosen is not None and _may_keep(request) and (keeping := search.keeping(chosen, competing)):
        competing += keeping
        chosen = best(competing, budget)
    if chosen is None:
        if not asked.manner.diagnose:
            raise NoFeasiblePlanError(what_is_needed(search, competing, reasons))
        raise why_nothing_fits(search, competing, reasons, asked.manner.smaller)
    if not chosen.origin.solution.is_proved:
        asked.manner.progress("proving the fastest")
        longer = looked_at_longer(chosen, request, budget)
        longer += _with_parameters_kept(longer, search)
        chosen = best(longer[::-1], budget) or chosen
    baselines = {name: _as_baseline(found.get(name, []), reasons.get(name, ""), budget) for name in BY_HAND}
    plan = make_plan(
        chosen.space,
        chosen.assignment,
        chosen.schedule,
        bound=_bound(chosen, len(competing)),
        baselines={name: b for name, b in baselines.items() if b is not None},
        budget_bytes=budget,
        notes=plan_notes(chosen, search),
        padded=chosen.padding.pads,
        repeated_keys=chosen.padding.repeated_keys,
        pinned=pinned_layouts(chosen.space.analysis, request.pins, len(asked.topology.axes)),
        strategy=chosen.strategy,
        options=asked.options,
        example=asked.example,
    )
    return plan, chosen


def _competing(request: Request) -> tuple[str, ...]:
    """The strategies that a plan may be of, the simplest first."""
    return SIMPLEST_FIRST if request.strategy == "auto" and request.stored is None else (request.strategy,)


def _look(search: Search, found: dict[str, list[Candidate]]) -> dict[str, str]:
    """Adds the candidates of each strategy to `found`; why others have none. What people would write by hand is looked
    at too, to be compared with.

    Raises:
        PinError: the pins leave no strategy that a plan may be of anything.
    """
    names = _competing(search.request)
    beside = BY_HAND if search.request.stored is None else ()
    reasons: dict[str, str] = {}
    refused: dict[str, PinError] = {}
    for name in (*beside, *(name for name in names if name not in beside)):
        if name in found:
            continue
        fits = best([candidate for others in found.values() for candidate in others], search.budget)
        fastest_s = fits.schedule.step_time_s if fits is not None and name == "auto" else math.inf
        try:
            found[name] = replace(search, fastest_s=fastest_s).candidates(name)
        except NoFeasiblePlanError as error:
            reasons[name] = str(error)
        except PinError as error:
            refused[name], reasons[name] = error, "it has no layout that the pins ask for"
    if refused.keys() >= set(names):
        raise refused[names[-1]]
    return reasons


def _with_parameters_kept(candidates: Sequence[Candidate], search: Search) -> list[Candidate]:
    """The candidates with gathered parameters kept, where that is left to decide, as far as they fit."""
    return with_parameters_kept(candidates, search.budget, search.request) if _may_keep(search.request) else []


def _may_keep(request: Request) -> bool:
    """Whether it is left to `auto` to keep gathered parameters."""
    return request.strategy == "auto" and request.reshard is None


_CHEAPEST: tuple[Mode, ...] = ("none", "pointwise")
"""What may be computed again at no cost."""


def _bound(chosen: Candidate, played: int) -> Bound:
    """What was proved of the one chosen among so many that were played."""
    note = "it is the only solution that was played as a schedule"
    if played > 1:
        note = f"it is the fastest that fits of the {played} solutions that were played as schedules"
    counted = "with no overlap counted"
    origin = chosen.origin
    if origin.share < 1.0:
        counted = f"with {origin.share:.0%} of the time of state gathers and gradient reductions"
    mesh = chosen.space.topology
    alike = [axes for axes in alike_axes(mesh.sizes, chosen.space.batch_axes) if origin.joined and len(axes) > 1]
    among = ", and ".join(" and ".join(mesh.axes[axis].name for axis in axes) for axes in alike)
    among = f" where {among} do the same" if among else ""
    solved, played_as = origin.recomputed, chosen.space.recomputed
    if chosen.padding.pads or chosen.padding.repeated_keys:
        among += " with the same dims padded"
    if solved.mode != played_as.mode or solved.mode not in _CHEAPEST:
        among += f" with recompute {solved.mode!r}"
    if solved.regather:
        among += " with activations gathered again for backward"
    if solved.reshard and not played_as.reshard:
        among += " with parameters gathered again for backward"
    if math.isfinite(origin.limit_bytes):
        among += f" within {gib(origin.limit_bytes)} as the solver adds bytes up"
    return Bound(origin.solution.seconds, origin.solution.bound_s, note, counted, among)


def _timeline(chosen: Candidate, request: Request) -> Timeline:
    """The chosen step, played once more with everything that happens in it kept."""
    schedule = as_asked(chosen.space, chosen.assignment, request, events=True)
    return timeline_of(schedule, 1 if chosen.space.topology.device.is_cpu else ALLOCATION_BYTES)


def local_program(program: Program, plan: Plan, topology_: Topology, pins: Mapping[str, Pin]) -> LocalProgram:
    """One rank's program under `plan`, which was made with `pins`.

    Raises:
        PlanMismatchError: the plan is for another graph or mesh.
    """
    check_plan(plan, program.fingerprint, [(axis.name, axis.size) for axis in topology_.axes])
    space = space_of(program, plan, topology_, pins)
    return rewrite(space, assignment_of(plan, space))


def space_of(
    program: Program, plan: Plan, topology_: Topology, pins: Mapping[str, Pin], strategy: str | None = None
) -> Space:
    """What a plan for `program` was chosen from, or would be under another strategy."""
    strategy = strategy or plan.strategy
    names = [axis.name for axis in topology_.axes]
    batch_axes = [names.index(name) for name in plan.batch_axes]
    paddings = PaddingsOf(program, topology_.sizes, tuple(batch_axes), plan.rules)
    analysis = paddings.under(strategy, plan.repeated_keys).of(plan.padded).analysis
    space = search_space(
        analysis.program,
        topology_,
        batch_axes,
        strategy=strategy,
        pins=pins,
        recompute=plan.recompute,
        reshard=plan.reshard,
        analysis=analysis,
    )
    return replace(space, recomputed=replace(space.recomputed, regather=plan.regather, postpone=plan.postpone))


def _as_baseline(found: Sequence[Candidate], reason: str, budget: int) -> Baseline | None:
    if found:
        return baseline((best(found, budget) or smallest(found)).schedule, budget)
    return Baseline(math.inf, 0, False, reason) if reason else None
