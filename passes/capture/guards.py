"""What a captured graph takes for granted about its inputs, and whether it holds for others.

A model may read a value while it is captured: `.item()`, a branch, the size of `nonzero`. The graph holds what the
example inputs gave. `Guards` compute these values again from other inputs, on one device and by the model's own ops:

    whole inputs (and buffers) -guards.graph-> results -compared-> the values that no longer hold
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.program.graphs import graph_module
from passes.program.program import Fixed, Guards, Input

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """A read as the tracer saw it: `target(*args)` on nodes of its graph, or a node's own result.

    A meta tensor among `args` stands for one whose values do not matter.
    """

    node: fx.Node | None
    target: Any
    args: Any
    kwargs: Any
    fixed: Fixed


def guards_of(
    root: torch.nn.Module,
    reads: Sequence[Read],
    inputs: Mapping[fx.Node, Input],
    changed: Collection[str],
    picks: Collection[fx.Node] = (),
) -> Guards | None:
    """The reads that follow from the user's inputs or from buffers; the step changes those named in `changed`. What
    `picks` give, every position of a mask, follows from its shape alone."""
    kept = []
    for read in reads:
        needed = _ancestors([read.node] if read.node is not None else _nodes((read.args, read.kwargs)), picks)
        given = [inputs[node] for node in needed if node in inputs]
        if given:
            kept.append((replace(read, fixed=_of_buffers(read.fixed, given, changed)), needed))
    if not kept:
        return None
    leaves = list({node: None for _, needed in kept for node in needed if node in inputs})
    of_user = [node for node in leaves if inputs[node].kind == "input"]
    of_model = [node for node in leaves if inputs[node].kind != "input"]
    return Guards(
        graph_module(root, _computing(kept, [*of_user, *of_model], picks)),
        inputs=tuple(inputs[node].path for node in of_user),
        buffers=tuple(inputs[node].name for node in of_model),
        fixed=tuple(read.fixed for read, _ in kept),
    )


def _of_buffers(fixed: Fixed, given: Sequence[Input], changed: Collection[str]) -> Fixed:
    """`fixed` with the buffers that it follows from, where it follows from these alone, and those the step writes."""
    buffers = tuple(entry.name for entry in given if entry.kind != "input")
    written = tuple(name for name in buffers if name in changed)
    return replace(fixed, buffers=buffers if len(buffers) == len(given) else (), written=written)


def _computing(
    reads: Sequence[tuple[Read, Sequence[fx.Node]]], leaves: Sequence[fx.Node], picks: Collection[fx.Node]
) -> fx.Graph:
    """A graph from `leaves` to what was read, each with the nodes that it follows from."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in leaves}
    results = []
    for read, needed in reads:
        for node in needed:
            if node in picks:
                shape = list(node.all_input_nodes[0].meta["val"].shape)
                every = graph.call_function(aten.ones.default, (shape,), {"dtype": torch.bool})
                copies[node] = graph.call_function(aten.nonzero.default, (every,))
            elif node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        if read.node is not None:
            results.append(copies[read.node])
        else:
            given = pytree.tree_map_only(Tensor, lambda meta: _zeros(graph, meta), (read.args, read.kwargs))
            args, kwargs = fx.map_arg(given, lambda node: copies.get(node, node))
            results.append(graph.call_function(read.target, args, kwargs))
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    return graph


def _zeros(graph: fx.Graph, meta: Tensor) -> fx.Node:
    return graph.call_function(aten.zeros.default, (list(meta.shape),), {"dtype": meta.dtype})


def _nodes(value: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]


def _ancestors(leaves: Sequence[fx.Node], picks: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes that `leaves` follow from, up to `picks`, and they themselves, in an order in which they can run."""
    order: dict[fx.Node, None] = {}
    stack = [(node, False) for node in leaves]
    while stack:
        node, ready = stack.pop()
        if ready:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.all_input_nodes if node not in picks)
    return list(order)


def shapes(value: Any) -> Any:
    """The shape of a tensor, or of each of several."""
    return pytree.tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, value)


def broken(guards: Guards, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> list[Fixed]:
    """What no longer holds for these inputs and buffers, whole ones by name."""
    values = (*(inputs[name] for name in guards.inputs), *(buffers[name] for name in guards.buffers))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = guards.graph(*values)
    return [fixed for fixed, value in zip(guards.fixed, found, strict=True) if not _holds(fixed, value)]


def _holds(fixed: Fixed, value: Any) -> bool:
    if fixed.is_shape:
        return bool(shapes(value) == fixed.value)
    if isinstance(value, Tensor):
        found, known = value.cpu(), fixed.value
        return found.shape == known.shape and bool(((found == known) | ((found != found) & (known != known))).all())
    return bool(value == fixed.value) or (value != value and fixed.value != fixed.value)
