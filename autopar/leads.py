"""Which of several ways to run leads, and what decides where predictions are too close to call.

close     slower than the fastest by less than predictions are off (`error_on`)
chosen    the simplest that is slower by no more than `ENOUGH`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

MEASURED_ERROR = 0.08
"""Mean error of predicted steps: 6.6% over 171 published runs without pipelines, and 8.2% over 59 with them
(benchmarks/published_results.md)."""
EXPERTS_ERROR = 0.25
"""The same with expert parallelism, of 5 published runs, which all took longer."""
_BLIND = frozenset((
    "b300", "gb300", "mi300x", "mi325x", "mi350x", "mi355x",
    "a100-pcie-40gb", "a100-pcie-80gb", "h100-pcie", "h100-nvl", "h200-nvl", "l40s", "l4", "a10g", "a10", "rtx-4090",
    "rtx-3090", "v100-sxm2-32gb", "v100-sxm2-16gb", "h20", "gh200",
))  # fmt: skip
"""Parts whose presets are data sheets and microbenchmarks; no run on them, or on one of their kind, set anything.

Of those of the second and third line no published run was priced but five on RTX 4090, 15% to 27% too slow
(docs/cost-model.md).
"""
_BLIND_ERROR = 0.15
"""Mean error on those of the first line, of 25 published runs that were priced blind (docs/cost-model.md); the others
take it over."""
ENOUGH = 0.05
"""Slower than the best by up to this share, the simpler way is called enough."""

Key = TypeVar("Key")


def error_on(device: str) -> float:
    """By how much predicted steps are off on average on a device of this name."""
    return _BLIND_ERROR if device in _BLIND else MEASURED_ERROR


def close(steps_s: Mapping[Key, float], error: float = MEASURED_ERROR) -> list[Key]:
    """The fastest, and those that predictions cannot tell from it; in the order given."""
    fastest_s = min(steps_s.values())
    return [key for key, step_s in steps_s.items() if step_s <= fastest_s * (1.0 + error)]


def chosen(steps_s: Mapping[Key, float]) -> Key:
    """What is enough; `steps_s`: the simplest way first."""
    fastest_s = min(steps_s.values())
    return next(key for key, step_s in steps_s.items() if step_s <= fastest_s * (1.0 + ENOUGH))


def is_enough(first_s: float | None, others_s: Sequence[float]) -> bool:
    """Whether the simplest way, if it fits, is chosen over the others."""
    return first_s is not None and chosen(dict(enumerate([first_s, *others_s]))) == 0
