"""A plan: what was decided, what it costs, and what it was made for, in names that outlive the process.

A plan is kept in a file people can read and edit: decisions are keyed by parameter-name patterns and places in the
model, and written as DTensor's placements are (`S(0)S(0) -> RS(0)`). `assignment_of` turns them back into options.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from costmodel.layout import Partial, layout_text, parse_layout
from costmodel.memory import gib
from passes.errors import NoFeasiblePlanError, PlanMismatchError
from passes.footprint import TopTensor
from passes.pad import Pad
from passes.plan_json import NOT_IN_THE_FILE, dump, parse
from passes.plots import FrontierPoint
from passes.recompute import Mode
from passes.report_html import frame_html, plan_html
from passes.report_text import plan_text
from passes.rules.call import op_text
from passes.schedule import Collective, Schedule
from passes.shorten import all_names
from passes.space import Site, Space
from passes.strategies import Option, StoredOption
from passes.timeline import Timeline
from passes.tracks import op_cost
from passes.words import Words, at_rest_text, fold_names, tensor_layout_text, unfold_names
from passes.work import VIEWS


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
    """What backward computes again: a mode of `passes/recompute.py`."""
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
            ValueError: not a plan's JSON, another version, a missing or wrong field, a time or size that cannot be, or
                a line of `parameters` that was renamed, taken out or edited to what is no layout.
        """
        plan = parse(Plan, text, where)
        _check_figures(plan, where)
        _check_lines(plan, where)
        return plan

    def save(self, path: str | Path) -> None:
        """Write its file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def report(self, path: str | Path, frontier: Sequence[FrontierPoint] = ()) -> None:
        """One self-contained HTML file; `frontier` are the plans that a search found, drawn by time and memory."""
        Path(path).write_text(plan_html(self, frontier), encoding="utf-8")

    def _repr_html_(self) -> str:
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


def make_plan(
    space: Space,
    assignment: Sequence[int],
    schedule: Schedule,
    *,
    bound: Bound,
    baselines: Mapping[str, Baseline] | None = None,
    budget_bytes: int | None = None,
    notes: Iterable[str] = (),
    padded: tuple[Pad, ...] = (),
    repeated_keys: bool = False,
    strategy: str | None = None,
    options: Mapping[str, Any] | None = None,
    example: str = "",
) -> Plan:
    """The plan that gives site i of `space` option `assignment[i]`, priced by `schedule`."""
    words = Words(space)
    names = [axis.name for axis in space.topology.axes]
    breakdown = Breakdown(
        compute_s=schedule.compute_s,
        compute_by_kind=dict(schedule.compute_by_kind),
        contention_s=schedule.contention_s,
        exposed_s=dict(schedule.exposed_s),
        hidden_s=dict(schedule.hidden_s),
        optimizer_s=schedule.optimizer_s,
        memory_bytes=dict(schedule.memory.by_kind),
        peak_moment=schedule.peak_moment,
        top_tensors=schedule.memory.top,
    )
    parameters = _parameters(space, assignment, words)
    return Plan(
        fingerprint=space.program.fingerprint,
        axes=tuple((axis.name, axis.size) for axis in space.topology.axes),
        batch_axes=tuple(names[axis] for axis in space.batch_axes),
        strategy=strategy or space.strategy,
        hardware=space.topology.hardware.name,
        step_time_s=schedule.step_time_s,
        peak_memory_bytes=schedule.peak_memory_bytes,
        memory_budget_bytes=budget_bytes,
        accumulate=schedule.accumulate,
        recompute=space.recomputed.mode,
        breakdown=breakdown,
        machine=space.topology.describe(),
        roles=_roles(space, assignment, words),
        parameters=parameters,
        collectives=folded(schedule.collectives, words),
        bound=bound,
        baselines=dict(baselines or {}),
        notes=tuple(dict.fromkeys([*notes, *_notes(space, assignment)])),
        decisions={key: texts[pick] for (key, texts), pick in zip(choices(space), assignment, strict=True)},
        solved={key: str(placed) for key, placed in parameters.items()},
        rules=dict(space.analysis.found),
        aliases=dict(space.program.aliases),
        padded=padded,
        repeated_keys=repeated_keys,
        reshard=space.recomputed.reshard,
        postpone=space.recomputed.postpone,
        options=dict(options or {}),
        example=example,
    )


def baseline(schedule: Schedule, budget_bytes: int | None = None) -> Baseline:
    """A played step as a baseline."""
    over = schedule.peak_memory_bytes - budget_bytes if budget_bytes is not None else 0
    reason = f"{gib(over)} over the budget, at {schedule.peak_moment}" if over > 0 else ""
    return Baseline(schedule.step_time_s, schedule.peak_memory_bytes, over <= 0, reason)


# -- what a plan says --------------------------------------------------------------------------------------------------


def folded(collectives: Sequence[Collective], words: Words) -> tuple[Collective, ...]:
    """Alike collectives of repeated layers as one with a count; the most seconds first."""
    groups: dict[tuple[object, ...], list[Collective]] = defaultdict(list)
    for each in collectives:
        module = words.pattern(each.module)
        key = (each.kind, each.axes, each.bytes, each.phase, each.role, each.source, module, each.value, each.reason)
        groups[key].append(each)
    found = [
        Collective(
            kind=alike[0].kind,
            axes=alike[0].axes,
            bytes=alike[0].bytes,
            seconds=sum(x.seconds for x in alike),
            phase=alike[0].phase,
            exposed_s=sum(x.exposed_s for x in alike),
            hidden_s=sum(x.hidden_s for x in alike),
            role=alike[0].role,
            source=alike[0].source,
            module=words.pattern(alike[0].module),
            value=alike[0].value,
            reason=alike[0].reason,
            tensors=alike[0].tensors,
            count=sum(x.count for x in alike),
            start_s=min(x.start_s for x in alike),
        )
        for alike in groups.values()
    ]
    return tuple(sorted(found, key=lambda each: -each.seconds))


def _parameters(space: Space, assignment: Sequence[int], words: Words) -> dict[str, Placements]:
    read_as = _read_as(space, assignment)
    found: dict[str, Placements] = {}
    inputs = dict(zip(space.program.graph.graph.find_nodes(op="placeholder"), space.program.inputs, strict=True))
    for index, members in enumerate(space.folding.members):
        site = space.sites[index]
        if site.given is None or site.given.kind != "parameter":
            continue
        option = site.options[assignment[index]]
        assert isinstance(option, StoredOption)
        names = [name for node in members for name in all_names(inputs[node].name, space.program.repeated)]
        stored = math.prod(option.storage.padded_shape(space.topology.sizes)) * site.stored_itemsize
        layout = read_as.get(index, option.layout)
        found[_unique(words.pattern(site.name), found)] = Placements(
            at_rest=at_rest_text(option),
            in_compute=tensor_layout_text(layout, site.dims),
            shape=option.storage.shape,
            dims=words.tensor_dims(index),
            names=fold_names(names),
            count=len(names),
            bytes=stored * len(names),
        )
    return found


def _roles(space: Space, assignment: Sequence[int], words: Words) -> dict[str, AxisRole]:
    sizes = space.topology.sizes
    products: list[dict[str, float]] = [defaultdict(float) for _ in sizes]
    others: list[dict[str, float]] = [defaultdict(float) for _ in sizes]
    stored, split, elements = [0.0] * len(sizes), [0.0] * len(sizes), 0.0
    for index, (site, pick) in enumerate(zip(space.sites, assignment, strict=True)):
        option = site.options[pick]
        if isinstance(option, Option):
            assert site.op is not None
            cost = op_cost(space, index, option)
            for axis, leaf in enumerate(option.splits):
                partial = leaf is None and any(isinstance(r[axis], Partial) for r in option.results)
                word = words.atom(site.op.leaves[leaf]) if leaf is not None else "partial sums" if partial else ""
                (others if cost.kind == "other" else products)[axis][word] += cost.seconds * site.count
        elif site.given is not None and site.given.kind == "parameter":
            size = math.prod(option.storage.shape) * site.count
            elements += size
            for axis, shard in enumerate(option.storage.shards):
                stored[axis] += size * (axis in option.storage.state_axes)
                split[axis] += size * (shard is not None)

    def shares(seconds: Mapping[str, float]) -> dict[str, float]:
        total = sum(seconds.values()) or 1.0
        return {word: s / total for word, s in sorted(seconds.items(), key=lambda item: -item[1]) if s}

    return {
        axis.name: AxisRole(
            shares(products[i]), shares(others[i]), stored[i] / (elements or 1), split[i] / (elements or 1)
        )
        for i, axis in enumerate(space.topology.axes)
    }


def _read_as(space: Space, assignment: Sequence[int]) -> dict[int, Any]:
    """Per stored site, the layout that its first reader asks for."""
    found: dict[int, Any] = {}
    for wire in space.wires:
        if space.sites[wire.value.op].kind != "stored":
            continue
        for port in wire.ports:
            option = space.sites[port.site].options[assignment[port.site]]
            if isinstance(option, Option) and not port.stores:
                found.setdefault(wire.value.op, option.operands[port.operand])
    return found


def _notes(space: Space, assignment: Sequence[int]) -> list[str]:
    """What a user should know: ops without a rule, stored tensors that are padded."""
    notes = [f"no rule for {op_text(op)}: it runs whole on every rank" for op in space.replicated]
    found = {
        str(site.call.target): rule
        for site in space.sites
        if site.call and (rule := space.analysis.found.get(str(site.call)))
    }
    notes += [f"{op_text(op)}: its rule was found by running it on shards: {rule}" for op, rule in found.items()]
    sizes = space.topology.sizes
    for site, pick in zip(space.sites, assignment, strict=True):
        option = site.options[pick]
        if site.kind != "stored" or not isinstance(option, StoredOption) or not option.storage.state_axes:
            continue
        ways = math.prod(sizes[axis] for axis in option.storage.state_axes)
        dim = option.storage.state_dim
        rows = option.storage.computed_shape(sizes)[dim]
        stored = option.storage.padded_shape(sizes)[dim] * ways
        if stored > rows and stored > 1.05 * rows:
            words = f"{rows} rows over {ways} ranks take the room of {stored}"
            notes.append(f"{site.name}{f' and {site.count - 1} alike' if site.count > 1 else ''}: padded, {words}")
    return notes


def _unique(key: str, taken: Mapping[str, Any]) -> str:
    """`key`, or `key#2` and so on where it is taken."""
    found, number = key, 1
    while found in taken:
        number += 1
        found = f"{key}#{number}"
    return found


# -- decisions ---------------------------------------------------------------------------------------------------------


def option_text(site: Site, option: Option | StoredOption) -> str:
    """An option as a plan's file has it: placements at rest and in compute, or those of operands and results."""
    if isinstance(option, StoredOption):
        return f"{at_rest_text(option)} -> {layout_text(option.layout)}"
    operands = ", ".join(map(layout_text, option.operands)) or "()"
    return f"{operands} -> {', '.join(map(layout_text, option.results))}"


def choices(space: Space) -> list[tuple[str, list[str]]]:
    """Per site, its key in a plan's file and the text of each of its options."""
    words = Words(space)
    taken: dict[str, None] = {}
    found = []
    texts: dict[int, list[str]] = {}
    for index, site in enumerate(space.sites):
        if index < len(space.folding.members):
            node = space.folding.members[index][0]
            module = words.pattern(node.meta.get("module", ""))
            place = f"{module}: {op_text(site.name)}" if module else op_text(site.name)
            key = f"{site.phase} {place}" if site.kind == "op" else f"{_kind(site)} {words.pattern(site.name)}"
        else:
            key = f"output {site.name}"
        key = _unique(key, taken)
        taken[key] = None
        if id(site.options) not in texts:
            texts[id(site.options)] = [option_text(site, option) for option in site.options]
        found.append((key, texts[id(site.options)]))
    return found


@dataclass(frozen=True)
class Place:
    """Where a plan decides: its key in `Plan.decisions`, the op's line in the model, and how many layouts it had."""

    key: str
    source: str
    layouts: int
    moves: bool
    """Whether it is more than a view of a tensor."""


def places(space: Space) -> list[Place]:
    """All places of a space, in program order."""
    found = []
    for index, (key, texts) in enumerate(choices(space)):
        members = space.folding.members[index] if index < len(space.folding.members) else ()
        call = space.sites[index].call
        moves = call is None or call.target not in VIEWS
        found.append(Place(key, members[0].meta.get("source", "") if members else "", len(set(texts)), moves))
    return found


def without(space: Space, ruled_out: Sequence[tuple[str, str]]) -> Space:
    """`space` without some options: (place, the option as a plan's file has it); places that it lacks are left out.

    Raises:
        NoFeasiblePlanError: a place has no other option.
    """
    sites = list(space.sites)
    keys = {key: (index, texts) for index, (key, texts) in enumerate(choices(space))} if ruled_out else {}
    for key, text in ruled_out:
        if key not in keys:
            continue
        index, texts = keys[key]
        kept: Any = tuple(o for o, of in zip(sites[index].options, texts, strict=True) if of != text)
        if not kept:
            raise NoFeasiblePlanError(f"{key} has no other layout than {text}")
        sites[index] = replace(sites[index], options=kept)
    return replace(space, sites=tuple(sites))


def _kind(site: Site) -> str:
    return site.given.kind if site.given is not None else "constant"


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


def assignment_of(plan: Plan, space: Space) -> tuple[int, ...]:
    """The option of each site of `space` that `plan` decided on; `space` is searched under the plan's strategy.

    Raises:
        PlanMismatchError: another graph or mesh, or a decision that names no place or no option.
    """
    check_solved(plan)
    check_plan(plan, space.program.fingerprint, [(axis.name, axis.size) for axis in space.topology.axes])
    names = tuple(space.topology.axes[axis].name for axis in space.batch_axes)
    if names != plan.batch_axes:
        raise PlanMismatchError(
            f"the plan splits the batch over {plan.batch_axes} but was given batch axes {names}; set batch_axes alike"
        )
    picks = []
    open_to = choices(space)
    for key, texts in open_to:
        wanted = plan.decisions.get(key)
        if wanted is None:
            raise PlanMismatchError(f"the plan decides nothing about {key!r}; make the plan anew")
        if wanted not in texts:
            shown = "; ".join(texts[:8]) + ("; ..." if len(texts) > 8 else "")
            raise PlanMismatchError(
                f"the plan lays out {key!r} as {wanted!r}, which is none of its {len(texts)} options under "
                f"{space.strategy!r}: {shown}"
            )
        picks.append(texts.index(wanted))
    unknown = next((key for key in plan.decisions if key not in {key for key, _ in open_to}), None)
    if unknown is not None:
        raise PlanMismatchError(f"the plan lays out {unknown!r}, which is no place of this graph; remove that line")
    return tuple(picks)
