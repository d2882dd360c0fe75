"""What of a plan somebody means: parameters, ops and collectives by name, pattern, kind or source line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from passes.plan.plan import Placements, Plan
from passes.planner.decisions import Place
from passes.play.schedule import Collective
from passes.rules.call import op_text
from passes.rules.matmul import PRODUCTS
from passes.rules.work import VIEWS
from passes.space.words import unfold_names

_VIEWS = {op_text(target) for target in VIEWS}
_PRODUCTS = {op_text(target) for target in PRODUCTS} | {"attention", "attention_backward"}
_KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
_LINE = re.compile(r"(.*\.py):\d+$")
_SHOWN = 8


@dataclass(frozen=True)
class Found:
    """What a pattern means in a plan; `ops` in the order in which they are worth asking about."""

    parameters: Mapping[str, Placements]
    ops: tuple[Place, ...]
    collectives: tuple[Collective, ...]


def look_up(plan: Plan, pattern: str, places: Sequence[Place] | None = None) -> Found:
    """What `pattern` means; `places` are the plan's with their source lines, where the model is at hand.

    Raises:
        ValueError: an empty pattern, or nothing that it matches; says what comes nearest.
    """
    if not pattern.strip():
        raise ValueError("an empty pattern; give a parameter's name, an op's place, a collective or a source line")
    parameters = {
        key: placed
        for key, placed in plan.parameters.items()
        if _matches(pattern, key, *unfold_names(placed.names), *_tied(plan, placed))
    }
    if places is None:
        places = [Place(key, "", 2, _op(key) not in _VIEWS) for key in plan.decisions]
    ops = [place for place in places if _is_op(place.key) and _matches(pattern, place.key, place.source)]
    collectives = [_told_of(each, parameters) for each in plan.collectives if _means(pattern, each, parameters)]
    if not parameters and not ops and not collectives:
        raise ValueError(f"nothing in the plan matches {pattern!r}; {_nearest(plan, pattern, places)}")
    return Found(parameters, tuple(sorted(ops, key=_rank)), tuple(collectives))


def _means(pattern: str, each: Collective, parameters: Mapping[str, Placements]) -> bool:
    return (
        _kind(pattern) == each.kind
        or _matches(pattern, *each.names, each.module, each.source)
        or any(name in parameters for name in each.names)
    )


def _told_of(each: Collective, parameters: Mapping[str, Placements]) -> Collective:
    """A collective of several tensors as it is told of the first that was asked for."""
    first, *others = each.names
    asked = next((name for name in (first, *others) if name in parameters), first)
    return replace(each, reason=each.reason.replace(first, asked, 1))


def _kind(pattern: str) -> str:
    """`all_to_all` for `all-to-all`."""
    return pattern.replace("-", "_").lower()


def _matches(pattern: str, *texts: str) -> bool:
    """Whether one of the texts has the pattern in it or is like it; a layer's number means all alike layers."""
    if _LINE.fullmatch(pattern):
        return any(f"/{text}".endswith(f"/{pattern.lstrip('/')}") for text in texts)
    alike = re.sub(r"(?<=\.)\d+(?=\.|$|:)", "*", pattern)
    return any(form in text or fnmatchcase(text, form) for text in texts for form in (pattern, alike))


def _tied(plan: Plan, placed: Placements) -> list[str]:
    names = unfold_names(placed.names)
    return [other for other, name in plan.aliases.items() if name in names]


def _is_op(key: str) -> bool:
    return key.startswith(("forward ", "backward "))


def _op(key: str) -> str:
    """The op of a place: `mm` of `forward mlp.up: mm#2`."""
    return key.rpartition(" ")[2].partition("#")[0]


def _rank(place: Place) -> tuple[bool, bool]:
    return not (place.moves and place.layouts > 1), _op(place.key) not in _PRODUCTS


def _nearest(plan: Plan, pattern: str, places: Sequence[Place]) -> str:
    """What the plan has of the sort that was asked for."""
    kinds = sorted({each.kind for each in plan.collectives})
    if _kind(pattern) in _KINDS:
        return f"its collectives are {', '.join(kinds) or 'none'}"
    if line := _LINE.match(pattern):
        sources = {each.source for each in plan.collectives} | {place.source for place in places}
        lines = sorted({int(each.rpartition(":")[2]) for each in sources if line[1] in each})
        what = "its lines" if any(place.source for place in places) else "the lines of it that communicate"
        if lines:
            return f"of {line[1]} {what} are {', '.join(map(str, lines))}"
    names = list(plan.parameters)
    parts = {part for name in names for part in name.split(".")}
    alike = difflib.get_close_matches(pattern.rpartition(".")[2], parts, n=3, cutoff=0.7)
    near = [name for name in names if set(name.split(".")) & set(alike)][:_SHOWN]
    shown = near or names[:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if not near and len(names) > len(shown) else ""
    return f"{'the nearest parameters' if near else 'its parameters'} are {', '.join(shown)}{more}"
