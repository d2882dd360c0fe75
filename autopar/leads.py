"""Which of several ways to run leads, and what decides where predictions are too close to call.

close     slower than the fastest by less than predictions are off (`MEASURED_ERROR`)
chosen    of those that are close, the simplest whose step stays least, within `ENOUGH`, where no more of what is
          sent hides than in the published run that hid least (`LEAST_HIDDEN`): a lead that rests on overlap is none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

MEASURED_ERROR = 0.08
"""Mean error of predicted steps: 7.8% over 171 published runs without pipelines, of which the median is 6.5%, and 10.4%
and 8.5% over 59 with them (benchmarks/published_results.md)."""
LEAST_HIDDEN = 0.74
"""Share of gathers and reductions that hid in PyTorch FSDP's runs of GPT-175B on 128 to 512 A100s (arXiv 2304.11277,
section 5.4): 173 and 186 TFLOP/s at one and two samples per GPU are steps of 17.0 and 31.6 s, so 2.4 s do not shrink
with the batch, of 9.2 s that are sent. What sending slows of compute is in these 2.4 s."""
ENOUGH = 0.05
"""Slower than the best by up to this share, the simpler way is called enough."""


@dataclass(frozen=True)
class Way:
    """One way to run: a step, what hides of what it sends, and by how much that slows compute."""

    step_s: float
    hidden_s: float = 0.0
    slowed_s: float = 0.0

    @property
    def stressed_s(self) -> float:
        """The step where only `LEAST_HIDDEN` of it hides."""
        return max(self.step_s, self.step_s - self.slowed_s + (1.0 - LEAST_HIDDEN) * self.hidden_s)


Key = TypeVar("Key")


def close(ways: dict[Key, Way]) -> list[Key]:
    """The fastest, and those that predictions cannot tell from it; in the order given."""
    fastest_s = min(way.step_s for way in ways.values())
    return [key for key, way in ways.items() if way.step_s <= fastest_s * (1.0 + MEASURED_ERROR)]


def chosen(ways: dict[Key, Way]) -> Key:
    """One of those that are close; `ways`: the simplest first."""
    among = close(ways)
    least_s = min(ways[key].stressed_s for key in among)
    return next(key for key in among if ways[key].stressed_s <= least_s * (1.0 + ENOUGH))


def is_enough(first: Way | None, others: Sequence[Way]) -> bool:
    """Whether the simplest way, if it fits, is chosen over `others`."""
    return first is not None and chosen({0: first, **{i + 1: way for i, way in enumerate(others)}}) == 0
