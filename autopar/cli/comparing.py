"""Two plans side by side: what each takes, and what was decided otherwise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autopar.cli.terminal import painted, table, wrapped
from autopar.plans.corrections import KindTimes
from autopar.plans.measured import Measured
from costmodel.memory import gib
from passes.plan.plan import Plan
from passes.plan.report_text import seconds_text

_SLACK = 1e-9
"""Relative difference that is rounding of a file."""


@dataclass(frozen=True)
class Figure:
    """A number of both plans. `judged`: more of it is worse."""

    name: str
    unit: str
    before: float
    after: float
    judged: bool = False

    @property
    def change(self) -> float:
        """Share by which it grew; of nothing to something counts as infinite."""
        if self.before:
            return self.after / self.before - 1
        return float("inf") if self.after else 0.0

    def text(self, value: float) -> str:
        """A value with its unit."""
        return seconds_text(value) if self.unit == "s" else gib(value) if self.unit == "bytes" else f"{value:.0f}"


@dataclass(frozen=True)
class Change:
    """Something that reads otherwise in the second plan; "" where one of them lacks it."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """What `diff` and `check` print."""

    made_for: tuple[Change, ...]
    """Graph, parameters' names, mesh, hardware, and what was asked for or decided beside layouts, where they differ."""
    figures: tuple[Figure, ...]
    parameters: tuple[Change, ...]
    decisions: tuple[Change, ...]

    def worse(self, allowed: float) -> tuple[Figure, ...]:
        """Judged figures that grew by more than this share."""
        return tuple(f for f in self.figures if f.judged and f.change > allowed + _SLACK)


def compare_plans(before: Plan, after: Plan) -> Comparison:
    """What changed from one plan to the other."""
    beside, beside_after = _beside_layouts(before), _beside_layouts(after)
    made_for = [
        Change(name, str(one), str(other))
        for name, one, other in (
            ("graph", before.fingerprint[:12], after.fingerprint[:12]),
            ("parameters", *_names(before, after)),
            ("shapes", *_shapes(before, after)),
            *((name, one, beside_after[name]) for name, one in beside.items()),
        )
        if one != other
    ]
    placed = [{key: f"{p.at_rest} -> {p.in_compute}" for key, p in plan.parameters.items()} for plan in (before, after)]
    return Comparison(
        tuple(made_for), tuple(_figures(before, after)), _changes(*placed), _changes(before.decisions, after.decisions)
    )


def _names(before: Plan, after: Plan) -> tuple[str, str]:
    """How many parameters each has, and in the second how many of the first's: few of another model. One that is tied
    counts once."""
    one, other = (plan.placements.keys() - plan.aliases.keys() for plan in (before, after))
    return f"{len(one)}", f"{len(other)}" + (f", of which {len(one & other)} by the same name" if one != other else "")


def _shapes(before: Plan, after: Plan) -> tuple[str, str]:
    """Of what both plans have by one name pattern, the first of another shape, and how many more there are."""
    one, other = before.parameters, after.parameters
    changed = [key for key in one if key in other and one[key].shape != other[key].shape]
    if not changed:
        return "", ""
    first, more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{first} {list(one[first].shape)}", f"{list(other[first].shape)}{more}"


def _mesh(plan: Plan) -> str:
    return ",".join(f"{name}={size}" for name, size in plan.axes)


def _beside_layouts(plan: Plan) -> dict[str, Any]:
    """What a plan is for, and what it decides beside layouts, under the names that `Options` has for it."""
    return {
        "mesh": _mesh(plan),
        "batch_axes": ",".join(plan.batch_axes),
        "hardware": plan.hardware,
        "strategy": plan.strategy,
        "optimizer": plan.options.get("optimizer", ""),
        "accumulate": plan.accumulate,
        "recompute": plan.recompute,
        "reshard_after_forward": plan.reshard,
        "regather_activations": plan.regather,
        "padded dims": ", ".join(f"{pad.size} as {pad.padded}" for pad in plan.padded) or "none",
    }


def _changes(before: Any, after: Any) -> tuple[Change, ...]:
    return tuple(
        Change(key, before.get(key, ""), after.get(key, ""))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    )


def _figures(before: Plan, after: Plan) -> list[Figure]:
    """Of whole steps: a plan has compute and collectives of one micro-batch."""
    sums = [_collectives(before), _collectives(after)]
    moved, moved_after = (sum(each.values()) for each in sums)
    times, times_after = before.accumulate, after.accumulate
    figures = [
        Figure("step", "s", before.step_time_s, after.step_time_s, True),
        Figure("peak memory", "bytes", before.peak_memory_bytes, after.peak_memory_bytes, True),
        Figure("bytes communicated", "bytes", moved, moved_after, True),
        Figure("compute", "s", times * before.breakdown.compute_s, times_after * after.breakdown.compute_s),
        Figure("optimizer", "s", before.breakdown.optimizer_s, after.breakdown.optimizer_s),
    ]
    for group in dict.fromkeys([*before.breakdown.exposed_s, *after.breakdown.exposed_s]):
        one, other = (plan.accumulate * plan.breakdown.exposed_s.get(group, 0.0) for plan in (before, after))
        figures.append(Figure(f"exposed {group}", "s", one, other))
    for kind in dict.fromkeys([*before.breakdown.memory_bytes, *after.breakdown.memory_bytes]):
        one, other = (plan.breakdown.memory_bytes.get(kind, 0) for plan in (before, after))
        figures.append(Figure(f"memory: {kind}", "bytes", one, other))
    for key in dict.fromkeys([*sums[0], *sums[1]]):
        figures.append(Figure(f"{key} bytes", "bytes", sums[0].get(key, 0.0), sums[1].get(key, 0.0)))
    return figures


def _collectives(plan: Plan) -> dict[str, float]:
    """Bytes of a step by kind, axes and phase."""
    found: dict[str, float] = defaultdict(float)
    for each in plan.collectives:
        found[f"{each.kind} {each.group} {each.phase}"] += plan.accumulate * each.bytes * each.count
    return found


# -- printing ----------------------------------------------------------------------------------------------------------


def comparison_json(comparison: Comparison, allowed: float) -> dict[str, Any]:
    """All of it, with what got worse."""
    return {
        "format": "autopar-diff",
        "version": 1,
        "worse": [figure.name for figure in comparison.worse(allowed)],
        "allowed": allowed,
        "made_for": _plain(comparison.made_for),
        "figures": [
            {"name": f.name, "unit": f.unit, "before": f.before, "after": f.after, "judged": f.judged}
            for f in comparison.figures
        ],
        "parameters": _plain(comparison.parameters),
        "decisions": _plain(comparison.decisions),
    }


def _plain(changes: tuple[Change, ...]) -> list[dict[str, str]]:
    return [{"name": c.name, "before": c.before, "after": c.after} for c in changes]


def print_comparison(comparison: Comparison, allowed: float, *, decisions: bool = False) -> None:
    """What changed, the worst of it last."""
    for change in comparison.made_for:
        print(f"{change.name}: {change.before} -> {change.after}")
    figures = [f for f in comparison.figures if f.judged or abs(f.change) > _SLACK]
    rows = [[f.name, f.text(f.before), f.text(f.after), _percent(f.change)] for f in figures]
    print(table(rows, ["", "before", "after", "change"], right=[1, 2, 3]))
    if comparison.parameters:
        print()
        rows = [[c.name, c.before or "-", c.after or "-"] for c in comparison.parameters]
        print(table(rows, ["parameter", "before", "after"], shrink=[0, 1, 2]))
    other = [c for c in comparison.decisions if not c.name.startswith("parameter ")]  # those stand above
    if other and decisions:
        print()
        rows = [[c.name, c.before or "-", c.after or "-"] for c in other]
        print(table(rows, ["decision", "before", "after"], shrink=[1, 2, 0]))
    elif other:
        print(f"\n{len(other)} other decisions differ; --decisions lists them.")
    if not comparison.parameters and not comparison.decisions:
        print("\nThe same layouts.")
    worse = comparison.worse(allowed)
    for figure in worse:
        print(painted(f"WORSE: {figure.name} {_percent(figure.change)}, where +{allowed:.1%} is allowed", "red"))
    if not worse:
        print(painted("Nothing got worse" + (f" by more than {allowed:.1%}." if allowed else "."), "green"))


def measured_json(rows: Sequence[KindTimes], step: Measured) -> dict[str, Any]:
    """Every kind, predicted and measured."""
    kinds = [
        {"kind": row.kind, "predicted_s": row.predicted_s, "measured_s": row.measured_s,
         "ratio": row.ratio if math.isfinite(row.ratio) else None}
        for row in rows
    ]  # fmt: skip
    return {"format": "autopar-measured", "version": 1, "steps": step.steps, "kinds": kinds}


def print_measured(rows: Sequence[KindTimes], step: Measured) -> None:
    """Predicted beside measured, a kind a line."""
    plural = "s" if step.steps != 1 else ""
    print(painted(f"A step as predicted, and as measured over {step.steps} step{plural}", "bold"))
    cells = [
        [row.kind, seconds_text(row.predicted_s), seconds_text(row.measured_s), _ratio(row)]
        for row in rows
        if row.predicted_s or row.measured_s
    ]
    print(table(cells, ["", "predicted", "measured", "ratio"], right=[1, 2, 3]))
    if not step.marked:
        print(wrapped("The trace marks no steps, so all of it counts as one: record it with a schedule and step()."))


def _ratio(row: KindTimes) -> str:
    if not row.measured_s:
        return "not measured"
    if not math.isfinite(row.ratio):
        return "not predicted"
    return f"{row.ratio:,.0f}x" if row.ratio >= 100 else f"{row.ratio:.2f}x"


def _percent(change: float) -> str:
    if abs(change) <= _SLACK:
        return "="
    return f"{change:+.1%}" if change != float("inf") else "new"
