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
        """The problem within a budget, with so much counted of the time of state gathers and gradient reductions, which
        run behind compute."""
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

    optimizer: AdamW where not said. known: seconds of the same sites' options, from where other ops were computed
    again; what is found is added.

    Raises:
        NoFeasiblePlanError: a site has no option left.
    """
    optimizer = optimizer or OPTIMIZERS["adamw"]
    for site in space.sites:
        if not site.options:
            raise NoFeasiblePlanError(f"{site.name}: no layout is left by the strategy and the pins")
    merging = _Merging(space)
    for index in range(len(space.sites)):
        merging.add(index)
    groups, table = tuple(map(tuple, merging.groups)), tuple(map(tuple, merging.rows))
    where = {site: (v, k) for v, group in enumerate(groups) for k, site in enumerate(group)}
    seconds, sizes = [], []
    twice = {i for i in space.recomputed.again if not is_cheap_op(space.sites[i].call.target)}  # type: ignore[union-attr]
    known = {} if known is None else known

    def site_s(site_index: int, option_index: int) -> float:
        site, key = space.sites[site_index], (site_index, option_index)
        if key not in known:
            known[key] = _option_s(space, site, site.options[option_index], optimizer)
        return known[key] * site.count * (2 if site_index in twice else 1)

    for group, rows in zip(groups, table, strict=True):
        seconds.append(tuple(sum(site_s(s, o) for s, o in zip(group, row, strict=True)) for row in rows))
        sizes.append(
            tuple(
                sum(_option_bytes(space, space.sites[s], o, optimizer) for s, o in zip(group, row, strict=True))
                for row in rows
            )
        )
    found = [flow for wire in space.wires for flow in _flows(space, wire, where, table)]
    holds = (_hold(space, wire, where, table) for wire in space.wires)
    problem = Problem(
        tuple(seconds),
        tuple(sizes),
        tuple(flow for flow, _ in found),
        tuple(hold for hold in holds if hold is not None),
    )
    return Priced(problem, groups, table, tuple(parts for _, parts in found))


def _option_s(space: Space, site: Site, option: Option | StoredOption, optimizer: OptimizerSpec) -> float:
    device = space.topology.device
    if isinstance(option, StoredOption):
        if site.given is None or site.given.kind != "parameter" or not site.given.requires_grad:
            return 0.0
        return update_s(option.storage.padded_shape(space.topology.sizes), site.stored_itemsize, optimizer, device)
    work, _ = local_work(site, option, space.topology.sizes)
    return op_s(work, device)


def update_s(shape: tuple[int, ...], item_bytes: int, optimizer: OptimizerSpec, device: Device) -> float:
    """Seconds that an update of a parameter moves memory, of which a rank stores a part of `shape`."""
    elements = math.prod(shape)
    states = at_rest(shape, optimizer, item_bytes=item_bytes).states
    return update_traffic_s(elements, item_bytes, states / max(1, elements), device)


def _option_bytes(space: Space, site: Site, option_index: int, optimizer: OptimizerSpec) -> float:
    option = site.options[option_index]
    if not isinstance(option, StoredOption) or site.kind == "returned":
        return 0.0
    shape = option.storage.padded_shape(space.topology.sizes)
    trainable = site.given is not None and site.given.kind == "parameter" and site.given.requires_grad
    return float(at_rest(shape, optimizer, item_bytes=site.stored_itemsize, trainable=trainable).total * site.count)


# -- merging -----------------------------------------------------------------------------------------------------------


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


def _asked(space: Space, port: Port, option_index: int) -> State:
    option = space.sites[port.site].options[option_index]
    if isinstance(option, Option):
        return option.operands[port.operand]
    return stored_state(option) if port.stores else option.layout


def _given(space: Space, value: Value, option_index: int) -> State:
    return given_state(space.sites[value.op].options[option_index], value.result)


def _flows(
    space: Space,
    wire: Wire,
    where: Mapping[int, tuple[int, int]],
    table: Sequence[Sequence[tuple[int, ...]]],
) -> list[tuple[Flow, tuple[Floats, Floats]]]:
    """Stored tensors are gathered for each phase, unless they stay gathered, and so are activations where they are
    gathered again; else values are converted once."""
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
    found = (_flow(space, wire, ports, where, table, costs) for ports, costs in asked if ports)
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
    space: Space,
    wire: Wire,
    ports: Sequence[Port],
    where: Mapping[int, tuple[int, int]],
    table: Sequence[Sequence[tuple[int, ...]]],
    costs: Costs,
) -> tuple[Flow, tuple[Floats, Floats]] | None:
    """One of a wire's flows, of what `costs` counts; None where nobody else reads it, or nothing of that has a cost."""
    producer, place = where[wire.value.op]
    given, asked = _States(), _States()
    states = tuple(given(_given(space, wire.value, row[place])) for row in table[producer])
    readers = []
    for port in ports:
        variable, k = where[port.site]
        if variable == producer and not port.stores:
            same = all(_asked(space, port, row[k]) == _given(space, wire.value, row[place]) for row in table[producer])
            if same:
                continue
        readers.append(Reader(variable, tuple(asked(_asked(space, port, row[k])) for row in table[variable])))
    if not readers:
        return None
    parts = _costs_s(moved(space, wire.value), tuple(given.index), tuple(asked.index))
    if costs is not _all_of:
        gathers = _gathers(space, given.index, tuple(asked.index))
        parts = (costs(parts[0], gathers), costs(parts[1], gathers))
        if not parts[0].any() and not parts[1].any():
            return None
    return Flow(producer, states, tuple(readers), _rows(parts[0] + parts[1]), wire.count), parts


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


def _hold(
    space: Space,
    wire: Wire,
    where: Mapping[int, tuple[int, int]],
    table: Sequence[Sequence[tuple[int, ...]]],
) -> Hold | None:
    """What backward keeps of a forward value, in each layout it reads it in; what is computed again only as moved. What
    is gathered again it keeps as it was."""
    made = space.sites[wire.value.op]
    if made.kind != "op" or made.phase != "forward":
        return None
    states = _States()
    readers = []
    again = space.recomputed.again
    for port in wire.ports:
        if port.phase == "backward" or port.site in again:
            variable, k = where[port.site]
            readers.append(Reader(variable, tuple(states(_asked(space, port, row[k])) for row in table[variable])))
    if not readers:
        return None
    given = None
    anew = wire.value not in space.recomputed.held and wire.value.op in again
    variable, k = where[wire.value.op]
    made_in = [_given(space, wire.value, row[k]) for row in table[variable]]
    if anew:
        given = Reader(variable, tuple(states.index.get(state, -1) for state in made_in))
    shape, itemsize, sizes = space.shape_of(wire.value), space.itemsize_of(wire.value), space.topology.sizes

    def state_bytes(state: State) -> float:
        layout = state.layout if isinstance(state, StoredOption) else state
        plain = tuple(Replicate() if isinstance(p, Partial) else p for p in layout)
        return float(math.prod(local_shape(shape, plain, sizes)) * itemsize)

    each = tuple(state_bytes(state) for state in states.index)
    if space.recomputed.regather:
        own = _States()
        maker = Reader(variable, tuple(own(state) for state in made_in))
        gathers = _gathers(space, own.index, tuple(states.index))

        def takes(i: int, p: State, j: int, q: State) -> float:
            if anew and (gathers[i, j] or p == q):
                return 0.0
            return state_bytes(p) if gathers[i, j] else each[j]

        if gathers.any():
            rows = tuple(tuple(takes(i, p, j, q) for j, q in enumerate(states.index)) for i, p in enumerate(own.index))
            return Hold(tuple(readers), each, wire.count, maker, rows)
    return Hold(tuple(readers), each, wire.count, given)
