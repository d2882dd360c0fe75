"""What a setup's price is, and what gives the schedules that it follows from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from costmodel.hardware import Hardware
from costmodel.memory import OptimizerSpec
from passes.runs.depth import Profile
from passes.runs.setup import Setup


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one rank, the busiest stage's; `seconds` and `bytes` add up to the two totals."""

    setup: Setup
    step_s: float
    peak_bytes: float
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    hidden_s: float = 0.0
    """What is sent behind compute: gathers of parameters and reductions of gradients, and what a pipeline hides of
    activations."""


class Profiler(Protocol):
    """Gives schedules at full depth."""

    @property
    def hardware(self) -> Hardware:
        """What they run on."""

    @property
    def optimizer(self) -> OptimizerSpec:
        """What the optimizer keeps."""

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 where there are none."""

    def profile(self, setup: Setup, *, replica: bool) -> Profile:
        """Of the setup's mesh; `replica`: of one data-parallel rank and one context-parallel part alone."""
