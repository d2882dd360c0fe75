"""The plans people make by hand, as restrictions of the search space: ddp, fsdp, megatron.

Each keeps, of every site's options, those that the hand-made plan allows; what is still open (where a norm's partial
sums are reduced, whether Megatron's activations are split along the sequence) is left to the solver. A site at which
nothing would be left keeps all its options: no plan by hand can do better there either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from costmodel.layout import Replicate
from passes.rules.matmul import PRODUCTS
from passes.space import Site, Space
from passes.strategies import Option, StoredOption

STRATEGIES = ("auto", "ddp", "fsdp", "megatron")

Choices = tuple[tuple[int, ...], ...]
"""Per site, the indices of the options that are allowed."""


def allowed(space: Space, strategy: str) -> Choices:
    """The options of each site that `strategy` leaves open.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known are {', '.join(STRATEGIES)}")
    return tuple(_allowed_at(space, index, strategy) for index in range(len(space.sites)))


def _allowed_at(space: Space, index: int, strategy: str) -> tuple[int, ...]:
    site = space.sites[index]
    everything = tuple(range(len(site.options)))
    if strategy == "auto":
        return everything
    tests: dict[str, Callable[[int], bool]] = {
        "ddp": lambda i: _data_parallel(space, index, i, stored="whole"),
        "fsdp": lambda i: _data_parallel(space, index, i, stored="state"),
        "megatron": lambda i: _megatron(space, index, i),
    }
    kept = tuple(i for i in everything if tests[strategy](i))
    return kept or everything


def _split_atoms(site: Site, option: Option) -> tuple[int | None, ...]:
    assert site.op is not None
    return tuple(None if leaf is None else site.op.leaves[leaf].atom for leaf in option.splits)


def _data_leaf(space: Space, site: Site, axes: Sequence[int]) -> tuple[int | None, ...]:
    """Per axis of `axes`, the data dim it should split at this op: the batch while it divides, then the sequence."""
    assert site.op is not None
    wanted: list[int | None] = []
    used: dict[int, int] = {}
    for axis in axes:
        choice = None
        for atoms in (space.batch_atoms, space.sequence_atoms):
            for leaf in site.op.leaves:
                parts = used.get(leaf.atom, 1) * space.topology.sizes[axis]
                if choice is None and leaf.atom in atoms and leaf.size % parts == 0:
                    choice = leaf.atom
                    used[leaf.atom] = parts
        wanted.append(choice)
    return tuple(wanted)


def _data_parallel(space: Space, index: int, i: int, stored: str) -> bool:
    """Weights are whole in compute; every axis splits the batch, or the sequence where the batch does not divide."""
    site = space.sites[index]
    option = site.options[i]
    if isinstance(option, StoredOption):
        if site.given is None or site.given.kind != "parameter":
            return True
        shards = all(shard is None for shard in option.storage.shards)
        every = len(option.storage.state_axes) == len(space.topology.axes)
        none = not option.storage.state_axes
        return shards and (none if stored == "whole" else every)
    if index in space.from_parameters:
        return _whole(option)
    return index not in space.from_data or _follows_data(space, site, option, range(len(space.topology.axes)))


def _whole(option: Option) -> bool:
    return all(p == Replicate() for layout in (*option.operands, *option.results) for p in layout)


def _follows_data(space: Space, site: Site, option: Option, axes: Sequence[int]) -> bool:
    atoms = _split_atoms(site, option)
    wanted = _data_leaf(space, site, list(axes))
    return all(want is None or atoms[axis] == want for axis, want in zip(axes, wanted, strict=True))


def _megatron(space: Space, index: int, i: int) -> bool:
    """State over the batch axes, which split the batch; on the others every matrix product splits a weight's dim."""
    site = space.sites[index]
    option = site.options[i]
    data = space.batch_axes
    tensor = [axis for axis in range(len(space.topology.axes)) if axis not in data]
    if isinstance(option, StoredOption):
        if site.given is None or site.given.kind != "parameter":
            return True
        rows = option.storage.shape[0] if option.storage.shape else 1
        if not all(option.storage.shards[axis] is None for axis in data):
            return False
        wanted = tuple(data) if rows > 1 else ()
        return tuple(a for a in option.storage.state_axes if a in data) == wanted
    if index in space.from_parameters:
        return all(layout[axis] == Replicate() for axis in data for layout in (*option.operands, *option.results))
    if index not in space.from_data:
        return True
    if not _follows_data(space, site, option, data):
        return False
    assert site.call is not None
    assert site.op is not None
    atoms = _split_atoms(site, option)
    if site.call.target in PRODUCTS:
        data_atoms = space.batch_atoms | space.sequence_atoms
        return all(atoms[axis] is not None and atoms[axis] not in data_atoms for axis in tensor)
    classes = {leaf.atom for leaf in site.op.leaves if leaf.atom in space.class_atoms}
    return not classes or all(atoms[axis] in classes for axis in tensor)  # logits are never gathered


def ways(space: Space) -> int:
    """How many ranks the batch axes have together."""
    return math.prod(space.topology.sizes[axis] for axis in space.batch_axes)
