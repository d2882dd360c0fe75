"""The items of a step in the order a rank runs them: ops, and moves of tensors between layouts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from costmodel.layout import Layout, Partial
from costmodel.reshard import Step
from passes.analysis.strategies import Option, StoredOption


@dataclass(frozen=True, slots=True)
class Run:
    """An op that runs under `option`, in one half of the step (`phase`).

    `again`: a forward op that is repeated in backward; only backward sees its results.
    """

    node: fx.Node
    option: Option
    site: int
    phase: str
    again: bool = False

    @property
    def era(self) -> str:
        """The phase that its results are for, "" for all."""
        return "backward" if self.again else ""


@dataclass(frozen=True, slots=True)
class Move:
    """Brings `value` through `steps` to the layout `target`; later readers in the same `era` find it there.

    `era` is the phase for stored tensors that are gathered for forward and again for backward, "backward" for what is
    computed again, and "" for others.
    `reader` is the op it is needed by, or None where it is an output; `stores` marks a gradient on its way to how its
    parameter is stored. Moves that follow one another with one `bucket` (-1: none) go through their steps together,
    `packed` into one tensor or each with memory of its own.
    """

    value: fx.Node
    source: Layout | StoredOption
    target: Layout | StoredOption
    steps: tuple[Step, ...]
    phase: str
    era: str
    reader: fx.Node | None
    stores: bool = False
    bucket: int = -1
    packed: bool = False

    @property
    def place(self) -> fx.Node:
        """The op to name for it in a report: the one that left partial sums or a gradient, else the one that needs the
        value."""
        partial = not isinstance(self.source, StoredOption) and any(isinstance(p, Partial) for p in self.source)
        return self.value if partial or self.reader is None else self.reader
