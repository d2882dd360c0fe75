"""Space -> Problem: seconds and bytes for every option and every change of layout (the only file that joins both)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from costmodel.collectives import collective_s
from costmodel.compute import op_s, update_traffic_s
from costmodel.hardware import Device, Topology
from costmodel.layout import Partial, Replicate, is_gather, local_shape
from costmodel.memory import OPTIMIZERS, OptimizerSpec, at_rest
from costmodel.reshard import Step, reshard_s
from passes.analysis.buckets import sends_one_gather
from passes.analysis.strategies import Option, StoredOption
from passes.errors import NoFeasiblePlanError
from passes.price.conversion import Moved, State, moved, steps_between
from passes.price.per_rank import local_work
from passes.price.variables import States, Variables, merged
from passes.solver.pairwise import Floats
from passes.solver.problem import Flow, Hold, Problem, Reader
from passes.space.recompute import is_cheap_op
from passes.space.space import Port, Site, Space, Wire

aten = torch.ops.aten


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
    variables = merged(space)
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


def _flows(variables: Variables, wire: Wire) -> list[tuple[Flow, tuple[Floats, Floats]]]:
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
    variables: Variables, wire: Wire, ports: Sequence[Port], costs: Costs
) -> tuple[Flow, tuple[Floats, Floats]] | None:
    """One of a wire's flows, of what `costs` counts; None where nobody else reads it, or nothing of that has a cost."""
    space = variables.space
    producer, made_in = variables.given(wire.value)
    given, asked = States(), States()
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


def _hold(variables: Variables, wire: Wire) -> Hold | None:
    """What backward keeps of a forward value, in each layout it reads it in; what is computed again only as moved. What
    is gathered again it keeps as it was."""
    space = variables.space
    made = space.sites[wire.value.op]
    if made.kind != "op" or made.phase != "forward":
        return None
    states = States()
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
    own = States()
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
