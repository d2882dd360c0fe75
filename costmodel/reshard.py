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
from functools import lru_cache
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

    @property
    def is_collective(self) -> bool:
        """Whether ranks talk to one another."""
        return self.kind not in ("slice", "state_slice")


@lru_cache(maxsize=200_000)
def steps(
    shape: tuple[int, ...], itemsize: int, source: Layout, target: Layout, topology: Topology
) -> tuple[Step, ...] | None:
    """The fastest way from `source` to `target`; None where there is none (nothing turns into a partial sum)."""
    if source == target:
        return ()
    best: dict[Layout, float] = {source: 0.0}
    came: dict[Layout, Step] = {}
    queue: list[tuple[float, int, Layout]] = [(0.0, 0, source)]
    dims = {p.dim for p in (*source, *target) if isinstance(p, Shard)}
    pushed = 0
    while queue:
        seconds, _, layout = heapq.heappop(queue)
        if layout == target:
            break
        if seconds > best[layout]:
            continue
        for step in _moves(shape, itemsize, layout, dims, topology):
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


def _moves(shape: tuple[int, ...], itemsize: int, layout: Layout, dims: set[int], topology: Topology) -> Iterator[Step]:
    sizes = topology.sizes
    here = math.prod(local_shape(shape, layout, sizes)) * itemsize
    copy_s = 2.0 / (topology.device.memory_bytes_per_s * topology.device.memory_efficiency)

    def put(axes: Sequence[int], placement: Replicate | Shard) -> Layout:
        return tuple(placement if a in axes else p for a, p in enumerate(layout))

    def divides(axes: Sequence[int], dim: int) -> bool:
        parts = math.prod(sizes[a] for a, p in enumerate(layout) if p == Shard(dim) or a in axes)
        return shape[dim] % parts == 0

    def step(
        kind: str, axes: tuple[int, ...], source: int | None, target: int | None, full: int, copied: int, after: Layout
    ) -> Step:
        op = next((p.op for a, p in enumerate(layout) if a in axes and isinstance(p, Partial)), "")
        seconds = copied * copy_s + (collective_s(kind, full, axes, topology) if kind != "slice" else 0.0)
        return Step(kind, axes, source, target, op, full, seconds, layout, after)

    for count in range(1, len(layout) + 1):
        for axes in combinations(range(len(layout)), count):
            ranks = math.prod(sizes[a] for a in axes)
            placements = {layout[a] for a in axes}
            if len(placements) != 1:
                continue
            placement = next(iter(placements))
            if isinstance(placement, Partial):
                yield step("all_reduce", axes, None, None, here, 0, put(axes, Replicate()))
                if placement.op == "sum":
                    for dim in sorted(dims):
                        if _innermost(layout, axes, dim) and divides(axes, dim):
                            yield step(
                                "reduce_scatter", axes, None, dim, here, here if dim else 0, put(axes, Shard(dim))
                            )
            elif isinstance(placement, Shard):
                if not _innermost(layout, axes, placement.dim):
                    continue
                full = here * ranks
                copied = full if placement.dim else 0
                yield step("all_gather", axes, placement.dim, None, full, copied, put(axes, Replicate()))
                for dim in sorted(dims - {placement.dim}):
                    if count == 1 and _innermost(layout, axes, dim) and divides(axes, dim):
                        yield step("all_to_all", axes, placement.dim, dim, here, 2 * here, put(axes, Shard(dim)))
            else:
                for dim in sorted(dims):
                    if _innermost(layout, axes, dim) and divides(axes, dim):
                        yield step("slice", axes, None, dim, here, here // ranks, put(axes, Shard(dim)))


def path_text(path: Sequence[Step]) -> str:
    """`PR -> S(0)R -> RR`, for people."""
    return " -> ".join([layout_text(path[0].before), *(layout_text(step.after) for step in path)]) if path else ""
