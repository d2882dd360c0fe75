"""Splits one rank's step into a forward and a backward graph, and chooses what the backward keeps of the forward.

What depends on a tangent, and what was traced as backward and no output needs, is backward. Of the forward values that
the backward reads, some are *saved* (forward outputs that the backward takes) and the rest computed again from those.
The choice is a minimum cut: of all sets from which the backward can be computed, one with the fewest bytes, and among
equals the one that computes least again.

Never saved: gathered parameters and whatever is made of parameters alone (gathered and cast again in the backward),
and views (their base is). Never computed again: collectives of anything else, and ops that `recompute` does not allow.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from passes.cut import UNBOUNDED, Values, cheapest_cut
from passes.local import COLLECTIVES, WAIT, LocalProgram
from passes.recompute import ATTENTION, block_of, is_cheap_op, is_view_op

Recompute = Literal["none", "auto", "selective", "full"]

aten = torch.ops.aten


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
        forward = _extract(local.graph, inputs, outputs, frozenset())
        return Halves(forward, None, len(outputs), ())

    wanted = _needed(gradients, stop=lambda node: node not in backward)
    demands = [node for node in wanted if node not in backward]
    of_parameters = parameter_chain(graph, constants)
    allowed = _recomputable(graph, backward, of_parameters, recompute)
    kept = _cheapest_cut(demands, allowed, of_parameters)
    saved_inputs = [p for p in inputs if p in kept]
    saved = [node for node in graph.nodes if node in kept and node.op != "placeholder"]
    return Halves(
        _extract(local.graph, inputs, [*outputs, *saved], frozenset()),
        _extract(local.graph, [*saved_inputs, *saved, *tangents], gradients, backward),
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


def _needed(roots: Iterable[Any], stop: Callable[[fx.Node], bool]) -> dict[fx.Node, None]:
    """`roots` and what they are made of, going no further than nodes where `stop`."""
    found: dict[fx.Node, None] = {}
    stack = [root for root in roots if isinstance(root, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            if not stop(node):
                stack.extend(node.all_input_nodes)
    return found


def parameter_chain(graph: fx.Graph, constants: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """Nodes made of parameters, buffers and coordinates by casts, views, pointwise ops and gathers alone."""
    chain = set(constants)
    for node in graph.nodes:
        allowed = node.op == "call_function" and (
            is_cheap_op(node.target) or node.target in COLLECTIVES or node.target is WAIT
        )
        if allowed and node.all_input_nodes and all(operand in chain for operand in node.all_input_nodes):
            chain.add(node)
    return frozenset(chain)


def is_view(node: fx.Node) -> bool:
    """Whether a node names its operand's buffer anew."""
    return is_view_op(node.target)


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
        elif recompute == "full" and (block := block_of(node)):
            if all(block_of(user) == block for user in node.users if user not in backward and user.op != "output"):
                allowed.add(node)
        elif recompute != "none" and (
            is_cheap_op(node.target) or (recompute == "selective" and node.target in ATTENTION)
        ):
            allowed.add(node)
    return frozenset(allowed)


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
    demands: Sequence[fx.Node], recomputable: frozenset[fx.Node], of_parameters: frozenset[fx.Node]
) -> frozenset[fx.Node]:
    """The nodes whose values to keep so that every one of `demands` can be had, at the fewest bytes."""
    members = list(_needed(demands, stop=lambda node: node not in recomputable))
    number = {node: index for index, node in enumerate(members)}
    sources = [[number[x] for x in node.all_input_nodes] if node in recomputable else None for node in members]
    values = Values([_save_bytes(node, of_parameters) for node in members], sources)
    return frozenset(members[index] for index in cheapest_cut(values, [number[node] for node in demands]))


def _extract(
    owner: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[Any], first: frozenset[fx.Node]
) -> fx.GraphModule:
    """The graph that makes `outputs` of `inputs`.

    Nodes of `first` keep their order; any other is put right before the first that reads it.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copy = graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        copies[node] = copy
    needed = _needed(outputs, stop=lambda node: node in copies)
    order = {node: position for position, node in enumerate(owner.graph.nodes)}
    roots = sorted((node for node in needed if node in first or not first), key=order.__getitem__)
    for root in [*roots, *(node for node in outputs if isinstance(node, fx.Node))]:
        stack = [root]
        while stack:
            node = stack[-1]
            missing = sorted((o for o in node.all_input_nodes if o not in copies), key=order.__getitem__, reverse=True)
            if node in copies:
                stack.pop()
            elif missing:
                stack.extend(missing)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if first:
                    copies[node].meta["phase"] = "backward"
                stack.pop()
    graph.output(tuple(copies[node] if isinstance(node, fx.Node) else node for node in outputs))
    graph.lint()
    return fx.GraphModule(owner, graph)
