"""From one layout of a tensor to another: the cheapest list of steps.

The list is found as a shortest path whose nodes are layouts and whose edges are single collectives (or local slices),
priced by `collectives`. The same list is priced by the solver and emitted by the rewriter, so what is priced runs.

Where several axes shard one dim, the earlier mesh axis splits first, so only the innermost of them can be gathered or
added: `S(0)S(0)` goes to `S(0)R` by a gather over axis 1, not to `RS(0)` in one step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations

from costmodel.collectives import collective_s
from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Replicate, Shard, local_shape

_STEP_S = 1e-9
"""Tie-breaker: of two equally fast ways the one with fewer steps."""


@dataclass(frozen=True, slots=True)
class Step:
    """One move of every rank's part of a tensor.

    `axes` form the group; `source` and `target` are the dims gathered from and scattered to. `full_bytes` is the size
    of the full (gathered or unreduced) buffer on one rank; `seconds` what it takes, the local copies included.
    """

    kind: str
    axes: tuple[int, ...]
    source: int | None
    target: int | None
    op: str
    full_bytes: int
    seconds: float
    before: Layout
    after: Layout
    ranks: int = 0
    """Of the group, 0 where nobody asked; with one rank nothing moves."""
    dtype: str = ""
    """What a "cast" gives (`bfloat16`)."""

    @property
    def is_collective(self) -> bool:
        """Whether ranks talk to one another."""
        return self.kind not in ("slice", "state_slice", "state_pad", "state_cut", "cast") and self.ranks != 1


@lru_cache(maxsize=400_000)
def steps(
    shape: tuple[int, ...], itemsize: int, source: Layout, target: Layout, topology: Topology
) -> tuple[Step, ...] | None:
    """The fastest way from `source` to `target`; None where there is none (nothing turns into a partial sum).

    On its way an axis holds what it had, what it shall have, or a replica.
    """
    if source == target:
        return ()
    if any(isinstance(t, Partial) and t != s for s, t in zip(source, target, strict=True)):
        return None
    moves = _moves(shape, itemsize, topology)
    start, end = moves.number(source), moves.number(target)
    best, came = {start: 0.0}, {}
    queue = [(0.0, 0, start)]
    pushed = 0
    while queue:
        seconds, _, here = heapq.heappop(queue)
        if here == end:
            break
        if seconds > best[here]:
            continue
        for step, there in moves.towards(here, end):
            total = seconds + step.seconds + _STEP_S
            if total < best.get(there, math.inf):
                best[there], came[there] = total, (here, step)
                pushed += 1
                heapq.heappush(queue, (total, pushed, there))
    if end not in came:
        return None
    path: list[Step] = []
    while end != start:
        end, step = came[end]
        path.append(step)
    return tuple(reversed(path))


def reshard_s(path: Sequence[Step]) -> float:
    """Seconds of a list of steps."""
    return sum(step.seconds for step in path)


def _innermost(layout: Layout, axes: Sequence[int], dim: int) -> bool:
    """Whether no later axis outside `axes` shards `dim` below the first of them."""
    return all(a in axes or a < axes[0] for a, placement in enumerate(layout) if placement == Shard(dim))


@cache
def _subsets(axes: int) -> tuple[tuple[int, ...], ...]:
    return tuple(subset for count in range(1, axes + 1) for subset in combinations(range(axes), count))


class _Moves:
    """Single steps of one tensor, found as they are asked for. Layouts are numbered, which is quicker to look up."""

    def __init__(self, shape: tuple[int, ...], itemsize: int, topology: Topology) -> None:
        self._tensor = (shape, itemsize, topology)
        self._numbers: dict[Layout, int] = {}
        self._layouts: list[Layout] = []
        self._groups: list[tuple[tuple[int, ...], ...]] = []
        self._over: dict[tuple[int, tuple[int, ...], int | None], tuple[tuple[Step, int], ...]] = {}
        self._towards: dict[tuple[int, int], tuple[tuple[Step, int], ...]] = {}

    def number(self, layout: Layout) -> int:
        """The layout's number."""
        if layout not in self._numbers:
            self._numbers[layout] = len(self._layouts)
            self._layouts.append(layout)
            alike = (axes for axes in _subsets(len(layout)) if all(layout[a] == layout[axes[0]] for a in axes[1:]))
            self._groups.append(tuple(alike))
        return self._numbers[layout]

    def towards(self, here: int, end: int) -> tuple[tuple[Step, int], ...]:
        """Steps, and where they lead, that bring axes which are placed alike to a replica or to what `end` has."""
        if (here, end) not in self._towards:
            layout, target = self._layouts[here], self._layouts[end]
            found: list[tuple[Step, int]] = []
            for axes in self._groups[here]:
                placement, wanted = layout[axes[0]], target[axes[0]]
                alike = all(target[a] == wanted for a in axes[1:])
                if alike and placement == wanted and isinstance(placement, Partial):
                    continue
                goal = wanted.dim if alike and isinstance(wanted, Shard) and wanted != placement else None
                if (here, axes, goal) not in self._over:
                    made = _steps_over(*self._tensor, layout, axes, goal)
                    self._over[here, axes, goal] = tuple((step, self.number(step.after)) for step in made)
                found += self._over[here, axes, goal]
            self._towards[here, end] = tuple(found)
        return self._towards[here, end]


@lru_cache(maxsize=256)
def _moves(shape: tuple[int, ...], itemsize: int, topology: Topology) -> _Moves:
    """Those of tensors of one shape."""
    return _Moves(shape, itemsize, topology)


def _steps_over(
    shape: tuple[int, ...], itemsize: int, topology: Topology, layout: Layout, axes: tuple[int, ...], goal: int | None
) -> Iterator[Step]:
    """Single steps over a group of axes that are placed alike: to a replica, and to a split of dim `goal`."""
    sizes, placement = topology.sizes, layout[axes[0]]
    here = math.prod(local_shape(shape, layout, sizes)) * itemsize
    ranks = math.prod(sizes[a] for a in axes)
    copy_s = 2.0 / (topology.device.memory_bytes_per_s * topology.device.memory_efficiency)

    def step(kind: str, source: int | None, to: int | None, full: int, copied: int) -> Step:
        op = placement.op if isinstance(placement, Partial) else ""
        seconds = copied * copy_s + (collective_s(kind, full, axes, topology) if kind != "slice" else 0.0)
        put = Replicate() if to is None else Shard(to)
        after = tuple(put if a in axes else p for a, p in enumerate(layout))
        return Step(kind, axes, source, to, op, full, seconds if ranks > 1 else 0.0, layout, after, ranks)

    def fits(dim: int) -> bool:
        parts = math.prod(sizes[a] for a, p in enumerate(layout) if p == Shard(dim) or a in axes)
        return shape[dim] % parts == 0 and _innermost(layout, axes, dim)

    if isinstance(placement, Partial):
        yield step("all_reduce", None, None, here, 0)
        if placement.op == "sum" and goal is not None and fits(goal):
            yield step("reduce_scatter", None, goal, here, here if goal else 0)
    elif isinstance(placement, Shard):
        if not _innermost(layout, axes, placement.dim):
            return
        full = here * ranks
        yield step("all_gather", placement.dim, None, full, full if placement.dim else 0)
        if goal is not None and len(axes) == 1 and fits(goal):
            yield step("all_to_all", placement.dim, goal, here, 2 * here)
    elif goal is not None and fits(goal):
        yield step("slice", None, goal, here, here // ranks)
