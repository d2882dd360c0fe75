"""Plans drawn at random: every op may be laid out in any way its rule allows, far from what a solver would choose."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.analysis.dims import Value
from passes.analysis.strategies import Option, op_options, stored_options
from passes.price.conversion import conversion, given_state, stored_state
from passes.program.local import LocalProgram
from passes.program.program import Program
from passes.rewrite.rewrite import rewrite
from passes.space.space import Space, search_space


def every_option(program: Program, mesh: Mapping[str, int], batch_axes: tuple[int, ...] = (0,)) -> Space:
    """The space with all options there are, whatever a strategy thinks of them."""
    space = search_space(program, topology(hardware("cpu"), mesh), batch_axes)
    sizes = space.topology.sizes
    sites = []
    for site in space.sites:
        if site.kind == "op":
            assert site.op is not None
            site = replace(site, options=op_options(site.op, sizes))
        elif site.parameter is not None:
            site = replace(site, options=stored_options(site.dims, sizes, site.given.shape, site.given.dtypes))
        sites.append(site)
    return replace(space, sites=tuple(sites))


def random_plan(space: Space, seed: int, share_whole: float = 0.15) -> tuple[tuple[int, ...], LocalProgram]:
    """Any option per site, as long as what it asks for can be made of what the sites that it reads give."""
    draw = random.Random(seed)
    # Sites are in the order of the graph, but a folded one may read a later member of an earlier site's class.
    ends: dict[int, list[tuple[int, int, Value]]] = defaultdict(list)
    for wire in space.wires:
        for port in wire.ports:
            if not port.stores:
                ends[max(port.site, wire.value.op)].append((port.site, port.operand, wire.value))
    while (picks := _drawn(space, ends, draw, share_whole)) is None:
        pass
    return tuple(picks), rewrite(space, picks)


def _drawn(
    space: Space, ends: Mapping[int, list[tuple[int, int, Value]]], draw: random.Random, share_whole: float
) -> list[int] | None:
    """A pick per site; None where those of earlier sites leave none for one."""
    picks: list[int] = []
    for index, site in enumerate(space.sites):
        order = list(range(len(site.options)))
        draw.shuffle(order)
        if draw.random() < share_whole:
            order.sort(key=lambda i: i != 0)
        picks.append(-1)
        for picks[index] in order:
            if all(_possible(space, picks, *end) for end in ends[index]):
                break
        else:
            return None
    return picks


def _possible(space: Space, picks: list[int], reader: int, operand: int, value: Value) -> bool:
    option = space.sites[reader].options[picks[reader]]
    given = given_state(space.sites[value.op].options[picks[value.op]], value.result)
    asked = option.operands[operand] if isinstance(option, Option) else stored_state(option)
    return given == asked or conversion(space, value, given, asked) is not None
