"""A plan in the order it runs: ops, and the moves of tensors between layouts that come before them.

This one list is priced by `schedule`, shown as the ledger of collectives, and emitted by `rewrite`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from costmodel.layout import Layout
from costmodel.reshard import Step
from passes.buckets import bucketed
from passes.dims import is_getitem, outputs_of, value_of
from passes.moves import Move, Run
from passes.price import conversion, given_state, stored_state
from passes.rules.call import operand_nodes
from passes.space import Space
from passes.strategies import Option, StoredOption


def itinerary(space: Space, assignment: Sequence[int]) -> list[Run | Move]:
    """Everything a rank does, in order, when site i takes option `assignment[i]`; buckets stand side by side."""
    return bucketed(space.program, list(_one_by_one(space, assignment)))


def _one_by_one(space: Space, assignment: Sequence[int]) -> Iterator[Run | Move]:
    """Moves right before what needs them."""
    program, folding = space.program, space.folding
    seen: set[tuple[fx.Node, str, Layout | StoredOption]] = set()
    picked: dict[tuple[fx.Node, int], fx.Node] = {}
    source_of: dict[fx.Node, fx.Node] = {}
    memo: dict[tuple[object, ...], tuple[Step, ...]] = {}

    def given(node: fx.Node) -> Layout | StoredOption:
        value = value_of(node, folding)
        site = space.sites[value.op]
        return given_state(site, site.options[assignment[value.op]], value.result)

    def move(
        node: fx.Node, target: Layout | StoredOption, phase: str, reader: fx.Node | None, stores: bool = False
    ) -> Iterator[Move]:
        node = source_of.get(node, node)
        source = given(node)
        era = phase if isinstance(source, StoredOption) else ""
        if source == target or (node, era, target) in seen:
            return
        value = value_of(node, folding)
        key = (value, source, target)
        if key not in memo:
            path = conversion(space, value, source, target)
            assert path is not None, f"{node.name}: no way from {source} to {target}"
            memo[key] = path
        seen.add((node, era, target))
        if not memo[key] and not stores:
            return
        yield Move(node, source, target, memo[key], phase, era, reader, stores)

    wanted: dict[fx.Node, list[Returned]] = {}
    for leaving in returned(space, assignment):
        wanted.setdefault(leaving.node, []).append(leaving)
    for node in program.graph.graph.nodes:
        if is_getitem(node):
            source_of[node] = picked.setdefault((node.args[0], node.args[1]), node)
        elif node.op == "call_function":
            site = folding.of[node]
            option = space.sites[site].options[assignment[site]]
            assert isinstance(option, Option)
            for operand, layout in zip(operand_nodes(node), option.operands, strict=True):
                yield from move(operand, layout, node.meta.get("phase", "forward"), node)
            yield Run(node, option, site)
        for leaving in wanted.get(node, ()):  # at once: a gradient that waits is a full gradient in memory
            yield from move(node, leaving.target, leaving.phase, None, leaving.stores)


@dataclass(frozen=True)
class Returned:
    """Output number `index` of the program: the node, how it leaves, and whether it goes to its parameter's storage."""

    index: int
    node: fx.Node
    target: Layout | StoredOption
    option: StoredOption
    phase: str
    stores: bool


def returned(space: Space, assignment: Sequence[int]) -> list[Returned]:
    """What leaves the program, in the order of its outputs; outputs that are no tensors are left out."""
    found = []
    next_site = len(space.folding.members)
    for index, (out, node, placeholder, given) in enumerate(outputs_of(space.program)):
        if node is None:
            continue
        if out.kind == "gradient" and given is not None and given.kind == "parameter":
            assert placeholder is not None
            site = space.folding.of[placeholder]
            option = space.sites[site].options[assignment[site]]
            assert isinstance(option, StoredOption)
            found.append(Returned(index, node, stored_state(option), option, "backward", True))
            continue
        option = space.sites[next_site].options[assignment[next_site]]
        assert isinstance(option, StoredOption)
        phase = "backward" if out.kind == "gradient" else "forward"
        found.append(Returned(index, node, option.layout, option, phase, False))
        next_site += 1
    return found
