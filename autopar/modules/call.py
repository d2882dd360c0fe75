"""A call of a parallel module: its inputs and parameters are checked, and what runs such calls is found or made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.examples import by_name
from autopar.modules import settings
from autopar.modules.kinds import CallKind, kind_of, path_text, warn_of_given
from autopar.modules.parameters import checked
from autopar.modules.reading import MOST_GRAPHS, Values, too_many
from autopar.modules.runtime import Executable, Runtime, device_of, plain_module, runtime_of
from autopar.modules.step import Differentiable, Step, bound
from autopar.ranks.together import watch
from passes.capture.autocast import autocast_as
from passes.capture.inputs import flatten_call
from passes.errors import PlanMismatchError


def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model returns for this call, by the executable for calls of its kind; it is made where there is none."""
    with watch().watching():
        return _forward(runtime_of(module), module, args, kwargs)


def _forward(runtime: Runtime, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = by_name(runtime.original.forward, args, kwargs)
    leaves, in_spec = flatten_call(args, kwargs)
    device = device_of(runtime.mesh)
    if any(isinstance(leaf, torch.Tensor) and (leaf.device != device or isinstance(leaf, DTensor)) for leaf in leaves):
        raise _wrong_input(args, kwargs, device)
    _check_modules(runtime)
    parameters = checked(runtime, device)
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    trains = torch.is_grad_enabled() and (any(parameters.trained) or any(leaf.requires_grad for leaf in inputs))
    kind = kind_of(runtime, leaves, in_spec, parameters.trained if trains else None)
    watch().doing(kind.in_words)
    executable = _fitting(runtime, kind, inputs)
    if executable is None:
        warn_of_given(runtime, kind, args, kwargs)
        with torch.inference_mode(False), torch.set_grad_enabled(trains):
            executable = runtime.remake(plain_module(module, parameters.trained), args, kwargs, "loss", trains)
        runtime.executables.setdefault(kind, []).insert(0, executable)
    if id(executable) not in runtime.bindings:  # the first call of its kind
        _check_batch(runtime, executable, inputs)
    step = bound(runtime, executable, parameters, inputs, device)

    def with_all(step: Step) -> Executable:
        if id(executable) not in runtime.with_all:
            with torch.enable_grad(), autocast_as(kind.autocast):  # all as it was at the call, whatever it is now
                plain = plain_module(module, parameters.trained, step.buffers)
                for each, training in zip(plain.modules(), kind.modes, strict=True):
                    each.training = training
                settings.put_back(plain, executable)
                runtime.with_all[id(executable)] = runtime.remake(plain, args, kwargs, "all", True)
        return runtime.with_all[id(executable)]

    step.with_all = with_all
    outputs = Differentiable.apply(step, *step.differentiable) if trains else tuple(step.run()[0])
    program = executable.local.program
    result: list[Any] = [program.out_constants.get(i) for i in range(program.out_spec.num_leaves)]
    for index, value in zip((i for i in range(len(result)) if i not in program.out_constants), outputs, strict=True):
        result[index] = value
    return pytree.tree_unflatten(result, program.out_spec)


def _check_modules(runtime: Runtime) -> None:
    """Refuse a tree in which a module is gone or another: the program is of those that it was made from."""
    tables, keys, modules, names = runtime.children
    if not all(map(is_, map(dict.get, tables, keys), modules)):
        changed = next(n for t, k, m, n in zip(tables, keys, modules, names, strict=True) if t.get(k) is not m)
        raise PlanMismatchError(
            f"{changed} was replaced or taken out, and the plan is for the module that was there; change the model "
            "before parallelize"
        )


def _check_batch(runtime: Runtime, executable: Executable, inputs: Sequence[torch.Tensor]) -> None:
    given = [entry for entry in executable.local.program.inputs if entry.kind == "input"]
    runtime.batch.check([(e.path, e.batch_dim, value) for e, value in zip(given, inputs, strict=True)])


def _fitting(runtime: Runtime, kind: CallKind, inputs: Sequence[torch.Tensor]) -> Executable | None:
    """What runs calls of this kind with the values that modules, buffers and `inputs` hold; None where it must be made.

    Raises:
        CaptureError: the model reads another value at every call.
    """
    known = runtime.executables.get(kind, [])
    fitting = [executable for executable in known if settings.hold(runtime, executable)]
    if known and not fitting:
        settings.warn_of_new(runtime, known[0])
    values: Values | None = None
    for executable in fitting:
        program = executable.local.program
        guards = program.guards
        if guards is None:
            return executable
        if values is None:
            values = Values(program, inputs, runtime.gather, lambda name: _buffer(runtime, name), runtime.seen)
        fixed = values.broken(guards, runtime.held.get(id(executable)))
        if not fixed:
            runtime.held[id(executable)] = values.buffers(guards)
            known.remove(executable)
            known.insert(0, executable)
            return executable
        if len(fitting) >= MOST_GRAPHS and executable is fitting[-1]:
            raise too_many(fixed)
    return None


def _buffer(runtime: Runtime, name: str) -> torch.Tensor:
    table, key = runtime.slots[name]
    return cast(torch.Tensor, table[key])


def _wrong_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> ValueError:
    """The error for the first input that is no plain tensor on `device`."""
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    for path, leaf in paths:
        if isinstance(leaf, DTensor):
            return ValueError(
                f"{path_text(path)} is a DTensor; pass this data-parallel rank's own batch as a plain tensor"
            )
        if isinstance(leaf, torch.Tensor) and leaf.device != device:
            return ValueError(
                f"{path_text(path)} is on {leaf.device} but the mesh is on {device}; move it with .to({str(device)!r})"
            )
    raise AssertionError("no input is wrong")
