"""Whether what lies between split products gives the right numbers on a rank's own part, with nothing sent.

The hand-written pattern: weights of some products are split along rows (their results are split), those of a later one
along columns (its result is a sum over ranks), and all ops between run on what the rank has. Shapes alone don't tell
whether that is right: a norm over the split dim runs on any shape, and a parameter between the products gets a gradient
of this rank's part alone. So the split is followed through the rules that plans are made of.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from costmodel.layout import Layout, Replicate, Shard, layout_text
from passes.analysis.analysis import Analysis, OpenSite
from passes.analysis.dims import Value, value_of
from passes.analysis.strategies import op_options, stored_options
from passes.program.local import DimShard
from passes.rules.call import is_tensor, op_text

_WHOLE: Layout = (Replicate(),)


@dataclass(frozen=True)
class Followed:
    """`problem`: what is in the way, "" where nothing is. `shared`: whole parameters that are read together with a
    rank's part, so that each rank's gradient is one term of theirs."""

    problem: str
    shared: frozenset[str] = frozenset()
    split: Mapping[Value, int] = field(default_factory=dict)
    """Ops' results that are split -> the dim."""


def followed(analysis: Analysis, rows: Collection[str], columns: Collection[str], ranks: int) -> Followed:
    """What becomes of values where parameters `rows` are split along dim 0 over `ranks`, and `columns` along dim 1.

    A value that `columns` make a sum over ranks is taken as summed, and whole from there on.
    """
    walk = _Walk(analysis, frozenset(rows), frozenset(columns), ranks)
    try:
        walk.through()
    except _InTheWayError as problem:
        return Followed(str(problem))
    dims = {value: _dim(place.op.results[value.result], layout) for value, layout in walk.split.items()
            if (place := analysis.places[value.op]).op is not None}  # fmt: skip
    return Followed("", frozenset(walk.shared), dims)


class _InTheWayError(Exception):
    """Why a rank's part is not enough."""


class _Walk:
    """From the parameters that are split to all that reads what they make."""

    def __init__(self, analysis: Analysis, rows: frozenset[str], columns: frozenset[str], ranks: int) -> None:
        self.split: dict[Value, Layout] = {}
        self.shared: set[str] = set()
        self._analysis, self._rows, self._columns, self._ranks = analysis, rows, columns, ranks
        self._reads: dict[tuple[int, int], set[Value]] = defaultdict(set)
        self._readers: dict[Value, set[int]] = defaultdict(set)
        for wire in analysis.wires:
            for port in wire.ports:
                if analysis.places[port.site].op is not None and not port.stores:
                    self._reads[port.site, port.operand].add(wire.value)
                    self._readers[wire.value].add(port.site)
        self._parameters = _parameters(analysis)
        self._trained = _trained(analysis, self._reads)
        self._made_of = _made_of(analysis, self._reads, self._parameters)

    def through(self) -> None:
        """Visit every site that reads something split, in program order.

        Raises:
            _InTheWayError: at the first of them that a part is not enough for.
        """
        self._split_parameters()
        todo = sorted({site for value in self.split for site in self._readers[value]})
        done: set[int] = set()
        while todo:
            site = heapq.heappop(todo)
            if site in done:
                continue
            done.add(site)
            for value in self._visit(site):
                for reader in self._readers[value]:
                    heapq.heappush(todo, reader)

    def _split_parameters(self) -> None:
        for site, own in self._parameters.items():
            for wanted, dim in ((self._rows, 0), (self._columns, 1)):
                if own.isdisjoint(wanted):
                    continue
                layout = _stored(self._analysis.places[site], dim, self._ranks)
                if layout is None:
                    raise _InTheWayError(f"{min(own)} cannot be split along dim {dim} over {self._ranks} ranks")
                self.split[Value(site, 0)] = layout

    def _visit(self, site: int) -> list[Value]:
        """Lay out what a site gives, by what it reads; the results that are split."""
        place = self._analysis.places[site]
        assert place.op is not None
        given = [self._reads[site, k] for k in range(len(place.op.operands))]
        laid = [{self.split.get(value, _WHOLE) for value in values} or {_WHOLE} for values in given]
        if any(len(layouts) > 1 for layouts in laid):
            raise _InTheWayError(f"{_op(place)} reads a part in one layer and the whole in another")
        operands = tuple(next(iter(layouts)) for layouts in laid)
        option = next((o for o in op_options(place.op, (self._ranks,)) if o.operands == operands), None)
        if option is None:
            raise _InTheWayError(f"{_op(place)} cannot run on {', '.join(map(layout_text, operands))}")
        own = self._parameters_of(value for values in given for value in values)
        if site not in self._analysis.from_parameters and own.isdisjoint(self._rows | self._columns):
            self._share(place, [values for values, layout in zip(given, operands, strict=True) if layout == _WHOLE])
        made = []
        for r, layout in enumerate(option.results):
            if isinstance(layout[0], Shard):
                self.split[Value(site, r)] = layout
                made.append(Value(site, r))
            elif layout != _WHOLE and own.isdisjoint(self._columns):
                raise _InTheWayError(f"{_op(place)} adds up over what is split")
        return made

    def _share(self, place: OpenSite, whole: Sequence[Collection[Value]]) -> None:
        """Whole operands that are read beside a part: where they have gradients, they have to be parameters."""
        for values in whole:
            if self._trained.isdisjoint(values):
                continue
            parameters = self._parameters_of(values)
            if not parameters:
                raise _InTheWayError(f"{_op(place)} reads a part together with a whole result that has a gradient")
            self.shared |= parameters

    def _parameters_of(self, values: Iterable[Value]) -> frozenset[str]:
        return frozenset[str]().union(*(self._made_of[value] for value in values))


def as_followed(analysis: Analysis, found: Followed, part: fx.Graph, ranks: int) -> bool:
    """Whether a graph of the same model on a rank's part has every value split where it was followed to be.

    A view with an inferred size (`view(b, -1, heads, head_size)`) takes a part's heads for a shorter sequence.
    """
    pairs = zip(analysis.program.graph.graph.nodes, part.nodes, strict=False)
    for whole, own in pairs:
        if whole.op != own.op or (whole.op == "call_function" and whole.target != own.target):
            return False
        if whole.op != "call_function" or not is_tensor(whole) or not is_tensor(own):
            continue
        shape = list(whole.meta["val"].shape)
        dim = found.split.get(value_of(whole, analysis.folding))
        if dim is not None:
            shape[dim] //= ranks
        if shape != list(own.meta["val"].shape):
            return False
    return len(analysis.program.graph.graph.nodes) == len(part.nodes)


def _dim(dims: Sequence[Sequence[int]], layout: Layout) -> int:
    """The dim that a layout on atoms splits."""
    (placement,) = layout
    assert isinstance(placement, Shard)
    return [dim for dim, atoms in enumerate(dims) for _ in atoms][placement.dim]


def _parameters(analysis: Analysis) -> dict[int, frozenset[str]]:
    """Site -> the parameters that it stands for."""
    given = analysis.program.placeholders
    return {
        site: frozenset(given[node].name for node in members)
        for site, members in enumerate(analysis.folding.members)
        if members[0] in given and given[members[0]].kind == "parameter"
    }


def _stored(place: OpenSite, dim: int, ranks: int) -> Layout | None:
    """The layout of a stored tensor that is split along a dim."""
    for option in stored_options(place.dims, (ranks,), place.given.shape if place.given is not None else None):
        if option.storage.shards == (DimShard(dim),):
            return option.layout
    return None


def _trained(analysis: Analysis, reads: Mapping[tuple[int, int], set[Value]]) -> set[Value]:
    """Values that a gradient may flow through: parameters, and what is computed from them."""
    found: set[Value] = set()
    for site, place in enumerate(analysis.places[: len(analysis.folding.members)]):
        if place.given is not None and place.given.kind == "parameter":
            found.add(Value(site, 0))
        elif place.op is not None and place.call is not None:
            reads_some = any(value in found for k in range(len(place.op.operands)) for value in reads[site, k])
            floating = [facts is not None and facts.dtype.is_floating_point for facts in place.call.results]
            found |= {Value(site, r) for r, is_float in enumerate(floating) if reads_some and is_float}
    return found


def _made_of(
    analysis: Analysis, reads: Mapping[tuple[int, int], set[Value]], names: Mapping[int, frozenset[str]]
) -> dict[Value, frozenset[str]]:
    """The parameters that a value is computed from, where it is from parameters alone."""
    found: dict[Value, frozenset[str]] = defaultdict(frozenset)
    for site, place in enumerate(analysis.places[: len(analysis.folding.members)]):
        if site in names:
            found[Value(site, 0)] = names[site]
        elif place.op is not None and site in analysis.from_parameters:
            read = (value for k in range(len(place.op.operands)) for value in reads[site, k])
            all_of = frozenset[str]().union(*(found[value] for value in read))
            for r in range(len(place.op.results)):
                found[Value(site, r)] = all_of
    return found


def _op(place: OpenSite) -> str:
    assert place.call is not None
    return op_text(place.call.target)
