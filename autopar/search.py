"""`search`: every sensible way to spread a training run over GPUs, ranked by predicted step time.

    replicas     per (tp, micro-batch, recompute): one data-parallel rank's schedule; all formulas build on these
    candidates   what plans can do (dp_replicate x dp_shard x tp), and what is priced only (pipeline, context and
                 expert parallelism, ZeRO-1/2, fp8, offload)
    played       plans' candidates in the order of their lower bounds, until no other can come among the best

The lower bound of a plan's candidate is its replica's step, to which state sharding only adds. What is not played has a
bound above the slowest that is listed, or above another of its mesh, so nothing that could be listed is left out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from autopar.options import Options, Recompute
from autopar.ranking import NEAREST, gathered_words, ranking_table, ranking_text
from autopar.reach import Times, on, times_of
from autopar.subject import Subject, check_nodes, states_text, subject
from autopar.verdict import Verdict, verdict
from autopar.waiting import TooLarge, Waiting, least_recomputed
from costmodel.hardware import Hardware
from costmodel.presets import hardware as hardware_of
from costmodel.presets import stand_in_notes
from passes.candidate import (
    LEAST_GAIN,
    NO_ATTENTION,
    NO_LAYERS,
    Either,
    Estimate,
    attends,
    estimate,
    is_settled,
    lower_bound,
    ways_of,
    with_least_memory,
)
from passes.collector import settled
from passes.errors import NoFeasiblePlanError
from passes.frontier import FrontierPoint
from passes.plan import Plan
from passes.recompute import Mode
from passes.setup import Setup, as_megatron

_AUTO: tuple[Mode, ...] = ("pointwise", "widening", "full")
"""What `recompute="auto"` tries."""
_MOST_MICRO_BATCHES = 4
"""So many micro-batch sizes are tried per mesh, the smallest that divide; of the fastest more, as long as that pays."""
_LARGEST_MICRO_BATCH = 16
_TRIED = 4
"""So many that cannot be listed are played, where no other of their kind is known to fit."""
_ELSEWHERE = 8
"""So many pipelines, the fastest, are priced on other numbers of GPUs too."""
_MOST_EXPERT_RANKS = 64
_LEAST_PART = 4096
"""Tokens of a sequence below which context parallelism is not considered: its ring would outlast its attention."""


@dataclass(frozen=True)
class Candidate:
    """One way to run: seconds of a step and bytes of the busiest rank. `priced_only`: what of it no plan does yet."""

    setup: Setup
    step_time_s: float
    peak_memory_bytes: int
    over_bytes: int
    """By how much it does not fit; 0 where it does."""
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    hidden_s: float = 0.0
    """What is sent behind compute."""

    @property
    def fits(self) -> bool:
        return self.over_bytes == 0

    @property
    def priced_only(self) -> tuple[str, ...]:
        return self.setup.priced_only

    @property
    def mesh(self) -> dict[str, int]:
        """As `autopar.plan` takes it; pipeline and context ranks are named `pp` and `cp`. Ranks that share experts
        (`setup.ep`) are among the others."""
        setup = self.setup
        axes = {"pp": setup.pp, "dp_replicate": setup.dp_replicate, "dp_shard": setup.dp_shard, "cp": setup.cp}
        return {name: size for name, size in (*axes.items(), ("tp", setup.tp)) if size > 1} or {"dp_shard": 1}


@dataclass(frozen=True)
class SearchResult:
    """What was found: `candidates` fit, fastest first; `too_large` do not, the nearest first.

    `bound_s`: no plan's candidate whose schedule was not played takes less, but for those that do not fit, and those
    that another of their mesh beats, or loses to by less than a hundredth; infinity where there are no others.
    """

    model: str
    gpus: int
    hardware: str
    global_batch: int
    sequence: int | None
    budget_bytes: int
    candidates: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]
    verdict: Verdict
    counted: int
    played: int
    bound_s: float
    notes: tuple[str, ...] = ()
    asked: Options = field(default_factory=Options, compare=False)
    """The options that the search was given, with the optimizer that it budgeted for."""

    @property
    def best(self) -> Candidate:
        """The fastest that a plan can do today.

        Raises:
            NoFeasiblePlanError: none fits.
        """
        for candidate in self.candidates:
            if not candidate.priced_only:
                return candidate
        raise NoFeasiblePlanError(f"no plan fits on {self.gpus} x {self.hardware}; {self.verdict.text[0]}")

    def options(self, candidate: Candidate | None = None) -> Options:
        """What `autopar.plan` takes to plan a candidate (the best) on its `mesh` as it was priced."""
        setup = (candidate or self.best).setup
        asked = self.asked
        recompute: Recompute = "auto" if setup.recompute == "pointwise" else setup.recompute
        reshard = asked.reshard_after_forward if setup.reshard else False
        regather = True if setup.gathers_again and setup.state == "zero3" else asked.regather_activations
        return replace(
            asked, accumulate=setup.accumulate, recompute=recompute, reshard_after_forward=reshard,
            regather_activations=regather, async_tp=asked.async_tp and setup.tp > 1,
        )  # fmt: skip

    def frontier(self, plan: Plan | None = None) -> tuple[FrontierPoint, ...]:
        """What fits and the nearest that does not, for `plan.report(path, frontier=...)`.

        plan: the best, planned (`options`): it stands there with its own figures, which the search only approached.
        """
        best = next((c for c in self.candidates if not c.priced_only), None)
        found = (*self.candidates, *self.too_large[:NEAREST])
        points = [_point(c, chosen=c is best and plan is None) for c in found]
        if plan is None:
            return tuple(points)
        label = " ".join(f"{name}={size}" for name, size in plan.axes)
        made = FrontierPoint(label, plan.step_time_s, plan.peak_memory_bytes, plan.fits, chosen=True)
        return (made, *points)

    def table(self, top: int | None = None) -> str:
        """The ranking as people read it."""
        return ranking_table(self, top)

    def __str__(self) -> str:
        return self.text()

    def text(self, name: str | None = None, top: int = 10) -> str:
        """The verdict and the ranking; `name` is what the model is called."""
        return ranking_text(self, name, top)

    def to_json(self) -> str:
        """All of it, for scripts."""
        content = {
            "format": "autopar-search", "version": 1,
            "model": self.model, "gpus": self.gpus, "hardware": self.hardware, "global_batch": self.global_batch,
            "sequence": self.sequence, "budget_bytes": self.budget_bytes, "counted": self.counted,
            "played": self.played, "bound_s": self.bound_s if self.bound_s < math.inf else None,
            "verdict": self.verdict.as_json(),
            "candidates": [_as_json(c) for c in self.candidates],
            "too_large": [_as_json(c) for c in self.too_large], "notes": list(self.notes),
        }  # fmt: skip
        return json.dumps(content, indent=1)


def _point(candidate: Candidate, chosen: bool) -> FrontierPoint:
    setup = candidate.setup
    parts = [f"{name}={size}" for name, size in candidate.mesh.items()]
    parts += [f"{setup.micro_batch} x {setup.accumulate}", setup.recompute]
    parts += [*(["tp by solver"] if setup.solved else []), *gathered_words(setup)]
    return FrontierPoint(
        " ".join(parts), candidate.step_time_s, candidate.peak_memory_bytes, candidate.fits, chosen,
        ", ".join(candidate.priced_only),
    )  # fmt: skip


def _as_json(candidate: Candidate) -> dict[str, Any]:
    setup = {name: getattr(candidate.setup, name) for name in Setup.__dataclass_fields__}
    return {
        "mesh": candidate.mesh, "setup": setup, "step_time_s": candidate.step_time_s,
        "peak_memory_bytes": candidate.peak_memory_bytes, "over_bytes": candidate.over_bytes,
        "priced_only": list(candidate.priced_only), "seconds": dict(candidate.seconds), "bytes": dict(candidate.bytes),
        "hidden_s": candidate.hidden_s,
    }  # fmt: skip


@settled()
def search(
    model: nn.Module,
    gpus: int,
    hardware: str | Hardware | None = None,
    global_batch: int = 0,
    example_inputs: Any = None,
    *,
    sequence: int | None = None,
    options: Options | None = None,
    top: int = 10,
    progress: Callable[[str], None] = lambda stage: None,
) -> SearchResult:
    """Rank the ways to train `model` on `gpus` devices with `global_batch` samples a step; no process group is built.

    example_inputs: of one sample; None: taken from the model's config, `sequence` long (Hugging Face models).
    options: `memory_budget`, `optimizer` ("adamw": with an fp32 copy of parameters in a lower precision), `recompute`,
        `reshard_after_forward`, `regather_activations` and `batch_dims` are heeded. top: as many plans as are played to
        their end.

    Raises:
        ValueError: options that mean nothing here, GPUs that fill no nodes, a batch that no mesh divides, inputs of
            more than one sample, a model without parameters.
    """
    machine = hardware_of(hardware)
    _check(gpus, global_batch, top, machine)
    asked = subject(model, machine, example_inputs, sequence, Options() if options is None else options, progress)
    state = _State(asked, gpus, global_batch, top, progress)
    if options is not None and options.optimizer == "none":
        state.notes.append("no optimizer is priced as sgd is, which keeps nothing either")
    state.notes += stand_in_notes(hardware)
    return state.result()


def _check(gpus: int, global_batch: int, top: int, machine: Hardware) -> None:
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; at least 1")
    if global_batch < 1:
        raise ValueError(f"global_batch is {global_batch}; give the samples of one step over all GPUs")
    if top < 1:
        raise ValueError(f"top is {top}; at least 1 plan is played to its end")
    check_nodes(gpus, machine)


class _State:
    """One search: what is asked, and what was priced so far."""

    def __init__(self, asked: Subject, gpus: int, batch: int, top: int, progress: Callable[[str], None]) -> None:
        self.asked = asked
        self.profiler = asked.profiler
        self.gpus = gpus
        self.batch = batch
        self.budget = asked.budget_bytes(gpus)
        options = asked.options
        self.recompute = _AUTO if options.recompute == "auto" else (options.recompute,)
        self.either = Either(options.reshard_after_forward is None, options.regather_activations is None)
        self.reshard, self.regather = options.reshard_after_forward is not False, options.regather_activations is True
        self.top = top
        self.length = asked.cut_length
        self.progress = progress
        self.notes: list[str] = []

    def result(self) -> SearchResult:
        machine = self.profiler.hardware
        plans, priced = list(self.plans(self.gpus)), list(self.formulas())
        widest = max(self.widths(self.gpus))
        undivided = (
            f"divides a global batch of {self.batch}: with tensor parallelism of up to {widest} it is split over "
            f"{self.gpus // widest} ranks or more"
        )
        if not plans and not priced:
            raise ValueError(f"no mesh of {self.gpus} GPUs {undivided}; use a multiple of that")
        self.progress(f"pricing {len(priced)} setups by formula")
        others = list(self.priced(priced))
        found, unplayed, bound_s = self.play(plans, others)
        asked: set[Setup] = set()
        while more := [setup for setup in self.larger([*found, *others]) if setup not in asked]:
            asked |= set(more)
            played, left, least_s = self.play([setup for setup in more if not setup.priced_only], others)
            found, unplayed, bound_s = [*found, *played], unplayed + left, min(bound_s, least_s)
            staged = [setup for setup in more if setup.priced_only]
            priced, others = [*priced, *staged], [*others, *self.priced(staged)]
        everything = [*found, *others]
        self.progress("pricing fp8 and offload")
        everything += list(self.variants(everything))
        fitting = sorted((c for c in everything if c.fits), key=lambda c: c.step_time_s)
        large = sorted((c for c in everything if not c.fits), key=lambda c: c.over_bytes)
        self.progress("pricing other numbers of GPUs")
        found_verdict = verdict(
            everything, self.profiler, self.gpus, self.batch, self.budget, lambda n: self.times_on(n, everything),
            self.profiler.hardware.device.step_error,
        )  # fmt: skip
        self.notes.append(states_text(self.profiler.optimizer))
        plain = (c for c in fitting if not c.priced_only)
        if best := next(plain, None):
            update_s = best.seconds["optimizer"]
            told = self.asked.step_notes(best.setup, best.step_time_s, update_s, best.peak_memory_bytes)
            self.notes += [f"the fastest that plans can do: {note}" for note in told]
        if self.gpus > 1 and self.profiler.hardware.ranks_per_node == 1:
            self.notes.append(
                "no tensor parallelism was tried: it stays inside a node, and these have one GPU; a hardware file with "
                'another "ranks_per_node" says otherwise'
            )
        if given := self.asked.unpriced:
            self.notes.append(f"not priced: {', '.join(given)}; what `options` gives hands them on to a plan")
        if not plans:
            self.notes.append(f"no mesh of plans {undivided}")
        elif not any(c.fits for c in found):
            self.notes.append(
                "what plans' ranks do was solved for the least time; `autopar.plan` solves within the memory of a GPU, "
                "and may fit where these do not"
            )
        if not self.profiler.layers:
            self.notes.append(f"{NO_LAYERS}: captured whole, {self.unpriced_by_layer()} priced")
        return SearchResult(
            self.asked.name, self.gpus, machine.label, self.batch, self.asked.length, self.budget,
            tuple(_distinct(fitting)), tuple(_distinct(large)), found_verdict,
            len(priced) + len(found) + unplayed, len(found), bound_s, tuple(self.notes), self.asked.options,
        )  # fmt: skip

    # -- what there is to try ------------------------------------------------------------------------------------------

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
            if setup.state == "zero3":
                setup = replace(setup, reshard=self.reshard, gathers_again=self.regather and setup.tp > 1)
            local = setup.micro_batch * setup.accumulate
            more = [size for size in range(setup.micro_batch + 1, local + 1) if local % size == 0]
            if more and setup.micro_batch >= max(self.micro_batches(local, setup.pp)):
                for recompute in self.recompute:
                    yield replace(setup, micro_batch=more[0], accumulate=local // more[0], recompute=recompute)

    def plans(self, gpus: int) -> Iterator[Setup]:
        """What plans can do."""
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
        """What is priced only."""
        layers = self.profiler.layers
        if self.profiler.hardware.shared_host:
            self.notes.append("ranks share one host: pipelines, ZeRO-1/2 and offload are not priced there")
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
                            yield from self.ways(as_megatron(Setup(
                                dp_shard=data, tp=tp, pp=pp, cp=cp, ep=ep, micro_batch=micro,
                                accumulate=local // micro, state="zero1" if data * cp > 1 else "zero0",
                                recompute=recompute,
                            )))  # fmt: skip

    def ways(self, setup: Setup) -> Iterator[Setup]:
        """ZeRO-1, and ZeRO-2 where gradients need not wait for a pipeline's other micro-batches; plain and interleaved
        stages, with layers that full recompute runs again to their end, collectives too, or as plans do."""
        if setup.pp == setup.cp == 1:
            if setup.data_ranks > 1:
                yield setup
                yield replace(setup, state="zero2")
            return
        layers = self.profiler.layers
        staged = [setup]
        if setup.pp > 1 and layers % setup.pp == 0 and layers > setup.pp:
            staged.append(replace(setup, virtual=layers // setup.pp))
        yield from staged
        if setup.pp > 1 and setup.tp > 1 and setup.recompute == "full":
            yield from (replace(each, whole_blocks=True) for each in staged)

    @cached_property
    def contexts(self) -> list[int]:
        """Context-parallel ranks: parts of long sequences that stay at least `_LEAST_PART` tokens long."""
        parts = [cp for cp in (2, 4, 8, 16) if self.length is not None and self.length >= cp * _LEAST_PART]
        if not parts or not self.profiler.layers:
            return [1]
        if not attends(self.profiler.profile(Setup(dp_shard=self.gpus, recompute=self.recompute[0]), replica=True)):
            self.notes.append(f"not priced: context parallelism, as {NO_ATTENTION}")
            return [1]
        return [1, *parts]

    def unpriced_by_layer(self) -> str:
        """What is not priced of a model without layers that are told apart."""
        long = self.length is not None and self.length >= 2 * _LEAST_PART
        kinds = {"context": long, "expert": self.profiler.experts > 0}
        named = " or ".join(name for name, would_be in kinds.items() if would_be)
        return f"no pipeline and no {named} parallelism" if named else "no pipeline"

    def expert_ranks(self, ranks: int, tp: int) -> list[int]:
        """Of so many ranks that have the same layers, how many may share the routed experts: powers of two."""
        experts = self.profiler.experts if self.profiler.layers else 0
        sizes = [tp * 2**i for i in range(1, _MOST_EXPERT_RANKS.bit_length())] if experts else []
        return [1, *(ep for ep in sizes if ep <= _MOST_EXPERT_RANKS and ranks % ep == experts % ep == 0)]

    def variants(self, found: Sequence[Candidate]) -> Iterator[Candidate]:
        """The fastest with fp8 products where these are faster, and what comes nearest to fitting with its optimizer
        offloaded."""
        fp8 = "float8" in self.profiler.hardware.device.peak_flops_per_s
        fitting = sorted((c for c in found if c.fits), key=lambda c: c.step_time_s)
        gains: list[Candidate] = []
        if fp8:
            for kind in ((c for c in fitting if not c.priced_only), (c for c in fitting if c.priced_only)):
                for candidate in list(kind)[:2]:
                    faster = self.candidate(estimate(replace(candidate.setup, fp8=True), self.profiler))
                    if faster.step_time_s < candidate.step_time_s:
                        gains.append(faster)
            if fitting and not gains:
                self.notes.append("fp8 products would make none of the fastest faster")
        yield from gains
        plans = [c for c in found if c.setup.state == "zero3" and not self.profiler.hardware.shared_host]
        for candidate in sorted(plans, key=lambda c: (c.over_bytes, c.step_time_s))[:6]:
            yield self.candidate(estimate(replace(candidate.setup, offload=True), self.profiler))

    def times_on(self, gpus: int, found: Sequence[Candidate]) -> Times:
        """Steps on another number of GPUs: of sharded state alone, and of what here was fastest of all else."""
        states = (setup for setup in self.plans(gpus) if setup.tp == 1)
        else_ = [c for c in found if c.fits and c.setup.ranks > c.setup.data_ranks and not c.setup.fp8]
        else_ = [c for c in else_ if c.setup.ep == 1]  # which no verdict rests on
        fastest = sorted((c for c in else_ if not c.setup.offload), key=lambda c: c.step_time_s)
        kept = [c.setup for c in _distinct(c for c in fastest if c.setup.pp > 1)][:_ELSEWHERE]
        kept += [c.setup for c in fastest if c.setup.pp == c.setup.cp == 1 and c.setup.state == "zero3"][:1]
        kept += [c.setup for c in fastest if c.setup.pp == 1 < c.setup.cp][:1]
        budget = self.asked.budget_bytes(gpus)
        return times_of(states, on(gpus, self.batch, kept), self.profiler, budget, either=self.either)

    # -- pricing -------------------------------------------------------------------------------------------------------

    def candidate(self, found: Estimate) -> Candidate:
        over = max(0, math.ceil(found.peak_bytes - self.budget))
        return Candidate(
            found.setup, found.step_s, int(found.peak_bytes), over, found.seconds, found.bytes, found.hidden_s
        )  # fmt: skip

    def play(self, plans: Sequence[Setup], others: Sequence[Candidate]) -> tuple[list[Candidate], int, float]:
        """Plans that can be listed beside `others`, played; how many were not, and what those take at least."""
        if plans:
            self.progress(f"bounding {len(plans)} plans")
        fits: set[Setup] = set()
        """What was played and fits."""
        fastest: dict[Setup, float] = {}
        nearest: dict[Setup, int] = {}
        found: list[Candidate] = []

        def note(candidate: Candidate) -> None:
            kind, best = _parallelism(candidate.setup), fastest if candidate.fits else nearest
            value = candidate.step_time_s if candidate.fits else candidate.over_bytes
            best[kind] = min(best.get(kind, math.inf), value)  # type: ignore[assignment]

        def turn(setup: Setup) -> float:
            """When a setup's turn comes: where the solver gains little, after the one by hand."""
            seconds, _ = self.bound(setup)
            return max(seconds, self.bound(_by_hand(setup))[0]) if self.gains_little(setup) else seconds

        reached = math.inf
        tried = {True: 0, False: 0}
        """Whether state alone is sharded -> how many were played until one fits: the verdict asks for one of each."""
        asked = 0
        waiting = Waiting(plans, self.bound, self.budget, turn)
        for seconds, setup in waiting:
            if seconds >= fastest.get(_parallelism(setup), math.inf):
                continue  # its mesh is listed with what was played
            if _by_hand(setup) in fits and self.gains_little(setup):
                continue
            alone = setup.tp == 1
            known = tried[alone] >= _TRIED or any((c.setup.tp == 1) == alone and c.fits for c in found)
            if known and len(fastest) >= self.top and seconds >= sorted(fastest.values())[self.top - 1]:
                reached = min(reached, seconds)
                continue
            tried[alone] += 1
            asked += 1
            ways = self.played(setup)
            for each in map(self.candidate, ways):
                found.append(each)
                note(each)
                if each.fits:
                    fits.add(setup)
            if not is_settled(ways, self.profiler, self.budget, self.either):
                waiting.ask_for_more(setup)
        for candidate in others:
            if not candidate.fits:
                note(candidate)
        for over, _, setup in sorted(waiting.too_large):
            nearer = sum(each <= over for each in nearest.values())
            if nearer < NEAREST and over < nearest.get(_parallelism(setup), math.inf):
                asked += 1
                found.append(self.candidate(estimate(with_least_memory(setup, self.either), self.profiler)))
                note(found[-1])
        return found, len(plans) - asked, reached

    def bound(self, setup: Setup) -> tuple[float, float]:
        """Seconds and bytes that a plan's setup cannot go below."""
        return lower_bound(with_least_memory(setup, self.either), self.profiler)

    def gains_little(self, setup: Setup) -> bool:
        """Whether what the solver finds for tensor-parallel ranks takes hardly less than what they do by hand."""
        return setup.solved and self.bound(setup)[0] > (1 - LEAST_GAIN) * self.bound(_by_hand(setup))[0]

    def priced(self, setups: Iterable[Setup]) -> Iterator[Candidate]:
        """By formula; of what differs in what is computed again alone, no more than the first that fits, and of what
        differs in micro-batches, no more than the smallest that does not."""
        fits: set[Setup] = set()
        larger = TooLarge()
        for setup in setups:
            if (kind := least_recomputed(setup)) in fits or larger.covers(setup):
                continue
            found = self.candidate(estimate(setup, self.profiler))
            if found.fits:
                fits.add(kind)
            else:
                larger.note(setup)
            yield found

    def played(self, setup: Setup) -> list[Estimate]:
        """A plan's setup, with gathered parameters and activations freed, kept or either, as was asked."""
        self.progress(
            f"playing: {setup.dp_replicate} x {setup.dp_shard} x {setup.tp}, micro-batches {setup.micro_batch} x "
            f"{setup.accumulate}, recompute {setup.recompute}"
        )
        return list(ways_of(setup, self.profiler, self.budget, self.either))


def _by_hand(setup: Setup) -> Setup:
    """The setup whose tensor-parallel ranks do what they would by hand."""
    return replace(setup, solved=False)


def _parallelism(setup: Setup) -> Setup:
    """What is listed once: the setup without micro-batch, virtual stages, recompute, what becomes of gathers, how many
    ranks share experts where they do, and who says what tensor-parallel ranks do."""
    return replace(
        setup, micro_batch=1, accumulate=1, recompute="pointwise", whole_blocks=False, virtual=1, reshard=True,
        gathers_again=False, ep=min(setup.ep, 2), solved=False,
    )  # fmt: skip


def _distinct(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """Without those that another of the same parallelism beats."""
    seen: set[Setup] = set()
    for candidate in candidates:
        if (kind := _parallelism(candidate.setup)) not in seen:
            seen.add(kind)
            yield candidate
