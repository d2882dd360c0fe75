"""`price`: what one way to run takes, as a search prices it: parts of the step and of the memory, and FLOPs used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any, get_args

import torch
from torch import nn

from autopar.options import Options
from autopar.runs.leads import EXPERTS_ERROR
from autopar.runs.price_text import price_text
from autopar.runs.subject import Subject, check_nodes, states_text, subject
from costmodel.hardware import Hardware
from costmodel.presets import hardware as hardware_of
from costmodel.presets import stand_in_notes
from passes.capture.collector import settled
from passes.plan.report_text import step_text
from passes.planner.pipeline import Progress
from passes.program.precision import Precision
from passes.runs.candidate import NO_LAYERS, estimate
from passes.runs.estimate import Estimate
from passes.runs.setup import Dispatcher, Setup, State
from passes.space.recompute import Mode

_COUNTS = (
    "dp_replicate", "dp_shard", "tp", "pp", "cp", "ep", "virtual", "micro_batch", "accumulate",
)  # fmt: skip
_LEAST_BALANCE = 0.02
"""Of a step, that balanced stages may save where a price says so."""
_LAUNCHES_MS = 7, 17
"""What launching a layer with experts took a CPU in a micro-batch, forward and backward, whatever GPU and model: steps
of Megatron-LM's runs of one sequence and of four differ by what is priced, and have 7.4 and 7.5 ms a layer on H100, 9.2
on B200, 8 to 10 on AWS's B300 and 16 to 17 on its H100 besides (benchmarks/data/experts.csv)."""
_TOO_FAST = ((7e-3, 0.33), (13e-3, 0.22))
"""Up to so many seconds of a layer and micro-batch: by how much published runs (19 and 29) are priced too fast on
average (benchmarks/published_results.md)."""


@dataclass(frozen=True)
class Price:
    """Seconds of a step and bytes of the busiest rank; `seconds` and `bytes` say of what.

    `hidden_s`: what is sent behind compute. `model_flops`: of products and attention in a step on all GPUs, none
    counted twice, and of causal attention what kernels compute. `peak_flops_per_s`: of one GPU, in the dtype that
    products run in.
    """

    model: str
    hardware: str
    setup: Setup
    sequence: int | None
    """Tokens of a sample; None where it has none."""
    step_time_s: float
    peak_memory_bytes: int
    budget_bytes: int
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    hidden_s: float
    model_flops: float
    peak_flops_per_s: float
    notes: tuple[str, ...] = ()
    fused_attention: bool = False
    """Whether attention was priced as a framework's kernel, however the model writes it."""

    @property
    def gpus(self) -> int:
        return self.setup.ranks

    @property
    def fits(self) -> bool:
        return self.over_bytes == 0

    @property
    def over_bytes(self) -> int:
        """By how much it does not fit; 0 where it does."""
        return max(0, self.peak_memory_bytes - self.budget_bytes)

    @property
    def units_per_s(self) -> float:
        """Tokens (samples, where these have none) per second and GPU."""
        return self.setup.global_batch * (self.sequence or 1) / self.step_time_s / self.gpus

    @property
    def utilisation(self) -> float:
        """Share of the peak that model FLOPs are."""
        return self.model_flops / (self.step_time_s * self.gpus * self.peak_flops_per_s)

    def __str__(self) -> str:
        return self.text()

    def text(self, name: str | None = None, measured_s: float | None = None) -> str:
        """As people read it; `name` is what the model is called, `measured_s` what a step was seen to take."""
        return price_text(self, name, measured_s)

    def to_json(self, measured_s: float | None = None) -> str:
        """All of it, for scripts; with what a step was seen to take, that and the error."""
        content = {
            "format": "autopar-price", "version": 1, **asdict(self), "gpus": self.gpus,
            "global_batch": self.setup.global_batch, "over_bytes": self.over_bytes, "utilisation": self.utilisation,
            "units_per_s": self.units_per_s, "priced_only": list(self.setup.priced_only),
        }  # fmt: skip
        if measured_s is not None:
            content |= {"measured_s": measured_s, "error": self.step_time_s / measured_s - 1}
        return json.dumps(content, indent=1)


@settled()
def price(
    model: nn.Module,
    setup: Setup,
    hardware: str | Hardware | None = None,
    example_inputs: Any = None,
    *,
    sequence: int | None = None,
    options: Options | None = None,
    fused_attention: bool = False,
    progress: Progress = lambda stage: None,
) -> Price:
    """What a step of `model` takes as `setup` says, on as many devices as its ranks; no process group is built.

    `example_inputs`, `sequence` and `options` (`memory_budget`, `optimizer`, `batch_dims`) are as for `search`, which
    prices the same setup alike. `fused_attention`: attention that the model writes out (sinks, soft caps, eager), or
    gives a mask or dropout, is priced as a framework's kernel for it, though plans run it as written.

    Raises:
        ValueError: ranks that fill no nodes, stages or parts that the model has not, what has no price; names the
            field of `setup`.
    """
    if not isinstance(setup, Setup):
        raise ValueError(f"setup is a {type(setup).__name__}; pass autopar.Setup(...)")
    machine = hardware_of(hardware)
    _check_fields(setup, machine)
    precision = Precision(reductions=torch.float32) if setup.gradient_bytes == 4 and setup.is_played else None
    options = Options() if options is None else options
    asked = subject(
        model, machine, example_inputs, sequence, options, progress, precision, fused_attention=fused_attention
    )  # fmt: skip
    _check_model(setup, asked)
    progress("playing the step")
    found = estimate(setup, asked.profiler)
    peaks = asked.hardware.device.peak_flops_per_s
    progress("counting FLOPs")
    products = asked.profiler.products
    return Price(
        asked.name, machine.label, setup, asked.length, found.step_s, math.ceil(found.peak_bytes),
        asked.budget_bytes(setup.ranks), dict(found.seconds), dict(found.bytes), found.hidden_s,
        products.flops * setup.global_batch, peaks["float8" if setup.fp8 else products.dtype],
        (*_notes(found, asked), *_balance_notes(found, asked), *stand_in_notes(hardware)), fused_attention,
    )  # fmt: skip


def _check_fields(setup: Setup, machine: Hardware) -> None:
    for name in _COUNTS:
        value = getattr(setup, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: a whole number")
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    words = {
        "state": get_args(State), "recompute": get_args(Mode), "in_block": get_args(Mode),
        "dispatcher": get_args(Dispatcher),
    }  # fmt: skip
    for name, known in words.items():
        if (told := getattr(setup, name)) not in known:
            raise ValueError(f"{name}={told!r}: one of {', '.join(known)}")
    if setup.gradient_bytes not in (2, 4):
        raise ValueError(f"gradient_bytes={setup.gradient_bytes}: 2 or 4")
    if not 0 <= setup.gather_bytes_per_s < math.inf:
        raise ValueError(
            f"gather_bytes_per_s={setup.gather_bytes_per_s}: bytes per second, or 0 where gathers run beside compute"
        )
    check_nodes(setup.ranks, machine)
    if machine.shared_host and setup.priced_only:
        raise ValueError(
            f"{', '.join(setup.priced_only)} on {machine.label}: ranks share one host there, for which plans alone are "
            "priced; name a GPU"
        )
    if setup.fp8 and "float8" not in machine.device.peak_flops_per_s:
        raise ValueError(f"fp8=True: {machine.label} has no fp8 matrix products; leave it out")
    if setup.dp_replicate > 1 and not setup.is_played:
        raise ValueError(
            f"dp_replicate={setup.dp_replicate}: copies of sharded state are priced under zero3 without stages, "
            "context or expert parallelism; count all data-parallel ranks in dp_shard"
        )
    _check_idle(setup)


def _check_idle(setup: Setup) -> None:
    """Refuse what would change nothing: whoever asked for it takes the price to have it."""
    full = f"recompute={setup.recompute!r}; layers are run again to their end under 'full' alone"
    unblocked = "no layers are run again to their end; whole_blocks=True and recompute='full' do that"
    kept = "reshard=False; gathered parameters are kept for backward"
    unfreed = f"state={setup.state!r}; gathered parameters are kept or freed under 'zero3' alone"
    unshared = f"state={setup.state!r}; what was updated is gathered once a step under 'zero1' and 'zero2' alone"
    alone = "tp=1; there are no tensor-parallel ranks, leave it out"
    ungathered = (
        "dp_shard=1; there is nothing to gather"
        if setup.is_played
        else "gathers are waited for so under 'zero3' without stages, context or expert parallelism alone"
    )
    gathers = setup.is_played and setup.dp_shard > 1
    staged = "pp=1; there are no stages, leave it out"
    unsent = "ep=1; no tokens are sent, leave it out"
    played = "state='zero3'; without stages, context or expert parallelism it runs as a plan does"
    for idle, name, why in (
        (setup.whole_blocks and not setup.runs_whole, "whole_blocks=True", full),
        (not setup.reshard and setup.state != "zero3", "reshard=False", unfreed),
        (not setup.sequence_parallel and setup.tp == 1, "sequence_parallel=False", alone),
        (setup.gathers_again and setup.tp == 1, "gathers_again=True", alone),
        (setup.tp_overlap and setup.tp == 1, "tp_overlap=True", alone),
        (setup.tp_waits and setup.tp == 1, "tp_waits=True", alone),
        (setup.tp_overlap and setup.tp_waits, "tp_overlap=True", "tp_waits=True; collectives do one of them"),
        (setup.solved and setup.tp == 1, "solved=True", alone),
        (setup.in_block != "pointwise" and not setup.runs_whole, f"in_block={setup.in_block!r}", unblocked),
        (setup.experts_beside and setup.ep == 1, "experts_beside=True", unsent),
        (
            setup.experts_beside and setup.accumulate == 1,
            "experts_beside=True",
            "accumulate=1; there is no other micro-batch to send them beside",
        ),
        (
            setup.experts_beside and setup.pp > 1 and setup.virtual == 1,
            "experts_beside=True",
            f"virtual=1; a forward and a backward run in pairs where the {setup.pp} stages are interleaved alone",
        ),
        (setup.dispatcher != "hybridep" and setup.ep == 1, f"dispatcher={setup.dispatcher!r}", unsent),
        (setup.experts_cut and setup.ep == 1, "experts_cut=True", "ep=1; tensor-parallel ranks cut experts anyway"),
        (setup.experts_cut and setup.tp == 1, "experts_cut=True", alone),
        (setup.virtual > 1 and setup.pp == 1, f"virtual={setup.virtual}", staged),
        (setup.balanced and setup.pp == 1, "balanced=True", staged),
        (setup.ends_count and setup.pp == 1, "ends_count=True", staged),
        (setup.ends_count and setup.balanced, "ends_count=True", "balanced=True; one says how layers are spread"),
        (setup.gather_bytes_per_s and not gathers, f"gather_bytes_per_s={setup.gather_bytes_per_s:g}", ungathered),
        (setup.gathers_late and not gathers, "gathers_late=True", ungathered),
        (setup.gathers_late and not setup.reshard, "gathers_late=True", kept),
        (setup.gathers_late and setup.gather_bytes_per_s, "gathers_late=True", "gather_bytes_per_s has all waited for"),
        (not setup.overlap and setup.is_played, "overlap=False", played),
        (setup.gathers_waited and setup.state not in ("zero1", "zero2"), "gathers_waited=True", unshared),
        (setup.gathers_waited and not setup.overlap, "gathers_waited=True", "overlap=False; all is waited for"),
        (setup.adds_in_products and setup.is_played, "adds_in_products=True", played),
    ):
        if idle:
            raise ValueError(f"{name}, but {why}")


def _check_model(setup: Setup, asked: Subject) -> None:
    layers = asked.profiler.layers
    if setup.ep > 1 and (told := asked.unrouted_experts(setup)):
        raise ValueError(
            f"ep={setup.ep}, but no routed experts were found: the model's config has {told}, its code puts every "
            "token through all of them; leave it out"
        )
    if setup.pp > 1 and not layers:
        raise ValueError(f"pp={setup.pp}, but {NO_LAYERS}; pp=1 is priced")
    if setup.pp > max(1, layers):
        raise ValueError(f"pp={setup.pp}, but the model has {layers} repeated layers; at most that")
    if setup.virtual > 1 and (most := math.ceil(layers / setup.pp)) % setup.virtual:
        raise ValueError(
            f"virtual={setup.virtual}: a stage's {most} of {layers} layers are not cut evenly into that many parts"
        )
    if setup.ends_count and (layers + 2) % setup.pp:
        raise ValueError(
            f"ends_count=True, but {layers} layers, an embedding and a head are not spread evenly over {setup.pp} "
            "stages"
        )
    if setup.cp > 1 and asked.cut_length is None:
        raise ValueError(f"cp={setup.cp}: a sequence can be cut where inputs come from the model's config alone")
    if setup.cp > 1 and asked.cut_length is not None and asked.cut_length % setup.cp:
        raise ValueError(f"cp={setup.cp} does not divide a sequence of {asked.cut_length}")


def _balance_notes(found: Estimate, asked: Subject) -> list[str]:
    """What stages would gain by fewer layers beside the head."""
    setup = found.setup
    if setup.pp == 1 or setup.balanced:
        return []
    balanced = estimate(replace(setup, balanced=True, ends_count=False), asked.profiler)
    if balanced.step_s >= (1 - _LEAST_BALANCE) * found.step_s:
        return []
    return [
        f"the head makes the last of {setup.pp} stages the slowest: with fewer layers there (--balanced-stages, "
        f"Setup.balanced) a step takes {step_text(balanced.step_s)}"
    ]


def layer_seconds(found: Estimate, layers: int) -> float:
    """Of a GPU, for each of a stage's `layers` and each micro-batch, forward and backward."""
    passes = found.setup.accumulate * layers / found.setup.pp
    return sum(found.seconds[name] for name in ("compute", "experts", "slowed")) / passes


def launches_notes(found: Estimate, layers: int) -> list[str]:
    """What is said of a layer with shared experts that takes the GPU less than launching it takes a CPU."""
    setup = found.setup
    if setup.ep == 1:
        return []
    layer_s = layer_seconds(found, layers)
    told = [(1e3 * most_s, share) for most_s, share in _TOO_FAST if layer_s < most_s]
    if not told:
        return []
    (most_ms, share), (low, high) = told[0], _LAUNCHES_MS
    return [
        f"launches are not priced: a layer takes the GPU {1e3 * layer_s:.1f} ms in a micro-batch, and launching it has "
        f"taken Megatron-LM {low} to {high} ms; published runs with layers under {most_ms:.0f} ms were priced "
        f"{share:.0%} too fast on average; larger micro-batches, or a step that is one CUDA graph "
        "(--cuda-graph-impl full_iteration), hide launches"
    ]


def _notes(found: Estimate, asked: Subject) -> list[str]:
    setup, notes = found.setup, list[str]()
    if not asked.hardware.shared_host:
        error = EXPERTS_ERROR if setup.ep > 1 else asked.hardware.device.step_error
        notes.append(f"predictions of such steps are off by {error:.0%} on average")
    notes += asked.attention_notes(setup) + asked.experts_notes(setup) + launches_notes(found, asked.profiler.layers)
    node = asked.hardware.ranks_per_node
    if setup.tp > node:
        notes.append(
            f"tensor parallelism over {setup.tp} crosses nodes, which have {node} GPU{'s' * (node > 1)} each; a "
            'hardware file with another "ranks_per_node" says otherwise'
        )
    notes += asked.step_notes(setup, found.step_s, found.seconds["optimizer"], found.peak_bytes)
    notes.append(states_text(asked.profiler.optimizer))
    if asked.unpriced:
        notes.append(f"not priced: {', '.join(asked.unpriced)}")
    return notes
