"""The exact solver: the cheapest picks of a `Problem`, with the proof.

A small problem is one linear program (`milp.py`). Over several tensor axes layouts multiply, and few of them are near
any good plan. So there:

    messages -> a bound, and picks: where they cost as much as the bound, that is it
             -> the excess of each option -> the few options with little of it, solved exactly
             -> done, where a plan with any option that was left out costs more; else more options

Where a budget binds, bytes get a price (a Lagrange multiplier). As choices are few and large, no price need give the
best plan that fits: the options that are likely at the prices tried are solved exactly, and the gap to the best bound
of the prices is what the solution says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.errors import NoFeasiblePlanError
from passes.messages import Floats, Messages
from passes.milp import cheapest
from passes.problem import Flow, Problem, Reader, evaluate

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
_PRICES = 12
"""How many prices of a byte are tried at most."""
_BUDGETED_GAP = 5e-3
_BUDGETED_LIMIT_S = 20.0
"""Of the linear program among the options that are likely at those prices."""
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
    if _pairs(problem) <= _FEW:
        return _exactly(problem, gap, time_limit_s)
    if math.isfinite(problem.budget_bytes):
        return _within_budget(problem, gap, time_limit_s)
    messages = Messages(problem)
    for _ in range(_PASSES):
        before = messages.bound_s
        messages.improve()
        found = _solution(problem, messages.picks(), messages.bound_s)
        if math.isfinite(found.seconds) and found.gap <= min(gap, _ALIKE):
            return found
        if messages.bound_s - before < _LEAST_RISE * abs(messages.bound_s):
            break
    return _among_likely(problem, messages, gap, time_limit_s)


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


def _among_likely(problem: Problem, messages: Messages, gap: float, time_limit_s: float) -> Solution:
    """The cheapest picks of options with little excess, where the rest is proved to be in no cheaper plan."""
    allowed_s = _LIKELY * abs(messages.bound_s)
    while True:
        kept = _likely(messages.excess_s(), allowed_s)
        if all(len(of) == len(costs) for of, costs in zip(kept, problem.option_s, strict=True)):
            return _exactly(problem, gap, time_limit_s)
        try:
            found = _among(problem, kept, gap, time_limit_s)
        except NoFeasiblePlanError:
            allowed_s = 10 * allowed_s + float(max(of.max() for of in messages.excess_s())) * _LIKELY
            continue
        for _ in range(_PASSES // _AT_ONCE):
            without_s = messages.bound_s + _least_beside(messages.excess_s(), kept)
            if without_s >= found.seconds * (1 - gap):
                return replace(found, bound_s=min(found.bound_s, without_s))
            for _ in range(_AT_ONCE):
                messages.improve()
        allowed_s = max(2 * allowed_s, found.seconds - messages.bound_s)


def _within_budget(problem: Problem, gap: float, time_limit_s: float) -> Solution:
    """The cheapest picks found that fit: solved exactly among the options that are likely at some price per byte.

    A plan's seconds and priced bytes, less what the budget is worth, are a line over the price, and so are at most its
    seconds where it fits. The prices tried are where the lines of the last plan that does not fit and the last that
    does meet (Kelley's cutting planes), which rises to the best bound that prices can give.
    """
    tried: list[tuple[Solution, list[list[int]]]] = []

    def at(s_per_byte: float) -> Solution:
        messages = Messages(_with_bytes_priced(problem, s_per_byte))
        for _ in range(_PASSES // 2):
            messages.improve()
        picks = messages.picks()[: len(problem.option_s)]
        found = Solution(picks, *evaluate(problem, picks), messages.bound_s - s_per_byte * problem.budget_bytes)
        excess = messages.excess_s()[: len(problem.option_s)]
        tried.append((found, _likely(excess, _LIKELY * abs(messages.bound_s))))
        return found

    over = at(0.0)
    s_per_byte, fits = over.bound_s / problem.budget_bytes, over
    while fits.bytes > problem.budget_bytes and len(tried) < _PRICES:
        fits = at(s_per_byte)
        s_per_byte *= 4
    while over.bytes > problem.budget_bytes >= fits.bytes and len(tried) < _PRICES:
        if math.isinf(over.seconds) or math.isinf(fits.seconds):
            break
        found = at((fits.seconds - over.seconds) / (over.bytes - fits.bytes))
        if found.picks in (over.picks, fits.picks):
            break
        over, fits = (over, found) if found.bytes <= problem.budget_bytes else (found, fits)
    kept = [sorted(set().union(*(of[v] for _, of in tried))) for v in range(len(problem.option_s))]
    fitting = [found for found, _ in tried if found.bytes <= problem.budget_bytes and math.isfinite(found.seconds)]
    try:
        fitting.append(_among(problem, kept, max(gap, _BUDGETED_GAP), min(time_limit_s, _BUDGETED_LIMIT_S)))
    except NoFeasiblePlanError:
        if not fitting:
            return _exactly(problem, gap, time_limit_s)
    cheapest_one = min(fitting, key=lambda found: found.seconds)
    return replace(cheapest_one, bound_s=min(cheapest_one.seconds, max(found.bound_s for found, _ in tried)))


def _with_bytes_priced(problem: Problem, s_per_byte: float) -> Problem:
    """The problem without its budget, each byte paid for in seconds.

    A hold is a flow: what backward computes again anyway it has, each other state that is asked for is paid for once.
    Where nothing is computed again, the flow's producer is one more variable, with one option.
    """
    flows = list(problem.flows)
    for hold in problem.holds:
        paid = [size * s_per_byte for size in hold.state_bytes]
        costs = [tuple(0.0 if p == q else s for q, s in enumerate(paid)) for p in range(len(paid))] + [tuple(paid)]
        given = hold.given or Reader(len(problem.option_s), (-1,))
        states = tuple(state if state >= 0 else len(paid) for state in given.states)
        flows.append(Flow(given.variable, states, hold.readers, tuple(costs), hold.count))
    seconds = (
        tuple(s + size * s_per_byte for s, size in zip(*of, strict=True))
        for of in zip(problem.option_s, problem.option_bytes, strict=True)
    )
    return Problem((*seconds, (0.0,)), (*problem.option_bytes, (0.0,)), tuple(flows))


def _likely(excess_s: Sequence[Floats], allowed_s: float) -> list[list[int]]:
    """By variable, the options with no more excess than that, and the one with the least."""
    return [np.flatnonzero(of <= max(allowed_s, of.min())).tolist() for of in excess_s]


def _among(problem: Problem, kept: Sequence[Sequence[int]], gap: float, time_limit_s: float) -> Solution:
    """The cheapest picks among the options kept, numbered as the problem's; the bound is theirs alone."""
    found = _exactly(_only(problem, kept), gap, time_limit_s)
    return replace(found, picks=tuple(of[pick] for of, pick in zip(kept, found.picks, strict=True)))


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
