"""The backward of some of a step's outputs: what follows from the other tangents alone is left out.

Autograd runs nothing for an output that no gradient arrives at. Zeros for its tangent would be as good but for
derivatives that are infinite (of a metric at 0, of a loss that overflows), which zero times is NaN. So a node that
follows from no other tangent is not run; where another reads what it gives, that reads zeros, and of a sum the other
term is left. Which node follows from which tangent is known of the program: in a rank's graph, what one collective
sends together seems to follow from all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import fx

from passes.lower.partition import extract, with_own_results
from passes.program.local import WAIT
from passes.program.program import Program
from passes.program.walks import following, made_of, results_of
from passes.rules.work import is_view

aten = torch.ops.aten


def of_arrived(
    program: Program, backward: fx.GraphModule, tangents: Mapping[str, str], arrived: Collection[str]
) -> fx.GraphModule:
    """`backward`, of a rank's part of `program`, for gradients of the outputs `arrived` alone.

    tangents: the placeholders of `backward` that are tangents, and the output of each. The result gives None in the
    place of gradients that follow from other tangents; its placeholders are those that it reads, in their order, and
    all tangents of `arrived`.
    """
    nowhere = _nowhere(program, arrived)
    kinds = zip(results_of(program.graph.graph), program.outputs, strict=True)
    of_program = [node for node, output in kinds if output.kind == "gradient"]
    gm = extract(backward, _placeholders(backward), results_of(backward.graph), frozenset(), {})
    there = {name: output in arrived for name, output in tangents.items()}
    lost = _lost(gm.graph, there, {node.name for node in nowhere})
    instead = _without(gm.graph, lost)
    results = [
        None if whole in nowhere or node in lost else instead.get(node, node)
        for whole, node in zip(of_program, results_of(gm.graph), strict=True)
    ]
    read = made_of(results, instead=instead)
    inputs = [node for node in _placeholders(gm) if node in read or there.get(node.name, False)]
    return with_own_results(extract(gm, inputs, results, frozenset(), instead))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _nowhere(program: Program, arrived: Collection[str]) -> AbstractSet[fx.Node]:
    """The nodes of a program that follow from tangents, but from none of `arrived`."""
    graph = program.graph.graph
    names = {node: given.name for node, given in program.placeholders.items() if given.kind == "tangent"}
    others = following(graph, (node for node, name in names.items() if name not in arrived))
    return others - following(graph, (node for node, name in names.items() if name in arrived))


def _lost(graph: fx.Graph, tangents: Mapping[str, bool], nowhere: AbstractSet[str]) -> AbstractSet[fx.Node]:
    """The same of a rank's backward; `tangents` says of each placeholder's name whether one arrived.

    A part of a node that is one of those (`nowhere` has their names) may come from what was sent with others.
    """
    found: set[fx.Node] = set()
    some: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        part_of = str(node.meta.get("part_of", ("",))[0])
        if node.op == "placeholder":
            if node.name in tangents:
                (some if tangents[node.name] else found).add(node)
        elif any(operand in some for operand in operands):
            received = node.target is WAIT or is_view(node)
            (found if received and part_of in nowhere else some).add(node)
        elif part_of in nowhere or any(operand in found for operand in operands):
            found.add(node)
    return found - {graph.output_node()}


def _without(graph: fx.Graph, lost: AbstractSet[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Has every other node read zeros for those of `lost`; of sums, the terms to read in their place."""
    instead: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        operands = [operand for operand in node.all_input_nodes if operand in lost]
        if not operands or node in lost or node.op != "call_function":
            continue
        if (term := _other_term(node, lost)) is not None:
            instead[node] = instead.get(term, term)
            continue
        for operand in operands:
            with graph.inserting_before(node):
                node.replace_input_with(operand, _zeros(graph, operand))
    return instead


def _other_term(node: fx.Node, lost: AbstractSet[fx.Node]) -> fx.Node | None:
    """Of a sum of two tensors, the one that is not lost, where it is as the sum is."""
    terms = node.args
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(term, fx.Node) for term in terms):
        return None
    (term, *others) = (each for each in terms if each not in lost)
    value, total = term.meta["val"], node.meta["val"]  # type: ignore[union-attr]
    alike = (value.shape, value.dtype, value.stride()) == (total.shape, total.dtype, total.stride())
    return term if alike and not others else None  # type: ignore[return-value]


def _zeros(graph: fx.Graph, like: fx.Node) -> fx.Node:
    value = like.meta["val"]
    steps = zip(value.shape, value.stride(), strict=True)
    entries = 1 + sum((size - 1) * step for size, step in steps) if value.numel() else 0
    shape = list(value.shape) if value.is_contiguous() else [entries]
    made = graph.call_function(aten.full.default, (shape, 0), {"dtype": value.dtype, "device": value.device})
    made.meta = {**like.meta, "val": value.new_zeros(shape)}
    if not value.is_contiguous():
        flat, made = made, graph.call_function(aten.as_strided.default, (made, list(value.shape), list(value.stride())))
        made.meta = {**like.meta, "val": flat.meta["val"].as_strided(value.shape, value.stride())}
    return made
