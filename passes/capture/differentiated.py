"""What a model returned, as tensors with names, and the gradients of these by autograd while it is traced."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from passes.capture.inputs import path_name
from passes.capture.left_behind import functions_of
from passes.capture.slots import Slot
from passes.capture.tracing import Tracer, wrapped
from passes.errors import CaptureError
from passes.program.precision import Precision
from passes.program.provenance import error_line

Tangents = Literal["loss", "all"]


@dataclass(frozen=True)
class Result:
    tensors: list[tuple[str, Tensor]]
    spec: pytree.TreeSpec
    constants: dict[int, Any]


@dataclass(frozen=True)
class Tangent:
    name: str
    output: Tensor
    tangent: Tensor
    is_loss: bool


def named_leaves(out: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Leaves of what a model returned, with the names of their paths; dataclasses are taken apart."""
    while unknown := {type(x) for x in pytree.tree_leaves(out) if dataclasses.is_dataclass(x)}:
        for cls in unknown:
            pytree.register_dataclass(cls)
    try:
        paths, spec = pytree.tree_flatten_with_path(out)
        return [(path_name(path), leaf) for path, leaf in paths], spec
    except (ValueError, NotImplementedError):  # a container that does not name its parts
        leaves, spec = pytree.tree_flatten(out)
        return [(str(i), leaf) for i, leaf in enumerate(leaves)], spec


def flatten_outputs(out: Any, precision: Precision) -> tuple[Result, list[str]]:
    """What the model returned, as tensors with the names of their paths, and constants by leaf index.

    Raises:
        CaptureError: it holds no tensor that is found, or two of one name.
    """
    named, spec = named_leaves(out)
    tensors: list[tuple[str, Tensor]] = []
    constants: dict[int, Any] = {}
    notes: list[str] = []
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        raise CaptureError(f"two of the model's outputs are called {twice[0]!r}; give one another name")
    for i, (name, leaf) in enumerate(named):
        if isinstance(leaf, Tensor):
            tensors.append((name, precision.cast_output(leaf)))
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes, torch.dtype, torch.Size)):
            constants[i] = leaf
        else:
            constants[i] = None
            notes.append(f"output {name or 'of the model'}: a {type(leaf).__name__} is returned as None")
    if notes and not tensors:
        kind = next(type(leaf).__name__ for _, leaf in named if leaf is not None)
        raise CaptureError(
            f"the model returns a {kind}, in which no tensor is found: return tensors, in tuples, lists, dicts or "
            "dataclasses"
        )
    return Result(tensors, spec, constants), notes


def refuse_own_backward(slots: Sequence[Slot], where: str) -> None:
    """A step brings the gradients of what a model returns, not those that its forward adds to `.grad`.

    where: the line that called `backward`, where it is known.

    Raises:
        CaptureError: the forward left a gradient in what it was given.
    """
    left = [slot.input.path for slot in slots if slot.view.grad is not None]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CaptureError(
            f"{where or 'the model'}: the forward runs a backward, which adds to the gradients of {left[0]}{more}, and "
            "a captured step would lose them. Return the loss, or the sum of losses, and run backward outside; "
            "gradients that the forward itself reads are had by torch.autograd.grad"
        )


def tangents_of(tracer: Tracer, result: Result, which: Tangents) -> list[Tangent]:
    """The outputs to differentiate, each with a new placeholder for its tangent."""
    able = [(name, t) for name, t in result.tensors if t.requires_grad and (t.is_floating_point() or t.is_complex())]
    scalars = [(name, t) for name, t in able if t.dim() == 0 and t.is_floating_point()]
    loss = [(name, t) for name, t in scalars if name.rpartition(".")[2] == "loss"] or scalars
    chosen = loss if which == "loss" and loss else able
    out = []
    for name, t in chosen:
        like = torch.empty(t.shape, dtype=t.dtype, device="meta")
        fake = tracer.placeholder(f"tangent_{name or 'output'}", like)
        tracer.values.set_unknown(tracer.node_of(fake), "a tangent")
        out.append(Tangent(name, t, wrapped(fake, False), chosen is loss))
    return out


def gradients(given: list[Tangent], slots: list[Slot]) -> list[tuple[Slot, Tensor]]:
    """The gradients that reach each slot which wants one, by autograd from the tangents of the outputs."""
    wanted = [slot for slot in slots if slot.differentiate]
    if not given or not wanted:
        return []
    outputs, views, tangents = [t.output for t in given], [slot.view for slot in wanted], [t.tangent for t in given]
    found: Sequence[Tensor | None]
    try:
        if _has_own_functions(outputs):
            torch.autograd.backward(outputs, tangents)
            found = [view.grad for view in views]
        else:
            found = torch.autograd.grad(outputs, views, tangents, allow_unused=True)
    except CaptureError:
        raise
    except Exception as error:
        file, line = error_line(error)
        where = f"{file}:{line}: " if file else ""
        of = ", ".join(t.name for t in given if t.name) or "what the model returns"
        raise CaptureError(f"{where}the backward of {of} raised {type(error).__name__}: {error}") from error
    return [(slot, grad) for slot, grad in zip(wanted, found, strict=True) if grad is not None]


def _has_own_functions(outputs: list[Tensor]) -> bool:
    """Whether a `torch.autograd.Function` made some of it.

    Its backward may run one of its own, as checkpointing with `use_reentrant=True` does: that leaves gradients in
    `.grad` alone, and `torch.autograd.grad` refuses it, or does not reach it where its inputs lead to no parameter.
    """
    return any(isinstance(each, torch.autograd.function.BackwardCFunction) for each in functions_of(outputs))
