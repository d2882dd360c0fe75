"""Equal parts of a product's columns, as entries of a dim of their own.

    qkv.split(h, -1)    slices [0:h], [h:2h], [2h:3h]    ->    view(..., 3, h), of which entries 0, 1 and 2
    its gradient        cat([dq, dk, dv], -1)            ->    cat along a dim of their own, view(..., 3 h)
    or, of one part     slice_backward                   ->    select_backward, view(..., 3 h)

A slice holds the dim that it cuts whole, so of `3 h` columns a mesh axis could split neither queries nor their heads.
Where `h` is a dim of its own, the axis splits that, and so the weight's part for each of the three, which is how
Megatron lays a fused weight by hand. Queries, keys and values of GPT-2, gate and up of Phi-3 and GLM-4 are such parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from passes.program.emit import ProgramWriter
from passes.program.program import Program

aten = torch.ops.aten
_Part = tuple[fx.Node, int, int]
"""(what is cut, into how many parts, which of them)"""


def split_chunks(program: Program) -> Program:
    """The program with equal parts of a product's columns as a dim of their own. The fingerprint is kept."""
    parts = {part: found for source in program.graph.graph.nodes for part, found in _parts(source)}
    if not parts:
        return program
    counts = {(count, _columns(part)) for part, (_, count, _) in parts.items()}
    emit = ProgramWriter(program)
    new, whole = emit.new, dict[fx.Node, fx.Node]()

    def write(node: fx.Node) -> fx.Node | None:
        if node in parts:
            source, count, which = parts[node]
            if source not in whole:
                shape = source.meta["val"].shape
                whole[source] = emit.view(new[source], [*shape[:-1], count, shape[-1] // count])
            return emit.call(aten.select.int, whole[source], -2, which)
        if node.target is aten.slice_backward.default and (cut := _cut_of(node)) and cut[:2] in counts:
            grad, sizes = new[cast(Any, node.args[0])], node.meta["val"].shape
            apart = [*sizes[:-1], *cut[:2]]
            return emit.view(emit.call(aten.select_backward.default, grad, apart, -2, cut[2]), sizes)
        if (joined := _joined(node)) and (len(joined), _columns(joined[0])) in counts:
            entries = [emit.call(aten.unsqueeze.default, new[part], -2) for part in joined]
            return emit.view(emit.call(aten.cat.default, entries, -2), node.meta["val"].shape)
        return None

    return emit.written(write)


def _parts(source: fx.Node) -> Iterator[tuple[fx.Node, _Part]]:
    """Slices that cut all columns of a product into as many equal parts."""
    cuts = [user for user in source.users if user.target is aten.slice.Tensor and user.args[0] is source]
    if len(cuts) < 2 or not _is_product(source):
        return
    columns, width = _columns(source), _columns(cuts[0])
    starts: dict[fx.Node, Any] = {}
    for cut in cuts:
        given: list[Any] = list(cut.args[1:])
        dim, start, _, step = given + [0, None, None, 1][len(given) :]
        if dim not in (-1, source.meta["val"].dim() - 1) or step != 1 or _columns(cut) != width:
            return
        starts[cut] = start or 0
    if columns % width == 0 and sorted(set(starts.values())) == list(range(0, columns, width)):
        for cut, start in starts.items():
            yield cut, (source, columns // width, start // width)


def _is_product(node: fx.Node) -> bool:
    """Whether it is a matrix product, with or without a bias, seen as a tensor of more dims."""
    columns, at = _columns(node), cast(Any, node)
    while isinstance(at, fx.Node) and at.target in (aten.view.default, aten.add.Tensor):
        at = at.args[0]
    return isinstance(at, fx.Node) and at.target is aten.mm.default and _columns(at) == columns


def _cut_of(node: fx.Node) -> tuple[int, int, int] | None:
    """(parts, columns of each, which) of a gradient of one such part."""
    arguments: Any = node.args
    grad, sizes, dim, start, _, step = arguments
    width, part = _columns(node), _columns(grad)
    if not part or dim not in (-1, len(sizes) - 1) or step != 1 or width % part or start % part:
        return None
    return width // part, part, start // part


def _joined(node: fx.Node) -> list[fx.Node]:
    """What it puts side by side, if these are as wide."""
    if node.target is not aten.cat.default or node.meta.get("phase") != "backward":
        return []
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    alike = len({part.meta["val"].shape for part in parts}) == 1
    return list(parts) if dim in (-1, node.meta["val"].dim() - 1) and alike else []


def _columns(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return int(value.shape[-1]) if hasattr(value, "shape") and value.dim() else 0
