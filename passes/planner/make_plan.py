"""A `Plan` made of a solved and played space: what was decided and what it costs, in words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from costmodel.layout import Partial
from costmodel.memory import gib
from passes.analysis.strategies import Option, StoredOption
from passes.padding.pad import Pad
from passes.plan.plan import AxisRole, Baseline, Bound, Breakdown, Placements, Plan
from passes.planner.decisions import choices
from passes.play.schedule import Collective, Schedule
from passes.play.tracks import op_cost
from passes.prepare.shorten import all_names
from passes.rules.call import op_text
from passes.space.pins import parameter_lines
from passes.space.space import Space
from passes.space.words import Words, at_rest_text, fold_names, tensor_layout_text


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
    pinned: Container[int] = (),
    strategy: str | None = None,
    options: Mapping[str, Any] | None = None,
    example: str = "",
) -> Plan:
    """The plan that gives site i of `space` option `assignment[i]`, priced by `schedule`; `pinned`: sites of parameters
    that a person fixed."""
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
    parameters = _parameters(space, assignment, words, pinned)
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
        regather=space.recomputed.regather,
        postpone=space.recomputed.postpone,
        options=dict(options or {}),
        example=example,
    )


def baseline(schedule: Schedule, budget_bytes: int | None = None) -> Baseline:
    """A played step as a baseline."""
    over = schedule.peak_memory_bytes - budget_bytes if budget_bytes is not None else 0
    reason = f"{gib(over)} over the budget, at {schedule.peak_moment}" if over > 0 else ""
    return Baseline(schedule.step_time_s, schedule.peak_memory_bytes, over <= 0, reason)


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


def _parameters(space: Space, assignment: Sequence[int], words: Words, pinned: Container[int]) -> dict[str, Placements]:
    read_as = _read_as(space, assignment)
    found: dict[str, Placements] = {}
    inputs = space.program.placeholders
    for line, index in parameter_lines(space.analysis).items():
        site, members = space.sites[index], space.folding.members[index]
        option = site.options[assignment[index]]
        assert isinstance(option, StoredOption)
        names = [name for node in members for name in all_names(inputs[node].name, space.program.repeated)]
        stored = math.prod(option.storage.padded_shape(space.topology.sizes)) * site.stored_itemsize
        layout = read_as.get(index, option.layout)
        found[line] = Placements(
            at_rest=at_rest_text(option),
            in_compute=tensor_layout_text(layout, site.dims),
            shape=option.storage.shape,
            dims=words.tensor_dims(index),
            names=fold_names(names),
            count=len(names),
            bytes=stored * len(names),
            pinned=index in pinned,
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
        elif site.parameter is not None:
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
