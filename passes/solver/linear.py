"""The cheapest picks of a `Problem`: branch and bound over its linear relaxation.

    options allowed -> the cheapest mix of them: a bound, and picks near it
    a variable that is mixed -> its options in two halves, by their bytes

Where no budget binds, the mix nearly always is a plan, and that is it. Within a budget a mix fills it to the last byte,
which plans do not: of one of the few variables that are mixed then, the smaller and the larger options are looked at
apart, the half with the lower bound first, until the best picks that were found are within the gap of the lowest bound
that is left. HiGHS takes a few steps for each, from the basis of what it is half of. Where no budget binds and yet many
halves are left, as around loops, bytes tell nothing, and HiGHS goes on by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from passes.solver.descent import Descent
from passes.solver.pairwise import Flags, Floats
from passes.solver.problem import Problem, only
from passes.solver.relaxation import Mix, Relaxation
from passes.solver.tree import Node, Tree, bytes_of

_HALVED = 12
"""Nodes left without a budget, after which HiGHS branches."""
_HALVED_GAP = 4e-3
"""What it proves then."""


@dataclass
class Near:
    """Where HiGHS ended for the same problem within other bytes: few steps from where it will end."""

    basis: Any = None


@dataclass(order=True)
class _Node(Node):
    """Plans of the options `allowed`, by variable; `basis` is of a mix of more options."""

    allowed: list[Flags] = field(compare=False)
    basis: Any = field(compare=False, default=None)


def cheapest(
    problem: Problem,
    *,
    gap: float,
    time_limit_s: float,
    below_s: float = math.inf,
    known: Sequence[tuple[int, ...]] = (),
    near: Near | None = None,
) -> tuple[tuple[int, ...], float]:
    """The cheapest picks that fit, proved to within `gap` (relative), and what no picks cost less than; or what was
    found in the time (of the processor; the first linear program is solved in any case), or `known` before.
    `near`: what the same problem within other bytes left, and what this one leaves.

    Raises:
        NoFeasiblePlanError: nothing fits the budget that costs less than `below_s`, or nothing was found in time.
    """
    end = time.process_time() + time_limit_s
    tree: Tree[_Node] = Tree(problem, gap, below_s=below_s)
    for picks in known:
        tree.meet(picks)
    relaxation, sizes = Relaxation(problem), bytes_of(problem)
    descent: Descent | None = None  # mostly the first mix is a plan
    near = near or Near()
    every = [np.ones(len(costs), dtype=bool) for costs in problem.option_s]
    node = _Node(-math.inf, next(tree.order), every, near.basis)
    while True:
        mix = relaxation.among(node.allowed, node.basis)
        if mix is not None and node.allowed is every:
            near.basis = mix.basis
        if mix is not None:
            _, size = tree.meet(mix.picks)
            bound_s = max(node.bound_s, mix.seconds)
            if not mix.mixed and size <= problem.budget_bytes:
                tree.close(bound_s)
            elif len(tree.open) >= _HALVED and math.isinf(problem.budget_bytes):
                tree.add(_Node(bound_s, next(tree.order), node.allowed))
                return _by_highs(relaxation, tree, max(gap, _HALVED_GAP), max(end - time.process_time(), 0.1))
            else:
                descent = descent or Descent(problem)
                tree.meet(descent.within_budget(mix.picks, mix.s_per_byte))
                for half in _halves(node.allowed, mix, sizes):
                    tree.add(_Node(bound_s, next(tree.order), half, mix.basis))
        if tree.is_done() or time.process_time() > end:
            return tree.found(time_limit_s)
        node = tree.next()


def cheapest_among(
    problem: Problem, kept: Sequence[Sequence[int]], *, gap: float, time_limit_s: float
) -> tuple[tuple[int, ...], float]:
    """As `cheapest`, among the options kept, by variable: the picks are numbered as the problem's, the bound is theirs
    alone."""
    picks, bound_s = cheapest(only(problem, kept), gap=gap, time_limit_s=time_limit_s)
    return tuple(of[pick] for of, pick in zip(kept, picks, strict=True)), bound_s


def _halves(allowed: list[Flags], mix: Mix, sizes: list[Floats]) -> list[list[Flags]]:
    """The options allowed, with one half of those of a variable: of the mixed ones that whose parts differ most in
    bytes. Where rounding alone kept picks from being a plan, any variable is halved; none where there is one plan."""
    several = mix.mixed or [variable for variable, options in enumerate(allowed) if options.sum() > 1]
    if not several:
        return []
    mixed = {variable: sizes[variable][mix.parts[variable] > 0] for variable in several}
    variable = max(several, key=lambda v: float(np.ptp(mixed[v])))
    half = sizes[variable] <= (mixed[variable].min() + mixed[variable].max()) / 2
    if not 0 < (half & allowed[variable]).sum() < allowed[variable].sum():
        half = np.arange(len(half)) == mix.picks[variable]
    return [[of & part if v == variable else of for v, of in enumerate(allowed)] for part in (half, ~half)]


def _by_highs(
    relaxation: Relaxation, tree: Tree[_Node], gap: float, time_limit_s: float
) -> tuple[tuple[int, ...], float]:
    """What `cheapest` gives, of what HiGHS finds and of the picks met before."""
    picks, bound_s = relaxation.plan(gap, time_limit_s)
    if picks is not None:
        tree.meet(picks)
    return tree.picks, min(max(bound_s, tree.bound_s()), tree.best_s)
