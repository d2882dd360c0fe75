"""The cheapest picks within a budget of bytes: branch and bound, where a byte has a price.

    a price per byte -> messages -> a bound on every plan that fits, and picks
    picks over the budget, picks within it -> the variable whose bytes they differ in most -> its options in two halves

At a price (a Lagrange multiplier), seconds and priced bytes less what the budget is worth are at most a plan's seconds,
if the plan fits. So whatever the price, the messages' bound less the budget's worth bounds the plans that fit. As
choices are few and large, no price need lead to the best of them: halves of the options of one variable are looked at
apart, each with a price of its own, the half with the lower bound first, until the best picks that were found are
within the gap of the lowest bound that is left.

The best plan mostly has what some or other of the picks met at the root have. So the cheapest picks of their options
are solved for (`linear.py`): as good a plan as halving finds after long, and the better the best known plan, the more
options can be ruled out.

Halves of several nodes of the search tree are the cases of one `Messages`, which costs little more than one case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from passes.errors import NoFeasiblePlanError
from passes.solver.descent import Descent
from passes.solver.linear import cheapest_among
from passes.solver.messages import Messages, State
from passes.solver.pairwise import Flags, Floats, most_s
from passes.solver.problem import Problem
from passes.solver.tree import Node, Tree, bytes_of

_CASES = 8
"""How many are looked at at once."""
_FIRST_PASSES, _PASSES = 5, 3
"""Passes of messages at a price, of the root and of a half."""
_PRICES = 3
"""Prices that a half is looked at with at once."""
_SPREADS = (1.3, 1.06)
"""How far they are apart, as a factor: at first, and then around the best of them."""
_CERTAIN = 1e3
"""How many times the most that a plan can cost the budget is worth at the price that shows that nothing fits."""
_PROMISING = 4
"""Of each variable, how many options with the least excess are tried beside those of picks met."""
_COMBINE_S = 2.0
"""Seconds of the processor after which no further linear program is solved for that."""
_STATES_BYTES = 1 << 30
"""What the nodes that are left may take."""


@dataclass(order=True)
class _Node(Node):
    """Plans of the options allowed, where not all are; `picks` were read off at the price, `over` and `within` at a
    lower and a higher one. `unsure`: the variable whose pick has the most excess."""

    s_per_byte: float = field(compare=False)
    allowed: Mapping[int, Flags] = field(compare=False)
    state: State = field(compare=False)
    over: tuple[int, ...] = field(compare=False, default=())
    within: tuple[int, ...] = field(compare=False, default=())
    picks: tuple[int, ...] = field(compare=False, default=())
    unsure: int = field(compare=False, default=-1)

    def options(self, variable: int, count: int) -> Flags:
        """Which of a variable's options are allowed."""
        every = self.allowed.get(variable)
        return np.ones(count, dtype=bool) if every is None else every

    def settle(self, search: _Search, excess_s: Sequence[Floats], bound_s: float) -> None:
        """Rule out what is in no plan that matters, and see what to branch on.

        `excess_s` and `bound_s` are of the price now.
        """
        self.rule_out(search, [bound_s + excess for excess in excess_s])
        self.unsure = max(range(len(excess_s)), key=lambda v: float(excess_s[v][self.picks[v]]))

    def rule_out(self, search: _Search, least_s: Sequence[Floats]) -> None:
        """Leave out options with which no plan is cheaper than the best known by more than the gap.

        `least_s`: by variable and option, what this node's plans with it cost at least.
        """
        allowed = dict(self.allowed)
        for variable, costs in enumerate(least_s):
            options = self.options(variable, len(costs))
            cheaper = options & (costs < search.enough_s)
            if (options & ~cheaper).any():
                search.close(float(costs[options & ~cheaper].min()))
            if not cheaper.all():
                allowed[variable] = cheaper
            if not cheaper.any():
                self.bound_s = math.inf  # all of this node's plans are left out
                return
        self.allowed = allowed


class _Search(Tree[_Node]):
    """The search tree, and what picks are made better with."""

    def __init__(self, problem: Problem, gap: float, below_s: float) -> None:
        super().__init__(problem, gap, most_s(problem) * (1 + 1e-6) + 1e-9, below_s)
        self.descent = Descent(problem)
        self.bytes_of = bytes_of(problem)

    def combine(self, least_s: Sequence[Floats]) -> None:
        """Meet the cheapest picks of options that some picks met so far have, and of the few that promise most.

        `least_s`: by variable and option, what plans with it cost at least.
        """
        kept = []
        for variable, costs in enumerate(least_s):
            promising = np.argsort(costs, kind="stable")[:_PROMISING].tolist()
            kept.append(sorted({picks[variable] for picks in self.met()}.union(promising)))
        try:
            picks, _ = cheapest_among(self.problem, kept, gap=self.gap / 2, time_limit_s=_COMBINE_S)
        except NoFeasiblePlanError:
            return
        self.meet(picks)


def cheapest_within(
    problem: Problem,
    *,
    gap: float,
    time_limit_s: float,
    below_s: float = math.inf,
    known: Sequence[tuple[int, ...]] = (),
) -> tuple[tuple[int, ...], float]:
    """The cheapest picks that fit the budget, and a bound: no picks that fit cost less.

    The two are within `gap` (relative) of each other, unless `time_limit_s` of the processor is over before. `known`:
    picks that are good already.

    Raises:
        NoFeasiblePlanError: nothing fits that costs less than `below_s`, or nothing was found in time.
    """
    end = time.process_time() + time_limit_s
    search = _Search(problem, gap, below_s)
    for picks in known:
        search.meet(picks)
    messages = _begin(search)
    size = sum(values.nbytes for values in messages.state(0))
    most_open = max(4, _STATES_BYTES // max(size, 1))
    while not search.is_done():
        if time.process_time() > end or len(search.open) > most_open:
            break
        halves: list[_Node] = []
        while len(halves) < _CASES and not search.is_done():
            halves += _halves(search, search.next())
        if halves:
            _look(search, messages, halves)
    return search.found(time_limit_s)


def _begin(search: _Search) -> Messages:
    """The root of the tree: prices far apart, then some around the one with the best bound. Picks at that price and the
    ones beside it are made to fit.

    Raises:
        NoFeasiblePlanError: bytes alone show that nothing fits.
    """
    budget = max(search.problem.budget_bytes, 1.0)
    worth = search.most_s / budget
    prices = worth * np.array([_CERTAIN, *4.0 ** -np.arange(1, _CASES)])
    messages = Messages(search.problem, prices.tolist())
    node = _Node(-math.inf, next(search.order), 0.0, {}, [])
    for turn, spread in enumerate((0.0, 2.0, 1.3)):
        if turn:
            messages.load([(node.state, node.s_per_byte, {})] * _CASES)
            messages.reprice(node.s_per_byte * spread ** np.linspace(-1, 1, _CASES))
        messages.improve(_FIRST_PASSES)
        bounds_s = messages.bound_s - messages.s_per_byte * search.problem.budget_bytes
        if not turn and bounds_s[0] > search.most_s:
            raise NoFeasiblePlanError("no choice of layouts satisfies the memory budget and the pins")
        every = [picks[: len(search.problem.option_s)] for picks in messages.picks()]
        case = int(bounds_s.argmax())
        for k, (picks, price) in enumerate(zip(every, messages.s_per_byte, strict=True)):
            if not search.has_met(picks):
                search.meet(picks)
                if abs(k - case) <= 1:
                    search.meet(search.descent.within_budget(picks, float(price)))
        node.s_per_byte, node.state = float(messages.s_per_byte[case]), messages.state(case)
        node.bound_s = max(node.bound_s, float(bounds_s[case]))
        node.picks, node.over, node.within = every[case], every[max(case - 1, 0)], every[min(case + 1, _CASES - 1)]
    least_s = [(bounds_s[:, None] + of).max(axis=0) for of in messages.excess_s()[: len(search.problem.option_s)]]
    search.combine(least_s)
    node.rule_out(search, least_s)
    search.add(node)
    return messages


def _look(search: _Search, messages: Messages, halves: Sequence[_Node]) -> None:
    """Bound the halves of nodes at prices around that of the node, and leave what is not done for later."""
    budget = search.problem.budget_bytes
    states = [node.state for node in halves]
    for turn, spread in enumerate(_SPREADS):
        factors = spread ** np.linspace(-1, 1, _PRICES)
        around = [(node, state) for node, state in zip(halves, states, strict=True) for _ in factors]
        messages.load([(state, node.s_per_byte, node.allowed) for node, state in around])
        messages.reprice(messages.s_per_byte * np.tile(factors, len(halves)))
        messages.improve(_PASSES)
        bounds_s = messages.bound_s - messages.s_per_byte * budget
        if turn + 1 == len(_SPREADS):
            _settle(search, messages, halves, bounds_s)
            break
        for k, node in enumerate(halves):
            case = k * _PRICES + int(bounds_s[k * _PRICES : (k + 1) * _PRICES].argmax())
            node.bound_s = max(node.bound_s, float(bounds_s[case]))
            node.s_per_byte, states[k] = float(messages.s_per_byte[case]), messages.state(case)


def _settle(search: _Search, messages: Messages, halves: Sequence[_Node], bounds_s: Floats) -> None:
    """Read picks off, keep what a node needs to go on, and leave it for later."""
    problem, budget = search.problem, search.problem.budget_bytes
    excess_s = messages.excess_s()[: len(problem.option_s)]
    every = [picks[: len(problem.option_s)] for picks in messages.picks()]
    near: tuple[float, tuple[int, ...], float] | None = None
    for picks, price in zip(every, messages.s_per_byte, strict=True):
        seconds, size = search.meet(picks)
        cost_s = seconds + float(price) * max(size - budget, 0.0)
        if near is None or cost_s < near[0]:
            near = cost_s, picks, float(price)
    if near is not None:
        search.meet(search.descent.within_budget(near[1], near[2]))
    for k, node in enumerate(halves):
        cases = range(k * _PRICES, (k + 1) * _PRICES)
        case = max(cases, key=lambda c: float(bounds_s[c]))
        node.s_per_byte, node.state = float(messages.s_per_byte[case]), messages.state(case)
        node.picks, node.over, node.within = every[case], every[cases[0]], every[cases[-1]]
        node.bound_s = max(node.bound_s, float(bounds_s[case]))
        node.settle(search, [of[case] for of in excess_s], float(bounds_s[case]))
        search.add(node)


def _halves(search: _Search, node: _Node) -> list[_Node]:
    """The node's plans in two parts; none where it has one plan, which is met then."""
    free = [v for v, costs in enumerate(search.problem.option_s) if node.options(v, len(costs)).sum() > 1]
    if not free:
        every = enumerate(search.problem.option_s)
        seconds, size = search.meet(tuple(int(node.options(v, len(costs)).argmax()) for v, costs in every))
        if size <= search.problem.budget_bytes:
            search.close(seconds)
        return []
    variable, part = _split(search, node, free)
    allowed = node.options(variable, len(part))
    return [
        replace(node, order=next(search.order), allowed={**node.allowed, variable: allowed & half})
        for half in (part, ~part)
    ]


def _split(search: _Search, node: _Node, free: Sequence[int]) -> tuple[int, Flags]:
    """A variable with several options left, and those of one half: by bytes, where picks at a lower price and at a
    higher one differ in them; else the pick whose excess is most is taken apart from the rest."""
    sizes, over, within = search.bytes_of, node.over, node.within
    if over and within:
        variable = max(free, key=lambda v: abs(float(sizes[v][over[v]] - sizes[v][within[v]])))
        part = sizes[variable] <= (sizes[variable][over[variable]] + sizes[variable][within[variable]]) / 2
        options = node.options(variable, len(part))
        if 0 < (part & options).sum() < options.sum():
            return variable, part
    variable = node.unsure if node.unsure in free else free[0]
    options = node.options(variable, len(sizes[variable]))
    pick = node.picks[variable] if node.picks and options[node.picks[variable]] else int(options.argmax())
    return variable, np.arange(len(options)) == pick
