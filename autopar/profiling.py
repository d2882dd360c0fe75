"""Schedules at full depth for any mesh, from captures of a few layers: what the search and the published runs ask.

One capture per global micro-batch serves every mesh; one analysis per capture, every strategy. See `shallow`, `depth`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from autopar import examples, planning
from autopar.api import skeleton
from autopar.shallow import Shallow, shallow
from costmodel.hardware import Hardware, topology
from costmodel.memory import OptimizerSpec
from passes.analysis import Analysis, analyse
from passes.candidate import Setup
from passes.depth import Profile, profile, sample
from passes.fusion import Fused
from passes.inputs import global_inputs
from passes.price import Budgeted, price
from passes.program import Program
from passes.recompute import Mode, Recomputation, recomputation
from passes.routing import has_routed, route_by_blocks, token_parts
from passes.schedule import play
from passes.solve import solve
from passes.space import Space, search_space
from passes.strategies import StoredOption

Call = Callable[[int], Any]
"""Context-parallel parts -> example inputs of one sample's part of the sequence."""


class Profiler:
    """Profiles of one model on one kind of hardware, each made once.

    `fused`: which ops run compiled, where that is not all or none; `recomputation`: what a recompute mode means.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Call,
        hardware: Hardware,
        optimizer: OptimizerSpec,
        *,
        compiled: bool = True,
        fused: Fused | None = None,
        recomputation: Callable[[Analysis, Mode], Recomputation] = recomputation,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.hardware = hardware
        self.optimizer = optimizer
        self.compiled = compiled
        self.fused: Fused = compiled if fused is None else fused
        self.recomputation = recomputation
        self.progress = progress
        self.shallow: Shallow = shallow(skeleton(model))
        self._programs: dict[tuple[int, int, int], Program] = {}
        self._analyses: dict[tuple[int, int], Analysis] = {}
        self._profiles: dict[object, Profile] = {}

    def program(self, prefix: int, batch: int, parts: int) -> Program:
        """The prefix of the model fed `batch` samples, cut into `parts` along the sequence."""
        key = (prefix, batch, parts)
        if key not in self._programs:
            model = self.shallow.prefixes[prefix].model
            self.progress(f"capturing {self.shallow.prefixes[prefix].layers} layers, batch {batch}")
            args, kwargs = examples.on_cpu(examples.call_of(model, self.inputs(parts)))
            whole = global_inputs(args, kwargs, batch)
            self._programs[key] = planning.captured(
                model, whole.args, whole.kwargs, batch_dims=whole.batch_dims, batch_size=whole.batch_size
            )
        return self._programs[key]

    def analysis(self, program: Program, strategy: str, sizes: Sequence[int], batch_axes: Sequence[int]) -> Analysis:
        """Of a program of `program`, under a strategy: routed experts depend on how many parts the tokens have."""
        parts = token_parts(program, strategy, sizes, batch_axes) if has_routed(program) else 1
        key = (id(program), parts)
        if key not in self._analyses:
            self._analyses[key] = analyse(route_by_blocks(program, parts), fused=self.fused)
        return self._analyses[key]

    def profile(self, setup: Setup, *, replica: bool) -> Profile:
        """See `candidate.Profiler`."""
        axes = {"tp": setup.tp} if replica else _axes(setup)
        parts = setup.cp if replica else 1
        batch = setup.micro_batch * (1 if replica else setup.data_ranks)
        accumulates = setup.accumulate > 1 and not replica
        key = (tuple(axes.items()), parts, batch, setup.recompute, setup.fp8, accumulates)
        if key not in self._profiles:
            hardware = _fp8(self.hardware) if setup.fp8 else self.hardware
            prefixes = self.shallow.prefixes
            samples = [
                self._sample(i, batch, parts, axes, setup, hardware, whole=replica) for i in range(len(prefixes))
            ]
            self._profiles[key] = profile(
                samples, [p.weight for p in prefixes], [p.outside for p in prefixes], self.shallow.layers
            )
        return self._profiles[key]

    def _sample(
        self, prefix: int, batch: int, parts: int, axes: dict[str, int], setup: Setup, hardware: Hardware, *,
        whole: bool,
    ) -> dict[str, float]:  # fmt: skip
        mesh = topology(hardware, axes)
        batch_axes = tuple(i for i, name in enumerate(axes) if name.startswith("dp"))
        strategy = "megatron" if axes.get("tp", 1) > 1 else "ddp" if whole else "fsdp"
        analysis = self.analysis(self.program(prefix, batch, parts), strategy, mesh.sizes, batch_axes)
        space = search_space(analysis.program, mesh, batch_axes, strategy=strategy, analysis=analysis)
        if "dp_replicate" in axes:
            space = _replicating(space, analysis, strategy)
        space = replace(space, recomputed=self.recomputation(analysis, setup.recompute))
        spec = self.optimizer
        priced = price(space, optimizer=Budgeted(int(spec.state_bytes_per_param + spec.master_bytes_per_param)))
        assignment = priced.assignment(solve(priced.problem).picks, len(space.sites))
        schedule = play(
            space,
            assignment,
            optimizer=spec,
            accumulate=1 if whole else min(2, setup.accumulate),
            compiled=self.compiled,
        )
        return sample(space, assignment, schedule)


def _axes(setup: Setup) -> dict[str, int]:
    """The mesh of a setup that a plan can do, outermost axis first."""
    axes = {"dp_replicate": setup.dp_replicate, "dp_shard": setup.dp_shard, "tp": setup.tp}
    return {name: size for name, size in axes.items() if size > 1} or {"dp_shard": 1}


def _replicating(space: Space, analysis: Analysis, strategy: str) -> Space:
    """`space` with parameters stored as HSDP does: sharded over `dp_shard`, alike on every rank of `dp_replicate`."""
    names = [axis.name for axis in space.topology.axes]
    shard = (names.index("dp_shard"),) if "dp_shard" in names else ()
    every = search_space(analysis.program, space.topology, space.batch_axes, strategy="auto", analysis=analysis)
    sites = []
    for site, free in zip(space.sites, every.sites, strict=True):
        if site.given is not None and site.given.kind == "parameter":
            computed = {o.layout for o in site.options if isinstance(o, StoredOption)}
            data = [i for i, name in enumerate(names) if name.startswith("dp")]
            kept = tuple(
                option
                for option in free.options
                if isinstance(option, StoredOption)
                and tuple(a for a in option.storage.state_axes if a in data) == shard
                and all(not option.storage.shards[a] for a in data)
                and (strategy != "fsdp" or option.layout in computed)
            )
            site = replace(site, options=kept or site.options)
        sites.append(site)
    return replace(space, sites=tuple(sites))


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
