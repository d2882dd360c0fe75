"""One call under way: a rank's values go in, outputs and gradients come out as the caller stores them.

bound -> Step.run -> outputs, saved
         Step.gradients(saved, tangents) -> DTensors
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from autopar import stored
from autopar.held import hold, reduced
from autopar.runtime import Executable, Runtime, device_of, has_gradients
from autopar.together import watch
from passes.autocast import autocast_as
from passes.errors import PlanMismatchError
from passes.local import LocalProgram
from passes.lower import laid_out
from passes.program import Program


@dataclass
class Step:
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
        hold(runtime, executable, terms)
        found = dict(zip(names, values, strict=True))
        if runtime.syncs:
            for name, value in reduced(runtime).items():
                known = found.get(name)
                found[name] = value if known is None else known + value
        return found


def bound(
    runtime: Runtime, executable: Executable, parameters: Mapping[str, Any], inputs: Sequence[torch.Tensor],
    device: torch.device,
) -> Step:  # fmt: skip
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
            values.append(torch.stack([_number(runtime.seed, device), _number(runtime.steps, device)]))
            runtime.steps += 1
        elif entry.kind == "coordinate":
            coordinate = runtime.mesh.get_coordinate()
            assert coordinate is not None
            index = coordinate[[name for name, _ in local.axes].index(entry.name)]
            values.append(_constant(index, device))
    return Step(runtime, executable, values, differentiable, names, _returned(runtime, local))


def _number(value: int, device: torch.device) -> torch.Tensor:
    """`value` on `device`, written there: a copy of one made here would wait for all that the device has to do."""
    return torch.full((), value, dtype=torch.int64, device=device)


@functools.cache
def _constant(value: int, device: torch.device) -> torch.Tensor:
    """`_number`, made once: for what no program writes to."""
    return _number(value, device)


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
    if not (program.has_loss or (scalar and not has_gradients(local))):
        return [None] * len(outputs)
    return [
        stored.spec(runtime.mesh, stored.placements(output.storage, sizes, output.name), output.storage.shape, dtype)
        if output.storage.shape
        else None
        for output, dtype in outputs
    ]


class Differentiable(torch.autograd.Function):
    """A step under autograd: parameters as DTensors in, outputs out; gradients come back as DTensors."""

    @staticmethod
    def forward(ctx: Any, step: Step, *differentiable: Any) -> tuple[torch.Tensor, ...]:
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
        step: Step = ctx.step
        if all(gradient is None for gradient in gradients):
            return (None,) * (1 + len(step.names))
        with watch().watching():
            return Differentiable._backward(ctx, step, gradients)

    @staticmethod
    def _backward(ctx: Any, step: Step, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
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
            value = torch.zeros(fake.shape, dtype=fake.dtype, device=device_of(runtime.mesh))
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
    mine = stored.local_part(table[key])
    gradient = laid_out(stored.unpad(gradient, mine.shape), mine.stride())  # fused optimizers take both as they lie
    return stored.distributed(gradient, runtime.specs[name])
