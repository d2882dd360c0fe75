"""Picks made better one variable at a time, within a budget of bytes.

What the messages propose at a price per byte is either over the budget or leaves some of it. Each variable in turn
takes its cheapest option beside what the others have picked, bytes at a price: a rising one until the picks fit, then a
falling one, where no step may leave the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from passes.solver.pairwise import Floats, Indices, Table, finite_tables
from passes.solver.problem import Problem

_RISING = (1.0, 2.0, 4.0, 16.0, 256.0)
_FALLING = (1.0, 0.5, 0.2, 0.05, 0.0)
_LEAST = 1e-12
"""Relative gain below which nothing is changed."""


class Descent:
    """Steps from given picks of a problem towards cheaper ones that fit."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._own_s = [np.array(costs) for costs in problem.option_s]
        self._own_bytes = [np.array(sizes) for sizes in problem.option_bytes]
        self._tables = finite_tables(problem)
        self._tables_of: list[list[int]] = [[] for _ in range(len(self._own_s) + 1)]
        self._known: list[tuple[Floats, Floats] | None] = []
        """By variable, what `_beside` gives: as it was last asked, until something beside it is moved."""
        for index, table in enumerate(self._tables):
            for variable in {table.producer, *table.readers}:
                self._tables_of[variable].append(index)

    def within_budget(self, picks: Sequence[int], s_per_byte: float) -> tuple[int, ...]:
        """Picks near those given, which fit if any were met that do."""
        budget, now = self._problem.budget_bytes, [*picks, 0]
        self._known = [None] * len(now)
        asked = [self._asked(table, now) for table in self._tables]
        size = self._bytes(now, asked)
        for factor in _RISING:
            if size <= budget:
                break
            size = self._sweep(now, asked, factor * s_per_byte, size)
        if size <= budget:
            for factor in _FALLING:
                before = now.copy()
                size = self._sweep(now, asked, factor * s_per_byte, size)
                if now == before and not s_per_byte:
                    break  # the next sweep is at the same price
        return tuple(now[: len(picks)])

    @staticmethod
    def _asked(table: Table, picks: Sequence[int]) -> Indices:
        """How many readers ask for each state."""
        states = [of[picks[reader]] for reader, of in zip(table.readers, table.asked, strict=True)]
        return np.bincount(states, minlength=table.cost.shape[1])

    def _bytes(self, picks: Sequence[int], asked: Sequence[Indices]) -> float:
        size = sum(float(own[pick]) for own, pick in zip(self._own_bytes, picks, strict=False))
        for table, count in zip(self._tables, asked, strict=True):
            if table.of_bytes:
                size += float(table.cost[table.given[picks[table.producer]]] @ (count > 0))
        return size

    def _sweep(self, picks: list[int], asked: list[Indices], s_per_byte: float, size: float) -> float:
        """Each variable's cheapest option in turn; gives the bytes after it. No step leaves the budget, or goes further
        over it."""
        for variable, own in enumerate(self._own_s):
            if len(own) == 1:
                continue
            known = self._known[variable]
            if known is None:
                known = self._known[variable] = self._beside(variable, picks, asked)
            seconds, sizes = known
            costs, now = seconds + s_per_byte * sizes, picks[variable]
            after = size + sizes - sizes[now]
            costs[after > max(self._problem.budget_bytes, size)] = np.inf
            best = int(costs.argmin())
            if costs[best] < costs[now] * (1 - _LEAST):
                self._move(variable, best, picks, asked)
                size = float(after[best])
        return size

    def _beside(self, variable: int, picks: Sequence[int], asked: Sequence[Indices]) -> tuple[Floats, Floats]:
        """Seconds and bytes that the variable adds beside the others, by its option."""
        seconds, sizes = self._own_s[variable].copy(), self._own_bytes[variable].copy()
        for index in self._tables_of[variable]:
            table, count = self._tables[index], asked[index]
            own = [of for reader, of in zip(table.readers, table.asked, strict=True) if reader == variable]
            if own:
                count = count - np.bincount([of[picks[variable]] for of in own], minlength=len(count))
            asks = np.zeros((len(seconds), len(count)), dtype=bool)
            for of in own:  # a state that one option asks for twice is paid for once
                asks[np.arange(len(of)), of] = True
            free = count > 0
            costs = sizes if table.of_bytes else seconds
            if table.producer == variable:
                costs += (table.cost[table.given] * (free | asks)).sum(axis=1)
            else:
                costs += asks @ np.where(free, 0.0, table.cost[table.given[picks[table.producer]]])
        return seconds, sizes

    def _move(self, variable: int, option: int, picks: list[int], asked: list[Indices]) -> None:
        tables: Iterable[int] = self._tables_of[variable]
        for index in tables:
            table = self._tables[index]
            self._known[table.producer] = None
            for reader, of in zip(table.readers, table.asked, strict=True):
                self._known[reader] = None
                if reader == variable:
                    asked[index][of[picks[variable]]] -= 1
                    asked[index][of[option]] += 1
        picks[variable] = option
