"""A call of a parallel module: its inputs and parameters are checked, and what runs such calls is found or made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.examples import by_name
from autopar.modules import settings
from autopar.modules.parameters import checked
from autopar.modules.reading import MOST_GRAPHS, Values, too_many
from autopar.modules.runtime import Executable, Runtime, device_of, plain_module, runtime_of
from autopar.modules.step import Differentiable, Step, bound
from autopar.ranks.together import watch
from passes.capture.autocast import autocast_as, autocast_dtype
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
    key = call_key(runtime, leaves, in_spec, parameters.trained if trains else None)
    watch().doing(lambda: _in_words(key))
    executable = _fitting(runtime, key, inputs)
    if executable is None:
        _warn_of_given(runtime, key, args, kwargs)
        with torch.inference_mode(False), torch.set_grad_enabled(trains):
            executable = runtime.remake(plain_module(module, parameters.trained), args, kwargs, "loss", trains)
        runtime.executables.setdefault(key, []).insert(0, executable)
    if id(executable) not in runtime.bindings:  # the first call of its kind
        _check_batch(runtime, executable, inputs)
    step = bound(runtime, executable, parameters, inputs, device)
    _, _, _, modes, autocast, _ = key

    def with_all(step: Step) -> Executable:
        if id(executable) not in runtime.with_all:
            with torch.enable_grad(), autocast_as(autocast):  # all as it was at the call, whatever it is now
                plain = plain_module(module, parameters.trained, step.buffers)
                for each, training in zip(plain.modules(), modes, strict=True):
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


def _in_words(key: Any) -> str:
    """What tells calls apart that ranks have in common: not numbers and objects, whose words may differ."""
    _, leaves, trained, modes, autocast, _ = key
    tensors = ", ".join(f"{str(leaf[1]).removeprefix('torch.')}{list(leaf[0])}" for leaf in leaves if len(leaf) == 3)
    gradients = "no gradients" if trained is None else f"gradients of {sum(trained)} parameters"
    cast_to = "" if autocast is None else f" under autocast to {autocast}"
    return f"a forward of {tensors} with {gradients}, {sum(modes)} of {len(modes)} modules in training mode{cast_to}"


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


def _fitting(runtime: Runtime, key: Any, inputs: Sequence[torch.Tensor]) -> Executable | None:
    """What runs calls of this kind with the values that modules, buffers and `inputs` hold; None where it must be made.

    Raises:
        CaptureError: the model reads another value at every call.
    """
    known = runtime.executables.get(key, [])
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


def _warn_of_given(runtime: Runtime, key: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Says, on rank 0, which numbers, texts, functions or objects a call was given that are others than those of a
    known one, alike but for them."""
    if runtime.mesh.get_rank() != 0:
        return
    spec, leaves, *rest = key
    alike = (known[1] for known in reversed(runtime.executables) if (known[0], known[2:]) == (spec, tuple(rest)))
    before = next((each for each in alike if _differ_by_chance(each, leaves)), None)
    if before is None:
        return
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    changed = [
        f"{_path(path)} ({old[1]!r}, now {new[1]!r})"
        for (path, _), old, new in zip(paths, before, leaves, strict=True)
        if old != new
    ]
    instead = "pass what changes often as a tensor, functions and objects as the same ones, and no names of samples"
    settings.warn_of_changed(changed, instead)


def _differ_by_chance(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether calls differ in numbers or texts, or in which object of a class they were given (a lambda made for
    each)."""
    differing = [pair for pair in zip(before, now, strict=True) if pair[0] != pair[1]]
    return bool(differing) and all(_are_values(*pair) or _are_objects(*pair) for pair in differing)


def _are_values(*leaves: Any) -> bool:
    return all(len(leaf) == 2 and issubclass(leaf[0], int | float | str) and leaf[0] is not bool for leaf in leaves)


def _are_objects(old: Any, new: Any) -> bool:
    """Whether both are of one class whose objects are equal to themselves alone."""
    return len(old) == len(new) == 2 and old[0] is new[0] and old[0].__eq__ is object.__eq__


def _buffer(runtime: Runtime, name: str) -> torch.Tensor:
    table, key = runtime.slots[name]
    return cast(torch.Tensor, table[key])


def _wrong_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> ValueError:
    """The error for the first input that is no plain tensor on `device`."""
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    for path, leaf in paths:
        if isinstance(leaf, DTensor):
            return ValueError(f"{_path(path)} is a DTensor; pass this data-parallel rank's own batch as a plain tensor")
        if isinstance(leaf, torch.Tensor) and leaf.device != device:
            return ValueError(
                f"{_path(path)} is on {leaf.device} but the mesh is on {device}; move it with .to({str(device)!r})"
            )
    raise AssertionError("no input is wrong")


def _path(path: tuple[Any, ...]) -> str:
    """`input_ids` or `args[0]` for a leaf of `(args, kwargs)`."""
    side, *rest = path
    text = pytree.keystr(tuple(rest))
    if getattr(side, "idx", 0) == 0:
        return f"args{text}"
    first, *deeper = rest
    return f"{getattr(first, 'key', first)}{pytree.keystr(tuple(deeper))}"


def _constant(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), repr(leaf)
    return type(leaf), math.nan if isinstance(leaf, float) and math.isnan(leaf) else leaf  # one that is itself


def call_key(runtime: Runtime, leaves: Sequence[Any], in_spec: Any, trained: tuple[bool, ...] | None) -> Any:
    """What tells calls apart that need different graphs; `trained` is None for a call without gradients."""
    what = tuple(
        (leaf.shape, leaf.dtype, leaf.requires_grad and trained is not None)
        if isinstance(leaf, torch.Tensor)
        else _constant(leaf)
        for leaf in leaves
    )
    modes = tuple(module.training for module in runtime.modules)
    buffers = tuple(
        None if (buffer := table.get(key)) is None else (buffer.shape, buffer.dtype)
        for table, key in runtime.buffer_slots
    )
    return str(in_spec), what, trained, modes, autocast_dtype(), buffers
