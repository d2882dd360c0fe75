"""Chunks of the batch's rows that are a dim of their own, as runs of rows.

    view(T, n, ...)[i]                ->    view(T n, ...)[i n : (i + 1) n]
    its gradient, select_backward     ->    slice_backward to (T n, ...), view(T, n, ...)
    stack of (n, ...) for each of T   ->    cat, view(T, n, ...)

What takes rows in turns reads runs of them (`turns.py`). While chunks are a dim, the batch can be split into as many
parts at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.program.emit import ProgramWriter
from passes.program.program import Program
from passes.program.walks import following
from passes.rules.call import call_of, is_tensor, operand_nodes
from passes.rules.view import RESHAPES

aten = torch.ops.aten
_ADDS_DIM = {aten.unsqueeze.default, aten.view.default}


def chunks_as_rows(program: Program) -> Program:
    """The program with chunks that are taken one by one, all of them, as runs of rows. It keeps its fingerprint."""
    old, batch = program.graph.graph, program.batch_size
    if batch is None or not any(node.target is aten.select.int for node in old.nodes):
        return program
    follow = following(old, program.batch_dims)
    taken = [source for source in old.nodes if source in follow and is_tensor(source) and _is_taken(source, batch)]
    if not taken:
        return program
    shapes = {tuple(source.meta["val"].shape[:2]) for source in taken}
    emit = ProgramWriter(program)
    new, flat = emit.new, dict[fx.Node, fx.Node]()

    def write(node: fx.Node) -> fx.Node | None:
        arguments: Any = node.args
        if _is_entry(node) and arguments[0] in follow and tuple(arguments[0].meta["val"].shape[:2]) in shapes:
            count, rows, *rest = arguments[0].meta["val"].shape
            if arguments[0] not in flat:
                flat[arguments[0]] = emit.view(new[arguments[0]], [count * rows, *rest])
            start = arguments[2] % count * rows
            return emit.call(aten.slice.Tensor, flat[arguments[0]], 0, start, start + rows)
        if node.target is aten.select_backward.default and arguments[2] == 0 and tuple(arguments[1][:2]) in shapes:
            count, rows, *rest = arguments[1]
            start, whole = arguments[3] % count * rows, [count * rows, *rest]
            made = emit.call(aten.slice_backward.default, new[arguments[0]], whole, 0, start, start + rows, 1)
            return emit.view(made, arguments[1])
        if (stacked := _stacked(node)) and tuple(node.meta["val"].shape[:2]) in shapes:
            return emit.view(emit.call(aten.cat.default, [new[part] for part in stacked]), node.meta["val"].shape)
        return None

    emit.write(write)
    for node in emit.graph.nodes:
        source = node.args[0] if node.target in RESHAPES else None
        if isinstance(source, fx.Node) and source.target in RESHAPES and tuple(source.meta["val"].shape[:2]) in shapes:
            node.update_arg(0, source.args[0])
    return emit.finished()


def _is_taken(source: fx.Node, batch: int) -> bool:
    """Whether forward takes all entries of a tensor's first dim one by one, each of them rows of the batch."""
    shape: torch.Size = source.meta["val"].shape
    if len(shape) < 2 or shape[0] < 2 or shape[1] < 2 or shape[0] * shape[1] % batch:
        return False
    entries: list[Any] = [user for user in source.users if _is_entry(user) and user.meta.get("phase") == "forward"]
    return len({entry.args[2] % shape[0] for entry in entries}) == shape[0]


def _is_entry(node: fx.Node) -> bool:
    """Whether it takes one entry of a tensor's first dim."""
    arguments: Any = node.args
    return bool(node.target is aten.select.int and arguments[1] % arguments[0].meta["val"].dim() == 0)


def _stacked(node: fx.Node) -> list[fx.Node]:
    """What a node puts behind one another as entries of a first dim of their own."""
    shape: torch.Size = node.meta["val"].shape if is_tensor(node) else torch.Size()
    if node.target not in (aten.stack.default, aten.cat.default) or len(shape) < 2:
        return []
    call, given = call_of(node), operand_nodes(node)
    if call.get("dim", 0) % len(shape):
        return []
    if node.target is aten.cat.default:
        given = [part.args[0] for part in given if part.target in _ADDS_DIM]  # type: ignore[misc]
    alike = all(part.meta["val"].shape == shape[1:] for part in given)
    return given if alike and len(given) == shape[0] else []
