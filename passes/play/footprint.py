"""What a step holds in memory on one rank: every tensor with its birth and death in seconds, and the peak.

    at rest       parameters, buffers and optimizer states, all step long
    gradients     from where backward reduces them to the end of the step
    gathered      stored parameters brought whole, from their gather to their last reader of the phase
    activations   forward values that backward reads; with fp8 products, what these alone read, in one byte from its
                  last reader in forward on
    working       anything else, from the op that makes it to its last reader
    communication copies that collectives need

Not everything that the graph names is a tensor in memory. A view names another's buffer. In a compiled step a pointwise
result that only pointwise ops and reductions of its own phase read is fused into them. What is computed again in
backward is an op of the schedule like any other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from costmodel.memory import ALLOCATION_BYTES, AtRest, Buffer, OptimizerSpec, at_rest, peak, timeline
from costmodel.reshard import Step
from passes.analysis.dims import Value
from passes.analysis.fusion import Fused
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption
from passes.play.blocks import Block
from passes.play.clocks import KINDS
from passes.play.tracks import Fusing, Slot, Tracks, kept_bytes
from passes.space.space import Space
from passes.space.words import Words

_MOST_SOURCES = 4
"""A fused chain that reads more buffers than this is cut where several read it: its result is written out."""


@dataclass(frozen=True, slots=True)
class TopTensor:
    """`count` alike tensors alive at the peak; bytes of all."""

    name: str
    kind: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Footprint:
    """The moment when most is alive, and bytes alive over time."""

    bytes: int
    moment_s: float
    by_kind: dict[str, int]
    top: tuple[TopTensor, ...]
    timeline: tuple[tuple[float, int], ...]
    buffers: tuple[Buffer, ...] = ()
    """Every tensor with its birth and death, where they were asked for."""
    bare: tuple[tuple[float, int], ...] = ()
    """Bytes alive over time but for parameters' gradients, where buffers were asked for."""


@dataclass(frozen=True)
class Times:
    """When things happen: start of each op (by item), and (step, start, end) of a move's steps (by item)."""

    op_start_s: Sequence[float]
    steps: dict[int, list[tuple[Step, float, float]]]
    forward_end_s: float
    end_s: float
    runs: Mapping[Block, Sequence[float]] = field(default_factory=dict)
    """When each run through layers that stand for others began."""


def footprint(
    space: Space,
    assignment: Sequence[int],
    tracks: Tracks,
    times: Times,
    words: Words,
    spec: OptimizerSpec,
    *,
    accumulate: int = 1,
    fused: Fused = True,
    keep_buffers: bool = False,
) -> Footprint:
    """Memory of one rank while a step runs at `times`; `fused`: what is compiled, so that its pointwise chains write
    their ends alone."""
    buffers = _at_rest(space, assignment, words, spec, accumulate, times.end_s)
    buffers += _Lives(space, tracks, times, words, fused).buffers()
    granularity = 1 if space.topology.device.is_cpu else ALLOCATION_BYTES
    top = peak(buffers, top=len(buffers), granularity_bytes=granularity)
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for buffer in top.top:
        sizes[buffer.name, buffer.kind] += buffer.taken()
        counts[buffer.name, buffer.kind] += buffer.copies
    largest = sorted(sizes, key=lambda group: -sizes[group])
    return Footprint(
        top.bytes,
        top.moment,
        dict(sorted(top.by_kind.items(), key=lambda item: -item[1])),
        tuple(TopTensor(*group, sizes[group], counts[group]) for group in largest[:12]),
        top.timeline,
        tuple(buffers) if keep_buffers else (),
        tuple(timeline((b for b in buffers if b.kind != "gradients"), granularity)) if keep_buffers else (),
    )


def _at_rest(
    space: Space, assignment: Sequence[int], words: Words, spec: OptimizerSpec, accumulate: int, end_s: float
) -> list[Buffer]:
    """What is there all step long, and what the update needs beside it."""
    buffers: list[Buffer] = []
    scratch = 0
    for index, site in enumerate(space.sites):
        if site.kind not in ("stored", "given"):
            continue
        option = site.options[assignment[index]]
        assert isinstance(option, StoredOption)
        shape = option.storage.padded_shape(space.topology.sizes)
        trainable = site.is_trained
        kept: AtRest = at_rest(shape, spec, item_bytes=site.stored_itemsize, trainable=trainable)
        kind = "inputs"
        if site.given is not None and site.given.kind in ("parameter", "buffer"):
            kind = f"{site.given.kind}s"
        name = words.pattern(site.name)
        buffers.append(Buffer(name, kept.parameters, 0.0, None, kind, site.count))
        if kept.optimizer + kept.master:
            buffers.append(Buffer(name, kept.optimizer + kept.master, 0.0, None, "optimizer", site.count))
        if accumulate > 1 and trainable:
            buffers.append(Buffer(name, kept.gradients, 0.0, None, "gradients", site.count))
        if trainable:
            scratch += kept.optimizer // 2 * site.count
    if scratch and spec.name.startswith("adam") and not space.topology.device.is_cpu:
        # torch's multi-tensor update on GPUs takes the roots of one of the two states, of all parameters at once.
        buffers.append(Buffer("temporaries of the update", scratch, end_s, None, "working"))
    return buffers


@dataclass(frozen=True, slots=True)
class _Read:
    """When a buffer is read, by which item."""

    at_s: float
    item: int


_NEVER = _Read(-1.0, -1)


class _Lives:
    """Births and deaths of what comes and goes."""

    def __init__(self, space: Space, tracks: Tracks, times: Times, words: Words, fused: Fused) -> None:
        self.space = space
        self.tracks = tracks
        self.times = times
        self.words = words
        self.fused = fused
        self.written = self._written()
        self.readers = self._readers()
        self.bases: list[tuple[int, ...]] = []
        """Of each slot, the buffers that reading it reads."""
        for index in range(len(tracks.slots)):
            self.bases.append(self._bases_of(index))
        self.last, self.last_in_forward = self._last_reads()
        leaving = [(base, phase, stores) for slot, phase, stores in tracks.leaving for base in self.bases[slot]]
        self.returned = {base for base, phase, _ in leaving if phase == "forward"}
        """Buffers that are there to the end of forward at least."""
        self.stay = {base for base, phase, _ in leaving if phase != "forward"}
        """Buffers that are there to the end of the step."""
        self.gradients = {base for base, _, stores in leaving if stores}
        self.names: dict[tuple[Value, bool], str] = {}

    def _fusing(self, slot: int) -> Fusing | None:
        """How the op that makes a slot treats memory; None for what is there or moved."""
        producer = self.tracks.slots[slot].producer
        made = producer >= 0 and isinstance(self.tracks.items[producer], Run)
        return self.tracks.treats(producer, self.fused) if made else None

    def _written(self) -> list[bool]:
        """Whether a slot is a buffer of its own in memory, leaving aside that views name another's."""
        tracks = self.tracks
        if self.fused is False:
            return [True] * len(tracks.slots)
        needed = [False] * len(tracks.slots)
        for slot, _, _ in tracks.leaving:
            needed[slot] = True
        for index in range(len(tracks.items) - 1, -1, -1):
            fusing = tracks.treats(index, self.fused)
            through = any(needed[slot] for slot in tracks.writes[index]) if fusing == "view" else fusing == "kernel"
            for slot in tracks.reads[index]:
                if through or self._crosses(slot, index):
                    needed[slot] = True
        return [need or self._fusing(slot) != "pointwise" for slot, need in enumerate(needed)]

    def _readers(self) -> list[int]:
        """How many ops and moves read a slot, itself or as a view."""
        found = [0] * len(self.tracks.slots)
        for index in range(len(self.tracks.items) - 1, -1, -1):
            viewed = self.tracks.treats(index, self.fused) == "view"
            count = sum(found[slot] for slot in self.tracks.writes[index]) if viewed else 1
            for slot in set(self.tracks.reads[index]):
                found[slot] += count
        return found

    def _crosses(self, slot: int, reader: int) -> bool:
        """Whether a slot is kept from forward for a backward reader."""
        items, producer = self.tracks.items, self.tracks.slots[slot].producer
        return producer >= 0 and items[producer].phase == "forward" and items[reader].phase == "backward"

    def _bases_of(self, index: int) -> tuple[int, ...]:
        slot = self.tracks.slots[index]
        if slot.producer < 0:
            return (index,)
        producer = self.tracks.items[slot.producer]
        operands = self.tracks.reads[slot.producer]
        if isinstance(producer, Move):
            return (index,) if producer.steps else self.bases[operands[0]]
        if self._fusing(index) == "view":
            return self.bases[operands[0]] if operands else (index,)
        if self.written[index]:
            return (index,)
        bases = tuple(dict.fromkeys(base for operand in operands for base in self.bases[operand]))
        if len(bases) > _MOST_SOURCES and self.readers[index] > 1:
            self.written[index] = True
            return (index,)
        return bases

    def _last_reads(self) -> tuple[dict[int, _Read], dict[int, _Read]]:
        """The last read of each buffer, and its last one in forward."""
        last: dict[int, _Read] = {}
        in_forward: dict[int, _Read] = {}
        for index, item in enumerate(self.tracks.items):
            at_s = self.times.op_start_s[index]
            if isinstance(item, Move) and (done := self.times.steps.get(index)):
                at_s = done[0][2]
            for operand in self.tracks.reads[index]:
                for base in self.bases[operand]:
                    if base not in last or at_s >= last[base].at_s:
                        last[base] = _Read(at_s, index)
                        if item.phase == "forward":
                            in_forward[base] = last[base]
        return last, in_forward

    def buffers(self) -> list[Buffer]:
        """Every tensor that comes and goes."""
        found = [*self._communication()]
        for index, slot in enumerate(self.tracks.slots):
            if slot.producer >= 0 and self.bases[index] == (index,) and slot.bytes:
                found += self._lives(index)
        return found

    def _lives(self, index: int) -> Iterator[Buffer]:
        """A buffer from its birth to its death; in two parts where backward reads it in fewer bytes than forward."""
        slot, read = self.tracks.slots[index], self.last.get(index, _NEVER)
        birth = self._birth(slot.producer)
        last_s = max(read.at_s, self.times.forward_end_s) if index in self.returned else read.at_s
        death = None if index in self.stay else max(birth, last_s)
        kind = self._kind(index, death)
        buffer = Buffer(self._name(slot), slot.bytes, birth, death, kind)
        kept = kept_bytes(self.space, self.tracks, index)
        if kind == "activations" and index in self.last_in_forward and kept < slot.bytes:
            until = self.last_in_forward[index]
            yield from self._in_all_layers(buffer._replace(death=until.at_s, kind="working"), slot.producer, until.item)
            buffer = buffer._replace(bytes=kept, birth=until.at_s)
        yield from self._in_all_layers(buffer, slot.producer, read.item)

    def _name(self, slot: Slot) -> str:
        item = self.tracks.items[slot.producer]
        again = isinstance(item, Run) and item.again
        value = (self.space.analysis.flow.value[slot.node], again)
        if value not in self.names:
            self.names[value] = self.words.value(slot.node) + (", computed again" if again else "")
        return self.names[value]

    def _in_all_layers(self, buffer: Buffer, producer: int, reader: int) -> Iterator[Buffer]:
        """A buffer, and where it is of a layer that stands for others those that they keep for backward or to the end.

        What lives and dies inside one of them is there for the first and the last: memory changes by as much from layer
        to layer, so that the most lies at one end.
        """
        runs, birth, death = self.times.runs, buffer.birth, buffer.death
        for block, starts in runs.items():
            span_s = starts[-1] - starts[0]
            giving, taking = (block.unit, block.behind) if block.phase == "forward" else (block.before, block.unit)
            if producer in giving and reader in taking and death is not None:  # handed on from layer to layer
                yield buffer._replace(death=max(birth, death - span_s))
                yield buffer._replace(birth=min(death, birth + span_s))
                return
        made_in = next((block for block in runs if producer in block.unit), None)
        if made_in is None:
            yield buffer
            return
        starts = runs[made_in]
        if death is None and made_in.phase == "backward":  # the last run is that of the layer in the graph
            for start_s in starts:
                yield Buffer(buffer.name, buffer.bytes, birth + start_s - starts[-1], None, buffer.kind)
            return
        read_in = next((block for block in runs if reader in block.unit or reader in block.before), None)
        is_kept = read_in is not None and made_in.phase == "forward" and read_in.phase == "backward"
        if death is None or read_in is None or not is_kept:
            other_s = starts[-1] - starts[0] if made_in.phase == "forward" else starts[0] - starts[-1]
            yield buffer
            yield buffer._replace(birth=birth + other_s, death=None if death is None else death + other_s)
            return
        for start_s, death_s in zip(starts, self._deaths(death, read_in, reader), strict=True):
            yield Buffer(buffer.name, buffer.bytes, birth + start_s - starts[0], death_s, buffer.kind)

    def _deaths(self, death_s: float, block: Block, reader: int) -> list[float]:
        """When what each layer keeps for backward dies, the first layer's first; `death_s` is that of the layer in the
        graph, whose reader is in `block` or in the layer above."""
        starts = self.times.runs[block]
        if reader in block.unit:
            return [death_s + start_s - starts[-1] for start_s in reversed(starts)]
        # above the last layer is none of them
        return [death_s + start_s + starts[1] - 2 * starts[0] for start_s in reversed(starts[:-1])] + [death_s]

    def _kind(self, index: int, death: float | None) -> str:
        slot = self.tracks.slots[index]
        if index in self.gradients:
            return "gradients"
        if slot.gathered:
            return "gathered"
        forward = self.tracks.items[slot.producer].phase == "forward"
        return "activations" if forward and (death is None or death > self.times.forward_end_s) else "working"

    def _birth(self, producer: int) -> float:
        """When an item's result takes memory: as its op starts, or the last collective on its way."""
        done = self.times.steps.get(producer)
        return done[-1][1] if done else self.times.op_start_s[producer]

    def _communication(self) -> Iterator[Buffer]:
        """Copies beside a collective's input and output: between steps, where a dim has to go first, and gloo's own.

        Gloo packs the tensors that it gathers together; what stands for its reduce-scatter receives all its terms.
        """
        tensors = Counter(item.bucket for item in self.tracks.items if isinstance(item, Move))
        for index, done in self.times.steps.items():
            item = self.tracks.items[index]
            name = self.words.value(item.value) if isinstance(item, Move) else ""
            packed = isinstance(item, Move) and item.bucket >= 0 and tensors[item.bucket] > 1
            for position, (step, start, end) in enumerate(done):
                next_end = done[position + 1][2] if position + 1 < len(done) else None
                for size, death in self._copies_beside(step, end, next_end, packed):
                    yield from self._in_all_layers(Buffer(name, size, start, death, "communication"), index, index)

    def _copies_beside(
        self, step: Step, end: float, next_end: float | None, packed: bool
    ) -> Iterator[tuple[int, float]]:
        """Bytes of the copies that a step makes, and when each is freed; `next_end`: when the step behind it ends."""
        if step.kind == "cast":
            if next_end is not None:  # the copy in another dtype, until it has travelled
                yield step.full_bytes, next_end
            return
        if not step.is_collective:
            return
        kind = KINDS.get(step.kind, step.kind)
        scattered = kind == "reduce_scatter"
        if self.space.topology.device.is_cpu and (scattered or (packed and kind == "all_gather")):
            yield step.full_bytes, end
        if next_end is not None:
            ranks = math.prod(self.space.topology.sizes[axis] for axis in step.axes) if scattered else 1
            yield step.full_bytes // ranks, max(end, next_end)
        if _copies(step):
            yield step.full_bytes, end


def _copies(step: Step) -> bool:
    """Whether a collective needs its buffer in another order than the tensor has."""
    if step.kind == "all_gather":
        return bool(step.source)
    if step.kind == "reduce_scatter":
        return bool(step.target)
    return step.kind == "all_to_all"
