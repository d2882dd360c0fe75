"""A program with some of its dims padded, in every way that is tried, each made and analysed once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from passes.analysis.analysis import Analysis, analyse
from passes.analysis.fusion import Fused
from passes.padding.harmless import Part
from passes.padding.pad import Pad, pad, padded_atom
from passes.padding.repeat import is_worth_repeating, repeat_keys
from passes.program.program import Program
from passes.tokens.routing import token_parts
from passes.tokens.token_blocks import by_blocks, has_whole_batch


@dataclass(frozen=True)
class Padding:
    """A program with some dims padded, analysed; `seen` has, per pad, a node that has the larger dim, and where."""

    pads: tuple[Pad, ...]
    analysis: Analysis
    seen: Mapping[Pad, tuple[fx.Node, Part]] = field(default_factory=dict)
    repeated_keys: bool = False


class Paddings:
    """A program's paddings, each made and analysed once.

    `known`: rules found before, and `fused`, as `analyse` takes them. `repeated_keys`: of the program with keys and
    values of grouped attention repeated.
    """

    def __init__(
        self,
        whole: Analysis,
        known: Mapping[str, str] | None = None,
        fused: Fused = True,
        *,
        repeated_keys: bool = False,
    ) -> None:
        self._known, self._fused = {**whole.found, **(known or {})}, fused
        self.whole = analyse(repeat_keys(whole.program), self._known, fused=fused) if repeated_keys else whole
        self.repeated_keys = repeated_keys
        self._made: dict[tuple[Pad, ...], Padding] = {(): Padding((), self.whole, repeated_keys=repeated_keys)}

    def of(self, pads: tuple[Pad, ...]) -> Padding:
        """The program with these dims padded."""
        if pads not in self._made:
            made = pad(self.whole, pads)
            analysis = analyse(made.program, self._known, fused=self._fused)
            self._made[pads] = Padding(pads, analysis, made.seen, self.repeated_keys)
        return self._made[pads]

    def join(self, first: Sequence[Pad], second: Sequence[Pad]) -> tuple[Pad, ...]:
        """The pads of both; where they name one dim, the first's."""
        atoms = {id(padded_atom(self.whole, each)) for each in first}
        return (*first, *(each for each in second if id(padded_atom(self.whole, each)) not in atoms))


class PaddingsOf:
    """The program's paddings under each strategy: routed experts, and rows taken in turns, depend on how many
    parts the tokens have.

    `rules`: those of calls that no table knows, where they have been found (`Plan.rules`). `fused`: as in `analyse`.
    """

    def __init__(
        self,
        program: Program,
        sizes: Sequence[int],
        batch_axes: tuple[int, ...],
        rules: Mapping[str, str] | None = None,
        *,
        fused: Fused = True,
    ) -> None:
        self._program, self._sizes, self._batch_axes = program, sizes, batch_axes
        self._rules, self._fused = rules, fused
        self._in_parts = has_whole_batch(program)
        self._known: dict[tuple[int, bool], Paddings] = {}

    @property
    def program(self) -> Program:
        """What they are paddings of."""
        return self._program

    def on(self, sizes: Sequence[int], batch_axes: tuple[int, ...]) -> PaddingsOf:
        """The same program's on another mesh; what is analysed already is not analysed again."""
        other = PaddingsOf(self._program, sizes, batch_axes, self._rules, fused=self._fused)
        other._known = self._known
        return other

    def under(self, strategy: str, repeated_keys: bool = False) -> Paddings:
        """The paddings that plans under `strategy` are made from; `repeated_keys`: see `Paddings`."""
        parts = token_parts(self._program, strategy, self._sizes, self._batch_axes) if self._in_parts else 1
        if (parts, repeated_keys) not in self._known:
            if repeated_keys:
                whole = self.under(strategy).whole
            else:
                whole = analyse(by_blocks(self._program, parts), self._rules, fused=self._fused)
            made = Paddings(whole, self._rules, self._fused, repeated_keys=repeated_keys)
            self._known[parts, repeated_keys] = made
        return self._known[parts, repeated_keys]

    def may_repeat_keys(self, strategy: str) -> bool:
        """Whether plans under `strategy` may repeat keys and values of grouped attention: where that helps to split."""
        parts = math.prod(size for axis, size in enumerate(self._sizes) if axis not in self._batch_axes)
        return strategy in ("auto", "megatron") and parts > 1 and is_worth_repeating(self._program, parts)
