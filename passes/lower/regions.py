"""Cuts a forward or backward graph into regions, so that layers that repeat are compiled once.

    graph -cut-> what gathers parameters | regions, a layer each and what lies between | what reduces gradients
    regions -bodies-> distinct graphs, and for each region the graph it runs and what it reads and gives

Regions are cut at the instances of repeated modules (`layers.3`). Two regions run one body where their ops, arguments,
shapes, strides and wiring are the same; integers that differ between such regions, as the numbers of random ops do,
become inputs of the body. Views, and constants that ops make, cross no border: each region has its own copy.

Collectives that bring stored parameters or take gradients away stay outside, so that `overlap` can issue them early and
wait for them late; so do the few local ops before, between and behind them. An op whose result has a shape that follows
from values (CTC's loss) is a region of its own: a compiler would not know the shape, which capture read.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes.lower.partition import parameter_chain
from passes.program.graphs import graph_module
from passes.program.local import COLLECTIVES, WAIT
from passes.rules.work import is_view_op


@dataclass(frozen=True)
class Region:
    """Nodes that run together, in order; `gives` are those that others read."""

    nodes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Cut:
    """A graph's nodes by where they run, each part in an order that works.

    fetches: what gathers parameters, up to the wait for it. drains: what reduces gradients, from the collective on, and
    views of inputs that the graph gives.
    """

    fetches: tuple[fx.Node, ...]
    regions: tuple[Region, ...]
    drains: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Call:
    """A region as a call of its body; `scalars` are the integers for the body's last inputs."""

    body: fx.GraphModule
    reads: tuple[fx.Node, ...]
    scalars: tuple[int, ...]
    gives: tuple[fx.Node, ...]


# --- cutting ----------------------------------------------------------------------------------------------------------


def cut(gm: fx.GraphModule, constants: Iterable[fx.Node], layer_of: Callable[[str], str], backward: bool) -> Cut:
    """A forward or backward graph cut into what gathers parameters, regions, and what reduces gradients.

    constants: placeholders that are parameters, buffers or coordinates. layer_of: a module's name -> the repeated layer
    it is in, "" outside of layers.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    fetches = _fetches(nodes, parameter_chain(gm.graph, constants))
    here = parameter_chain(gm.graph, constants, gathered=False)
    drains = _drains(nodes, here) - fetches if backward else frozenset()
    outside = fetches | drains
    runs = _runs([node for node in nodes if node not in outside and not _is_free(node)], fetches, layer_of)
    results = gm.graph.output_node().all_input_nodes
    leaving = {node for node in (*results, *(x for n in drains for x in n.all_input_nodes)) if node not in outside}
    regions = _regions(runs, outside, leaving)
    given = {node for region in regions for node in region.gives}
    strays = _needed_first([node for node in leaving if node.op == "call_function" and node not in given], given)
    return Cut(
        tuple(node for node in nodes if node in fetches),
        regions,
        tuple(node for node in nodes if node in drains or node in strays),
    )


def is_shaped_by_values(node: fx.Node) -> bool:
    """Whether the shape of an op's result follows from values: fake tensors have none, so nothing can compile it."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape not in node.target.tags:
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices: Any = node.args[1]
    return any(index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)


def _is_free(node: fx.Node) -> bool:
    """Whether each region has a copy of its own: a view, or a constant that an op makes."""
    if node.target is operator.getitem:
        return _is_free(node.all_input_nodes[0])
    return node.op == "call_function" and (is_view_op(node.target) or not node.all_input_nodes)


def _is_received(node: fx.Node) -> bool:
    return node.target is WAIT or (node.target is operator.getitem and node.all_input_nodes[0].target in COLLECTIVES)


def _fetches(nodes: Sequence[fx.Node], chain: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Collectives of parameters, the waits for them, and what leads from the parameters there."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node in chain and (node.target in COLLECTIVES or (_is_received(node) and node.all_input_nodes[0] in found)):
            found.add(node)
    stack = [node for node in found if node.target in COLLECTIVES]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found and operand.op == "call_function":
                found.add(operand)
                stack.append(operand)
    return frozenset(found)


def _drains(nodes: Sequence[fx.Node], constants: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Collectives whose results only leave the graph, and what is made of these results and `constants` alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        made_of = [operand for operand in node.all_input_nodes if operand not in constants]
        if node.target in COLLECTIVES or (made_of and all(operand in found for operand in made_of)):
            found.add(node)
    stack = [node for node in found if any(user.op != "output" and user not in found for user in node.users)]
    while stack:
        node = stack.pop()
        if node in found:
            found.discard(node)
            stack.extend(operand for operand in node.all_input_nodes if operand in found)
            stack.extend(user for user in node.users if user in found and user.target not in COLLECTIVES)
    return frozenset(found)


@dataclass(eq=False)
class _Run:
    """Nodes of one layer ("" between layers), and how many runs stand before theirs."""

    layer: str
    number: int
    nodes: list[fx.Node] = field(default_factory=list)


def _runs(nodes: Sequence[fx.Node], fetches: frozenset[fx.Node], layer_of: Callable[[str], str]) -> list[list[fx.Node]]:
    """`nodes` as runs of one layer each, in an order in which each reads only what comes before it."""
    runs: list[_Run] = []
    run_of: dict[fx.Node, _Run] = {}
    for node in nodes:
        after = _last_read(node, run_of, fetches, {})
        run = _run_for(_layer(node, after, layer_of), after, runs, run_of)
        run.nodes.append(node)
        run_of[node] = run
    return [run.nodes for run in runs]


def _last_read(
    node: fx.Node, run_of: Mapping[fx.Node, _Run], fetches: frozenset[fx.Node], known: dict[fx.Node, _Run | None]
) -> _Run | None:
    """The last run that a node's operands are in, through views; None where they are in none."""
    found: _Run | None = None
    for operand in node.all_input_nodes:
        if operand in run_of:
            run: _Run | None = run_of[operand]
        elif operand.op == "call_function" and operand not in fetches:
            if operand not in known:
                known[operand] = _last_read(operand, run_of, fetches, known)
            run = known[operand]
        else:
            continue
        if run is not None and (found is None or run.number > found.number):
            found = run
    return found


def _layer(node: fx.Node, after: _Run | None, layer_of: Callable[[str], str]) -> str:
    """The layer that a node runs with: the one it is in, unless others read it too and it reads nothing of that."""
    made = node.all_input_nodes[0] if node.target is operator.getitem else node
    if is_shaped_by_values(made):
        return f"{made.name} alone"
    layer = layer_of(str(node.meta.get("module", "")))
    within = after is not None and after.layer == layer
    return "" if layer and not within and _is_shared(node, layer, layer_of) else layer


def _run_for(layer: str, after: _Run | None, runs: list[_Run], run_of: dict[fx.Node, _Run]) -> _Run:
    """The run for a node of `layer` that reads what the run `after` gives: the layer's last one, or a new one."""
    first = 0 if after is None else after.number
    last = next((run for run in reversed(runs) if run.layer == layer), None)
    if last is None or (layer == "" and last.number < max(first, len(runs) - 2)):
        return _begun(layer, runs)
    between = runs[last.number + 1 :]
    if first <= last.number:
        return last
    if any(run.layer for run in between):
        return _begun(layer, runs)
    for run in between:  # what lies between belongs to the layer
        last.nodes.extend(run.nodes)
        run_of.update(dict.fromkeys(run.nodes, last))
    del runs[last.number + 1 :]
    return last


def _begun(layer: str, runs: list[_Run]) -> _Run:
    runs.append(_Run(layer, len(runs)))
    return runs[-1]


def _is_shared(node: fx.Node, layer: str, layer_of: Callable[[str], str]) -> bool:
    """Whether other layers read a node too, through views."""
    return any(
        layer_of(str(user.meta.get("module", ""))) != layer or (_is_free(user) and _is_shared(user, layer, layer_of))
        for user in node.users
        if user.op == "call_function"
    )


def _regions(
    runs: Iterable[Sequence[fx.Node]], outside: frozenset[fx.Node], leaving: set[fx.Node]
) -> tuple[Region, ...]:
    """Each run with its own copies of views and constants, and what of it other runs read or leaves the graph."""
    parts = [_with_copies(run, outside, leaving) for run in runs]
    asked = set(leaving)
    for part, _ in parts:
        members = set(part)
        asked |= {operand for node in part for operand in node.all_input_nodes if operand not in members}
    return tuple(Region(tuple(part), tuple(n for n in part if n in own and n in asked)) for part, own in parts)


def _with_copies(
    run: Sequence[fx.Node], outside: frozenset[fx.Node], leaving: set[fx.Node]
) -> tuple[list[fx.Node], set[fx.Node]]:
    """`run` with the views and constants it reads before their first readers, and views of it that leave the graph; and
    which nodes are the run's own."""
    found: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in found and _is_free(operand) and operand not in outside:
                add(operand)
        found[node] = None

    for node in run:
        add(node)
    own = set(run)
    queue = list(run)
    for node in queue:
        for user in node.users:
            if user not in own and user not in outside and _is_free(user):
                own.add(user)
                queue.append(user)
    for node in queue:
        if node in leaving and node not in found:
            add(node)
    return list(found), own


def _needed_first(nodes: Iterable[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    """`nodes` and the calls they are made of, as far as these are not `known`."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in found and node not in known:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


# --- bodies -----------------------------------------------------------------------------------------------------------


def calls(gm: fx.GraphModule, regions: Sequence[Region]) -> list[Call]:
    """For each region its call; regions of one structure share a body."""
    alike: dict[Any, list[_Outline]] = defaultdict(list)
    made = [_Outline(region) for region in regions]
    for outline in made:
        alike[outline.key()].append(outline)
    found: dict[int, Call] = {}
    for group in alike.values():
        differ = [i for i in range(len(group[0].scalars)) if len({outline.scalars[i][2] for outline in group}) > 1]
        body = _body(gm, group[0], {group[0].scalars[i][:2] for i in differ})
        for outline in group:
            scalars = tuple(outline.scalars[i][2] for i in differ)
            found[id(outline)] = Call(body, tuple(outline.reads), scalars, outline.region.gives)
    return [found[id(outline)] for outline in made]


class _Outline:
    """One region, numbered: inputs in the order in which they are read."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.reads: list[fx.Node] = []
        members = set(region.nodes)
        seen: set[fx.Node] = set()
        for node in region.nodes:
            for operand in node.all_input_nodes:
                if operand not in members and operand not in seen:
                    seen.add(operand)
                    self.reads.append(operand)
        self.scalars: list[tuple[int, int, int]] = []
        """Integers that may be lifted: position of the node, of the argument, and the value."""

    def key(self) -> Any:
        """What regions of one body agree in; integers that may be lifted are left out."""
        number = {node: index for index, node in enumerate([*self.reads, *self.region.nodes])}

        def text(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return ("node", number[value])
            if isinstance(value, list | tuple):
                return (type(value).__name__, *map(text, value))
            if isinstance(value, slice):
                return ("slice", text(value.start), text(value.stop), text(value.step))
            return (type(value).__name__, repr(value))

        lines: list[Any] = [_facts(node) for node in self.reads]
        for position, node in enumerate(self.region.nodes):
            args = [text(argument) for argument in node.args]
            for argument, value in enumerate(node.args):
                if _liftable(node, argument):
                    self.scalars.append((position, argument, value))  # type: ignore[arg-type]
                    args[argument] = "integer"
            kwargs = tuple((name, text(value)) for name, value in sorted(node.kwargs.items()))
            lines.append((str(node.target), tuple(args), kwargs, _facts(node)))
        return tuple(lines), tuple(number[node] for node in self.region.gives)


def _facts(node: fx.Node) -> Any:
    """What compiled code relies on of a node's value."""

    def facts(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
        if isinstance(value, list | tuple):
            return tuple(map(facts, value))
        return repr(value)

    return facts(node.meta.get("val"))


def _tensor_overload(target: Any) -> Any:
    """The overload of a binary op on integers that takes both as tensors, or None."""
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return None
    if target._overloadname not in ("Scalar", "Tensor_Scalar", "Tensor"):
        return None
    overload = getattr(target.overloadpacket, "Tensor", None)
    arguments = () if overload is None else overload._schema.arguments
    return overload if len(arguments) >= 2 and all(str(a.type) == "Tensor" for a in arguments[:2]) else None


def _liftable(node: fx.Node, argument: int) -> bool:
    value = node.args[argument]
    if argument != 1 or type(value) is not int or node.kwargs or len(node.args) != 2:
        return False
    result = node.meta.get("val")
    whole = isinstance(result, torch.Tensor) and result.dtype == torch.int64
    return whole and _tensor_overload(node.target) is not None


def _body(owner: fx.GraphModule, outline: _Outline, lifted: set[tuple[int, int]]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in outline.reads:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    scalars: dict[tuple[int, int], fx.Node] = {}
    for position, argument in sorted(lifted):
        scalars[position, argument] = graph.placeholder(f"integer_{len(scalars)}")
        like = outline.region.nodes[position].meta["val"]
        scalars[position, argument].meta = {"val": like.new_empty(())}
    for position, node in enumerate(outline.region.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        for place, scalar in scalars.items():
            if place[0] == position:
                copies[node].target = _tensor_overload(node.target)
                copies[node].update_arg(place[1], scalar)
    graph.output(tuple(copies[node] for node in outline.region.gives))
    graph.lint()
    return graph_module(owner, graph)
