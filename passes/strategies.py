"""Options: the ways to lay one op out over the whole mesh.

A mesh axis either leaves an op alone, splits one of its leaves, or lets partial sums flow through one of its linear
groups. An option is one such choice per axis; what it asks of the operands and gives for the results follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from costmodel.layout import Layout, Partial, Placement, Replicate, Shard
from costmodel.state import cut_evenly
from passes.dims import ExpandedOp, expanded_shape
from passes.local import DimShard, Storage
from passes.precision import Dtypes


@dataclass(frozen=True, slots=True)
class Option:
    """Layouts (on expanded dims) that an op asks of its operands and gives to its results.

    `splits`: per axis, the index of the op's leaf that it splits, or None.
    """

    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    splits: tuple[int | None, ...]


Choice = int | None
"""What a mesh axis does at an op: nothing, split leaf i, or (len(leaves) + g) let partial sums through group g."""


def every_choice(op: ExpandedOp, parts: int) -> tuple[Choice, ...]:
    """All that axes with `parts` ranks together can do at `op`."""
    leaves = len(op.leaves)
    splits = (i for i, leaf in enumerate(op.leaves) if leaf.size % parts == 0)
    return (None, *splits, *range(leaves, leaves + len(op.linear)))


def op_options(
    op: ExpandedOp,
    axis_sizes: Sequence[int],
    groups: Sequence[tuple[tuple[int, ...], tuple[Choice, ...]]] | None = None,
) -> tuple[Option, ...]:
    """The ways to lay `op` out; `groups` are axes that choose together, with their choices (default: all there are)."""
    none, leaves = -1, len(op.leaves)
    if groups is None:
        groups = [((axis,), every_choice(op, size)) for axis, size in enumerate(axis_sizes)]
    options: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], Option] = {}
    for picks in product(*(choices for _, choices in groups)):
        chosen = [none] * len(axis_sizes)
        for (axes, _), pick in zip(groups, picks, strict=True):
            for axis in axes:
                chosen[axis] = none if pick is None else pick
        if not _divides(op, chosen, axis_sizes):
            continue
        operands = tuple(_placements(op, chosen, k, operand=True) for k in range(len(op.operands)))
        results = tuple(_placements(op, chosen, r, operand=False) for r in range(len(op.results)))
        splits = tuple(c if 0 <= c < leaves else None for c in chosen)
        options.setdefault((operands, results), Option(operands, results, splits))
    return tuple(options.values())


def _divides(op: ExpandedOp, choices: Sequence[int], axis_sizes: Sequence[int]) -> bool:
    for i in set(choices):
        if 0 <= i < len(op.leaves):
            parts = math.prod(size for choice, size in zip(choices, axis_sizes, strict=True) if choice == i)
            if op.leaves[i].size % parts:
                return False
    return True


def _placements(op: ExpandedOp, choices: Sequence[int], index: int, *, operand: bool) -> Layout:
    placed: list[Placement] = []
    for choice in choices:
        if choice < 0:
            placed.append(Replicate())
        elif choice < len(op.leaves):
            leaf = op.leaves[choice]
            place = (leaf.operands if operand else leaf.results)[index]
            if place is not None:
                placed.append(Shard(place))
            elif operand:
                placed.append(Replicate())
            else:
                assert leaf.reduce is not None
                placed.append(Partial(leaf.reduce))
        else:
            flows = not operand or index in op.linear[choice - len(op.leaves)]
            placed.append(Partial() if flows else Replicate())
    return tuple(placed)


@dataclass(frozen=True, slots=True)
class StoredOption:
    """A way to store a parameter: what it is computed from (`layout`, on expanded dims) and its `Storage`.

    `padding`: zeros put at the end of each dim of a rank's part, before it is computed with, where the program has the
    parameter larger than it is stored; () where there are none. `dtypes`: under mixed precision, what it is stored as
    and what its gradient is added in.
    """

    layout: Layout
    storage: Storage
    padding: tuple[int, ...] = ()
    dtypes: Dtypes | None = None


def leading_places(dims: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """(dim, position of its outermost atom in the expanded shape), for dims that have one."""
    places, offset = [], 0
    for dim, sizes in enumerate(dims):
        if sizes:
            places.append((dim, offset))
        offset += len(sizes)
    return tuple(places)


def stored_options(
    dims: Sequence[Sequence[int]],
    axis_sizes: Sequence[int],
    shape: Sequence[int] | None = None,
    dtypes: Dtypes | None = None,
) -> tuple[StoredOption, ...]:
    """Ways to store a tensor whose dims consist of atoms of these sizes.

    On each axis it is replicated, split along a dim for computation, or kept in chunks to be gathered for use. Splits
    follow the outermost atom of a dim, so that every rank stores one contiguous box (checkpoints need that). The chunks
    are of dim 0, or of another dim where dim 0 is split unevenly (DTensor has no word for an uneven split that is cut
    again), or has fewer rows than there are ranks (experts: each rank would take the room of a whole one).

    `shape`: of the tensor outside the graph, where that is smaller. Such a dim is split where the even parts of the
    padded dim are the chunks that `torch.chunk` cuts.
    """
    padded = tuple(math.prod(sizes) for sizes in dims)
    shape = tuple(padded if shape is None else shape)
    expanded = expanded_shape(dims)
    places = leading_places(dims)
    state, whole = (-2, -2), (-1, -1)
    choices = [whole, *places, *([state] if places and places[0][0] == 0 else [])]
    options = []
    for picks in product(choices, repeat=len(axis_sizes)):
        split = {
            pick: [s for other, s in zip(picks, axis_sizes, strict=True) if other == pick]
            for pick in set(picks)
            if pick[0] >= 0
        }
        if any(expanded[place] % math.prod(sizes) for (_, place), sizes in split.items()):
            continue
        if any(not _chunks_alike(shape[dim], padded[dim], sizes) for (dim, _), sizes in split.items()):
            continue
        shards = tuple(DimShard(dim) if dim >= 0 else None for dim, _ in picks)
        state_axes = tuple(axis for axis, pick in enumerate(picks) if pick == state)
        storage = Storage(shape, shards, state_axes)
        free = [dim for dim, _ in places if dim and not any(d == dim for d, _ in split)]
        ranks = math.prod(axis_sizes[axis] for axis in state_axes)
        if state_axes and 0 in storage.uneven_dims(axis_sizes):
            if not free:
                continue
            storage = replace(storage, state_dim=max(free, key=lambda dim: shape[dim]))
        elif state_axes and storage.computed_shape(axis_sizes)[0] < ranks:
            even = [dim for dim in free if shape[dim] % ranks == 0]
            storage = replace(storage, state_dim=even[0] if even else 0)
        layout: Layout = tuple(Shard(place) if dim >= 0 else Replicate() for dim, place in picks)
        ways = [1] * len(shape)
        for (dim, _), sizes in split.items():
            ways[dim] = math.prod(sizes)
        computed = storage.computed_shape(axis_sizes)
        padding = tuple(n // parts - held for n, parts, held in zip(padded, ways, computed, strict=True))
        options.append(StoredOption(layout, storage, padding if any(padding) else (), dtypes))
    return tuple(options)


def _chunks_alike(rows: int, padded: int, sizes: Sequence[int]) -> bool:
    """Whether even parts of the padded dim hold of its `rows` what `torch.chunk`, axis by axis, gives each rank."""
    if rows == padded:
        return True
    return cut_evenly(rows, padded // math.prod(sizes), sizes)


def plain_layouts(
    dims: Sequence[Sequence[int]], axis_sizes: Sequence[int], shape: Sequence[int] | None = None
) -> tuple[StoredOption, ...]:
    """Layouts a tensor can be handed to the user in: each axis replicates it or splits a dim."""
    return tuple(option for option in stored_options(dims, axis_sizes, shape) if not option.storage.state_axes)
