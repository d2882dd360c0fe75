"""Which dim of what a step gives is the batch's: the logical dims tell, where `capture` had lengths alone to go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from passes.analysis.dims import Atom, Unified, outputs_of, value_of
from passes.analysis.layers import Folding
from passes.program.program import Program
from passes.program.provenance import place_of
from passes.program.walks import made_of
from passes.rules.create import FILLS, IOTAS

aten = torch.ops.aten
_SIZED = {aten.expand.default, aten.repeat.default, *FILLS, *IOTAS}
"""Ops that make a dim as long as they are told."""


def with_batch_dims(program: Program, folding: Folding, unified: Unified, batch: frozenset[int]) -> Program:
    """The program with the batch dim of each output, and of its tangent, where the atoms tell it.

    It is the dim whose outermost atom is the batch of an input (`batch`: their identities). None where the dim that
    was taken for it is another one of a parameter, buffer or input, or is made of parameters and buffers alone. A note
    tells where the batch is inside of a dim. Beside a loss nothing changes: there it says only that an output may be
    split.
    """
    if program.has_loss or not batch:
        return program
    finder = _Finder(program, folding, unified, batch)
    returned = [(out, node) for out, node, _, _ in outputs_of(program) if out.kind == "output" and node is not None]
    dims = {out.name: finder.batch_dim(node, out.batch_dim) for out, node in returned}
    notes = [
        f"output {out.name or 'of the model'}: samples are the inner part of its dim {dim}, of which each "
        "data-parallel rank gets an equal run, whosever samples these are; return it before it is flattened or joined"
        for out, node in returned
        if (dim := dims[out.name]) is not None and finder.is_inside(node, dim)
    ]
    return replace(
        program,
        inputs=tuple(
            replace(given, batch_dim=dims.get(given.name, given.batch_dim)) if given.kind == "tangent" else given
            for given in program.inputs
        ),
        outputs=tuple(
            replace(out, batch_dim=dims.get(out.name, out.batch_dim)) if out.kind == "output" else out
            for out in program.outputs
        ),
        notes=tuple(dict.fromkeys([*program.notes, *notes])),
    )


def with_attending(program: Program, folding: Folding, unified: Unified, batch: frozenset[int]) -> Program:
    """The program with a note where samples attend to one another and no mask keeps them apart: what was taken for the
    batch is then rather the sequence."""
    for node in program.graph.graph.nodes:
        keys = _keys(node)
        if keys is None:
            continue
        source, dim = keys
        if not batch.isdisjoint(id(atom) for atom in unified.dims(value_of(source, folding))[dim]):
            given = [each for each in program.inputs if each.kind == "input" and each.batch_dim is not None]
            taken = [f"dim {each.batch_dim} of {each.name!r}" for each in given]
            shown = " and ".join(taken[:2]) + (f" and {len(taken) - 2} more" if len(taken) > 2 else "")
            note = (
                f"{place_of(node)}: samples attend to one another, where the batch is {shown}. A batch that lies "
                "elsewhere (sequence first) is told by Options(batch_dims={name: dim}); a list with a tensor for each "
                "sample has to be one padded tensor"
            )
            return replace(program, notes=tuple(dict.fromkeys([*program.notes, note])), attends=note)
    return program


def _keys(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Of attention without a mask of its own: a tensor and its dim that counts the keys."""
    if node.target is aten._scaled_dot_product_flash_attention_for_cpu.default:
        mask = node.kwargs.get("attn_mask")
        return (node.args[1], 2) if mask is None else None  # type: ignore[return-value]
    if node.target is aten._softmax.default and _is_score(node.args[0]):
        return node, node.args[1]  # type: ignore[return-value]
    return None


def _is_score(node: Any) -> bool:
    while node.target in (aten.view.default, aten.mul.Tensor, aten.div.Tensor):
        node = node.args[0]
    return node.target is aten.bmm.default


class _Finder:
    """Looks for the batch in dims; what it needs of the whole graph is found once, where it is asked for."""

    def __init__(self, program: Program, folding: Folding, unified: Unified, batch: frozenset[int]) -> None:
        self.folding, self.unified, self.batch = folding, unified, batch
        self.held = set(program.placeholders_of("parameter", "buffer"))
        self.passed = set(program.placeholders_of("input"))
        self.others = {id(a) for node in self.held | self.passed for dim in self._dims(node) for a in dim} - batch

    def batch_dim(self, node: fx.Node, guess: int | None) -> int | None:
        dims = self._dims(node)
        for d, dim in enumerate(dims):
            if dim and id(dim[0]) in self.batch:
                return d
        if guess is None or not dims[guess] or self.is_inside(node, guess):
            return guess
        first = id(dims[guess][0])
        if first in self.others or (self._is_of_parameters(node) and first not in self._sized()):
            return None
        return guess

    def is_inside(self, node: fx.Node, dim: int) -> bool:
        """Whether the batch is a part of the dim and not its outermost."""
        first, *rest = [id(atom) for atom in self._dims(node)[dim]] or [0]
        return first not in self.batch and not self.batch.isdisjoint(rest)

    def _dims(self, node: fx.Node) -> Sequence[Sequence[Atom]]:
        return self.unified.dims(value_of(node, self.folding))

    def _is_of_parameters(self, node: fx.Node) -> bool:
        nodes = made_of([node])
        return not self.held.isdisjoint(nodes) and self.passed.isdisjoint(nodes)

    def _sized(self) -> set[int]:
        """Atoms that such ops make."""
        found = set()
        for members, form, atoms in zip(self.folding.members, self.unified.forms, self.unified.atoms, strict=True):
            if members[0].target in _SIZED:
                had = {f for dims in form.operands for dim in dims for f in dim}
                found |= {id(leaf) for f, atom in enumerate(atoms) if f not in had for leaf in atom.leaves()}
        return found
