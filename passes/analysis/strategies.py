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
from passes.analysis.dims import ExpandedOp, expanded_shape
from passes.program.local import DimShard, Storage
from passes.program.precision import Dtypes


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
    """All choices at `op` for axes with `parts` ranks together."""
    leaves = len(op.leaves)
    splits = (i for i, leaf in enumerate(op.leaves) if leaf.size % parts == 0)
    return (None, *splits, *range(leaves, leaves + len(op.linear)))


def op_options(
    op: ExpandedOp,
    axis_sizes: Sequence[int],
    groups: Sequence[tuple[tuple[int, ...], tuple[Choice, ...]]] | None = None,
) -> tuple[Option, ...]:
    """The ways to lay `op` out.

    `groups`: axes that make one choice together, with the choices they have (default: each axis alone, with all there
    are).
    """
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
    """A way to store a parameter: the layout that compute starts from (`layout`, on expanded dims), and its `Storage`.

    `padding`: zeros appended to each dim of a rank's part before compute, where the program has the parameter larger
    than it is stored; () for none. `dtypes`: under mixed precision, the dtype at rest and that in which its gradient is
    added.
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
    tensor = _Stored(tuple(padded if shape is None else shape), padded, expanded_shape(dims), tuple(axis_sizes), dtypes)
    places = leading_places(dims)
    choices = [_WHOLE, *places, *([_STATE] if places and places[0][0] == 0 else [])]
    others = [dim for dim, _ in places if dim]
    found = (tensor.option(picks, others) for picks in product(choices, repeat=len(axis_sizes)))
    return tuple(option for option in found if option is not None)


_Pick = tuple[int, int]
"""What an axis does with a stored tensor: splits a dim, whose outermost atom has that place in the expanded shape."""
_WHOLE: _Pick = (-1, -1)
_STATE: _Pick = (-2, -2)


@dataclass(frozen=True)
class _Stored:
    """A tensor to be stored: its shape outside the graph, padded, and expanded."""

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    expanded: tuple[int, ...]
    axis_sizes: tuple[int, ...]
    dtypes: Dtypes | None

    def option(self, picks: Sequence[_Pick], others: Sequence[int]) -> StoredOption | None:
        """The way to store it in which each axis does what was picked for it, if there is one; `others`: dims but the
        first that chunks may be of."""
        split = {
            pick: [size for other, size in zip(picks, self.axis_sizes, strict=True) if other == pick]
            for pick in picks
            if pick not in (_WHOLE, _STATE)
        }
        ways = {dim: math.prod(sizes) for (dim, _), sizes in split.items()}
        if any(self.expanded[place] % ways[dim] for dim, place in split):
            return None
        if not all(_chunks_alike(self.shape[dim], self.padded[dim], sizes) for (dim, _), sizes in split.items()):
            return None
        shards = tuple(DimShard(pick[0]) if pick in split else None for pick in picks)
        state_axes = tuple(axis for axis, pick in enumerate(picks) if pick == _STATE)
        storage = self._in_chunks(Storage(self.shape, shards, state_axes), [dim for dim in others if dim not in ways])
        if storage is None:
            return None
        layout: Layout = tuple(Shard(pick[1]) if pick in split else Replicate() for pick in picks)
        held = storage.computed_shape(self.axis_sizes)
        padding = tuple(n // ways.get(dim, 1) - held[dim] for dim, n in enumerate(self.padded))
        return StoredOption(layout, storage, padding if any(padding) else (), self.dtypes)

    def _in_chunks(self, storage: Storage, free: Sequence[int]) -> Storage | None:
        """`storage` in chunks of a dim that can be cut so, `free` ones beside the first; None where there is none."""
        if not storage.state_axes:
            return storage
        if 0 in storage.uneven_dims(self.axis_sizes):
            return replace(storage, state_dim=max(free, key=lambda dim: self.shape[dim])) if free else None
        ranks = math.prod(self.axis_sizes[axis] for axis in storage.state_axes)
        if storage.computed_shape(self.axis_sizes)[0] >= ranks:
            return storage
        return replace(storage, state_dim=next((dim for dim in free if self.shape[dim] % ranks == 0), 0))


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
