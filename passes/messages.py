"""A bound on what plans of a `Problem` cost, picks that often reach it, and what cannot be part of a cheaper plan.

    pass forward and back  ->  the bound rises;  picks are read off;  until they cost what the bound says

The budget is left out here; `solve.py` sees to it. A *link* joins the producer of a flow to one of its readers. A state
that several readers ask for is paid for once, so a flow's costs are shared out among its links (`share >= 0`, together
no more than the cost of a pair of states), and the flow costs at least what its links' shares add up to. Messages move
cost between a link and the variables at its ends, and change no plan's cost. Whatever shares and messages are,

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from passes.problem import Problem

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_ALIKE = 1e-12
"""Share of the bound within which two costs are the same."""


@dataclass(frozen=True, eq=False, slots=True)
class _Flow:
    """A flow in arrays: `given[i]` is the producer's state under its option i, `asked[k][i]` the k-th reader's."""

    producer: int
    given: Indices
    readers: tuple[int, ...]
    asked: tuple[Indices, ...]
    cost_s: Floats


@dataclass(eq=False, slots=True)
class _Link:
    """What a flow's producer and one of its readers pay between them, by the states of both.

    A state that none of the reader's options asks for has the message -inf: it is never the least.
    """

    share: Floats
    to_producer: Floats
    to_reader: Floats

    def left(self) -> Floats:
        """The share less what the messages have taken of it."""
        left: Floats = self.share - self.to_producer[:, None] - self.to_reader
        return left


class _End:
    """A link as seen from the variable at one end: its `states` by option, and who is at the `other`."""

    __slots__ = ("_absent", "_beside", "_by_state", "_link", "_present", "_starts", "at_reader", "other", "states")

    def __init__(self, link: _Link, beside: tuple[_Link, ...], *, at_reader: bool, states: Indices, other: int) -> None:
        self._link, self._beside, self.at_reader, self.states, self.other = link, beside, at_reader, states, other
        self._by_state = np.argsort(states, kind="stable")
        options = np.bincount(states, minlength=link.share.shape[int(at_reader)])
        self._present, self._absent = np.flatnonzero(options), np.flatnonzero(options == 0)
        self._starts = np.cumsum(options[self._present]) - options[self._present]

    def message(self) -> Floats:
        """What the link has given to this end, by option."""
        return (self._link.to_reader if self.at_reader else self._link.to_producer)[self.states]

    def take(self) -> Floats:
        """All that the link can give, by option: of its own share, and of half of what links beside it do not need."""
        link = self._link
        for other in self._beside:
            spare = np.minimum(np.maximum(other.left(), 0.0), other.share) * 0.5
            other.share = other.share - spare
            link.share = link.share + spare
        if self.at_reader:
            link.to_reader = (link.share - link.to_producer[:, None]).min(axis=0)
            link.to_reader[self._absent] = -math.inf
        else:
            link.to_producer = (link.share - link.to_reader).min(axis=1)
        return self.message()

    def give(self, costs: Floats) -> None:
        """Move to the link what it can hold of `costs`: per state, those of its cheapest option."""
        message = self._link.to_reader if self.at_reader else self._link.to_producer
        message[self._present] -= np.minimum.reduceat(costs[self._by_state], self._starts)

    def excess(self) -> Floats:
        """How far what is left to the link is above its least, by option of this end."""
        left = self._link.left()
        excess: Floats = (left.min(axis=0 if self.at_reader else 1) - left.min())[self.states]
        return excess


class Messages:
    """Shares and messages for a problem, and `bound_s`, which they prove. It rises with every `improve`."""

    def __init__(self, problem: Problem) -> None:
        self._own = [np.array(costs) for costs in problem.option_s]
        self._flows_of: list[list[_Flow]] = [[] for _ in self._own]
        self._ends: list[list[_End]] = [[] for _ in self._own]
        self.bound_s = -math.inf
        for flow in _flows(problem):
            for variable in {flow.producer, *flow.readers}:
                self._flows_of[variable].append(flow)
            self._link(flow)

    def _link(self, flow: _Flow) -> None:
        """The flow's links, its costs shared evenly. What a variable reads of itself is a cost of its own."""
        share, links = flow.cost_s / len(flow.readers), []
        for reader, asked in zip(flow.readers, flow.asked, strict=True):
            if reader == flow.producer:
                self._own[reader] = self._own[reader] + share[flow.given, asked]
                continue
            to_reader = np.full(share.shape[1], -math.inf)
            to_reader[asked] = 0.0
            links.append((_Link(share, np.zeros(share.shape[0]), to_reader), reader, asked))
        for link, reader, asked in links:
            beside = tuple(other for other, *_ in links if other is not link)
            self._ends[flow.producer].append(_End(link, beside, at_reader=False, states=flow.given, other=reader))
            self._ends[reader].append(_End(link, beside, at_reader=True, states=asked, other=flow.producer))

    def improve(self) -> None:
        """One pass over all variables, and one back."""
        self._pass(range(len(self._own)), forward=True)
        self.bound_s = max(self.bound_s, self._pass(reversed(range(len(self._own))), forward=False))

    def _pass(self, order: Iterable[int], *, forward: bool) -> float:
        """Visit variables in order; gives the bound that is proved then.

        That is the sum of what is taken off each variable here, which leaves it nothing below zero: it gives no more
        than its part of the rest. Nor is anything below zero left to a link, once both its ends have been visited.
        """
        bound = 0.0
        for variable in order:
            ends = self._ends[variable]
            costs = self._own[variable].copy()
            for end in ends:
                costs += end.take()
            least = costs.min()
            bound += float(least)
            coming = [end for end in ends if (end.other > variable) == forward]
            if coming:
                part = (costs - least) / max(len(coming), len(ends) - len(coming))
                for end in coming:
                    end.give(part)
        return bound

    def picks(self) -> tuple[int, ...]:
        """A plan: in order, each variable takes its cheapest option, given what is picked and the messages of the rest.

        Of those that cost the same, the one that pays least at once: a loss is added up over ranks where it leaves the
        step and nothing waits for it, not before it is divided.
        """
        picks: list[int] = []
        for variable, own in enumerate(self._own):
            paid = own.copy()
            for flow in self._flows_of[variable]:
                paid += _paid_s(flow, variable, picks)
            costs = paid.copy()
            for end in self._ends[variable]:
                if end.other > variable:
                    costs += end.message()
            alike = costs <= costs.min() + _ALIKE * abs(self.bound_s)
            picks.append(int(np.where(alike, paid, math.inf).argmin()))
        return tuple(picks)

    def excess_s(self) -> tuple[Floats, ...]:
        """By variable and option: a plan with it costs at least so much more than the bound."""
        found = []
        for own, ends in zip(self._own, self._ends, strict=True):
            costs = sum((end.message() for end in ends), own)
            found.append(sum((end.excess() for end in ends), costs - costs.min()))
        return tuple(found)


def _paid_s(flow: _Flow, variable: int, picks: list[int]) -> Floats | float:
    """What `variable` adds to a flow's cost, by its option, where those before it have picked."""
    asked = {int(of[picks[r]]) for r, of in zip(flow.readers, flow.asked, strict=True) if r < len(picks)}
    if flow.producer == variable:
        paid: Floats = flow.cost_s[:, sorted(asked)].sum(axis=1)[flow.given]
        return paid
    if flow.producer > variable:
        return 0.0
    row = flow.cost_s[flow.given[picks[flow.producer]]].copy()
    row[sorted(asked)] = 0.0
    own: list[Floats] = [row[of] for r, of in zip(flow.readers, flow.asked, strict=True) if r == variable]
    return sum(own[1:], own[0])


def _flows(problem: Problem) -> list[_Flow]:
    """The problem's flows, without states that no option has. Where there is no way, the cost is beyond any plan's, so
    that sums stay finite."""
    tables = [np.array(flow.cost_s) * flow.count for flow in problem.flows]
    most = sum(max(costs) for costs in problem.option_s)
    most += sum(len(f.readers) * t[np.isfinite(t)].max(initial=0.0) for f, t in zip(problem.flows, tables, strict=True))
    found = []
    for flow, table in zip(problem.flows, tables, strict=True):
        readers = tuple(dict.fromkeys(flow.readers))
        rows, (given,) = _numbered(table.shape[0], [flow.states])
        columns, asked = _numbered(table.shape[1], [reader.states for reader in readers])
        table = np.where(np.isfinite(table), table, 1.0 + 2.0 * most)[rows][:, columns]
        found.append(_Flow(flow.producer, given, tuple(reader.variable for reader in readers), asked, table))
    return found


def _numbered(count: int, states: Sequence[Sequence[int]]) -> tuple[Indices, tuple[Indices, ...]]:
    """Those of `count` states that are among `states`, and these by their places among them."""
    used = np.zeros(count, dtype=bool)
    for each in states:
        used[list(each)] = True
    place = np.cumsum(used) - 1
    return np.flatnonzero(used), tuple(place[list(each)] for each in states)
