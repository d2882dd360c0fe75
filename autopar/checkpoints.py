"""What trainers keep of a parallel module: whole tensors for `from_pretrained`, parts for going on.

Every function is collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autopar.modules.module import ParallelModule
from autopar.modules.runtime import runtime_of
from autopar.modules.whole import part_of


def whole_state(module: ParallelModule, keep: bool) -> dict[str, torch.Tensor]:
    """`state_dict` with whole tensors on the CPU, ties kept; empty where this rank does not `keep` it.

    One tensor after another is made whole, so a device needs room for the largest.
    """
    aliases = runtime_of(module).aliases
    wholes: dict[str, torch.Tensor | None] = {}  # by first name; None where it is not kept, so that ranks do the same
    state: dict[str, torch.Tensor] = {}
    for name, value in module.state_dict().items():
        first = aliases.get(name, name)
        if first not in wholes:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            wholes[first] = whole.cpu() if keep else None
        if (kept := wholes[first]) is not None:
            state[name] = kept
    return state


def save_parts(folder: str, module: ParallelModule, optimizers: Mapping[str, Optimizer], with_model: bool) -> None:
    """Each rank's parts of optimizers' states, and of parameters where asked; any mesh and strategy can load them."""
    state_dict_saver.save(_parts(module, optimizers, with_model), checkpoint_id=folder)


def load_parts(folder: str, module: ParallelModule, optimizers: Mapping[str, Optimizer], with_model: bool) -> None:
    """Loads what `save_parts` saved, and goes on with random numbers (dropout) where it was."""
    parts = _parts(module, optimizers, with_model)
    state_dict_loader.load(parts, checkpoint_id=folder)
    if with_model:
        set_model_state_dict(module, parts["model"])
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(module, optimizer, parts[name])
    module.random_steps = parts["random_steps"]


def _parts(module: ParallelModule, optimizers: Mapping[str, Optimizer], with_model: bool) -> dict[str, Any]:
    parts: dict[str, Any] = {name: get_optimizer_state_dict(module, each) for name, each in optimizers.items()}
    if with_model:
        parts["model"] = get_model_state_dict(module)
    return {**parts, "random_steps": module.random_steps}


def load_whole_optimizer(module: ParallelModule, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads an optimizer's `state_dict` of one device, whose states are whole: each rank takes its parts.

    "step" is a count, and no part of a parameter that is one number, as torch's `load_state_dict` has it.

    Raises:
        ValueError: the optimizer has its parameters in other groups.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if (saved := [len(group["params"]) for group in state["param_groups"]]) != sizes:
        raise ValueError(f"the optimizer's groups have {sizes} parameters, those saved {saved}; make it as it was")
    runtime = runtime_of(module)
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    cut: dict[int, Any] = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            whole, name = state["state"][number], names[parameter]
            cut[number] = {
                key: part_of(value, runtime.specs[name], runtime.storages[name])
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and key != "step"
                else value
                for key, value in whole.items()
            }
    optimizer.load_state_dict({"state": cut, "param_groups": state["param_groups"]})
