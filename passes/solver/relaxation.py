"""What plans of a `Problem` cost at least: its linear relaxation, in HiGHS.

One column per option, from 0 to 1. A flow with one reader is a transport polytope between the producer's states and the
reader's: its marginals are equalities, so the relaxation is tight along chains. With several readers each has a
transport of its own, and a state is paid for as often as the reader that needs it most (a maximum, not a sum). All that
goes between the same two ops in the same states is one transport, what is kept in memory too. A budget is one more row;
its dual is what a byte is worth. Without that row the relaxation mostly is a plan; with it, mostly a mix of two that
differ in a few variables (`linear.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import highspy
import numpy as np

from passes.solver.pairwise import Flags, Floats, Table, numbered, tables_of
from passes.solver.problem import Problem

_Ends = tuple[int, bytes, int, tuple[int, ...]]
"""A producer and a reader, and the states of their options."""
_Reading = tuple[_Ends, list[int], list[int]]
"""Of one reader of a table: the ends, the table's columns that it may ask for, and by option which of these."""

_INTEGRAL = 1e-6
"""How far from 0 or 1 a value of the relaxation may be to count as such."""
_NOTHING_FITS = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)
"""As no cost is negative, nothing is unbounded."""
_SCALE = 1e6
"""Seconds to the objective's microseconds: HiGHS's tolerances are absolute."""


@dataclass(frozen=True, eq=False)
class Mix:
    """The cheapest mix of options: `parts[v][i]` is how much of variable v takes its option i.

    No plan costs less than the mix's `seconds`. `s_per_byte` is what one more byte of the budget would save, and
    `basis` is what HiGHS starts from where fewer options are allowed.
    """

    seconds: float
    parts: tuple[Floats, ...]
    s_per_byte: float
    basis: Any

    @cached_property
    def picks(self) -> tuple[int, ...]:
        """Per variable, the option with the largest share."""
        return _largest(self.parts)

    @cached_property
    def mixed(self) -> tuple[int, ...]:
        """Variables that have more than one option."""
        return tuple(variable for variable, part in enumerate(self.parts) if part.max() < 1.0 - _INTEGRAL)


def _largest(parts: Sequence[Floats]) -> tuple[int, ...]:
    """Of each variable, the option that is most of it."""
    return tuple(int(part.argmax()) for part in parts)


class Relaxation:
    """A problem's linear program, solved for plans of some options at a time."""

    def __init__(self, problem: Problem) -> None:
        model = _Model()
        options = [[model.column(seconds * _SCALE) for seconds in costs] for costs in problem.option_s]
        for columns in options:
            model.row([(column, 1.0) for column in columns], 1.0, 1.0)
        self._budget_bytes = problem.budget_bytes
        _Tables(model, problem, options).add()
        self._ends = np.cumsum([len(columns) for columns in options])
        self._solver = highspy.Highs()
        self._solver.setOptionValue("output_flag", False)
        self._solver.setOptionValue("threads", 1)
        self._solver.setOptionValue("random_seed", 0)
        self._solver.passModel(model.lp())

    def among(self, allowed: Sequence[Flags], basis: Any = None) -> Mix | None:
        """The cheapest mix of the options `allowed`, by variable; None where there is none that fits."""
        solver = self._solver
        self._allow(np.concatenate(allowed).astype(float))
        if not self._run(basis):
            return None
        price = 0.0
        if math.isfinite(self._budget_bytes):
            price = max(0.0, -solver.getSolution().row_dual[-1]) / _SCALE / max(self._budget_bytes, 1.0)
        seconds = solver.getInfo().objective_function_value / _SCALE
        return Mix(seconds, tuple(self._parts()), price, solver.getBasis())

    def plan(self, gap: float, time_limit_s: float) -> tuple[tuple[int, ...] | None, float]:
        """The cheapest plan, to within `gap` (relative), by HiGHS's own branch and bound, and a bound on all;
        or what it has after so many seconds by the clock, None where that is no plan."""
        solver, count = self._solver, int(self._ends[-1])
        self._allow(np.ones(count))
        whole = np.full(count, highspy.HighsVarType.kInteger)
        solver.changeColsIntegrality(count, np.arange(count, dtype=np.int32), whole)
        solver.setOptionValue("mip_rel_gap", gap)
        solver.setOptionValue("time_limit", solver.getRunTime() + time_limit_s)
        solver.clearSolver()
        solver.run()
        found = solver.getInfo()
        bound_s = found.mip_dual_bound / _SCALE
        if found.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None, bound_s
        return _largest(self._parts()), bound_s

    def _allow(self, most: Floats) -> None:
        """Of each option, at most so much."""
        count = len(most)
        self._solver.changeColsBounds(count, np.arange(count, dtype=np.int32), np.zeros(count), most)

    def _parts(self) -> list[Floats]:
        """By variable, how much of each option the solution has."""
        values = self._solver.getSolution().col_value[: self._ends[-1]]
        return np.split(np.array(values), self._ends[:-1])

    def _run(self, basis: Any) -> bool:
        """Solve from a basis, or anew where that ends in neither; whether there is a solution."""
        for start in (basis, None):
            self._solver.clearSolver()
            if start is not None:
                self._solver.setBasis(start)
            self._solver.run()
            status = self._solver.getModelStatus()
            if status == highspy.HighsModelStatus.kOptimal:
                return True
            if status in _NOTHING_FITS:
                return False
        raise RuntimeError(f"HiGHS ended with {self._solver.modelStatusToString(status)}")


class _Model:
    """Columns and rows as they are added, in HiGHS's sparse form."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.starts: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def column(self, cost: float) -> int:
        self.cost.append(cost)
        return len(self.cost) - 1

    def row(self, terms: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        self.starts.append(len(self.columns))
        self.columns.extend(column for column, _ in terms)
        self.values.extend(value for _, value in terms)
        self.lower.append(lower)
        self.upper.append(upper)

    def lp(self) -> highspy.HighsLp:
        lp = highspy.HighsLp()
        count = len(self.cost)
        lp.num_col_, lp.num_row_ = count, len(self.lower)
        lp.col_cost_ = np.array(self.cost)
        lp.col_lower_, lp.col_upper_ = np.zeros(count), np.ones(count)
        lp.row_lower_, lp.row_upper_ = np.array(self.lower), np.array(self.upper)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.array([*self.starts, len(self.columns)])
        lp.a_matrix_.index_ = np.array(self.columns)
        lp.a_matrix_.value_ = np.array(self.values)
        return lp


class _Tables:
    """Adds a problem's tables to a model, and the budget as its last row."""

    def __init__(self, model: _Model, problem: Problem, options: Sequence[Sequence[int]]) -> None:
        self._model, self._problem = model, problem
        self._options = [*options, ()]  # nobody's option is in every plan
        self._within = math.isfinite(problem.budget_bytes)
        tables = tables_of(problem if self._within else replace(problem, holds=()))
        self._read = [(table, tuple(_readings(table))) for table in tables]
        self._ways: dict[_Ends, Flags] = {}
        for table, readings in self._read:
            for ends, columns, _ in readings:
                ways = np.isfinite(table.cost[:, columns])
                self._ways[ends] = self._ways[ends] & ways if ends in self._ways else ways
        self._moved: dict[_Ends, list[list[int]]] = {}
        self._bytes: dict[int, float] = {}
        self._scale = 1.0 / max(problem.budget_bytes, 1.0)

    def add(self) -> None:
        """All of them."""
        for table, readings in self._read:
            if not table.of_bytes:
                self._add_flow(table, readings)
        if not self._within:
            return
        for columns, sizes in zip(self._options, self._problem.option_bytes, strict=False):
            for column, size in zip(columns, sizes, strict=True):
                self._pay(column, size, of_bytes=True)
        for table, readings in self._read:
            if table.of_bytes:
                self._add_hold(table, readings)
        self._model.row(list(self._bytes.items()), -math.inf, 1.0)

    def _pay(self, column: int, cost: float, *, of_bytes: bool) -> None:
        if not of_bytes:
            self._model.cost[column] += cost * _SCALE
        elif cost:
            self._bytes[column] = self._bytes.get(column, 0.0) + cost * self._scale

    def _between(self, table: Table, ends: _Ends, states: Sequence[int]) -> list[list[int]]:
        """By the states of both ends, the column of what moves between them; -1 where there is no way. All tables with
        these ends have the same."""
        if ends not in self._moved:
            ways = self._ways[ends].tolist()
            moved = self._moved[ends] = [[self._model.column(0.0) if way else -1 for way in row] for row in ways]
            turned = zip(*moved, strict=True)
            for rows, variable, of in ((moved, table.producer, table.given.tolist()), (turned, ends[2], states)):
                terms = [[(column, 1.0) for column in row if column >= 0] for row in rows]
                for state, column in zip(of, self._options[variable], strict=True):
                    terms[state].append((column, -1.0))
                for each in terms:
                    self._model.row(each, 0.0, 0.0)
        return self._moved[ends]

    def _add_flow(self, table: Table, readings: Sequence[_Reading]) -> None:
        paid: dict[tuple[int, int], int] = {}
        every = table.cost.tolist()
        for ends, columns, states in readings:
            for p, (row, costs) in enumerate(zip(self._between(table, ends, states), every, strict=True)):
                for q, column in zip(columns, row, strict=True):
                    if column < 0 or not costs[q]:
                        continue
                    if len(readings) == 1:
                        self._pay(column, costs[q], of_bytes=table.of_bytes)
                        continue
                    if (p, q) not in paid:
                        paid[p, q] = self._model.column(0.0)
                        self._pay(paid[p, q], costs[q], of_bytes=table.of_bytes)
                    self._model.row([(paid[p, q], 1.0), (column, -1.0)], 0.0, math.inf)

    def _add_hold(self, table: Table, readings: Sequence[_Reading]) -> None:
        """As a flow, unless a state takes the same wherever it is not free: then it has one column, and what moves
        between the ends none for this alone."""
        most = table.cost.max(axis=0)
        if not ((table.cost == 0) | (table.cost == most)).all():
            self._add_flow(table, readings)
            return
        kept: dict[int, int] = {}
        for ends, columns, states in readings:
            for q, column in enumerate(columns):
                size = float(most[column])
                needed = self._needed(table, ends, (table.cost[:, column] == 0).tolist(), q, states) if size else []
                if len(readings) == 1 and all(value > 0 for _, value in needed):
                    for each, value in needed:
                        self._pay(each, size * value, of_bytes=True)
                elif any(value > 0 for _, value in needed):
                    if column not in kept:
                        kept[column] = self._model.column(0.0)
                        self._pay(kept[column], size, of_bytes=True)
                    self._model.row([(kept[column], 1.0), *((each, -value) for each, value in needed)], 0.0, math.inf)

    def _needed(
        self, table: Table, ends: _Ends, free: Sequence[bool], q: int, states: Sequence[int]
    ) -> list[tuple[int, float]]:
        """Columns whose sum is above zero where the reader asks for its state q and the producer has no free one."""
        if ends in self._moved:
            rows = zip(self._moved[ends], free, strict=True)
            return [(row[q], 1.0) for row, is_free in rows if not is_free and row[q] >= 0]
        found = {column: 1.0 for column, state in zip(self._options[ends[2]], states, strict=True) if state == q}
        for column, state in zip(self._options[table.producer], table.given.tolist(), strict=False):
            if free[state]:
                found[column] = found.get(column, 0.0) - 1.0
        return [(column, value) for column, value in found.items() if value]


def _readings(table: Table) -> Iterator[_Reading]:
    for reader, asked in zip(table.readers, table.asked, strict=True):
        columns, (states,) = numbered([asked.tolist()])
        yield (table.producer, table.given.tobytes(), reader, tuple(states)), columns, states
