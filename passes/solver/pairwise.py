"""A `Problem`'s flows and holds in arrays, by the states of producer and reader.

States are numbered in the order in which the options have them, so that tables whose options are alike in the same way
have the same states. Tables with one reader that differ in nothing but their costs are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from passes.solver.problem import Problem, Reader

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """A flow or hold in arrays: `given[i]` is the producer's state under its option i, `asked[k][i]` the k-th reader's.

    `cost[p, q]` is in seconds, or in bytes (`of_bytes`) that have a price.
    """

    producer: int
    given: Indices
    readers: tuple[int, ...]
    asked: tuple[Indices, ...]
    cost: Floats
    of_bytes: bool


def tables_of(problem: Problem) -> tuple[Table, ...]:
    """The problem's flows and holds, without states that no option has; those with one reader that differ in their
    costs alone are one. Where a flow has no way, the cost is inf.

    A hold is paid for in bytes: what backward makes anyway it has, each other state that is asked for is paid for
    once. Where nothing is computed again, its producer is one more variable, behind all others, with one option.
    """
    tables = []
    for flow in problem.flows:
        cost = np.array(flow.cost_s) * flow.count
        tables.append(_table(flow.producer, flow.states, flow.readers, cost, of_bytes=False))
    for hold in problem.holds:
        cost = np.array(hold.bytes_by()) * hold.count
        given = hold.given or Reader(len(problem.option_s), (-1,))
        states = [state if state >= 0 else len(cost) - 1 for state in given.states]
        tables.append(_table(given.variable, states, hold.readers, cost, of_bytes=True))
    found: dict[Any, Table] = {}
    for index, table in enumerate(tables):
        key: Any = index
        if len(table.readers) == 1:
            key = table.producer, table.given.tobytes(), table.readers, table.asked[0].tobytes(), table.of_bytes
        found[key] = replace(table, cost=found[key].cost + table.cost) if key in found else table
    return tuple(found.values())


def finite_tables(problem: Problem) -> tuple[Table, ...]:
    """The tables, no way at a cost beyond any plan's, so that sums stay finite."""
    beyond_s = 1.0 + 2.0 * most_s(problem)
    return tuple(replace(of, cost=np.where(np.isfinite(of.cost), of.cost, beyond_s)) for of in tables_of(problem))


def most_s(problem: Problem) -> float:
    """Seconds that no plan is above, unless it goes where there is no way."""
    most = sum(max(costs) for costs in problem.option_s)
    for flow in problem.flows:
        cost = np.array(flow.cost_s) * flow.count
        most += len(flow.readers) * float(cost[np.isfinite(cost)].max(initial=0.0))
    return most


def _table(producer: int, states: Sequence[int], readers: Sequence[Reader], cost: Floats, *, of_bytes: bool) -> Table:
    distinct = tuple(dict.fromkeys(readers))
    rows, (given,) = numbered([states])
    columns, asked = numbered([reader.states for reader in distinct])
    variables = tuple(reader.variable for reader in distinct)
    return Table(producer, _array(given), variables, tuple(map(_array, asked)), cost[rows][:, columns], of_bytes)


def _array(states: Sequence[int]) -> Indices:
    return np.array(states, dtype=np.intp)


def numbered(states: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The states that occur, in the order in which they do, and all of them by their places in it."""
    place: dict[int, int] = {}
    found = [[place.setdefault(state, len(place)) for state in each] for each in states]
    return list(place), found
