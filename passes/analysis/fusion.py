"""What of an op's tensors really moves: pointwise chains are one kernel in a compiled step.

    eager      every op reads its operands and writes its results
    compiled   pointwise ops, copies and row reductions that follow one another without another kind of kernel between
               them are one kernel: what enters it is read once, and only what others read is written

Inductor fuses so. A reduction over rows (a bias's gradient, a norm's weight's) runs through memory in another order: it
is a kernel of its own that reads what its chain reads. What is made of hardly anything (which word is the target, a
mask of positions, random numbers) each kernel makes for itself. A forward value that only backward's pointwise ops read
is not written: they compute it again (see `recompute`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.analysis.dims import is_getitem
from passes.analysis.layers import Folding
from passes.rules.call import Call, operand_nodes
from passes.rules.work import COPIED, GATHERS, VIEWS, is_reduction


@dataclass(frozen=True, slots=True)
class Traffic:
    """Share of each operand's and result's bytes that the op itself moves (above 1: read more than once), and its share
    of a launch."""

    reads: tuple[float, ...]
    writes: tuple[float, ...]
    launch: float = 1.0


Fused = bool | Callable[[fx.Node], bool]
"""Whether ops run compiled: all or none, or which."""


def traffic(
    graph: fx.Graph,
    folding: Folding,
    calls: Sequence[Call | None],
    fused: Fused,
    weights: Mapping[fx.Node, int] | None = None,
) -> list[Traffic | None]:
    """Per class of alike nodes, the mean of its members; None for what is no pointwise op, copy or reduction.

    `weights`: nodes that stand for several.
    """
    kinds = [_kind(call) if call is not None else "" for call in calls]
    eager = [
        Traffic((1.0,) * len(call.operands), (1.0,) * len(call.results)) if call and kind in _FUSIBLE else None
        for call, kind in zip(calls, kinds, strict=True)
    ]
    if fused is False:
        return eager
    compiled = _Kernels(graph, folding, kinds).traffic(weights or {})
    if fused is True:
        return compiled
    chosen = [fused(members[0]) for members in folding.members]
    return [new if which else old for new, old, which in zip(compiled, eager, chosen, strict=True)]


_FUSIBLE = ("pointwise", "row", "column")
_LITTLE = 1 / 8
"""What is made of less than this share of its bytes is made where it is read."""


def _kind(call: Call) -> str:
    """ "view", "pointwise" (and what fuses like it), "row" or "column" reduction, or "kernel"."""
    target: Any = call.target
    if target in VIEWS:
        return "view"
    if torch.Tag.pointwise in getattr(target, "tags", ()) or target in COPIED or target in GATHERS or not call.operands:
        return "pointwise"
    if is_reduction(target):
        source, result = call.operands[0].shape, call.results[0]
        if result is None or not source:
            return "row"
        keeps = len(result.shape) == len(source) and result.shape[:1] == source[:1]
        same = result.shape[: len(source) - 1] == source[:-1]
        return "row" if keeps or same else "column"
    return "kernel"


class _Kernels:
    """Nodes put together into kernels: of one phase, and with as many kernels of other kinds before them."""

    def __init__(self, graph: fx.Graph, folding: Folding, kinds: Sequence[str]) -> None:
        self.folding = folding
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and not is_getitem(n)]
        self.kind = {node: kinds[folding.of[node]] for node in self.nodes}
        self.level: dict[fx.Node, int] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.made_anew: set[fx.Node] = set()
        for node in self.nodes:
            self._place(node)
            if self.kind[node] == "pointwise" and self._is_of_little(node):
                self.made_anew.add(node)
        self.written = self._written(graph)

    def _place(self, node: fx.Node) -> None:
        kind, operands = self.kind[node], [self.source(x) for x in operand_nodes(node)]
        below = max((self.level.get(x, 0) for x in operands), default=0)
        self.level[node] = below + 1 if kind in ("kernel", "column") else below
        if kind not in ("pointwise", "row"):
            return
        self.parent[node] = node
        for operand in operands:
            if self._joins(operand, node):
                self.parent[self.group(operand)] = self.group(node)

    def _is_of_little(self, node: fx.Node) -> bool:
        """Whether what a pointwise op is made of is small beside its result."""
        operands = {self.source(x) for x in operand_nodes(node)} - self.made_anew
        return sum(map(_bytes, operands)) <= _LITTLE * _bytes(node)

    def _joins(self, operand: fx.Node, node: fx.Node) -> bool:
        return (
            operand in self.parent
            and self.level[operand] == self.level[node]
            and operand.meta.get("phase") == node.meta.get("phase")
        )

    def source(self, node: fx.Node) -> fx.Node:
        """The op whose buffer a node names."""
        while is_getitem(node) or self.kind.get(node) == "view":
            node = node.all_input_nodes[0]
        return node

    def group(self, node: fx.Node) -> fx.Node:
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def _written(self, graph: fx.Graph) -> set[fx.Node]:
        """Ops of kernels whose result others read."""
        found = set()
        for node in graph.nodes:
            if node.op == "output":
                found |= {self.source(x) for x in node.all_input_nodes}
            elif node in self.kind and self.kind[node] not in ("view", "column"):
                for operand in map(self.source, operand_nodes(node)):
                    if operand not in self.parent or self._together(operand, node):
                        continue
                    if operand in self.made_anew and node in self.parent:
                        continue
                    if self.kind[node] == "kernel" or operand.meta.get("phase") == node.meta.get("phase"):
                        found.add(operand)
        return found & set(self.parent)

    def _together(self, operand: fx.Node, node: fx.Node) -> bool:
        return node in self.parent and self.group(operand) is self.group(node)

    def _entering(self, node: fx.Node) -> set[fx.Node]:
        """What a column reduction's chain reads from memory."""
        found, stack, seen = set(), [self.source(x) for x in operand_nodes(node)], set()
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            same = one in self.parent and one.meta.get("phase") == node.meta.get("phase") and one not in self.written
            if same and (one in self.made_anew or self.level[one] == self.level[node] - 1):
                stack += [self.source(x) for x in operand_nodes(one)]
            else:
                found.add(one)
        return found

    def _made_from(self, node: fx.Node) -> list[fx.Node]:
        """What a kernel reads that reads `node`: itself, or what it computes it from again where that is not written.
        Reductions of rows are kept: they are small."""
        found, stack, seen = [], [node], set()
        while stack:
            one = stack.pop()
            if one in seen or one in self.made_anew:
                continue
            seen.add(one)
            if one not in self.parent or one in self.written:
                found.append(one)
            elif self.kind[one] == "pointwise":
                stack += [self.source(x) for x in operand_nodes(one)]
        return found

    def traffic(self, weights: Mapping[fx.Node, int]) -> list[Traffic | None]:
        sums: dict[int, list[list[float]]] = {}
        counts: dict[int, int] = defaultdict(int)
        read: set[tuple[fx.Node, fx.Node]] = set()
        led: set[fx.Node] = set()
        for node in self.nodes:
            kind, site = self.kind[node], self.folding.of[node]
            if kind not in _FUSIBLE:
                continue
            operands = [self.source(x) for x in operand_nodes(node)]
            results = len(node.meta["val"]) if isinstance(node.meta["val"], list | tuple) else 1
            if kind == "column":
                size = _bytes(operand_nodes(node)[0])
                enter = sum(min(1.0, _bytes(x) / size) if size else 0.0 for x in self._entering(node))
                mine = [[enter, *(0.0 for _ in operands[1:])], [1.0] * results, [1.0]]
            else:
                group = self.group(node)
                reads = []
                for operand in operands:
                    inside = operand in self.parent and self.group(operand) is group
                    enters = self._made_from(operand) if not inside else ()
                    fresh = [one for one in enters if (group, one) not in read]
                    read |= {(group, one) for one in fresh}
                    size = _bytes(operand)
                    reads.append(sum(map(_bytes, fresh)) / size if size else float(bool(fresh)))
                mine = [reads, [1.0 if node in self.written else 0.0] * results, [0.0 if group in led else 1.0]]
                led.add(group)
            weight = weights.get(node, 1)
            counts[site] += weight
            total = sums.setdefault(site, [[0.0] * len(part) for part in mine])
            for part, add in zip(total, mine, strict=True):
                part[:] = [a + weight * b for a, b in zip(part, add, strict=True)]
        found: list[Traffic | None] = []
        for site in range(len(self.folding.members)):
            if site not in sums:
                found.append(None)
                continue
            reads, writes, launch = ([x / counts[site] for x in part] for part in sums[site])
            found.append(Traffic(tuple(reads), tuple(writes), launch[0]))
        return found


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
