"""What is done to a tensor between two ops: the steps from the layout that one gives to the layout that another reads.

A *state* is a layout, or a `StoredOption` where more is to be done than to move between layouts: a parameter that is
stored sharded is cast and gathered before it is read, and its gradient is reduced and cast to how it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Replicate, local_shape
from costmodel.reshard import Step, steps
from costmodel.state import cast, state_gather, state_pad, state_scatter
from passes.analysis.dims import Value
from passes.analysis.strategies import Option, StoredOption
from passes.program.precision import Dtypes, dtype_text
from passes.space.space import Space

State = Layout | StoredOption


# --- states -----------------------------------------------------------------------------------------------------------


def given_state(option: Option | StoredOption, result: int) -> State:
    """What a site gives under `option`: a layout, or how a stored tensor lies."""
    if isinstance(option, Option):
        return option.results[result]
    return read_state(option)


def read_state(option: StoredOption) -> State:
    """The layout of a stored tensor for who reads it; the option itself where there is something to be done first."""
    casts = option.dtypes is not None and option.dtypes.stored != option.dtypes.computed
    return option if option.storage.state_axes or option.padding or casts else option.layout


def stored_state(option: StoredOption) -> State:
    """What a gradient is brought to: a layout; the option itself where more is to be done to it."""
    return option if option.storage.state_axes or option.padding or option.dtypes is not None else option.layout


# --- steps from state to state ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """A tensor that changes its layout: its expanded shape, and bytes per element as it is computed with.

    `added`: the dtype it has and the one that its partial sums are added in, where that is another.
    """

    shape: tuple[int, ...]
    itemsize: int
    added: Dtypes | None
    topology: Topology


def moved(space: Space, value: Value) -> Moved:
    """What of a value decides how its layout changes."""
    reduced = space.analysis.added_in.get(value)
    own = space.analysis.dtype_of(value) if reduced is not None else None
    added = Dtypes(own, own, reduced) if own is not None and reduced is not None else None
    return Moved(space.shape_of(value), space.itemsize_of(value), added, space.topology)


def _storage_steps(of: Moved, source: StoredOption, target: Layout) -> tuple[Step, ...] | None:
    """Steps from how a tensor is stored to a reader's layout: it is gathered first.

    Under mixed precision it is cast before, so that a gather moves what is computed with.
    """
    path = steps(of.shape, of.itemsize, source.layout, target, of.topology)
    if path is None:
        return None
    storage, dtypes, topology, first = source.storage, source.dtypes, of.topology, []
    local = storage.computed_shape(topology.sizes)
    if dtypes is not None and dtypes.stored != dtypes.computed:
        elements = math.prod(storage.padded_shape(topology.sizes))
        first.append(_cast(elements, dtypes.stored, dtypes.computed, source.layout, topology))
    if storage.state_axes:
        first.append(state_gather(local, of.itemsize, storage.state_axes, source.layout, topology, storage.state_dim))
    if source.padding:
        larger = tuple(n + zeros for n, zeros in zip(local, source.padding, strict=True))
        first.append(state_pad(larger, of.itemsize, source.layout, topology))
    return (*first, *path)


def _cast(elements: int, given: torch.dtype, made: torch.dtype, layout: Layout, topology: Topology) -> Step:
    return cast(elements, made.itemsize, dtype_text(made), given.itemsize, layout, topology)


def _gradient_steps(of: Moved, given: Layout, target: StoredOption) -> tuple[Step, ...] | None:
    """Steps from a gradient's layout to how its parameter is stored, and in the dtype that it is stored in."""
    storage, sizes = target.storage, of.topology.sizes

    def path(itemsize: int) -> tuple[Step, ...] | None:
        return state_scatter(
            storage.computed_shape(sizes),
            itemsize,
            of.shape,
            given,
            target.layout,
            storage.state_axes,
            of.topology,
            storage.state_dim,
            padded=bool(target.padding),
        )

    if target.dtypes is None:
        return path(of.itemsize)
    elements = math.prod(storage.padded_shape(sizes))
    return _added_in(of, given, path, target.dtypes, elements, target.layout)


def _added_in(
    of: Moved,
    given: Layout,
    path: Callable[[int], tuple[Step, ...] | None],
    dtypes: Dtypes,
    elements: int,
    layout: Layout,
) -> tuple[Step, ...] | None:
    """The steps `path(itemsize)` of a gradient, cast to `dtypes.reduced` before them where they add partial sums, and
    what is left, `elements` in `layout`, to `dtypes.stored`."""
    topology, moves, now = of.topology, [], dtypes.computed
    found = path(now.itemsize)
    if found is None:
        return None
    if now != dtypes.reduced and any(step.op and step.is_collective for step in found):
        whole = tuple(Replicate() if isinstance(p, Partial) else p for p in given)
        before = math.prod(local_shape(of.shape, whole, topology.sizes))
        moves.append(_cast(before, now, dtypes.reduced, given, topology))
        now = dtypes.reduced
        found = path(now.itemsize)
        assert found is not None
    moves += found
    if now != dtypes.stored:
        moves.append(_cast(elements, now, dtypes.stored, layout, topology))
    return tuple(moves)


def conversion(space: Space, value: Value, given: State, asked: State) -> tuple[Step, ...] | None:
    """The steps that bring a value from what its producer gives to what a reader asks for."""
    return steps_between(moved(space, value), given, asked)


def steps_between(of: Moved, given: State, asked: State) -> tuple[Step, ...] | None:
    """As `conversion`; steps over one rank, which move nothing, are none."""
    path = _path(of, given, asked)
    return path if path is None else tuple(step for step in path if step.ranks != 1)


def _path(of: Moved, given: State, asked: State) -> tuple[Step, ...] | None:
    if isinstance(asked, StoredOption):
        return _gradient_steps(of, given.layout if isinstance(given, StoredOption) else given, asked)
    if isinstance(given, StoredOption):
        return _storage_steps(of, given, asked)

    def path(itemsize: int) -> tuple[Step, ...] | None:
        return steps(of.shape, itemsize, given, asked, of.topology)

    if of.added is None:
        return path(of.itemsize)
    whole = tuple(Replicate() if isinstance(p, Partial) else p for p in asked)
    elements = math.prod(local_shape(of.shape, whole, of.topology.sizes))
    return _added_in(of, given, path, of.added, elements, asked)
