"""What a user can ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch.distributed.fsdp import MixedPrecisionPolicy

from costmodel.memory import OPTIMIZERS

Recompute = Literal["auto", "none", "selective", "widening", "full"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `plan` and `parallelize`; every default is sensible.

    compile: run forward and backward through `torch.compile`'s Inductor; False runs the same graphs uncompiled.
    memory_budget: bytes per device a plan may use; None: what the hardware has, less a stated reserve.
    mp_policy: parameters, gradients and optimizer states stay in the model's dtype while it computes in another, as
        FSDP2's policy says; for the model as a whole (docs/precision.md). None: all in the model's own dtype.
    optimizer: whose states to budget for: "adamw", "adam", "sgd", "momentum", "none", "adamw-bf16", "adamw-8bit",
        "lion", "adafactor", or "adamw-master", which keeps an fp32 copy of each parameter beside two states.
    batch_axes: mesh axes that split the batch; None: by name (dp, dp_replicate, dp_shard, fsdp, data, batch,
        ddp, replicate, shard, data_parallel).
    batch_dims: input path -> the dim the batch axes split, or None for an input every rank shares.
    pins: parameter-name pattern (fnmatch) -> placements in compute such as "RS(0)", one per mesh axis, or at rest and
        in compute: "S(0)S(0) -> RS(0)".
    recompute: what of the activations backward computes again (docs/strategies.md, "Memory"): "auto" decides by memory.
    reshard_after_forward: whether gathered parameters are freed after forward and gathered again for backward, as
        FSDP2's argument of this name; None: "auto" decides by time and memory, other strategies free them.
    regather_activations: whether activations that forward gathered are freed there and gathered again for backward,
        so that a rank keeps its part of them alone, as Megatron's sequence parallelism does; None: where memory asks
        for it.
    accumulate: micro-batches per optimizer step.
    async_tp: has torch split the matrix products beside an all-gather or reduce-scatter of activations, and run each
        part's beside its transfer (micro-pipelined tensor parallelism). On CUDA, between GPUs that reach each other's
        memory (NVLink); priced in the schedule where the axis lies within nodes.
    seed: of dropout and every other random op in the model.
    progress: whether rank 0 says on standard error which stage it is in.
    """

    compile: bool = True
    memory_budget: int | None = None
    mp_policy: MixedPrecisionPolicy | None = None
    optimizer: str = "adamw"
    batch_axes: tuple[str, ...] | None = None
    batch_dims: Mapping[str, int | None] | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    recompute: Recompute = "auto"
    reshard_after_forward: bool | None = None
    regather_activations: bool | None = None
    accumulate: int = 1
    async_tp: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.memory_budget, float) and math.isfinite(self.memory_budget):  # 80e9
            object.__setattr__(self, "memory_budget", int(self.memory_budget))


def _as_argument(name: str, value: Any) -> str:
    return f"Options({name}={value!r})"


def check_options(options: Any, told: Callable[[str, Any], str] = _as_argument) -> None:
    """Refuse options that mean nothing, on any mesh.

    told: a field and its value as whoever gave them wrote them.

    Raises:
        ValueError: names the option, what it is and what would do.
    """
    if not isinstance(options, Options):
        raise ValueError(f"options is a {type(options).__name__}; pass autopar.Options(...)")
    recomputes, optimizers, either = get_args(Recompute), (*OPTIMIZERS, "none"), "True or False"
    for name, good, wanted in (
        ("recompute", options.recompute in recomputes, f"known are {', '.join(recomputes)}"),
        ("optimizer", options.optimizer in optimizers, f"known are {', '.join(optimizers)}"),
        (
            "memory_budget", options.memory_budget is None or _is_positive(options.memory_budget),
            "bytes per device, a positive number; None takes what the hardware has",
        ),
        *(
            (name, isinstance(getattr(options, name), bool | None), f"{either}, or None to have it decided")
            for name in ("reshard_after_forward", "regather_activations")
        ),
        ("accumulate", _is_positive(options.accumulate), "at least 1 micro-batch makes a step; give an int"),
        ("seed", _is_whole(options.seed), "an int"),
        ("compile", isinstance(options.compile, bool), either),
        ("async_tp", isinstance(options.async_tp, bool), either),
        ("progress", isinstance(options.progress, bool), either),
        (
            "batch_axes", options.batch_axes is None or _are_names(options.batch_axes),
            "names of mesh axes, as in ('dp', 'ep')",
        ),
        (
            "batch_dims", options.batch_dims is None or _are_dims(options.batch_dims),
            "a mapping of inputs' names to dims, or to None where all samples share the input",
        ),
        (
            "pins", isinstance(options.pins, Mapping) and _are_names([*options.pins, *options.pins.values()]),
            "a mapping of names' patterns to layouts, as in {'*.q_proj.weight': 'RS(0)'}",
        ),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"{told(name, getattr(options, name))}: {wanted}")


def check_async_tp(options: Options, axes: Sequence[tuple[str, int]], batch_axes: Sequence[int]) -> None:
    """Refuse `async_tp` where it can do nothing.

    Raises:
        ValueError: the step is not compiled, or all axes of the mesh split the batch.
    """
    if not options.compile:
        raise ValueError("Options(async_tp=True, compile=False): it is a pass of the compiler's; leave compile=True")
    if len(batch_axes) == len(axes):
        raise ValueError(
            f"Options(async_tp=True): every axis of {dict(axes)} splits the batch; add one for tensors, such as tp"
        )


def _is_positive(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_whole(value: Any) -> bool:
    """Whether a plan's file can keep a value as an integer, which NumPy's are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _are_names(values: Any) -> bool:
    return (
        isinstance(values, Iterable) and not isinstance(values, str) and all(isinstance(value, str) for value in values)
    )


def _are_dims(values: Any) -> bool:
    return isinstance(values, Mapping) and all(value is None or _is_whole(value) for value in values.values())
