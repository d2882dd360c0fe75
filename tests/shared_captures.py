"""Captures that searches and prices of a test file have in common: they ask of the same few models again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from autopar.runs import subject
from autopar.runs.profiling import Captures


@contextmanager
def captured_once() -> Iterator[None]:
    """Meanwhile a model of `transformers` that is like one before, and fed the same, is not captured anew."""
    made: dict[Any, Captures] = {}

    def shared(model: nn.Module, inputs: Callable[[int], Any], **how: Any) -> Captures:
        if not hasattr(model, "config"):
            return Captures(model, inputs, **how)
        told = {name: repr(value) for name, value in how.items() if name != "progress"}
        key = (*_is(model), _fed(inputs(1)), tuple(told.items()))
        if key not in made:
            made[key] = Captures(model, inputs, **how)
        return made[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subject, "Captures", shared)
        yield


def _is(model: Any) -> tuple[Any, ...]:
    """All that a capture of it depends on; values of parameters are none of that."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kinds = [(name, x.shape, x.dtype, x.device, x.requires_grad) for name, x in tensors]
    config = model.config.to_json_string(use_diff=False), model.config._attn_implementation
    return type(model), config, repr(model), model.training, tuple(kinds)


def _fed(inputs: Any) -> Any:
    leaves, spec = pytree.tree_flatten(inputs)
    return str(spec), tuple(_of(x) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)


def _of(x: torch.Tensor) -> Any:
    return x.shape, x.dtype, None if x.is_meta else repr(x.tolist())
