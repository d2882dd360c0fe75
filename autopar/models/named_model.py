"""A model that was named on the command line, and how it was wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_MOST_CPU_PARAMETERS = 10**9


@dataclass(frozen=True)
class Wanted:
    """How the model named on the command line is built.

    `batch` (1) and `sequence` are what one data-parallel rank feeds it. `layers`: so many instead of its own.
    `on_cpu`: with random values in float32 (a preset scaled down), to be run; else on the meta device in `dtype`.
    """

    batch: int | None = None
    sequence: int | None = None
    layers: int | None = None
    dtype: str = "bfloat16"
    on_cpu: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Named:
    """The model, what one data-parallel rank feeds it, and what to tell about it."""

    model: nn.Module
    inputs: Any
    title: str
    notes: tuple[str, ...] = ()


def check_playable(name: str, model: nn.Module, instead: str = "pass --layers 2, or a") -> None:
    """Refuse with a ValueError a model that is too large to play every rank on a CPU; `instead`: of what would do, what
    comes before "smaller config.json"."""
    count = sum(p.numel() for p in model.parameters())
    if count > _MOST_CPU_PARAMETERS:
        raise ValueError(
            f"{name}: {count / 1e9:.1f} billion parameters are too many to play every rank on a CPU; {instead} "
            "smaller config.json of the same architecture"
        )
