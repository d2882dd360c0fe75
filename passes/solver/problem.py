"""The solver's problem in numbers alone, and what a choice costs.

Each *variable* picks one of its options. An option has a price in seconds and bytes of its own. Tensors run along
*flows*: one producer, several readers; the producer's option gives the tensor's state, each reader's option asks for
one, and every state that is asked for and not the producer's own is paid for once, however many readers ask.
A *hold* keeps tensors in memory for backward: each state that a reader asks for is paid in bytes, once; where it has a
producer, the producer's own state is free, or what a state takes depends on the producer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reader:
    """A variable that reads a tensor; `states[i]` is the state its option i asks for."""

    variable: int
    states: tuple[int, ...]


@dataclass(frozen=True)
class Flow:
    """`count` alike tensors from one variable to its readers.

    `states[i]` is what the producer's option i gives; `cost_s[p][q]` the seconds from state p to q, inf where there is
    no way. States of producer and readers are numbered apart.
    """

    producer: int
    states: tuple[int, ...]
    readers: tuple[Reader, ...]
    cost_s: tuple[tuple[float, ...], ...]
    count: int = 1


@dataclass(frozen=True)
class Hold:
    """`count` alike tensors kept for backward readers, in each state they ask for.

    `given`: a variable and, per option of it, the state that costs nothing (-1: none), because it is computed again.
    `rows`: where there are any, `rows[p][q]` is what state q takes where `given` is in state p; these are numbered
    apart then.
    """

    readers: tuple[Reader, ...]
    state_bytes: tuple[float, ...]
    count: int = 1
    given: Reader | None = None
    rows: tuple[tuple[float, ...], ...] = ()

    def bytes_by(self) -> tuple[tuple[float, ...], ...]:
        """What each state that is asked for takes, by the state of `given`; the last row is of -1, and of nobody."""
        if self.rows:
            return self.rows
        own = range(len(self.state_bytes))
        return (*(tuple(0.0 if p == q else self.state_bytes[q] for q in own) for p in own), self.state_bytes)


@dataclass(frozen=True)
class Problem:
    """Pick one option per variable at the least seconds, with all bytes within `budget_bytes`."""

    option_s: tuple[tuple[float, ...], ...]
    option_bytes: tuple[tuple[float, ...], ...]
    flows: tuple[Flow, ...]
    holds: tuple[Hold, ...] = ()
    budget_bytes: float = math.inf


def evaluate(problem: Problem, picks: Sequence[int]) -> tuple[float, float]:
    """Seconds and bytes of `picks`, one option index per variable."""
    seconds = sum(costs[i] for costs, i in zip(problem.option_s, picks, strict=True))
    size = sum(costs[i] for costs, i in zip(problem.option_bytes, picks, strict=True))
    for flow in problem.flows:
        given = flow.states[picks[flow.producer]]
        asked = {reader.states[picks[reader.variable]] for reader in flow.readers}
        seconds += flow.count * sum(flow.cost_s[given][state] for state in asked)
    for hold in problem.holds:
        kept = {reader.states[picks[reader.variable]] for reader in hold.readers}
        paid = hold.state_bytes
        if hold.given is not None:
            given = hold.given.states[picks[hold.given.variable]]
            if hold.rows:
                paid = hold.rows[given]
            else:
                kept.discard(given)
        size += hold.count * sum(paid[state] for state in kept)
    return seconds, size


def only(problem: Problem, kept: Sequence[Sequence[int]]) -> Problem:
    """The problem with just the options `kept[v]` of each variable v; picks of it count these."""

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
