"""Tensors in given strides."""

from __future__ import annotations

import torch


def laid_out(value: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """`value` with these strides."""
    if value.stride() == stride or value.numel() <= 1:
        return value
    wanted = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    return wanted.copy_(value)
