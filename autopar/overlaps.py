"""Tensors of a model in the same memory: two parameters or buffers, or one and a plain tensor that the forward reads.

On one device a write to one changes the other. A parallel module has each apart (a graph has a plain tensor's values),
so what training or the step writes to has to be alone; what is only read may share.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from passes.program.program import Program
from passes.program.spans import Span, sharing, span_of


class Placed(NamedTuple):
    """A parameter or buffer: where it lies, as long as its storage lives. `trains`: it may be given gradients."""

    name: str
    kind: type
    trains: bool
    span: Span
    storage: weakref.ref[torch.UntypedStorage]


def placed(model: nn.Module) -> tuple[Placed, ...]:
    """The parameters and buffers of a model that have memory; meta ones have none."""
    trains = torch.is_grad_enabled()
    named = (*model.named_parameters(), *model.named_buffers())
    first = {id(tensor): name for name, tensor in reversed(named)}  # a parameter may be a buffer too
    return tuple(
        Placed(name, type(tensor), trains and tensor.requires_grad, span, weakref.ref(tensor.untyped_storage()))
        for name, tensor in named
        if first[id(tensor)] == name and (span := span_of(tensor)) is not None
    )


def check_apart(held: Sequence[Placed], program: Program) -> None:
    """Raise where training, or the step itself, writes to one of two tensors in the same memory.

    Raises:
        ValueError: with both names, or the line that reads a plain tensor, and what would do.
    """
    written = {entry.name for entry in program.inputs if entry.kind == "parameter" and entry.requires_grad}
    if not written:  # a forward alone, which may run between steps of training
        written = {each.name for each in held if each.trains}
    written |= {output.name for output in program.outputs if output.kind == "buffer"}
    spans = [*(each.span for each in held), *(constant.span for constant in program.constants)]
    for first, second in sharing(spans):
        if second < len(held):
            _check_two(held[first], held[second], written)
        elif first < len(held) and held[first].name in written and held[first].storage() is not None:
            constant, name = program.constants[second - len(held)], held[first].name
            raise ValueError(
                f"{constant.where}: reads a {constant.span.shape} tensor in the memory of {name}, and what training "
                f"writes there would not reach it; read {name} itself ({name}.detach() where it gets no gradient "
                "here), or keep a clone"
            )


def _check_two(one: Placed, other: Placed, written: set[str]) -> None:
    if one.name in written or other.name in written:
        alike = (one.kind, one.span) == (other.kind, other.span)
        helps = f"make them one, model.{other.name} = model.{one.name}" if alike else "clone one of them"
        raise ValueError(
            f"{one.name} and {other.name} are two tensors in the same memory, and what training writes to one would "
            f"not reach the other; {helps}"
        )
