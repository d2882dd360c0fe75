"""The outer program: regions and collectives called one after the other, values dropped at their last use.

It is Python without a loop, written once:

    def outer(values):
        v0, v1, v2 = values
        values.clear()
        v3 = f0(v0, 2, 'default')          # a node of the graph, its operands and constants as they are
        v4 = f1(v3)
        given = [v1, v4]; del v1           # a region takes a list, which is the last to hold what is not read again,
        v5, v6 = f2(given)                 # so that compiled code can free it while it runs
        ...
        return v5, None, v9
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.lower.workarounds.shared_parts import is_shared

aten = torch.ops.aten
_REDUCE = torch.ops._c10d_functional.all_reduce.default
_MADE_NEW = (aten.mm.default, aten.embedding_dense_backward.default)
"""Ops whose result is no part of anything else, however it is compiled."""
Boxed = Callable[[list[Any]], Any]
"""Takes its values as one list, which it may empty."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A step of the outer program: a region, which takes one list and gives a tuple, or a node on its own.

    arguments: what a region's list holds, or the positional arguments of a node's op; nodes in it are read.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    writes: tuple[fx.Node, ...]
    is_region: bool

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes among the arguments."""
        found: dict[fx.Node, None] = {}
        fx.map_arg((self.arguments, dict(self.keywords)), lambda node: found.setdefault(node))
        return tuple(found)


def region_step(call: Boxed, given: Sequence[Any], gives: Sequence[fx.Node]) -> Planned:
    """A region's call; what is `given` are nodes and tensors."""
    return Planned(call, tuple(given), {}, tuple(gives), True)


def op_step(node: fx.Node) -> Planned:
    """A node of a graph as a step of its own."""
    target: Any = node.target
    operand: Any = node.args[0]
    if target is _REDUCE and _is_made_new(operand) and len(operand.users) == 1:
        target = torch.ops._c10d_functional.all_reduce_.default  # what was made for it alone is its own to write to
    return Planned(target, tuple(node.args), node.kwargs, (node,), False)


def _is_made_new(node: fx.Node) -> bool:
    """Whether what a node gives is no part of anything else, however it is compiled: Inductor has the parts of a `cat`
    made where they are joined."""
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return not any(is_shared(part) for part in parts)
    return node.target in _MADE_NEW


def assembled(
    inputs: Sequence[fx.Node], planned: Iterable[Planned], results: Sequence[Any], constants: Mapping[fx.Node, Any]
) -> Boxed:
    """What runs `planned` from a list of `inputs`, which it empties, to `results`; `constants` are there already."""
    steps = list(planned)
    text = _Text(constants)
    reads = [step.reads for step in steps]
    last = {node: index for index, step in enumerate(steps) for node in (*step.writes, *reads[index])}
    kept = {node for node in results if isinstance(node, fx.Node)} | constants.keys()
    dropped: list[list[str]] = [[] for _ in steps]
    for node, index in last.items():
        if node not in kept:
            dropped[index].append(text(node))
    if inputs:
        text.line(f"{', '.join(map(text, inputs))}, = values")
    text.line("values.clear()")
    text.drop([text(node) for node in inputs if node not in last and node not in kept])
    for step, ends in zip(steps, dropped, strict=True):
        written = {text(node) for node in step.writes}
        arguments = ", ".join(map(text, step.arguments))
        if step.is_region:
            text.line(f"given = [{arguments}]")
            text.drop([name for name in ends if name not in written])
            left = "".join(f"{text(node)}, " for node in step.writes)
            text.line(f"{left and left + '= '}{text(step.call)}(given)")
            text.drop([name for name in ends if name in written])
        else:
            keywords = "".join(f", {name}={text(value)}" for name, value in step.keywords.items())
            text.line(f"{text(step.writes[0])} = {text(step.call)}({arguments}{keywords})")
            text.drop(ends)
    text.line(f"return ({''.join(text(result) + ', ' for result in results)})")
    return text.function()


class _Text:
    """A function's source as it is written, and the objects that it names."""

    def __init__(self, constants: Mapping[fx.Node, Any]) -> None:
        self.lines = ["def outer(values):"]
        self.names: dict[fx.Node, str] = {}
        self.objects: dict[str, Any] = {}
        self.known: dict[int, str] = {}
        for node, value in constants.items():
            self.names[node] = self._named(value)

    def __call__(self, value: Any) -> str:
        """`value` as source; a node is its variable."""
        if isinstance(value, fx.Node):
            return self.names.setdefault(value, f"v{len(self.names)}")
        if isinstance(value, list):
            return f"[{', '.join(map(self, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(self(item) + ', ' for item in value)})"
        if isinstance(value, slice):
            return f"slice({self(value.start)}, {self(value.stop)}, {self(value.step)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._named(value)

    def _named(self, value: Any) -> str:
        """A name of the object `value`."""
        if id(value) not in self.known:
            self.known[id(value)] = name = f"f{len(self.known)}"
            self.objects[name] = value
        return self.known[id(value)]

    def line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def drop(self, names: Sequence[str]) -> None:
        """Forgets the variables `names`."""
        if names:
            self.line(f"del {', '.join(names)}")

    def function(self) -> Boxed:
        """The function, compiled."""
        exec(compile("\n".join(self.lines), "<autopar outer program>", "exec"), self.objects)
        made: Boxed = self.objects.pop("outer")
        return made
