"""Which of several ways to run leads, and what decides where predictions are too close to call.

close     slower than the fastest by less than predictions are off (`Device.step_error`)
chosen    the simplest that is slower by no more than `ENOUGH`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

EXPERTS_ERROR = 0.25
"""By how much predicted steps with expert parallelism are off on average: 81 published runs, most of which took
longer."""
ENOUGH = 0.05
"""Slower than the best by up to this share, the simpler way is called enough."""

Key = TypeVar("Key")


def close(steps_s: Mapping[Key, float], error: float) -> list[Key]:
    """The fastest, and those that predictions cannot tell from it; in the order given."""
    fastest_s = min(steps_s.values())
    return [key for key, step_s in steps_s.items() if step_s <= fastest_s * (1.0 + error)]


def chosen(steps_s: Mapping[Key, float]) -> Key:
    """The simplest way whose step is close enough to the fastest one's; `steps_s` has the simplest way first."""
    fastest_s = min(steps_s.values())
    return next(key for key, step_s in steps_s.items() if step_s <= fastest_s * (1.0 + ENOUGH))


def is_enough(first_s: float | None, others_s: Sequence[float]) -> bool:
    """Whether the simplest way, if it fits, is chosen over the others."""
    return first_s is not None and chosen(dict(enumerate([first_s, *others_s]))) == 0
