"""The parameters as a call finds them, checked to be what the plan was made for.

The checks read each parameter. So they are made once, and again where a tensor is not the one that was checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from autopar.modules import stored
from autopar.modules.runtime import Runtime
from passes.errors import PlanMismatchError


@dataclass(frozen=True)
class Checked:
    """Parameters in the order of `Runtime.specs`, and this rank's part of each."""

    tensors: Sequence[Any]
    parts: Sequence[torch.Tensor]
    trained: tuple[bool, ...]
    """Which require gradients."""
    layouts: Sequence[tuple[torch.Size, tuple[int, ...]]]
    """Shape and strides of each part."""
    device: torch.device


def checked(runtime: Runtime, device: torch.device) -> Checked:
    """The parameters of a call on `device`.

    Raises:
        PlanMismatchError: one is not what the plan was made for.
    """
    try:
        tensors = [table[key] for table, key in runtime.parameter_slots]
        trained = tuple(tensor.requires_grad for tensor in tensors)
    except (AttributeError, KeyError):
        raise _taken_out(runtime, runtime.specs) from None
    known: Checked | None = runtime.checked
    if (
        known is None
        or known.device != device
        or not all(map(is_, tensors, known.tensors))
        or not all(map(is_, map(stored.local_part, tensors), known.parts))
        or trained != known.trained
    ):
        for name, tensor in zip(runtime.specs, tensors, strict=True):
            _check(runtime, name, tensor, device)
        parts = [stored.local_part(tensor) for tensor in tensors]
        layouts = [(part.shape, part.stride()) for part in parts]
        known = Checked(tensors, parts, trained, layouts, device)
        runtime.checked = known
    for alias, name in runtime.aliases.items():
        table, key = runtime.slots[alias]
        target, target_key = runtime.slots[name]
        if (found := table.get(key)) is not target.get(target_key):
            if found is None:
                raise _taken_out(runtime, [alias])
            raise PlanMismatchError(f"{alias} was tied to {name} when the plan was made and no longer is")
    return known


def _taken_out(runtime: Runtime, names: Iterable[str]) -> PlanMismatchError:
    """The error for the first of `names` that is no longer there."""
    slots = ((name, runtime.slots[name]) for name in names)
    gone = next(name for name, (table, key) in slots if table.get(key) is None)
    return PlanMismatchError(
        f"{gone} was taken out, as torch.nn.utils.prune and parametrizations do, and the plan is for the parameter "
        "that was there; change the model before parallelize"
    )


def _check(runtime: Runtime, name: str, parameter: Any, device: torch.device) -> None:
    of = runtime.specs[name]
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
    part = stored.local_part(parameter)
    if part.device != device:
        hint = "call to_empty(device=...) and load or initialise it" if part.is_meta else f"move it to {device}"
        raise PlanMismatchError(f"{name} is on {part.device} but the mesh is on {device}; {hint}")
