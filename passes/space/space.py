"""The search space: every site of a program with the ways it can be laid out over a mesh."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Replicate, Shard, ways
from passes.analysis.analysis import Analysis, OpenSite, Port, Wire, analyse
from passes.analysis.dims import Value
from passes.analysis.layers import Folding
from passes.analysis.strategies import Option, StoredOption, leading_places, op_options, plain_layouts, stored_options
from passes.program.local import DimShard, Storage
from passes.program.program import Program
from passes.space.named import axis_choices, stored_choices
from passes.space.pinned_readers import readers_options
from passes.space.pins import Pin, PinError, pinned_layouts
from passes.space.recompute import Mode, Recomputation, recomputation

__all__ = ["Pin", "Port", "Site", "Space", "Wire", "search_space"]


@dataclass(frozen=True)
class Site(OpenSite):
    """One decision: a site with the ways to lay it out, which are `Option`s of an op, else `StoredOption`s."""

    options: tuple[Option, ...] | tuple[StoredOption, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether it is a parameter that an optimizer updates."""
        return self.parameter is not None and self.parameter.requires_grad

    @property
    def stored_itemsize(self) -> int:
        """Bytes per element at rest."""
        dtypes = self.given.dtypes if self.given is not None else None
        return dtypes.stored.itemsize if dtypes is not None else self.itemsize


@dataclass(frozen=True)
class Space:
    """Everything a plan can choose from under `strategy`; site i is `analysis.places[i]` with its options.

    `recomputed` is what backward computes again, whatever is chosen. `async_tp`: products beside collectives of
    activations go in parts with them (`by_parts`). `fp8`: what backward's products alone read is kept for them in one
    byte.
    """

    analysis: Analysis
    topology: Topology
    batch_axes: tuple[int, ...]
    strategy: str
    sites: tuple[Site, ...]
    recomputed: Recomputation
    async_tp: bool = False
    fp8: bool = False

    @property
    def program(self) -> Program:
        """What is laid out."""
        return self.analysis.program

    @property
    def folding(self) -> Folding:
        """Which nodes share a site."""
        return self.analysis.folding

    @property
    def wires(self) -> tuple[Wire, ...]:
        """Who reads what."""
        return self.analysis.wires

    @property
    def replicated(self) -> tuple[str, ...]:
        """Ops that no rule knows; they run whole on every rank."""
        return self.analysis.replicated

    def shape_of(self, value: Value) -> tuple[int, ...]:
        """Expanded shape of a value."""
        return self.analysis.shape_of(value)

    def itemsize_of(self, value: Value) -> int:
        """Bytes per element of a value, as it is computed with."""
        return self.analysis.itemsize_of(value)


def batch_storage(shape: Sequence[int], batch_dim: int | None, axes: int, batch_axes: Sequence[int]) -> Storage:
    """How a tensor that the user passes is laid out: its batch dim split over the batch axes."""
    shards = tuple(DimShard(batch_dim) if batch_dim is not None and a in batch_axes else None for a in range(axes))
    return Storage(tuple(shape), shards)


def search_space(
    program: Program,
    topology: Topology,
    batch_axes: Sequence[int],
    stored: Mapping[str, Storage] | None = None,
    *,
    strategy: str = "auto",
    pins: Mapping[str, Layout | Pin] | None = None,
    recompute: Mode = "pointwise",
    reshard: bool = True,
    joined: bool = False,
    analysis: Analysis | None = None,
) -> Space:
    """All ways to lay `program` out over `topology` under `strategy`, with what `recompute` computes again.

    `reshard`: as in `Recomputation`. `joined`: all axes that do not split the batch make the same choice at each site,
    as one axis of all their ranks would; so do all that split it.

    `stored`: parameters (by name) that already lie somewhere; only the rest is chosen. `pins`: parameter-name pattern
    (fnmatch) -> layout that compute uses it in, or a `Pin`. `analysis`: `analyse(program)`, if it was made before.

    Raises:
        ValueError: an unknown strategy, a batch that the batch axes do not divide, or a pin that cannot be.
    """
    analysis = analysis or analyse(program)
    pinned = pinned_layouts(analysis, pins or {}, len(topology.axes))
    sizes = topology.sizes
    cache: dict[object, tuple[Option, ...]] = {}
    sites: list[Site] = []
    for index, place in enumerate(analysis.places):
        options: tuple[Option, ...] | tuple[StoredOption, ...]
        if place.kind == "op":
            assert place.op is not None
            choices = axis_choices(analysis, index, strategy, sizes, tuple(batch_axes), joined=joined)
            leaves = tuple((x.size, x.operands, x.results, x.reduce) for x in place.op.leaves)
            key = (place.op.linear, place.op.operands, place.op.results, leaves, choices)
            if key not in cache:
                # Each axis may divide what the strategy wants split, and all of them together not.
                relaxed = tuple((axes, (None, *wanted)) for axes, wanted in choices)
                cache[key] = op_options(place.op, sizes, choices) or op_options(place.op, sizes, relaxed)
            options = cache[key]
        elif place.parameter is not None:
            pin = pinned.get(index)
            options = _parameter_options(place, strategy, sizes, batch_axes, (stored or {}), pin, joined=joined)
        elif place.kind == "returned":
            options = _returned_options(analysis, place, sizes, batch_axes)
        else:
            options = (_given_option(analysis, place, sizes, batch_axes),)
        sites.append(Site(**vars(place), options=options))
    read = readers_options(analysis, topology, tuple(batch_axes), [site.options for site in sites], pinned)
    for index, kept in read.items():
        sites[index] = replace(sites[index], options=kept)
    recomputed = replace(recomputation(analysis, recompute), reshard=reshard)
    return Space(analysis, topology, tuple(batch_axes), strategy, tuple(sites), recomputed)


def _parameter_options(
    place: OpenSite,
    strategy: str,
    sizes: Sequence[int],
    batch_axes: Sequence[int],
    stored: Mapping[str, Storage],
    pin: tuple[str, Pin] | None,
    *,
    joined: bool,
) -> tuple[StoredOption, ...]:
    outside = place.given.shape if place.given is not None else None
    options = stored_options(place.dims, sizes, outside, place.given.dtypes if place.given is not None else None)
    if place.name in stored:
        options = tuple(o for o in options if o.storage == stored[place.name])
        if not options:
            raise PinError(f"{place.name}: stored as {stored[place.name]}, which is no layout of this graph")
        return options
    if pin is None:
        return stored_choices(options, strategy, sizes, batch_axes, joined=joined)
    pattern, fixed = pin
    shards = tuple(DimShard(p.dim) if isinstance(p, Shard) else None for p in fixed.in_compute)
    kept = tuple(option for option in options if option.storage.shards == shards)
    if fixed.at_rest is not None:
        kept = tuple(option for option in kept if _at_rest(option.storage) == fixed.at_rest)
        if not kept and _can_be(place.dims, fixed.in_compute, sizes):  # what compute splits may lie whole, or in chunks
            kept = tuple(
                option
                for option in options
                if _at_rest(option.storage) == fixed.at_rest
                and all(shard in (None, wanted) for shard, wanted in zip(option.storage.shards, shards, strict=True))
            )
    if not kept:
        shape = tuple(map(math.prod, place.dims))
        parts = [f"dim {d} as {' x '.join(map(str, dim))}" for d, dim in enumerate(place.dims) if len(dim) > 1]
        read = f" (the model reads {', '.join(parts)}, and the first is what is split)" if parts else ""
        raise PinError(
            f"pin {pattern!r}: {place.name} of shape {shape}{read} cannot be {fixed} over axes of {tuple(sizes)} "
            "ranks; split a dim that they divide, or give R; at rest, what compute splits is split alike, S(0) or "
            "whole, and what it leaves whole may be S(0)"
        )
    return kept


def _can_be(dims: Sequence[Sequence[int]], layout: Layout, sizes: Sequence[int]) -> bool:
    """Whether a tensor whose dims consist of atoms of these sizes can be computed with so."""
    outermost = {dim: dims[dim][0] for dim, _ in leading_places(dims)}
    split = {p.dim for p in layout if isinstance(p, Shard)}
    return all(dim in outermost and outermost[dim] % ways(layout, sizes, dim) == 0 for dim in split)


def _at_rest(storage: Storage) -> Layout:
    """A stored tensor's placements, an axis at a time: chunks of a state axis are splits too."""
    return tuple(
        Shard(storage.state_dim) if axis in storage.state_axes else Replicate() if shard is None else Shard(shard.dim)
        for axis, shard in enumerate(storage.shards)
    )


def _batch_layout(place: OpenSite, batch_dim: int, sizes: Sequence[int], batch_axes: Sequence[int]) -> StoredOption:
    inside = tuple(map(math.prod, place.dims))
    of = place.given or place.out
    shape = (of.shape if of is not None else None) or inside
    position = sum(len(dim) for dim in place.dims[:batch_dim])
    ways = math.prod(sizes[a] for a in batch_axes)
    atom = place.dims[batch_dim][0] if place.dims[batch_dim] else 1
    if atom % ways and shape[batch_dim] % ways == 0:
        inner = math.prod(place.dims[batch_dim][1:])
        raise ValueError(
            f"{place.name}: dim {batch_dim} has {shape[batch_dim]} entries over all ranks, which the model reads as "
            f"{atom} groups of {inner}, and the {ways} ranks of the batch axes do not divide {atom}; give every rank "
            f"whole groups: {shape[batch_dim] * ways // math.gcd(atom, ways)} entries, or fewer ranks"
        )
    if atom % ways:
        raise ValueError(
            f"{place.name}: dim {batch_dim} has {shape[batch_dim]} entries over all ranks, which the {ways} ranks of "
            "the batch axes do not divide; pass a batch of equal size on every data-parallel rank"
        )
    layout: Layout = tuple(Shard(position) if a in batch_axes and ways > 1 else Replicate() for a in range(len(sizes)))
    return StoredOption(layout, batch_storage(shape, batch_dim, len(sizes), batch_axes), _padding(inside, shape))


def trained(space: Space, assignment: Sequence[int]) -> Iterator[tuple[Site, tuple[int, ...]]]:
    """Parameters that an optimizer updates, and the shape of what a rank stores of each."""
    for site, pick in zip(space.sites, assignment, strict=True):
        if site.is_trained:
            option = site.options[pick]
            assert isinstance(option, StoredOption)
            yield site, option.storage.padded_shape(space.topology.sizes)


def trained_elements(space: Space, assignment: Sequence[int]) -> Counter[int]:
    """Elements that a rank stores of them, by the bytes of each."""
    found: Counter[int] = Counter()
    for site, shape in trained(space, assignment):
        found[site.stored_itemsize] += math.prod(shape) * site.count
    return found


def _padding(inside: Sequence[int], outside: Sequence[int]) -> tuple[int, ...]:
    padding = tuple(n - held for n, held in zip(inside, outside, strict=True))
    return padding if any(padding) else ()


def _given_option(analysis: Analysis, place: OpenSite, sizes: Sequence[int], batch_axes: Sequence[int]) -> StoredOption:
    given = place.given
    inside = tuple(map(math.prod, place.dims))
    shape = (given.shape if given is not None else None) or inside
    whole = StoredOption((Replicate(),) * len(sizes), Storage(shape, (None,) * len(sizes)), _padding(inside, shape))
    if given is None or given.kind not in ("input", "tangent"):
        return whole
    if given.batch_dim is not None:
        return _batch_layout(place, given.batch_dim, sizes, batch_axes)
    if given.kind == "tangent" and not analysis.program.has_loss:
        # Every data-parallel rank brings a term of its own: together they are a sum.
        partial: Layout = tuple(Partial() if a in batch_axes else Replicate() for a in range(len(sizes)))
        return StoredOption(partial, whole.storage)
    return whole


def _returned_options(
    analysis: Analysis, place: OpenSite, sizes: Sequence[int], batch_axes: Sequence[int]
) -> tuple[StoredOption, ...]:
    out = place.out
    assert out is not None
    if out.batch_dim is not None and out.kind == "output" and analysis.program.has_loss:
        return plain_layouts(place.dims, sizes, out.shape)
    if out.batch_dim is not None and place.dims[out.batch_dim]:
        return (_batch_layout(place, out.batch_dim, sizes, batch_axes),)
    inside = tuple(map(math.prod, place.dims))
    shape = out.shape or inside
    whole = Storage(shape, (None,) * len(sizes))
    return (StoredOption((Replicate(),) * len(sizes), whole, _padding(inside, shape)),)
