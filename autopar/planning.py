"""The compiler behind the API: options in, plans out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from autopar.meshes import axis_notes
from autopar.mixed import policy_from, policy_json
from autopar.options import Options, check_async_tp, check_options
from costmodel.hardware import Hardware, Topology, topology
from costmodel.hardware_file import hardware_of
from costmodel.layout import parse_layout
from costmodel.presets import slow_dtype_notes, stand_in_notes
from passes.capture.capture import capture
from passes.capture.collector import settled
from passes.plan.plan import Plan
from passes.planner.fitting import Candidate
from passes.planner.pipeline import Manner, Request, compile_plan, local_program, on_mesh, prepare
from passes.program.local import LocalProgram
from passes.program.precision import Precision
from passes.program.program import Program
from passes.runs.model_flops import model_flops
from passes.space.pins import check_pins
from passes.space.space import Pin

_FIGURES = "hardware_figures"
"""Where a plan's options keep the figures it was priced with: they decide the steps of a reshard, on any machine."""
_ASKED = "strategy"
"""Where they keep the strategy that was asked for: a plan made under `auto` bears the name of the one that won."""
_PIPELINED = (
    "async_tp: matrix products beside all-gathers and reduce-scatters of activations are cut and pipelined by torch's "
    "pass where it can; the time counts on it within nodes, the memory is that of a step without it"
)


def options_json(options: Options) -> dict[str, Any]:
    """Options as a plan's file keeps them."""
    kept = asdict(options)
    kept["mp_policy"] = policy_json(options.mp_policy)
    kept["batch_axes"] = list(options.batch_axes) if options.batch_axes is not None else None
    kept["pins"] = dict(options.pins)
    kept["batch_dims"] = dict(options.batch_dims) if options.batch_dims is not None else None
    return kept


def options_of(plan: Plan) -> Options:
    """The options a plan was made with.

    Raises:
        ValueError: options that this autopar does not know, or that mean nothing: its file may have been edited.
    """
    kept = {name: value for name, value in plan.options.items() if name not in (_FIGURES, _ASKED)}
    if unknown := kept.keys() - {field.name for field in fields(Options)}:
        raise ValueError(f"the plan's options have an unknown field {min(unknown)!r}; make the plan again")
    if isinstance(kept.get("batch_axes"), list):
        kept["batch_axes"] = tuple(kept["batch_axes"])
    kept["mp_policy"] = policy_from(kept.get("mp_policy"))
    options = Options(**kept)
    check_options(options, lambda name, value: f"the plan's options: {name} is {json.dumps(value)}")
    return options


def asked_of(plan: Plan) -> str:
    """The strategy that a plan was asked for."""
    return str(plan.options.get(_ASKED, plan.strategy))


@settled()
def captured(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_dims: Sequence[int | None],
    batch_size: int | None,
    tangents: Any = "loss",
    backward: bool = True,
    precision: Precision | None = None,
) -> Program:
    """The program of a global batch, ready to be planned."""
    return prepare(
        capture(
            model, args, kwargs, batch_dims=batch_dims, batch_size=batch_size, tangents=tangents, backward=backward,
            precision=precision,
        )
    )  # fmt: skip


def machine_of(
    hardware: str | Hardware | None, axes: Sequence[tuple[str, int]], batch_axes: Sequence[int], options: Options
) -> Topology:
    """A mesh of `axes` laid over its hardware. Finds what is wrong with these before minutes go into a model.

    Raises:
        ValueError: no such hardware, a pin that is no layout for this mesh, or what this hardware and mesh cannot do.
    """
    mesh = on_mesh(hardware, axes)
    check_pins(pins_of(options), len(axes))
    if options.async_tp:
        check_async_tp(options, axes, batch_axes)
        if mesh.device.is_cpu:
            raise ValueError(
                f"Options(async_tp=True) is for GPUs that reach each other's memory; {mesh.hardware.name!r} is a CPU; "
                "leave it out, or name the hardware"
            )
    return mesh


@settled()
def planned(
    program: Program,
    axes: Sequence[tuple[str, int]],
    *,
    batch_axes: Sequence[int],
    hardware: str | Hardware | None,
    strategy: str,
    options: Options,
    example: str,
    without: Sequence[tuple[str, str]] = (),
    manner: Manner | None = None,
    known: dict[str, list[Candidate]] | None = None,
) -> Plan:
    """The plan for `program` on a mesh of `axes`.

    `without`: (place, option) that it may not choose. `known`: see `compile_plan`.

    Raises:
        ValueError: the mesh or the hardware cannot do what the options ask for.
    """
    mesh = machine_of(hardware, axes, batch_axes, options)
    request = Request(
        strategy=strategy,
        budget_bytes=options.memory_budget,
        optimizer="sgd" if options.optimizer == "none" else options.optimizer,
        accumulate=options.accumulate,
        recompute=options.recompute,
        reshard=options.reshard_after_forward,
        regather=options.regather_activations,
        compiled=options.compile,
        pins=pins_of(options),
        stored=program.stored or None,
        async_tp=options.async_tp,
        without=tuple(without),
    )
    figures = json.loads(json.dumps(asdict(mesh.hardware)))
    plan = compile_plan(
        program,
        mesh,
        batch_axes,
        request,
        options=options_json(options) | {_ASKED: strategy, _FIGURES: figures},
        example=example,
        manner=manner,
        known=known,
    )
    notes = (*plan.notes, *([_PIPELINED] if options.async_tp else []), *stand_in_notes(hardware))
    notes = (*notes, *slow_dtype_notes(mesh.device, model_flops(program).dtype))
    if options.batch_axes is None:
        notes = (*notes, *axis_notes(axes, batch_axes))
    return replace(plan, notes=notes)


def pins_in(plan: Plan) -> dict[str, str]:
    """The pins that a plan's file asks for: its lines that are marked `"pinned": true`, and those a person edited."""
    edited = plan.edited
    return {key: str(placed) for key, placed in plan.parameters.items() if placed.pinned or key in edited}


def rewritten(program: Program, plan: Plan) -> LocalProgram:
    """One rank's program under `plan`."""
    return local_program(program, plan, topology_of(plan), pins_of(options_of(plan)))


def hardware_in(plan: Plan) -> Hardware:
    """The hardware a plan was priced on, by the figures in the plan."""
    if _FIGURES not in plan.options:
        raise ValueError(f"the plan's options have no {_FIGURES!r}; make the plan again")
    return hardware_of(plan.options[_FIGURES], "plan")


def topology_of(plan: Plan) -> Topology:
    """The mesh a plan was made for, laid over its hardware."""
    return topology(hardware_in(plan), plan.axes)


def pins_of(options: Options) -> dict[str, Pin]:
    """The user's pins: a layout in compute, or `at rest -> in compute`.

    Raises:
        ValueError: a pin that is no layout; names it.
    """
    found = {}
    for pattern, text in options.pins.items():
        try:
            at_rest, arrow, in_compute = text.rpartition("->")
            found[pattern] = Pin(parse_layout(in_compute.strip()), parse_layout(at_rest.strip()) if arrow else None)
        except ValueError as error:
            raise ValueError(f"pin {pattern!r}: {error}") from None
    return found
