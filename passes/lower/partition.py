"""Splits one rank's step into a forward and a backward graph.

What depends on a tangent, and what was traced as backward and no output needs, is backward. What is computed again was
decided by the plan, and stands in the program; so of the forward's values, backward keeps those that it reads. Not
kept are views (their base is), constants, and what is made of parameters alone, which are there: casts of them are made
again, and gathered parameters that the program gathers for backward too are read as gathered then.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program.graphs import graph_module
from passes.program.local import COLLECTIVES, TOGETHER, WAIT, LocalInputKind, LocalProgram
from passes.program.walks import made_of, results_of
from passes.rules.work import base_of, is_view, is_view_op
from passes.space.recompute import is_cheap_op

aten = torch.ops.aten
CONSTANT_KINDS: tuple[LocalInputKind, ...] = ("parameter", "buffer", "coordinate")
"""Of placeholders that hold nothing of a call: what is made of them alone is there in backward too."""
ALONE: dict[Any, Any] = {together: single for single, together in TOGETHER.items()}


@dataclass(frozen=True)
class Halves:
    """A step in two graphs.

    forward: takes every placeholder but the tangents; gives the outputs and new buffers (`outputs` of them), then the
        saved values that are no placeholders. An output that is a copy has memory of its own (`Output.memory`).
    backward: takes the placeholders `saved_inputs` (indices into the forward's), the forward's saved values, then the
        tangents; gives the gradients, each in memory of its own. None where the step has no gradients.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    outputs: int
    saved_inputs: tuple[int, ...]

    @property
    def saved(self) -> tuple[fx.Node, ...]:
        """The forward's nodes whose values the backward keeps."""
        return results_of(self.forward.graph)[self.outputs :]

    @property
    def kept(self) -> tuple[bool, ...]:
        """Per output and new buffer: whether its storage is kept for the backward."""
        inputs = self.forward.graph.find_nodes(op="placeholder")
        bases = {*map(base_of, self.saved), *(inputs[index] for index in self.saved_inputs)}
        return tuple(base_of(node) in bases for node in results_of(self.forward.graph)[: self.outputs])


def split(local: LocalProgram) -> Halves:
    """Forward and backward of `local`; the graph of `local` is left as it is."""
    graph = local.graph.graph
    results = results_of(graph)
    kinds = [result.kind for result in local.outputs]
    outputs = [node for node, kind in zip(results, kinds, strict=True) if kind != "gradient"]
    gradients = [node for node, kind in zip(results, kinds, strict=True) if kind == "gradient"]
    tangents = local.placeholders_of("tangent")
    inputs = [node for node in local.placeholders if node not in tangents]
    memories = [output.memory for output in local.program.outputs if output.kind != "gradient"]

    backward = _backward_nodes(graph, tangents, outputs)
    if misplaced := [node.name for node in outputs if node in backward]:
        raise AssertionError(f"outputs {misplaced} depend on tangents")
    if not gradients:
        forward = extract(local.graph, inputs, outputs, frozenset(), {})
        return Halves(_with_copies(forward, memories), None, len(outputs), ())

    of_parameters = parameter_chain(graph, local.placeholders_of(*CONSTANT_KINDS))
    twins = _twins(graph, of_parameters, backward)
    wanted = made_of(gradients, stop=lambda node: node not in backward)
    demands = [node for node in wanted if node not in backward and node not in twins]
    kept = _kept(demands, of_parameters, twins.keys())
    saved_inputs = [p for p in inputs if p in kept]
    saved = [node for node in graph.nodes if node in kept and node.op != "placeholder"]
    forward = extract(local.graph, inputs, [*outputs, *saved], frozenset(), {})
    return Halves(
        _with_copies(forward, memories),
        with_own_results(extract(local.graph, [*saved_inputs, *saved, *tangents], gradients, backward, twins)),
        len(outputs),
        tuple(inputs.index(p) for p in saved_inputs),
    )


def _backward_nodes(graph: fx.Graph, tangents: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Nodes that depend on a tangent, or were traced as backward and no output needs."""
    forward = set(made_of(outputs))
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


def parameter_chain(graph: fx.Graph, constants: Iterable[fx.Node], gathered: bool = True) -> frozenset[fx.Node]:
    """Nodes made of parameters, buffers and coordinates by casts, views, pointwise ops and, where `gathered`, gathers
    alone."""
    chain = set(constants)
    for node in graph.nodes:
        allowed = node.op == "call_function" and (
            is_cheap_op(node.target) or (gathered and (node.target in COLLECTIVES or node.target is WAIT))
        )
        if allowed and node.all_input_nodes and all(operand in chain for operand in node.all_input_nodes):
            chain.add(node)
    return frozenset(chain)


def _kept(
    demands: Iterable[fx.Node], of_parameters: frozenset[fx.Node], there: AbstractSet[fx.Node]
) -> frozenset[fx.Node]:
    """The nodes whose values to keep so that every one of `demands` can be had; those `there` are had anyway."""

    def is_kept(node: fx.Node) -> bool:
        if node.op == "placeholder" or node.target is WAIT:
            return True
        return bool(node.all_input_nodes) and not is_view_op(node.target) and node not in of_parameters

    needed = made_of(demands, stop=lambda node: node in there or is_kept(node))
    return frozenset(node for node in needed if node not in there and is_kept(node))


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


def extract(
    owner: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[Any],
    first: frozenset[fx.Node],
    instead: Mapping[fx.Node, fx.Node],
) -> fx.GraphModule:
    """The graph that computes `outputs` from `inputs`. `instead`: node -> the node that is read in its place.

    Nodes in `first` keep their order; any other is put right before its first reader.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copy = graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        copies[node] = copy
    needed = made_of(outputs, stop=lambda node: node in copies, instead=instead)
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
    return graph_module(owner, graph)


def _with_copies(gm: fx.GraphModule, memories: Sequence[str]) -> fx.GraphModule:
    """A forward with a copy of each output that is one (`memories` has the name of its memory, "" for what is no copy)
    where something else is there too: what the step is given, keeps for backward or returns under another name.

    What is a constant of the graph is copied too, as the next step reads it.
    """
    results = list(results_of(gm.graph))
    bases = [base_of(node) for node in results]
    taken = {base: "" for base, memory in zip(bases, memories, strict=False) if not memory}
    taken |= dict.fromkeys(bases[len(memories) :], "")
    copies: dict[tuple[str, fx.Node], fx.Node] = {}
    for index, (memory, node, base) in enumerate(zip(memories, results, bases, strict=False)):
        given = base.op == "placeholder" and memory
        if base.op == "get_attr" or given or (memory and taken.setdefault(base, memory) != memory):
            if (memory, node) not in copies:
                copies[memory, node] = _copy(gm.graph, node)
            results[index] = copies[memory, node]
    return _giving(gm, results)


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(graph.output_node()):
        copy = graph.call_function(aten.clone.default, (node,))
    copy.meta = {**node.meta, "val": node.meta["val"].clone()}
    return copy


def _giving(gm: fx.GraphModule, results: Sequence[Any]) -> fx.GraphModule:
    gm.graph.output_node().args = (tuple(results),)
    gm.graph.lint()
    gm.recompile()
    return gm


def with_own_results(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with a copy of each result whose memory an input, or a result before it, has too.

    Gradients are changed in place, each by itself: added to, clipped. Two biases whose outputs are added have one.
    """
    taken: dict[fx.Node, list[tuple[int, int]]] = {}
    own: list[Any] = []
    for node in results_of(gm.graph):
        if isinstance(node, fx.Node):
            base, begin, end = _extent(node)
            parts = taken.setdefault(base, [])
            if base.op == "placeholder" or any(begin < other_end and other < end for other, other_end in parts):
                node = _copy(gm.graph, node)
            else:
                parts.append((begin, end))
        own.append(node)
    return _giving(gm, own)


def _extent(node: fx.Node) -> tuple[fx.Node, int, int]:
    """The node whose buffer `node` names, and which of its bytes: from the first to behind the last."""
    views = []
    base = node
    while is_view(base):
        views.append(base)
        (base,) = base.all_input_nodes
    val = base.meta["val"]
    whole = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    part: Any = whole
    for view in reversed(views):
        part = view.target(*(part if arg is view.all_input_nodes[0] else arg for arg in view.args), **view.kwargs)  # type: ignore[operator]
    if part.untyped_storage()._cdata != whole.untyped_storage()._cdata:  # a reshape that copies
        return base, 0, whole.untyped_storage().nbytes()
    first = part.storage_offset()
    last = first + sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    return base, first * part.element_size(), (last + 1) * part.element_size()
