"""The compiler as the API sees it: its stages, and what a plan must tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from autopar.options import Options
from passes.local import LocalProgram
from passes.program import Program


class PlanLike(Protocol):
    """What the API needs of a plan."""

    @property
    def fingerprint(self) -> str:
        """Of the program it was made for."""

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """The mesh: (name, size) per axis."""

    @property
    def strategy(self) -> str:
        """What it was made with."""

    @property
    def peak_memory_bytes(self) -> int:
        """Of a rank, in a step."""

    @property
    def example(self) -> str:
        """The call it was made for (`examples.described`)."""

    def to_json(self) -> str:
        """Its file's text."""


@dataclass(frozen=True)
class Pipeline:
    """The stages, with the arguments they are called with.

    check: hardware, axes, batch_axes, options; raises for what of these cannot be, before a model is captured
    capture: model, args, kwargs, *, batch_dims, batch_size, tangents, backward, precision
    compile_plan: program, axes, *, batch_axes, hardware, strategy, options, example, manner
        (`passes.pipeline.Manner`)
    rewrite: program, plan
    load: a plan's JSON text
    options_of: plan -> the options it was made with
    hardware_of: plan -> the hardware it was priced on, as `compile_plan` takes it
    """

    check: Callable[..., object]
    capture: Callable[..., Program]
    compile_plan: Callable[..., Any]
    rewrite: Callable[[Program, Any], LocalProgram]
    load: Callable[[str], Any]
    options_of: Callable[[Any], Options]
    hardware_of: Callable[[Any], Any]
