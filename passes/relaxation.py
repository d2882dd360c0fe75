"""What plans of a `Problem` cost at least: its linear relaxation, in HiGHS.

One column per option, from 0 to 1. A flow with one reader is a transport polytope between the producer's states and the
reader's: its marginals are equalities, so the relaxation is tight along chains. With several readers each has a
transport of its own, and a state is paid for as often as the reader that needs it most (a maximum, not a sum). A budget
is one more row; its dual is what a byte is worth. Without that row the relaxation mostly is a plan; with it, mostly a
mix of two that differ in a few variables (`linear.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt

from passes.problem import Flow, Hold, Problem, Reader

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_INTEGRAL = 1e-6
"""How far from 0 or 1 a value of the relaxation may be to count as such."""
_NOTHING_FITS = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)
"""As no cost is negative, nothing is unbounded."""
_SCALE = 1e6
"""Seconds to the objective's microseconds: HiGHS's tolerances are absolute."""


@dataclass(frozen=True, eq=False)
class Mix:
    """No plan costs less than `seconds`, which a mix of options does; by variable and option, `parts` of it. A byte is
    worth `s_per_byte`. `basis`: what HiGHS starts from where fewer options are allowed."""

    seconds: float
    parts: tuple[Floats, ...]
    s_per_byte: float
    basis: Any

    @cached_property
    def picks(self) -> tuple[int, ...]:
        """Of each variable the option that is most of it."""
        return tuple(int(part.argmax()) for part in self.parts)

    @cached_property
    def mixed(self) -> tuple[int, ...]:
        """Variables that are no single option."""
        return tuple(variable for variable, part in enumerate(self.parts) if part.max() < 1.0 - _INTEGRAL)


class Relaxation:
    """A problem's linear program, solved for plans of some options at a time."""

    def __init__(self, problem: Problem) -> None:
        model = _Model()
        options = [[model.column(seconds * _SCALE) for seconds in costs] for costs in problem.option_s]
        for columns in options:
            model.row([(column, 1.0) for column in columns], 1.0, 1.0)
        for flow in problem.flows:
            _add_flow(model, flow, options)
        self._budget_bytes = problem.budget_bytes
        if math.isfinite(problem.budget_bytes):
            _add_budget(model, problem, options)
        self._ends = np.cumsum([len(columns) for columns in options])
        self._solver = highspy.Highs()
        self._solver.setOptionValue("output_flag", False)
        self._solver.setOptionValue("threads", 1)
        self._solver.setOptionValue("random_seed", 0)
        self._solver.passModel(model.lp())

    def among(self, allowed: Sequence[Flags], basis: Any = None) -> Mix | None:
        """The cheapest mix of the options `allowed`, by variable; None where there is none that fits."""
        solver, most = self._solver, np.concatenate(allowed).astype(float)
        count = len(most)
        solver.changeColsBounds(count, np.arange(count, dtype=np.int32), np.zeros(count), most)
        if not self._run(basis):
            return None
        values = solver.getSolution()
        parts = np.split(np.array(values.col_value[:count]), self._ends[:-1])
        price = 0.0
        if math.isfinite(self._budget_bytes):
            price = max(0.0, -values.row_dual[-1]) / _SCALE / max(self._budget_bytes, 1.0)
        seconds = solver.getInfo().objective_function_value / _SCALE
        return Mix(seconds, tuple(parts), price, solver.getBasis())

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


def _marginal(states: Sequence[int], columns: Sequence[int]) -> dict[int, list[int]]:
    """State -> the option columns that are in it."""
    marginal: dict[int, list[int]] = {}
    for state, column in zip(states, columns, strict=True):
        marginal.setdefault(state, []).append(column)
    return marginal


def _add_flow(
    model: _Model, flow: Flow, options: Sequence[Sequence[int]], pay: Callable[[float], int] | None = None
) -> None:
    """`pay`: a column for something that costs so much; seconds are the model's own costs."""
    pay = pay or (lambda cost: model.column(cost * _SCALE))
    given = _marginal(flow.states, options[flow.producer])
    readers = tuple(dict.fromkeys(flow.readers))
    paid: dict[tuple[int, int], int] = {}
    for reader in readers:
        asked = _marginal(reader.states, options[reader.variable])
        moved: dict[int, list[tuple[int, float]]] = {p: [] for p in given}
        needed: dict[int, list[tuple[int, float]]] = {q: [] for q in asked}
        for p in given:
            for q in asked:
                cost = flow.cost_s[p][q] * flow.count
                if math.isinf(cost):
                    continue
                column = pay(cost) if len(readers) == 1 else model.column(0.0)
                moved[p].append((column, 1.0))
                needed[q].append((column, 1.0))
                if len(readers) > 1 and cost > 0:
                    if (p, q) not in paid:
                        paid[p, q] = pay(cost)
                    model.row([(paid[p, q], 1.0), (column, -1.0)], 0.0, math.inf)
        for p, terms in moved.items():
            model.row([*terms, *((column, -1.0) for column in given[p])], 0.0, 0.0)
        for q, terms in needed.items():
            model.row([*terms, *((column, -1.0) for column in asked[q])], 0.0, 0.0)


def _add_budget(model: _Model, problem: Problem, options: Sequence[Sequence[int]]) -> None:
    scale = 1.0 / max(problem.budget_bytes, 1.0)
    terms: dict[int, float] = {}
    for columns, sizes in zip(options, problem.option_bytes, strict=True):
        for column, size in zip(columns, sizes, strict=True):
            if size:
                terms[column] = terms.get(column, 0.0) + size * scale
    for hold in problem.holds:
        _add_hold(model, hold, options, terms, scale)
    model.row(list(terms.items()), -math.inf, 1.0)


def _add_hold(
    model: _Model, hold: Hold, options: Sequence[Sequence[int]], terms: dict[int, float], scale: float
) -> None:
    def pay(size: float) -> int:
        column = model.column(0.0)
        if size:
            terms[column] = size * scale
        return column

    if hold.rows and hold.given is not None:
        flow = Flow(hold.given.variable, hold.given.states, hold.readers, hold.rows, hold.count)
        _add_flow(model, flow, options, pay)
        return
    readers: tuple[Reader, ...] = tuple(dict.fromkeys(hold.readers))
    if len(readers) == 1 and hold.given is None:
        for state, column in zip(readers[0].states, options[readers[0].variable], strict=True):
            terms[column] = terms.get(column, 0.0) + hold.state_bytes[state] * hold.count * scale
        return
    free = {} if hold.given is None else _marginal(hold.given.states, options[hold.given.variable])
    kept: dict[int, int] = {}
    for reader in readers:
        for state, columns in _marginal(reader.states, options[reader.variable]).items():
            row = dict.fromkeys(columns, -1.0)
            for column in free.get(state, ()):
                row[column] = row.get(column, 0.0) + 1.0
            if not any(value < 0 for value in row.values()):
                continue
            if state not in kept:
                kept[state] = model.column(0.0)
                terms[kept[state]] = hold.state_bytes[state] * hold.count * scale
            model.row([(kept[state], 1.0), *((c, v) for c, v in row.items() if v)], 0.0, math.inf)
