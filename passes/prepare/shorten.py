"""A program with the middle of its repeated layers left out: planning looks at a few layers, however deep the model is.

    layers      0 1 2 3 4 5 ... 60 61 62 63
    kept        0 1 2 3 4             62 63        layer 3 stands for itself and for 5 ... 61, say

Layers are left out only where they are copies of their neighbours: the same calls, with results of the same shapes (a
stack of convolutions shortens what it reads), on the same positions of the layer itself, the layer before (forward) or
behind (backward), or on one value that all share. A run of such layers keeps three copies: what comes before settles,
the one in the middle *stands for* those left out, and the one behind reads it. `Repeated` says which and how many, and
everything that counts, adds up or plays the step goes by it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from passes.analysis.layers import layer_pattern
from passes.program.program import Program, Repeated
from passes.program.uniform import UNIFORM
from passes.program.walks import results_of
from passes.rules.call import facts_of

_LONGEST_UNIT = 8
"""Layers that repeat together (five with a window and one without): more are not looked for."""

Phase = str
Position = tuple[Phase, int, int]
"""(phase, layer, number among the layer's nodes of the phase); placeholders are a phase of their own."""


def shorten(program: Program) -> Program:
    """`program` with as few layers as tell its costs; itself, where too few repeat for that to pay."""
    for pattern, count in layer_pattern(program).layers.items():
        stack = pattern.removesuffix(".*")
        if "*" not in stack and count > 5:
            program = _shortened(program, stack)
    return program


_PLAIN = frozenset({int, float, str, bool, type(None)})


@dataclass(frozen=True)
class _Stack:
    """The nodes of one stack's layers; `of[node]` is a node's place."""

    of: Mapping[fx.Node, Position]
    nodes: Mapping[tuple[Phase, int], Sequence[fx.Node]]
    inputs: Mapping[fx.Node, Any]
    """Placeholder -> what it is, but for its layer's number."""
    stored: Mapping[fx.Node, tuple[Position, ...]]
    """Node -> the parameters whose gradient it is."""
    layers: int
    makers: AbstractSet[int]
    """Layers that make what layers far behind them read too (rotary positions): that is no node of theirs."""
    inside: Mapping[str, str]
    """Module -> its path inside its layer."""


def _shortened(program: Program, name: str) -> Program:
    stack = _stack(program, name)
    if stack is None:
        return program
    for unit in range(1, _LONGEST_UNIT + 1):
        start, end = _longest_run(stack, unit)
        more = (end - start) // unit - 3
        if more > 0:
            made = _without(program, stack, Repeated(name, start + unit, unit, more))
            return made if made is not None else program
    return program


def _stack(program: Program, name: str) -> _Stack | None:
    """None where layers are not numbered from 0 on."""
    numbers: dict[str, int] = {}
    inside: dict[str, str] = {}

    def layer(module: str) -> int:
        if module not in numbers:
            number, _, inside[module] = module.removeprefix(f"{name}.").partition(".")
            numbers[module] = int(number) if module.startswith(f"{name}.") and number.isdigit() else -1
        return numbers[module]

    of: dict[fx.Node, Position] = {}
    nodes: dict[tuple[Phase, int], list[fx.Node]] = defaultdict(list)
    inputs: dict[fx.Node, Any] = {}
    by_name: dict[str, Position] = {}
    makers: set[int] = set()
    given = iter(program.inputs)
    for node in program.graph.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            one, phase = next(given), "given"
            number = layer(one.name)
            inputs[node] = replace(one, name=one.name.removeprefix(f"{name}.{number}.")), facts_of(node.meta.get("val"))
        else:
            number, phase = layer(node.meta.get("module", "")), node.meta.get("phase", "forward")
            far = len(node.users) > 2 and number >= 0
            if far and any(layer(x.meta.get("module", "")) - number > _LONGEST_UNIT for x in node.users):
                makers.add(number)
                number = -1
        if number >= 0:
            members = nodes[phase, number]
            of[node] = (phase, number, len(members))
            members.append(node)
            if node.op == "placeholder":
                by_name[one.name] = of[node]
    found = {number for _, number in nodes}
    layers = len(found)
    if found != set(range(layers)):
        return None
    stored: dict[fx.Node, list[Position]] = defaultdict(list)
    for out, node in zip(program.outputs, results_of(program.graph.graph), strict=True):
        if out.kind == "gradient" and out.name in by_name and isinstance(node, fx.Node):
            stored[node].append(by_name[out.name])
    return _Stack(of, nodes, inputs, {node: tuple(places) for node, places in stored.items()}, layers, makers, inside)


def _longest_run(stack: _Stack, unit: int) -> tuple[int, int]:
    """The longest run of layers in which every layer is like the one `unit` before it: first, and one past the last."""
    told = [_signature(stack, layer, unit) for layer in range(stack.layers)]
    best, start = (0, 0), 0
    for layer in range(1, stack.layers + 1):
        if layer == stack.layers or (layer - unit >= start and told[layer] != told[layer - unit]):
            best = max(best, (start, layer), key=lambda run: run[1] - run[0])
            start = max(start, layer - unit + 1) if layer < stack.layers else layer
    return best


def _signature(stack: _Stack, layer: int, unit: int) -> tuple[object, ...]:
    """Equal for layers that do the same with what lies alike around them, up to `unit` layers away."""
    near = range(layer - unit, layer + unit + 1)

    def from_here(place: Position) -> Position:
        return place[0], place[1] - layer, place[2]

    def told(value: Any) -> object:
        kind = type(value)
        if kind is fx.Node:
            place = stack.of.get(value)
            return value if place is None or place[1] not in near else from_here(place)
        if kind in _PLAIN:
            return value
        if isinstance(value, list | tuple):
            return tuple(map(told, value))
        return told((value.start, value.stop, value.step)) if isinstance(value, slice) else str(value)

    def signature(node: fx.Node) -> tuple[object, ...]:
        if node.op == "placeholder":
            return (stack.inputs[node],)
        args, kwargs = node.args, node.kwargs
        if node.target is UNIFORM:  # its number is its name
            args, kwargs = args[:1] + args[2:], {key: value for key, value in kwargs.items() if key != "salt"}
        stored = tuple(map(from_here, stack.stored.get(node, ())))
        place = node.op, node.target, stack.inside[node.meta["module"]]
        return *place, told(args), told((*kwargs.items(),)), facts_of(node.meta.get("val")), stored

    nodes = (
        (phase, node) for phase in ("given", "forward", "backward") for node in stack.nodes.get((phase, layer), ())
    )
    return (layer in stack.makers, *((phase, signature(node)) for phase, node in nodes))


def _without(program: Program, stack: _Stack, repeated: Repeated) -> Program | None:
    """`program` without the layers that `repeated` stands for; None where something else reads them."""
    first = repeated.first + repeated.length
    cut = repeated.length * repeated.more
    gone = range(first, first + cut)

    left_out = {node for (_, layer), nodes in stack.nodes.items() if layer in gone for node in nodes}

    def stand_in(node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """What the reader has from now on in the place of a node that is left out."""
        if reader not in stack.of:
            return None
        phase, layer, number = stack.of[node]
        layer += cut if stack.of[reader][1] < first else -cut
        return None if layer in gone or layer < 0 else stack.nodes[phase, layer][number]

    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    kept = [i for i, node in enumerate(program.graph.graph.find_nodes(op="placeholder")) if node not in left_out]
    results = results_of(program.graph.graph)
    leaving = [i for i, node in enumerate(results) if not (isinstance(node, fx.Node) and node in left_out)]
    names = {program.inputs[i].name for i in kept}
    for i in set(range(len(results))) - set(leaving):
        if program.outputs[i].kind != "gradient" or program.outputs[i].name in names:
            return None
    for node in program.graph.graph.nodes:
        if node in left_out:
            continue
        if node.op == "output":
            made = graph.output(tuple(new[results[i]] if results[i] is not None else None for i in leaving))
            made.meta = copy.copy(node.meta)
            continue
        swapped: dict[fx.Node, fx.Node] = {}
        for operand in node.all_input_nodes:
            if operand in left_out:
                other = stand_in(operand, node)
                if other is None or other not in new:
                    return None
                swapped[operand] = other
        new[node] = graph.node_copy(node, partial(_stand_in_for, new, swapped))
    return replace(
        program,
        graph=fx.GraphModule(program.graph, graph),
        inputs=tuple(program.inputs[i] for i in kept),
        outputs=tuple(program.outputs[i] for i in leaving),
        repeated=(*program.repeated, repeated),
    )


def _stand_in_for(new: Mapping[fx.Node, fx.Node], swapped: Mapping[fx.Node, fx.Node], old: fx.Node) -> fx.Node:
    return new[swapped.get(old, old)]


def all_names(name: str, repeated: Sequence[Repeated]) -> Iterator[str]:
    """A parameter's name, and those of the parameters it stands for."""
    for each in repeated:
        number = each.layer(name)
        if number in each.unit:
            rest = name.removeprefix(f"{each.stack}.{number}")
            yield from (f"{each.stack}.{number + i * each.length}{rest}" for i in range(each.more + 1))
            return
    yield name
