"""The exact solver: the cheapest picks of a `Problem`, with the proof.

A problem is branched on by linear programs (`linear.py`), mostly one, where tensors can go between a few hundred pairs
of states each. Over several tensor axes layouts multiply, and few of them are near any good plan. So there:

    messages -> a bound, and picks: where they cost as much as the bound, that is it
             -> the excess of each option -> the few options with little of it, solved exactly
             -> done, where a plan with any option that was left out costs more; else more options

Where a budget binds there, bytes get a price, and branch and bound closes what no price can (`branch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.errors import NoFeasiblePlanError
from passes.solver.branch import cheapest_within
from passes.solver.descent import Descent
from passes.solver.linear import Near, cheapest, cheapest_among
from passes.solver.messages import Messages
from passes.solver.pairwise import Floats
from passes.solver.problem import Problem, evaluate

_FEW = 250
"""Pairs of states per link up to which linear programs are quicker. Their time is in the pairs, some 60 microseconds
each; that of messages in the links of tensors and readers, half a millisecond each and pass, up to twenty times."""
_GAP, _LIMIT_S = 1e-4, 120.0
PROVED_GAP = 8e-3
"""What is proved where there are more, and enough anywhere: a share of costs that are known to several percent."""
_BUDGETED_GAP, _BUDGETED_LIMIT_S = 4e-3, 15.0
"""What is proved within a budget, and the seconds it may take, where nothing else is asked for."""
_PASSES = 20
"""How often messages are passed before the linear program is asked, and then again at most."""
_AT_ONCE = 4
"""How often they are passed between two looks at whether the proof is complete."""
_LEAST_RISE = 1e-6
"""Share of the bound that a pass must add, else the next would add nothing either."""
_LIKELY = 3e-4
"""Share of the bound that the excess of an option of the best plan is expected to be below."""


@dataclass(frozen=True)
class Solution:
    """Picks, their price, and what was proved: no picks cost less than `bound_s`."""

    picks: tuple[int, ...]
    seconds: float
    bytes: float
    bound_s: float

    @property
    def gap(self) -> float:
        """Share by which the best plan could still be cheaper."""
        return max(0.0, (self.seconds - self.bound_s) / self.seconds) if self.seconds > 0 else 0.0

    @property
    def is_proved(self) -> bool:
        """Whether the gap is negligible."""
        return self.gap <= PROVED_GAP


def solve(
    problem: Problem,
    *,
    gap: float | None = None,
    time_limit_s: float | None = None,
    below_s: float = math.inf,
    known: Sequence[tuple[int, ...]] = (),
    near: Near | None = None,
) -> Solution:
    """The cheapest picks that fit, proved to within `gap` (relative), or what is found in the time, with its gap.

    `known`: picks that are good already: within a budget, or by linear programs, what is found costs no more. `near`:
    what was left of the same problem within another budget, to start from.

    Raises:
        NoFeasiblePlanError: nothing fits the budget that costs less than `below_s`, or no plan was found in time.
    """
    budgeted = math.isfinite(problem.budget_bytes)
    few = _pairs_per_link(problem) <= _FEW
    if gap is None:
        gap = PROVED_GAP if not few else _BUDGETED_GAP if budgeted else _GAP
    time_limit_s = (_BUDGETED_LIMIT_S if budgeted else _LIMIT_S) if time_limit_s is None else time_limit_s
    if few:
        below_s = below_s if budgeted else math.inf
        found = cheapest(problem, gap=gap, time_limit_s=time_limit_s, below_s=below_s, known=known, near=near)
        return _solution(problem, *found)
    if budgeted:
        found = cheapest_within(problem, gap=gap, time_limit_s=time_limit_s, below_s=below_s, known=known)
        return _solution(problem, *found)
    messages, descent = Messages(problem), Descent(problem)
    best: Solution | None = None
    for _ in range(_PASSES):
        before = messages.bound_s[0]
        messages.improve()
        for picks in _near(messages.picks()[0], descent):
            met = _solution(problem, picks, float(messages.bound_s[0]))
            if best is None or met.seconds < best.seconds:
                best = met
        assert best is not None
        best = replace(best, bound_s=min(float(messages.bound_s[0]), best.seconds))
        if math.isfinite(best.seconds) and best.gap <= gap:
            return best
        if messages.bound_s[0] - before < _LEAST_RISE * abs(messages.bound_s[0]):
            break
    return _among_likely(problem, messages, gap, time_limit_s)


def _near(picks: tuple[int, ...], descent: Descent) -> Iterator[tuple[int, ...]]:
    """The picks, and what they become when each variable in turn takes what is cheapest beside the others."""
    yield picks
    yield descent.within_budget(picks, 0.0)


def _pairs_per_link(problem: Problem) -> float:
    """Between how many pairs of states a tensor can go to a reader, on average; 0 where nothing is read."""
    pairs = [len(set(flow.states)) * len(set(reader.states)) for flow in problem.flows for reader in set(flow.readers)]
    return sum(pairs) / max(len(pairs), 1)


def _solution(problem: Problem, picks: tuple[int, ...], bound_s: float) -> Solution:
    seconds, size = evaluate(problem, picks)
    return Solution(picks, seconds, size, min(bound_s, seconds))


def _among_likely(problem: Problem, messages: Messages, gap: float, time_limit_s: float) -> Solution:
    """The cheapest picks of options with little excess, where the rest is proved to be in no cheaper plan."""
    allowed_s = _LIKELY * abs(float(messages.bound_s[0]))
    while True:
        kept = _likely(_excess_s(messages), allowed_s)
        if all(len(of) == len(costs) for of, costs in zip(kept, problem.option_s, strict=True)):
            return _solution(problem, *cheapest(problem, gap=gap, time_limit_s=time_limit_s))
        try:
            found = _solution(problem, *cheapest_among(problem, kept, gap=gap, time_limit_s=time_limit_s))
        except NoFeasiblePlanError:
            allowed_s = 10 * allowed_s + float(max(of.max() for of in _excess_s(messages))) * _LIKELY
            continue
        for _ in range(_PASSES // _AT_ONCE):
            without_s = float(messages.bound_s[0]) + _least_beside(_excess_s(messages), kept)
            if without_s >= found.seconds * (1 - gap):
                return replace(found, bound_s=min(found.bound_s, without_s))
            for _ in range(_AT_ONCE):
                messages.improve()
        allowed_s = max(2 * allowed_s, found.seconds - float(messages.bound_s[0]))


def _excess_s(messages: Messages) -> list[Floats]:
    return [of[0] for of in messages.excess_s()]


def _likely(excess_s: Sequence[Floats], allowed_s: float) -> list[list[int]]:
    """By variable, the options with no more excess than that, and the one with the least."""
    return [np.flatnonzero(of <= max(allowed_s, of.min())).tolist() for of in excess_s]


def _least_beside(excess_s: Sequence[Floats], kept: Sequence[Sequence[int]]) -> float:
    """The least excess of an option that is not kept; inf where all are."""
    rest = (np.delete(of, have).min(initial=math.inf) for of, have in zip(excess_s, kept, strict=True))
    return float(min(rest, default=math.inf))
