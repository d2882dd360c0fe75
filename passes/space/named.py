"""What a strategy leaves open: ddp, fsdp and megatron as restrictions of the search, auto as the search itself.

A named strategy fixes what the hand-made plan fixes; what is still open (where a norm's partial sums are reduced,
whether Megatron's activations are split along the sequence) is left to the solver. Where an op has nothing of what the
strategy wants, all its choices stay: no plan by hand can do better there either.

Under every strategy the batch axes split the batch: an op that has the batch among its dims splits it there, with
weights whole. (That is what makes an axis a batch axis; how parameters are stored on it is open.) `auto` leaves all
else open, but that an axis splits, of a weight's dim that consists of several atoms (heads, head size), the outermost
it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from passes.analysis.analysis import Analysis, OpenSite
from passes.analysis.dims import Leaf
from passes.analysis.strategies import Choice, StoredOption, every_choice
from passes.rules.index import EMBEDDINGS
from passes.rules.matmul import PRODUCTS
from passes.rules.work import VIEWS

STRATEGIES = ("auto", "ddp", "fsdp", "megatron")


def check_strategy(strategy: str) -> None:
    """Refuse an unknown strategy with a `ValueError`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known are {', '.join(STRATEGIES)}")


def tensor_axes(sizes: Sequence[int], batch_axes: Sequence[int]) -> tuple[int, ...]:
    """The axes that split anything but the batch, among several ranks."""
    return tuple(axis for axis, size in enumerate(sizes) if axis not in batch_axes and size > 1)


def alike_axes(sizes: Sequence[int], batch_axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that could be one axis of all their ranks: those that split the batch, and those that do not."""
    return tuple(axis for axis in batch_axes if sizes[axis] > 1), tensor_axes(sizes, batch_axes)


def axis_choices(
    analysis: Analysis,
    index: int,
    strategy: str,
    sizes: Sequence[int],
    batch_axes: tuple[int, ...],
    *,
    joined: bool = False,
) -> tuple[tuple[tuple[int, ...], tuple[Choice, ...]], ...]:
    """Groups of mesh axes, and what each may choose at op site `index`: None (nothing), a leaf, or a linear group.

    `joined`: axes that are alike (`alike_axes`) choose together, as one axis of all their ranks.
    """
    check_strategy(strategy)
    place = analysis.places[index]
    assert place.op is not None
    rest: list[tuple[int, ...]] = [(axis,) for axis in range(len(sizes)) if axis not in batch_axes]
    if joined:
        together = tensor_axes(sizes, batch_axes)
        rest = [*([together] if together else []), *(axes for axes in rest if axes[0] not in together)]
    groups = ([batch_axes] if batch_axes else []) + rest
    used: dict[int, int] = {}
    found = []
    for group in groups:
        parts = math.prod(sizes[axis] for axis in group)
        # one rank: to split is to do nothing, and what was moved by it would be kept for backward
        alone = parts == 1 and group != batch_axes
        everything = (None,) if alone else _open_choices(analysis, place, parts)
        fixed = _fixed(analysis, index, strategy, group == batch_axes, parts, used, everything)
        kept = tuple(choice for choice in everything if fixed is None or choice in fixed)
        found.append((group, kept or everything))
    return tuple(found)


def _open_choices(analysis: Analysis, place: OpenSite, parts: int) -> tuple[Choice, ...]:
    """All choices but splits of a weight's inner atoms where an outer one of the same dim can be split."""
    assert place.op is not None
    skipped: set[int] = set()
    for atoms in analysis.weight_dims:
        free = [atom for atom, size in atoms if size % parts == 0 and atom not in analysis.blocked_atoms]
        if free:
            skipped |= {atom for atom, _ in atoms if atom != free[0]}
    skipped -= analysis.batch_atoms | analysis.sequence_atoms
    return tuple(
        choice
        for choice in every_choice(place.op, parts)
        if choice is None or choice >= len(place.op.leaves) or place.op.leaves[choice].atom not in skipped
    )


def _fixed(
    analysis: Analysis,
    index: int,
    strategy: str,
    data: bool,
    parts: int,
    used: dict[int, int],
    everything: Sequence[Choice],
) -> set[Choice] | None:
    """The choices that a named strategy wants of a group of axes; None where it wants nothing in particular."""
    place = analysis.places[index]
    free = not data and strategy in ("auto", "megatron")
    if index in analysis.from_parameters:
        return None if free else {None}
    if index not in analysis.from_data:
        return None
    if free:
        return None if strategy == "auto" else _tensor_parallel(analysis, place, parts, used, everything)
    return _data_parallel(analysis, place, parts, used)


def _data_parallel(analysis: Analysis, place: OpenSite, parts: int, used: dict[int, int]) -> set[Choice] | None:
    """The batch while it divides, then the sequence; what is summed over the batch (a position's gradient) may stay a
    partial sum."""
    assert place.op is not None
    if analysis.batch_atoms and not any(leaf.atom in analysis.batch_atoms for leaf in place.op.leaves):
        return None
    for atoms in (analysis.batch_atoms, analysis.sequence_atoms):
        for i, leaf in enumerate(place.op.leaves):
            if leaf.atom in atoms and _divides(leaf, parts, used):
                used[leaf.atom] = used.get(leaf.atom, 1) * parts
                return {i}
    return None


def _divides(leaf: Leaf, parts: int, used: Mapping[int, int]) -> bool:
    """Whether so many parts can be cut of what other axes left of the dim."""
    return leaf.size % (used.get(leaf.atom, 1) * parts) == 0


def _tensor_parallel(
    analysis: Analysis, place: OpenSite, parts: int, used: dict[int, int], choices: Sequence[Choice]
) -> set[Choice] | None:
    """Matrix products split a dim of a weight, embeddings their vocabulary, and logits stay split by class.

    Everything else that is as large as an activation is split too, along the sequence where nothing else is given,
    unless the batch axes have split that (of what has no batch: a bias's gradient) and leave too little.
    """
    assert place.op is not None
    assert place.call is not None
    leaves = place.op.leaves
    if place.call.target in PRODUCTS:
        data = analysis.batch_atoms | analysis.sequence_atoms
        return {i for i, leaf in enumerate(leaves) if leaf.atom not in data}
    if place.call.target in EMBEDDINGS:
        return {
            i for i, leaf in enumerate(leaves) if (leaf.results[0] is None) != all(o is None for o in leaf.operands)
        }
    classes: set[Choice] = {i for i, leaf in enumerate(leaves) if leaf.atom in analysis.class_atoms}
    if classes:
        return classes
    atoms = {atom for dims in place.op.result_atoms for dim in dims for atom in dim}
    sequence = any(
        leaves[c].atom in analysis.sequence_atoms and _divides(leaves[c], parts, used)
        for c in choices
        if c is not None and c < len(leaves)
    )
    if sequence and place.call.target not in VIEWS and atoms & analysis.contracted_atoms:
        return set(choices) - {None}
    return None


def stored_choices(
    options: tuple[StoredOption, ...],
    strategy: str,
    sizes: Sequence[int],
    batch_axes: Sequence[int],
    *,
    joined: bool = False,
) -> tuple[StoredOption, ...]:
    """The ways to store a parameter that a strategy leaves open; `joined` as in `axis_choices`."""
    check_strategy(strategy)
    together = alike_axes(sizes, batch_axes) if joined else ()
    alone = [axis for axis, size in enumerate(sizes) if size == 1 and axis not in batch_axes]

    def fits(option: StoredOption) -> bool:
        storage = option.storage
        rows = storage.shape[0] if storage.shape else 1
        if strategy == "ddp":
            return not storage.state_axes and not any(storage.shards)
        if strategy == "fsdp":
            every = len(storage.state_axes) == len(storage.shards)
            return not any(storage.shards) and (every or rows == 1)
        if any(storage.shards[axis] for axis in batch_axes):
            return False
        if any(storage.shards[axis] or axis in storage.state_axes for axis in alone):
            return False  # one rank: to split is to do nothing
        if any(len({(storage.shards[axis], axis in storage.state_axes) for axis in axes}) > 1 for axes in together):
            return False
        if strategy == "megatron":
            wanted = tuple(batch_axes) if rows > 1 else ()
            return tuple(axis for axis in storage.state_axes if axis in batch_axes) == wanted
        return True

    return tuple(option for option in options if fits(option)) or options
