"""The model as autopar takes it: a module, before any other parallelism is applied, that trains its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from autopar.modules.module import ParallelModule

_WRAPPERS = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, FSDPModule)


def check_unwrapped(model: Any) -> None:
    """Refuse what is no module, a model that is already laid out over ranks, and buffers that require gradients.

    Raises:
        ValueError: with what was found, and where in the model.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, type):
            raise ValueError(f"model is the class {model.__name__}; pass a module that was made of it")
        raise ValueError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    _check_modules(model)
    _check_tensors(model)


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = name or "the model"
        if isinstance(module, ParallelModule):
            raise ValueError(f"{where} is parallel already; pass the model that was given to parallelize before")
        if isinstance(module, _WRAPPERS):
            kind = next(each for each in _WRAPPERS if isinstance(module, each)).__name__
            raise ValueError(f"{where} is under {kind}; pass the model before any other parallelism is applied")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is compiled TorchScript; pass the module that it was scripted or traced from")


def _check_tensors(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet, as of a lazy module; run the model once on a batch before")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is a DTensor already; pass the model before any other parallelism is applied")
    trained = set(map(id, model.parameters()))
    for name, buffer in model.named_buffers():
        if buffer.requires_grad and id(buffer) not in trained:
            raise ValueError(
                f"{name} is a buffer that requires a gradient, which only parameters and inputs get; make it an "
                "nn.Parameter, or detach() it before it is registered"
            )
