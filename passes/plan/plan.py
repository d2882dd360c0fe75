"""A plan: what was decided, what it costs, and what it was made for, in names that outlive the process.

A plan is kept in a file people can read and edit: decisions are keyed by parameter-name patterns and places in the
model, and written as DTensor's placements are (`S(0)S(0) -> RS(0)`). `decisions.py` turns them back into options.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from costmodel.files import write_whole
from costmodel.layout import parse_layout
from passes.errors import PlanMismatchError
from passes.padding.pad import Pad
from passes.plan.frontier import FrontierPoint
from passes.plan.plan_json import NOT_IN_THE_FILE, dump, parse
from passes.plan.report_text import plan_text
from passes.play.footprint import TopTensor
from passes.play.schedule import Collective
from passes.play.timeline import Timeline
from passes.space.recompute import Mode
from passes.space.words import unfold_names


@dataclass(frozen=True)
class Placements:
    """How alike parameters lie: `at_rest` between steps, `in_compute` where ops read them, one placement per axis."""

    at_rest: str
    in_compute: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    """A word per dim: `vocab`, `hidden`, `heads*head_size`."""
    names: str
    """All of them: `layers.0-31.mlp.up_proj.weight`."""
    count: int
    bytes: int
    """At rest on one rank, all of them together."""
    pinned: bool = False
    """Fixed by a person: planning again from this file keeps it."""

    def __str__(self) -> str:
        return f"{self.at_rest} -> {self.in_compute}"


@dataclass(frozen=True)
class AxisRole:
    """What one mesh axis does, as shares of a rank's compute time by the logical dim that the axis splits.

    "" is compute that every rank of the axis repeats; "partial sums" is compute on terms still to be added.
    """

    products: Mapping[str, float]
    """Of matrix products and attention."""
    others: Mapping[str, float]
    """Of all other ops."""
    stored: float
    """Share of the parameters' elements that the axis splits at rest only (gathered for compute)."""
    split: float
    """Share of the parameters' elements that it splits in compute."""


@dataclass(frozen=True)
class Breakdown:
    """Where time and memory go; seconds are of one micro-batch but for the optimizer's."""

    compute_s: float
    compute_by_kind: Mapping[str, float]
    contention_s: float
    exposed_s: Mapping[str, float]
    """Axes ("tp", "dp,tp") -> seconds that compute waits for their collectives."""
    hidden_s: Mapping[str, float]
    optimizer_s: float
    memory_bytes: Mapping[str, int]
    """Kind -> bytes at the peak."""
    peak_moment: str
    top_tensors: tuple[TopTensor, ...]

    @property
    def slows(self) -> bool:
        """Whether collectives slow compute beside them, by more than rounding."""
        return self.contention_s > 1e-9 * self.compute_s


@dataclass(frozen=True)
class Bound:
    """What the solver proved: by its own linear costs the plan takes `seconds`, and none takes less than `bound_s`.

    `counted`: how much of what may overlap is in these costs. `among`: the plans of which this holds.
    """

    seconds: float
    bound_s: float
    note: str = ""
    counted: str = "with no overlap counted"
    among: str = ""

    @property
    def gap(self) -> float:
        """Share by which another plan could be cheaper at most."""
        return max(0.0, (self.seconds - self.bound_s) / self.seconds) if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Baseline:
    """A hand-made plan beside this one; `reason` says why it does not fit, or cannot be made."""

    step_time_s: float
    peak_memory_bytes: int
    fits: bool
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """One step's layout over a mesh, with its price."""

    fingerprint: str
    axes: tuple[tuple[str, int], ...]
    batch_axes: tuple[str, ...]
    strategy: str
    hardware: str
    step_time_s: float
    peak_memory_bytes: int
    memory_budget_bytes: int | None
    accumulate: int
    recompute: Mode
    """What backward computes again: a mode of `passes/space/recompute.py`."""
    breakdown: Breakdown
    machine: tuple[str, ...]
    """The mesh on its hardware, in words: what lies inside a node."""
    roles: Mapping[str, AxisRole]
    """Axis -> what it does."""
    parameters: Mapping[str, Placements]
    """Name pattern -> how these parameters lie."""
    collectives: tuple[Collective, ...]
    """Alike ones of repeated layers together, most seconds first."""
    bound: Bound
    baselines: Mapping[str, Baseline]
    notes: tuple[str, ...]
    decisions: Mapping[str, str]
    """Place -> the chosen option; see `assignment_of`."""
    solved: Mapping[str, str] = field(default_factory=dict)
    """Name pattern -> `at rest -> in compute` as solved: a line of `parameters` that says otherwise was edited."""
    rules: Mapping[str, str] = field(default_factory=dict)
    """Calls that no table knows -> the rule found by running them on shards; "" where they run whole."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tied parameters: other name -> the name that `parameters` has."""
    padded: tuple[Pad, ...] = ()
    """Dims that the program is padded along before it is laid out."""
    repeated_keys: bool = False
    """Whether keys and values of grouped attention are repeated before that."""
    reshard: bool = True
    """Whether gathered parameters are freed after forward and gathered again (FSDP2's `reshard_after_forward`)."""
    regather: bool = False
    """Whether activations that forward gathered are freed there and gathered again for backward."""
    postpone: bool = True
    """Whether weight gradients wait until something is sent that they can run beside."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the caller asked for, as JSON values."""
    example: str = ""
    """The call it was made for, as its caller describes it."""
    timeline: Timeline | None = field(default=None, compare=False, repr=False, metadata=NOT_IN_THE_FILE)
    """The step as it was played, where the plan was made in this process."""

    @property
    def mesh(self) -> dict[str, int]:
        """Axis -> ranks, in mesh order."""
        return dict(self.axes)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.memory_budget_bytes is None or self.peak_memory_bytes <= self.memory_budget_bytes

    @property
    def edited(self) -> tuple[str, ...]:
        """Patterns of the parameters whose placements a person changed in the file."""
        return tuple(key for key, placed in self.parameters.items() if self.solved.get(key, str(placed)) != str(placed))

    @property
    def placements(self) -> dict[str, Placements]:
        """Every parameter's full name, tied names too -> how it lies."""
        found = {name: placed for placed in self.parameters.values() for name in unfold_names(placed.names)}
        return found | {other: found[name] for other, name in self.aliases.items() if name in found}

    def to_json(self) -> str:
        """The text of its file."""
        return dump(self)

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """The plan that `to_json` wrote; `where` names the text in errors.

        Raises:
            ValueError: not a plan's JSON, another version, a missing or wrong field, a time or size that cannot be, an
                axis without ranks or one that the mesh has not, or a line of `parameters` that was renamed, taken out
                or edited to what is no layout.
        """
        plan = parse(Plan, text, where)
        _check_figures(plan, where)
        _check_axes(plan, where)
        _check_lines(plan, where)
        return plan

    def save(self, path: str | Path) -> None:
        """Write its file; one that was there stays if that fails."""
        write_whole(path, self.to_json())

    def report(self, path: str | Path, frontier: Sequence[FrontierPoint] = ()) -> None:
        """One self-contained HTML file; `frontier` are the plans that a search found, drawn by time and memory."""
        from passes.plan.report_html import plan_html  # what draws its pages takes a second to import

        write_whole(path, plan_html(self, frontier))

    def _repr_html_(self) -> str:
        from passes.plan.report_html import frame_html

        return frame_html(self)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a file that `save` wrote.

        Raises:
            ValueError: not a plan's file; says what was found.
            OSError: the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text; pass a file that Plan.save wrote") from None
        return Plan.from_json(text, str(path))

    def __str__(self) -> str:
        return plan_text(self)


def _check_figures(plan: Plan, where: str) -> None:
    """Refuse times and sizes that no step has, which would compare with another plan's as if they were better."""
    figures: list[tuple[str, float]] = [
        ("step_time_s", plan.step_time_s),
        ("peak_memory_bytes", plan.peak_memory_bytes),
        ("memory_budget_bytes", plan.memory_budget_bytes or 0),
        *((f"collectives[{i}]: {name}", getattr(each, name))
          for i, each in enumerate(plan.collectives) for name in ("bytes", "seconds", "count")),
    ]  # fmt: skip
    for name, value in figures:
        if not 0 <= value < math.inf:
            raise ValueError(f"{where}: {name}: found {value!r}, expected 0 or more")
    if plan.accumulate < 1:
        raise ValueError(f"{where}: accumulate: found {plan.accumulate}, expected 1 or more")


def _check_axes(plan: Plan, where: str) -> None:
    """Refuse a mesh that is none, and axes that split the batch without being the mesh's."""
    names = [name for name, _ in plan.axes]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{where}: axes: {twins[0]!r} stands {names.count(twins[0])} times; give each axis its own name"
        )
    for name, size in plan.axes:
        if size < 1:
            raise ValueError(f"{where}: axes: {name!r} has {size} ranks, expected 1 or more")
    for name in names:
        if name not in plan.roles:
            raise ValueError(f"{where}: roles: found none of the axis {name!r}; each axis has one")
    for group in plan.breakdown.exposed_s:
        if group not in plan.breakdown.hidden_s:
            raise ValueError(f"{where}: breakdown: hidden_s has no {group!r}, which exposed_s has")
    for name in plan.batch_axes:
        if name not in plan.mesh:
            raise ValueError(f"{where}: batch_axes: the mesh has no axis {name!r}; it has {', '.join(plan.mesh)}")


def _check_lines(plan: Plan, where: str) -> None:
    """Refuse lines of `parameters` that nothing could be made of."""
    for key in plan.parameters.keys() - plan.solved.keys() if plan.solved else ():
        near = difflib.get_close_matches(key, plan.solved, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else f"; its lines are {', '.join(plan.solved)}"
        raise ValueError(f"{where}: parameters: the plan has no line {key!r}{meant}")
    for key in plan.solved:
        if key not in plan.parameters:
            raise ValueError(f"{where}: parameters: the line of {key!r} is missing; every parameter has one")
    for key in plan.edited:
        for name in ("at_rest", "in_compute"):
            text = getattr(plan.parameters[key], name)
            try:
                given = len(parse_layout(text))
            except ValueError as error:
                raise ValueError(f"{where}: parameters[{key!r}]: {name}: {error}") from None
            if given != len(plan.axes):
                axes = ", ".join(axis for axis, _ in plan.axes)
                raise ValueError(
                    f"{where}: parameters[{key!r}]: {name}: {text!r} has not one placement for each axis of {axes}"
                )


def check_solved(plan: Plan) -> None:
    """Refuse a plan whose placements a person edited: nothing else in its file goes with them yet.

    Raises:
        PlanMismatchError: names the line, and says what to do.
    """
    if plan.edited:
        raise PlanMismatchError(
            f"the plan's line of {plan.edited[0]} was edited after it was solved; solve again with it: autopar plan "
            "MODEL --from PLAN -o PLAN"
        )


def check_plan(plan: Plan, fingerprint: str, axes: Sequence[tuple[str, int]]) -> None:
    """Refuse a plan for another graph or mesh.

    Raises:
        PlanMismatchError: says what the plan is for, what it was given, and what to do.
    """
    if tuple(axes) != plan.axes:
        raise PlanMismatchError(
            f"the plan is for the mesh {plan.mesh} but was given the mesh {dict(axes)}; make a plan for this mesh"
        )
    if fingerprint != plan.fingerprint:
        raise PlanMismatchError(
            f"the plan is for the graph {plan.fingerprint[:12]} but this model and these inputs give the graph "
            f"{fingerprint[:12]}; make a plan for them, or use the model, input shapes and library versions that the "
            "plan was made with"
        )
