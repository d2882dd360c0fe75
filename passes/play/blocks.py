"""Where in a step the layers stand that stand for others (`Program.repeated`): once in forward, once in backward.

    forward    ... | copy before | unit | copy behind | ...
    backward   ... | copy behind | unit | copy before | ...

A `Block` is the unit's items in one phase. Played again, it stands for the next copy: what it read of the block before
it, it now reads of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from passes.analysis.moves import Move, Run
from passes.play.tracks import Tracks
from passes.program.program import Repeated


class NotPeriodicError(Exception):
    """Layers that are alike in the graph are not under a plan; it has to be played layer by layer."""


@dataclass(frozen=True, eq=False)
class Block:
    """Items `start` to `end`, played `more` times over in `phase`.

    `back`: slots of the unit -> the same of the block before it, and slots of the block behind it -> the unit's.
    `before` and `behind`: the items of those.
    """

    phase: str
    start: int
    end: int
    more: int
    back: Mapping[int, int]
    before: range
    behind: range

    @property
    def unit(self) -> range:
        """The items that are played again."""
        return range(self.start, self.end)


def blocks(
    tracks: Tracks, repeated: Sequence[Repeated], issue: Sequence[Sequence[int]], fused: frozenset[int]
) -> tuple[Block, ...]:
    """The blocks, in the order they run.

    Raises:
        NotPeriodicError: under this plan the copies do not do the same.
    """
    found = []
    for each in repeated:
        labels = [_label(item, each) for item in tracks.items]
        phases = dict.fromkeys(label[0] for label in labels if label is not None and label[1] >= 0)
        maps: dict[int, int] = {}
        first = range(0)
        for phase in phases:
            before, unit, behind = _ranges(labels, each, phase)
            first = first or before
            own = [_own(tracks, items, each) for items in (before, unit, behind)]
            if own[1] != list(unit):
                raise NotPeriodicError("a layer that stands for others computes again what all share")
            back: dict[int, int] = {}
            for earlier, later in pairwise(own):
                if [len(tracks.writes[i]) for i in earlier] != [len(tracks.writes[j]) for j in later]:
                    raise NotPeriodicError("layers have different numbers of ops and moves")
                for i, j in zip(earlier, later, strict=True):
                    back |= dict(zip(tracks.writes[j], tracks.writes[i], strict=True))
            for earlier, later in pairwise(own):
                _check(tracks, (earlier, later), back, maps, first)
            # what all share, computed in the copy before, may part the moves around it
            other, items = (own[0], before) if len(own[0]) == len(before) else (own[2], behind)
            if _placed(other, items, issue, fused) != _placed(own[1], unit, issue, fused):
                raise NotPeriodicError(f"{each.stack}: layers issue their collectives at different places")
            maps |= back
            found.append(Block(phase, unit.start, unit.stop, each.more, back, before, behind))
    return tuple(sorted(found, key=lambda block: block.start))


def _label(item: Run | Move, repeated: Repeated) -> tuple[str, int] | None:
    """(phase, layer) of an item, -1 outside the layers; None for what runs again, which goes with what comes next."""
    return None if _is_again(item) else (item.phase, _layer(item, repeated))


def _ranges(labels: Sequence[tuple[str, int] | None], repeated: Repeated, phase: str) -> tuple[range, range, range]:
    """Items of the copy played before the unit, of the unit, and of the copy played behind it."""
    below = range(repeated.first - repeated.length, repeated.first)
    cut = repeated.length * (repeated.more + 1)
    above = range(repeated.first + cut, repeated.first + cut + repeated.length)
    first, last = _bounds(labels, phase, below), _bounds(labels, phase, above)
    unit = _bounds(labels, phase, repeated.unit)
    found = (first, unit, last) if phase == "forward" else (last, unit, first)
    if not (found[0].stop == found[1].start and found[1].stop == found[2].start):
        raise NotPeriodicError(f"{repeated.stack}: layers do not run one after another")
    return found


def _bounds(labels: Sequence[tuple[str, int] | None], phase: str, layers: range) -> range:
    """The items of some layers, from behind what is anchored before them."""
    mine = [i for i, label in enumerate(labels) if label is not None and label[0] == phase and label[1] in layers]
    if not mine:
        raise NotPeriodicError("a layer has no ops of its own")
    if any(label is not None and (label[0] != phase or label[1] not in layers) for label in labels[mine[0] : mine[-1]]):
        raise NotPeriodicError("a layer's ops stand among another's")
    start = mine[0]
    while start and labels[start - 1] is None:
        start -= 1
    return range(start, mine[-1] + 1)


def _own(tracks: Tracks, items: range, repeated: Repeated) -> list[int]:
    """The items of a copy without those that compute again what is no layer's of it (rotary positions), right before
    the first that reads it: later copies find it there."""
    layers = {_layer(tracks.items[i], repeated) for i in items if not _is_again(tracks.items[i])}
    return [i for i in items if not _is_again(tracks.items[i]) or _layer(tracks.items[i], repeated) in layers]


def _layer(item: Run | Move, repeated: Repeated) -> int:
    node = item.node if isinstance(item, Run) else item.reader or item.value
    return repeated.layer(node.meta.get("module", ""))


def _is_again(item: Run | Move) -> bool:
    """Whether an item is a forward op that runs again in backward, or a move for one."""
    if isinstance(item, Run):
        return item.again
    reader = item.reader
    return reader is not None and item.phase == "backward" and reader.meta.get("phase", "forward") == "forward"


def _placed(
    own: Sequence[int], items: range, issue: Sequence[Sequence[int]], fused: frozenset[int]
) -> list[tuple[list[int], bool]]:
    """Per own item of a copy, the moves issued before it, as counted from there, and whether it is fused."""
    number = {item: place for place, item in enumerate(own)}
    behind = len(own) - items.stop
    return [([number.get(move, move + behind) for move in issue[item]], item in fused) for item in own]


def _check(
    tracks: Tracks,
    pair: tuple[Sequence[int], Sequence[int]],
    back: Mapping[int, int],
    maps: Mapping[int, int],
    lowest: range,
) -> None:
    """That two copies do the same with what lies alike around them; `lowest`: the first copy's items in forward.

    Raises:
        NotPeriodicError: they do not.
    """
    first, second = pair
    for i, j in zip(first, second, strict=True):
        one, other = tracks.items[i], tracks.items[j]
        alike = type(one) is type(other) and len(tracks.reads[i]) == len(tracks.reads[j])
        if isinstance(one, Run) and isinstance(other, Run):
            alike = alike and (one.site, one.again) == (other.site, other.again)
        elif isinstance(one, Move) and isinstance(other, Move):
            moved = replace(other, value=one.value, reader=one.reader, bucket=one.bucket)
            alike = alike and one == moved and (one.bucket < 0) == (other.bucket < 0)
            if one.bucket >= 0:
                alike = alike and one.bucket - _bucket(tracks, first) == other.bucket - _bucket(tracks, second)
        if not alike:
            raise NotPeriodicError(f"{one} and {other} are not alike")
        for a, b in zip(tracks.reads[i], tracks.reads[j], strict=True):
            made, other_made = tracks.slots[a].producer, tracks.slots[b].producer
            there = made < 0 and other_made < 0  # parameters, say: there all step long
            entering = (made < first[0] and other_made in first) or (made in lowest and other_made < lowest.start)
            if not (a == b or there or entering or back.get(b) == a or maps.get(b) == a or maps.get(a) == b):
                raise NotPeriodicError(f"{one} and {other} do not read alike")


def _bucket(tracks: Tracks, items: Sequence[int]) -> int:
    return next((x.bucket for x in (tracks.items[i] for i in items) if isinstance(x, Move) and x.bucket >= 0), 0)
