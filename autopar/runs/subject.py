"""What the search and `price` work on: a model, fed so much, on hardware, with the options that count there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from autopar import examples
from autopar.meshes import MAX_RANKS
from autopar.options import Options, check_options
from autopar.runs.profiling import Captures, Profiler
from autopar.unwrapped import check_unwrapped
from costmodel.hardware import Hardware, topology
from costmodel.memory import OPTIMIZERS, OptimizerSpec
from costmodel.presets import slow_dtype_notes
from passes.capture.default_inputs import default_inputs
from passes.capture.inputs import global_inputs
from passes.planner.pipeline import Progress
from passes.planner.plan_notes import launch_note, tight_note
from passes.program.precision import Precision
from passes.runs.candidate import attends, kernels_of
from passes.runs.setup import Setup

_UNPRICED = ("compile", "mp_policy", "pins", "async_tp")
"""Options of plans that are not priced."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs of `transformers` call the number of a layer's experts."""


FUSED_ATTENTION = (
    "attention is priced as one kernel of a framework (--fused-attention): sinks, soft caps, distances and dropout are "
    "within it, blocks of scores that a mask hides are left out; plans run what the model writes out, whose price is "
    "that without the flag"
)


@dataclass(frozen=True)
class Subject:
    """`options` name the optimizer that is budgeted for. `length`: tokens of a sample; None where it has none.
    `cut_length`: the same where the sequence can be cut, for context parallelism."""

    name: str
    profiler: Profiler
    options: Options
    length: int | None
    cut_length: int | None

    @property
    def hardware(self) -> Hardware:
        return self.profiler.hardware

    def usable_bytes(self, gpus: int) -> int:
        """What each of `gpus` devices has; ranks of one host share what it has."""
        return int(topology(self.hardware, {"ranks": gpus}).device.usable_bytes)

    def budget_bytes(self, gpus: int) -> int:
        """What each of them may use."""
        return self.options.memory_budget or self.usable_bytes(gpus)

    @property
    def unpriced(self) -> list[str]:
        """Options that were given and are not priced."""
        return [name for name in _UNPRICED if getattr(self.options, name) != getattr(Options(), name)]

    def attention_notes(self, setup: Setup) -> list[str]:
        """Why attention runs op by op, where it does: with dropout, or as the model has it."""
        if told := self.profiler.captures.prepared_notes:
            return list(told)
        found = self.profiler.profile(setup, replica=not setup.is_played)
        config = getattr(self.profiler.captures.model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if self.profiler.captures.fused_attention and attends(found):
            return [FUSED_ATTENTION]
        if not heads or attends(found):
            return []
        return [
            "no attention kernel was found: the model's attention is priced op by op, with its scores in memory; "
            "attn_implementation='sdpa', where the model has it, or a framework with a kernel of its own takes less "
            f"time and memory{'' if self.profiler.captures.fused_attention else ', which --fused-attention prices'}"
        ]

    def unrouted_experts(self, setup: Setup) -> str:
        """What the model's config has of experts, in words, where none are routed in its code; else nothing."""
        config = getattr(self.profiler.captures.model, "config", None)
        config = getattr(config, "text_config", config)
        experts = max((getattr(config, name, None) or 0 for name in _EXPERTS), default=0)
        of_a_token = getattr(config, "num_experts_per_tok", None) or experts
        if experts <= of_a_token or "experts" in self.profiler.profile(setup, replica=not setup.is_played).whole:
            return ""
        return f"{experts} with {of_a_token} for a token"

    def experts_notes(self, setup: Setup) -> list[str]:
        """That experts compute what no framework would, where they do."""
        told = self.unrouted_experts(setup)
        if not told:
            return []
        return [
            f"no routed experts were found: the model's config has {told}, but its code puts every token through all "
            "of them, and is priced so; a framework that routes computes less, and expert parallelism is not priced"
        ]

    def step_notes(self, setup: Setup, step_s: float, update_s: float, peak_bytes: float) -> list[str]:
        """What its figures leave out of a setup's step on GPUs: what the allocator loses of the memory where it fits,
        and the host that launches."""
        if self.hardware.shared_host:
            return []
        fits = peak_bytes <= self.budget_bytes(setup.ranks)
        told = (
            tight_note(peak_bytes, self.usable_bytes(setup.ranks)) if fits else None,
            launch_note(kernels_of(setup, self.profiler), (step_s - update_s) / setup.accumulate),
        )
        slow = slow_dtype_notes(self.hardware.device, self.profiler.products.dtype)
        return [*(note for note in told if note), *slow]


def subject(
    model: nn.Module,
    machine: Hardware,
    example_inputs: Any,
    sequence: int | None,
    options: Options,
    progress: Progress,
    precision: Precision | None = None,
    *,
    fused_attention: bool = False,
) -> Subject:
    """`model` fed one sample: `example_inputs`, or what its config asks for, `sequence` long; `fused_attention`: as
    `Captures` has it.

    Raises:
        ValueError: a model without parameters or in a wrapper, options that mean nothing here, inputs of more than one
            sample, a sequence longer than the model's positions.
    """
    check_unwrapped(model)
    check_options(options)
    if options.batch_axes is not None:
        raise ValueError(f"Options(batch_axes={options.batch_axes!r}): axes are no matter here; leave it out")
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to train")
    if sequence is not None and sequence < 1:
        raise ValueError(f"sequence is {sequence}; at least 1 token, or None for what the model's config has")
    length = sequence or sequence_of(model, example_inputs)
    if sequence and example_inputs is None:
        _check_positions(model, sequence)
    if example_inputs is not None:
        args, kwargs = examples.on_cpu(examples.call_of(model, example_inputs))
        if (samples := global_inputs(args, kwargs, 1, options.batch_dims).batch_size) != 1:
            raise ValueError(f"example_inputs has a batch of {samples}; pass one sample: the batch is set by itself")

    def inputs(parts: int) -> Any:
        if example_inputs is not None:
            return example_inputs
        return default_inputs(model, 1, length // parts) if length else default_inputs(model, 1)

    options = replace(options, optimizer=_optimizer(options.optimizer, model))
    captures = Captures(
        model, inputs, batch_dims=options.batch_dims, precision=precision, fused_attention=fused_attention,
        progress=progress,
    )  # fmt: skip
    profiler = Profiler(captures, machine, OPTIMIZERS[options.optimizer])
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    return Subject(name, profiler, options, length, length if example_inputs is None else None)


def check_nodes(gpus: int, machine: Hardware) -> None:
    """Refuse a number of GPUs that does not fill whole nodes, or is more than a mesh can have.

    Raises:
        ValueError: they do not, and names the nearest that do; or they are too many.
    """
    if gpus > MAX_RANKS:
        raise ValueError(f"there are {gpus:,} GPUs; meshes of at most {MAX_RANKS:,} work")
    node = machine.ranks_per_node
    if gpus > node and gpus % node:
        low = gpus // node * node
        raise ValueError(f"{gpus} GPUs fill no whole number of nodes of {node}; use {low} or {low + node}")


def sequence_of(model: nn.Module, example_inputs: Any) -> int | None:
    """Tokens of a sample: the length of the first input of token ids; None where there is none, as for images."""
    args, kwargs = examples.call_of(model, example_inputs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim() == 2]
    return next((int(x.shape[1]) for x in tensors if not x.is_floating_point() and x.dtype != torch.bool), None)


def states_text(spec: OptimizerSpec) -> str:
    """A note on the optimizer that was budgeted for."""
    copy = f", {spec.master_bytes_per_param:g} of them an fp32 copy of it" if spec.master_bytes_per_param else ""
    kept = spec.state_bytes_per_param + spec.master_bytes_per_param
    each = "a value per row and column of a matrix" if spec.factored else f"{kept:g} bytes per parameter{copy}"
    return f"optimizer {spec.name}: {each}; Options.optimizer and --optimizer change that"


def _optimizer(asked: str, model: nn.Module) -> str:
    """What is budgeted for: "adamw" with an fp32 copy of parameters that are held in a lower precision."""
    low = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
    return "adamw-master" if asked == "adamw" and low else "sgd" if asked == "none" else asked


def _check_positions(model: nn.Module, sequence: int) -> None:
    made = default_inputs(model, 1, sequence).get("input_ids")
    if made is not None and made.shape[1] < sequence:
        raise ValueError(f"sequence is {sequence}, but the model has {made.shape[1]} positions; at most that")
