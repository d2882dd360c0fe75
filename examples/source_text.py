"""Real text that every machine has: the sources of Python's standard library, read as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

VOCABULARY = 256


def source_text(limit_bytes: int = 4 << 20) -> torch.Tensor:
    """The first `limit_bytes` of the library's top-level modules, in order of their names; uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit_bytes:
            break
    return torch.frombuffer(bytearray(b"".join(parts)[:limit_bytes]), dtype=torch.uint8)


def global_batch(text: torch.Tensor, step: int, rows: int, length: int) -> torch.Tensor:
    """`rows` passages of `length` bytes, chosen by the step's number alone: the same on every rank of every mesh."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text) - length, (rows,), generator=generator).tolist()
    return torch.stack([text[start : start + length] for start in starts]).long()
