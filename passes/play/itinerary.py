"""A plan in the order it runs: ops, and the moves of tensors between layouts that come before them.

What backward reads of forward and is not kept runs again, right before its first reader.

This one list is priced by `schedule`, shown as the ledger of collectives, and emitted by `rewrite`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from costmodel.layout import Layout, is_gather
from costmodel.reshard import Step
from passes.analysis.buckets import bucketed
from passes.analysis.dims import Value, outputs_of
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import Option, StoredOption
from passes.play.postpone import postponed
from passes.price.conversion import conversion, given_state, stored_state
from passes.space.space import Space


def itinerary(space: Space, assignment: Sequence[int]) -> list[Run | Move]:
    """Everything a rank does, in order, when site i takes option `assignment[i]`; moves of one bucket are adjacent."""
    gradients = space.analysis.gradients
    items = bucketed(space.program, list(_Walk(space, assignment).items()), gradients)
    return postponed(space.program, items, gradients) if space.recomputed.postpone else items


class _Walk:
    """The walk over the step so far: `seen` has the results of moves, `again` the ops that ran once more."""

    def __init__(self, space: Space, assignment: Sequence[int]) -> None:
        self.space = space
        self.assignment = assignment
        self.flow = space.analysis.flow
        self.given: dict[fx.Node, Layout | StoredOption] = {}
        self.forgotten: dict[fx.Node, bool] = {}
        self.seen: set[tuple[fx.Node, str, Layout | StoredOption]] = set()
        self.again: set[fx.Node] = set()
        self.memo: dict[tuple[Value, Layout | StoredOption, Layout | StoredOption], tuple[Step, ...]] = {}

    def items(self) -> Iterator[Run | Move]:
        wanted: dict[fx.Node, list[Returned]] = {}
        for leaving in returned(self.space, self.assignment):
            wanted.setdefault(leaving.node, []).append(leaving)
        operands = self.flow.operands
        for node in self.flow.nodes:
            if node in operands:
                yield from self._run(node, again=False)
            for leaving in wanted.get(node, ()):  # at once: a gradient that waits is a full gradient in memory
                value = self.flow.source.get(node, node)
                if leaving.phase == "backward" and self._is_gone(value, leaving.target):
                    yield from self._computed_again(value)
                yield from self._move(value, leaving.target, leaving.phase, None, leaving.stores)

    def _option(self, node: fx.Node) -> tuple[int, Option]:
        site = self.space.folding.of[node]
        option = self.space.sites[site].options[self.assignment[site]]
        assert isinstance(option, Option)
        return site, option

    def _given(self, node: fx.Node) -> Layout | StoredOption:
        """The layout in which a value exists before any move."""
        found = self.given.get(node)
        if found is None:
            value = self.flow.value[node]
            site = self.space.sites[value.op]
            found = given_state(site.options[self.assignment[value.op]], value.result)
            self.given[node] = found
        return found

    def _run(self, node: fx.Node, *, again: bool) -> Iterator[Run | Move]:
        site, option = self._option(node)
        phase = "backward" if again else str(node.meta.get("phase", "forward"))
        in_backward = phase == "backward" and not again
        for operand, layout in zip(self.flow.operands[node], option.operands, strict=True):
            if in_backward and self._is_gone(operand, layout):
                yield from self._computed_again(operand)
            yield from self._move(operand, layout, phase, node)
        yield Run(node, option, site, phase, again)

    def _move(
        self, node: fx.Node, target: Layout | StoredOption, phase: str, reader: fx.Node | None, stores: bool = False
    ) -> Iterator[Move]:
        source = self._given(node)
        if source == target:
            return
        era = phase if isinstance(source, StoredOption) and self.space.recomputed.reshard else ""
        if phase == "backward" and self.flow.op[node] in self.again:
            era = phase
        value = self.flow.value[node]
        if self._is_regathered(value, source, target):
            era = phase
        if (node, era, target) in self.seen or (node, "", target) in self.seen:
            return
        key = (value, source, target)
        if key not in self.memo:
            path = conversion(self.space, value, source, target)
            assert path is not None, f"{node.name}: no way from {source} to {target}"
            self.memo[key] = path
        if not self.memo[key]:
            era = phase  # an axis of one rank brings nothing that would be worth keeping for backward
        self.seen.add((node, era, target))
        yield Move(node, source, target, self.memo[key], phase, era, reader, stores)

    def _is_regathered(self, value: Value, source: Layout | StoredOption, target: Layout | StoredOption) -> bool:
        """Whether the plan gathers a forward value once more for backward."""
        if not self.space.recomputed.regather or isinstance(source, StoredOption) or isinstance(target, StoredOption):
            return False
        site = self.space.sites[value.op]
        forward = site.kind == "op" and site.phase == "forward"
        return forward and is_gather(source, target, self.space.topology.sizes)

    def _computed_again(self, node: fx.Node) -> Iterator[Run | Move]:
        """The ops that must run once more before backward can read `node`, which was not kept."""
        stack = [node]
        while stack:
            op = self.flow.op[stack[-1]]
            if op in self.again:
                stack.pop()
                continue
            _, option = self._option(op)
            operands = zip(self.flow.operands[op], option.operands, strict=True)
            missing = [operand for operand, where in operands if self._is_gone(operand, where)]
            if missing:
                stack += reversed(missing)
                continue
            self.again.add(op)
            yield from self._run(op, again=True)
            stack.pop()

    def _is_gone(self, node: fx.Node, layout: Layout | StoredOption) -> bool:
        """Whether a forward value is neither kept for backward nor computed again so far."""
        forgotten = self.forgotten.get(node)
        if forgotten is None:
            forgotten = self.forgotten[node] = self._is_forgotten(node)
        return forgotten and self.flow.op[node] not in self.again and (node, "", layout) not in self.seen

    def _is_forgotten(self, node: fx.Node) -> bool:
        """Whether a value is a forward one that the plan does not keep."""
        op = self.flow.op[node]
        if op.op != "call_function" or op.meta.get("phase", "forward") != "forward":
            return False
        value, recomputed = self.flow.value[node], self.space.recomputed
        return value.op in recomputed.again and value not in recomputed.held


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
    """Everything that leaves the program, in the order of its outputs; outputs that are no tensors are left out."""
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
