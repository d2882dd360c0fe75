"""The module a user trains: the model's own class and names, DTensor parameters, and one compiled step per call shape.

    call -> key (inputs, modes) -> Executable: forward(this rank's values) -> outputs, saved
                                               backward(saved, tangents)   -> gradients as DTensors

The tree is a copy that shares everything with the user's model but its tensors, so that stays as it was. The forward of
the model's class is never run: a call looks its executable up, or has it made by `remake`, which captures the model
again for a call of a new kind, with the parameters where they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar import buffers as buffers_
from autopar import stored, tree
from autopar.examples import by_name
from autopar.reading import MOST_GRAPHS, Gather, Values, too_many
from autopar.together import watch
from passes.autocast import autocast_as, autocast_dtype
from passes.errors import PlanMismatchError
from passes.local import LocalProgram, Storage
from passes.lower import Lowered, Unreduced
from passes.program import Program

Tangents = Literal["loss", "all"]


@dataclass(frozen=True)
class Executable:
    """One rank's step for one kind of call."""

    local: LocalProgram
    lowered: Lowered


Remake = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Tangents, bool], Executable]
"""(plain module on the meta device, args, kwargs, tangents, whether gradients are wanted) -> what runs such calls."""


@dataclass
class Runtime:
    """What the parallel module knows beside its tensors.

    `syncs`: whether a backward exchanges gradients; `unreduced`: what backwards that did not have left, by program.

    `specs`: how each parameter is stored, by the first of its names. `batch_ranks`: how many parts the batch has.
    `steps` counts training calls, for random ops. `executables` has, per kind of call, one for each kind of values
    that the model reads of its inputs, the last used first. `gather` makes inputs whole; None: they are.
    """

    mesh: DeviceMesh
    storages: Mapping[str, Storage]
    specs: Mapping[str, Any]
    trained: Mapping[str, bool]
    aliases: Mapping[str, str]
    slots: Mapping[str, tree.Slot]
    modules: Sequence[nn.Module]
    original: type[nn.Module]
    remake: Remake
    seed: int = 0
    batch_ranks: int = 1
    steps: int = 0
    gather: Gather | None = None
    syncs: bool = True
    unreduced: dict[int, tuple[Executable, Unreduced, list[torch.dtype]]] = field(default_factory=dict)
    executables: dict[Any, list[Executable]] = field(default_factory=dict)
    with_all: dict[int, Executable] = field(default_factory=dict)

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """Ranks per mesh axis."""
        return tuple(self.mesh.shape)

    @property
    def coordinate(self) -> tuple[int, ...]:
        """This rank's place on the mesh."""
        return tuple(self.mesh.get_coordinate() or ())


def _runtime(module: nn.Module) -> Runtime:
    return cast(Runtime, module.__dict__["_autopar"])


class ParallelModule(nn.Module):
    """A model whose forward runs this rank's part of a planned step. Made by `parallel_module`; never built by hand."""

    @property
    def random_steps(self) -> int:
        """How many calls have drawn random numbers (dropout): with `Options.seed`, what the next masks follow from.

        It is not in `state_dict`, whose keys are the model's own. Save it beside a checkpoint, the same on every rank,
        and set it after loading: the run then draws what it would have drawn without the stop.
        """
        return _runtime(self).steps

    @random_steps.setter
    def random_steps(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"random_steps = {steps}: a number of calls is not negative")
        _runtime(self).steps = steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns, for this data-parallel rank's batch."""
        return _call(self, args, kwargs)

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Whether the backwards to come exchange gradients between ranks, as FSDP2's method of this name.

        With False a backward adds its gradients up on this rank, in fp32 and unsharded where they are no better, and
        leaves `.grad` of parameters whose gradients need an exchange as it is. The next backward with True exchanges
        the sums. So a step of several micro-batches communicates gradients once.
        """
        del recurse  # the whole module is one program
        _runtime(self).syncs = requires_gradient_sync

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """FSDP2's method, which loops over micro-batches call. Nothing is put off past a backward here: no effect."""

    def set_reshard_after_backward(self, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """FSDP2's method. Gathered parameters are freed after each layer and gathered again here: no effect."""

    def to_empty(self, *, device: Any, recurse: bool = True) -> ParallelModule:
        """Storage without values on `device`; ties stay, and buffers that no checkpoint holds keep their values."""
        with buffers_.kept(self, device):
            super().to_empty(device=device, recurse=recurse)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ParallelModule:
        # Converting visits each name of a tied tensor by itself, and may leave two.
        super()._apply(fn, recurse)
        runtime = _runtime(self)
        for alias, name in runtime.aliases.items():
            table, key = runtime.slots[alias]
            target, target_key = runtime.slots[name]
            table[key] = target[target_key]
        return self


def parallel_module(
    model: nn.Module,
    storages: Mapping[str, Storage],
    mesh: DeviceMesh,
    remake: Remake,
    *,
    aliases: Mapping[str, str],
    seed: int = 0,
    batch_ranks: int = 1,
    from_first: bool = False,
    gather: Gather | None = None,
) -> ParallelModule:
    """`model` with this rank's part of every parameter; `model` itself stays as it was.

    storages: of every parameter, by the first of its names. aliases: further name -> first name, buffers' too.
    from_first: take rank 0's values of parameters and buffers, broadcast; else this rank's own.
    gather: makes an input whole, for models that read values of their inputs.
    """
    sizes, coordinate = tuple(mesh.shape), mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not on the mesh {mesh}")
    device = _device(mesh)
    specs: dict[str, Any] = {}

    def parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        if isinstance(old, DTensor):
            raise ValueError(f"{name} is a DTensor already; pass the model before any other parallelism is applied")
        storage = storages[name]
        if tuple(old.shape) != storage.shape:
            raise PlanMismatchError(
                f"{name} has shape {tuple(old.shape)} but the plan was made for {storage.shape}; plan again"
            )
        layout = stored.placements(storage, sizes, name)
        specs[name] = stored.spec(mesh, layout, old.shape, old.dtype)
        part = stored.cut(agreed(old), storage, sizes, coordinate)
        part = part.contiguous() if part.is_meta else part.to(device).clone(memory_format=torch.contiguous_format)
        new = nn.Parameter(stored.distributed(part, specs[name]), requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        return new

    def buffer(name: str, old: torch.Tensor) -> torch.Tensor:
        return old if old.is_meta else agreed(old).to(device, copy=True)

    def agreed(old: torch.Tensor) -> torch.Tensor:
        if not from_first or old.is_meta:
            return old.detach()
        whole = old.detach().to(device, copy=True)
        dist.broadcast(whole, 0)
        return whole

    original = type(model)
    new = tree.copied(model, parameter, buffer)
    slots = dict(tree.slots(new))
    named = dict(new.named_parameters())
    runtime = Runtime(
        mesh=mesh,
        storages=storages,
        specs=specs,
        trained={name: p.requires_grad for name, p in named.items()},
        aliases=dict(aliases),
        slots=slots,
        modules=list(new.modules()),
        original=original,
        remake=remake,
        seed=seed,
        batch_ranks=batch_ranks,
        gather=gather,
    )
    new.__dict__["_autopar"] = runtime
    new.__class__ = _parallel_class(original)  # type: ignore[arg-type]
    return cast(ParallelModule, new)


@functools.cache
def _parallel_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        return _call(self, args, kwargs)

    functools.update_wrapper(forward, original.forward)
    body = {"forward": forward, "__doc__": original.__doc__, "__module__": original.__module__}
    return type(f"Parallel{original.__name__}", (ParallelModule, original), body)


def plain_module(module: nn.Module) -> nn.Module:
    """The model of a parallel module as it was before: its own class, whole parameters on the meta device."""
    runtime = _runtime(module)

    def parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        whole = torch.empty(runtime.specs[name].shape, dtype=old.dtype, device="meta")
        new = nn.Parameter(whole, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        return new

    plain = tree.copied(module, parameter, lambda _, old: old)
    plain.__class__ = runtime.original
    del plain.__dict__["_autopar"]
    return plain


def preload(module: ParallelModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], executable: Executable) -> None:
    """Has `executable` run training calls like `(args, kwargs)`."""
    runtime = _runtime(module)
    leaves, in_spec = pytree.tree_flatten(by_name(runtime.original.forward, args, kwargs))
    trains = _has_gradients(executable.local)
    runtime.executables[_key(runtime, leaves, in_spec, trains)] = [executable]


# --- a call -----------------------------------------------------------------------------------------------------------


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _has_gradients(local: LocalProgram) -> bool:
    return any(output.kind == "gradient" for output in local.outputs)


def _constant(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), repr(leaf)
    return type(leaf), leaf


def _key(runtime: Runtime, leaves: Sequence[Any], in_spec: Any, trains: bool) -> Any:
    """What tells calls apart that need different graphs."""
    what = tuple(
        (leaf.shape, leaf.dtype, leaf.requires_grad and trains) if isinstance(leaf, torch.Tensor) else _constant(leaf)
        for leaf in leaves
    )
    return str(in_spec), what, trains, tuple(module.training for module in runtime.modules), autocast_dtype()


def _call(module: ParallelModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with watch().watching():
        return _forward(_runtime(module), module, args, kwargs)


def _forward(runtime: Runtime, module: ParallelModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = by_name(runtime.original.forward, args, kwargs)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    device = _device(runtime.mesh)
    _check_inputs(args, kwargs, device)
    parameters = _parameters(runtime, device)
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    trains = torch.is_grad_enabled() and (any(runtime.trained.values()) or any(leaf.requires_grad for leaf in inputs))
    key = _key(runtime, leaves, in_spec, trains)
    executable = _fitting(runtime, key, inputs)
    if executable is None:
        with torch.inference_mode(False), torch.set_grad_enabled(trains):
            executable = runtime.remake(plain_module(module), args, kwargs, "loss", trains)
        runtime.executables.setdefault(key, []).insert(0, executable)
    step = _bound(runtime, executable, parameters, inputs, device)

    def with_all() -> Executable:
        if id(executable) not in runtime.with_all:
            with torch.enable_grad():
                runtime.with_all[id(executable)] = runtime.remake(plain_module(module), args, kwargs, "all", True)
        return runtime.with_all[id(executable)]

    step.with_all = with_all
    outputs = _Differentiable.apply(step, *step.differentiable) if trains else tuple(step.run()[0])
    program = executable.local.program
    result: list[Any] = [program.out_constants.get(i) for i in range(program.out_spec.num_leaves)]
    for index, value in zip((i for i in range(len(result)) if i not in program.out_constants), outputs, strict=True):
        result[index] = value
    return pytree.tree_unflatten(result, program.out_spec)


def _fitting(runtime: Runtime, key: Any, inputs: Sequence[torch.Tensor]) -> Executable | None:
    """What runs calls of this kind with the values that `inputs` hold; None where it must be made.

    Raises:
        CaptureError: the model reads another value at every call.
    """
    known = runtime.executables.get(key, [])
    values: Values | None = None
    for executable in known:
        program = executable.local.program
        if program.guards is None:
            return executable
        if values is None:
            values = Values(program, inputs, lambda name: _buffer(runtime, name), runtime.gather)
        fixed = values.broken(program.guards)
        if not fixed:
            known.remove(executable)
            known.insert(0, executable)
            return executable
        if len(known) >= MOST_GRAPHS and executable is known[-1]:
            raise too_many(fixed)
    return None


def _buffer(runtime: Runtime, name: str) -> torch.Tensor:
    table, key = runtime.slots[name]
    return cast(torch.Tensor, table[key])


def _check_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> None:
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    for path, leaf in paths:
        if not isinstance(leaf, torch.Tensor):
            continue
        if isinstance(leaf, DTensor):
            raise ValueError(f"{_path(path)} is a DTensor; pass this data-parallel rank's own batch as a plain tensor")
        if leaf.device != device:
            raise ValueError(
                f"{_path(path)} is on {leaf.device} but the mesh is on {device}; move it with .to({str(device)!r})"
            )


def _path(path: tuple[Any, ...]) -> str:
    """`input_ids` or `args[0]` for a leaf of `(args, kwargs)`."""
    side, *rest = path
    text = pytree.keystr(tuple(rest))
    if getattr(side, "idx", 0) == 0:
        return f"args{text}"
    first, *deeper = rest
    return f"{getattr(first, 'key', first)}{pytree.keystr(tuple(deeper))}"


def _parameters(runtime: Runtime, device: torch.device) -> dict[str, Any]:
    """The parameters by name, checked to be what the plan was made for."""
    found = {}
    for name, of in runtime.specs.items():
        table, key = runtime.slots[name]
        parameter = table[key]
        if not stored.is_stored_as(parameter, of):
            layout = getattr(parameter, "placements", "a plain tensor")
            raise PlanMismatchError(
                f"{name} is no longer stored as planned ({tuple(of.shape)}, {of.placements}): found "
                f"{tuple(parameter.shape)}, {layout}; call parallelize again"
            )
        if parameter.dtype != of.tensor_meta.dtype:
            raise PlanMismatchError(
                f"{name} is {parameter.dtype} but the plan was made for {of.tensor_meta.dtype}; convert the model "
                "before parallelize, or use Options(mp_policy=...)"
            )
        if parameter.requires_grad != runtime.trained[name]:
            raise PlanMismatchError(
                f"{name}.requires_grad is {parameter.requires_grad} but was {runtime.trained[name]} when the plan was "
                "made; set it before parallelize"
            )
        part = stored.local_part(parameter)
        if part.device != device:
            hint = "call to_empty(device=...) and load or initialise it" if part.is_meta else f"move it to {device}"
            raise PlanMismatchError(f"{name} is on {part.device} but the mesh is on {device}; {hint}")
        found[name] = parameter
    for alias, name in runtime.aliases.items():
        table, key = runtime.slots[alias]
        target, target_key = runtime.slots[name]
        if table[key] is not target[target_key]:
            raise PlanMismatchError(f"{alias} was tied to {name} when the plan was made and no longer is")
    return found


@dataclass
class _Step:
    """One call under way: its executable and the values of the placeholders."""

    runtime: Runtime
    executable: Executable
    values: list[torch.Tensor]
    differentiable: list[Any]
    """Parameters, then inputs that require gradients."""
    names: list[str]
    """Of `differentiable`, as the program's gradients are named."""
    returned: list[Any]
    """Per output: the spec of the DTensor it becomes, None for a plain tensor."""
    with_all: Callable[[], Executable] | None = None

    def run(self) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Outputs as the caller gets them, and what the backward needs; new buffers are written back."""
        local = self.executable.local
        with autocast_as(None):
            results, saved = self.executable.lowered.forward(self.values)
        kinds = [output for output in local.outputs if output.kind != "gradient"]
        outputs: list[torch.Tensor] = []
        returned = iter(self.returned)
        with torch.no_grad():
            for value, output in zip(results, kinds, strict=True):
                if output.kind == "buffer":
                    table, key = self.runtime.slots[output.name]
                    table[key].copy_(value)
                    continue
                of = next(returned)
                if of is not None:
                    mine = stored.part_shape(output.storage, self.runtime.axis_sizes, self.runtime.coordinate)
                    value = stored.distributed(stored.unpad(value.contiguous(), mine), of)
                # A model may return one tensor under two names; autograd tells outputs apart by the tensor.
                outputs.append(value.detach() if any(value is other for other in outputs) else value)
        return outputs, saved

    def gradients(self, executable: Executable, saved: Any, tangents: Any) -> dict[str, Any]:
        """Local gradients by name; the parameters' still padded. None where ranks are yet to exchange it."""
        with autocast_as(None):
            return self._gradients(executable, saved, tangents)

    def _gradients(self, executable: Executable, saved: Any, tangents: Any) -> dict[str, Any]:
        lowered, local = executable.lowered, executable.local
        runtime = self.runtime
        names = [output.name for output in local.outputs if output.kind == "gradient"]
        if runtime.syncs and not runtime.unreduced:
            return dict(zip(names, lowered.backward(saved, tangents), strict=True))
        values, terms = lowered.backward_alone(saved, tangents)
        _hold(runtime, executable, terms)
        found = dict(zip(names, values, strict=True))
        if runtime.syncs:
            for name, value in _reduced(runtime).items():
                known = found.get(name)
                found[name] = value if known is None else known + value
        return found


def _hold(runtime: Runtime, executable: Executable, terms: Unreduced) -> None:
    """Adds this rank's terms of gradients to those of earlier backwards, in fp32 where they are of less."""
    dtypes = [term.dtype for term in terms.partial]
    _, before, _ = runtime.unreduced.setdefault(id(executable), (executable, Unreduced([], terms.others), dtypes))
    if before.partial:
        torch._foreach_add_(before.partial, terms.partial)
    else:
        # Compiled code may give one buffer twice, or the caller's own: sums need their own.
        before.partial = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in terms.partial]


def _reduced(runtime: Runtime) -> dict[str, torch.Tensor]:
    """Gradients from all that was held back, exchanged between ranks."""
    found: dict[str, torch.Tensor] = {}
    held, runtime.unreduced = runtime.unreduced, {}
    for executable, terms, dtypes in held.values():
        terms.partial = [term.to(dtype) for term, dtype in zip(terms.partial, dtypes, strict=True)]
        names = [output.name for output in executable.local.outputs if output.kind == "gradient"]
        for name, value in zip(names, executable.lowered.reduce(terms), strict=True):
            if value is not None:
                found[name] = value if name not in found else found[name] + value
    return found


def _bound(
    runtime: Runtime, executable: Executable, parameters: Mapping[str, Any], inputs: Sequence[torch.Tensor],
    device: torch.device,
) -> _Step:  # fmt: skip
    """A call's values in the order of the executable's placeholders."""
    local, sizes = executable.local, runtime.axis_sizes
    changed = {output.name for output in local.outputs if output.kind == "buffer"}
    given = iter(inputs)
    values, names, differentiable = [], list(parameters), list(parameters.values())
    for entry in local.inputs:
        if entry.kind == "parameter":
            values.append(stored.pad(stored.local_part(parameters[entry.name]), entry.storage, sizes))
        elif entry.kind == "buffer":
            table, key = runtime.slots[entry.name]
            if table[key].device != device:
                raise PlanMismatchError(f"buffer {entry.name} is on {table[key].device} but the mesh is on {device}")
            # One that this step changes is read by the backward as it was before.
            values.append(table[key].clone() if entry.name in changed else table[key])
        elif entry.kind == "input":
            value = next(given)
            wanted = entry.storage.computed_shape(sizes)
            if tuple(value.shape) != wanted:
                raise PlanMismatchError(f"{entry.name} has shape {tuple(value.shape)}; the plan is for {wanted}")
            values.append(value.detach())
            if value.requires_grad:
                names.append(entry.name)
                differentiable.append(value)
        elif entry.kind == "seed":
            values.append(torch.tensor([runtime.seed, runtime.steps], dtype=torch.int64, device=device))
            runtime.steps += 1
        elif entry.kind == "coordinate":
            coordinate = runtime.mesh.get_coordinate()
            assert coordinate is not None
            index = coordinate[[name for name, _ in local.axes].index(entry.name)]
            values.append(torch.tensor(index, dtype=torch.int64, device=device))
    return _Step(runtime, executable, values, differentiable, names, _returned(runtime, local))


def _returned(runtime: Runtime, local: LocalProgram) -> list[Any]:
    """How each output goes back: beside a loss, what is no scalar is a DTensor; else all is plain."""
    program, sizes = local.program, runtime.axis_sizes
    nodes: Any = local.graph.graph.output_node().args[0]
    outputs = [
        (output, node.meta["val"].dtype)
        for output, node in zip(local.outputs, nodes, strict=True)
        if output.kind == "output"
    ]
    scalar = any(not output.storage.shape and dtype.is_floating_point for output, dtype in outputs)
    if not (program.has_loss or (scalar and not _has_gradients(local))):
        return [None] * len(outputs)
    return [
        stored.spec(runtime.mesh, stored.placements(output.storage, sizes, output.name), output.storage.shape, dtype)
        if output.storage.shape
        else None
        for output, dtype in outputs
    ]


class _Differentiable(torch.autograd.Function):
    """A step under autograd: parameters as DTensors in, outputs out; gradients come back as DTensors."""

    @staticmethod
    def forward(ctx: Any, step: _Step, *differentiable: Any) -> tuple[torch.Tensor, ...]:
        outputs, saved = step.run()
        ctx.step = step
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        declared = [output for output in step.executable.local.program.outputs if output.kind == "output"]
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, declared, strict=True) if not d.requires_grad))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        step: _Step = ctx.step
        if all(gradient is None for gradient in gradients):
            return (None,) * (1 + len(step.names))
        with watch().watching():
            return _Differentiable._backward(ctx, step, gradients)

    @staticmethod
    def _backward(ctx: Any, step: _Step, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        local, runtime = step.executable.local, step.runtime
        outputs = [output.name for output in local.outputs if output.kind == "output"]
        asked = {entry.name for entry in local.inputs if entry.kind == "tangent"}
        of_one = _one_name(local.program, asked)
        arrived: dict[str, torch.Tensor] = {}
        for name, gradient in zip((of_one.get(name, name) for name in outputs), gradients, strict=True):
            if gradient is not None:
                arrived[name] = arrived[name] + gradient if name in arrived else gradient
        if arrived.keys() <= asked:
            saved = list(ctx.saved_tensors)
            if (clear := getattr(ctx, "maybe_clear_saved_tensors", None)) is not None:
                clear()
            found = step.gradients(step.executable, saved, _tangents(runtime, local, arrived, 1))
        else:
            assert step.with_all is not None
            other = step.with_all()
            saved = list(other.lowered.forward(step.values)[1])
            # That program averages over the batch's ranks what each brings; these are gradients of one global value.
            tangents = _tangents(runtime, other.local, arrived, runtime.batch_ranks)
            found = step.gradients(other, saved, tangents)
        return None, *(_as_stored(runtime, name, found.get(name)) for name in step.names)


def _one_name(program: Program, asked: Collection[str]) -> dict[str, str]:
    """Other names under which a model returns a scalar -> the one that has its tangent."""
    nodes: Any = program.graph.graph.output_node().args[0]
    scalars = [
        (output.name, node)
        for output, node in zip(program.outputs, nodes, strict=True)
        if output.kind == "output" and not node.meta["val"].dim()
    ]
    first = {node: name for name, node in scalars if name in asked}
    return {name: first[node] for name, node in scalars if node in first and name not in asked}


def _tangents(
    runtime: Runtime, local: LocalProgram, arrived: Mapping[str, torch.Tensor], factor: int
) -> list[torch.Tensor]:
    """One per tangent placeholder: this rank's part of what arrived, or zeros; times `factor` what the batch splits."""
    split = {entry.name for entry in local.program.inputs if entry.kind == "tangent" and entry.batch_dim is not None}
    result = []
    for entry, node in zip(local.inputs, local.graph.graph.find_nodes(op="placeholder"), strict=True):
        if entry.kind != "tangent":
            continue
        value = arrived.get(entry.name)
        if value is None:
            fake = node.meta["val"]
            value = torch.zeros(fake.shape, dtype=fake.dtype, device=_device(runtime.mesh))
        elif isinstance(value, DTensor):
            layout = stored.placements(entry.storage, runtime.axis_sizes, entry.name)
            if tuple(value.placements) != layout:
                value = value.redistribute(runtime.mesh, layout)
            value = stored.local_part(value)
        result.append(value * factor if factor != 1 and entry.name in split else value)
    return result


def _as_stored(runtime: Runtime, name: str, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A local gradient as autograd wants it: a parameter's as its DTensor, an input's as it is."""
    if gradient is None or name not in runtime.specs:
        return gradient
    table, key = runtime.slots[name]
    mine = stored.local_part(table[key]).shape
    return stored.distributed(stored.unpad(gradient, mine), runtime.specs[name])


def state_bytes(module: ParallelModule) -> int:
    """Bytes of this rank's parameters."""
    parts = (stored.local_part(p) for p in module.parameters() if isinstance(p, DTensor))
    return sum(math.prod(part.shape) * part.element_size() for part in parts)
