"""The operands of an op that runs padded: the versions of them that it reads, overwritten where it needs that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from passes.padding.harmless import Key, Need, Reading, looked_up, needs_of
from passes.padding.versions import PaddedTensor, Version, Versions
from passes.padding.zones import Zone, is_edge, is_finite, is_number, is_zero
from passes.program.emit import meta_of

aten = torch.ops.aten


class PaddedOperands:
    """What an op reads of `tensors`, its operands: `read` has a version of each."""

    def __init__(self, reading: Reading, tensors: Sequence[PaddedTensor], versions: Versions) -> None:
        self.reading = reading
        self.tensors = tensors
        self.versions = versions
        phase = reading.node.meta.get("phase", "forward")
        self.read: list[Version] = [
            versions.get(tensor, reading.padded(positions), phase)
            for tensor, positions in zip(tensors, reading.at_operands, strict=True)
        ]

    def zones(self, key: Key) -> list[Zone]:
        """What stands in each operand's added entries along `key`, as `result_zone` takes it."""
        zones: list[Zone] = []
        for tensor, version, positions in zip(self.tensors, self.read, self.reading.at_operands, strict=True):
            beside: Zone = "finite" if "nowhere" in version.zones.values() else "real"
            whole = beside if tensor.fill is None else tensor.fill
            zones.append(version.zones[positions[key]] if key in positions else whole)
        return zones

    def meet_needs(self) -> None:
        """Overwrite added entries where the op needs others than stand there."""
        needs = needs_of(self.reading)
        for key in self.reading.keys:
            for need in needs[key] or ():
                self._meet(key, need)
        self._turn_away()

    def _meet(self, key: Key, need: Need) -> None:
        zones = self.zones(key)
        zone = zones[need.operand]
        if (
            (need.what == "zero" and not is_zero(zone))
            or (need.what in ("finite", "summable") and not is_finite(zone))
            or (need.what == "summable" and is_edge(zone))
        ):
            self._overwrite(need.operand, key, 0)
        elif need.what == "lowest":
            dtype = self.reading.call.operands[need.operand].dtype
            lowest = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
            if not is_number(zone) or zone != lowest:
                self._overwrite(need.operand, key, lowest)
        elif need.what == "product":
            pair = (need.operand, need.other)
            for k in pair:
                if not is_finite(zones[k]):
                    self._overwrite(k, key, 0)
            if not any(map(is_zero, self.zones(key))):
                self._overwrite(max(pair, key=self._is_cheap_to_mask), key, 0)

    def _is_cheap_to_mask(self, operand: int) -> tuple[bool, int]:
        """The larger, the better: a tensor of backward, which nothing keeps, and a small one."""
        size = math.prod(self.read[operand].node.meta["val"].shape)
        return self.tensors[operand].meta.get("phase", "forward") == "backward", -size

    def _overwrite(self, operand: int, key: Key, fill: float | int) -> None:
        place = self.reading.at_operands[operand].get(key)
        if place is not None:
            meta = meta_of(self.reading.node)
            self.versions.overwrite(self.tensors[operand], self.read[operand], place, fill, meta)

    def _turn_away(self) -> None:
        """Indices that name added rows go behind all rows: they are no row's, and a look-up is to find none there."""
        dim = looked_up(self.reading)
        if dim is None or all(d != dim for d, _ in self.read[0].zones):
            return
        emit, (source, index) = self.versions.emit, self.read
        emit.meta = meta_of(self.reading.node)
        added = emit.call(aten.ge.Scalar, index.node, self.reading.call.operands[0].shape[dim])
        behind = emit.call(aten.masked_fill.Scalar, index.node, added, emit.shape(source.node)[dim])
        self.read[1] = Version(behind, index.zones)
