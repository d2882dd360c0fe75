"""What a step holds in memory on one rank: every tensor with its birth and death in seconds, and the peak.

    at rest       parameters, buffers and optimizer states, all step long
    gradients     from where backward reduces them to the end of the step
    gathered      stored parameters brought whole, from their gather to their last reader of the phase
    activations   forward values that backward reads
    working       anything else, from the op that makes it to its last reader
    communication copies that collectives need

Not everything that the graph names is a tensor in memory. A view names another's buffer. A pointwise result that only
pointwise ops and reductions read is fused into them. A forward value that can be computed again cheaply from others
that are held is dropped and computed again, so reading it means reading those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from costmodel.memory import AtRest, Buffer, OptimizerSpec, at_rest, peak, timeline
from costmodel.reshard import Step
from passes.dims import Value, value_of
from passes.itinerary import Move, Run
from passes.price import held_values
from passes.space import Space
from passes.strategies import StoredOption
from passes.tracks import Tracks
from passes.words import Words

_MOST_SOURCES = 4
"""A fused chain that reads more buffers than this is cut: its result is written out."""


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


@dataclass(frozen=True)
class Times:
    """When things happen: start of each op (by item), and (step, start, end) of a move's steps (by item)."""

    op_start_s: Sequence[float]
    steps: dict[int, list[tuple[Step, float, float]]]
    forward_end_s: float
    end_s: float


def footprint(
    space: Space,
    assignment: Sequence[int],
    tracks: Tracks,
    times: Times,
    words: Words,
    spec: OptimizerSpec,
    *,
    accumulate: int = 1,
    held: frozenset[Value] | None = None,
) -> Footprint:
    """Memory of one rank while a step runs at `times`."""
    held = held_values(space) if held is None else held
    buffers = _at_rest(space, assignment, words, spec, accumulate, times.end_s)
    buffers += _Lives(space, tracks, times, words, held).buffers()
    granularity = 1 if space.topology.hardware.shared_host else 512
    top = peak(buffers, top=len(buffers), granularity_bytes=granularity)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for buffer in top.top:
        groups[buffer.name, buffer.kind].append(buffer.bytes)
    largest = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return Footprint(
        top.bytes,
        top.moment,
        dict(sorted(top.by_kind.items(), key=lambda item: -item[1])),
        tuple(TopTensor(name, kind, sum(sizes), len(sizes)) for (name, kind), sizes in largest[:12]),
        tuple(timeline(buffers, granularity)),
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
        trainable = site.given is not None and site.given.kind == "parameter" and site.given.requires_grad
        kept: AtRest = at_rest(shape, spec, item_bytes=site.stored_itemsize, trainable=trainable)
        kind = "inputs"
        if site.given is not None and site.given.kind in ("parameter", "buffer"):
            kind = f"{site.given.kind}s"
        name = words.pattern(site.name)
        for _ in range(site.count):
            buffers.append(Buffer(name, kept.parameters, 0.0, None, kind))
            if kept.optimizer + kept.master:
                buffers.append(Buffer(name, kept.optimizer + kept.master, 0.0, None, "optimizer"))
            if accumulate > 1 and trainable:
                buffers.append(Buffer(name, kept.gradients, 0.0, None, "gradients"))
        if trainable:
            scratch += kept.parameters * site.count
    if scratch and spec.name.startswith("adam") and not space.topology.hardware.shared_host:
        # torch's multi-tensor update on GPUs computes one temporary per parameter, all of them at once.
        buffers.append(Buffer("temporaries of the update", scratch, end_s, None, "working"))
    return buffers


class _Lives:
    """Births and deaths of what comes and goes."""

    def __init__(self, space: Space, tracks: Tracks, times: Times, words: Words, held: frozenset[Value]) -> None:
        self.space = space
        self.tracks = tracks
        self.times = times
        self.words = words
        self.phase = [_phase(item) for item in tracks.items]
        slots = tracks.slots
        self.value = [value_of(slot.node, space.folding) for slot in slots]
        """Of each slot, what the folded graph calls it."""
        self.held = [value in held for value in self.value]
        self.written = self._written()
        self.bases: list[tuple[int, ...]] = []
        """Of each slot, the buffers that reading it reads."""
        self.again: list[tuple[int, ...]] = []
        """The same for a backward op that reads a forward slot: through what is computed again."""
        for index in range(len(slots)):
            self._find_bases(index)

    def _fusing(self, slot: int) -> str:
        """How the op that makes a slot treats memory; "" for what is there or moved."""
        producer = self.tracks.slots[slot].producer
        item = self.tracks.items[producer] if producer >= 0 else None
        return self.tracks.costs[item.site].fusing if isinstance(item, Run) else ""

    def _written(self) -> list[bool]:
        """Whether a slot is a buffer of its own in memory, leaving aside that views name another's."""
        tracks = self.tracks
        needed = list(self.held)
        for slot, _, _ in tracks.leaving:
            needed[slot] = True
        for index in range(len(tracks.items) - 1, -1, -1):
            item = tracks.items[index]
            if isinstance(item, Move):
                for slot in tracks.reads[index]:
                    needed[slot] = needed[slot] or not self._from_other_phase(slot, index)
                continue
            fusing = tracks.costs[item.site].fusing
            through = any(needed[slot] for slot in tracks.writes[index]) if fusing == "view" else fusing == "kernel"
            if through:
                for slot in tracks.reads[index]:
                    needed[slot] = needed[slot] or not self._from_other_phase(slot, index)
        for slot in range(len(needed)):
            needed[slot] = needed[slot] or self._fusing(slot) != "pointwise"
        return needed

    def _from_other_phase(self, slot: int, reader: int) -> bool:
        producer = self.tracks.slots[slot].producer
        return producer >= 0 and self.phase[producer] == "forward" and self.phase[reader] == "backward"

    def _find_bases(self, index: int) -> None:
        slot = self.tracks.slots[index]
        operands = self.tracks.reads[slot.producer] if slot.producer >= 0 else ()
        fusing = self._fusing(index)
        producer = self.tracks.items[slot.producer]
        if slot.producer >= 0 and isinstance(producer, Move) and not producer.steps:
            bases = self.bases[operands[0]]
        elif fusing == "view":
            bases = self.bases[operands[0]] if operands else (index,)
        elif not self.written[index]:
            bases = tuple(dict.fromkeys(base for x in operands for base in self.bases[x]))
            if len(bases) > _MOST_SOURCES:
                bases = (index,)
                self.written[index] = True
        else:
            bases = (index,)
        self.bases.append(bases)
        if self.held[index] or fusing not in ("view", "pointwise"):
            self.again.append(bases)
        else:
            sources = (base for x in operands if not self.tracks.slots[x].gathered for base in self.again[x])
            self.again.append(tuple(dict.fromkeys(sources)))

    def buffers(self) -> list[Buffer]:
        """Every tensor that comes and goes."""
        tracks, times = self.tracks, self.times
        last: list[float] = [-1.0] * len(tracks.slots)
        again_s: dict[int, tuple[float, float]] = {}

        def read(slot: int, at_s: float, other_phase: bool, needs_buffer: bool) -> None:
            if other_phase:
                for base in self.again[slot]:
                    last[base] = max(last[base], at_s)
                if needs_buffer and slot not in self.again[slot] and self._fusing(slot) == "pointwise":
                    first = again_s.get(slot, (at_s, at_s))
                    again_s[slot] = (min(first[0], at_s), max(first[1], at_s))
                return
            for base in self.bases[slot]:
                last[base] = max(last[base], at_s)

        for index, item in enumerate(tracks.items):
            if isinstance(item, Move):
                done = times.steps[index]
                at_s = done[0][2] if done else times.op_start_s[index]
                needs_buffer = True
            else:
                at_s = times.op_start_s[index]
                needs_buffer = tracks.costs[item.site].fusing == "kernel"
            for operand in tracks.reads[index]:
                read(operand, at_s, self._from_other_phase(operand, index), needs_buffer)
        forever = set()
        for leaving, phase, _ in tracks.leaving:
            if phase == "forward":
                read(leaving, times.forward_end_s, False, True)
            else:
                forever |= set(self.bases[leaving])
        gradients = {base for leaving, _, stores in tracks.leaving if stores for base in self.bases[leaving]}
        found = self._communication()
        names: dict[Value, str] = {}
        for index, slot in enumerate(tracks.slots):
            if slot.producer < 0 or self.bases[index] != (index,) or not slot.bytes:
                continue
            birth = self._birth(slot.producer)
            death = None if index in forever else max(birth, last[index])
            value = self.value[index]
            if value not in names:
                names[value] = self.words.value(slot.node)
            found.append(Buffer(names[value], slot.bytes, birth, death, self._kind(index, birth, death, gradients)))
        for index, (first, final) in again_s.items():
            name = f"{self.words.value(tracks.slots[index].node)}, computed again"
            found.append(Buffer(name, tracks.slots[index].bytes, first, final, "working"))
        return found

    def _kind(self, index: int, birth: float, death: float | None, gradients: set[int]) -> str:
        slot = self.tracks.slots[index]
        if index in gradients:
            return "gradients"
        if slot.gathered:
            return "gathered"
        forward = self.phase[slot.producer] == "forward"
        return "activations" if forward and (death is None or death > self.times.forward_end_s) else "working"

    def _birth(self, producer: int) -> float:
        """When an item's result takes memory: as its op starts, or the last collective on its way."""
        done = self.times.steps.get(producer)
        return done[-1][1] if done else self.times.op_start_s[producer]

    def _communication(self) -> list[Buffer]:
        """Copies beside a collective's input and output: between steps, and where a dim has to go first."""
        found = []
        for index, done in self.times.steps.items():
            item = self.tracks.items[index]
            name = self.words.value(item.value) if isinstance(item, Move) else ""
            for position, (step, start, end) in enumerate(done):
                if step.kind == "cast":
                    if position + 1 < len(done):  # the copy in another dtype, until it has travelled
                        found.append(Buffer(name, step.full_bytes, start, done[position + 1][2], "communication"))
                    continue
                if not step.is_collective:
                    continue
                if position + 1 < len(done):
                    ways = 1
                    for axis in step.axes:
                        ways *= self.space.topology.sizes[axis]
                    scattered = step.kind in ("reduce_scatter", "state_scatter")
                    size = step.full_bytes // ways if scattered else step.full_bytes
                    found.append(Buffer(name, size, start, max(end, done[position + 1][2]), "communication"))
                if _copies(step):
                    found.append(Buffer(name, step.full_bytes, start, end, "communication"))
        return found


def _copies(step: Step) -> bool:
    """Whether a collective needs its buffer in another order than the tensor has."""
    if step.kind == "all_gather":
        return bool(step.source)
    if step.kind == "reduce_scatter":
        return bool(step.target)
    return step.kind == "all_to_all"


def _phase(item: Run | Move) -> str:
    return item.phase if isinstance(item, Move) else str(item.node.meta.get("phase", "forward"))
