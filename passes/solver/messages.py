"""A bound on what plans of a `Problem` cost, picks that often reach it, and what cannot be part of a cheaper plan.

    pass forward and back  ->  the bound rises;  picks are read off;  until they cost what the bound says

The budget is left out here, but a byte may have a price, and then a hold is a flow as others are; `branch.py` sees to
the rest. A *link* joins a producer to a reader, and has the costs of all flows between them, by the states of both. A
state that several readers ask for is paid for once, so a flow's costs are shared out among its links (`share >= 0`,
together no more than the cost of a pair of states), and the flow costs at least what its links' shares add up to.
Messages move cost between a link and the variables at its ends, and change no plan's cost. Whatever shares and messages
are,

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from passes.solver.pairwise import Flags, Floats, Indices, Table, finite_tables, numbered
from passes.solver.problem import Problem

State = list[Floats]
Columns = Indices | slice

_ALIKE = 1e-12
"""Share of the bound within which two costs are the same."""
_HUGE = 1e300
"""Less than inf: options that are ruled out stay so beside messages of -inf."""
_SPARED = 0.5
"""What a link takes of what those beside it do not need."""


@dataclass(eq=False, slots=True)
class _Part:
    """A link's share of the costs of a flow with several readers, by case and the states of both ends.

    `beside`: the links of the other readers, and which columns of this share are the same states as which of theirs.
    """

    share: Floats
    of_bytes: bool
    beside: list[tuple[_Link, _Part, Columns, Columns]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Link:
    """What a producer and a reader pay between them: all flows and holds for which the options of both are alike in the
    same way, by the states of both.

    `alone_s`, `alone_bytes`: of tables that nobody else reads. `total`: these and the shares of parts, by case.
    """

    alone_s: Floats
    alone_bytes: Floats
    total: Floats
    to_producer: Floats
    to_reader: Floats
    parts: list[_Part] = field(default_factory=list)

    def add_up(self, s_per_byte: Floats) -> None:
        """Work `total` out."""
        self.total = self.alone_s + s_per_byte[:, None, None] * self.alone_bytes
        for part in self.parts:
            self.total += part.share

    def left(self) -> Floats:
        """The costs less what the messages have taken of them."""
        left: Floats = self.total - self.to_producer[:, :, None] - self.to_reader[:, None, :]
        return left

    def collect(self) -> None:
        """Take of the shares of links beside this one half of what they do not need."""
        for part in self.parts:
            for link, other, mine, theirs in part.beside:
                spare = np.minimum(np.maximum(link.left()[:, :, theirs], 0.0), other.share[:, :, theirs]) * _SPARED
                other.share[:, :, theirs] -= spare
                link.total[:, :, theirs] -= spare
                part.share[:, :, mine] += spare
                self.total[:, :, mine] += spare


class _End:
    """A link as seen from the variable at one end: its `states` by option, and who is at the `other`."""

    __slots__ = ("_by_state", "_link", "_starts", "at_reader", "other", "states")

    def __init__(self, link: _Link, *, at_reader: bool, states: Indices, other: int) -> None:
        self._link, self.at_reader, self.states, self.other = link, at_reader, states, other
        self._by_state = np.argsort(states, kind="stable")
        options = np.bincount(states)
        self._starts = np.cumsum(options) - options

    def message(self) -> Floats:
        """What the link has given to this end, by case and option."""
        return (self._link.to_reader if self.at_reader else self._link.to_producer)[:, self.states]

    def take(self) -> Floats:
        """All that the link can give, by option: of its own, and of half of what links beside it do not need."""
        link = self._link
        link.collect()
        if self.at_reader:
            link.to_reader = (link.total - link.to_producer[:, :, None]).min(axis=1)
        else:
            link.to_producer = (link.total - link.to_reader[:, None, :]).min(axis=2)
        return self.message()

    def give(self, costs: Floats) -> None:
        """Move to the link what it can hold of `costs`: per state, those of its cheapest option."""
        message = self._link.to_reader if self.at_reader else self._link.to_producer
        message -= np.minimum.reduceat(costs[:, self._by_state], self._starts, axis=1)

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
        self.tables = finite_tables(problem)
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
        self._links: dict[tuple[int, bytes, int, bytes], _Link] = {}
        self._ends: list[list[_End]] = [[] for _ in counts]
        for index, table in enumerate(self.tables):
            for variable in {table.producer, *table.readers}:
                self._tables_of[variable].append(index)
            self._share_out(table)
        for link in self._links.values():
            link.add_up(self.s_per_byte)

    def _share_out(self, table: Table) -> None:
        """Share the table's costs evenly out to links. What a variable reads of itself is a cost of its own."""
        shares = table.cost / sum(np.bincount(np.unique(of), minlength=table.cost.shape[1]) for of in table.asked)
        prices = self.s_per_byte[:, None, None] if table.of_bytes else np.ones((len(self.s_per_byte), 1, 1))
        parts: list[tuple[_Link, _Part, Indices]] = []
        for reader, asked in zip(table.readers, table.asked, strict=True):
            if reader == table.producer:
                (self._own_bytes if table.of_bytes else self._own_s)[reader] += shares[table.given, asked]
                continue
            places, (states,) = numbered([asked.tolist()])
            columns = np.array(places)
            link, share = self._between(table.producer, table.given, reader, np.array(states)), shares[:, columns]
            if len(table.readers) == 1:
                alone = link.alone_bytes if table.of_bytes else link.alone_s
                alone += share
            else:
                parts.append((link, _Part(share * prices, table.of_bytes), columns))
        for link, part, columns in parts:
            link.parts.append(part)
            for other_link, other, theirs in parts:
                common = columns[np.isin(columns, theirs)]
                if other is not part and len(common):
                    mine, whose = _places(columns, common), _places(theirs, common)
                    part.beside.append((other_link, other, mine, whose))

    def _between(self, producer: int, given: Indices, reader: int, asked: Indices) -> _Link:
        """The link of these ends, whose options have these states."""
        key = producer, given.tobytes(), reader, asked.tobytes()
        if key not in self._links:
            cases, rows, columns = len(self.s_per_byte), int(given.max()) + 1, int(asked.max()) + 1
            alone = np.zeros((rows, columns)), np.zeros((rows, columns))
            link = _Link(*alone, np.zeros(0), np.zeros((cases, rows)), np.zeros((cases, columns)))
            self._ends[producer].append(_End(link, at_reader=False, states=given, other=reader))
            self._ends[reader].append(_End(link, at_reader=True, states=asked, other=producer))
            self._links[key] = link
        return self._links[key]

    def _own(self, variable: int) -> Floats:
        """What the variable pays by itself, by case and option."""
        own: Floats = self._own_s[variable] + self.s_per_byte[:, None] * self._own_bytes[variable]
        allowed = self._allowed.get(variable)
        return own if allowed is None else np.where(allowed, own, math.inf)

    def reprice(self, s_per_byte: Floats) -> None:
        """Set the price of a byte (above zero) per case; the messages found so far are the start."""
        ratio = (s_per_byte / self.s_per_byte)[:, None, None]
        for link in self._links.values():
            for part in link.parts:
                if part.of_bytes:
                    part.share *= ratio
            link.add_up(s_per_byte)
        self.s_per_byte = s_per_byte
        self.bound_s = np.full(len(s_per_byte), -math.inf)

    def state(self, case: int) -> State:
        """The state of a case, from which `load` continues."""
        return [
            values[case].copy()
            for link in self._links.values()
            for values in (link.to_producer, link.to_reader, *(part.share for part in link.parts))
        ]

    def load(self, cases: Sequence[tuple[State, float, Mapping[int, Flags]]]) -> None:
        """Replace the cases. Each has the state of an earlier one to start from, the price of a byte there, and by
        variable the options allowed, where not all are."""
        values = map(np.stack, zip(*(state for state, *_ in cases), strict=True))
        prices = np.array([price for _, price, _ in cases])
        for link in self._links.values():
            link.to_producer, link.to_reader = next(values), next(values)
            for part in link.parts:
                part.share = next(values)
            link.add_up(prices)
        self.s_per_byte = prices
        self.bound_s = np.full(len(cases), -math.inf)
        some = {variable for *_, allowed in cases for variable in allowed}
        every = {variable: np.ones(len(self._own_s[variable]), dtype=bool) for variable in some}
        self._allowed = {v: np.stack([allowed.get(v, every[v]) for *_, allowed in cases]) for v in some}

    def improve(self, times: int = 1) -> None:
        """Go `times` times over all variables and back."""
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
                for cost in self._paid(variable, self.tables[index], given[index], asked[index]):
                    paid += cost
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

    def _paid(self, variable: int, table: Table, given: Indices, asked: Flags) -> Iterator[Floats]:
        """What a table costs by case and option of the variable, once for each time that it reads it: what those picked
        so far have `asked` for, by case and state, or what the variable asks for first."""
        price = self.s_per_byte[:, None] if table.of_bytes else 1.0
        if table.producer == variable:
            yield (price * (asked @ table.cost.T))[:, table.given]
        elif table.producer < variable:
            row = np.where(asked, 0.0, price * table.cost[given])
            yield from (row[:, of] for reader, of in zip(table.readers, table.asked, strict=True) if reader == variable)

    def excess_s(self) -> tuple[Floats, ...]:
        """By variable, per case and option: how much more than the bound a plan with that option costs at least."""
        found = []
        for variable, ends in enumerate(self._ends):
            costs = sum((np.maximum(end.message(), -_HUGE) for end in ends), self._own(variable))
            found.append(sum((end.excess() for end in ends), costs - costs.min(axis=1)[:, None]))
        return tuple(found)


def _needs_nobody(problem: Problem) -> bool:
    return any(hold.given is None for hold in problem.holds)


def _places(states: Indices, some: Indices) -> Columns:
    """Where `some` of the states are among them; a slice where that is all of them in order."""
    if np.array_equal(states, some):
        return slice(None)
    return np.array([int(np.flatnonzero(states == state)[0]) for state in some])
