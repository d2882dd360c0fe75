"""A `Problem` as a mixed-integer linear program for HiGHS.

One binary per option. A flow with one reader is a transport polytope between the producer's states and the reader's:
its marginals are equalities, so the relaxation is tight along chains. With several readers each has a transport of its
own, and a state is paid for as often as the reader that needs it most (a maximum, not a sum). Only options are
integral.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import highspy
import numpy as np

from passes.errors import NoFeasiblePlanError
from passes.problem import Flow, Hold, Problem, Reader

_INTEGRAL = 1e-6
"""How far from 0 or 1 a value of the relaxation may be to count as such."""
_SCALE = 1e6
"""Seconds to the objective's microseconds: HiGHS's tolerances are absolute."""


class _Model:
    """Columns and rows as they are added, in HiGHS's sparse form."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.integral: list[bool] = []
        self.starts: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []

    def column(self, cost: float, *, integral: bool = False) -> int:
        self.cost.append(cost)
        self.integral.append(integral)
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
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        lp.integrality_ = [kinds[i] for i in self.integral]
        return lp


def cheapest(problem: Problem, *, gap: float, time_limit_s: float) -> tuple[tuple[int, ...], float]:
    """The cheapest picks that fit, proved to within `gap` (relative), and what no picks cost less than; or what was
    found in the time (of the processor).

    Raises:
        NoFeasiblePlanError: nothing fits the budget, or no plan was found in time.
    """
    model = _Model()
    options = [
        [model.column(seconds * _SCALE, integral=len(costs) > 1) for seconds in costs] for costs in problem.option_s
    ]
    for columns in options:
        model.row([(column, 1.0) for column in columns], 1.0, 1.0)
    for flow in problem.flows:
        _add_flow(model, flow, options)
    if math.isfinite(problem.budget_bytes):
        _add_budget(model, problem, options)

    lp, integral = model.lp(), any(model.integral)
    if integral and not math.isfinite(problem.budget_bytes):
        # Without a budget the relaxation is nearly always integral: then it is the answer, and proved.
        relaxed = _solver(gap, time_limit_s)
        kinds, lp.integrality_ = lp.integrality_, []
        relaxed.passModel(lp)
        relaxed.run()
        values = relaxed.getSolution().col_value
        done = relaxed.getModelStatus() == highspy.HighsModelStatus.kOptimal
        if done and all(min(values[c], 1.0 - values[c]) < _INTEGRAL for columns in options for c in columns):
            return _picks(options, values), relaxed.getInfo().objective_function_value / _SCALE
        lp.integrality_ = kinds
    solver = _solver(gap, time_limit_s)
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    info = solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        raise NoFeasiblePlanError("no choice of layouts satisfies the memory budget and the pins")
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise NoFeasiblePlanError(f"the solver found no plan in {time_limit_s:.0f} s (status {status.name})")
    bound = info.mip_dual_bound / _SCALE if integral else math.inf
    return _picks(options, solver.getSolution().col_value), bound


def _solver(gap: float, time_limit_s: float) -> highspy.Highs:
    """A solver that stops after so much time of the processor: HiGHS's own limit is by the wall's clock, and what is
    proved would depend on what else the machine does."""
    end = time.process_time() + time_limit_s

    def stop_late(event: highspy.HighsCallbackEvent) -> None:
        event.interrupt(time.process_time() > end)

    solver = highspy.Highs()
    solver.cbMipInterrupt += stop_late
    solver.cbSimplexInterrupt += stop_late
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("random_seed", 0)
    solver.setOptionValue("mip_rel_gap", gap)
    return solver


def _picks(options: Sequence[Sequence[int]], values: Sequence[float]) -> tuple[int, ...]:
    """The picks that the columns' `values` name."""
    return tuple(max(range(len(columns)), key=lambda i: values[columns[i]]) for columns in options)


def _marginal(states: Sequence[int], columns: Sequence[int]) -> dict[int, list[int]]:
    """State -> the option columns that are in it."""
    marginal: dict[int, list[int]] = {}
    for state, column in zip(states, columns, strict=True):
        marginal.setdefault(state, []).append(column)
    return marginal


def _add_flow(model: _Model, flow: Flow, options: Sequence[Sequence[int]]) -> None:
    given = _marginal(flow.states, options[flow.producer])
    readers = tuple(dict.fromkeys(flow.readers))
    paid: dict[tuple[int, int], int] = {}
    for reader in readers:
        asked = _marginal(reader.states, options[reader.variable])
        moved: dict[int, list[tuple[int, float]]] = {p: [] for p in given}
        needed: dict[int, list[tuple[int, float]]] = {q: [] for q in asked}
        for p in given:
            for q in asked:
                cost = flow.cost_s[p][q] * flow.count * _SCALE
                if math.isinf(cost):
                    continue
                column = model.column(cost if len(readers) == 1 else 0.0)
                moved[p].append((column, 1.0))
                needed[q].append((column, 1.0))
                if len(readers) > 1 and cost > 0:
                    if (p, q) not in paid:
                        paid[p, q] = model.column(cost)
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
