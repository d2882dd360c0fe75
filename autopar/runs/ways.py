"""The ways to run a model that a search tells apart, and the fastest candidate of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from passes.runs.setup import Setup

Answer = Literal["state", "computation", "context", "pipeline", "offload", "nothing"]

SIMPLEST_FIRST: tuple[Answer, ...] = ("state", "computation", "context", "pipeline")


class Priced(Protocol):
    """A candidate of the search."""

    @property
    def setup(self) -> Setup: ...
    @property
    def step_time_s(self) -> float: ...
    @property
    def peak_memory_bytes(self) -> int: ...
    @property
    def over_bytes(self) -> int: ...
    @property
    def fits(self) -> bool: ...
    @property
    def seconds(self) -> Any: ...
    @property
    def hidden_s(self) -> float: ...


@dataclass(frozen=True)
class Ways:
    """The fastest candidate that fits of each way, None where none does: sharded state alone, sharded computation too,
    context parallelism, a pipeline, offload; of sharded state those with copies alone (DDP); and expert parallelism."""

    state: Priced | None
    computation: Priced | None
    context: Priced | None
    pipeline: Priced | None
    offload: Priced | None
    copied: Priced | None
    experts: Priced | None

    @property
    def resident(self) -> dict[Answer, Priced]:
        """Those without offload, by what they are called; the simplest first."""
        found = (self.state, self.computation, self.context, self.pipeline)
        return {name: each for name, each in zip(SIMPLEST_FIRST, found, strict=True) if each is not None}


def fastest_of(found: Sequence[Priced]) -> Ways:
    """Of each way. Those with expert parallelism are a pipeline's only where no other fits: their steps are known less
    well."""

    def best(which: Callable[[Setup], bool]) -> Priced | None:
        fitting = [c for c in found if c.fits and which(c.setup)]
        return min(fitting, key=lambda c: c.step_time_s, default=None)

    return Ways(
        state=best(is_state),
        computation=best(lambda s: is_simple(s) and s.tp > 1 and s.state == "zero3"),
        context=best(lambda s: s.pp == 1 and s.cp > 1 and s.ep == 1),
        pipeline=best(lambda s: s.pp > 1 and s.ep == 1) or best(lambda s: s.pp > 1),
        offload=best(lambda s: s.offload),
        copied=best(lambda s: is_state(s) and is_copied(s)),
        experts=best(lambda s: s.ep > 1),
    )


def is_simple(setup: Setup) -> bool:
    """Whether a plan can run it: no stages, no parts of sequences, no shared experts, no offload."""
    return setup.pp == setup.cp == setup.ep == 1 and not setup.offload


def is_state(setup: Setup) -> bool:
    """Whether data-parallel ranks alone run it, their state sharded and on the device."""
    return is_simple(setup) and setup.tp == 1 and setup.state == "zero3"


def is_copied(setup: Setup) -> bool:
    """Whether each data-parallel rank has all of the state, and nothing but the batch is split."""
    return setup.dp_shard == setup.tp == setup.pp == setup.cp == 1 < setup.dp_replicate
