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
from collections.abc import Sequence

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
    later = tuple(  # HSDP: the replicas' sums are added when each rank is left with its chunk of them
        axis
        for axis, placement in enumerate(layout)
        if axes
        and len(partial) == len(axes)
        and axis < min(axes)
        and given[axis] == Partial()
        and placement == Replicate()
    )
    target = tuple(
        (Partial() if axis in partial else Replicate()) if axis in axes else Partial() if axis in later else placement
        for axis, placement in enumerate(layout)
    )
    path = steps(shape, itemsize, given, target, topology)
    if path is None:
        return None
    if padded:
        path = (*path, state_cut(local, itemsize, target, topology))
    if not axes:
        return path
    if len(partial) == len(axes):
        full = _full_bytes(local, itemsize, axes, topology, dim)
        seconds = collective_s("reduce_scatter", full, axes, topology) + (_copy_s(full, topology) if dim else 0.0)
        ranks = _ranks(axes, topology)
        scattered = tuple(Partial() if axis in later else placement for axis, placement in enumerate(layout))
        path = (*path, Step("state_scatter", axes, None, None, "sum", full, seconds, target, scattered, ranks))
        if not later:
            return path
        chunk = full // ranks
        seconds, ranks = collective_s("all_reduce", chunk, later, topology), _ranks(later, topology)
        return (*path, Step("all_reduce", later, None, None, "sum", chunk, seconds, scattered, layout, ranks))
    if local[dim] % _ranks(axes, topology) and partial:  # uneven chunks of several axes cannot be cut axis by axis
        whole = tuple(Replicate() if axis in axes else placement for axis, placement in enumerate(layout))
        path = steps(shape, itemsize, given, whole, topology)
        assert path is not None
        path = (*path, state_cut(local, itemsize, whole, topology)) if padded else path
        partial = []
    moves = list(path)
    if not partial:
        full = _full_bytes(local, itemsize, axes, topology, dim)
        before = moves[-1].after if moves else given
        return (*moves, Step("state_slice", axes, None, None, "", full, 0.0, before, layout, _ranks(axes, topology)))
    full = math.prod(local) * itemsize
    for axis in axes:
        kind, collective = ("state_scatter", "reduce_scatter") if axis in partial else ("state_slice", "")
        seconds = collective_s(collective, full, (axis,), topology) if collective else 0.0
        op, ranks = "sum" if collective else "", topology.sizes[axis]
        moves.append(Step(kind, (axis,), None, None, op, full, seconds, target, layout, ranks))
        full //= topology.sizes[axis]
    return tuple(moves)
