"""The compiler as commands use it: a model on a mesh of so many ranks, with the stages told as they begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autopar import examples, meshes, planning
from autopar.api import skeleton
from autopar.mixed import precision_of
from autopar.models.model_argument import load_model
from autopar.models.named_model import Named, Wanted
from autopar.modules.reading import inputs_read
from autopar.options import Options
from autopar.runs.subject import sequence_of
from costmodel.hardware import Hardware
from costmodel.presets import hardware as hardware_of
from passes.capture.inputs import global_inputs, one_sample
from passes.plan.plan import Plan
from passes.planner.pipeline import Manner, Progress
from passes.program.program import Program


@dataclass(frozen=True)
class Sampled:
    """A model with one sample of its inputs; `given`: that sample, where a function made it and not the model's config,
    else `sequence` is its length."""

    named: Named
    sample: examples.Call
    given: Any
    sequence: int | None


def sampled(argument: str, sequence: int | None, options: Options, hardware: str | None) -> Sampled:
    """The model that `argument` names, for what sets its batch by itself; in the fastest dtype of 16 bits there."""
    device = hardware_of(hardware).device
    named = load_model(argument, Wanted(sequence=sequence, dtype=device.half))
    if device.half != "bfloat16" and ":" not in argument:
        named = replace(named, notes=(*named.notes, f"priced in {device.half}, the fastest 16 bits of {device.name}"))
    args, kwargs = one_sample(*examples.call_of(named.model, named.inputs), options.batch_dims)
    if ":" in argument:
        return Sampled(named, (args, kwargs), args or kwargs, None)
    return Sampled(named, (args, kwargs), None, sequence_of(named.model, named.inputs))


def captured(
    model: nn.Module, call: examples.Call, mesh: Mapping[str, int], options: Options, progress: Progress
) -> Program:
    """The program of the global batch, every data-parallel rank feeding `call`."""
    axes = meshes.axes_of(mesh)
    batch_axes = meshes.batch_axes_of(axes, options.batch_axes)
    progress("capturing the model")
    args, kwargs = examples.on_cpu(call)
    whole = global_inputs(args, kwargs, meshes.batch_ranks(axes, batch_axes), options.batch_dims)
    program = planning.captured(
        skeleton(model), whole.args, whole.kwargs, batch_dims=whole.batch_dims, batch_size=whole.batch_size,
        precision=precision_of(options.mp_policy),
    )  # fmt: skip
    return replace(program, notes=(*program.notes, *whole.notes))


def planned(
    model: nn.Module,
    call: examples.Call,
    mesh: Mapping[str, int],
    *,
    hardware: str | Hardware | None,
    strategy: str,
    options: Options,
    progress: Progress,
    keep_timeline: bool = False,
) -> Plan:
    """The plan that `autopar.plan` would make, every data-parallel rank feeding `call`."""
    axes = meshes.axes_of(mesh)
    batch_axes = meshes.batch_axes_of(axes, options.batch_axes)
    planning.machine_of(hardware, axes, batch_axes, options)
    program = captured(model, call, mesh, options, progress)
    smaller = examples.smaller(
        call, meshes.batch_ranks(axes, batch_axes), options.batch_dims,
        lambda cut: captured(model, cut, mesh, options, progress),
    )  # fmt: skip
    return planning.planned(
        program,
        axes,
        batch_axes=batch_axes,
        hardware=hardware,
        strategy=strategy,
        options=options,
        example=examples.described(call, inputs_read(program)),
        manner=Manner(progress, smaller=smaller, keep_timeline=keep_timeline),
    )
