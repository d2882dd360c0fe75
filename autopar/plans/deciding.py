"""Why a plan has what it has at a place: the same problem solved with that choice ruled out, and what that costs.

The runner-up is a whole plan: everything else moved to where it is best then, under no strategy. What it takes more of,
by the ledger's lines, is the neighbour that decided. Where another strategy was asked for and `auto` chooses otherwise,
the strategy did; where the plan that is best without a memory budget does not fit, the budget did.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar import planning
from autopar.options import Options
from costmodel.layout import Layout, Placement, Replicate, Shard, layout_text, parse_layout
from costmodel.memory import gib
from passes.errors import NoFeasiblePlanError
from passes.plan.plan import Placements, Plan
from passes.plan.report_text import seconds_text
from passes.planner.decisions import Place, places
from passes.planner.pipeline import Manner, Progress, on_mesh, space_of
from passes.program.program import Program

_TIE = 1e-3
_NO_BUDGET = 1 << 60


@dataclass(frozen=True)
class Alternative:
    """Another layout at a place with all else solved anew; infinite where there is no plan with it."""

    layout: str
    step_time_s: float
    peak_memory_bytes: int
    why_not: str = ""
    plan: Plan | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Decision:
    """A place, what was chosen there, and its alternatives, best first."""

    place: str
    chosen: str
    source: str
    alternatives: tuple[Alternative, ...]
    decided_by: str

    @property
    def runner_up(self) -> Alternative | None:
        """The best other plan."""
        return next((other for other in self.alternatives if not other.why_not), None)


@dataclass(frozen=True)
class Question:
    """A plan and the program it is for, to be solved again under other conditions."""

    plan: Plan
    program: Program
    options: Options

    def solved(self, *, without: Sequence[tuple[str, str]] = (), **changed: object) -> Plan:
        """The plan with options changed and some choices ruled out.

        Raises:
            NoFeasiblePlanError: there is none.
        """
        plan = self.plan
        return planning.planned(
            self.program,
            plan.axes,
            batch_axes=self.batch_axes,
            hardware=planning.hardware_in(plan),
            strategy="auto",
            options=replace(self.options, **changed),  # type: ignore[arg-type]
            example=plan.example,
            without=without,
            manner=Manner(diagnose=False),
        )

    @cached_property
    def unbounded(self) -> Plan | None:
        """The plan without a memory budget."""
        with suppress(NoFeasiblePlanError):
            return self.solved(memory_budget=_NO_BUDGET)
        return None

    @cached_property
    def unrestricted(self) -> Plan | None:
        """The plan under `auto`, where another strategy was asked for."""
        if planning.asked_of(self.plan) == "auto":
            return None
        with suppress(NoFeasiblePlanError):
            return self.solved()
        return None

    @property
    def batch_axes(self) -> list[int]:
        """Indices of the plan's batch axes."""
        names = [name for name, _ in self.plan.axes]
        return [names.index(name) for name in self.plan.batch_axes]

    def places(self) -> list[Place]:
        """All places the plan decides on."""
        mesh = on_mesh(planning.hardware_in(self.plan), self.plan.axes)
        return places(space_of(self.program, self.plan, mesh, planning.pins_of(self.options), "auto"))


def ops_decided(question: Question, wanted: Sequence[Place], tell: Progress) -> Iterator[Decision]:
    """Per op, its runner-up: the best plan that does not lay it out as this one does."""
    plan = question.plan
    for place in wanted:
        chosen = plan.decisions[place.key]
        if place.layouts < 2:
            yield Decision(place.key, chosen, place.source, (), "it has no other layout")
            continue
        other = _otherwise(question, place.key, tell)
        decided_by = "nothing else fits" if other.why_not else what_decided(question, other, place.key)
        yield Decision(place.key, chosen, place.source, (other,), decided_by)


def _otherwise(question: Question, place: str, tell: Progress) -> Alternative:
    """The best plan that does not lay out `place` as this one does."""
    chosen = question.plan.decisions[place]
    tell(f"solving without {place} as {chosen}")
    try:
        made = question.solved(without=[(place, chosen)])
    except NoFeasiblePlanError as error:
        return _none("-", str(error))
    return Alternative(made.decisions[place], made.step_time_s, made.peak_memory_bytes, plan=made)


def parameter_decided(question: Question, key: str, placed: Placements, tell: Progress) -> Decision:
    """A parameter's other layouts in compute that differ on one mesh axis, each solved with it pinned; where there are
    none, the best plan that has it otherwise at rest."""
    plan = question.plan
    place = f"parameter {key}"
    if placed.pinned:
        return Decision(place, str(placed), "", (), "it is pinned")
    found = []
    for layout in _neighbours(parse_layout(leading(placed.in_compute)), len(placed.shape)):
        text = layout_text(layout)
        tell(f"solving with {key} as {text}")
        try:
            made = question.solved(pins={**question.options.pins, key: text})
        except (NoFeasiblePlanError, ValueError) as error:
            found.append(_none(text, _why_not(plan, layout, error)))
            continue
        found.append(Alternative(text, made.step_time_s, made.peak_memory_bytes, plan=made))
    if place in plan.decisions and all(other.why_not for other in found):
        found.append(_otherwise(question, place, tell))
    found.sort(key=lambda other: other.step_time_s)
    decision = Decision(place, str(placed), "", tuple(found), "nothing else fits")
    if decision.runner_up is not None:
        decided_by = what_decided(question, decision.runner_up, place)
        decision = replace(decision, decided_by=decided_by)
    return decision


def what_decided(question: Question, other: Alternative, place: str) -> str:
    """One sentence: the strategy, the budget, or what the runner-up takes more of."""
    plan, made = question.plan, other.plan
    assert made is not None
    free, unbounded = question.unrestricted, question.unbounded
    if free is not None and _differs(free, plan, place):
        return f"the strategy: {plan.strategy!r} was asked for, 'auto' {_has(free, place)}"
    budget = plan.memory_budget_bytes
    too_large = unbounded is not None and budget is not None and unbounded.peak_memory_bytes > budget
    if unbounded is not None and too_large and _differs(unbounded, plan, place):
        return f"the memory budget: without it the plan {_has(unbounded, place)}"
    change_s = made.step_time_s - plan.step_time_s
    if abs(change_s) <= _TIE * plan.step_time_s:
        return "next to nothing: the runner-up takes as long, and what ties a simpler or earlier plan is not taken"
    if change_s < 0:
        return (
            f"the solver's summed costs: played as a step, the runner-up takes {seconds_text(-change_s)} less, but it "
            "was not among the solutions that were played"
        )
    ledger = _exposed(made)
    for key, seconds in _exposed(plan).items():
        ledger[key] = ledger.get(key, 0.0) - seconds
    grown, line_s = max(ledger.items(), key=lambda item: item[1], default=(("", "", "", ""), 0.0))
    compute_s = made.breakdown.compute_s - plan.breakdown.compute_s
    if compute_s >= line_s:
        return f"compute: the runner-up computes {seconds_text(compute_s)} more on each rank"
    kind, group, reason, source = grown
    return f"its neighbour: {kind} over {group}, {seconds_text(line_s)} more exposed: {reason}" + (
        f" ({source})" if source else ""
    )


def _differs(one: Plan, other: Plan, place: str) -> bool:
    return place in one.decisions and one.decisions[place] != other.decisions.get(place)


def _has(plan: Plan, place: str) -> str:
    """`has RS(0) -> RR here and takes 3.1 ms and 12.0 GiB`."""
    return (
        f"has {plan.decisions[place]} here and takes {seconds_text(plan.step_time_s)} and {gib(plan.peak_memory_bytes)}"
    )


def _exposed(plan: Plan) -> dict[tuple[str, str, str, str], float]:
    """Exposed seconds by line of the ledger."""
    found: dict[tuple[str, str, str, str], float] = defaultdict(float)
    for each in plan.collectives:
        found[each.kind, each.group, each.reason, each.source] += each.exposed_s
    return dict(found)


def _none(layout: str, why: str) -> Alternative:
    return Alternative(layout, math.inf, 0, why)


def _why_not(plan: Plan, layout: Layout, error: Exception) -> str:
    """Why no plan has a parameter like that in compute."""
    for (axis, _), placement in zip(plan.axes, layout, strict=True):
        if axis in plan.batch_axes and isinstance(placement, Shard):
            return f"{axis} splits the batch"
    return re.sub(r"^pin '[^']*': ", "", str(error))


def leading(layout: str) -> str:
    """A layout in whole dims: `S(0.1)`, a split of an inner part of dim 0, as `S(0)`."""
    head = layout
    while "." in head:
        before, _, after = head.partition(".")
        head = before + after[after.index(")") :]
    return head


def _neighbours(layout: Layout, dims: int) -> list[Layout]:
    """Layouts that differ from this one on one axis."""
    choices: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(dims))]
    return [
        (*layout[:axis], other, *layout[axis + 1 :])
        for axis in range(len(layout))
        for other in choices
        if other != layout[axis]
    ]
