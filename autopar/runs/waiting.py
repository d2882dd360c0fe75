"""Setups that wait to be played, in the order of what they take at least.

Of setups that differ only in what backward computes again, the one that computes the least goes first. What computes
more takes longer, so it is bounded, which takes a schedule of its own, only where the one before cannot fit or did not.
Nor is what has larger micro-batches than one that cannot fit: it keeps more.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from passes.runs.setup import Setup

Bound = Callable[[Setup], tuple[float, float]]
"""Setup -> seconds and bytes that it cannot go below."""


def least_recomputed(setup: Setup) -> Setup:
    """What setups have in common that differ in what is computed again."""
    return replace(setup, recompute="none", whole_blocks=False)


class TooLarge:
    """The smallest micro-batch that does not fit, of setups that are alike but for that."""

    def __init__(self) -> None:
        self._least: dict[Setup, int] = {}

    def note(self, setup: Setup) -> None:
        """`setup` does not fit."""
        kind = _one_at_a_time(setup)
        self._least[kind] = min(setup.micro_batch, self._least.get(kind, setup.micro_batch))

    def covers(self, setup: Setup) -> bool:
        """Whether one with smaller micro-batches does not fit already."""
        return setup.micro_batch > self._least.get(_one_at_a_time(setup), setup.micro_batch)


def _one_at_a_time(setup: Setup) -> Setup:
    return replace(setup, micro_batch=1, accumulate=1)


class Waiting:
    """Iterates over (least seconds, setup) of what may fit in `budget_bytes`, the next in `turn` first.

    setups: of a kind, those that compute less again first. turn: when a setup comes; None: its least seconds.
    """

    def __init__(
        self, setups: Iterable[Setup], bound: Bound, budget_bytes: float, turn: Callable[[Setup], float] | None = None
    ) -> None:
        self.too_large: list[tuple[float, int, Setup]] = []
        """What cannot fit: (bytes too many, place, setup), but for larger micro-batches; no two share a place."""
        self._larger = TooLarge()
        self._bound = bound
        self._budget_bytes = budget_bytes
        self._turn = turn or (lambda setup: bound(setup)[0])
        self._heap: list[tuple[float, int, Setup]] = []
        self._left: dict[Setup, list[tuple[int, Setup]]] = {}
        for place, setup in enumerate(setups):
            self._left.setdefault(least_recomputed(setup), []).append((place, setup))
        for kind in self._left:
            self._ask(kind)

    def __iter__(self) -> Iterator[tuple[float, Setup]]:
        while self._heap:
            setup = heapq.heappop(self._heap)[2]
            yield self._bound(setup)[0], setup

    def ask_for_more(self, setup: Setup) -> None:
        """Have what computes more again than `setup` come too."""
        self._ask(least_recomputed(setup))

    def _ask(self, kind: Setup) -> None:
        left = self._left[kind]
        while left:
            place, setup = left.pop(0)
            if self._larger.covers(setup):
                continue
            _, size = self._bound(setup)
            if size <= self._budget_bytes:
                heapq.heappush(self._heap, (self._turn(setup), place, setup))
                return
            self._larger.note(setup)
            self.too_large.append((size - self._budget_bytes, place, setup))
