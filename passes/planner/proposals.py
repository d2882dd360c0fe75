"""Candidates for a plan: under each strategy, with each choice of padded dims and each way to compute again what does
not fit."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from costmodel.collectives import taken_shares
from costmodel.hardware import Topology
from costmodel.memory import OPTIMIZERS
from passes.analysis.dims import Value
from passes.errors import NoFeasiblePlanError
from passes.padding.pad import Pad
from passes.padding.paddings import Padding, Paddings, PaddingsOf
from passes.padding.uneven import stored_pads, uneven_dims, used_pads
from passes.planner.decisions import without
from passes.planner.fitting import (
    TIE,
    Candidate,
    Enough,
    Posed,
    Request,
    as_asked,
    best,
    fitting,
    smallest,
)
from passes.play.blocks import NotPeriodicError
from passes.play.tracks import Costs
from passes.price.price import price
from passes.space.named import alike_axes, tensor_axes
from passes.space.pins import PinError
from passes.space.recompute import Mode, recomputation
from passes.space.space import Space, search_space

Progress = Callable[[str], None]
BY_HAND = ("ddp", "fsdp", "megatron")
SIMPLEST_FIRST = (*BY_HAND, "auto")
HIDDEN_SHARES = (1.0, 0.3, 0.05)
"""What `auto` counts of the time that state gathers and gradient reductions take: all of it, or what often stays
exposed behind compute, or next to nothing. Each gives a proposal; the schedule judges them."""
_LEFT_OUT_S = 30.0
"""Seconds of the processor after which no further padded dim is left out to see whether that is faster."""
_AUTO: tuple[Mode, ...] = ("pointwise", "selective", "widening", "full")
"""What `recompute="auto"` tries, each only where the one before does not fit at its fastest: to compute pointwise ops
again costs next to nothing, as they fuse with what reads them."""


Way = tuple[Mode, bool]
"""What backward computes again, and whether it gathers activations again."""


@dataclass(frozen=True)
class Search:
    """Finds candidates for one program and mesh, under one strategy after another; `auto` makes at most `most`
    proposals of each kind.

    budgeted_s: CPU seconds per strategy after which no further ways to fit are tried, once the budget binds and
    something fits; with `gives_up`, also while nothing fits. What was left out is added to `missed`. joined: axes that
    are alike make the same choices. fastest_s: step time of the fastest plan known to fit; a solution that is slower
    before it fits is not pursued.
    """

    paddings: PaddingsOf
    topology: Topology
    batch_axes: tuple[int, ...]
    request: Request
    budget: float
    progress: Progress = lambda stage: None
    most: int = len(HIDDEN_SHARES)
    budgeted_s: float = 60.0
    gives_up: bool = False
    joined: bool = False
    fastest_s: float = math.inf
    missed: list[str] = field(default_factory=list)
    _looked: set[tuple[object, ...]] = field(default_factory=set)
    """What was looked at under the strategy: with which dims padded, in which way, for which shares."""
    _end_s: float = math.inf

    def candidates(self, name: str) -> list[Candidate]:
        """Solutions under a strategy, the simplest first.

        Raises:
            NoFeasiblePlanError: there is none.
        """
        return replace(self, _looked=set(), _end_s=time.process_time() + self.budgeted_s)._together_and_apart(name)

    def _together_and_apart(self, name: str) -> list[Candidate]:
        """Solutions under a strategy; where several axes are alike, those of `auto` are found in two rounds.

        First all axes that are alike make the same choices, as one axis of all their ranks would; then each chooses by
        itself. The second round can only lower the solver's sum of costs, not always the schedule's time, so candidates
        of both are kept.
        """
        if name != "auto" or max(map(len, alike_axes(self.topology.sizes, self.batch_axes))) < 2:
            return self._padded(name)
        half_s = (self._end_s + time.process_time()) / 2
        try:
            joined = replace(self, joined=True, missed=[], _end_s=half_s)._padded(name)
        except (NoFeasiblePlanError, PinError):  # a pin may tell the axes apart
            return self._padded(name)
        chosen = best(joined, self.budget) or smallest(joined)
        plainly = self.paddings.under(name)
        needed = stored_pads(plainly.whole, self.request.stored or {}, self.topology.sizes)
        alone = uneven_dims(plainly.whole, self.topology.sizes, self.batch_axes, name, alone=True)
        found = [*joined, *self._tried(name, plainly, needed, joined, others=True)]
        if chosen.padding.pads != needed or chosen.padding.repeated_keys:
            repeated = self.paddings.under(name, chosen.padding.repeated_keys)
            found += self._tried(name, repeated, chosen.padding.pads, found, others=True)
        if (pads := plainly.join(needed, alone)) not in (needed, chosen.padding.pads):
            found += self._tried(name, plainly, pads, found, others=True)
        return found

    def _padded(self, name: str) -> list[Candidate]:
        """Solutions under a strategy with dims padded where that helps.

        A named strategy pads what it wants to split and cannot otherwise. `auto` pads where that is faster, dim by dim,
        the one with the most padding first.

        Raises:
            NoFeasiblePlanError: there is none.
        """
        plainly = self.paddings.under(name)
        paddings = self.paddings.under(name, self.paddings.may_repeat_keys(name))
        needed = stored_pads(paddings.whole, self.request.stored or {}, self.topology.sizes)
        uneven = uneven_dims(paddings.whole, self.topology.sizes, self.batch_axes, name)
        wanted = paddings.join(needed, uneven)
        if wanted == needed and paddings is plainly:
            return self._solved(name, plainly, needed)
        first = self._tried(name, paddings, wanted)
        padded = self._as_used(name, paddings, needed, wanted, first, repeats=paddings is not plainly)
        if name != "auto":
            return padded if best(padded, self.budget) else self._plainly_or(name, padded, plainly, needed)
        if not padded:
            return self._tried(name, plainly, needed, first) or self._solved(name, plainly, needed)
        bare = stored_pads(plainly.whole, self.request.stored or {}, self.topology.sizes)
        plain = self._tried(name, plainly, bare, padded, others=True)
        untried = self._with_fewer(name, paddings, plain, padded, bare, repeats=paddings is not plainly)
        chosen = best([*plain, *padded], self.budget)
        if chosen is not None and chosen.padding.pads not in (wanted, bare) and self._binds(name, chosen):
            # So far it computes again what others that fit do.
            repeated = self.paddings.under(name, chosen.padding.repeated_keys)
            padded += self._tried(name, repeated, chosen.padding.pads, [chosen], others=True)
        padded = [replace(each, untried=tuple(p for p in each.padding.pads if p in untried)) for each in padded]
        return [*plain, *padded]

    def _as_used(
        self, name: str, paddings: Paddings, needed: tuple[Pad, ...], wanted: tuple[Pad, ...],
        first: Sequence[Candidate], *, repeats: bool,
    ) -> list[Candidate]:  # fmt: skip
        """Solutions with fewer dims padded: those that are `needed`, and those that a solution of `first` splits.

        `first` was solved with all `wanted` dims padded. `repeats`: keys are repeated too, so that padding the needed
        dims alone is not the plain program.
        """
        tried: dict[tuple[Pad, ...], list[Candidate]] = {}
        for each in first:
            used = paddings.join(needed, used_pads(each.padding, each.space, each.assignment))
            tried.setdefault(used, []).append(each)
        padded: list[Candidate] = []
        for used, found in tried.items():
            if used == wanted:
                padded += found
            elif used != needed or repeats:
                padded += self._tried(name, paddings, used, [*first, *padded]) or found
        return padded

    def _plainly_or(
        self, name: str, padded: list[Candidate], plainly: Paddings, needed: tuple[Pad, ...]
    ) -> list[Candidate]:
        """Solutions with only the needed dims padded; `padded` where a pin asks for a layout that only padding
        allows."""
        try:
            return self._solved(name, plainly, needed)
        except PinError:
            if not padded:
                raise
            return padded

    def _with_fewer(
        self, name: str, paddings: Paddings, plain: Sequence[Candidate], padded: list[Candidate],
        needed: tuple[Pad, ...], *, repeats: bool,
    ) -> set[Pad]:  # fmt: skip
        """Add to `padded` solutions that leave out one pad of the best so far, the pad that adds the most first.

        Returns the pads that there was no time to leave out. `repeats`: as in `_as_used`.
        """
        end_s, untried = time.process_time() + _LEFT_OUT_S, set()
        every = {pad for each in padded for pad in each.padding.pads}
        for pad in sorted(every, key=lambda pad: (pad.size / pad.padded, pad.node)):
            chosen = best([*plain, *padded], self.budget)
            if chosen is None or pad not in chosen.padding.pads or pad in needed:
                continue
            if time.process_time() > end_s:
                untried.add(pad)
                continue
            fewer = tuple(p for p in chosen.padding.pads if p != pad)
            if fewer != needed or repeats:
                padded += self._tried(name, paddings, fewer, [chosen], HIDDEN_SHARES[:1])
        return untried

    def _tried(
        self,
        name: str,
        paddings: Paddings,
        pads: tuple[Pad, ...],
        beside: Sequence[Candidate] = (),
        shares: Sequence[float] | None = None,
        *,
        others: bool = False,
    ) -> list[Candidate]:
        """Solutions with these dims padded; none where nothing fits, a pin asks for a layout that other pads allow, or
        layers that are alike would differ (only the whole graph could play that).

        Where a budget binds, the best of `beside` tells which ways to fit are tried; with `others`, the remaining ways
        follow.
        """
        search, near = self, best(beside, self.budget)
        if near is not None and not self._binds(name, near):
            near = None
        if near is not None:
            if self._is_late():
                self.missed.append("other choices of padded dims, or of axes that choose apart")
                return []
            search = replace(self, fastest_s=min(self.fastest_s, near.schedule.step_time_s))
        ways = self._ways(name, near, others=others)
        ways = [way for way in ways if self._key(paddings, pads, way, self._shares(name, shares)) not in self._looked]
        if not ways:
            return []
        try:
            return search._solved(name, paddings, pads, shares, ways)
        except (NoFeasiblePlanError, NotPeriodicError, PinError):
            return []

    def keeping(self, chosen: Candidate, found: Sequence[Candidate]) -> list[Candidate]:
        """Solutions with gathered parameters kept for backward; they may be too large.

        Where some of those `found` that keep them, but were solved with them freed, are no slower than `chosen`, they
        are solved under the strategy of the best of those and `auto`, with as much computed again as in the fastest of
        those and in the chosen one; else as the chosen one is, with all time counted. The same dims are padded. None
        without tensor axes, where layouts do not depend on it.
        """
        if not tensor_axes(self.topology.sizes, self.batch_axes):
            return []
        enough_s = chosen.schedule.step_time_s
        kept = [each for each in found if _is_kept_late(each) and each.schedule.step_time_s <= enough_s]
        fastest = min(kept, key=lambda each: each.schedule.step_time_s, default=chosen)
        near = chosen if _is_kept_late(chosen) else fastest
        tried = {_way_of(near), _way_of(fastest)}
        search = replace(
            self,
            request=replace(self.request, reshard=False),
            joined=near.origin.joined,
            fastest_s=enough_s,
            _end_s=time.process_time() + self.budgeted_s,
        )
        kept_early: list[Candidate] = []
        for name in dict.fromkeys((near.strategy, "auto") if kept else ("auto",)):
            paddings = self.paddings.under(name, near.padding.repeated_keys)
            if ways := [way for way in self._ways(name) if way in tried]:
                with suppress(NoFeasiblePlanError, NotPeriodicError, PinError):
                    shares = None if kept else HIDDEN_SHARES[:1]
                    kept_early += search._solved(name, paddings, near.padding.pads, shares, ways)
        return kept_early

    def _binds(self, name: str, chosen: Candidate) -> bool:
        """Whether the budget kept the chosen candidate from being faster."""
        return not chosen.unbound or _way_of(chosen) != self._ways(name)[0]

    def _key(self, paddings: Paddings, pads: tuple[Pad, ...], way: Way, shares: Sequence[float]) -> tuple[object, ...]:
        return self.joined, paddings.repeated_keys, pads, way, tuple(shares)

    def _shares(self, name: str, shares: Sequence[float] | None) -> Sequence[float]:
        return shares or HIDDEN_SHARES[: self.most if name == "auto" else 1]

    def _is_late(self) -> bool:
        return time.process_time() > self._end_s

    def _solved(
        self,
        name: str,
        paddings: Paddings,
        pads: tuple[Pad, ...],
        shares: Sequence[float] | None = None,
        ways: Sequence[Way] | None = None,
    ) -> list[Candidate]:
        """Solutions with these dims padded, each looked for in these ways to compute again (None: in all)."""
        padding = paddings.of(pads)
        self.progress(f"solving {name}" + (f", {len(pads)} dims padded" if pads else ""))
        space = self._space(name, padding)
        shares = self._shares(name, shares)
        unique: dict[tuple[Mode, bool, tuple[int, ...]], Candidate] = {}
        suffices: list[Way] = []
        seen: set[tuple[frozenset[Value], frozenset[int], bool]] = set()
        enough = Enough(self.fastest_s)
        known: dict[tuple[int, int], float] = {}
        costs: Costs = {}
        for turn, way in enumerate(ways or self._ways(name)):
            if any(_takes_less(way, than) for than in suffices):
                continue
            mode, regather = way
            self._looked.add(self._key(paddings, pads, way, shares))
            if turn and self._is_late() and (self.gives_up or math.isfinite(enough.step_s)):
                self.missed.append(f"recompute {mode!r}" + (" with activations gathered again" if regather else ""))
                continue
            recomputed = space.recomputed
            if mode != recomputed.mode:
                recomputed = replace(recomputation(padding.analysis, mode), reshard=recomputed.reshard)
            space = replace(space, recomputed=replace(recomputed, regather=regather))
            if (again := (recomputed.held, recomputed.again, regather)) in seen:
                continue  # the mode adds nothing here
            seen.add(again)
            priced = price(space, OPTIMIZERS[self.request.optimizer], known)
            posed = Posed(self.request, self.budget, name, self.joined, padding, space, priced, costs)
            unbound = True
            for share in shares:
                if not unbound and self._is_late():
                    self.missed.append(f"further solutions with recompute {mode!r}")
                    break
                candidate = fitting(posed, share, enough)
                unbound = unbound and candidate is not None and candidate.unbound
                if candidate is not None:
                    unique.setdefault((mode, regather, candidate.assignment), candidate)
            if unbound:
                suffices.append(way)
        return list(unique.values())

    def _ways(self, name: str, near: Candidate | None = None, *, others: bool = True) -> list[Way]:
        """What backward may compute again, and whether it gathers activations again: the least first; where `near` is
        given, as it does and one step less, and then the `others`."""
        modes = _AUTO if self.request.recompute == "auto" else (self.request.recompute,)
        either = (False, True) if self.request.regather is None else (self.request.regather,)
        if name not in ("auto", "megatron") or not tensor_axes(self.topology.sizes, self.batch_axes):
            either = either[:1]  # state is gathered there, no activations
        ways = list(itertools.product(modes, either))
        if near is None:
            return ways
        last = ways.index(_way_of(near))
        first = ways[max(last - 1, 0) : last + 1]
        return [*first, *(way for way in ways if others and way not in first)]

    def _space(self, name: str, padding: Padding) -> Space:
        """What there is to choose from."""
        request = self.request
        space = search_space(
            padding.analysis.program,
            self.topology,
            self.batch_axes,
            request.stored,
            strategy=name,
            pins=request.pins,
            recompute=_AUTO[0] if request.recompute == "auto" else request.recompute,
            reshard=request.reshard is not False,
            joined=self.joined,
            analysis=padding.analysis,
        )
        return without(replace(space, async_tp=request.async_tp), request.without)


def _is_kept_late(candidate: Candidate) -> bool:
    """Whether gathered parameters are kept that were freed in what was solved."""
    return candidate.origin.recomputed.reshard and not candidate.space.recomputed.reshard


def _way_of(candidate: Candidate) -> Way:
    return candidate.recompute, candidate.space.recomputed.regather


def _takes_less(way: Way, than: Way) -> bool:
    """Whether one way to compute again keeps less for backward than another."""
    (mode, regather), (other, regathers) = way, than
    if mode == other:
        return regather and not regathers
    return _AUTO.index(mode) > _AUTO.index(other) and regather >= regathers


def with_parameters_kept(found: Sequence[Candidate], budget: float, request: Request) -> list[Candidate]:
    """Candidates whose gathered parameters stay from forward to backward, where that can be the fastest that fits.

    Where they do not fit beside what is kept for backward, more of that is gathered or computed again.
    """
    kept: list[Candidate] = []
    for candidate in found:
        fastest = best([*found, *kept], budget)
        enough_s = math.inf if fastest is None else fastest.schedule.step_time_s * (1 - TIE)
        if _may_gain(candidate, budget, enough_s, request):
            kept += _kept_in_each_way(candidate, budget, enough_s, request)
    return kept


def _may_gain(candidate: Candidate, budget: float, enough_s: float, request: Request) -> bool:
    """Whether a candidate that keeps its gathered parameters may fit and take less than `enough_s`.

    It gains no more than its backward waits for parameters and is slowed down by gathers beside compute, and no fewer
    bytes are alive than those at rest and of every gathered parameter.
    """
    schedule = candidate.schedule
    gathers = [c for c in schedule.collectives if c.role == "parameter" and c.phase == "backward"]
    slowing = {axes: _slowing(axes, candidate.space.topology) for axes in {c.axes for c in gathers}}
    taken_s = sum(c.exposed_s + slowing[c.axes] * c.hidden_s for c in gathers)
    at_rest = sum(schedule.memory.by_kind.get(kind, 0) for kind in ("parameters", "optimizer"))
    may_fit = at_rest + sum(c.count * c.bytes for c in gathers) <= budget
    return bool(gathers) and may_fit and schedule.step_time_s - request.accumulate * taken_s < enough_s


def _kept_in_each_way(candidate: Candidate, budget: float, enough_s: float, request: Request) -> list[Candidate]:
    """The candidate with gathered parameters kept, with ever more computed again until it fits or is too slow."""
    modes = _AUTO[_AUTO.index(candidate.recompute) :] if request.recompute == "auto" else (candidate.recompute,)
    regather = candidate.space.recomputed.regather
    sends = any(c.role == "activation" and c.kind == "all_gather" for c in candidate.schedule.collectives)
    either = (regather, True) if request.regather is None and sends and not regather else (regather,)
    kept: list[Candidate] = []
    for again in either:
        for mode in modes:
            kept.append(_kept(candidate, mode, again, request))
            schedule = kept[-1].schedule
            if schedule.peak_memory_bytes <= budget or schedule.step_time_s >= enough_s:
                break
        if kept[-1].recompute == modes[0]:
            break  # nothing had to be computed again
    return kept


def _kept(candidate: Candidate, mode: Mode, regather: bool, request: Request) -> Candidate:
    """The candidate's layouts with gathered parameters kept for backward, which computes again what `mode` says and,
    where `regather`, gathers activations again."""
    recomputed = candidate.space.recomputed
    if mode != candidate.recompute:
        again = recomputation(candidate.padding.analysis, mode)
        recomputed = replace(again, postpone=recomputed.postpone)
    space = replace(candidate.space, recomputed=replace(recomputed, reshard=False, regather=regather))
    return replace(candidate, space=space, schedule=as_asked(space, candidate.assignment, request))


def _slowing(axes: Sequence[str], topology: Topology) -> float:
    """The share of the device that a collective over axes takes from compute beside it, at most."""
    return max(taken_shares([topology.axis(name) for name in axes], topology))
