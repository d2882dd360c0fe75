"""Buffers that no checkpoint holds (rotary frequencies, masks, position ids) through `to_empty`.

`to_empty` gives every tensor fresh storage. A buffer outside the state dict that held values keeps them. One that was
on the meta device never had any: where the model's class offers what Hugging Face's do (`_init_weights(module)`, which
fills a module's buffers beside its parameters), that is called for the modules that hold such buffers, whose parameters
have no values yet either. What is left is filled with NaN, so that it cannot pass for data, and named in a warning.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def kept(root: nn.Module, device: Any) -> Iterator[None]:
    """Puts the values of buffers outside the state dict back after the block, on `device`."""
    before = {
        (id(module), key): (module, key, module._buffers[key])
        for module in root.modules()
        for key in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(key) is not None
    }
    yield
    restored: dict[int, torch.Tensor] = {}
    lost: list[tuple[nn.Module, str]] = []
    for module, key, old in before.values():
        assert old is not None
        if old.is_meta:
            lost.append((module, key))
            continue
        if id(old) not in restored:
            restored[id(old)] = old.to(device, copy=True)
        module._buffers[key] = restored[id(old)]
    if lost and torch.device(device).type != "meta":
        _rebuild(root, lost)


def _rebuild(root: nn.Module, lost: list[tuple[nn.Module, str]]) -> None:
    """Has the model fill the buffers `lost`; poisons and names those it does not."""
    marks: dict[tuple[int, str], torch.Tensor] = {}
    for module, key in lost:
        buffer = module._buffers[key]
        assert buffer is not None
        with torch.no_grad():
            buffer.fill_(_poison(buffer.dtype))
        marks[id(module), key] = buffer.clone()
    init = getattr(root, "_init_weights", None)
    if callable(init):
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for module in {id(module): module for module, _ in lost}.values():
                init(module)
    names = {id(module): name for name, module in root.named_modules()}
    left = []
    for module, key in lost:
        buffer, mark = module._buffers[key], marks[id(module), key]
        if buffer is not None and buffer.shape == mark.shape and bool(((buffer == mark) | buffer.isnan()).all()):
            left.append(f"{names[id(module)]}.{key}".lstrip("."))
    if left:
        warnings.warn(
            f"to_empty: buffers {left} were made on the meta device and are not in the state dict, so nothing will "
            "load them; they hold NaN (numbers that cannot occur, for integers) until you set them",
            stacklevel=4,
        )


def _poison(dtype: torch.dtype) -> Any:
    """A value that no computed buffer holds everywhere."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).max - 1
