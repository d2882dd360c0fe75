"""The outer program: regions and collectives called one after the other, values dropped at their last use.

A value has a numbered slot. A step takes the values it reads as one list, which is the last to hold those that are not
read again, so that compiled code can free them while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_REDUCE = torch.ops._c10d_functional.all_reduce.default
Boxed = Callable[[list[Any]], Any]
"""Takes its values as one list, which it may empty."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call. `reads`, `frees` and `writes` are slots; a step with one slot to write gives the value itself, unless
    `many`."""

    call: Boxed
    reads: tuple[int, ...]
    frees: tuple[int, ...]
    writes: tuple[int, ...]
    many: bool


@dataclass(frozen=True)
class Outer:
    """A graph as steps; called with a list of its inputs, which it empties."""

    steps: tuple[Step, ...]
    slots: int
    inputs: tuple[int, ...]
    constants: tuple[tuple[int, Any], ...]
    results: tuple[tuple[bool, Any], ...]
    """Per output: a slot, or a value that is no tensor of the graph."""

    def __call__(self, values: list[Any]) -> tuple[Any, ...]:
        held: list[Any] = [None] * self.slots
        for slot, value in zip(self.inputs, values, strict=True):
            held[slot] = value
        value = None
        values.clear()
        for slot, constant in self.constants:
            held[slot] = constant
        for step in self.steps:
            given = [held[slot] for slot in step.reads]
            for slot in step.frees:
                held[slot] = None
            made = step.call(given)
            del given
            if step.many:
                for slot, value in zip(step.writes, made, strict=True):
                    held[slot] = value
                value = None
            else:
                held[step.writes[0]] = made
            del made
        return tuple(held[value] if is_slot else value for is_slot, value in self.results)


@dataclass(frozen=True)
class Planned:
    """A step before its slots are numbered."""

    call: Boxed
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    many: bool


def assembled(
    inputs: Sequence[fx.Node], planned: Iterable[Planned], results: Sequence[Any], constants: Mapping[fx.Node, Any]
) -> Outer:
    """`planned` steps from `inputs` to `results`; `constants` are values that are there from the start."""
    steps = list(planned)
    number: dict[fx.Node, int] = {}
    for node in (*inputs, *constants, *(n for step in steps for n in step.writes)):
        number[node] = len(number)
    last = {node: index for index, step in enumerate(steps) for node in (*step.writes, *step.reads)}
    kept = {node for node in results if isinstance(node, fx.Node)}
    ends: list[list[int]] = [[] for _ in steps]
    for node, index in last.items():
        if node not in kept:
            ends[index].append(number[node])
    return Outer(
        tuple(
            Step(
                step.call,
                tuple(number[node] for node in step.reads),
                tuple(slot for slot in ends[index] if slot not in {number[n] for n in step.writes}),
                tuple(number[node] for node in step.writes),
                step.many,
            )
            for index, step in enumerate(steps)
        ),
        len(number),
        tuple(number[node] for node in inputs),
        tuple((number[node], value) for node, value in constants.items()),
        tuple((True, number[r]) if isinstance(r, fx.Node) else (False, r) for r in results),
    )


def op_step(node: fx.Node) -> Planned:
    """A node of a graph as a step of its own."""
    reads = tuple(node.all_input_nodes)
    place = {operand: index for index, operand in enumerate(reads)}
    target: Any = node.target
    if target is _REDUCE and reads[0].target is torch.ops.aten.cat.default and len(reads[0].users) == 1:
        target = torch.ops._c10d_functional.all_reduce_.default  # what was packed for it alone is its own to write to

    def filled(argument: Any, given: Sequence[Any]) -> Any:
        return fx.map_arg(argument, lambda operand: given[place[operand]])

    if not node.kwargs and all(isinstance(argument, fx.Node) or _plain(argument) for argument in node.args):
        arguments: list[tuple[bool, Any]]
        arguments = [(True, place[a]) if isinstance(a, fx.Node) else (False, a) for a in node.args]

        def call(given: list[Any]) -> Any:
            return target(*(given[value] if is_read else value for is_read, value in arguments))

    elif not node.kwargs and _are_nodes(node.args[0]) and all(map(_plain, node.args[1:])):
        operands: Any = node.args[0]
        first, rest = [place[operand] for operand in operands], node.args[1:]

        def call(given: list[Any]) -> Any:
            return target([given[index] for index in first], *rest)

    else:

        def call(given: list[Any]) -> Any:
            return target(*filled(node.args, given), **filled(node.kwargs, given))

    return Planned(call, reads, (node,), False)


def _are_nodes(argument: Any) -> bool:
    return isinstance(argument, list | tuple) and all(isinstance(item, fx.Node) for item in argument)


def _plain(argument: Any) -> bool:
    """Whether an argument holds no node."""
    if isinstance(argument, list | tuple):
        return all(map(_plain, argument))
    return argument is None or isinstance(
        argument, bool | int | float | str | torch.dtype | torch.device | torch.memory_format | torch.layout
    )
