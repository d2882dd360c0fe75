"""The module a user trains: the model's own class and names, DTensor parameters, and one compiled step per call shape.

    call -> kind (inputs, modes) -> Executable: forward(this rank's values) -> outputs, saved
                                                backward(saved, tangents)   -> gradients as DTensors

The tree is a copy that shares everything with the user's model but its tensors, so that stays as it was. The forward of
the model's class is never run: a call looks its executable up, or has it made by `remake`, which captures the model
again for a call of a new kind, with the parameters where they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.examples import by_name
from autopar.modules import buffers as buffers_
from autopar.modules import hooks, stored, tree, whole
from autopar.modules.alone import guard
from autopar.modules.batches import BatchRanks
from autopar.modules.call import call
from autopar.modules.kinds import kind_of
from autopar.modules.reading import Gather
from autopar.modules.runtime import OWN_FORWARD, Executable, Remake, Runtime, device_of, has_gradients, runtime_of
from passes.capture.inputs import flatten_call
from passes.errors import PlanMismatchError
from passes.program.bytes_of import bytes_of
from passes.program.local import Storage


class ParallelModule(nn.Module):
    """A model whose forward runs this rank's part of a planned step. Made by `parallel_module`; never built by hand."""

    @property
    def random_steps(self) -> int:
        """How many calls have drawn random numbers (dropout): with `Options.seed`, what the next masks follow from.

        It is not in `state_dict`, whose keys are the model's own. Save it beside a checkpoint, the same on every rank,
        and set it after loading: the run then draws what it would have drawn without the stop.
        """
        return runtime_of(self).steps

    @random_steps.setter
    def random_steps(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"random_steps = {steps}: a number of calls is not negative")
        runtime_of(self).steps = steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns, for this data-parallel rank's batch."""
        return call(self, args, kwargs)

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Whether the backwards to come exchange gradients between ranks, as FSDP2's method of this name.

        With False a backward adds its gradients up on this rank, in fp32 and unsharded where they are no better, and
        leaves `.grad` of parameters whose gradients need an exchange as it is. The next backward with True exchanges
        the sums. So a step of several micro-batches communicates gradients once.
        """
        del recurse  # the whole module is one program
        runtime_of(self).syncs = requires_gradient_sync

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """DDP's context: backwards inside exchange no gradients, the next one outside exchanges their sums too."""
        runtime = runtime_of(self)
        before, runtime.syncs = runtime.syncs, False
        try:
            yield
        finally:
            runtime.syncs = before

    @property
    def _is_accelerate_prepared(self) -> bool:
        """What `accelerate` asks of a model before it wraps it in what would be wrong around this one.

        Raises:
            ValueError: it is not our `Accelerator` that asks, so loaders would split batches over all ranks.
        """
        runtime = runtime_of(self)
        if not runtime.accelerating:
            raise ValueError(
                "accelerate's own Accelerator, which transformers.Trainer uses too, would wrap the parallel module in "
                "DistributedDataParallel and split batches over ranks that share one; use "
                "autopar.accelerator.Accelerator(model, ...), or autopar.trainer.Trainer for transformers.Trainer"
            )
        return runtime.accelerated

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, prepared: bool) -> None:
        runtime_of(self).accelerated = prepared

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """FSDP2's method, which loops over micro-batches call. Nothing is put off past a backward here: no effect."""

    def set_reshard_after_backward(self, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """FSDP2's method. Gathered parameters are freed after each layer and gathered again here: no effect."""

    def to_empty(self, *, device: Any, recurse: bool = True) -> ParallelModule:
        """Storage without values on `device`; ties stay, and buffers that no checkpoint holds keep their values."""
        with buffers_.kept(self, device):
            super().to_empty(device=device, recurse=recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        # Without gradients, as parameters are copied: of a DTensor's torch copies them too, and 2.11 fails to.
        gradients = {parameter: parameter.grad for parameter in self.parameters()}
        new, mesh = object.__new__(type(self)), runtime_of(self).mesh
        memo |= {id(self): new, id(mesh): mesh}
        try:
            for parameter in gradients:
                parameter.grad = None
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a parallel module cannot be pickled, as its programs and process groups belong to this process; save its "
            "state_dict(), with torch.distributed.checkpoint or torch.save"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> ParallelModule:
        # Converting visits each name of a tied tensor by itself, and may leave two.
        super()._apply(fn, recurse)
        runtime = runtime_of(self)
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
    batch_axes: tuple[int, ...] = (),
    from_first: bool = False,
    gather: Gather | None = None,
) -> ParallelModule:
    """`model` with this rank's part of every parameter; `model` itself stays as it was.

    storages: of every parameter, by the first of its names. aliases: further name -> first name, buffers' too.
    batch_axes: the mesh's axes that split the batch, outermost first.
    from_first: take rank 0's values of parameters and buffers, broadcast; else this rank's own.
    gather: makes an input whole, for models that read values of their inputs.
    """
    sizes, coordinate = tuple(mesh.shape), mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not on the mesh {mesh}")
    device = device_of(mesh)
    specs: dict[str, Any] = {}

    def parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        storage = storages[name]
        _check_parameter(name, old, storage)
        layout = stored.placements(storage, sizes, name)
        specs[name] = stored.spec(mesh, layout, old.shape, old.dtype)
        part = stored.cut(values(old), storage, sizes, coordinate)
        part = part.contiguous() if part.is_meta else part.to(device).clone(memory_format=torch.contiguous_format)
        new = nn.Parameter(stored.distributed(part, specs[name]), requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        return new

    def buffer(name: str, old: torch.Tensor) -> torch.Tensor:
        return old if old.is_meta else values(old).to(device, copy=True)

    def values(old: torch.Tensor) -> torch.Tensor:
        return _of_first_rank(old, device) if from_first and not old.is_meta else old.detach()

    original = type(model)
    new = tree.copied(model, parameter, buffer)
    slots = dict(tree.slots(new))
    runtime = Runtime(
        mesh=mesh,
        batch=BatchRanks(mesh, batch_axes),
        storages=storages,
        specs=specs,
        aliases=dict(aliases),
        slots=slots,
        modules=list(new.modules()),
        children=tree.children(new),
        original=original,
        remake=remake,
        seed=seed,
        gather=gather,
    )
    new.__dict__["_autopar"] = runtime
    if "forward" in new.__dict__:
        new.__dict__[OWN_FORWARD] = new.__dict__.pop("forward")
    new.__class__ = _parallel_class(original)  # type: ignore[arg-type]
    hooks.set_aside(new)
    guard(new)
    whole.cut_on_loading(new, runtime)
    return cast(ParallelModule, new)


def _check_parameter(name: str, parameter: nn.Parameter, storage: Storage) -> None:
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"{name} has a hook on its gradient, which would never run: parallelize makes new parameters. Register "
            "it on the parallel module's"
        )
    if tuple(parameter.shape) != storage.shape:
        raise PlanMismatchError(
            f"{name} has shape {tuple(parameter.shape)} but the plan was made for {storage.shape}; plan again"
        )


def _of_first_rank(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's values of a tensor that every rank has in the same shape and dtype; collective."""
    raw = bytes_of(tensor.to(device)).clone()
    dist.broadcast(raw, 0)
    return raw.view(tensor.dtype).view(tensor.shape)


@functools.cache
def _parallel_class(original: type[nn.Module]) -> type[nn.Module]:
    # Compiled by us already; under `torch.compile(module)` it runs as it is.
    @torch.compiler.disable
    def forward(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        return call(self, args, kwargs)

    functools.update_wrapper(forward, original.forward)
    body = {"forward": forward, "__doc__": original.__doc__, "__module__": original.__module__}
    # Under the model's own name: transformers looks it up, and writes it to configurations as the architecture.
    return type(original.__name__, (ParallelModule, original), body)


def preload(module: ParallelModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], executable: Executable) -> None:
    """Has `executable` run training calls like `(args, kwargs)`."""
    runtime = runtime_of(module)
    leaves, in_spec = flatten_call(*by_name(runtime.original.forward, args, kwargs))
    requires = tuple(table[key].requires_grad for table, key in runtime.parameter_slots)
    trained = requires if has_gradients(executable.local) else None
    runtime.executables[kind_of(runtime, leaves, in_spec, trained)] = [executable]


def state_bytes(module: ParallelModule) -> int:
    """Bytes of this rank's parameters."""
    parts = (stored.local_part(p) for p in module.parameters() if isinstance(p, DTensor))
    return sum(math.prod(part.shape) * part.element_size() for part in parts)
