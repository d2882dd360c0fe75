"""A program at another batch, told by a shallower one that was captured at both.

    shallow   at one batch   --  the same ops, other sizes  ->   at another
    deep      at the first   --  op by op as its twin's     ->   at the other

A model with more of its layers does what one with fewer does, more often (as `autopar/runs/shallow.py` takes for
granted). So each node of the deep program has a *twin* in the shallow one: the same call, at the same place of a layer,
on tensors of the same sizes. What the twin is at the other batch, the node is there too, where that is certain:

- the shallow program is the same at both batches but for sizes and numbers: no branch of it hangs on the batch;
- all twins of a node are alike at the other batch too;
- each node that was made is, with the operands it then has, a call that the shallow program makes at the other batch.

By the last every size follows: the same op on tensors of the same sizes gives the same. Anything else is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, fx

from passes.analysis.layers import layer_pattern
from passes.capture.normalize import content_of, settled_in_order
from passes.program.graphs import graph_module
from passes.program.program import Input, Program
from passes.program.uniform import UNIFORM

_META = {"val", "phase", "module", "source"}
"""What a node of a program tells about itself: of these only `val` is another at another batch."""
_OF_SIZES = {"graph", "fingerprint"}
"""Parts of a program that are others at another batch."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Told:
    """A program, and per node what it computes: equal for twins, whichever layers and programs they are of."""

    program: Program
    keys: Mapping[fx.Node, Key]


def told(program: Program) -> Told:
    """`program` with what its nodes compute."""
    key_of = _key_of(program)
    return Told(program, {node: key_of(node) for node in program.graph.graph.nodes})


def rebatched(deep: Told, shallow: Told, other: Told) -> Program | None:
    """`deep` at the batch of `other`, which is `shallow` at another batch; None where it is not certain how it is.

    All three as `capture` gave them; so is what is made, down to the order of its nodes.
    """
    twins = _twins(shallow, other) if _is_of(deep.program, shallow.program, other.program) else None
    if twins is None:
        return None
    key_of = _key_of(deep.program)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node, key in deep.keys.items():
        twin, wanted = (node, None) if node.op == "output" else twins.get(key, (None, None))
        if twin is None or not node.meta.keys() <= _META:
            return None
        made = new[node] = _made(graph, node, twin, [new[operand] for operand in _operands(node)])
        if key_of(made) != wanted and node.op != "output":
            return None
    return settled_in_order(replace(deep.program, graph=graph_module(deep.program.graph, graph, class_name="Step")))


def copy_of(program: Program) -> Program:
    """The same program on a graph of its own."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.graph.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    return replace(program, graph=graph_module(program.graph, graph, class_name="Step"))


def _is_of(deep: Program, shallow: Program, other: Program) -> bool:
    """Whether `other` differs from `shallow` in sizes alone, and `deep` from `shallow` in how many layers there are."""
    if shallow.guards is not None or deep.guards is not None or deep.repeated:
        return False
    told_ = (each.name for each in fields(Program) if each.name not in _OF_SIZES)
    if any(getattr(shallow, name) != getattr(other, name) for name in told_):
        return False
    results = [[out for out in program.outputs if out.kind == "output"] for program in (deep, shallow)]
    return results[0] == results[1]


def _twins(shallow: Told, other: Told) -> Mapping[Key, tuple[fx.Node, Key]] | None:
    """What a node computes -> its twin at the other batch, and what that computes; None where the two programs differ
    in more than sizes, or twins come to differ."""
    pairs = _pairs(shallow.program.graph.graph, other.program.graph.graph)
    found: dict[Key, tuple[fx.Node, Key]] = {}
    for one, two in (pairs or {}).items():
        if not {*one.meta, *two.meta} <= _META:
            return None
        if found.setdefault(shallow.keys[one], (two, other.keys[two]))[1] != other.keys[two]:
            return None
    return found if pairs else None


def _pairs(here: fx.Graph, there: fx.Graph) -> dict[fx.Node, fx.Node] | None:
    """Nodes of one graph -> those of the other that do the same, from the results back to the inputs, as what follows
    from inputs alone may stand in another order; None where the graphs do not do the same."""
    placeholders = [graph.find_nodes(op="placeholder") for graph in (here, there)]
    pairs = dict(zip(*placeholders, strict=True))
    stack = [(here.output_node(), there.output_node())]
    while stack:
        one, two = stack.pop()
        if one in pairs:
            if pairs[one] is not two:
                return None
            continue
        pairs[one] = two
        operands = _operands(one), _operands(two)
        if _place(one) != _place(two) or len(operands[0]) != len(operands[1]):
            return None
        stack += zip(*operands, strict=True)
    same = len(here.nodes) == len(there.nodes) == len(pairs) == len(set(pairs.values()))
    return pairs if same else None


def _place(node: fx.Node) -> Key:
    target = node.target if node.op == "call_function" else ""
    return node.op, target, *(node.meta.get(name) for name in ("phase", "module", "source"))


def _made(graph: fx.Graph, node: fx.Node, twin: fx.Node, operands: list[fx.Node]) -> fx.Node:
    """`node` with the sizes of its twin and with `operands`."""
    given = iter(operands)

    def taken(_: fx.Node) -> fx.Node:
        return next(given)

    args, kwargs = fx.node.map_arg(twin.args, taken), fx.node.map_arg(twin.kwargs, taken)
    if node.target is UNIFORM:
        args = (args[0], node.args[1], *args[2:])  # the number of a random op is its own
    made = graph.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
    made.meta = {**node.meta, "val": twin.meta["val"]} if "val" in twin.meta else dict(node.meta)
    return made


def _operands(node: fx.Node) -> list[fx.Node]:
    """Nodes among the arguments, as often and in the order in which they stand there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


# -- what a node computes ----------------------------------------------------------------------------------------------


def _key_of(program: Program) -> Callable[[fx.Node], Key]:
    """What a node of the program, or of one with the same inputs, computes; asked in the order of its graph."""
    pattern = layer_pattern(program)
    inputs = iter(program.inputs)
    facts: dict[fx.Node, object] = {}

    def key_of(node: fx.Node) -> Key:
        if node.op == "placeholder":
            given: Input = next(inputs)
            what: Key = (replace(given, name=pattern(given.name)),)
        elif node.op == "get_attr":
            what = (content_of(program.graph.get_buffer(str(node.target))),)
        elif node.op == "output":
            what = ()
        else:
            what = (node.target, *_arguments(node, facts))
        facts[node] = _facts(node.meta.get("val"))
        module = pattern(node.meta.get("module", ""))
        return node.op, node.meta.get("phase"), module, node.meta.get("source"), facts[node], what

    return key_of


def _arguments(node: fx.Node, facts: Mapping[fx.Node, object]) -> Iterator[object]:
    def plain(value: Any) -> object:
        kind = type(value)
        if kind is fx.Node:
            return facts[value]
        if isinstance(value, list | tuple):
            return tuple([plain(item) for item in value])
        if isinstance(value, slice):
            return plain((value.start, value.stop, value.step))
        # 1, 1.0 and True are equal, and so are 0.0 and -0.0
        return (kind, value if kind is int else str(value))

    for index, value in enumerate(node.args):
        if index != 1 or node.target is not UNIFORM:
            yield plain(value)
    for name, value in node.kwargs.items():
        yield name, plain(value)


def _facts(val: Any) -> object:
    if isinstance(val, Tensor):
        return tuple(val.shape), val.stride(), val.dtype, val.layout, val.device
    if isinstance(val, list | tuple):
        return tuple([_facts(item) for item in val])
    return type(val), str(val)
