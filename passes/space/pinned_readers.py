"""Ops that read pinned parameters: they are left no layout of one but its pin's.

An op reads a parameter itself, or what is made of parameters alone (a cast, a transpose, a low-rank update added to a
weight). Two pins may meet in one. Both are obeyed where each parameter, or what is made of it alone, is read; what is
made of several is moved, where another pin wants it otherwise, and so is a parameter's second operand of one op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import product

from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Shard, layout_text
from passes.analysis.analysis import Analysis, Port
from passes.analysis.dims import Value
from passes.analysis.strategies import Option, StoredOption, leading_places, op_options
from passes.rules.call import op_text
from passes.space.named import axis_choices
from passes.space.pins import Pin, PinError

Options = tuple[Option, ...] | tuple[StoredOption, ...]
"""Of a site."""


def readers_options(
    analysis: Analysis,
    topology: Topology,
    batch_axes: tuple[int, ...],
    options: Sequence[Options],
    pinned: Mapping[int, tuple[str, Pin]],
) -> dict[int, tuple[Option, ...]]:
    """Site -> the options that are left, of the ops that read pinned parameters (`pinned`: site -> pattern and pin).

    Where the strategy leaves such an op none, all that `auto` has are open to it.

    Raises:
        PinError: an op that cannot read a parameter so, or not beside another pinned one.
    """
    readers = _Readers(analysis, topology, batch_axes, options)
    for index, (pattern, pin) in pinned.items():
        readers.hold(index, pattern, pin)
    return readers.kept


@dataclass(frozen=True)
class _Held:
    """An operand of an op that reads a pinned parameter, itself or in what is made of that alone."""

    operand: int
    parameter: int
    pattern: str


@dataclass(frozen=True)
class _Readers:
    """`kept`: site -> its options that are left; `held`: site -> the operand that a pin fixed first."""

    analysis: Analysis
    topology: Topology
    batch_axes: tuple[int, ...]
    options: Sequence[Options]
    kept: dict[int, tuple[Option, ...]] = field(default_factory=dict)
    held: dict[int, _Held] = field(default_factory=dict)

    def hold(self, index: int, pattern: str, pin: Pin) -> None:
        """Leave the readers of the parameter of site `index` what goes with its pin."""
        parameter = Value(index, 0)
        todo = [(parameter, self._wanted(index, pin))]
        own = {parameter}
        while todo:
            value, layouts = todo.pop()
            for port in self._ports(value):
                may_be_part = self.batch_axes if value != parameter else ()
                mine = _Held(port.operand, index, pattern)
                first = self.held.get(port.site, mine)
                kept = self._reading(port, layouts, may_be_part, alone=first == mine)
                if not kept:
                    self._refuse(port, layouts, mine, first, value in own)
                    continue
                self.kept[port.site] = kept
                if value in own:
                    self.held.setdefault(port.site, mine)
                if port.site in self.analysis.from_parameters:
                    made = [Value(port.site, r) for r in range(len(kept[0].results))]
                    todo += [(one, given) for one in made if (given := _given(kept, one.result))]
                    if self._operands(port.site) <= own:
                        own.update(made)

    def _wanted(self, index: int, pin: Pin) -> set[Layout]:
        """The parameter's layout in compute; where it lies already, what that leaves."""
        if self.analysis.program.stored:
            return {option.layout for option in self.options[index] if isinstance(option, StoredOption)}
        places = dict(leading_places(self.analysis.places[index].dims))
        return {tuple(Shard(places[p.dim]) if isinstance(p, Shard) else p for p in pin.in_compute)}

    def _ports(self, value: Value) -> list[Port]:
        """The ops' that read a value."""
        places = self.analysis.places
        ports = [port for wire in self.analysis.wires if wire.value == value for port in wire.ports if not port.stores]
        return [port for port in ports if places[port.site].kind == "op" and places[port.site].op is not None]

    def _operands(self, site: int) -> set[Value]:
        return {wire.value for wire in self.analysis.wires if any(port.site == site for port in wire.ports)}

    def _reading(
        self, port: Port, layouts: Set[Layout], may_be_part: tuple[int, ...], *, alone: bool
    ) -> tuple[Option, ...]:
        """An op's options that read one of `layouts`, or else, of what is made of a parameter (which may be expanded
        over the batch), a part on axes that split the batch; `alone`: no pin has fixed another operand of the op."""
        op = self.analysis.places[port.site].op
        given: Sequence[Option | StoredOption] = self.kept.get(port.site, self.options[port.site])
        every: Sequence[Option | StoredOption] = ()
        if alone and op is not None:
            choices = axis_choices(self.analysis, port.site, "auto", self.topology.sizes, self.batch_axes)
            every = op_options(op, self.topology.sizes, choices)
        for axes, options in product(((), may_be_part) if may_be_part else ((),), (given, every)):
            kept = tuple(
                o for o in options if isinstance(o, Option) and _is_one(o.operands[port.operand], layouts, axes)
            )
            if kept:
                return kept
        return ()

    def _refuse(self, port: Port, layouts: Set[Layout], mine: _Held, first: _Held, is_own: bool) -> None:
        """Raises where an op has to read the value so: where no other pin holds it, or the value is its own pin's."""
        if first == mine:
            raise PinError(f"pin {mine.pattern!r}: {self._cannot_read(port, layouts)}")
        if first.parameter != mine.parameter and is_own:
            op, wanted = self._op_and_layouts(port, layouts)
            both = [self.analysis.places[held.parameter].name for held in (first, mine)]
            pins = (
                f"pin {mine.pattern!r} names {both[0]} and {both[1]}"
                if first.pattern == mine.pattern
                else f"pins {first.pattern!r} and {mine.pattern!r}"
            )
            raise PinError(
                f"{pins}: {op} reads both, and cannot read the second as {wanted} beside the first; give layouts that "
                "go together"
            )

    def _cannot_read(self, port: Port, layouts: Set[Layout]) -> str:
        """Why an op cannot read a parameter as any of `layouts`, and what would do."""
        for axis in self.batch_axes:
            if all(isinstance(layout[axis], Shard) for layout in layouts):
                return (
                    f"axis {self.topology.axes[axis].name!r} splits the batch, so compute needs the parameter whole "
                    "there; give R for it (a layout at rest is written before an arrow: 'S(0)R -> RR')"
                )
        op, wanted = self._op_and_layouts(port, layouts)
        return f"{op} cannot read it as {wanted}; give R, or another dim"

    def _op_and_layouts(self, port: Port, layouts: Set[Layout]) -> tuple[str, str]:
        node = self.analysis.folding.members[port.site][0]
        where = node.meta.get("module") or "the model"
        return f"{op_text(node.target)} in {where}", " or ".join(sorted(map(layout_text, layouts)))


def _given(options: Sequence[Option], result: int) -> set[Layout]:
    """The layouts in which an op's options give a result; none where it is a partial sum, which readers have summed."""
    layouts = {option.results[result] for option in options}
    return set() if any(isinstance(part, Partial) for layout in layouts for part in layout) else layouts


def _is_one(layout: Layout, layouts: Set[Layout], batch_axes: Sequence[int]) -> bool:
    """Whether a layout is one of several, or a part of one on axes that split the batch."""
    if layout in layouts or not batch_axes:
        return layout in layouts
    freed = {tuple(p for axis, p in enumerate(one) if axis not in batch_axes) for one in layouts}
    return tuple(p for axis, p in enumerate(layout) if axis not in batch_axes) in freed
