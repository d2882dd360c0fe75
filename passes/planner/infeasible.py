"""Why no plan fits, and what would: the smallest set of constraints that conflict, and plans near the one asked for.

What a user asks for is a set of constraints: the budget, a strategy, pins, layouts that parameters already have, a way
to recompute, that what was gathered stays. A subset conflicts where no plan satisfies all of it. Subsets are tried from
the smallest up, so the first that conflicts is a smallest one. Then each change that a user could make is planned: to
let go of one constraint, the same ranks as another mesh, fewer sequences at a time, more ranks. Every figure is that of
a plan that was played. The whole look has an end: what was not looked at by then, the error says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from costmodel.memory import OPTIMIZERS, at_rest, gib
from passes.errors import NoFeasiblePlanError
from passes.padding.paddings import PaddingsOf
from passes.plan.report_text import step_text
from passes.planner.fitting import Candidate, Request, best, smallest
from passes.planner.proposals import SIMPLEST_FIRST, Search
from passes.program.program import Program
from passes.space.pins import Pin, PinError

Smaller = Callable[[int], Program | None]
"""A divisor -> the program of a batch that many times smaller; None where the batch cannot be divided so."""

_BUDGET = "the memory budget"
_SUBSETS = "smaller sets of constraints that may conflict already"
_DIVISORS = (2, 4, 8, 16)
_MORE_RANKS = (2, 4, 8)
_BUDGETED_S = 5.0
"""For each change and strategy (`Search.budgeted_s`): whether something fits matters, not which plan is the best."""
_WHOLE_S = 60.0
"""Seconds of the processor after which no strategy of any change is solved any more."""
_MESHES = 3
"""How many other shapes of the mesh are planned at most."""


@dataclass(frozen=True)
class Way:
    """A change after which a plan fits, and that plan."""

    change: str
    plan: Candidate

    def __str__(self) -> str:
        made = self.plan.schedule
        again = "" if self.plan.recompute == "pointwise" else f", recompute={self.plan.recompute!r}"
        how = f"{self.plan.strategy}{again}"
        return f"{self.change}: {gib(made.peak_memory_bytes)}, {step_text(made.step_time_s)} per step ({how})"


class _OutOfTimeError(Exception):
    """Whether a plan fits was not seen before the look's end."""


@dataclass(frozen=True)
class _Look:
    """The search for ways that fit: what was asked for, tried until `end_s` (CPU seconds)."""

    asked: Search
    end_s: float

    def at(self, **changes: Any) -> _Look:
        """The same with other fields of `Search`."""
        return replace(self, asked=replace(self.asked, **changes))


def why_nothing_fits(
    asked: Search, found: Sequence[Candidate], reasons: Mapping[str, str], smaller: Smaller | None = None
) -> NoFeasiblePlanError:
    """The error for `asked`, of which `found` are the candidates (none fits) and `reasons` why a strategy has none."""
    asked.progress("nothing fits: looking for what would")
    asked = replace(asked, progress=lambda stage: None, most=1, gives_up=True)
    look = _Look(asked, time.process_time() + _WHOLE_S)
    constraints = _constraints(asked.request)
    missed: list[str] = []
    conflict = _conflict(look, constraints, missed)
    names = [_named(name, asked) for name in conflict]
    ways: list[Way] = []
    for change, planned in _changes(look, constraints, conflict, smaller):
        try:
            way = planned()
        except _OutOfTimeError:
            missed.append(change)
            continue
        if way is not None:
            ways.append(way)
    parts = [what_is_needed(asked, found, reasons)]
    if len(names) > 1:
        proved = "" if _SUBSETS in missed else "; any one less would do"
        parts.append(f"What conflicts: {', '.join(names[:-1])} and {names[-1]}{proved}.")
    changes = [str(way) for way in ways]
    if found and _BUDGET in conflict:
        needed = smallest(found).schedule.peak_memory_bytes
        changes.append(f"memory_budget={needed} ({gib(needed)}), if the device has that much")
    if changes:
        parts.append(f"What would fit: {'; '.join(changes)}.")
    if missed:
        parts.append(f"Not looked at within {_WHOLE_S:.0f} s of the processor: {'; '.join(missed)}.")
    return NoFeasiblePlanError(" ".join(parts), tuple(names), tuple(changes))


def _changes(
    look: _Look,
    constraints: Mapping[str, Callable[[Request], Request]],
    conflict: Sequence[str],
    smaller: Smaller | None,
) -> list[tuple[str, Callable[[], Way | None]]]:
    """What a user could change, in words, and the way it opens."""
    found: list[tuple[str, Callable[[], Way | None]]] = [
        (f"without {name}", partial(_without, look, constraints, name)) for name in conflict if name != _BUDGET
    ]
    if _BUDGET in conflict:
        if look.asked.request.stored is None and len(look.asked.topology.axes) > 1:
            found.append(("other shapes of the mesh", partial(_other_mesh, look)))
        if smaller is not None:
            found.append(("a smaller batch", partial(_smaller_batch, look, smaller)))
        if look.asked.request.stored is None:
            found.append(("more ranks", partial(_more_ranks, look)))
    return found


def _constraints(request: Request) -> dict[str, Callable[[Request], Request]]:
    """What was asked for, by name, with what lets go of it; the budget last."""
    found: dict[str, Callable[[Request], Request]] = {}
    if request.recompute != "auto":
        found[f"recompute={request.recompute!r}"] = lambda r: replace(r, recompute="auto")
    if request.reshard is False:
        found["reshard_after_forward=False"] = lambda r: replace(r, reshard=None)
    if request.regather is False:
        found["regather_activations=False"] = lambda r: replace(r, regather=None)
    if request.strategy != "auto":
        found[f"strategy={request.strategy!r}"] = lambda r: replace(r, strategy="auto")
    for pattern, pin in request.pins.items():
        wanted = pin if isinstance(pin, Pin) else Pin(pin)
        asked = {pattern: str(wanted)}
        found[f"pins={asked}"] = lambda r, p=pattern: replace(r, pins={k: v for k, v in r.pins.items() if k != p})  # type: ignore[misc]
    if request.stored is not None:
        found["the layouts that the parameters have"] = lambda r: replace(r, stored=None)
    return {_BUDGET: lambda r: r, **found}


def _named(constraint: str, asked: Search) -> str:
    return f"{_BUDGET} of {gib(asked.budget)}" if constraint == _BUDGET else constraint


def _keeping(
    look: _Look, constraints: Mapping[str, Callable[[Request], Request]], kept: Sequence[str]
) -> Candidate | None:
    """A plan that fits, with all constraints but those `kept` let go of."""
    request = look.asked.request
    for name, let_go in constraints.items():
        if name not in kept:
            request = let_go(request)
    return _planned(look.at(request=request, budget=look.asked.budget if _BUDGET in kept else math.inf))


def _conflict(
    look: _Look, constraints: Mapping[str, Callable[[Request], Request]], missed: list[str]
) -> tuple[str, ...]:
    """A smallest subset of the given constraints, which conflict, that no plan satisfies together.

    If time runs out before it is found: all of them, and `missed` says so.
    """
    names = list(constraints)
    try:
        for size in range(1, len(names)):
            for kept in combinations(names, size):
                if _keeping(look, constraints, kept) is None:
                    return kept
    except _OutOfTimeError:
        missed.append(_SUBSETS)
    return tuple(names)


def _planned(look: _Look) -> Candidate | None:
    """A plan that fits, quickly: the strategies by hand first, the search where they do not do.

    Raises:
        _OutOfTimeError: none was found before the look's end, and not every strategy was tried to its own.
    """
    asked = look.asked
    request = asked.request
    if _least_bytes(asked) > asked.budget:
        return None
    stored = request.stored is not None
    names = SIMPLEST_FIRST if request.strategy == "auto" and not stored else (request.strategy,)
    found: list[Candidate] = []
    missed: list[str] = []
    for name in names:
        fits = best(found, asked.budget)
        if name == "auto" and fits is not None:
            break
        left_s = look.end_s - time.process_time()
        if left_s <= 0:
            if fits is not None:
                break
            raise _OutOfTimeError
        try:
            found += replace(asked, budgeted_s=min(_BUDGETED_S, left_s), missed=missed).candidates(name)
        except (NoFeasiblePlanError, PinError):
            continue
    fits = best(found, asked.budget)
    if fits is None and missed:
        raise _OutOfTimeError
    return fits


def _least_bytes(asked: Search) -> float:
    """What every plan keeps on some rank: parameters and their optimizer states, spread over all ranks."""
    spec = OPTIMIZERS[asked.request.optimizer]
    total = 0.0
    for place in asked.paddings.under(asked.request.strategy).whole.places:
        if place.parameter is not None:
            shape, trainable = tuple(map(math.prod, place.dims)), place.parameter.requires_grad
            kept = at_rest(shape, spec, item_bytes=place.itemsize, trainable=trainable)
            total += place.count * (kept.parameters + kept.states)
    return total / asked.topology.ranks


def _without(look: _Look, constraints: Mapping[str, Callable[[Request], Request]], name: str) -> Way | None:
    """Without one of the constraints that conflict, all others kept."""
    plan = _keeping(look, constraints, [other for other in constraints if other != name])
    return None if plan is None else Way(f"without {name}", plan)


def _on(look: _Look, sizes: Sequence[int]) -> Candidate | None:
    """A plan on a mesh of other sizes; None where none fits, or where the batch cannot be split so."""
    asked = look.asked
    mesh = asked.topology.resized(sizes)
    try:
        paddings = asked.paddings.on(mesh.sizes, asked.batch_axes)
        return _planned(look.at(topology=mesh, paddings=paddings, budget=asked.request.budget_on(mesh)))
    except ValueError:  # a batch or a pinned dim that these sizes do not divide
        return None


def _mesh_text(asked: Search, sizes: Sequence[int]) -> str:
    mesh = {axis.name: size for axis, size in zip(asked.topology.axes, sizes, strict=True)}
    return f"mesh={mesh}"


def _other_mesh(look: _Look) -> Way | None:
    """The same ranks and batch with a factor of two moved between axes, once or twice: the fastest of those tried."""
    sizes = look.asked.topology.sizes
    shapes: dict[tuple[int, ...], None] = {}
    for factor in (2, 4, 8):
        for source in range(len(sizes)):
            for target in range(len(sizes)):
                if source != target and sizes[source] % factor == 0:
                    moved = list(sizes)
                    moved[source] //= factor
                    moved[target] *= factor
                    shapes.setdefault(tuple(moved))
    ways: list[Way] = []
    for shape in list(shapes)[: 2 * _MESHES]:
        if len(ways) == _MESHES:
            break
        try:
            plan = _on(look, shape)
        except _OutOfTimeError:
            if not ways:
                raise
            break
        if plan is not None:
            ways.append(Way(_mesh_text(look.asked, shape), plan))
    return min(ways, key=lambda way: way.plan.schedule.step_time_s, default=None)


def _smaller_batch(look: _Look, smaller: Smaller) -> Way | None:
    asked = look.asked
    for divisor in _DIVISORS:
        if time.process_time() >= look.end_s:
            raise _OutOfTimeError
        program = smaller(divisor)
        if program is None:
            return None
        try:
            plan = _planned(look.at(paddings=PaddingsOf(program, asked.topology.sizes, asked.batch_axes)))
        except ValueError:
            return None
        if plan is not None:
            return Way(f"a batch per rank {divisor} times smaller", plan)
    return None


def _more_ranks(look: _Look) -> Way | None:
    """The same global batch on more ranks."""
    asked = look.asked
    sizes = asked.topology.sizes
    axes = [*reversed(asked.batch_axes), *(a for a in range(len(sizes)) if a not in asked.batch_axes)]
    for factor in _MORE_RANKS:
        for axis in axes:
            shape = [size * (factor if a == axis else 1) for a, size in enumerate(sizes)]
            if (plan := _on(look, shape)) is not None:
                ranks = math.prod(shape)
                return Way(f"the same global batch on {ranks} ranks, as {_mesh_text(asked, shape)}", plan)
    return None


def what_is_needed(asked: Search, found: Sequence[Candidate], reasons: Mapping[str, str]) -> str:
    """What the smallest plan takes, and what of it is largest; or why there is none at all."""
    if not found:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    nearest = smallest(found)
    schedule = nearest.schedule
    needed, top = schedule.peak_memory_bytes, schedule.memory.top[0]
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in schedule.memory.by_kind.items() if size > needed // 1000)
    return (
        f"no plan fits in {gib(asked.budget)} per device: the smallest found ({nearest.strategy}, recompute "
        f"{nearest.recompute!r}) needs {gib(needed)}, {gib(needed - asked.budget)} too much, at "
        f"{schedule.peak_moment}. By kind: {kinds}. Largest tensor: {top.name} ({gib(top.bytes)})."
    )
