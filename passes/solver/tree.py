"""What branch and bound keeps: the best picks met so far, and the parts of a `Problem`'s plans not looked at yet."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

import numpy as np

from passes.errors import NoFeasiblePlanError
from passes.solver.pairwise import Floats
from passes.solver.problem import Problem, evaluate


@dataclass(order=True)
class Node:
    """Plans that cost no less than `bound_s`."""

    bound_s: float
    order: int


AnyNode = TypeVar("AnyNode", bound=Node)


@dataclass
class Tree(Generic[AnyNode]):
    """Open nodes of a branch and bound, the lowest bound first, and the best picks so far.

    It ends when no open node can lead to picks cheaper than the best by more than `gap` (relative), or when everything
    that fits costs at least `below_s`. `most_s`: an upper bound on any plan's seconds.
    """

    problem: Problem
    gap: float
    most_s: float = math.inf
    below_s: float = math.inf
    picks: tuple[int, ...] = ()
    open: list[AnyNode] = field(default_factory=list)
    order: count[int] = field(default_factory=count)
    best_s: float = math.inf
    _closed_s: float = math.inf
    _known: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)

    def meet(self, picks: tuple[int, ...]) -> tuple[float, float]:
        """Seconds and bytes of picks; the best that fit are kept."""
        if picks not in self._known:
            seconds, size = self._known[picks] = evaluate(self.problem, picks)
            if size <= self.problem.budget_bytes and seconds < self.best_s:
                self.best_s, self.picks = seconds, picks
        return self._known[picks]

    def met(self) -> Iterable[tuple[int, ...]]:
        """All picks evaluated so far."""
        return self._known

    def has_met(self, picks: tuple[int, ...]) -> bool:
        return picks in self._known

    @property
    def enough_s(self) -> float:
        """The bound at which the best picks are proved."""
        return self.best_s - self.gap * abs(self.best_s) if self.picks else self.most_s

    def add(self, node: AnyNode) -> None:
        """Open a node, unless its bound is proved enough already."""
        if node.bound_s >= self.enough_s:
            self.close(node.bound_s)
        else:
            heapq.heappush(self.open, node)

    def close(self, bound_s: float) -> None:
        """Discard plans that cost `bound_s` or more; the proved bound accounts for them."""
        self._closed_s = min(self._closed_s, bound_s)

    def is_done(self) -> bool:
        """Whether no open node can be cheaper by more than the gap."""
        return not self.open or self.open[0].bound_s >= self.enough_s or self.bound_s() >= self.below_s

    def next(self) -> AnyNode:
        """Remove and return the open node with the lowest bound."""
        return heapq.heappop(self.open)

    def bound_s(self) -> float:
        """The proved bound: no picks that fit cost less."""
        return min(self.open[0].bound_s if self.open else math.inf, self._closed_s, self.best_s)

    def found(self, time_limit_s: float) -> tuple[tuple[int, ...], float]:
        """The best picks and the proved bound, after at most so much time.

        Raises:
            NoFeasiblePlanError: nothing that fits costs less than `below_s`, or nothing that fits was met.
        """
        if self.below_s <= self.bound_s() < math.inf:
            raise NoFeasiblePlanError(f"no choice of layouts that fits costs less than {self.below_s:.3e} s")
        if not self.picks:
            if self.open:
                raise NoFeasiblePlanError(f"the solver found no plan that fits in {time_limit_s:.0f} s")
            raise NoFeasiblePlanError("no choice of layouts satisfies the memory budget and the pins")
        return self.picks, self.bound_s()


def bytes_of(problem: Problem) -> list[Floats]:
    """By variable and option, its bytes and what it has held."""
    found = [np.array(sizes) for sizes in problem.option_bytes]
    for hold in problem.holds:
        paid = np.array(hold.bytes_by()).max(axis=0) * hold.count
        for reader in dict.fromkeys(hold.readers):
            found[reader.variable] = found[reader.variable] + paid[list(reader.states)]
    return found
