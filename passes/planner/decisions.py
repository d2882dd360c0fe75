"""The decisions of a plan as its file has them: each place of a graph by name, each option by its placements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from costmodel.layout import layout_text
from passes.analysis.layers import unique
from passes.analysis.strategies import Option, StoredOption
from passes.errors import NoFeasiblePlanError, PlanMismatchError
from passes.plan.plan import Plan, check_plan, check_solved
from passes.rules.call import op_text
from passes.rules.work import VIEWS
from passes.space.space import Site, Space
from passes.space.words import Words, at_rest_text


def option_text(option: Option | StoredOption) -> str:
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
        key = unique(key, taken)
        taken[key] = None
        if id(site.options) not in texts:
            texts[id(site.options)] = [option_text(option) for option in site.options]
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
    known = {key for key, _ in open_to}
    if unknown := [key for key in plan.decisions if key not in known]:
        raise PlanMismatchError(f"the plan lays out {unknown[0]!r}, which is no place of this graph; remove that line")
    return tuple(picks)
