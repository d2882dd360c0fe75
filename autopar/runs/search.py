"""`search`: every sensible way to spread a training run over GPUs, ranked by predicted step time.

    replicas     per (tp, micro-batch, recompute): one data-parallel rank's schedule; all formulas build on these
    candidates   what plans can do (dp_replicate x dp_shard x tp), and what is priced only (pipeline, context and
                 expert parallelism, ZeRO-1/2, fp8, offload)
    played       plans' candidates in the order of their lower bounds, until no other can come among the best

The lower bound of a plan's candidate is its replica's step, to which state sharding only adds. What is not played has a
bound above the slowest that is listed and above the fastest plan of its kind (state sharded alone, or computation too),
or above another of its mesh, so nothing that could be listed is left out, nor what the verdict compares on these GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import nn

from autopar.options import Options
from autopar.runs.ranking import NEAREST
from autopar.runs.reach import Times, on, times_of
from autopar.runs.search_result import Candidate, SearchResult, distinct, parallelism
from autopar.runs.setups import Setups
from autopar.runs.subject import Subject, check_nodes, states_text, subject
from autopar.runs.verdict import verdict
from autopar.runs.waiting import TooLarge, Waiting, least_recomputed
from costmodel.hardware import Hardware
from costmodel.presets import hardware as hardware_of
from costmodel.presets import stand_in_notes
from passes.capture.collector import settled
from passes.planner.pipeline import Progress
from passes.runs.candidate import LEAST_GAIN, Either, estimate, is_settled, lower_bound, ways_of, with_least_memory
from passes.runs.estimate import Estimate
from passes.runs.setup import Setup
from passes.space.recompute import Mode

_AUTO: tuple[Mode, ...] = ("pointwise", "widening", "full")
"""What `recompute="auto"` tries."""
_TRIED = 4
"""So many that cannot be listed are played, where no other of their kind is known to fit."""
_ELSEWHERE = 8
"""So many pipelines, the fastest, are priced on other numbers of GPUs too."""


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
    fused_attention: bool = False,
    progress: Progress = lambda stage: None,
) -> SearchResult:
    """Rank the ways to train `model` on `gpus` devices with `global_batch` samples a step; no process group is built.

    example_inputs: of one sample; None: taken from the model's config, `sequence` long (Hugging Face models).
    options: `memory_budget`, `optimizer` ("adamw": with an fp32 copy of parameters in a lower precision), `recompute`,
        `reshard_after_forward`, `regather_activations` and `batch_dims` are heeded. top: so many of the fastest are
        certain, as are the fastest plan that shards state alone and that which shards computation too.
    fused_attention: attention that the model writes out, or gives a mask or dropout, is priced as a framework's kernel
        for it, though plans run it as written.

    Raises:
        ValueError: options that mean nothing here, GPUs that fill no nodes, a batch that no mesh divides, inputs of
            more than one sample, a model without parameters.
    """
    machine = hardware_of(hardware)
    _check(gpus, global_batch, top, machine)
    asked = subject(
        model, machine, example_inputs, sequence, Options() if options is None else options, progress,
        fused_attention=fused_attention,
    )  # fmt: skip
    notes = stand_in_notes(hardware)
    if options is not None and options.optimizer == "none":
        notes = ["no optimizer is priced as sgd is, which keeps nothing either", *notes]
    return _Search(asked, gpus, global_batch, top, progress).result(notes)


def _check(gpus: int, global_batch: int, top: int, machine: Hardware) -> None:
    for name, value, wanted in (
        ("gpus", gpus, "a whole number, at least 1"),
        ("global_batch", global_batch, "give the samples of one step over all GPUs, a whole number"),
        ("top", top, "a whole number: of the fastest, at least 1 is looked for"),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; {wanted}")
    check_nodes(gpus, machine)


class _Search:
    """One search: what is asked, and how it is priced."""

    def __init__(self, asked: Subject, gpus: int, batch: int, top: int, progress: Progress) -> None:
        self.asked = asked
        self.profiler = asked.profiler
        self.hardware = asked.profiler.hardware
        self.gpus = gpus
        self.batch = batch
        self.budget = asked.budget_bytes(gpus)
        self.top = top
        self.progress = progress
        options = asked.options
        self.either = Either(options.reshard_after_forward is None, options.regather_activations is None)
        self.setups = Setups(
            self.profiler, gpus, batch, asked.cut_length,
            recompute=_AUTO if options.recompute == "auto" else (options.recompute,),
            reshard=options.reshard_after_forward is not False, regather=options.regather_activations is True,
        )  # fmt: skip

    def result(self, notes: Sequence[str]) -> SearchResult:
        """All priced and ranked; `notes` come first."""
        plans, formulas = list(self.setups.plans(self.gpus)), list(self.setups.formulas())
        if not plans and not formulas:
            raise ValueError(f"no mesh of {self.gpus} GPUs {self.setups.undivided}; use a multiple of that")
        self.progress(f"pricing {len(formulas)} setups by formula")
        others = list(self.priced(formulas))
        found, unplayed, bound_s = self.play(plans, others)
        asked: set[Setup] = set()
        while more := [setup for setup in self.setups.larger([*found, *others]) if setup not in asked]:
            asked |= set(more)
            played, left, least_s = self.play([setup for setup in more if not setup.priced_only], others)
            found, unplayed, bound_s = [*found, *played], unplayed + left, min(bound_s, least_s)
            staged = [setup for setup in more if setup.priced_only]
            formulas, others = [*formulas, *staged], [*others, *self.priced(staged)]
        self.progress("pricing fp8 and offload")
        faster, unhelped = self.with_fp8([*found, *others])
        everything = [*found, *others, *faster, *self.offloaded([*found, *others])]
        fitting = sorted((c for c in everything if c.fits), key=lambda c: c.step_time_s)
        large = sorted((c for c in everything if not c.fits), key=lambda c: c.over_bytes)
        self.progress("pricing other numbers of GPUs")
        found_verdict = verdict(
            everything, self.profiler, self.gpus, self.batch, self.budget, lambda n: self.times_on(n, everything),
            self.hardware.device.step_error,
        )  # fmt: skip
        told = [*notes, *self.setups.left_out, *unhelped, *self.notes(fitting)]
        if not plans:
            told.append(f"no mesh of plans {self.setups.undivided}")
        elif not any(c.fits for c in found):
            told.append(
                "what plans' ranks do was solved for the least time; `autopar.plan` solves within the memory of a GPU, "
                "and may fit where these do not"
            )
        told += self.setups.unlayered
        return SearchResult(
            self.asked.name, self.gpus, self.hardware.label, self.batch, self.asked.length, self.budget,
            tuple(distinct(fitting)), tuple(distinct(large)), found_verdict,
            len(formulas) + len(found) + unplayed, len(found), bound_s, tuple(told), self.asked.options,
        )  # fmt: skip

    def notes(self, fitting: Sequence[Candidate]) -> list[str]:
        """What was assumed, of the fastest that plans can do, and what was not tried or priced."""
        notes = [states_text(self.profiler.optimizer)]
        if best := next((c for c in fitting if not c.priced_only), None):
            update_s = best.seconds["optimizer"]
            told = self.asked.step_notes(best.setup, best.step_time_s, update_s, best.peak_memory_bytes)
            notes += [f"the fastest that plans can do: {note}" for note in told]
            notes += self.asked.attention_notes(best.setup) + self.asked.experts_notes(best.setup)
        if self.gpus > 1 and self.hardware.ranks_per_node == 1:
            notes.append(
                "no tensor parallelism was tried: it stays inside a node, and these have one GPU; a hardware file with "
                'another "ranks_per_node" says otherwise'
            )
        if given := self.asked.unpriced:
            notes.append(f"not priced: {', '.join(given)}; what `options` gives hands them on to a plan")
        return notes

    def with_fp8(self, found: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
        """The fastest with fp8 products where these are faster; a note where they make none faster."""
        if "float8" not in self.hardware.device.peak_flops_per_s:
            return [], []
        fitting = sorted((c for c in found if c.fits), key=lambda c: c.step_time_s)
        runs, priced = ([c for c in fitting if bool(c.priced_only) is only] for only in (False, True))
        gains = []
        for candidate in (*runs[:2], *priced[:2]):
            faster = self.candidate(estimate(replace(candidate.setup, fp8=True), self.profiler))
            if faster.step_time_s < candidate.step_time_s:
                gains.append(faster)
        return gains, ["fp8 products would make none of the fastest faster"] if fitting and not gains else []

    def offloaded(self, found: Sequence[Candidate]) -> Iterator[Candidate]:
        """What comes nearest to fitting, with its optimizer offloaded."""
        plans = [c for c in found if c.setup.is_played and not self.hardware.shared_host]
        for candidate in sorted(plans, key=lambda c: (c.over_bytes, c.step_time_s))[:6]:
            yield self.candidate(estimate(replace(candidate.setup, offload=True), self.profiler))

    def times_on(self, gpus: int, found: Sequence[Candidate]) -> Times:
        """Steps on another number of GPUs: of sharded state alone, and of what here was fastest of each other kind."""
        states = (setup for setup in self.setups.plans(gpus) if setup.tp == 1)
        else_ = [c for c in found if c.fits and c.setup.ranks > c.setup.data_ranks and not c.setup.fp8]
        else_ = [c for c in else_ if c.setup.ep == 1]  # which no verdict rests on
        fastest = sorted((c for c in else_ if not c.setup.offload), key=lambda c: c.step_time_s)
        kept = [c.setup for c in distinct(c for c in fastest if c.setup.pp > 1)][:_ELSEWHERE]
        plans = [c.setup for c in fastest if c.setup.is_played]
        widths = {setup.tp: setup for setup in reversed(plans)}.values()  # the fastest of each: one may divide no more
        kept += widths
        if gpus < self.gpus:  # in as many micro-batches as here, too
            kept += [replace(each, micro_batch=each.micro_batch * self.gpus // gpus) for each in widths]
        kept += [c.setup for c in fastest if c.setup.pp == 1 < c.setup.cp][:1]
        budget = self.asked.budget_bytes(gpus)
        return times_of(states, on(gpus, self.batch, kept), self.profiler, budget, either=self.either)

    def candidate(self, found: Estimate) -> Candidate:
        over = max(0, math.ceil(found.peak_bytes - self.budget))
        return Candidate(
            found.setup, found.step_s, int(found.peak_bytes), over, found.seconds, found.bytes, found.hidden_s
        )  # fmt: skip

    def play(self, plans: Sequence[Setup], others: Sequence[Candidate]) -> tuple[list[Candidate], int, float]:
        """Plans that can be listed beside `others`, played; how many were not, and what those take at least."""
        if plans:
            self.progress(f"bounding {len(plans)} plans")
        played = _Played(self.top, others)
        unplayed_s = math.inf
        asked = 0
        waiting = Waiting(plans, self.bound, self.budget, self.turn)
        for seconds, setup in waiting:
            if seconds >= played.fastest_s.get(parallelism(setup), math.inf):
                continue  # its mesh is listed with what was played
            if _by_hand(setup) in played.fits and self.gains_little(setup):
                continue
            if not played.would_tell(seconds, setup):
                unplayed_s = min(unplayed_s, seconds)
                continue
            asked += 1
            ways = self.played(setup)
            for candidate in map(self.candidate, ways):
                played.add(candidate)
                if candidate.fits:
                    played.fits.add(setup)
            played.tried[setup.tp == 1] += 1
            if not is_settled(ways, self.profiler, self.budget, self.either):
                waiting.ask_for_more(setup)
        for over_bytes, _, setup in sorted(waiting.too_large):
            if played.would_list_as_too_large(setup, over_bytes):
                asked += 1
                played.add(self.candidate(estimate(with_least_memory(setup, self.either), self.profiler)))
        return played.candidates, len(plans) - asked, unplayed_s

    def turn(self, setup: Setup) -> float:
        """When a setup's turn comes: where the solver gains little, after the one by hand."""
        seconds, _ = self.bound(setup)
        return max(seconds, self.bound(_by_hand(setup))[0]) if self.gains_little(setup) else seconds

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


class _Played:
    """Candidates as they are played, and the best of each kind of parallelism, among `others`; `top` are listed."""

    def __init__(self, top: int, others: Sequence[Candidate]) -> None:
        self.top = top
        self.candidates: list[Candidate] = []
        self.fits: set[Setup] = set()
        """What was played and fits."""
        self.tried = {True: 0, False: 0}
        """Whether state alone is sharded -> how many were played."""
        self.plan_s = {True: math.inf, False: math.inf}
        """The same -> the fastest of them that fits: the verdict compares the two."""
        self.fastest_s: dict[Setup, float] = {}
        """Of what fits, by kind."""
        self.over_bytes: dict[Setup, int] = {}
        """Of what does not fit, the least by kind."""
        for candidate in others:
            self._note(candidate)

    def add(self, candidate: Candidate) -> None:
        """Keep a candidate, and compare it with the best of its kind."""
        self.candidates.append(candidate)
        self._note(candidate)
        alone = candidate.setup.tp == 1
        if candidate.fits:
            self.plan_s[alone] = min(self.plan_s[alone], candidate.step_time_s)

    def _note(self, candidate: Candidate) -> None:
        kind = parallelism(candidate.setup)
        if candidate.fits:
            self.fastest_s[kind] = min(self.fastest_s.get(kind, math.inf), candidate.step_time_s)
        else:
            self.over_bytes[kind] = min(self.over_bytes.get(kind, candidate.over_bytes), candidate.over_bytes)

    def would_tell(self, seconds: float, setup: Setup) -> bool:
        """Whether `setup` would be listed if it takes so long, or be the fastest of those that shard state alone, or of
        the others; of a kind of which none fits, few are tried."""
        alone = setup.tp == 1
        if seconds < self.plan_s[alone] < math.inf or (self.plan_s[alone] == math.inf and self.tried[alone] < _TRIED):
            return True
        return len(self.fastest_s) < self.top or seconds < sorted(self.fastest_s.values())[self.top - 1]

    def would_list_as_too_large(self, setup: Setup, over_bytes: float) -> bool:
        """Whether a setup that is so much too large would be among the nearest that are listed."""
        nearer = sum(each <= over_bytes for each in self.over_bytes.values())
        return nearer < NEAREST and over_bytes < self.over_bytes.get(parallelism(setup), math.inf)


def _by_hand(setup: Setup) -> Setup:
    """The setup whose tensor-parallel ranks do what they would by hand."""
    return replace(setup, solved=False)
