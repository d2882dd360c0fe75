"""Plans drawn at random: every op may be laid out in any way its rule allows, far from what a solver would choose."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from costmodel.hardware import hardware, topology
from passes.dims import Value
from passes.local import LocalProgram
from passes.price import conversion, given_state, stored_state
from passes.program import Program
from passes.rewrite import rewrite
from passes.space import Space, search_space
from passes.strategies import Option, op_options, stored_options


def every_option(program: Program, mesh: Mapping[str, int], batch_axes: tuple[int, ...] = (0,)) -> Space:
    """The space with all options there are, whatever a strategy thinks of them."""
    space = search_space(program, topology(hardware("cpu"), mesh), batch_axes)
    sizes = space.topology.sizes
    sites = []
    for site in space.sites:
        if site.kind == "op":
            assert site.op is not None
            site = replace(site, options=op_options(site.op, sizes))
        elif site.given is not None and site.given.kind == "parameter":
            site = replace(site, options=stored_options(site.dims, sizes, site.given.shape, site.given.dtypes))
        sites.append(site)
    return replace(space, sites=tuple(sites))


def random_plan(space: Space, seed: int, share_whole: float = 0.15) -> tuple[tuple[int, ...], LocalProgram]:
    """Any option per site, as long as what it asks for can be made of what the sites before it give."""
    draw = random.Random(seed)
    sources: dict[int, list[tuple[int, Value]]] = defaultdict(list)
    for wire in space.wires:
        for port in wire.ports:
            if not port.stores:
                sources[port.site].append((port.operand, wire.value))
    picks: list[int] = []
    # Sites are in the order of the graph, but a folded one may read a later member of an earlier site's class.
    for index, site in enumerate(space.sites):
        order = list(range(len(site.options)))
        draw.shuffle(order)
        if draw.random() < share_whole:
            order.sort(key=lambda i: i != 0)
        picks.append(next(i for i in order if _possible(space, picks, index, i, sources[index])))
    return tuple(picks), rewrite(space, picks)


def _possible(space: Space, picks: list[int], index: int, pick: int, sources: list[tuple[int, Value]]) -> bool:
    option = space.sites[index].options[pick]
    for operand, value in sources:
        if value.op >= len(picks):
            continue
        given = given_state(space.sites[value.op], space.sites[value.op].options[picks[value.op]], value.result)
        asked = option.operands[operand] if isinstance(option, Option) else stored_state(option)
        if given != asked and conversion(space, value, given, asked) is None:
            return False
    return True
