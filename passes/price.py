"""Space -> Problem: seconds and bytes for every option and every change of layout (the only file that joins both).

Sites whose layout follows from another's are merged with it first: a view, a cast, a pointwise op on one tensor takes
its operand as it comes. That leaves a few variables per layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from costmodel.collectives import collective_s
from costmodel.compute import op_s, update_traffic_s
from costmodel.hardware import Device, Topology
from costmodel.layout import Layout, Partial, Replicate, is_gather, local_shape
from costmodel.memory import OPTIMIZERS, OptimizerSpec, at_rest
from costmodel.reshard import Step, reshard_s
from passes.buckets import sends_one_gather
from passes.conversion import Moved, State, given_state, moved, steps_between, stored_state
from passes.dims import Value
from passes.errors import NoFeasiblePlanError
from passes.per_rank import local_work
from passes.problem import Flow, Hold, Problem, Reader
from passes.recompute import is_cheap_op
from passes.space import Port, Site, Space, Wire
from passes.strategies import Option, StoredOption
from passes.work import VIEWS

aten = torch.ops.aten
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Priced:
    """A problem and what its variables mean: variable v stands for `groups[v]`, sites that decide together.

    `table[v][i]` gives the option index of each of these sites under the variable's option i. `flows_s` has each flow's
    costs in two parts: of activations, and of state that is gathered or reduced.
    """

    problem: Problem
    groups: tuple[tuple[int, ...], ...]
    table: tuple[tuple[tuple[int, ...], ...], ...]
    flows_s: tuple[tuple[Floats, Floats], ...]

    def weighed(self, state_share: float, budget_bytes: float = math.inf) -> Problem:
        """The problem with a memory budget, in which the time of state gathers and gradient reductions, which overlap
        with compute, counts at `state_share`."""
        flows = (
            replace(flow, cost_s=_rows(always_s + state_share * state_s)) if state_s.any() else flow
            for flow, (always_s, state_s) in zip(self.problem.flows, self.flows_s, strict=True)
        )
        return replace(self.problem, flows=tuple(flows), budget_bytes=budget_bytes)

    def assignment(self, picks: Sequence[int], sites: int) -> tuple[int, ...]:
        """Option index per site."""
        chosen = [0] * sites
        for group, rows, pick in zip(self.groups, self.table, picks, strict=True):
            for site, option in zip(group, rows[pick], strict=True):
                chosen[site] = option
        return tuple(chosen)


def price(
    space: Space, optimizer: OptimizerSpec | None = None, known: dict[tuple[int, int], float] | None = None
) -> Priced:
    """The problem of choosing an option for every site.

    optimizer: default AdamW. known: a cache of seconds per site and option, shared by spaces that differ only in what
    is computed again; new entries are added.

    Raises:
        NoFeasiblePlanError: a site has no option left.
    """
    optimizer = optimizer or OPTIMIZERS["adamw"]
    for site in space.sites:
        if not site.options:
            raise NoFeasiblePlanError(f"{site.name}: no layout is left by the strategy and the pins")
    variables = _merged(space)
    known = {} if known is None else known
    twice = {i for i in space.recomputed.again if not is_cheap_op(space.sites[i].call.target)}  # type: ignore[union-attr]

    def seconds_of(index: int, option: int) -> float:
        site = space.sites[index]
        if (index, option) not in known:
            known[index, option] = _option_s(space, site, site.options[option], optimizer)
        return known[index, option] * site.count * (2 if index in twice else 1)

    def bytes_of(index: int, option: int) -> float:
        return _option_bytes(space, space.sites[index], option, optimizer)

    flows = [flow for wire in space.wires for flow in _flows(variables, wire)]
    holds = (_hold(variables, wire) for wire in space.wires)
    problem = Problem(
        variables.summed(seconds_of),
        variables.summed(bytes_of),
        tuple(flow for flow, _ in flows),
        tuple(hold for hold in holds if hold is not None),
    )
    return Priced(problem, variables.groups, variables.table, tuple(parts for _, parts in flows))


def _option_s(space: Space, site: Site, option: Option | StoredOption, optimizer: OptimizerSpec) -> float:
    device = space.topology.device
    if isinstance(option, StoredOption):
        if not site.is_trained:
            return 0.0
        return update_s(option.storage.padded_shape(space.topology.sizes), site.stored_itemsize, optimizer, device)
    work, _ = local_work(site, option, space.topology.sizes)
    return op_s(work, device)


def update_s(shape: tuple[int, ...], item_bytes: int, optimizer: OptimizerSpec, device: Device) -> float:
    """Seconds that the optimizer's update of a parameter moves memory, on a rank that stores a part of `shape`."""
    elements = math.prod(shape)
    states = at_rest(shape, optimizer, item_bytes=item_bytes).states
    return update_traffic_s(elements, item_bytes, states / max(1, elements), device)


def _option_bytes(space: Space, site: Site, option_index: int, optimizer: OptimizerSpec) -> float:
    option = site.options[option_index]
    if not isinstance(option, StoredOption) or site.kind == "returned":
        return 0.0
    shape = option.storage.padded_shape(space.topology.sizes)
    kept = at_rest(shape, optimizer, item_bytes=site.stored_itemsize, trainable=site.is_trained)
    return float(kept.total * site.count)


# -- merging -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variables:
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

    def reader(self, port: Port, states: _States) -> Reader:
        """Who reads at `port`, with what it asks for numbered by `states`."""
        variable, asked = self.asked(port)
        return Reader(variable, tuple(map(states, asked)))


def _merged(space: Space) -> _Variables:
    """The sites as variables."""
    merging = _Merging(space)
    for index in range(len(space.sites)):
        merging.add(index)
    groups, table = tuple(map(tuple, merging.groups)), tuple(map(tuple, merging.rows))
    place = {site: (v, k) for v, group in enumerate(groups) for k, site in enumerate(group)}
    return _Variables(space, groups, table, place)


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
        """What the op reads, a value per operand, where ops of one group make it as often as the op runs; else none."""
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
        if site.call.target in VIEWS and any(len(self.readers[value]) > 1 for value in values):
            return []  # a view of a tensor with other readers may want to follow a gather that serves them all
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


# -- flows -------------------------------------------------------------------------------------------------------------


class _States:
    """Numbers layouts (or stored options) as they come."""

    def __init__(self) -> None:
        self.index: dict[State, int] = {}

    def __call__(self, state: State) -> int:
        return self.index.setdefault(state, len(self.index))


def _asked(option: Option | StoredOption, port: Port) -> State:
    if isinstance(option, Option):
        return option.operands[port.operand]
    return stored_state(option) if port.stores else option.layout


def _flows(variables: _Variables, wire: Wire) -> list[tuple[Flow, tuple[Floats, Floats]]]:
    """Stored tensors are gathered for each phase, unless they stay gathered, and so are activations where they are
    gathered again; else values are converted once."""
    space = variables.space
    site = space.sites[wire.value.op]
    again = space.recomputed.again

    def ports_of(phase: str) -> list[Port]:
        more = again if phase == "backward" else frozenset()
        return [port for port in wire.ports if port.phase == phase or port.site in more]

    phases = (ports_of("forward"), ports_of("backward"))
    asked: list[tuple[Sequence[Port], Costs]] = [(wire.ports, _all_of)]
    if site.kind == "stored" and space.recomputed.reshard:
        asked = [(ports, _all_of) for ports in phases]
    elif space.recomputed.regather and site.kind == "op" and site.phase == "forward" and all(phases):
        asked = [(wire.ports, _gathers_free), *((ports, _gathers_alone) for ports in phases)]
    found = (_flow(variables, wire, ports, costs) for ports, costs in asked if ports)
    return [flow for flow in found if flow is not None]


Costs = Callable[[Floats, npt.NDArray[np.bool_]], Floats]
"""Of the costs from state to state, those to count; flags mark gathers."""


def _all_of(costs: Floats, gathers: npt.NDArray[np.bool_]) -> Floats:
    return costs


def _gathers_alone(costs: Floats, gathers: npt.NDArray[np.bool_]) -> Floats:
    return np.where(gathers, costs, 0.0)


def _gathers_free(costs: Floats, gathers: npt.NDArray[np.bool_]) -> Floats:
    return np.where(gathers & np.isfinite(costs), 0.0, costs)


def _gathers(space: Space, given: Iterable[object], asked: Sequence[object]) -> npt.NDArray[np.bool_]:
    """Which changes from a state that is given to one that is asked for are gathers of an activation."""
    sizes = space.topology.sizes
    plain = [[isinstance(p, tuple) and isinstance(q, tuple) and is_gather(p, q, sizes) for q in asked] for p in given]
    return np.array(plain, dtype=bool)


def _flow(
    variables: _Variables, wire: Wire, ports: Sequence[Port], costs: Costs
) -> tuple[Flow, tuple[Floats, Floats]] | None:
    """One of a wire's flows, of what `costs` counts; None where nobody else reads it, or nothing of that has a cost."""
    space = variables.space
    producer, made_in = variables.given(wire.value)
    given, asked = _States(), _States()
    states = tuple(map(given, made_in))

    def as_made(port: Port) -> bool:
        """Whether the producer itself reads it as it makes it."""
        own = variables.place[port.site][0] == producer and not port.stores
        return own and variables.asked(port)[1] == made_in

    readers = tuple(variables.reader(port, asked) for port in ports if not as_made(port))
    if not readers:
        return None
    parts = _costs_s(moved(space, wire.value), tuple(given.index), tuple(asked.index))
    if costs is not _all_of:
        gathers = _gathers(space, given.index, tuple(asked.index))
        parts = (costs(parts[0], gathers), costs(parts[1], gathers))
        if not parts[0].any() and not parts[1].any():
            return None
    return Flow(producer, states, readers, _rows(parts[0] + parts[1]), wire.count), parts


def _rows(table: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, table.tolist()))


@lru_cache(maxsize=4096)
def _costs_s(of: Moved, given: tuple[State, ...], asked: tuple[State, ...]) -> tuple[Floats, Floats]:
    """Seconds from each state that is given to each that is asked for: of activations, and of gathers and reductions
    of state. Alike tensors of all layers, strategies and paddings share one table."""
    always_s, state_s = np.zeros((len(given), len(asked))), np.zeros((len(given), len(asked)))
    for i, p in enumerate(given):
        for j, q in enumerate(asked):
            path = steps_between(of, p, q)
            of_state = isinstance(p, StoredOption) or isinstance(q, StoredOption)
            seconds = math.inf if path is None else reshard_s(path)
            if path is not None and isinstance(p, StoredOption):
                seconds += _alone_s(path, of.topology)
            (state_s if of_state else always_s)[i, j] = seconds
    return always_s, state_s


def _alone_s(path: Sequence[Step], topology: Topology) -> float:
    """What a gather of state takes more where another collective follows on it, so that it goes in no bucket: a latency
    that the parameters of a bucket share. It tells moving a weight from moving what it is transposed to."""
    gather = next((step for step in path if step.kind == "state_gather"), None)
    if gather is None or sends_one_gather(path):
        return 0.0
    return collective_s("all_gather", 0.0, gather.axes, topology)


# -- memory ------------------------------------------------------------------------------------------------------------


def _hold(variables: _Variables, wire: Wire) -> Hold | None:
    """What backward keeps of a forward value, in each layout it reads it in; what is computed again only as moved. What
    is gathered again it keeps as it was."""
    space = variables.space
    made = space.sites[wire.value.op]
    if made.kind != "op" or made.phase != "forward":
        return None
    states = _States()
    again = space.recomputed.again
    late = [port for port in wire.ports if port.phase == "backward" or port.site in again]
    readers = tuple(variables.reader(port, states) for port in late)
    if not readers:
        return None
    producer, made_in = variables.given(wire.value)
    anew = wire.value not in space.recomputed.held and wire.value.op in again
    shape, itemsize, sizes = space.shape_of(wire.value), space.itemsize_of(wire.value), space.topology.sizes

    def state_bytes(state: State) -> float:
        layout = state.layout if isinstance(state, StoredOption) else state
        plain = tuple(Replicate() if isinstance(p, Partial) else p for p in layout)
        return float(math.prod(local_shape(shape, plain, sizes)) * itemsize)

    each = tuple(map(state_bytes, states.index))
    given = Reader(producer, tuple(states.index.get(state, -1) for state in made_in)) if anew else None
    if not space.recomputed.regather:
        return Hold(readers, each, wire.count, given)
    own = _States()
    maker = Reader(producer, tuple(map(own, made_in)))
    gathers = _gathers(space, own.index, tuple(states.index))
    if not gathers.any():
        return Hold(readers, each, wire.count, given)

    def takes(i: int, p: State, j: int, q: State) -> float:
        if anew and (gathers[i, j] or p == q):
            return 0.0
        return state_bytes(p) if gathers[i, j] else each[j]

    rows = tuple(tuple(takes(i, p, j, q) for j, q in enumerate(states.index)) for i, p in enumerate(own.index))
    return Hold(readers, each, wire.count, maker, rows)
