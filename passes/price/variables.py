"""The solver's variables: sites whose layout follows from another's decide together with it.

A view, a cast, a pointwise op on one tensor takes its operand as it comes, where nothing else reads that: beside other
readers it may want to follow a gather that serves them all. That leaves a few variables per layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from costmodel.layout import Layout
from passes.analysis.dims import Value
from passes.analysis.strategies import Option, StoredOption
from passes.price.conversion import State, given_state, stored_state
from passes.solver.problem import Reader
from passes.space.space import Port, Space


class States:
    """Numbers layouts (or stored options) as they come."""

    def __init__(self) -> None:
        self.index: dict[State, int] = {}

    def __call__(self, state: State) -> int:
        return self.index.setdefault(state, len(self.index))


def _asked(option: Option | StoredOption, port: Port) -> State:
    if isinstance(option, Option):
        return option.operands[port.operand]
    return stored_state(option) if port.stores else option.layout


@dataclass(frozen=True)
class Variables:
    """What decides together: `groups[v]` are the sites of variable v, `table[v]` its options, one of each site's."""

    space: Space
    groups: tuple[tuple[int, ...], ...]
    table: tuple[tuple[tuple[int, ...], ...], ...]
    place: Mapping[int, tuple[int, int]]
    """Of a site, its variable and its number among that variable's sites."""

    def summed(self, of_option: Callable[[int, int], float]) -> tuple[tuple[float, ...], ...]:
        """Per variable and option, the sum of `of_option(site, its option)` over the variable's sites."""
        return tuple(
            tuple(sum(of_option(site, option) for site, option in zip(group, row, strict=True)) for row in rows)
            for group, rows in zip(self.groups, self.table, strict=True)
        )

    def options(self, site: int) -> tuple[int, list[Option | StoredOption]]:
        """The variable that a site belongs to, and the site's option under each of that variable's."""
        variable, k = self.place[site]
        return variable, [self.space.sites[site].options[row[k]] for row in self.table[variable]]

    def given(self, value: Value) -> tuple[int, list[State]]:
        """The variable that makes a value, and the state that it gives it under each option."""
        variable, options = self.options(value.op)
        return variable, [given_state(option, value.result) for option in options]

    def asked(self, port: Port) -> tuple[int, list[State]]:
        """The variable that reads at `port`, and the state that it asks for under each option."""
        variable, options = self.options(port.site)
        return variable, [_asked(option, port) for option in options]

    def reader(self, port: Port, states: States) -> Reader:
        """Who reads at `port`, with what it asks for numbered by `states`."""
        variable, asked = self.asked(port)
        return Reader(variable, tuple(map(states, asked)))


def merged(space: Space) -> Variables:
    """The sites as variables."""
    merging = _Merging(space)
    for index in range(len(space.sites)):
        merging.add(index)
    groups, table = tuple(map(tuple, merging.groups)), tuple(map(tuple, merging.rows))
    place = {site: (v, k) for v, group in enumerate(groups) for k, site in enumerate(group)}
    return Variables(space, groups, table, place)


class _Merging:
    """Groups of sites that decide together, and the joint options of each: `rows[group]`, an option per site."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.groups: list[list[int]] = []
        self.rows: list[list[tuple[int, ...]]] = []
        self.group_of: dict[int, int] = {}
        self.operands: dict[tuple[int, int], set[Value]] = defaultdict(set)
        """The values that an op, by its site, reads as its k-th operand."""
        self.readers: dict[Value, set[int]] = defaultdict(set)
        for wire in space.wires:
            for port in wire.ports:
                self.readers[wire.value].add(port.site)
                if not port.stores:
                    self.operands[port.site, port.operand].add(wire.value)

    def add(self, index: int) -> None:
        """Join the site to the group that makes all it reads, or let it decide by itself."""
        values = self._joinable(index)
        if values and (rows := self._extended(index, values)) is not None:
            group = self.group_of[values[0].op]
            self.rows[group] = rows
            self.groups[group].append(index)
        else:
            group = len(self.groups)
            self.rows.append([(i,) for i in range(len(self.space.sites[index].options))])
            self.groups.append([index])
        self.group_of[index] = group

    def _joinable(self, index: int) -> list[Value]:
        """What the op alone reads, a value per operand, where ops of one group make it as often as it runs; or none."""
        sites = self.space.sites
        site = sites[index]
        if site.kind != "op" or site.op is None or site.call is None:
            return []
        sources = [self.operands[index, k] for k in range(len(site.op.operands))]
        if any(len(values) != 1 for values in sources):
            return []
        values = [next(iter(values)) for values in sources]
        if len({self.group_of.get(value.op) for value in values}) != 1 or values[0].op not in self.group_of:
            return []
        if any(len(self.readers[value]) > 1 for value in values):
            return []
        alike = all(sites[v.op].kind == "op" and sites[v.op].count == site.count for v in values)
        return values if alike else []

    def _extended(self, index: int, values: list[Value]) -> list[tuple[int, ...]] | None:
        """The group's joint options with the site's, where each of them leaves it exactly one."""
        by_operands: dict[tuple[Layout, ...], list[int]] = defaultdict(list)
        for i, option in enumerate(self.space.sites[index].options):
            assert isinstance(option, Option)
            by_operands[option.operands].append(i)
        group = self.group_of[values[0].op]
        extended = []
        for row in self.rows[group]:
            fitting = by_operands.get(tuple(self._layout(value, group, row) for value in values), [])
            if len(fitting) != 1:
                return None
            extended.append((*row, fitting[0]))
        return extended

    def _layout(self, value: Value, group: int, row: tuple[int, ...]) -> Layout:
        option = self.space.sites[value.op].options[row[self.groups[group].index(value.op)]]
        assert isinstance(option, Option)
        return option.results[value.result]
