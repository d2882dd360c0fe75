"""Whole tensors, as one device saves them, in what a parallel module, or one inside it, loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.modules import stored
from autopar.modules.runtime import Runtime, device_of
from passes.program.local import Storage


@dataclass(frozen=True)
class Cut:
    """A pre-hook of a module's `load_state_dict`. `layouts`: spec and storage of its parameters, by key."""

    layouts: Mapping[str, tuple[Any, Storage]]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, (spec, storage) in self.layouts.items():
            given = state.get(prefix + key)
            if not isinstance(given, torch.Tensor) or isinstance(given, DTensor) or given.is_meta:
                continue
            if tuple(given.shape) == storage.shape:
                state[prefix + key] = part_of(given, spec, storage)


def part_of(whole: torch.Tensor, spec: Any, storage: Storage) -> DTensor:
    """`whole`, which every rank has, laid out as its parameter is: a copy, in the parameter's dtype."""
    mesh = spec.mesh
    part = stored.cut(whole.detach(), storage, tuple(mesh.shape), mesh.get_coordinate())
    return stored.distributed(part.to(device_of(mesh), spec.tensor_meta.dtype, copy=True).contiguous(), spec)


def cut_on_loading(root: nn.Module, runtime: Runtime) -> None:
    """Make `load_state_dict` of each module of `root` accept whole tensors. Hooks of the module itself, which may
    rename keys, run before."""
    for prefix, module in root.named_modules():
        names = {key: f"{prefix}.{key}" if prefix else key for key, p in module._parameters.items() if p is not None}
        firsts = {key: runtime.aliases.get(name, name) for key, name in names.items()}
        layouts = {key: (runtime.specs[name], runtime.storages[name]) for key, name in firsts.items()}
        if layouts:
            module.register_load_state_dict_pre_hook(Cut(layouts))
