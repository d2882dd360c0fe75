"""The order in which a cut graph runs: gathers start early, reductions are waited for late.

    issue gathers of the first region and the second | wait for the first's | region 1
    issue gathers of the third                       | wait for the second's | region 2 | issue reductions of region 2
    ...

Gathers are issued where the region before that gathers begins, which is what `issue.issue_points` prices: two
regions' worth is in memory at a time. A reduction is issued as soon as its gradient is there. At most `IN_FLIGHT`
regions' reductions are under way, so that whole gradients are freed behind backward; the last wait is at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import fx

from passes.lower.regions import Cut, Region
from passes.program.local import WAIT

IN_FLIGHT = 2


def arranged(cut: Cut) -> Iterator[Region | fx.Node]:
    """Regions, and the nodes outside of them, in the order in which they run."""
    fetching = set(cut.fetches)
    done: set[fx.Node] = set()
    order = {node: position for position, node in enumerate((*cut.fetches, *cut.drains))}

    def behind(ends: Sequence[fx.Node]) -> list[fx.Node]:
        """What is still to run of the fetches that `ends` need, these last waits left out."""
        found: set[fx.Node] = set()
        stack = [operand for end in ends for operand in ([end] if end.target is not WAIT else end.all_input_nodes)]
        while stack:
            node = stack.pop()
            if node in fetching and node not in done and node not in found:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return sorted(found, key=order.__getitem__)

    needs: list[list[fx.Node]] = []
    seen: set[fx.Node] = set()
    for region in cut.regions:
        reads = dict.fromkeys(x for node in region.nodes for x in node.all_input_nodes if x in fetching)
        needs.append([node for node in reads if node not in seen])
        seen |= reads.keys()
    gathering = [index for index, ends in enumerate(needs) if ends]
    following = dict(pairwise(gathering))
    drains = _Drains(cut)
    for index, region in enumerate(cut.regions):
        if index in gathering[:1]:
            yield from _run(behind(needs[index]), done)
        if index in following:
            yield from _run(behind(needs[following[index]]), done)
        yield from _run([node for node in needs[index] if node not in done], done)
        yield region
        done.update(region.gives)
        yield from drains.after(region)
    yield from _run([node for node in cut.fetches if node not in done], done)
    yield from drains.rest()


def _run(nodes: Sequence[fx.Node], done: set[fx.Node]) -> Iterator[fx.Node]:
    done.update(nodes)
    yield from nodes


class _Drains:
    """What follows regions: everything up to waits at once, waits some regions later."""

    def __init__(self, cut: Cut) -> None:
        self.left = list(cut.drains)
        self.missing = {*cut.drains, *(node for region in cut.regions for node in region.gives)}
        """What has not run yet."""
        self.waits: deque[list[fx.Node]] = deque()
        """Waits that could run, by the region after which they came up."""

    def after(self, region: Region) -> list[fx.Node]:
        """What runs behind `region`."""
        self.missing.difference_update(region.gives)
        found = self._ready()
        while len(self.waits) > IN_FLIGHT:
            found += self._received()
        return found

    def rest(self) -> list[fx.Node]:
        """What is still to run."""
        found = self._ready()
        while self.waits:
            found += self._received()
        if self.left:
            raise AssertionError(f"{self.left[0].name} waits for what no region gives")
        return found

    def _received(self) -> list[fx.Node]:
        """The oldest waits, and what can run then."""
        waits = self.waits.popleft()
        self.missing.difference_update(waits)
        return waits + self._ready()

    def _ready(self) -> list[fx.Node]:
        """What can run now; waits among it are put off."""
        found: list[fx.Node] = []
        waits: list[fx.Node] = []
        left: list[fx.Node] = []
        for node in self.left:
            if any(operand in self.missing for operand in node.all_input_nodes):
                left.append(node)
            elif node.target is WAIT:
                waits.append(node)
            else:
                self.missing.discard(node)
                found.append(node)
        self.left = left
        if waits:
            self.waits.append(waits)
        return found
