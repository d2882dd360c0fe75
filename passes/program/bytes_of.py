"""A tensor's values as bytes, which every collective library moves whatever the dtype, and as one number."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_WORDS, _WORDS = 1 << 16, 1 << 24
"""Words at a time: what a core's cache holds, or few kernels."""


def bytes_of(tensor: Tensor) -> Tensor:
    """Its values in order as uint8 [bytes], at an address that four divides; a view where they lie so."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1 or flat.storage_offset() * flat.itemsize % 4:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def digest(tensor: Tensor) -> Tensor:
    """One int64 on `tensor`'s device that follows from all values and their places."""
    words = bytes_of(tensor)
    if words.numel() % 4 == 0:
        words = words.view(torch.int32)
    size = _CPU_WORDS if words.is_cpu else _WORDS
    places = torch.arange(1, min(size, words.numel()) + 1, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, part in enumerate(words.split(size)):
        # Each word times its place, in which sums may wrap.
        total += (part * places[: part.numel()]).sum() + number * size * part.sum(dtype=torch.int64)
    return total
