"""Schedules at full depth for any mesh, from captures of a few layers: what the search and the published runs ask.

One capture per global micro-batch serves every mesh; one analysis per capture, every strategy. See `shallow`, `depth`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from autopar import examples
from autopar.api import skeleton
from autopar.runs.restricted import with_data_parallel_state, with_replicas, without_sequence_parallelism
from autopar.runs.shallow import Shallow, shallow
from costmodel.hardware import Hardware, Topology, topology
from costmodel.memory import OptimizerSpec
from passes.analysis.analysis import Analysis
from passes.analysis.fusion import Fused
from passes.capture.capture import capture
from passes.capture.collector import settled
from passes.capture.inputs import global_inputs
from passes.padding.pad import Pad
from passes.padding.paddings import PaddingsOf
from passes.padding.uneven import uneven_dims, used_pads
from passes.planner.pipeline import Progress, prepare
from passes.planner.proposals import HIDDEN_SHARES
from passes.play.schedule import Schedule, play
from passes.play.tracks import Costs, Tracks, tracks
from passes.prepare.masks import masks_as_shares
from passes.price.price import price
from passes.program.precision import Precision
from passes.program.program import Program
from passes.runs.depth import Profile, profile, sample
from passes.runs.model_flops import ModelFlops, model_flops
from passes.runs.rebatch import Told, copy_of, rebatched, told
from passes.runs.setup import Setup
from passes.solver.solve import solve
from passes.space.recompute import Mode, Recomputation, recomputation
from passes.space.space import Space, search_space
from passes.tokens.routing import expert_count

Call = Callable[[int], Any]
"""Context-parallel parts -> example inputs of one sample's part of the sequence."""


class Captures:
    """Programs of one model and their analyses, each made once: what hardware and setups have in common."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Call,
        *,
        batch_dims: Mapping[str, int | None] | None = None,
        precision: Precision | None = None,
        fused_attention: bool = False,
        progress: Progress = lambda stage: None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.batch_dims = batch_dims
        self.precision = precision
        self.fused_attention = fused_attention
        """Whether attention that the model writes out, or masks, is captured as frameworks' kernels run it."""
        self.progress = progress
        self.shallow: Shallow = shallow(skeleton(model))
        self._programs: dict[tuple[int, int, int], Program] = {}
        self._told: dict[tuple[int, int, int], Told] = {}
        """What was captured, as it was before it was prepared."""
        self._batches: dict[tuple[int, int], int] = {}
        """(prefix, parts) -> the last batch that was captured."""
        self._paddings: dict[tuple[int, int, int, Fused], PaddingsOf] = {}

    def program(self, prefix: int, batch: int, parts: int) -> Program:
        """The prefix of the model fed `batch` samples, cut into `parts` along the sequence.

        All but the shallowest are made of what was captured at another batch, where that is certain to be the same.
        """
        key = (prefix, batch, parts)
        if key not in self._programs:
            made = self._rebatched(prefix, batch, parts) or copy_of(self._captured(prefix, batch, parts).program)
            self._programs[key] = prepare(masks_as_shares(made) if self.fused_attention else made)
        return self._programs[key]

    @property
    def prepared_notes(self) -> tuple[str, ...]:
        """What preparing them changed in how the programs run."""
        captured = {note for each in self._told.values() for note in each.program.notes}
        notes = (note for program in self._programs.values() for note in program.notes)
        return tuple(dict.fromkeys(note for note in notes if note not in captured))

    def _rebatched(self, prefix: int, batch: int, parts: int) -> Program | None:
        before = self._batches.get((prefix, parts))
        if prefix == 0 or before is None:
            return None
        deep, like = self._captured(prefix, before, parts), self._captured(0, before, parts)
        return rebatched(deep, like, self._captured(0, batch, parts))

    def _captured(self, prefix: int, batch: int, parts: int) -> Told:
        key = (prefix, batch, parts)
        if key not in self._told:
            model = self.shallow.prefixes[prefix].model
            self.progress(f"capturing: {self.shallow.prefixes[prefix].layers} layers, batch {batch}")
            args, kwargs = examples.on_cpu(examples.call_of(model, self.inputs(parts)))
            whole = global_inputs(args, kwargs, batch, self.batch_dims)
            with settled():
                program = capture(
                    model, whole.args, whole.kwargs, batch_dims=whole.batch_dims, batch_size=whole.batch_size,
                    precision=self.precision, fused_attention=self.fused_attention,
                )  # fmt: skip
            self._told[key] = told(program)
            self._batches[prefix, parts] = batch
        return self._told[key]

    def paddings(
        self, prefix: int, batch: int, parts: int, fused: Fused, sizes: Sequence[int], batch_axes: tuple[int, ...]
    ) -> PaddingsOf:
        """Of that program on a mesh, with all ops compiled, none, or those that `fused` says."""
        key = (prefix, batch, parts, fused)
        if key not in self._paddings:
            self._paddings[key] = PaddingsOf(self.program(prefix, batch, parts), sizes, batch_axes, fused=fused)
        return self._paddings[key].on(sizes, batch_axes)


class Profiler:
    """Profiles of one model on one kind of hardware, each made once.

    `fused`: whether ops run compiled, or which; `in_place`: which leave no tensors behind, where those are others;
    `recomputation`: what a recompute mode means.
    """

    def __init__(
        self,
        captures: Captures,
        hardware: Hardware,
        optimizer: OptimizerSpec,
        *,
        fused: Fused = True,
        in_place: Fused | None = None,
        recomputation: Callable[[Analysis, Mode], Recomputation] = recomputation,
    ) -> None:
        self.captures = captures
        self.hardware = hardware
        self.optimizer = optimizer
        self.fused = fused
        self.in_place = fused if in_place is None else in_place
        self.recomputation = recomputation
        self._profiles: dict[object, Profile] = {}
        self._spaces: dict[object, Space] = {}
        self._recomputations: dict[tuple[int, Mode], Recomputation] = {}
        self._seconds: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        """Sites of a space that is kept, by identity -> see `price`."""
        self._costs: dict[int, Costs] = defaultdict(dict)
        """The same -> see `tracks`."""

    @property
    def layers(self) -> int:
        """Repeated layers of the model; 0 where there are none."""
        return self.captures.shallow.layers

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer; 0 where there are none."""
        return expert_count(self.captures.program(len(self.captures.shallow.prefixes) - 1, 1, 1))

    @cached_property
    def products(self) -> ModelFlops:
        """Of one sample's step."""
        prefixes = self.captures.shallow.prefixes
        found = [model_flops(self.captures.program(i, 1, 1)) for i in range(len(prefixes))]
        return ModelFlops(sum(p.weight * each.flops for p, each in zip(prefixes, found, strict=True)), found[-1].dtype)

    def profile(self, setup: Setup, *, replica: bool) -> Profile:
        """See `candidate.Profiler`."""
        axes = {"tp": setup.tp} if replica else _axes(setup)
        parts = setup.cp if replica else 1
        batch = setup.micro_batch * (1 if replica else setup.data_ranks)
        accumulates = setup.accumulate > 1 and not replica
        split = setup.sequence_parallel or setup.tp == 1
        key = (
            tuple(axes.items()),
            setup.ranks,
            parts,
            batch,
            setup.recompute,
            setup.fp8,
            accumulates,
            split,
            setup.tp_overlap and not replica,
            setup.reshard or replica,
            setup.gathers_again and not replica,
            setup.solved,
        )
        if key not in self._profiles:
            self._profiles[key] = self._made(setup, batch, parts, axes, whole=replica)
        return self._profiles[key]

    @settled()
    def _made(self, setup: Setup, batch: int, parts: int, axes: dict[str, int], *, whole: bool) -> Profile:
        hardware = _fp8(self.hardware) if setup.fp8 else self.hardware
        prefixes = self.captures.shallow.prefixes
        samples: list[dict[str, float]] = []
        like: _Picked | None = None
        for prefix in reversed(range(len(prefixes))):  # what the deepest picks, the others do too
            like = self._picked(prefix, batch, parts, axes, setup, hardware, like, whole=whole)
            samples.insert(0, self._sample(like, setup, whole=whole))
        return profile(samples, [p.weight for p in prefixes], [p.outside for p in prefixes], self.layers)

    def _sample(self, picked: _Picked, setup: Setup, *, whole: bool) -> dict[str, float]:
        space, assignment = picked.space, picked.assignment
        laid = self._tracks(space, assignment)
        return sample(space, assignment, self._played(space, assignment, laid, setup, whole), laid, self.in_place)

    def _picked(
        self, prefix: int, batch: int, parts: int, axes: dict[str, int], setup: Setup, hardware: Hardware,
        like: _Picked | None, *, whole: bool,
    ) -> _Picked:  # fmt: skip
        """What the setup's strategy picks for a prefix, padded where it wants to split what its axes do not divide:
        the same as for a deeper one (`like`) where both decide among the same options, or what the solver finds."""
        mesh = topology(hardware, axes, setup.ranks)
        batch_axes = tuple(i for i, name in enumerate(axes) if name.startswith("dp"))
        strategy = _strategy(setup, whole=whole)
        of = self.captures.paddings(prefix, batch, parts, self.fused, mesh.sizes, batch_axes)
        paddings = of.under(strategy, of.may_repeat_keys(strategy))
        wanted = uneven_dims(paddings.whole, mesh.sizes, batch_axes, strategy)
        split = setup.sequence_parallel

        def space_of(pads: tuple[Pad, ...]) -> Space:
            analysis = paddings.of(pads).analysis
            space = self._space(analysis, mesh, batch_axes, strategy, split=split)
            key = id(analysis), setup.recompute
            if key not in self._recomputations:
                self._recomputations[key] = self.recomputation(analysis, setup.recompute)
            regather = setup.gathers_again and not whole
            again = replace(self._recomputations[key], reshard=setup.reshard or whole, regather=regather)
            parts = setup.tp_overlap and not whole
            return replace(space, recomputed=again, async_tp=parts, fp8=setup.fp8 and whole)

        if like is not None and [(p.size, p.padded) for p in wanted] == [(p.size, p.padded) for p in like.wanted]:
            space = space_of(tuple(pad for pad, kept in zip(wanted, like.kept, strict=True) if kept))
            if [(s.name, s.options) for s in space.sites] == [(s.name, s.options) for s in like.space.sites]:
                return replace(like, space=space, wanted=wanted)
        space = space_of(wanted)
        assignment = self._quickest(space, setup, whole=whole)
        used = used_pads(paddings.of(wanted), space, assignment)
        if used != wanted:
            space = space_of(used)
            assignment = self._quickest(space, setup, whole=whole)
        return _Picked(space, assignment, wanted, tuple(pad in used for pad in wanted))

    def _quickest(self, space: Space, setup: Setup, *, whole: bool) -> tuple[int, ...]:
        """What the solver finds; under `auto` with all that state takes counted, or what often stays exposed of it,
        whichever the schedule has as faster. On one data-parallel rank, whose step is a bound, all is counted."""
        priced = price(space, self.optimizer, self._seconds[id(space.sites)])
        problems = [priced.problem]
        if space.strategy == "auto" and not whole:
            problems.append(priced.weighed(HIDDEN_SHARES[1]))
        found = {priced.assignment(solve(problem).picks, len(space.sites)): None for problem in problems}
        if len(found) == 1:
            return next(iter(found))
        plays = {each: self._played(space, each, self._tracks(space, each), setup, whole) for each in found}
        return min(plays, key=lambda each: plays[each].micro_batch_s)

    def _tracks(self, space: Space, assignment: tuple[int, ...]) -> Tracks:
        return tracks(space, assignment, self._costs[id(space.sites)])

    def _played(self, space: Space, assignment: tuple[int, ...], laid: Tracks, setup: Setup, whole: bool) -> Schedule:
        accumulate = 1 if whole else min(2, setup.accumulate)
        return play(
            space, assignment, optimizer=self.optimizer, accumulate=accumulate, compiled=self.in_place, events=whole,
            laid=laid,
        )  # fmt: skip

    def _space(
        self, analysis: Analysis, mesh: Topology, batch_axes: tuple[int, ...], strategy: str, *, split: bool
    ) -> Space:
        """A strategy's space; `split`: whether tensor axes may split the sequence."""
        key = (id(analysis), mesh, strategy, split)
        if key not in self._spaces:
            space = search_space(analysis.program, mesh, batch_axes, strategy=strategy, analysis=analysis)
            if strategy == "auto":
                space = with_data_parallel_state(space)
            if any(axis.name == "dp_replicate" for axis in mesh.axes):
                space = with_replicas(space, strategy)
            self._spaces[key] = space if split else without_sequence_parallelism(space)
        return self._spaces[key]


@dataclass(frozen=True)
class _Picked:
    """An option per site, and which of the dims that the strategy `wanted` padded are padded."""

    space: Space
    assignment: tuple[int, ...]
    wanted: tuple[Pad, ...]
    kept: tuple[bool, ...]


def _strategy(setup: Setup, *, whole: bool) -> str:
    """What a setup's plan is restricted to; `whole`: on one data-parallel rank."""
    if setup.tp > 1:
        return "auto" if setup.solved else "megatron"
    return "ddp" if whole else "fsdp"


def _axes(setup: Setup) -> dict[str, int]:
    """The mesh of a setup that a plan can do, outermost axis first."""
    axes = {"dp_replicate": setup.dp_replicate, "dp_shard": setup.dp_shard, "tp": setup.tp}
    return {name: size for name, size in axes.items() if size > 1} or {"dp_shard": 1}


def _fp8(hardware: Hardware) -> Hardware:
    """`hardware` whose bf16 products run at its fp8 rate.

    Raises:
        ValueError: it has no fp8 rate.
    """
    device = hardware.device
    if "float8" not in device.peak_flops_per_s:
        raise ValueError(f"{hardware.name} has no fp8 matrix products")
    efficiency = device.fp8_matmul_efficiency or device.matmul_efficiency
    rate = device.peak_flops_per_s["float8"] * efficiency / device.matmul_efficiency
    half = device.peak_flops_per_s["bfloat16"]
    # attention stays in bf16: its efficiency is of the bf16 peak
    faster = replace(
        device,
        name=f"{device.name}, fp8",
        peak_flops_per_s={**device.peak_flops_per_s, "bfloat16": rate, "float16": rate},
        attention_efficiency=device.attention_efficiency * half / rate,
        attention_backward_efficiency=device.attention_backward_efficiency * half / rate,
    )
    return replace(hardware, name=f"{hardware.name}, fp8", device=faster)
