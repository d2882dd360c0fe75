"""Gathering and scattering of stored state: FSDP's dim-0 chunks.

A tensor computed with as one part of n rows is stored over `axes` in chunks, as `torch.chunk` cuts them along each axis
in mesh order, zero-padded to equal size, so that one collective over the flattened group moves it: `state_gather` for
compute, `state_scatter` for a gradient that is a partial sum on all these axes, `state_slice` where the ranks of an
axis already hold the same gradient. A gradient that is a partial sum on outer axes too (the replicas of HSDP) is
scattered first, and an all-reduce adds up the chunks; on inner, fast axes (tp) it is added up before. Where what
travels has another dtype than what is stored, a `cast` stands between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from costmodel.collectives import collective_s
from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Replicate
from costmodel.reshard import Step, steps


def chunks(rows: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Rows that each rank of a group stores, in the group's order: `torch.chunk` along each axis in turn.

    Every rank's chunk is padded to the first rank's, the largest.
    """
    parts = [rows]
    for size in sizes:
        split = []
        for part in parts:
            chunk = -(-part // size)
            split += [max(0, min(chunk, part - i * chunk)) for i in range(size)]
        parts = split
    return tuple(parts)


def largest_chunk(rows: int, sizes: Sequence[int]) -> int:
    """The first rank's rows, which every rank's chunk is padded to; nothing is listed per rank."""
    for size in sizes:
        rows = -(-rows // size)
    return rows


def cut_evenly(rows: int, each: int, sizes: Sequence[int]) -> bool:
    """Whether rank after rank's chunk is the next `each` rows, as long as there are any."""
    if not sizes:
        return rows <= each
    block = each * math.prod(sizes[1:])
    chunk = -(-rows // sizes[0])
    if chunk != block and rows > min(chunk, block):
        return False
    return all(cut_evenly(part, each, sizes[1:]) for part in {min(block, rows), rows % block if block else 0})


def _ranks(axes: Sequence[int], topology: Topology) -> int:
    return math.prod(topology.sizes[axis] for axis in axes)


def _full_bytes(local: tuple[int, ...], itemsize: int, axes: Sequence[int], topology: Topology, dim: int) -> int:
    chunk = largest_chunk(local[dim], [topology.sizes[axis] for axis in axes])
    return chunk * _ranks(axes, topology) * math.prod((*local[:dim], *local[dim + 1 :])) * itemsize


def _copy_s(copied_bytes: float, topology: Topology) -> float:
    """Time to read and write so many bytes."""
    return 2.0 * copied_bytes / (topology.device.memory_bytes_per_s * topology.device.memory_efficiency)


def cast(elements: int, itemsize: int, dtype: str, given_itemsize: int, layout: Layout, topology: Topology) -> Step:
    """Each rank's `elements`, of `given_itemsize` bytes, become `dtype`, of `itemsize` bytes."""
    device = topology.device
    seconds = elements * (given_itemsize + itemsize) / (device.memory_bytes_per_s * device.memory_efficiency)
    return Step("cast", (), None, None, "", elements * itemsize, seconds, layout, layout, 0, dtype)


def state_gather(
    local: tuple[int, ...], itemsize: int, axes: tuple[int, ...], layout: Layout, topology: Topology, dim: int = 0
) -> Step:
    """All-gather of a stored tensor into the part of shape `local` that is computed with; chunks are of dim `dim`."""
    full = _full_bytes(local, itemsize, axes, topology, dim)
    seconds = collective_s("all_gather", full, axes, topology) + (_copy_s(full, topology) if dim else 0.0)
    return Step("state_gather", axes, None, None, "", full, seconds, layout, layout, _ranks(axes, topology))


def state_pad(local: tuple[int, ...], itemsize: int, layout: Layout, topology: Topology) -> Step:
    """A stored part made larger by zeros, to the shape `local` that is computed with."""
    full = math.prod(local) * itemsize
    return Step("state_pad", (), None, None, "", full, _copy_s(full, topology), layout, layout)


def state_cut(local: tuple[int, ...], itemsize: int, layout: Layout, topology: Topology) -> Step:
    """A gradient cut to what is stored, of shape `local`."""
    full = math.prod(local) * itemsize
    return Step("state_cut", (), None, None, "", full, _copy_s(full, topology), layout, layout)


def state_scatter(
    local: tuple[int, ...],
    itemsize: int,
    shape: tuple[int, ...],
    given: Layout,
    layout: Layout,
    axes: tuple[int, ...],
    topology: Topology,
    dim: int = 0,
    *,
    padded: bool = False,
) -> tuple[Step, ...] | None:
    """Steps from a gradient in layout `given` (on the expanded `shape`) to chunks over `axes` of the part `layout`.

    `local` is the shape of that part, `dim` the one that the chunks cut. `padded`: the gradient is larger and is cut to
    `local` first. Axes in `axes` come in as partial sums or replicas; other placements there are
    gathered first. None where there is no way.
    """
    partial = [axis for axis in axes if given[axis] == Partial()]
    together = bool(axes) and len(partial) == len(axes)
    later = _summed_later(given, layout, axes) if together else ()
    target = tuple(
        Partial() if axis in (*partial, *later) else Replicate() if axis in axes else placement
        for axis, placement in enumerate(layout)
    )

    def moved(to: Layout) -> tuple[Step, ...] | None:
        path = steps(shape, itemsize, given, to, topology)
        return (*path, state_cut(local, itemsize, to, topology)) if padded and path is not None else path

    path = moved(target)
    if path is None or not axes:
        return path
    if together:
        full = _full_bytes(local, itemsize, axes, topology, dim)
        return (*path, *_scattered_together(full, target, layout, axes, later, topology, copied=dim != 0))
    if partial and local[dim] % _ranks(axes, topology):  # uneven chunks of several axes cannot be cut axis by axis
        partial = []
        path = moved(tuple(Replicate() if axis in axes else placement for axis, placement in enumerate(layout)))
        assert path is not None
    if partial:
        return (*path, *_axis_by_axis(math.prod(local) * itemsize, target, layout, axes, partial, topology))
    full = _full_bytes(local, itemsize, axes, topology, dim)
    before = path[-1].after if path else given
    return (*path, Step("state_slice", axes, None, None, "", full, 0.0, before, layout, _ranks(axes, topology)))


def _summed_later(given: Layout, layout: Layout, axes: Sequence[int]) -> tuple[int, ...]:
    """HSDP: the axes of replicas, whose sums are added when each rank is left with its chunk of them."""
    return tuple(axis for axis in range(min(axes)) if given[axis] == Partial() and layout[axis] == Replicate())


def _scattered_together(
    full: int, given: Layout, layout: Layout, axes: tuple[int, ...], later: tuple[int, ...], topology: Topology, *,
    copied: bool,
) -> Iterator[Step]:  # fmt: skip
    """One reduce-scatter of `full` bytes over all of `axes`, and an all-reduce of the chunks over `later`; `copied`:
    chunks are of another dim than the first."""
    ranks = _ranks(axes, topology)
    seconds = collective_s("reduce_scatter", full, axes, topology) + (_copy_s(full, topology) if copied else 0.0)
    scattered = tuple(Partial() if axis in later else placement for axis, placement in enumerate(layout))
    yield Step("state_scatter", axes, None, None, "sum", full, seconds, given, scattered, ranks)
    if later:
        chunk, replicas = full // ranks, _ranks(later, topology)
        seconds = collective_s("all_reduce", chunk, later, topology)
        yield Step("all_reduce", later, None, None, "sum", chunk, seconds, scattered, layout, replicas)


def _axis_by_axis(
    full: int, given: Layout, layout: Layout, axes: Sequence[int], partial: Sequence[int], topology: Topology
) -> Iterator[Step]:
    """A reduce-scatter over each axis in `partial` and a slice over each other one, in order."""
    for axis in axes:
        ranks = topology.sizes[axis]
        if axis in partial:
            seconds = collective_s("reduce_scatter", full, (axis,), topology)
            yield Step("state_scatter", (axis,), None, None, "sum", full, seconds, given, layout, ranks)
        else:
            yield Step("state_slice", (axis,), None, None, "", full, 0.0, given, layout, ranks)
        full //= ranks
