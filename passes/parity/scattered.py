"""Full tensors and the parts that the ranks of a mesh hold of them.

    scatter   full tensor -> each rank's part, zero-padded as the rank's program takes it
    gather    each rank's part -> full tensor; replicas are compared

A rank is its row-major coordinate on the mesh. The ranks of a group "dp,tp" differ only in these axes' coordinates and
are ordered by them, the first slowest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from passes.errors import AutoparError
from passes.program.local import Storage

Axes = Sequence[tuple[str, int]]


class SimulationError(AutoparError):
    """The local program does not do what its description says; the message names the node."""


class ReplicaMismatchError(SimulationError):
    """Ranks that should hold the same values do not."""


def coordinates(axes: Axes) -> list[tuple[int, ...]]:
    """Each rank's coordinate per axis."""
    return list(itertools.product(*(range(size) for _, size in axes)))


def groups(axes: Axes, group: str) -> list[list[int]]:
    """The ranks of every group that the axes in `group` ("tp", "dp,tp") form, each in the order of its members."""
    names = [name for name, _ in axes]
    chosen = group.split(",")
    if chosen != [name for name in names if name in chosen]:
        raise ValueError(f"group {group!r}: a group is named by axes of the mesh ({', '.join(names)}), in that order")
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, coordinate in enumerate(coordinates(axes)):
        fixed = tuple(c for name, c in zip(names, coordinate, strict=True) if name not in chosen)
        found.setdefault(fixed, []).append(rank)
    return list(found.values())


# --------------------------------------------------------------------------------------------- full tensors and parts
def held(storage: Storage, axes: Axes, coordinate: Sequence[int]) -> tuple[Tensor | None, ...]:
    """Per dim, the global indices that the rank at `coordinate` holds (unpadded); None for a dim it holds whole."""
    sizes = [size for _, size in axes]
    indices: list[Tensor | None] = [None] * len(storage.shape)

    def of(dim: int) -> Tensor:
        known = indices[dim]
        return torch.arange(storage.shape[dim]) if known is None else known

    for shard, size, position in zip(storage.shards, sizes, coordinate, strict=True):
        if shard is None or size == 1:
            continue
        rows = of(shard.dim)
        if shard.stride == 1:
            indices[shard.dim] = _chunk(rows, size, position)
            continue
        if len(rows) % (shard.stride * size):
            raise ValueError(
                f"dim {shard.dim} of {storage}: {len(rows)} rows do not divide over {shard.stride} x {size}"
            )
        indices[shard.dim] = rows.view(shard.stride, size, -1)[:, position].flatten()
    for axis in storage.state_axes:
        if sizes[axis] > 1:
            indices[storage.state_dim] = _chunk(of(storage.state_dim), sizes[axis], coordinate[axis])
    return tuple(indices)


def _chunk(rows: Tensor, ranks: int, position: int) -> Tensor:
    chunk = -(-len(rows) // ranks)
    return rows[position * chunk : (position + 1) * chunk]


def scatter(full: Tensor, storage: Storage, axes: Axes) -> list[Tensor]:
    """Each rank's part of `full`, contiguous, zero-padded as the graph takes it; replicas are one object."""
    if tuple(full.shape) != storage.shape:
        raise ValueError(f"a tensor of shape {tuple(full.shape)} was given for {storage}")
    padded = storage.padded_shape([size for _, size in axes])
    parts: dict[tuple[int, ...], Tensor] = {}
    result = []
    for coordinate in coordinates(axes):
        key = _position(storage, coordinate)
        if key not in parts:
            part = full
            for dim, rows in enumerate(held(storage, axes, coordinate)):
                part = part if rows is None else part.index_select(dim, rows.to(full.device))
            if tuple(part.shape) != padded:
                sizes = zip(reversed(padded), reversed(part.shape), strict=True)
                missing = [n for whole, mine in sizes for n in (0, whole - mine)]
                part = torch.nn.functional.pad(part, missing)
            parts[key] = part.contiguous()
        result.append(parts[key])
    return result


def gather(
    parts: Sequence[Tensor], storage: Storage, axes: Axes, name: str = "tensor", *, zeros: bool = True
) -> Tensor:
    """The full tensor of which every rank holds a part; `zeros`: what pads it has to be zero.

    Raises:
        ReplicaMismatchError: ranks that hold the same part differ in it.
        SimulationError: a part has another shape than `storage` says, or padding that is not zero.
    """
    sizes = [size for _, size in axes]
    padded = storage.padded_shape(sizes)
    full = parts[0].new_empty(storage.shape)
    first: dict[tuple[int, ...], int] = {}
    for rank, (coordinate, part) in enumerate(zip(coordinates(axes), parts, strict=True)):
        if tuple(part.shape) != padded:
            raise SimulationError(f"{name}: rank {rank} holds shape {tuple(part.shape)}, but {storage} gives {padded}")
        holder = first.setdefault(_position(storage, coordinate), rank)
        if holder != rank:
            _check_equal(name, holder, parts[holder], rank, part, axes)
            continue
        indices = held(storage, axes, coordinate)
        for dim, index in enumerate(indices):
            rows = padded[dim] if index is None else len(index)
            if zeros and part.narrow(dim, rows, padded[dim] - rows).count_nonzero():
                raise SimulationError(
                    f"{name}: rank {rank} holds {rows} entries along dim {dim}, but its padding is not zero"
                )
            part = part.narrow(dim, 0, rows)
        if all(index is None for index in indices):
            full.copy_(part)
        else:
            full[_grid(indices, full)] = part
    return full


def _position(storage: Storage, coordinate: Sequence[int]) -> tuple[int, ...]:
    """What of a rank's coordinate decides which part it holds."""
    return tuple(
        c if storage.shards[axis] is not None or axis in storage.state_axes else 0 for axis, c in enumerate(coordinate)
    )


def _grid(indices: Sequence[Tensor | None], full: Tensor) -> tuple[Tensor, ...]:
    """Indices of a block: one per dim, shaped to broadcast against one another."""
    rank = len(indices)
    every = [torch.arange(n) if index is None else index for index, n in zip(indices, full.shape, strict=True)]
    return tuple(
        index.to(full.device).view([-1 if d == dim else 1 for d in range(rank)]) for dim, index in enumerate(every)
    )


def _check_equal(name: str, one: int, a: Tensor, other: int, b: Tensor, axes: Axes) -> None:
    """Replicas are computed by the same ops on the same values; only vectorised loops may round them apart."""
    if a is b or torch.equal(a, b):
        return
    if a.dtype.is_floating_point:
        eps = torch.finfo(a.dtype).eps
        if torch.allclose(a, b, rtol=64 * eps, atol=64 * eps * float(a.abs().max().nan_to_num()), equal_nan=True):
            return
    where = coordinates(axes)
    differ = ~((a == b) | ((a != a) & (b != b)))
    place = tuple(int(i) for i in differ.nonzero()[0])
    raise ReplicaMismatchError(
        f"{name}: ranks {one} and {other} (coordinates {where[one]} and {where[other]} on "
        f"{', '.join(axis for axis, _ in axes)}) hold replicas, but {int(differ.sum())} of {a.numel()} elements "
        f"differ; the first at {list(place)}: {a[place].item()} and {b[place].item()}"
    )
