"""What a search priced, in time and memory, and what of it nothing else beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FrontierPoint:
    """What a search priced: `label` says which (mesh, micro-batches); `priced_only`, what of it no plan does yet."""

    label: str
    step_time_s: float
    memory_bytes: int
    fits: bool = True
    chosen: bool = False
    priced_only: str = ""


def frontier(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other beats in both time and memory, least memory first."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.memory_bytes, p.step_time_s)):
        if not best or point.step_time_s < best[-1].step_time_s:
            best.append(point)
    return best
