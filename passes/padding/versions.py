"""Versions of a tensor in a padded program: which of its dims are larger, and what stands in their added entries.

Ops read one tensor in several sizes: as it was, and padded along some of its dims. `Versions` makes each once, by
cutting and padding what its op gave, and overwrites added entries where a reader needs others than stand there. The
overwritten tensor takes the place of the old one, so that one mask serves all later readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes.analysis.dims import Atom
from passes.padding.harmless import Part
from passes.padding.zones import Zone, join
from passes.program.emit import Emitter

aten = torch.ops.aten


@dataclass
class Version:
    """A tensor with some of its places padded, and what stands there."""

    node: fx.Node
    zones: dict[Part, Zone]
    origin: Origin | None = None


@dataclass
class Origin:
    """What a moved tensor was made of: to overwrite entries there serves the other readers too."""

    tensor: PaddedTensor
    version: Version
    back: Mapping[Part, Part]
    """Places of the moved tensor -> of the other."""
    again: Callable[[fx.Node], fx.Node]
    """The move of another node."""


@dataclass
class PaddedTensor:
    """A tensor of the old program in the new one. `base` is how its op made it; other versions follow from that."""

    atoms: list[list[Atom]]
    base: frozenset[Part]
    meta: Mapping[str, Any]
    fill: Zone | None = None
    """The number that the whole tensor consists of, where it does."""
    by_phase: bool = False
    """A stored tensor: padded for forward, and again for backward."""
    versions: dict[tuple[frozenset[Part], str], Version] = field(default_factory=dict)


class Versions:
    """Makes versions of tensors in the graph that `emit` adds to; `padded_sizes`: id of an atom -> its larger size."""

    def __init__(self, emit: Emitter, padded_sizes: Mapping[int, int]) -> None:
        self.emit = emit
        self.padded_sizes = padded_sizes
        self.masks: dict[tuple[Any, ...], fx.Node] = {}
        self.seen: dict[int, tuple[fx.Node, Part]] = {}
        """Id of an atom -> the first node that has it padded, and where."""

    def put(self, tensor: PaddedTensor, version: Version, places: frozenset[Part], phase: str = "") -> None:
        """Keep a version as the one with these places padded."""
        tensor.versions[places, phase if tensor.by_phase else ""] = version
        for place in places:
            atom = tensor.atoms[place[0]][place[1]]
            if version.node.op == "call_function" and version.node.target is not aten.constant_pad_nd.default:
                self.seen.setdefault(id(atom), (version.node, place))

    def get(self, tensor: PaddedTensor, places: frozenset[Part], phase: str) -> Version:
        """The tensor with exactly these places padded."""
        key = (places, phase if tensor.by_phase else "")
        if key not in tensor.versions:
            at, version = tensor.base, tensor.versions[tensor.base, ""]
            self.emit.meta = {key: tensor.meta.get(key, "") for key in ("module", "source")} | {"phase": phase}
            for place in sorted(at - places):
                at = at - {place}
                zones = {p: z for p, z in version.zones.items() if p != place}
                version = Version(self._resized(tensor, version.node, at | {place}, place, None), zones)
            for place in sorted(places - at):
                fill: Any = tensor.fill if tensor.fill is not None else 0
                zones = _overwritten(version.zones, place, fill)
                resized = self._resized(tensor, version.node, at, place, fill)
                at = at | {place}
                version = Version(resized, zones)
            self.put(tensor, version, places, phase)
        return tensor.versions[key]

    def overwrite(
        self, tensor: PaddedTensor, version: Version, place: Part, fill: float | int, meta: Mapping[str, Any]
    ) -> None:
        """Put `fill` into the added entries; the result takes the version's place.

        Zeros go to where a moved tensor comes from: what else is made of that is zero there too, then.
        """
        emit, (d, part) = self.emit, place
        at = frozenset(version.zones)
        origin = version.origin
        if fill == 0 and origin is not None and place in origin.back and origin.tensor.meta["phase"] == meta["phase"]:
            self.overwrite(origin.tensor, origin.version, origin.back[place], fill, meta)
            emit.meta = meta
            version.node = origin.again(origin.version.node)
            version.zones = _overwritten(version.zones, place, fill)
            return
        lengths = tuple(self.length(atom, (d, j) in at) for j, atom in enumerate(tensor.atoms[d]))
        behind = len(emit.shape(version.node)) - d - 1
        mask = self._mask(lengths, part, tensor.atoms[d][part].size, behind)
        emit.meta = meta
        version.node = emit.call(aten.masked_fill.Scalar, version.node, mask, fill)
        version.zones = _overwritten(version.zones, place, fill)
        version.origin = None  # to move that again would undo this
        self.put(tensor, version, at, str(meta["phase"]))

    def length(self, atom: Atom, padded: bool) -> int:
        """Size of an atom, real or padded."""
        return self.padded_sizes[id(atom)] if padded else atom.size

    def shape(self, dims: Sequence[Sequence[Atom]], at: frozenset[Part]) -> tuple[int, ...]:
        """Shape of a tensor of these dims with the places `at` padded."""
        return tuple(
            math.prod(self.length(atom, (d, j) in at) for j, atom in enumerate(dim)) for d, dim in enumerate(dims)
        )

    def _resized(self, tensor: PaddedTensor, node: fx.Node, at: frozenset[Part], place: Part, fill: Any) -> fx.Node:
        """`node`, whose places `at` are padded, with `place` padded by `fill`, or cut where that is None."""
        emit, (d, part) = self.emit, place
        lengths = [self.length(atom, (d, j) in at) for j, atom in enumerate(tensor.atoms[d])]
        atom = tensor.atoms[d][part]
        shape, before, after = emit.shape(node), math.prod(lengths[:part]), math.prod(lengths[part + 1 :])
        split = (*([before] if before > 1 else []), lengths[part], *([after] if after > 1 else []))
        dim = d + (before > 1)
        x = emit.view(node, (*shape[:d], *split, *shape[d + 1 :]))
        size = self.length(atom, fill is not None)
        if fill is None:
            x = emit.call(aten.slice.Tensor, x, dim, 0, size)
        else:
            behind = len(emit.shape(x)) - dim - 1
            x = emit.call(aten.constant_pad_nd.default, x, [0, 0] * behind + [0, size - atom.size], fill)
        return emit.view(x, (*shape[:d], before * size * after, *shape[d + 1 :]))

    def _mask(self, lengths: tuple[int, ...], part: int, size: int, behind: int) -> fx.Node:
        """True at a dim's entries that were added at its part `part`, to be broadcast against `behind` more dims."""
        key = (lengths, part, size, behind)
        if key not in self.masks:
            emit = self.emit
            emit.meta = {"phase": "forward", "module": "", "source": ""}
            index = emit.call(aten.arange.start, 0, lengths[part], dtype=torch.int64, device=torch.device("cpu"))
            mask = emit.call(aten.ge.Scalar, index, size)
            before, after = math.prod(lengths[:part]), math.prod(lengths[part + 1 :])
            if before * after > 1:
                mask = emit.view(mask, (1, lengths[part], 1))
                mask = emit.call(aten.expand.default, mask, [before, lengths[part], after])
            self.masks[key] = emit.view(mask, (math.prod(lengths), *[1] * behind))
        return self.masks[key]


def _overwritten(zones: Mapping[Part, Zone], place: Part, fill: Zone) -> dict[Part, Zone]:
    """What stands in each place when one is overwritten; entries that lie in two may change in both."""
    return {p: z if z == fill else join([z, fill]) for p, z in zones.items()} | {place: fill}
