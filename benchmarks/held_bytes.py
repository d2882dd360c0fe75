"""Bytes that a rank holds: its process, and its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def resident(field: str) -> int:
    """Bytes in this process's `/proc/self/status`: `VmRSS` now, `VmHWM` the most since the mark was cleared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def tensor_bytes(*tensors: Any) -> int:
    """Bytes of the storages behind tensors, each once."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())
