"""The search space: every site of a program with the ways it can be laid out over a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Replicate, Shard, layout_text
from passes.analysis import Analysis, Place, Port, SiteKind, Wire, analyse
from passes.dims import ExpandedOp, Value
from passes.layers import Folding
from passes.local import DimShard, Storage
from passes.named import axis_choices, stored_choices
from passes.program import Input, Program
from passes.rules.call import Call
from passes.strategies import Option, StoredOption, op_options, plain_layouts, stored_options

__all__ = ["Port", "Site", "Space", "Wire", "search_space"]


@dataclass(frozen=True)
class Site:
    """One decision.

    `options` are `Option`s of an op, or `StoredOption`s of anything else. `name` is a parameter's or input's name
    pattern, or the op. `count` is how many alike nodes it stands for.
    """

    kind: SiteKind
    name: str
    options: tuple[Option, ...] | tuple[StoredOption, ...]
    count: int
    call: Call | None = None
    op: ExpandedOp | None = None
    phase: str = "forward"
    dims: tuple[tuple[int, ...], ...] = ()
    """Of a stored, given or returned tensor: per dim, the sizes of its atoms."""
    itemsize: int = 4
    given: Input | None = None

    @property
    def stored_itemsize(self) -> int:
        """Bytes per element at rest."""
        dtypes = self.given.dtypes if self.given is not None else None
        return dtypes.stored.itemsize if dtypes is not None else self.itemsize


@dataclass(frozen=True)
class Space:
    """Everything a plan can choose from under `strategy`; site i is `analysis.places[i]` with its options."""

    analysis: Analysis
    topology: Topology
    batch_axes: tuple[int, ...]
    strategy: str
    sites: tuple[Site, ...]

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
    pins: Mapping[str, Layout] | None = None,
    analysis: Analysis | None = None,
) -> Space:
    """All ways to lay `program` out over `topology` under `strategy`.

    `stored`: parameters (by name) that already lie somewhere; only the rest is chosen. `pins`: parameter-name pattern
    (fnmatch) -> layout that compute uses it in. `analysis`: `analyse(program)`, where it is at hand.

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
            choices = axis_choices(analysis, index, strategy, sizes, tuple(batch_axes))
            leaves = tuple((x.size, x.operands, x.results, x.reduce) for x in place.op.leaves)
            key = (place.op.linear, place.op.operands, place.op.results, leaves, choices)
            if key not in cache:
                cache[key] = op_options(place.op, sizes, choices)
            options = cache[key]
        elif place.given is not None and place.given.kind == "parameter":
            options = _parameter_options(place, strategy, sizes, batch_axes, (stored or {}), pinned.get(index))
        elif place.kind == "returned":
            options = _returned_options(analysis, place, sizes, batch_axes)
        else:
            options = (_given_option(analysis, place, sizes, batch_axes),)
        sites.append(
            Site(
                place.kind,
                place.name,
                options,
                place.count,
                place.call,
                place.op,
                place.phase,
                place.dims,
                place.itemsize,
                place.given,
            )
        )
    return Space(analysis, topology, tuple(batch_axes), strategy, tuple(sites))


def pinned_layouts(analysis: Analysis, pins: Mapping[str, Layout], axes: int) -> dict[int, tuple[str, Layout]]:
    """Site -> (pattern, layout) for every parameter that a pin names.

    Raises:
        ValueError: a pin that names nothing, some of the parameters that repeated layers share, or has not one
            placement per axis.
    """
    given = dict(zip(analysis.program.graph.graph.find_nodes(op="placeholder"), analysis.program.inputs, strict=True))
    found: dict[int, tuple[str, Layout]] = {}
    for pattern, layout in pins.items():
        if len(layout) != axes:
            raise ValueError(
                f"pin {pattern!r}: {layout_text(layout)} has {len(layout)} placements, the mesh {axes} axes"
            )
        named = False
        for index, members in enumerate(analysis.folding.members):
            names = [given[node].name for node in members if node in given and given[node].kind == "parameter"]
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                continue
            if len(matching) < len(names):
                other = next(name for name in names if name not in matching)
                raise ValueError(
                    f"pin {pattern!r} names {matching[0]} but not {other}; repeated layers are laid out alike: name "
                    "all of them, as in 'layers.*'"
                )
            named = True
            found[index] = (pattern, layout)
        if not named:
            raise ValueError(f"pin {pattern!r} names no parameter of the model")
    return found


def _parameter_options(
    place: Place,
    strategy: str,
    sizes: Sequence[int],
    batch_axes: Sequence[int],
    stored: Mapping[str, Storage],
    pin: tuple[str, Layout] | None,
) -> tuple[StoredOption, ...]:
    options = stored_options(place.dims, sizes, place.given.dtypes if place.given is not None else None)
    if place.name in stored:
        options = tuple(o for o in options if o.storage == stored[place.name])
        if not options:
            raise ValueError(f"{place.name}: stored as {stored[place.name]}, which is no layout of this graph")
        return options
    if pin is None:
        return stored_choices(options, strategy, batch_axes)
    pattern, layout = pin
    shards = tuple(DimShard(p.dim) if isinstance(p, Shard) else None for p in layout)
    kept = tuple(option for option in options if option.storage.shards == shards)
    if not kept:
        shape = tuple(map(math.prod, place.dims))
        raise ValueError(
            f"pin {pattern!r}: {place.name} of shape {shape} cannot be {layout_text(layout)} over axes of "
            f"{tuple(sizes)} ranks; split a dim that they divide, or give R"
        )
    return kept


def _batch_layout(place: Place, batch_dim: int, sizes: Sequence[int], batch_axes: Sequence[int]) -> StoredOption:
    shape = tuple(map(math.prod, place.dims))
    position = sum(len(dim) for dim in place.dims[:batch_dim])
    ways = math.prod(sizes[a] for a in batch_axes)
    atom = place.dims[batch_dim][0] if place.dims[batch_dim] else 1
    if atom % ways:
        raise ValueError(
            f"{place.name}: dim {batch_dim} has {shape[batch_dim]} entries over all ranks, which the {ways} ranks of "
            "the batch axes do not divide; pass a batch of equal size on every data-parallel rank"
        )
    layout: Layout = tuple(Shard(position) if a in batch_axes and ways > 1 else Replicate() for a in range(len(sizes)))
    return StoredOption(layout, batch_storage(shape, batch_dim, len(sizes), batch_axes))


def _given_option(analysis: Analysis, place: Place, sizes: Sequence[int], batch_axes: Sequence[int]) -> StoredOption:
    given = place.given
    shape = tuple(map(math.prod, place.dims))
    whole = StoredOption((Replicate(),) * len(sizes), Storage(shape, (None,) * len(sizes)))
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
    analysis: Analysis, place: Place, sizes: Sequence[int], batch_axes: Sequence[int]
) -> tuple[StoredOption, ...]:
    out = place.out
    assert out is not None
    if out.batch_dim is not None and place.dims[out.batch_dim]:
        if out.kind == "output" and analysis.program.has_loss:
            return plain_layouts(place.dims, sizes)
        return (_batch_layout(place, out.batch_dim, sizes, batch_axes),)
    shape = tuple(map(math.prod, place.dims))
    return (StoredOption((Replicate(),) * len(sizes), Storage(shape, (None,) * len(sizes))),)
