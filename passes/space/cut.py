"""What to keep so that some values can be had later, at the fewest bytes: a minimum cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNBOUNDED = 1 << 62
"""Bytes of a value that cannot be kept."""


@dataclass(frozen=True)
class Values:
    """Numbered values: the bytes that keeping each takes, and what it is computed again from (None: it cannot be).

    A value that is at hand anyway is computed again from nothing.
    """

    bytes: Sequence[int]
    sources: Sequence[Sequence[int] | None]


def cheapest_cut(values: Values, demands: Iterable[int]) -> frozenset[int]:
    """The values to keep so that every one of `demands` can be had, at the fewest bytes; among equals those from which
    the least is computed again.

    Each value is an edge of its size from its `in` to its `out`; one that can be computed again is fed by its sources,
    any other by the source; demands feed the sink. Kept are the edges of a minimum cut.
    """
    demands = list(demands)
    members = sorted(reached(values, demands, frozenset()))
    number = {value: 2 * index for index, value in enumerate(members)}
    source, sink = 2 * len(members), 2 * len(members) + 1
    flow = _Flow(2 * len(members) + 2)
    for value, index in number.items():
        flow.connect(index, index + 1, values.bytes[value])
        origins = values.sources[value]
        if origins is None:
            flow.connect(source, index, UNBOUNDED)
        else:
            for origin in origins:
                flow.connect(number[origin] + 1, index, UNBOUNDED)
    for value in demands:
        flow.connect(number[value] + 1, sink, UNBOUNDED)
    if flow.saturate(source, sink) >= UNBOUNDED:
        raise AssertionError("a value that backward needs can neither be kept nor computed again")
    late = flow.reaching(sink)
    kept = frozenset(value for value, index in number.items() if index not in late and index + 1 in late)
    return kept & reached(values, demands, kept)


def reached(values: Values, demands: Iterable[int], kept: frozenset[int]) -> frozenset[int]:
    """`demands` and what they are computed again from, going no further than what is `kept`."""
    found: set[int] = set()
    stack = list(demands)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            if value not in kept:
                stack.extend(values.sources[value] or ())
    return frozenset(found)


class _Flow:
    """A network with integer capacities; Dinic's algorithm, without recursion."""

    def __init__(self, nodes: int) -> None:
        self.edges_of: list[list[int]] = [[] for _ in range(nodes)]
        self.target: list[int] = []
        self.left: list[int] = []

    def connect(self, start: int, end: int, capacity: int) -> None:
        for a, b, c in ((start, end, capacity), (end, start, 0)):
            self.edges_of[a].append(len(self.target))
            self.target.append(b)
            self.left.append(c)

    def saturate(self, source: int, sink: int) -> int:
        """Pushes a maximum flow and returns its size."""
        total = 0
        while (level := self._levels(source))[sink] >= 0:
            next_edge = [0] * len(self.edges_of)
            while pushed := self._push(source, sink, level, next_edge):
                total += pushed
                if total >= UNBOUNDED:
                    return total
        return total

    def _levels(self, source: int) -> list[int]:
        level = [-1] * len(self.edges_of)
        level[source] = 0
        queue = deque([source])
        while queue:
            node = queue.popleft()
            for edge in self.edges_of[node]:
                if self.left[edge] > 0 and level[self.target[edge]] < 0:
                    level[self.target[edge]] = level[node] + 1
                    queue.append(self.target[edge])
        return level

    def _push(self, source: int, sink: int, level: list[int], next_edge: list[int]) -> int:
        """One augmenting path along rising levels; what it carried, 0 where there is none."""
        path: list[int] = []
        node = source
        while node != sink:
            edges = self.edges_of[node]
            while next_edge[node] < len(edges):
                edge = edges[next_edge[node]]
                if self.left[edge] > 0 and level[self.target[edge]] == level[node] + 1:
                    break
                next_edge[node] += 1
            else:
                if not path:
                    return 0
                node = self.target[path.pop() ^ 1]
                next_edge[node] += 1
                continue
            path.append(edge)
            node = self.target[edge]
        amount = min(self.left[edge] for edge in path)
        for edge in path:
            self.left[edge] -= amount
            self.left[edge ^ 1] += amount
        return amount

    def reaching(self, sink: int) -> set[int]:
        """Nodes from which the sink can still be reached."""
        found = {sink}
        stack = [sink]
        while stack:
            for edge in self.edges_of[stack.pop()]:
                node = self.target[edge]
                if node not in found and self.left[edge ^ 1] > 0:
                    found.add(node)
                    stack.append(node)
        return found
