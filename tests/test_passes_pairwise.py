"""Tables of what goes from op to op, against the flows and holds that they are of, pick by pick."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest

from passes.solver.pairwise import Table, finite_tables, most_s, tables_of
from passes.solver.problem import Flow, Hold, Problem, Reader

OPTIONS = (2, 3, 2, 2)


def _drawn(seed: int) -> Problem:
    """Four ops, what goes between them (also twice between the same ones, or read twice), and what is kept of it."""
    draw = random.Random(seed)

    def costs(rows: int, columns: int, none: float) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(math.inf if draw.random() < none else draw.randrange(9) / 8 for _ in range(columns))
            for _ in range(rows)
        )

    def reader(variable: int, states: int) -> Reader:
        return Reader(variable, tuple(draw.randrange(states) for _ in range(OPTIONS[variable])))

    flows = []
    for _ in range(5):
        producer, *readers = draw.sample(range(4), draw.choice([2, 2, 3]))
        given = reader(producer, 2).states
        flow = Flow(producer, given, tuple(reader(r, 3) for r in readers), costs(2, 3, 0.1), draw.choice([1, 4]))
        first, last = flow.readers[0], reader(readers[-1], 3)
        others = [flow.readers, (*flow.readers, first), (first, last) if len(readers) > 1 else flow.readers]
        flows += [flow, *(Flow(producer, given, each, costs(2, 3, 0.0), 2) for each in others if draw.random() < 0.5)]
    holds = [
        Hold((reader(0, 2), reader(1, 2)), (3.0, 5.0), 2),
        Hold((reader(2, 2),), (7.0, 1.0), 1, Reader(3, tuple(draw.choice([-1, 0, 1]) for _ in range(2)))),
        Hold((reader(1, 2),), (), 3, Reader(0, (0, -1)), ((1.0, 2.0), (4.0, 8.0))),
    ]
    option_s = tuple(tuple(draw.randrange(9) / 8 for _ in range(n)) for n in OPTIONS)
    return Problem(option_s, tuple((0.0,) * n for n in OPTIONS), tuple(flows), tuple(holds))


def _paid(problem: Problem, picks: tuple[int, ...]) -> tuple[float, float]:
    """Seconds of flows and bytes of holds, as `passes.solver.problem` says that they are paid."""
    seconds = size = 0.0
    for flow in problem.flows:
        asked = {reader.states[picks[reader.variable]] for reader in flow.readers}
        seconds += flow.count * sum(flow.cost_s[flow.states[picks[flow.producer]]][state] for state in asked)
    for hold in problem.holds:
        own = -1 if hold.given is None else hold.given.states[picks[hold.given.variable]]
        for state in {reader.states[picks[reader.variable]] for reader in hold.readers}:
            if hold.rows:
                size += hold.count * hold.rows[own][state]
            elif state != own:
                size += hold.count * hold.state_bytes[state]
    return seconds, size


def _read(tables: tuple[Table, ...], picks: tuple[int, ...]) -> tuple[float, float]:
    """The same of tables."""
    totals = [0.0, 0.0]
    for table in tables:
        given = table.given[(*picks, 0)[table.producer]]
        asked = {int(states[picks[reader]]) for reader, states in zip(table.readers, table.asked, strict=True)}
        totals[table.of_bytes] += sum(float(table.cost[given, state]) for state in asked)
    return totals[0], totals[1]


@pytest.mark.parametrize("seed", range(20))
def test_tables_are_paid_for_as_the_flows_and_holds_are(seed: int) -> None:
    problem = _drawn(seed)
    tables, finite, most = tables_of(problem), finite_tables(problem), most_s(problem)
    ends = [(t.of_bytes, t.producer, t.given.tobytes(), t.readers, t.asked[0].tobytes()) for t in tables]
    assert max(Counter(end for end in ends if len(end[3]) == 1).values()) == 1
    assert all(len({*zip(t.readers, map(bytes, t.asked), strict=True)}) == len(t.readers) for t in tables)
    assert all(np.isfinite(table.cost).all() for table in finite)
    for picks in product(*map(range, OPTIONS)):
        seconds, size = _paid(problem, picks)
        assert _read(tables, picks) == (seconds, size)
        with_ops = seconds + sum(costs[i] for costs, i in zip(problem.option_s, picks, strict=True))
        assert with_ops <= most or math.isinf(seconds)
        found, _ = _read(finite, picks)
        assert found == seconds if math.isfinite(seconds) else found > most
