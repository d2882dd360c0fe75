"""Models that read values of their inputs: the whole batch's values for a capture, and the graph that fits a batch.

A graph is captured for the whole batch, of which each rank holds a part. Where the capture reads a value, all ranks
bring what they hold of the inputs that it follows from, and each captures with the same. At each call the values are
computed again the same way; a batch that gives others runs the graph captured for those. Those that follow from buffers
alone are computed again where a buffer was written to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.modules.batches import BatchRanks
from autopar.ranks.together import Together
from passes.capture.guards import broken
from passes.capture.inputs import flatten_inputs
from passes.errors import CaptureError
from passes.program.program import Fixed, Guards, Program

MOST_GRAPHS = 16
"""Kinds of values for which one call is captured."""

_MOST_COMPARED = 1 << 16
"""Elements of a buffer on the CPU whose values are compared too: what is written through `.data` is not counted."""

Gather = Callable[[Tensor, int | None], Tensor]
"""(this rank's part, batch dim) -> the whole, on the CPU, the same on every rank."""


def gatherer(batch: BatchRanks) -> Gather:
    """Puts the parts of data-parallel ranks end to end. Collective: every rank brings the same inputs, in order."""

    def gather(part: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return part.detach().cpu()
        return batch.gathered(part.detach().movedim(dim, 0)).movedim(0, dim).cpu()

    return gather


def inputs_read(program: Program) -> tuple[str, ...]:
    """Paths of the user's inputs that the program's guards look at."""
    return program.guards.inputs if program.guards else ()


def captured_together(
    ours: Together, capture: Callable[[Mapping[str, Tensor]], Program], call: Any, gather: Gather | None
) -> Program:
    """What `capture` gives with the whole batch's values of the inputs that it reads.

    `capture` takes whole inputs by name; `call` is this rank's part of the inputs, `gather` None where there is but one
    rank.
    """
    known: dict[str, Tensor] = {}
    while True:
        with ours.agreeing():
            program = capture(known)
        if gather is None:
            return program
        text = ours.from_first(lambda program=program: json.dumps(_dims_read(program)))  # type: ignore[misc]
        missing = {name: dim for name, dim in json.loads(text) if name not in known}
        if not missing:
            return program
        leaves, _, names = flatten_inputs(*call)
        parts = dict(zip(names, leaves, strict=True))
        with ours.agreeing():
            for name in missing:
                if name not in parts:
                    raise ValueError(
                        f"ranks were given different inputs: the model reads {name}, which rank 0 has and rank "
                        f"{ours.rank} has not; pass the same arguments on every rank (transformers' generate() leaves "
                        "out a mask of ones: pass it attention_mask=)"
                    )
        known |= {name: gather(parts[name], dim) for name, dim in missing.items()}


def _dims_read(program: Program) -> list[tuple[str, int | None]]:
    dims = {i.path: i.batch_dim for i in program.inputs if i.kind == "input"}
    return [(name, dims[name]) for name in inputs_read(program)]


def with_values(args: Any, kwargs: Any, known: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Whole inputs with the values in `known` for those that it names."""
    if not known:
        return args, kwargs
    leaves, spec, names = flatten_inputs(args, kwargs)
    made = [
        known[name].requires_grad_(leaf.requires_grad) if name in known else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    found: tuple[Any, Any] = pytree.tree_unflatten(made, spec)
    return found


@dataclass(frozen=True, eq=False)
class Seen:
    """A buffer as it was when its values were copied to the CPU."""

    tensor: Tensor
    version: float
    address: int
    values: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Seen:
        """`tensor` as it is now."""
        copied = tensor.detach().to("cpu", copy=tensor.numel() <= _MOST_COMPARED)
        return Seen(tensor, _version(tensor), tensor.data_ptr(), copied)

    def is_now(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the same and nobody has written to it. Does not wait for a device."""
        if tensor is not self.tensor or _version(tensor) != self.version or tensor.data_ptr() != self.address:
            return False
        return not tensor.is_cpu or tensor.numel() > _MOST_COMPARED or torch.equal(tensor, self.values)


def _version(tensor: Tensor) -> float:
    """How often it was written to; of what does not count that, equal to none."""
    return math.nan if tensor.is_inference() else tensor._version


class Values:
    """The whole values of a call's inputs and buffers, each looked at once.

    `buffers` are those of the module, `seen` what is known of them from calls before.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        gather: Gather | None,
        buffer: Callable[[str], Tensor],
        seen: dict[str, Seen],
    ):
        names = [i for i in program.inputs if i.kind == "input"]
        self._parts = {i.path: (x, i.batch_dim) for i, x in zip(names, inputs, strict=True)}
        self._gather = gather or (lambda part, dim: part.detach().cpu())
        self._whole: dict[str, Tensor] = {}
        self._buffer = buffer
        self._seen = seen
        self._buffers: dict[str, Seen] = {}

    def buffers(self, guards: Guards) -> list[Seen]:
        """The buffers that a graph takes something for granted of: the same objects until they are written to."""
        for name in guards.buffers:
            if name not in self._buffers:
                known, now = self._seen.get(name), self._buffer(name)
                if known is None or not known.is_now(now):
                    known = self._seen[name] = Seen.of(now)
                self._buffers[name] = known
        return [self._buffers[name] for name in guards.buffers]

    def broken(self, guards: Guards, held: Sequence[Seen] | None) -> list[Fixed]:
        """What a graph takes for granted and is not so; `held` are its buffers when all was so. Collective."""
        seen = self.buffers(guards)
        if not guards.inputs and seen == held:
            return []
        for name in guards.inputs:
            if name not in self._whole:
                self._whole[name] = self._gather(*self._parts[name])
        return broken(guards, self._whole, {name: each.values for name, each in self._buffers.items()})


def too_many(fixed: Sequence[Fixed]) -> CaptureError:
    """The error for a model that reads another value at every call."""
    first = fixed[0]
    told = f"{first.where}: {first.what}, and has found {MOST_GRAPHS} different ones; each takes a graph of its own. "
    if first.written:
        return CaptureError(
            f"{told}It follows from what each step writes to the buffer {' and '.join(first.written)}: keep it a "
            "tensor. A queue of `size` rows is written by queue.index_copy_(0, (position + torch.arange(n)) % size, "
            "rows) and position.copy_((position + n) % size), and a branch is a torch.where"
        )
    if first.buffers:
        return CaptureError(
            f"{told}It follows from the buffer {' and '.join(first.buffers)}, which is written to between calls: keep "
            "it a tensor. The first `n` of a row are row * (torch.arange(len(row)) < n), and a branch is a torch.where"
        )
    return CaptureError(
        f"{told}Use tensor ops (torch.where, masks) instead, or pad the inputs so that the value is the same"
    )
