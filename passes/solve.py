"""The exact solver: the cheapest picks of a `Problem`, with the proof.

A small problem is one linear program (`milp.py`). Over several tensor axes layouts multiply, and few of them are near
any good plan. So there:

    messages -> a bound, and picks: where they cost as much as the bound, that is it
             -> the excess of each option -> the few options with little of it, solved exactly
             -> done, where a plan with any option that was left out costs more; else more options

A budget gets a price per byte first (a Lagrange multiplier): seconds plus priced bytes, less what the whole budget is
worth, is below the seconds of any plan that fits, so the bound and the excess of that problem hold for plans that fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.errors import NoFeasiblePlanError
from passes.messages import Floats, Messages
from passes.milp import cheapest
from passes.problem import Problem, Reader, evaluate

_FEW = 8000
"""Pairs of states up to which a problem is solved as one linear program: messages would take as long."""
_PASSES = 20
"""How often messages are passed before the linear program is asked, and then again at most."""
_AT_ONCE = 4
"""How often they are passed between two looks at whether the proof is complete."""
_LEAST_RISE = 1e-6
"""Share of the bound that a pass must add, else the next would add nothing either."""
_LIKELY = 3e-4
"""Share of the bound that the excess of an option of the best plan is expected to be below."""
_ALIKE = 1e-5
"""Relative difference of two costs that counts as none."""


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


def solve(problem: Problem, *, gap: float = 1e-4, time_limit_s: float = 120.0) -> Solution:
    """The cheapest picks that fit, proved to within `gap` (relative).

    Raises:
        NoFeasiblePlanError: nothing fits the budget, or no plan was found in time.
    """
    if _pairs(problem) <= _FEW or math.isfinite(problem.budget_bytes):
        return _exactly(problem, gap, time_limit_s)
    messages = Messages(problem)
    for _ in range(_PASSES):
        before = messages.bound_s
        messages.improve()
        found = _solution(problem, messages.picks(), messages.bound_s)
        if math.isfinite(found.seconds) and found.gap <= min(gap, _ALIKE):
            return found
        if messages.bound_s - before < _LEAST_RISE * abs(messages.bound_s):
            break
    return _among_likely(problem, messages, 0.0, gap, time_limit_s)


def _pairs(problem: Problem) -> int:
    """How many pairs of states tensors can go between."""
    return sum(
        len(set(flow.states)) * len(set(reader.states)) for flow in problem.flows for reader in set(flow.readers)
    )


def _solution(problem: Problem, picks: tuple[int, ...], bound_s: float) -> Solution:
    seconds, size = evaluate(problem, picks)
    return Solution(picks, seconds, size, min(bound_s, seconds))


def _exactly(problem: Problem, gap: float, time_limit_s: float) -> Solution:
    return _solution(problem, *cheapest(problem, gap=gap, time_limit_s=time_limit_s))


def _among_likely(problem: Problem, messages: Messages, less_s: float, gap: float, time_limit_s: float) -> Solution:
    """The cheapest picks of options with little excess, where the rest is proved to be in no cheaper plan.

    The messages' bound, less `less_s`, is one of the problem's.
    """
    allowed_s = _LIKELY * abs(messages.bound_s)
    while True:
        kept = [np.flatnonzero(of <= max(allowed_s, of.min())).tolist() for of in messages.excess_s()]
        if all(len(of) == len(costs) for of, costs in zip(kept, problem.option_s, strict=True)):
            return _exactly(problem, gap, time_limit_s)
        try:
            found = _exactly(_only(problem, kept), gap, time_limit_s)
        except NoFeasiblePlanError:
            allowed_s = 10 * allowed_s + float(max(of.max() for of in messages.excess_s())) * _LIKELY
            continue
        picks = tuple(of[pick] for of, pick in zip(kept, found.picks, strict=True))
        for _ in range(_PASSES // _AT_ONCE):
            without_s = messages.bound_s - less_s + _least_beside(messages.excess_s(), kept)
            if without_s >= found.seconds * (1 - gap):
                return replace(found, picks=picks, bound_s=min(found.bound_s, without_s))
            for _ in range(_AT_ONCE):
                messages.improve()
        allowed_s = max(2 * allowed_s, found.seconds - (messages.bound_s - less_s))


def _least_beside(excess_s: Sequence[Floats], kept: Sequence[Sequence[int]]) -> float:
    """The least excess of an option that is not kept; inf where all are."""
    rest = (np.delete(of, have).min(initial=math.inf) for of, have in zip(excess_s, kept, strict=True))
    return float(min(rest, default=math.inf))


def _only(problem: Problem, kept: Sequence[Sequence[int]]) -> Problem:
    """The problem with these options alone."""

    def of(values: Sequence[float], variable: int) -> tuple[float, ...]:
        return tuple(values[i] for i in kept[variable])

    def reader(each: Reader) -> Reader:
        return Reader(each.variable, tuple(each.states[i] for i in kept[each.variable]))

    def readers(every: Iterable[Reader]) -> tuple[Reader, ...]:
        return tuple(map(reader, every))

    flows = (
        replace(flow, states=tuple(flow.states[i] for i in kept[flow.producer]), readers=readers(flow.readers))
        for flow in problem.flows
    )
    holds = (
        replace(hold, readers=readers(hold.readers), given=hold.given and reader(hold.given)) for hold in problem.holds
    )
    return replace(
        problem,
        option_s=tuple(of(costs, v) for v, costs in enumerate(problem.option_s)),
        option_bytes=tuple(of(sizes, v) for v, sizes in enumerate(problem.option_bytes)),
        flows=tuple(flows),
        holds=tuple(holds),
    )
