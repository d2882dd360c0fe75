"""Rows of the batch that a model takes in turns, as rows of each part of the batch.

    flat[c n : (c + 1) n]          ->    view(P, N / P, ...), its columns c n / P to (c + 1) n / P, view(n, ...)
    slice_backward to N rows       ->    view(P, n / P, ...), slice_backward to (P, N / P, ...), view(N, ...)
    cat of all turns' rows         ->    cat of (P, n / P, ...) along dim 1, view(N, ...)

A loss over many tokens is often taken a few thousand at a time, to save memory. The first of them are those of the
first samples, so that ranks which split the batch have to hand tokens to one another. But which rows come together in a
turn tells in rounding only, where `passes/alike.py` shows that each is treated by itself. Then each turn takes as many
rows of each of P parts of the batch. Where P does not divide the rows of a turn, it takes a few more or less.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from passes.alike import TOLD, MattersError, Own, Turns, Walk
from passes.dims import is_getitem
from passes.emit import Emitter, emitter_like, written_anew
from passes.program import Program
from passes.provenance import place_of
from passes.rules.call import call_of, map_operands
from passes.rules.table import rule_of
from passes.walks import cut_of, following

aten = torch.ops.aten
_NAMED_ANEW = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default}


def turns_of(program: Program) -> dict[Turns, fx.Node]:
    """The ways in which the program takes rows of its batch in turns, and the first of the rows' slices."""
    batch = program.batch_size
    cuts: dict[Any, set[tuple[int, int]]] = {}
    for node in program.graph.graph.nodes:
        if node.target is aten.slice.Tensor and node.meta.get("phase") == "forward" and (cut := cut_of(node)):
            cuts.setdefault(node.args[0], set()).add(cut)
    if batch is None or not cuts:
        return {}
    follow: set[fx.Node] | None = None
    found: dict[Turns, fx.Node] = {}
    for source, pairs in cuts.items():
        ordered, rows = sorted(pairs), source.meta["val"].shape[0]
        starts, ends = [start for start, _ in ordered], [end for _, end in ordered]
        if len(ordered) < 2 or starts != [0, *ends[:-1]] or ends[-1] != rows or rows % batch:
            continue
        follow = following(program.graph.graph, program.batch_dims) if follow is None else follow
        if source in follow and _leads(source, batch):
            first = next(user for user in source.users if user.target is aten.slice.Tensor)
            found.setdefault(Turns(rows, tuple(starts)), first)
    return found


def _leads(node: Any, batch: int) -> bool:
    """Whether a tensor's first dim is the batch, or begins with it."""
    while node.target in _NAMED_ANEW and node.meta["val"].shape[:1] != (batch,):
        node = node.args[0]
    return bool(node.meta["val"].shape[:1] == (batch,))


def take_turns_by_blocks(program: Program, parts: int) -> Program:
    """The program in which each turn takes as many rows of each of `parts` equal parts of the batch, or of as many of
    them as divide the rows.

    It keeps its fingerprint. Turns that have to stay as they are have a note.
    """
    for turns, first in turns_of(program).items() if parts > 1 else ():
        try:
            program = _by_blocks(program, turns, math.gcd(parts, turns.rows), place_of(first))
        except MattersError as reason:
            where, why = reason.args
            note = f"{where}: rows of the whole batch are taken in turns, so ranks hand them to one another: {why}"
            program = replace(program, notes=tuple(dict.fromkeys([*program.notes, note])))
    return program


def _by_blocks(program: Program, turns: Turns, parts: int, where: str) -> Program:
    """The program with these turns, taken at `where`, so.

    Raises:
        MattersError: which rows come together in a turn may tell.
    """
    old = program.graph.graph
    walk = Walk(turns)
    for node in old.nodes:
        walk.visit(node)
    after = _in_blocks(turns, parts, where)
    emit = emitter_like(old)
    new: dict[fx.Node, fx.Node] = {}
    move = _Move(emit, new, walk, parts, after)
    for node in old.nodes:
        emit.stand_for(node)
        state = walk.known.get(node)
        if node in walk.moved:
            new[node] = move.moved(node)
        elif node in walk.same_as:
            new[node] = new[walk.same_as[node]]
            if node.target is aten.sub.Tensor and node.args[1] is walk.same_as[node]:
                new[node] = emit.call(aten.neg.default, new[node])
        elif isinstance(state, Own) and after.length(state.turn) != turns.length(state.turn):
            new[node] = move.resized(node, state)
        else:
            new[node] = emit.graph.node_copy(node, new.__getitem__)
    emit.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return written_anew(program, emit)


def _in_blocks(turns: Turns, parts: int, where: str) -> Turns:
    """Turns of about as many rows each, which `parts` divides."""
    starts = tuple(round(start / parts) * parts for start in turns.starts)
    if len({*starts, turns.rows}) <= len(starts):
        raise MattersError(where, f"turns have fewer rows than the batch has parts ({parts})")
    return Turns(turns.rows, starts)


class _Move:
    """Emits turns of what they were in the old graph as they are `after`, in blocks."""

    def __init__(self, emit: Emitter, new: dict[fx.Node, fx.Node], walk: Walk, parts: int, after: Turns) -> None:
        self.emit, self.new, self.walk, self.parts, self.after = emit, new, walk, parts, after
        self.shared: dict[tuple[fx.Node, int, int], fx.Node] = {}

    def moved(self, node: fx.Node) -> fx.Node:
        """What cuts rows into turns, or puts them in their places."""
        arguments: Any = node.args
        turn, rows = self.walk.moved[node]
        each, shape = rows // self.after.rows, tuple(node.meta["val"].shape)
        start, end = (at * each // self.parts for at in (self.after.starts[turn], self.after.ends[turn]))
        if node.target is aten.cat.default:
            made = self.emit.call(aten.cat.default, [self._apart(self.new[part]) for part in arguments[0]], 1)
        elif node.target is aten.slice.Tensor:
            made = self.emit.call(aten.slice.Tensor, self._apart(self.new[arguments[0]]), 1, start, end)
            shape = ((end - start) * self.parts, *shape[1:])
        elif node.target is aten.slice_scatter.default:
            base, source = (self._apart(self.new[part]) for part in arguments[:2])
            made = self.emit.call(aten.slice_scatter.default, base, source, 1, start, end)
        else:
            sizes = [self.parts, shape[0] // self.parts, *shape[1:]]
            gradient = self._apart(self.new[arguments[0]])
            made = self.emit.call(aten.slice_backward.default, gradient, sizes, 1, start, end, 1)
        return self.emit.view(made, shape)

    def _apart(self, node: fx.Node) -> fx.Node:
        """`(n, ...)` as `(parts, n / parts, ...)`."""
        value: Tensor = node.meta["val"]
        return self.emit.view(node, [self.parts, value.shape[0] // self.parts, *value.shape[1:]])

    def resized(self, node: fx.Node, state: Own) -> fx.Node:
        """What a turn makes of its rows, of as many as it has now."""
        values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        shapes = [
            self._shape(value.shape, dim, state.turn) if isinstance(value, Tensor) else None
            for value, dim in zip(values, state.dims, strict=True)
        ]

        def operand(index: int, old: fx.Node) -> fx.Node:
            at = self.walk.shared.get((node, index))
            return self.new[old] if at is None else self._resized_shared(old, at, state.turn)

        if is_getitem(node):
            source, which = cast(Any, node.args)
            return self.emit.call(operator.getitem, self.new[source], which)
        return self._called(node, map_operands(node, operand), shapes)

    def _shape(self, shape: torch.Size, dim: int | None, turn: int) -> tuple[int, ...]:
        before, now = self.walk.turns.length(turn), self.after.length(turn)
        return tuple(size // before * now if d == dim else size for d, size in enumerate(shape))

    def _resized_shared(self, node: fx.Node, dim: int, turn: int) -> fx.Node:
        """What has one and the same for each row of a turn, for as many as it has now."""
        key = node, dim, turn
        if key not in self.shared:
            rule = rule_of(node.target)
            assert rule is not None
            form = rule(call_of(node))
            (factor,) = form.results[0][dim]

            def operand(index: int, old: fx.Node) -> fx.Node:
                at = next((d for d, each in enumerate(form.operands[index]) if factor in each), None)
                return self.new[old] if at is None else self._resized_shared(old, at, turn)

            shape = self._shape(node.meta["val"].shape, dim, turn)
            self.shared[key] = self._called(node, map_operands(node, operand), [shape])
        return self.shared[key]

    def _called(self, node: fx.Node, given: tuple[Any, Any], shapes: list[tuple[int, ...] | None]) -> fx.Node:
        """The node's op on other arguments; `shapes`: those that its results have to have."""
        (args, kwargs), target = given, cast(Any, node.target)
        told = TOLD.get(target)
        if told is not None:
            names = [argument.name for argument in target._schema.arguments]
            place, shape = names.index(told), list(shapes[0] or ())
            args = (*args[:place], shape, *args[place + 1 :])
        try:
            made = self.emit.call(target, *args, **kwargs)
        except RuntimeError as error:
            raise MattersError(place_of(node), f"{node.target} is told how many rows there are") from error
        values = made.meta["val"] if isinstance(made.meta["val"], tuple | list) else [made.meta["val"]]
        if [tuple(v.shape) if isinstance(v, Tensor) else None for v in values] != shapes:
            raise MattersError(place_of(node), f"{node.target} is told how many rows there are")
        return made
