"""`parallelize`, `plan` and `apply`: from a user's model to the module that trains on a mesh.

    model, inputs -captured-> Program -planned-> Plan              one rank plans, the others receive
    Program, Plan -rewritten-> LocalProgram -lower-> Executable    every rank, alike
    model, storages -> ParallelModule                              calls of a new kind come back here

Between these, ranks agree: what one finds wrong, all raise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar import examples, meshes, planning
from autopar.machine import priced_for
from autopar.mixed import precision_of
from autopar.modules import tree
from autopar.modules.batches import BatchRanks
from autopar.modules.groups import Groups
from autopar.modules.module import ParallelModule, parallel_module, preload
from autopar.modules.reading import Gather, captured_together, gatherer, inputs_read, with_values
from autopar.modules.runtime import Executable
from autopar.optimizers import warn_of_optimizers
from autopar.options import Options, check_async_tp, check_options
from autopar.overlaps import Placed, check_apart, placed
from autopar.ranks.together import Together, together, watch
from autopar.stages import Stages
from autopar.unwrapped import check_unwrapped
from costmodel.hardware import Hardware
from costmodel.heap import keep_freed
from passes.capture.differentiated import Tangents
from passes.capture.inputs import global_inputs
from passes.capture.left_behind import left_note
from passes.errors import PlanMismatchError
from passes.lower.lower import lower
from passes.plan.plan import Plan
from passes.planner.infeasible import Smaller
from passes.planner.pipeline import Manner
from passes.program.bytes_of import digest
from passes.program.local import LocalProgram, bind_groups, groups_used
from passes.program.precision import Precision
from passes.program.program import Program
from passes.space.named import check_strategy


@dataclass(frozen=True)
class _Job:
    """What every stage of one call of the API needs."""

    axes: meshes.Axes
    batch_axes: tuple[int, ...]
    options: Options
    precision: Precision | None
    stages: Stages
    held: tuple[Placed, ...]

    @property
    def batch_ranks(self) -> int:
        return meshes.batch_ranks(self.axes, self.batch_axes)

    def splits_batch(self, axes: str) -> bool:
        """Whether one of `axes` ("dp,tp") splits the batch."""
        return any(self.axes[axis][0] in axes.split(",") for axis in self.batch_axes)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    hardware: str | Hardware | None = None,
    strategy: str | None = None,
    options: Options | None = None,
) -> ParallelModule:
    """`model` laid out over `mesh` by the fastest plan found, ready to train.

    mesh: one to five axes, named; `dp`, `dp_replicate`, `dp_shard`, `fsdp`, `data`, `batch` and the like split the
        batch. Each further axis that splits tensors makes planning several times as long.
    example_inputs: what one data-parallel rank feeds the model, a tuple of positional or a mapping of keyword
        arguments; None: taken from a Hugging Face model's config. plan: one made earlier, for this graph and mesh,
        with options, strategy and hardware of its own.
    hardware, strategy: as `plan` takes them ("auto").

    The returned module has the model's class, attributes and parameter names; parameters are DTensors on the whole
    mesh. The model itself stays as it was.

    Raises:
        ValueError: a mesh, input or option that cannot be; says what would do.
        CaptureError: the forward cannot be captured as one graph; names the line.
        NoFeasiblePlanError: no plan fits in memory; says by how much, and what would.
        PlanMismatchError: `plan` is for another graph or mesh.
    """
    _check_is_mesh("parallelize", mesh)
    if plan is not None:
        given = {"options": options, "strategy": strategy, "hardware": hardware}
        for name in (name for name, value in given.items() if value is not None):
            raise ValueError(f"a plan has the {name} that it was made with; leave out {name}, or plan with them")
        return apply(model, plan, mesh)
    check_unwrapped(model)
    job = _job(model, mesh, options)
    strategy = "auto" if strategy is None else strategy
    check_strategy(strategy)
    ours = _ranks(mesh)
    call, example = _example(ours, model, example_inputs)
    with ours.agreeing():
        machine = priced_for(hardware, mesh)
        planning.machine_of(machine, job.axes, job.batch_axes, job.options)
    gather = _gather(job, mesh, ours)
    with job.stages:
        program = captured_together(
            ours, lambda known: _captured(job, skeleton(model), call, known=known), call, gather
        )
        smaller = _smaller(job, model, call)
        plan = _shared_plan(job, ours, program, machine, strategy, example, smaller)
        return _applied(job, model, plan, mesh, program, call, ours)


def plan(
    model: nn.Module,
    mesh: DeviceMesh | Mapping[str, int],
    example_inputs: Any = None,
    *,
    hardware: str | Hardware | None = None,
    strategy: str = "auto",
    options: Options | None = None,
) -> Plan:
    """The plan for `model` on `mesh`; needs no process group and no GPU where the mesh is a mapping of axis sizes.

    On a DeviceMesh of several ranks one of them plans and the others receive its plan.

    hardware: a preset ("h100", ...), a calibrated file, `costmodel` figures, or None for the devices of a DeviceMesh,
        and for the machine we are on where the mesh is a mapping.
    strategy: "auto" solves; "ddp", "fsdp" and "megatron" are the plans people make by hand.

    Raises: as `parallelize`.
    """
    check_unwrapped(model)
    job = _job(model, mesh, options)
    check_strategy(strategy)
    ours = _ranks(mesh)
    call, _ = _example(ours, model, example_inputs)
    timelines = []

    def make() -> str:
        machine = priced_for(hardware, mesh)
        planning.machine_of(machine, job.axes, job.batch_axes, job.options)
        # Where the model reads values, the plan is for those of rank 0's example; others are planned when they come.
        program = _captured(job, skeleton(model), call)
        described = examples.described(call, inputs_read(program))
        smaller = _smaller(job, model, call)
        made = _planned(job, program, machine, strategy, described, smaller=smaller, keep_timeline=True)
        timelines.append(made.timeline)
        return made.to_json()

    with job.stages:
        made = Plan.from_json(ours.from_first(make))
    return replace(made, timeline=timelines[0]) if timelines else made


def apply(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> ParallelModule:
    """`model` laid out as `plan` says, on `mesh`.

    Raises:
        PlanMismatchError: the plan is for another graph, mesh or parameters; says what differs.
    """
    check_unwrapped(model)
    _check_is_mesh("apply", mesh)
    if isinstance(plan, str | os.PathLike):
        raise ValueError(f"plan is the path {os.fspath(plan)!r}; pass autopar.Plan.load of it")
    job = _job(model, mesh, planning.options_of(plan))
    ours = _ranks(mesh)
    with job.stages, ours.agreeing():
        if tuple(plan.axes) != job.axes:
            raise PlanMismatchError(
                f"the plan is for the mesh {dict(plan.axes)} but this one is {dict(job.axes)}; plan again for it"
            )
        call = examples.by_name(type(model).forward, *examples.restored(plan.example))
        with examples.as_described(plan.example):
            program = _captured(job, skeleton(model), call)
        _check_fingerprint(plan, program)
    with job.stages, examples.as_described(plan.example):
        return _applied(job, model, plan, mesh, program, call, ours)


# --- stages -----------------------------------------------------------------------------------------------------------


def _job(model: nn.Module, mesh: Any, options: Options | None) -> _Job:
    options = Options() if options is None else options
    check_options(options)
    axes = meshes.axes_of(mesh)
    if isinstance(mesh, DeviceMesh):
        meshes.check_world(mesh)
    precision = precision_of(options.mp_policy)
    batch_axes = meshes.batch_axes_of(axes, options.batch_axes)
    if options.async_tp:
        _check_async_tp(options, mesh, axes, batch_axes)
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    stages = Stages(shown=options.progress, speaks=speaks, prefix="autopar: ")
    return _Job(axes, batch_axes, options, precision, stages, placed(model))


def _example(ours: Together, model: nn.Module, example_inputs: Any) -> tuple[examples.Call, str]:
    """The call that is planned for, and its description.

    Raises:
        ValueError: the inputs cannot be the model's, or ranks were given others.
    """
    with ours.agreeing():
        call = examples.call_of(model, example_inputs)
        example = examples.described(call)
    if not ours.same(example):
        raise ValueError(f"ranks were given inputs of different shapes or types; rank {ours.rank} has {example}")
    return call, example


def _check_async_tp(options: Options, mesh: Any, axes: meshes.Axes, batch_axes: tuple[int, ...]) -> None:
    if isinstance(mesh, DeviceMesh) and mesh.device_type != "cuda":
        raise ValueError(f"Options(async_tp=True): the mesh is on {mesh.device_type}; it takes a CUDA mesh")
    check_async_tp(options, axes, batch_axes)


def _check_is_mesh(name: str, mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"{name} needs a DeviceMesh (init_device_mesh), not a {type(mesh).__name__}")


def _gather(job: _Job, mesh: DeviceMesh, ours: Together) -> Gather | None:
    """Makes inputs whole; None where they are, as there is but one rank."""
    return gatherer(BatchRanks(mesh, job.batch_axes)) if ours.ranks > 1 else None


def _ranks(mesh: Any) -> Together:
    """The ranks that go through a call together: the job's, or this one alone for a mesh that is only named."""
    return together() if isinstance(mesh, DeviceMesh) else Together(None, 0, 1)


def skeleton(model: nn.Module) -> nn.Module:
    """`model` with meta parameters and its buffers on the CPU; what is captured, so that no weight is touched."""

    def parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device="meta"), requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        return new

    return tree.copied(model, parameter, lambda _, old: old.detach() if old.is_meta else old.detach().cpu())


def _captured(
    job: _Job, model: nn.Module, call: examples.Call, tangents: Tangents = "loss", backward: bool = True,
    known: Mapping[str, torch.Tensor] | None = None,
) -> Program:  # fmt: skip
    """The program of the global batch; `known` has whole inputs by name."""
    job.stages("capturing the model")
    args, kwargs = examples.on_cpu(call)
    whole = global_inputs(args, kwargs, job.batch_ranks, job.options.batch_dims)
    args, kwargs = with_values(whole.args, whole.kwargs, known or {})
    program = planning.captured(
        model, args, kwargs, batch_dims=whole.batch_dims, batch_size=whole.batch_size, tangents=tangents,
        backward=backward, precision=job.precision,
    )  # fmt: skip
    check_apart(job.held, program)
    return replace(program, notes=(*program.notes, *whole.notes))


def _smaller(job: _Job, model: nn.Module, call: examples.Call) -> Smaller:
    return examples.smaller(
        call, job.batch_ranks, job.options.batch_dims, lambda cut: _captured(job, skeleton(model), cut)
    )


def _planned(
    job: _Job, program: Program, hardware: Any, strategy: str, example: str, smaller: Smaller | None = None,
    keep_timeline: bool = False,
) -> Plan:  # fmt: skip
    plan = planning.planned(
        program, job.axes, batch_axes=job.batch_axes, hardware=hardware, strategy=strategy, options=job.options,
        example=example, manner=Manner(job.stages, smaller=smaller, keep_timeline=keep_timeline),
    )  # fmt: skip
    job.stages.artefact("autopar_plan", plan.to_json, "json")
    return plan


def _shared_plan(
    job: _Job, ours: Together, program: Program, hardware: Any, strategy: str, example: str,
    smaller: Smaller | None = None,
) -> Plan:  # fmt: skip
    """Rank 0's plan on every rank, after checking that all captured one graph."""
    if not ours.same(program.fingerprint):
        given = _shapes_given(job, program)
        if not ours.same(given):
            raise ValueError(
                f"ranks were given inputs of different shapes (this one {given}); give every rank as many samples: "
                "drop the last short batch (DataLoader(drop_last=True)), or add samples that the loss ignores"
            )
        raise ValueError(
            "ranks captured different graphs of the model; give every rank the same model, modes and inputs' shapes "
            "(a branch on values of an input or a buffer that differ between ranks does this too)"
        )
    text = ours.from_first(lambda: _planned(job, program, hardware, strategy, example, smaller).to_json())
    with ours.agreeing():
        return Plan.from_json(text)


def _shapes_given(job: _Job, program: Program) -> str:
    """What this rank was given: `input_ids [2, 128]`."""
    found = []
    for node, given in program.placeholders.items():
        if given.kind == "input":
            shape = list(node.meta["val"].shape)
            if given.batch_dim is not None:
                shape[given.batch_dim] //= job.batch_ranks
            found.append(f"{given.path} {shape}")
    return ", ".join(found)


def _check_fingerprint(plan: Plan, program: Program) -> None:
    if plan.fingerprint != program.fingerprint:
        raise PlanMismatchError(
            f"the plan was made for another graph ({plan.fingerprint[:12]}) than this model's "
            f"({program.fingerprint[:12]}); plan again, or use the model, inputs and versions it was made with"
        )


def _executable(
    job: _Job, ours: Together, groups: Groups, program: Program, plan: Plan
) -> tuple[Executable, LocalProgram]:
    """What runs `plan` on this rank."""
    with ours.agreeing():
        job.stages("rewriting the graph for a rank")
        local = planning.rewritten(program, plan)
        wanted = groups_used(local.graph)
        job.stages.artefact("autopar_local_graph", lambda: local.graph.print_readable(print_output=False))
    # Making groups is collective: only when every rank came this far.
    names = groups.names_for(wanted)
    with ours.agreeing():
        bind_groups(local.graph, names)
        device = groups.mesh.device_type
        job.stages("compiling forward and backward" if job.options.compile else "splitting forward and backward")
        if job.options.async_tp:
            for axes in wanted:
                if not job.splits_batch(axes):
                    groups.share_memory(axes)
        lowered = lower(
            local, device=device, compile=job.options.compile, rank=ours.rank,
            pipelined=job.options.async_tp,
        )  # fmt: skip
    if device == "cpu":
        keep_freed(plan.peak_memory_bytes)
    return Executable(local, lowered), local


def _applied(
    job: _Job, model: nn.Module, plan: Plan, mesh: DeviceMesh, program: Program, call: examples.Call, ours: Together
) -> ParallelModule:
    job = replace(job, options=planning.options_of(plan))  # rank 0's: a script may seed each rank by its number
    groups = Groups(mesh, tuple(name for name, _ in job.axes))
    gather = _gather(job, mesh, ours)
    executable, local = _executable(job, ours, groups, program, plan)
    storages = {entry.name: entry.storage for entry in local.inputs if entry.kind == "parameter"}
    hardware, strategy = planning.hardware_in(plan), plan.strategy

    def remake(
        plain: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tangents: Tangents, backward: bool
    ) -> Executable:
        over = watch()
        again = together(check=over.check)
        new_call = args, dict(kwargs)
        with over.making_program():
            new_program = captured_together(
                again,
                lambda known: _captured(job, skeleton(plain), new_call, tangents, backward, known),
                new_call,
                gather,
            )
            example = examples.described(new_call)
            new_program = new_program.of_stored(storages)
            new_plan = _shared_plan(job, again, new_program, hardware, strategy, example)
            return _executable(job, again, groups, new_program, new_plan)[0]

    alike = mesh.size() == 1 or _values_alike(ours, model)
    with ours.agreeing():
        module = parallel_module(
            model, storages, mesh, remake, aliases=program.aliases, seed=job.options.seed, batch_axes=job.batch_axes,
            from_first=not alike, gather=gather,
        )  # fmt: skip
        preload(module, *call, executable)
        if ours.rank == 0:
            warn_of_optimizers(model)
            if program.left:
                warnings.warn(left_note(program.left), stacklevel=2)
            if local.program.attends and not job.options.batch_dims:
                warnings.warn(local.program.attends, stacklevel=2)
    return module


def _values_alike(ours: Together, model: nn.Module) -> bool:
    """Whether all ranks hold the same values of parameters and buffers.

    Raises:
        ValueError: some are on the meta device on one rank and real on another.
    """
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    if not ours.same(str([name for name, tensor in tensors.items() if tensor.is_meta])):
        raise ValueError(
            "the model is on the meta device on some ranks and real on others; make it alike on all: real with any "
            "values (rank 0's are taken), or meta, and load after to_empty"
        )
    with ours.agreeing():
        found = [(name, int(digest(tensor))) for name, tensor in tensors.items() if not tensor.is_meta]
    return ours.same(str(found))
