"""A bound on what plans of a `Problem` cost, picks that often reach it, and what cannot be part of a cheaper plan.

    pass forward and back  ->  the bound rises;  picks are read off;  until they cost what the bound says

The budget is left out here, but a byte may have a price, and then a hold is a flow as others are; `branch.py` sees to
the rest. A *link* joins the producer of a flow to one of its readers. A state that several readers ask for is paid for
once, so a flow's costs are shared out among its links (`share >= 0`, together no more than the cost of a pair of
states), and the flow costs at least what its links' shares add up to. Messages move cost between a link and the
variables at its ends, and change no plan's cost. Whatever shares and messages are,

    cost(picks) >= sum over links     of (share - to_producer - to_reader)[states picked]
                 + sum over variables of (own cost + messages of its links)[option picked]

so the sum of the least entry of each term is a bound. By the same argument no plan with a certain option costs less
than the bound plus the option's *excess*: by how much its variable's term, and the terms of that variable's links, are
above their least. That is all there is to prove; how messages are chosen decides only how good the bound is.

They are chosen as sequential tree-reweighted message passing does (V. Kolmogorov, IEEE PAMI 28(10), 2006): variables
are visited in order; each takes what its links can give, and spreads it evenly over its links to those that are yet to
come. On a chain that is dynamic programming. The layers of a Transformer are nearly chains, and a few passes do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from passes.problem import Problem, Reader

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]
State = list[tuple[Floats, Floats, Floats]]

_ALIKE = 1e-12
"""Share of the bound within which two costs are the same."""
_HUGE = 1e300
"""Less than inf: options that are ruled out stay so beside messages of -inf."""
_SPARED = 0.5
"""What a link takes of what those beside it do not need."""


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


@dataclass(eq=False, slots=True)
class _Link:
    """What a flow's producer and one of its readers pay between them, by case and the states of both.

    A state that none of the reader's options asks for has the message -inf: it is never the least.
    """

    share: Floats
    to_producer: Floats
    to_reader: Floats
    of_bytes: bool

    def left(self) -> Floats:
        """The share less what the messages have taken of it."""
        left: Floats = self.share - self.to_producer[:, :, None] - self.to_reader[:, None, :]
        return left


class _End:
    """A link as seen from the variable at one end: its `states` by option, and who is at the `other`."""

    __slots__ = ("_absent", "_beside", "_by_state", "_link", "_present", "_starts", "at_reader", "other", "states")

    def __init__(self, link: _Link, beside: tuple[_Link, ...], *, at_reader: bool, states: Indices, other: int) -> None:
        self._link, self._beside, self.at_reader, self.states, self.other = link, beside, at_reader, states, other
        self._by_state = np.argsort(states, kind="stable")
        options = np.bincount(states, minlength=link.share.shape[1 + int(at_reader)])
        self._present, self._absent = np.flatnonzero(options), np.flatnonzero(options == 0)
        self._starts = np.cumsum(options[self._present]) - options[self._present]

    def message(self) -> Floats:
        """What the link has given to this end, by case and option."""
        return (self._link.to_reader if self.at_reader else self._link.to_producer)[:, self.states]

    def take(self) -> Floats:
        """All that the link can give, by option: of its own share, and of half of what links beside it do not need."""
        link = self._link
        for other in self._beside:
            spare = np.minimum(np.maximum(other.left(), 0.0), other.share) * _SPARED
            other.share = other.share - spare
            link.share = link.share + spare
        if self.at_reader:
            link.to_reader = (link.share - link.to_producer[:, :, None]).min(axis=1)
            link.to_reader[:, self._absent] = -math.inf
        else:
            link.to_producer = (link.share - link.to_reader[:, None, :]).min(axis=2)
        return self.message()

    def give(self, costs: Floats) -> None:
        """Move to the link what it can hold of `costs`: per state, those of its cheapest option."""
        message = self._link.to_reader if self.at_reader else self._link.to_producer
        message[:, self._present] -= np.minimum.reduceat(costs[:, self._by_state], self._starts, axis=1)

    def excess(self) -> Floats:
        """How far what is left to the link is above its least, by case and option of this end."""
        left = self._link.left()
        least = left.min(axis=(1, 2))[:, None]
        excess: Floats = (left.min(axis=1 if self.at_reader else 2) - least)[:, self.states]
        return excess


class Messages:
    """Shares and messages for a problem in several *cases*, and `bound_s` of each, which they prove.

    In a case a byte costs `s_per_byte`, and some options may be ruled out. Bounds rise with every `improve`.
    """

    def __init__(self, problem: Problem, s_per_byte: Sequence[float] = (0.0,)) -> None:
        self.s_per_byte: Floats = np.array(s_per_byte)
        if not self.s_per_byte.any():
            problem = replace(problem, holds=())
        self.tables = tables_of(problem)
        self.bound_s: Floats = np.full(len(self.s_per_byte), -math.inf)
        counts = [*map(len, problem.option_s), *([1] if _needs_nobody(problem) else [])]
        self._own_s: list[Floats] = [np.zeros(n) for n in counts]
        self._own_bytes: list[Floats] = [np.zeros(n) for n in counts]
        for own, costs in zip(self._own_s, problem.option_s, strict=False):
            own += costs
        for own, costs in zip(self._own_bytes, problem.option_bytes, strict=False):
            own += costs
        self._allowed: dict[int, Flags] = {}
        self._tables_of: list[list[int]] = [[] for _ in counts]
        self._links: list[_Link] = []
        self._ends: list[list[_End]] = [[] for _ in counts]
        for index, table in enumerate(self.tables):
            for variable in {table.producer, *table.readers}:
                self._tables_of[variable].append(index)
            self._link(table)

    def _link(self, table: Table) -> None:
        """The table's links, its costs shared evenly. What a variable reads of itself is a cost of its own."""
        share, links = table.cost / len(table.readers), []
        prices = self.s_per_byte[:, None, None] if table.of_bytes else np.ones((len(self.s_per_byte), 1, 1))
        for reader, asked in zip(table.readers, table.asked, strict=True):
            if reader == table.producer:
                (self._own_bytes if table.of_bytes else self._own_s)[reader] += share[table.given, asked]
                continue
            to_reader = np.full((len(prices), share.shape[1]), -math.inf)
            to_reader[:, asked] = 0.0
            to_producer = np.zeros((len(prices), share.shape[0]))
            links.append((_Link(share * prices, to_producer, to_reader, table.of_bytes), reader, asked))
        for link, reader, asked in links:
            beside = tuple(other for other, *_ in links if other is not link)
            self._ends[table.producer].append(_End(link, beside, at_reader=False, states=table.given, other=reader))
            self._ends[reader].append(_End(link, beside, at_reader=True, states=asked, other=table.producer))
            self._links.append(link)

    def _own(self, variable: int) -> Floats:
        """What the variable pays by itself, by case and option."""
        own: Floats = self._own_s[variable] + self.s_per_byte[:, None] * self._own_bytes[variable]
        allowed = self._allowed.get(variable)
        return own if allowed is None else np.where(allowed, own, math.inf)

    def reprice(self, s_per_byte: Floats) -> None:
        """Other prices (above zero) of a byte; what was found for the ones before is a start."""
        ratio = s_per_byte / self.s_per_byte
        for link in self._links:
            if link.of_bytes:
                link.share = link.share * ratio[:, None, None]
                link.to_producer = link.to_producer * ratio[:, None]
                link.to_reader = link.to_reader * ratio[:, None]
        self.s_per_byte = s_per_byte
        self.bound_s = np.full(len(s_per_byte), -math.inf)

    def state(self, case: int) -> State:
        """What `load` goes on from."""
        return [(link.share[case], link.to_producer[case], link.to_reader[case]) for link in self._links]

    def load(self, cases: Sequence[tuple[State, float, Mapping[int, Flags]]]) -> None:
        """Other cases: where an earlier one stood, what a byte cost there, and by variable the options allowed, where
        not all are."""
        for index, link in enumerate(self._links):
            link.share, link.to_producer, link.to_reader = (
                np.stack([state[index][part] for state, *_ in cases]) for part in range(3)
            )
        self.s_per_byte = np.array([price for _, price, _ in cases])
        self.bound_s = np.full(len(cases), -math.inf)
        some = {variable for *_, allowed in cases for variable in allowed}
        every = {variable: np.ones(len(self._own_s[variable]), dtype=bool) for variable in some}
        self._allowed = {v: np.stack([allowed.get(v, every[v]) for *_, allowed in cases]) for v in some}

    def improve(self, times: int = 1) -> None:
        """Passes over all variables and back."""
        for _ in range(times):
            self._pass(range(len(self._own_s)), forward=True)
            proved = self._pass(reversed(range(len(self._own_s))), forward=False)
            self.bound_s = np.maximum(self.bound_s, proved)

    def _pass(self, order: Iterable[int], *, forward: bool) -> Floats:
        """Visit variables in order; gives the bounds that are proved then.

        That is the sum of what is taken off each variable here, which leaves it nothing below zero: it gives no more
        than its part of the rest. Nor is anything below zero left to a link, once both its ends have been visited.
        """
        bound = np.zeros(len(self.s_per_byte))
        for variable in order:
            ends = self._ends[variable]
            costs = self._own(variable)
            for end in ends:
                costs += end.take()
            least = costs.min(axis=1)
            bound += least
            coming = [end for end in ends if (end.other > variable) == forward]
            if coming:
                part = (costs - least[:, None]) / max(len(coming), len(ends) - len(coming))
                for end in coming:
                    end.give(part)
        return bound

    def picks(self) -> list[tuple[int, ...]]:
        """Of each case a plan: in order, each variable takes its cheapest option, given what is picked and the messages
        of the rest.

        Of those that cost the same, the one that pays least at once: a loss is added up over ranks where it leaves the
        step and nothing waits for it, not before it is divided.
        """
        cases = np.arange(len(self.s_per_byte))
        asked = [np.zeros((len(cases), table.cost.shape[1]), dtype=bool) for table in self.tables]
        given: list[Indices] = [cases] * len(self.tables)
        picked = np.zeros((len(self._own_s), len(cases)), dtype=np.intp)
        for variable, ends in enumerate(self._ends):
            paid = self._own(variable)
            for index in self._tables_of[variable]:
                table = self.tables[index]
                price = self.s_per_byte[:, None] if table.of_bytes else 1.0
                if table.producer == variable:
                    paid += (price * (asked[index] @ table.cost.T))[:, table.given]
                elif table.producer < variable:
                    row = np.where(asked[index], 0.0, price * table.cost[given[index]])
                    for reader, of in zip(table.readers, table.asked, strict=True):
                        if reader == variable:
                            paid += row[:, of]
            costs = paid.copy()
            for end in ends:
                if end.other > variable:
                    costs += end.message()
            alike = costs <= (costs.min(axis=1) + _ALIKE * np.abs(self.bound_s))[:, None]
            pick = picked[variable] = np.where(alike, paid, math.inf).argmin(axis=1)
            for index in self._tables_of[variable]:
                table = self.tables[index]
                if table.producer == variable:
                    given[index] = table.given[pick]
                for reader, of in zip(table.readers, table.asked, strict=True):
                    if reader == variable:
                        asked[index][cases, of[pick]] = True
        return [tuple(map(int, of)) for of in picked.T]

    def excess_s(self) -> tuple[Floats, ...]:
        """By variable, of each case and option: a plan with it costs at least so much more than the bound."""
        found = []
        for variable, ends in enumerate(self._ends):
            costs = sum((np.maximum(end.message(), -_HUGE) for end in ends), self._own(variable))
            found.append(sum((end.excess() for end in ends), costs - costs.min(axis=1)[:, None]))
        return tuple(found)


def _needs_nobody(problem: Problem) -> bool:
    return any(hold.given is None for hold in problem.holds)


def tables_of(problem: Problem) -> tuple[Table, ...]:
    """The problem's flows and holds, without states that no option has.

    A hold is paid for in bytes: what backward makes anyway it has, each other state that is asked for is paid for
    once. Where nothing is computed again, its producer is one more variable, behind all others, with one option.
    Where a flow has no way, the cost is beyond any plan's, so that sums stay finite.
    """
    costs = [np.array(flow.cost_s) * flow.count for flow in problem.flows]
    most = most_s(problem)
    found = []
    for flow, cost in zip(problem.flows, costs, strict=True):
        cost = np.where(np.isfinite(cost), cost, 1.0 + 2.0 * most)
        found.append(_table(flow.producer, flow.states, flow.readers, cost, of_bytes=False))
    for hold in problem.holds:
        cost = np.array(hold.bytes_by()) * hold.count
        given = hold.given or Reader(len(problem.option_s), (-1,))
        states = [state if state >= 0 else len(cost) - 1 for state in given.states]
        found.append(_table(given.variable, states, hold.readers, cost, of_bytes=True))
    return tuple(found)


def most_s(problem: Problem) -> float:
    """Seconds that no plan is above, unless it goes where there is no way."""
    most = sum(max(costs) for costs in problem.option_s)
    for flow in problem.flows:
        cost = np.array(flow.cost_s) * flow.count
        most += len(flow.readers) * float(cost[np.isfinite(cost)].max(initial=0.0))
    return most


def _table(producer: int, states: Sequence[int], readers: Sequence[Reader], cost: Floats, *, of_bytes: bool) -> Table:
    distinct = tuple(dict.fromkeys(readers))
    rows, (given,) = _numbered(cost.shape[0], [states])
    columns, asked = _numbered(cost.shape[1], [reader.states for reader in distinct])
    variables = tuple(reader.variable for reader in distinct)
    return Table(producer, given, variables, asked, cost[rows][:, columns], of_bytes)


def _numbered(count: int, states: Sequence[Sequence[int]]) -> tuple[Indices, tuple[Indices, ...]]:
    """Those of `count` states that are among `states`, and these by their places among them."""
    used = np.zeros(count, dtype=bool)
    for each in states:
        used[list(each)] = True
    place = np.cumsum(used) - 1
    return np.flatnonzero(used), tuple(place[list(each)] for each in states)
