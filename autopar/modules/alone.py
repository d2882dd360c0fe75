"""Modules inside a parallel module hold parts of their parameters; what one gives by itself would be DTensor's error.

The forward of the whole model is captured, so nothing of ours calls an inner module. A user does, from a method of the
model beside its forward (`encode`, `hidden`), or as `model.embed(ids)`: that is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Alone:
    """A forward pre-hook of the inner module `name`."""

    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(not isinstance(x, DTensor) for x in given):
            raise ValueError(
                f"{self.name} was called outside of the model's forward, which alone runs on the mesh (the parameters "
                "of inner modules are stored in parts). Have the model's forward do it, by an argument, or call a "
                "plain copy of the model that has the weights of torch.distributed.checkpoint.state_dict's "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
            )


def guard(root: nn.Module) -> None:
    """Refuse plain tensors in the modules of `root` that have parameters of their own."""
    for name, module in root.named_modules():
        if name and any(isinstance(p, DTensor) for p in module._parameters.values()):
            module.register_forward_pre_hook(Alone(name), with_kwargs=True)
