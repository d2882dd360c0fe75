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
from costmodel.layout import Layout, Partial, Replicate, Shard, layout_text, local_shape

MOVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "slice")
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
    best: dict[Layout, float] = {source: 0.0}
    came: dict[Layout, Step] = {}
    queue: list[tuple[float, int, Layout]] = [(0.0, 0, source)]
    pushed = 0
    while queue:
        seconds, _, layout = heapq.heappop(queue)
        if layout == target:
            break
        if seconds > best[layout]:
            continue
        for step in _moves(shape, itemsize, layout, target, topology):
            total = seconds + step.seconds + _STEP_S
            if total < best.get(step.after, math.inf):
                best[step.after], came[step.after] = total, step
                pushed += 1
                heapq.heappush(queue, (total, pushed, step.after))
    if target not in came:
        return None
    path: list[Step] = []
    while target != source:
        path.append(came[target])
        target = came[target].before
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


def _moves(shape: tuple[int, ...], itemsize: int, layout: Layout, target: Layout, topology: Topology) -> Iterator[Step]:
    """Single steps that bring some axes, all placed alike, to a replica or to what `target` asks of them."""
    sizes = topology.sizes
    here = math.prod(local_shape(shape, layout, sizes)) * itemsize
    copy_s = 2.0 / (topology.device.memory_bytes_per_s * topology.device.memory_efficiency)

    def put(axes: Sequence[int], placement: Replicate | Shard) -> Layout:
        return tuple(placement if a in axes else p for a, p in enumerate(layout))

    def fits(axes: Sequence[int], dim: int) -> bool:
        parts = math.prod(sizes[a] for a, p in enumerate(layout) if p == Shard(dim) or a in axes)
        return shape[dim] % parts == 0 and _innermost(layout, axes, dim)

    def step(
        kind: str, axes: tuple[int, ...], source: int | None, to: int | None, full: int, copied: int, after: Layout
    ) -> Step:
        op = next((p.op for a, p in enumerate(layout) if a in axes and isinstance(p, Partial)), "")
        seconds = copied * copy_s + (collective_s(kind, full, axes, topology) if kind != "slice" else 0.0)
        ranks = math.prod(sizes[a] for a in axes)
        return Step(kind, axes, source, to, op, full, seconds if ranks > 1 else 0.0, layout, after, ranks)

    for axes in _subsets(len(layout)):
        placement, wanted = layout[axes[0]], target[axes[0]]
        if any(layout[a] != placement for a in axes[1:]):
            continue
        alike = all(target[a] == wanted for a in axes[1:])
        ranks = math.prod(sizes[a] for a in axes)
        goal = wanted.dim if alike and isinstance(wanted, Shard) and wanted != placement else None
        if isinstance(placement, Partial):
            if placement == wanted and alike:
                continue
            yield step("all_reduce", axes, None, None, here, 0, put(axes, Replicate()))
            if placement.op == "sum" and goal is not None and fits(axes, goal):
                yield step("reduce_scatter", axes, None, goal, here, here if goal else 0, put(axes, Shard(goal)))
        elif isinstance(placement, Shard):
            if not _innermost(layout, axes, placement.dim):
                continue
            full = here * ranks
            yield step(
                "all_gather", axes, placement.dim, None, full, full if placement.dim else 0, put(axes, Replicate())
            )
            if goal is not None and len(axes) == 1 and fits(axes, goal):
                yield step("all_to_all", axes, placement.dim, goal, here, 2 * here, put(axes, Shard(goal)))
        elif goal is not None and fits(axes, goal):
            yield step("slice", axes, None, goal, here, here // ranks, put(axes, Shard(goal)))


def path_text(path: Sequence[Step]) -> str:
    """`PR -> S(0)R -> RR`, for people."""
    return " -> ".join([layout_text(path[0].before), *(layout_text(step.after) for step in path)]) if path else ""
