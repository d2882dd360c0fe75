"""When each move of a plan is issued: parameters' gathers a layer ahead, activations and gradients as they are made."""

from __future__ import annotations

from typing import NamedTuple

from passes.analysis.moves import Move, Run
from passes.play.tracks import Tracks
from passes.space.words import Words


def issue_points(words: Words, tracks: Tracks) -> list[list[int]]:
    """Per item, the moves to issue right before it (by item), in program order; the last entry is the step's end.

    A bucket is issued as one, where its first gather or its last gradient is, or the last of its sums can be sent. A
    parameter's gather is issued where the layer before it that gathers something begins (what lies between repeated
    layers counts as one layer, and each module where no layer repeats). An activation is sent where its layer's ops
    begin or right after it was made, whichever is later; one that was kept from forward, where its reader's module
    begins. A gradient is sent as soon as it is there.
    """
    items = tracks.items
    issue: list[list[int]] = [[] for _ in range(len(items) + 1)]
    ends = {x.bucket: index for index, x in enumerate(items) if isinstance(x, Move) and x.bucket >= 0}
    begun = _Begun(words)
    packed: list[tuple[int, int]] = []
    """Sums that go together, and where each could be sent."""
    for index, item in enumerate(items):
        begun.enter(index, item)
        if isinstance(item, Run):
            continue
        gathered = tracks.slots[tracks.writes[index][0]].gathered
        if not item.packed and (item.reader is None or (item.bucket >= 0 and not gathered)):
            issue[ends.get(item.bucket, index)].append(index)
            continue
        producer = tracks.slots[tracks.reads[index][0]].producer
        if gathered:
            first = begun.gatherer_before()
        elif producer >= 0 and items[producer].phase == item.phase:
            first = begun.layer.start
        else:
            first = begun.module.start
        packed = packed if item.packed else []
        packed.append((max(first, producer + 1), index))
        if not item.packed or index == ends[item.bucket]:
            issue[max(start for start, _ in packed)] += [move for _, move in packed]
            packed = []
    return issue


class _Here(NamedTuple):
    """A part of the step, and the item that it begins with."""

    part: object
    start: int


class _Begun:
    """The layer, the module and the gatherer (see `issue_points`) that the item in hand lies in."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.layer = self.module = self.gatherer = self.last_gatherer = _Here(None, 0)
        self.before = 0
        """The start of the gatherer before the last one."""

    def enter(self, index: int, item: Run | Move) -> None:
        """Go on to the next item."""
        node = item.node if isinstance(item, Run) else item.reader
        if node is None:
            return
        name, phase = node.meta.get("module", ""), item.phase
        instance = self.words.instance(name)
        outside = self.words.layers and "*" not in self.words.pattern(name)
        self.layer = _at(index, (phase, instance), self.layer)
        self.gatherer = _at(index, (phase, "" if outside else instance), self.gatherer)
        self.module = _at(index, (phase, name), self.module)

    def gatherer_before(self) -> int:
        """The item in hand gathers: where the part that gathered something before this one begins."""
        if self.gatherer.part != self.last_gatherer.part:
            self.before, self.last_gatherer = self.last_gatherer.start, self.gatherer
        return self.before


def _at(index: int, part: object, last: _Here) -> _Here:
    return last if last.part == part else _Here(part, index)
