"""Splits one rank's step into a forward and a backward graph, and chooses what the backward keeps of the forward.

What depends on a tangent, and what was traced as backward and no output needs, is backward. Of the forward values that
the backward reads, some are *saved* (forward outputs that the backward takes) and the rest computed again from those.
The choice is a minimum cut: of all sets from which the backward can be computed, one with the fewest bytes, and among
equals the one that computes least again.

Never saved: whatever is made of parameters alone (cast again in the backward), gathered parameters that the program
gathers for backward too (these are read), and views (their base is). Never computed again: collectives of anything
else, and ops that `recompute` does not allow.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import fx

from passes.local import COLLECTIVES, TOGETHER, WAIT, LocalProgram

Recompute = Literal["none", "auto", "selective", "full"]

aten = torch.ops.aten
CHEAP = {
    aten._to_copy.default,
    aten.clone.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.split_with_sizes.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.full_like.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.empty.memory_format,
    aten.scalar_tensor.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.tril.default,
    aten.triu.default,
    aten.repeat.default,
    aten.flip.default,
}
ATTENTION = {
    aten.bmm.default,
    aten.baddbmm.default,
    aten._softmax.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
UNBOUNDED = 1 << 62
ALONE: dict[Any, Any] = {together: single for single, together in TOGETHER.items()}


@dataclass(frozen=True)
class Halves:
    """A step in two graphs.

    forward: takes every placeholder but the tangents; gives the outputs and new buffers (`outputs` of them), then the
        saved values that are no placeholders.
    backward: takes the placeholders `saved_inputs` (indices into the forward's), the forward's saved values, then the
        tangents; gives the gradients. None where the step has no gradients.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    outputs: int
    saved_inputs: tuple[int, ...]

    @property
    def saved(self) -> tuple[fx.Node, ...]:
        """The forward's nodes whose values the backward keeps."""
        return _results(self.forward)[self.outputs :]


def split(local: LocalProgram, recompute: Recompute = "auto") -> Halves:
    """Forward and backward of `local`; the graph of `local` is left as it is.

    recompute: "none" computes nothing again but views and what is made of parameters alone; "auto" also pointwise ops,
    where that saves memory; "selective" also the attention core and its softmax; "full" everything inside a repeated
    block (a module whose name ends in a number) except collectives, so that only the blocks' inputs are kept.
    """
    graph = local.graph.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    results = _results(local.graph)
    kinds = [result.kind for result in local.outputs]
    outputs = [node for node, kind in zip(results, kinds, strict=True) if kind != "gradient"]
    gradients = [node for node, kind in zip(results, kinds, strict=True) if kind == "gradient"]
    tangents = [p for p, i in zip(placeholders, local.inputs, strict=True) if i.kind == "tangent"]
    inputs = [p for p in placeholders if p not in tangents]
    constants = [
        p for p, i in zip(placeholders, local.inputs, strict=True) if i.kind in ("parameter", "buffer", "coordinate")
    ]

    backward = _backward_nodes(graph, tangents, outputs)
    if misplaced := [node.name for node in outputs if node in backward]:
        raise AssertionError(f"outputs {misplaced} depend on tangents")
    if not gradients:
        forward = _extract(local.graph, inputs, outputs, frozenset(), {})
        return Halves(forward, None, len(outputs), ())

    of_parameters = parameter_chain(graph, constants)
    twins = _twins(graph, of_parameters, backward)
    wanted = _needed(gradients, stop=lambda node: node not in backward)
    demands = [node for node in wanted if node not in backward and node not in twins]
    allowed = _recomputable(graph, backward, of_parameters, recompute)
    # Where the program gathers for backward by itself, what it does not gather again is kept: it is small.
    fixed = frozenset(n for n in of_parameters if n.target is WAIT and n not in twins) if twins else frozenset()
    kept = _cheapest_cut(demands, allowed - fixed, of_parameters - fixed, twins.keys())
    saved_inputs = [p for p in inputs if p in kept]
    saved = [node for node in graph.nodes if node in kept and node.op != "placeholder"]
    return Halves(
        _extract(local.graph, inputs, [*outputs, *saved], frozenset(), {}),
        _extract(local.graph, [*saved_inputs, *saved, *tangents], gradients, backward, twins),
        len(outputs),
        tuple(inputs.index(p) for p in saved_inputs),
    )


def _results(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What a graph's output tuple holds."""
    results: Any = gm.graph.output_node().args[0]
    return tuple(results)


def _backward_nodes(graph: fx.Graph, tangents: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Nodes that depend on a tangent, or were traced as backward and no output needs."""
    forward = set(_needed(outputs, stop=lambda node: False))
    found: set[fx.Node] = set(tangents)
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if any(operand in found for operand in node.all_input_nodes):
            # An item of a tuple is where the tuple is.
            found.add(node)
        elif node.target is not operator.getitem and node.meta.get("phase") == "backward" and node not in forward:
            found.add(node)
    return frozenset(found)


def _needed(
    roots: Iterable[Any], stop: Callable[[fx.Node], bool], instead: Mapping[fx.Node, fx.Node] = MappingProxyType({})
) -> dict[fx.Node, None]:
    """`roots` and what they are made of, going no further than nodes where `stop`; `instead` of some nodes others."""
    found: dict[fx.Node, None] = {}
    stack = [root for root in roots if isinstance(root, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            if not stop(node):
                stack.extend(instead.get(operand, operand) for operand in node.all_input_nodes)
    return found


def parameter_chain(graph: fx.Graph, constants: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Nodes made of parameters, buffers and coordinates by casts, views, pointwise ops and gathers alone."""
    chain = set(constants)
    for node in graph.nodes:
        allowed = node.op == "call_function" and (_is_cheap(node) or node.target in COLLECTIVES or node.target is WAIT)
        if allowed and node.all_input_nodes and all(operand in chain for operand in node.all_input_nodes):
            chain.add(node)
    return frozenset(chain)


def is_view(node: fx.Node) -> bool:
    target = node.target
    return (isinstance(target, torch._ops.OpOverload) and target.is_view) or target is aten._unsafe_view.default


def _is_cheap(node: fx.Node) -> bool:
    """Whether an op costs about what reading its operands costs."""
    target = node.target
    if target is operator.getitem or target in CHEAP or is_view(node):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _block(node: fx.Node) -> str:
    """The outermost repeated module (`model.layers.3`) that ran the op, or ""."""
    parts = str(node.meta.get("module", "")).split(".")
    for end, part in enumerate(parts, 1):
        if part.isdigit():
            return ".".join(parts[:end])
    return ""


def _recomputable(
    graph: fx.Graph, backward: frozenset[fx.Node], of_parameters: frozenset[fx.Node], recompute: Recompute
) -> frozenset[fx.Node]:
    """Forward nodes that may be computed again in the backward."""
    allowed = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node in of_parameters and node.op == "call_function"):
            allowed.add(node)
            continue
        if node.op != "call_function" or node in backward or node.target in COLLECTIVES or node.target is WAIT:
            continue
        if is_view(node) or node.target is operator.getitem or not node.all_input_nodes:
            allowed.add(node)
        elif recompute == "full" and (block := _block(node)):
            if all(_block(user) == block for user in node.users if user not in backward and user.op != "output"):
                allowed.add(node)
        elif recompute != "none" and (_is_cheap(node) or (recompute == "selective" and node.target in ATTENTION)):
            allowed.add(node)
    return frozenset(allowed)


def _twins(graph: fx.Graph, of_parameters: frozenset[fx.Node], backward: frozenset[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For gathered parameters of the forward, the same as the program gathers them for backward."""
    texts: dict[fx.Node, Any] = {}

    def text(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(text, value))
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return value if isinstance(value, fx.Node) else repr(value)
        if value not in texts:
            target, arguments = value.target, value.args
            if target is operator.getitem and (made := value.all_input_nodes[0]).target in ALONE:
                # One of several that go together is as if it went alone.
                target, arguments = ALONE[made.target], (made.args[0][arguments[1]], *made.args[1:])  # type: ignore[index]
            texts[value] = target, text(arguments), text(sorted(value.kwargs.items()))
        return texts[value]

    waits = [node for node in graph.nodes if node.target is WAIT and node in of_parameters]
    again: dict[Any, fx.Node] = {}
    for node in waits:
        if node in backward:
            again.setdefault(text(node), node)
    return {node: again[text(node)] for node in waits if node not in backward and text(node) in again}


def _value_bytes(node: fx.Node) -> int | None:
    """Bytes of the tensor a node yields; None where it yields no tensor."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else None


def _save_bytes(node: fx.Node, of_parameters: frozenset[fx.Node]) -> int:
    """What keeping a node's value costs."""
    if node.op == "placeholder":
        return 0
    size = _value_bytes(node)
    if size is None or node in of_parameters or node.target in COLLECTIVES or is_view(node) or node.op == "get_attr":
        return UNBOUNDED
    # One byte more, so that values of no size are counted too.
    return size + 1


def _cheapest_cut(
    demands: Sequence[fx.Node],
    recomputable: frozenset[fx.Node],
    of_parameters: frozenset[fx.Node],
    there: AbstractSet[fx.Node],
) -> frozenset[fx.Node]:
    """The values to keep so that every one of `demands` can be had, at the fewest bytes; those `there` are had anyway.

    Each node is an edge of its size from its `in` to its `out`; a node that can be computed again is fed by its
    operands, any other by the source; demands feed the sink. Saved are the edges of a minimum cut.
    """
    members = list(_needed(demands, stop=lambda node: node not in recomputable or node in there))
    number = {node: 2 * index for index, node in enumerate(members)}
    source, sink = 2 * len(members), 2 * len(members) + 1
    flow = _Flow(2 * len(members) + 2)
    for node, index in number.items():
        if node in there:
            continue
        flow.connect(index, index + 1, _save_bytes(node, of_parameters))
        if node in recomputable:
            for operand in node.all_input_nodes:
                flow.connect(number[operand] + 1, index, UNBOUNDED)
        else:
            flow.connect(source, index, UNBOUNDED)
    for node in demands:
        flow.connect(number[node] + 1, sink, UNBOUNDED)
    total = flow.saturate(source, sink)
    if total >= UNBOUNDED:
        raise AssertionError("a value that the backward needs can neither be kept nor computed again")
    late = flow.reaching(sink)
    kept = {node for node, index in number.items() if index not in late and index + 1 in late}
    return frozenset(kept & set(_needed(demands, stop=lambda node: node in kept)))


class _Flow:
    """A network with integer capacities; Dinic's algorithm, without recursion."""

    def __init__(self, nodes: int) -> None:
        self.edges_of: list[list[int]] = [[] for _ in range(nodes)]
        self.target: list[int] = []
        self.left: list[int] = []

    def connect(self, start: int, end: int, capacity: int) -> None:
        for a, b, c in ((start, end, capacity), (end, start, 0)):
            self.edges_of[a].append(len(self.target))
            self.target.append(b)
            self.left.append(c)

    def saturate(self, source: int, sink: int) -> int:
        """Pushes a maximum flow and returns its size."""
        total = 0
        while (level := self._levels(source))[sink] >= 0:
            next_edge = [0] * len(self.edges_of)
            while pushed := self._push(source, sink, level, next_edge):
                total += pushed
                if total >= UNBOUNDED:
                    return total
        return total

    def _levels(self, source: int) -> list[int]:
        level = [-1] * len(self.edges_of)
        level[source] = 0
        queue = deque([source])
        while queue:
            node = queue.popleft()
            for edge in self.edges_of[node]:
                if self.left[edge] > 0 and level[self.target[edge]] < 0:
                    level[self.target[edge]] = level[node] + 1
                    queue.append(self.target[edge])
        return level

    def _push(self, source: int, sink: int, level: list[int], next_edge: list[int]) -> int:
        """One augmenting path along rising levels; what it carried, 0 where there is none."""
        path: list[int] = []
        node = source
        while node != sink:
            edges = self.edges_of[node]
            while next_edge[node] < len(edges):
                edge = edges[next_edge[node]]
                if self.left[edge] > 0 and level[self.target[edge]] == level[node] + 1:
                    break
                next_edge[node] += 1
            else:
                if not path:
                    return 0
                node = self.target[path.pop() ^ 1]
                next_edge[node] += 1
                continue
            path.append(edge)
            node = self.target[edge]
        amount = min(self.left[edge] for edge in path)
        for edge in path:
            self.left[edge] -= amount
            self.left[edge ^ 1] += amount
        return amount

    def reaching(self, sink: int) -> set[int]:
        """Nodes from which the sink can still be reached."""
        found = {sink}
        stack = [sink]
        while stack:
            for edge in self.edges_of[stack.pop()]:
                node = self.target[edge]
                if node not in found and self.left[edge ^ 1] > 0:
                    found.add(node)
                    stack.append(node)
        return found


def _extract(
    owner: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[Any],
    first: frozenset[fx.Node],
    instead: Mapping[fx.Node, fx.Node],
) -> fx.GraphModule:
    """The graph that makes `outputs` of `inputs`; `instead`: nodes that are read in the place of others.

    Nodes of `first` keep their order; any other is put right before the first that reads it.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copy = graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        copies[node] = copy
    needed = _needed(outputs, stop=lambda node: node in copies, instead=instead)
    order = {node: position for position, node in enumerate(owner.graph.nodes)}
    roots = sorted((node for node in needed if node in first or not first), key=order.__getitem__)
    for root in [*roots, *(node for node in outputs if isinstance(node, fx.Node))]:
        stack = [root]
        while stack:
            node = stack[-1]
            operands = [instead.get(operand, operand) for operand in node.all_input_nodes]
            missing = sorted((o for o in operands if o not in copies), key=order.__getitem__, reverse=True)
            if node in copies:
                stack.pop()
            elif missing:
                stack.extend(missing)
            else:
                copies[node] = graph.node_copy(node, lambda operand: copies[instead.get(operand, operand)])
                if first:
                    copies[node].meta["phase"] = "backward"
                stack.pop()
    graph.output(tuple(copies[node] if isinstance(node, fx.Node) else node for node in outputs))
    graph.lint()
    return fx.GraphModule(owner, graph)
