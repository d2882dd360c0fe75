"""One call under way: a rank's values go in, outputs and gradients come out as the caller stores them.

bound -> Step.run -> outputs, saved
         Step.gradients(saved, tangents) -> DTensors
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.modules import stored
from autopar.modules.binding import Binding, binding_of
from autopar.modules.gradient import Gradient
from autopar.modules.held import hold, reduced
from autopar.modules.parameters import Checked
from autopar.modules.runtime import Executable, Runtime
from autopar.ranks.together import watch
from passes.capture.autocast import autocast_as
from passes.errors import PlanMismatchError
from passes.program.local import LocalInput, LocalProgram
from passes.program.strides import laid_out


@dataclass
class Step:
    """One call under way: its executable and the values of the placeholders."""

    runtime: Runtime
    executable: Executable
    binding: Binding
    parameters: Checked
    values: list[torch.Tensor]
    inputs: list[tuple[str, torch.Tensor]]
    """Inputs that require gradients, by the names of these in the program."""
    with_all: Callable[[Step], Executable] | None = None

    @property
    def differentiable(self) -> list[Any]:
        """Parameters, then inputs that require gradients."""
        return [*self.parameters.tensors, *(value for _, value in self.inputs)]

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The buffers as the step reads them."""
        return {entry.name: self.values[place] for place, entry in self.binding.others if entry.kind == "buffer"}

    def run(self) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """Outputs as the caller gets them, what the backward needs, and the DTensors of the outputs among that.

        New buffers are written back.
        """
        with autocast_as(None):
            results, saved = self.executable.lowered.forward(self.values)
        outputs: list[torch.Tensor] = []
        shared: list[torch.Tensor] = []
        returned = iter(self.binding.returned)
        with torch.no_grad():
            for value, output, kept in zip(results, self.binding.results, self.binding.kept, strict=True):
                if output.kind == "buffer":
                    _write(self.runtime, output.name, value)
                    continue
                if (of := next(returned)) is not None:
                    spec, mine = of
                    part = stored.unpad(value.contiguous(), mine)
                    kept, value = kept and part is value, stored.distributed(part, spec)
                    shared += [value] * kept
                # A model may return one tensor under two names; autograd tells outputs apart by the tensor.
                outputs.append(value.detach() if any(value is other for other in outputs) else value)
        return outputs, saved, shared

    def gradients(self, executable: Executable, saved: Any, arrived: Mapping[str, torch.Tensor], factor: int) -> Any:
        """Local gradients by name; the parameters' still padded. None where ranks are yet to exchange it.

        None, too, where what arrived does not depend on it: an optimizer leaves such a parameter as it is.
        """
        tangents = _tangents(self.runtime, executable.local, arrived, factor)
        executable = _of_arrived(self.runtime, executable, arrived.keys())
        with autocast_as(None):
            return self._gradients(executable, saved, tangents)

    def _gradients(self, executable: Executable, saved: Any, tangents: Any) -> dict[str, Any]:
        lowered, runtime = executable.lowered, self.runtime
        binding = binding_of(runtime, executable)
        held = not runtime.syncs or bool(runtime.unreduced)
        if held:
            values, terms = lowered.backward_alone(saved, tangents)
            hold(runtime, executable, terms)
        else:
            values = lowered.backward(saved, tangents)
        found = dict(zip(binding.gradients, values, strict=True))
        if held and runtime.syncs:
            for name, value in reduced(runtime).items():
                known = found.get(name)
                found[name] = value if known is None else known + value
        return found


def bound(
    runtime: Runtime, executable: Executable, parameters: Checked, inputs: Sequence[torch.Tensor],
    device: torch.device,
) -> Step:  # fmt: skip
    """A call's values in the order of the executable's placeholders."""
    binding, sizes = binding_of(runtime, executable), runtime.axis_sizes
    values: list[Any] = [None] * binding.placeholders
    for place, number in binding.parameters:
        values[place] = parameters.parts[number]
    for place in binding.written:  # what the step changes is read by the backward as it was before
        values[place] = values[place].clone()
    for place, storage in binding.padded:
        values[place] = stored.pad(values[place], storage, sizes)
    given = iter(inputs)
    differentiable = []
    for place, entry in binding.others:
        if entry.kind == "buffer":
            buffer = _buffer(runtime, entry.name, device)
            values[place] = buffer.clone() if entry.name in binding.changed else buffer
        elif entry.kind == "input":
            value = next(given)
            _check_shape(entry, value, sizes)
            values[place] = value.detach()
            if value.requires_grad:
                differentiable.append((entry.name, value))
        elif entry.kind == "seed":
            values[place] = torch.stack([_number(runtime.seed, device), _number(runtime.steps, device)])
            runtime.steps += 1
        elif entry.kind == "coordinate":
            index = runtime.coordinate[[name for name, _ in executable.local.axes].index(entry.name)]
            values[place] = _constant(index, device)
    return Step(runtime, executable, binding, parameters, values, differentiable)


def _buffer(runtime: Runtime, name: str, device: torch.device) -> torch.Tensor:
    table, key = runtime.slots[name]
    value: torch.Tensor = table[key]
    if value.device != device:
        raise PlanMismatchError(f"buffer {name} is on {value.device} but the mesh is on {device}")
    return value


def _check_shape(entry: LocalInput, value: torch.Tensor, sizes: Sequence[int]) -> None:
    wanted = entry.storage.computed_shape(sizes)
    if tuple(value.shape) != wanted:
        raise PlanMismatchError(f"{entry.name} has shape {tuple(value.shape)}; the plan is for {wanted}")


def _write(runtime: Runtime, name: str, value: torch.Tensor) -> None:
    """Gives a buffer, or this rank's part of a parameter, its new value; `value` is whole."""
    table, key = runtime.slots[name]
    kept = table[key]
    if name in runtime.specs:
        value = stored.cut(value, runtime.storages[name], runtime.axis_sizes, runtime.coordinate)
        kept = stored.local_part(kept)
    kept.copy_(value)


def _of_arrived(runtime: Runtime, executable: Executable, arrived: Set[str]) -> Executable:
    """The executable with a backward of what arrived alone, where that is not all that has tangents; made once.

    It takes what the forward saved: only the backward is another.
    """
    if binding_of(runtime, executable).tangents <= arrived:
        return executable
    key = id(executable), frozenset(arrived)
    known = runtime.of_arrived.get(key)
    if known is None or known.local is not executable.local:
        make = executable.lowered.of_arrived
        assert make is not None
        known = runtime.of_arrived[key] = replace(executable, lowered=make(frozenset(arrived)))
    return known


def _number(value: int, device: torch.device) -> torch.Tensor:
    """`value` on `device`, written there: a copy of one made here would wait for all that the device has to do."""
    return torch.full((), value, dtype=torch.int64, device=device)


@functools.cache
def _constant(value: int, device: torch.device) -> torch.Tensor:
    """`_number`, made once: for what no program writes to, and what a backward may keep."""
    with torch.inference_mode(False):
        return _number(value, device)


class Differentiable(torch.autograd.Function):
    """A step under autograd: parameters as DTensors in, outputs out; gradients come back as DTensors."""

    @staticmethod
    def forward(ctx: Any, step: Step, *differentiable: Any) -> tuple[torch.Tensor, ...]:
        outputs, saved, shared = step.run()
        ctx.step = step
        ctx.versions = _versions(step)
        ctx.set_materialize_grads(False)
        # Ops on a DTensor do not count as writes to its part: autograd has to see the DTensor too.
        ctx.save_for_backward(*saved, *shared)
        ctx.saved = len(saved)
        # `save_on_cpu` and its like may give another layout back.
        packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.strides = [value.stride() for value in saved] if packed else None
        ctx.mark_non_differentiable(*(o for o, c in zip(outputs, step.binding.constant, strict=True) if c))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward with create_graph=True: gradients of a parallel module have no graph of their own, so no "
                "second derivative; leave create_graph=False, or compute the penalty inside the model's forward"
            )
        step: Step = ctx.step
        if all(gradient is None for gradient in gradients):
            return (None,) * (1 + len(step.differentiable))
        with watch().watching():
            binding, syncs = step.binding, step.runtime.syncs
            given = [gradient is not None for gradient in gradients]
            watch().doing(lambda: _in_words(binding, given, syncs))
            return Differentiable._backward(ctx, step, gradients)

    @staticmethod
    def _backward(ctx: Any, step: Step, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        runtime, binding = step.runtime, step.binding
        arrived: dict[str, torch.Tensor] = {}
        for name, gradient in zip(binding.outputs, gradients, strict=True):
            if gradient is not None:
                arrived[name] = arrived[name] + gradient if name in arrived else gradient
        if step.with_all is None or arrived.keys() <= binding.tangents:
            saved = list(ctx.saved_tensors[: ctx.saved])  # torch's own error where they were let go
            if ctx.strides is not None:
                saved = list(map(laid_out, saved, ctx.strides))
            _check_unchanged(step, ctx.versions, saved)
            _let_go(ctx, step)
            found = step.gradients(step.executable, saved, arrived, 1)
        else:
            _check_unchanged(step, ctx.versions, step.values)
            other, values = step.with_all(step), step.values
            _let_go(ctx, step)
            saved = list(other.lowered.forward(values)[1])
            del values
            # That program averages over the batch's ranks what each brings; these are gradients of one global value.
            found = step.gradients(other, saved, arrived, runtime.batch.count)
        made = _as_stored(step, found)
        if not all(step.parameters.trained):
            _give_frozen(step, made)
        return None, *made, *_of_inputs(step, found)


def _give_frozen(step: Step, gradients: Sequence[torch.Tensor | None]) -> None:
    """Gradients that were held back of parameters frozen since, which autograd brings none."""
    checked = step.parameters
    with torch.no_grad():
        for parameter, trained, gradient in zip(checked.tensors, checked.trained, gradients, strict=True):
            if gradient is not None and not trained:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _let_go(ctx: Any, step: Step) -> None:
    """Frees what is kept for one backward, unless autograd keeps the graph for another: a loss may live on."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return
    step.values, step.with_all = [], None
    if (clear := getattr(ctx, "maybe_clear_saved_tensors", None)) is not None:
        clear()


def _in_words(binding: Binding, given: Sequence[bool], syncs: bool) -> str:
    """What tells backwards apart that ranks have in common."""
    there = {name for name, arrived in zip(binding.outputs, given, strict=True) if arrived}
    of = "" if there == binding.tangents else f" of {' and '.join(map(repr, sorted(there)))} alone"
    return f"a backward{of} that {'exchanges gradients' if syncs else 'exchanges no gradients'}"


def _versions(step: Step) -> list[int]:
    """How often each parameter, then each other value, was written to."""
    others = [step.values[place] for place, _ in step.binding.others]
    return [0 if each.is_inference() else each._version for each in (*step.parameters.tensors, *others)]


def _check_unchanged(step: Step, versions: Sequence[int], read: Sequence[torch.Tensor]) -> None:
    """Refuse to go on with values that were written to since the forward, as autograd does on one device.

    By itself it would not see it: ops on a DTensor do not count as writes to its part, and a forward that is run again
    reads its inputs again.
    """
    if (now := _versions(step)) == versions:
        return
    others = step.binding.others
    names = (*step.runtime.specs, *(entry.name for _, entry in others))
    parts = (*step.parameters.parts, *(step.values[place] for place, _ in others))
    here = set(map(id, read))
    for name, part, before, after in zip(names, parts, versions, now, strict=True):
        if before != after and id(part) in here:
            raise RuntimeError(
                f"{name} was changed in place after a forward whose backward needs it as it was: run backward before "
                "the optimizer's step or the next batch, or give it a copy"
            )


def _tangents(
    runtime: Runtime, local: LocalProgram, arrived: Mapping[str, torch.Tensor], factor: int
) -> list[torch.Tensor]:
    """This rank's part of each tangent that arrived, in the program's order; times `factor` what the batch splits."""
    split = {entry.name for entry in local.program.inputs if entry.kind == "tangent" and entry.batch_dim is not None}
    result = []
    for entry in local.inputs:
        value = arrived.get(entry.name) if entry.kind == "tangent" else None
        if value is None:
            continue
        if isinstance(value, DTensor):
            layout = stored.placements(entry.storage, runtime.axis_sizes, entry.name)
            if tuple(value.placements) != layout:
                value = value.redistribute(runtime.mesh, layout)
            value = stored.local_part(value)
        result.append(value * factor if factor != 1 and entry.name in split else value)
    return result


def _of_inputs(step: Step, found: Mapping[str, torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """The inputs' gradients: what is averaged over the batch's ranks, as what arrives from outputs is.

    So of an input that the batch splits it is this rank's term times their number: what `DistributedDataParallel` and
    FSDP2 give, and what another parallel module, or one under either of these, takes whose output the input is.
    """
    for name, _ in step.inputs:
        gradient = found.get(name)
        if gradient is not None and name in step.binding.parted:
            gradient = gradient * step.runtime.batch.count
        yield gradient


def _as_stored(step: Step, found: Mapping[str, torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The parameters' gradients as DTensors, each laid out as its parameter: fused optimizers take both as they lie."""
    made: list[torch.Tensor | None] = []
    for (name, of), (shape, stride) in zip(step.runtime.specs.items(), step.parameters.layouts, strict=True):
        gradient = found.get(name)
        if gradient is not None:
            if gradient.shape != shape:
                gradient = stored.unpad(gradient, shape)
            gradient = Gradient.of(laid_out(gradient, stride), of)
        made.append(gradient)
    return made
