"""The setups that a search tries: meshes of so many GPUs, micro-batches, recompute modes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.runs.profiling import Profiler
from autopar.runs.search_result import Candidate
from passes.runs.candidate import NO_ATTENTION, NO_LAYERS, attends
from passes.runs.setup import Setup, as_megatron
from passes.space.recompute import Mode

_MOST_MICRO_BATCHES = 4
"""So many micro-batch sizes are tried per mesh, the smallest that divide; of the fastest more, as long as that pays."""
_LARGEST_MICRO_BATCH = 16
_MOST_EXPERT_RANKS = 64
_LEAST_PART = 4096
"""Tokens of a sequence below which context parallelism is not considered: its ring would outlast its attention."""


@dataclass(frozen=True)
class Setups:
    """For `batch` samples a step of `sequence` tokens (None: not known) on `gpus`.

    recompute: the modes to try. reshard: whether gathered parameters are freed after forward, where nothing says
    otherwise later; regather: the same of gathered activations.
    """

    profiler: Profiler
    gpus: int
    batch: int
    sequence: int | None
    recompute: Sequence[Mode]
    reshard: bool
    regather: bool

    def widths(self, gpus: int) -> list[int]:
        """Tensor-parallel ranks: powers of two and divisors inside a node."""
        node = min(gpus, self.profiler.hardware.ranks_per_node)
        return [tp for tp in (1, 2, 4, 8, 16, 32, 64) if tp <= node and gpus % tp == 0]

    def micro_batches(self, local: int, stages: int = 1) -> list[int]:
        """Sizes that divide a rank's part of the batch: the smallest of them; of stages, which need many, one and two.

        Larger ones are tried where these make a difference (`larger`)."""
        most = _LARGEST_MICRO_BATCH if stages == 1 else 2
        return [size for size in range(1, most + 1) if local % size == 0][:_MOST_MICRO_BATCHES]

    def larger(self, found: Sequence[Candidate]) -> Iterator[Setup]:
        """Where the fastest of a kind has the largest micro-batches that were tried: the next larger."""
        fastest: dict[tuple[object, ...], Candidate] = {}
        for candidate in sorted((c for c in found if c.fits), key=lambda c: c.step_time_s):
            setup = candidate.setup
            sizes = setup.dp_shard, setup.tp, setup.pp, setup.cp, setup.ep
            fastest.setdefault((setup.state, *(size > 1 for size in sizes)), candidate)
        for setup in (candidate.setup for candidate in fastest.values()):
            if setup.is_played:
                setup = replace(setup, reshard=self.reshard, gathers_again=self.regather and setup.tp > 1)
            local = setup.micro_batch * setup.accumulate
            more = [size for size in range(setup.micro_batch + 1, local + 1) if local % size == 0]
            if more and setup.micro_batch >= max(self.micro_batches(local, setup.pp)):
                for recompute in self.recompute:
                    larger = replace(setup, micro_batch=more[0], accumulate=local // more[0], recompute=recompute)
                    yield replace(larger, experts_beside=larger.experts_beside and larger.may_send_beside)

    def plans(self, gpus: int) -> Iterator[Setup]:
        """Setups that plans can run."""
        node = self.profiler.hardware.ranks_per_node
        for tp in self.widths(gpus):
            data = gpus // tp
            if self.batch % data:
                continue
            local = self.batch // data
            shards = {1, data, *(s for s in (node // tp, 4 * node // tp) if 1 < s < data and data % s == 0)}
            for micro in self.micro_batches(local):
                for recompute in self.recompute:
                    for shard, solved in itertools.product(sorted(shards), (False, True) if tp > 1 else (False,)):
                        yield Setup(
                            dp_replicate=data // shard, dp_shard=shard, tp=tp, micro_batch=micro,
                            accumulate=local // micro, recompute=recompute, reshard=self.reshard,
                            gathers_again=self.regather and tp > 1, solved=solved,
                        )  # fmt: skip

    def formulas(self) -> Iterator[Setup]:
        """Setups that are priced by formula only."""
        layers = self.profiler.layers
        if self.profiler.hardware.shared_host:
            return
        for tp in self.widths(self.gpus):
            stages = [p for p in range(1, min(layers, 128) + 1) if self.gpus % (tp * p) == 0] if layers else [1]
            for pp in stages:
                if pp > 1 and not (layers % pp == 0 or layers / pp > 4):
                    continue
                for cp in self.contexts:
                    ways = self.gpus // (tp * pp)
                    if ways % cp or self.batch % (ways // cp) or tp * cp > 32:
                        continue
                    data = ways // cp
                    local = self.batch // data
                    for micro in self.micro_batches(local, pp):
                        for recompute, ep in itertools.product(self.recompute, self.expert_ranks(ways * tp, tp)):
                            waited = self.ways(as_megatron(Setup(
                                dp_shard=data, tp=tp, pp=pp, cp=cp, ep=ep, micro_batch=micro,
                                accumulate=local // micro, state="zero1" if data * cp > 1 else "zero0",
                                recompute=recompute, balanced=pp > 1,
                            )))  # fmt: skip
                            for each in waited:
                                yield each
                                if each.may_send_beside:
                                    yield replace(each, experts_beside=True)

    def ways(self, setup: Setup) -> Iterator[Setup]:
        """ZeRO-1, and ZeRO-2 where gradients need not wait for a pipeline's other micro-batches, ZeRO-3 where experts
        are shared, which no plan does; plain and interleaved stages, with layers that full recompute runs again to
        their end, collectives too, or as plans do."""
        if setup.pp == setup.cp == 1:
            if setup.data_ranks > 1:
                yield setup
                yield replace(setup, state="zero2")
                if setup.ep > 1:
                    yield replace(setup, state="zero3")
            return
        staged, most = [setup], math.ceil(self.profiler.layers / setup.pp)
        if setup.pp > 1 and most > 1:
            staged.append(replace(setup, virtual=most))
        yield from staged
        if setup.pp > 1 and setup.tp > 1 and setup.recompute == "full":
            yield from (replace(each, whole_blocks=True) for each in staged)

    @cached_property
    def contexts(self) -> list[int]:
        """Context-parallel ranks: parts of long sequences that stay at least `_LEAST_PART` tokens long."""
        return [1, *self._parts] if self._attends else [1]

    @cached_property
    def _parts(self) -> list[int]:
        length = (self.sequence or 0) if self.profiler.layers else 0
        return [cp for cp in (2, 4, 8, 16) if length >= cp * _LEAST_PART]

    @cached_property
    def _attends(self) -> bool:
        """Whether attention, where sequences can be cut, is an op that a ring can stand for."""
        replica = Setup(dp_shard=self.gpus, recompute=self.recompute[0])
        return bool(self._parts) and attends(self.profiler.profile(replica, replica=True))

    def expert_ranks(self, ranks: int, tp: int) -> list[int]:
        """Of so many ranks that have the same layers, how many may share the routed experts: powers of two."""
        experts = self.profiler.experts if self.profiler.layers else 0
        sizes = [tp * 2**i for i in range(1, _MOST_EXPERT_RANKS.bit_length())] if experts else []
        return [1, *(ep for ep in sizes if ep <= _MOST_EXPERT_RANKS and ranks % ep == experts % ep == 0)]

    @property
    def left_out(self) -> list[str]:
        """Notes on what `formulas` leaves out, and why."""
        if self.profiler.hardware.shared_host:
            return ["ranks share one host: pipelines, ZeRO-1/2 and offload are not priced there"]
        return [f"not priced: context parallelism, as {NO_ATTENTION}"] if self._parts and not self._attends else []

    @property
    def unlayered(self) -> list[str]:
        """What is not priced of a model without layers that are told apart."""
        if self.profiler.layers:
            return []
        long = self.sequence is not None and self.sequence >= 2 * _LEAST_PART
        kinds = {"context": long, "expert": self.profiler.experts > 0}
        named = " or ".join(name for name, would_be in kinds.items() if would_be)
        unpriced = f"no pipeline and no {named} parallelism" if named else "no pipeline"
        return [f"{NO_LAYERS}: captured whole, {unpriced} priced"]

    @property
    def undivided(self) -> str:
        """What is said of meshes where none divides the batch."""
        widest = max(self.widths(self.gpus))
        return (
            f"divides a global batch of {self.batch}: with tensor parallelism of up to {widest} it is split over "
            f"{self.gpus // widest} ranks or more"
        )
