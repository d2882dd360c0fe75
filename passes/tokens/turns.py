"""Rows of the batch that a model takes in turns, as rows of each part of the batch.

    flat[c n : (c + 1) n]          ->    view(P, N / P, ...), its columns c n / P to (c + 1) n / P, view(n, ...)
    slice_backward to N rows       ->    view(P, n / P, ...), slice_backward to (P, N / P, ...), view(N, ...)
    cat of all turns' rows         ->    cat of (P, n / P, ...) along dim 1, view(N, ...)

A loss over many tokens is often taken a few thousand at a time, to save memory. The first of them are those of the
first samples, so that ranks which split the batch have to hand tokens to one another. But which rows come together in a
turn tells in rounding only, where `alike.py` shows that each is treated by itself. Then each turn takes as many rows of
each of P parts of the batch. Where P does not divide the rows of a turn, it takes a few more or less.

What a turn makes of one number of each of its rows may tell which these are, as the mean over those that count does. It
still gets those of the rows that it had:

    sum(x), x of a turn's rows     ->    sum over all x, as (P, N / P), where they were in that turn
    another op on x                ->    all x as (N), of which the rows that it had
    rows * y, y of the turn        ->    rows * a y for each of them, of the turn that it was in
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from passes.analysis.dims import is_getitem
from passes.program.emit import ProgramWriter
from passes.program.program import Program
from passes.program.provenance import place_of
from passes.program.walks import cut_of
from passes.rules.call import call_of, map_operands, operand_nodes
from passes.rules.table import POINTWISE, rule_of
from passes.tokens.alike import TOLD, Walk, is_total, walked
from passes.tokens.chunk_dims import chunks_as_rows
from passes.tokens.turn_states import MattersError, Own, Turns

aten = torch.ops.aten
Beside = dict[fx.Node, tuple[fx.Node, ...]]


def turns_of(program: Program) -> dict[Turns, fx.Node]:
    """The ways in which the program takes rows of its batch in turns, and the first of the rows' slices."""
    batch = program.batch_size
    cuts: dict[Any, set[tuple[int, int]]] = {}
    for node in program.graph.graph.nodes:
        if node.target is aten.slice.Tensor and node.meta.get("phase") == "forward" and (cut := cut_of(node)):
            cuts.setdefault(node.args[0], set()).add(cut)
    if batch is None or not cuts:
        return {}
    found: dict[Turns, fx.Node] = {}
    for source, pairs in cuts.items():
        ordered, rows = sorted(pairs), source.meta["val"].shape[0]
        starts, ends = [start for start, _ in ordered], [end for _, end in ordered]
        if len(ordered) < 2 or starts != [0, *ends[:-1]] or ends[-1] != rows or rows % batch:
            continue
        if _begins_with(source, program.batch_dims):
            first = next(user for user in source.users if user.target is aten.slice.Tensor)
            found.setdefault(Turns(rows, tuple(starts)), first)
    return found


def has_turns(program: Program) -> bool:
    """Whether the program takes rows of its batch in turns."""
    return bool(turns_of(chunks_as_rows(program)))


def _begins_with(node: fx.Node, batch_dims: Mapping[fx.Node, int]) -> bool:
    """Whether a tensor's first dim is the batch of an input, or begins with it, as the ops' factors have it."""
    waiting = [(node, 0)]
    seen: set[tuple[fx.Node, int]] = set()
    while waiting:
        at, dim = waiting.pop()
        if (at, dim) in seen:
            continue
        seen.add((at, dim))
        if at in batch_dims:
            if batch_dims[at] == dim:
                return True
            continue
        which: Any = 0
        if is_getitem(at):
            at, which = cast(Any, at.args)
        rule = rule_of(at.target) if at.op == "call_function" else None
        if rule is None:
            continue
        form = rule(call_of(at))
        first = form.results[which][dim][:1]
        for operand, dims in zip(operand_nodes(at), form.operands, strict=True):
            waiting += [(operand, d) for d, of in enumerate(dims) if first and of[:1] == first]
    return False


def take_turns_by_blocks(program: Program, parts: int) -> Program:
    """The program in which each turn takes as many rows of each of `parts` equal parts of the batch, or of as many of
    them as divide the rows.

    It keeps its fingerprint. Turns that have to stay as they are have a note.
    """
    if parts < 2:
        return program
    flat = moved = chunks_as_rows(program)
    notes = dict.fromkeys(program.notes)
    for turns, first in turns_of(flat).items():
        try:
            moved = _by_blocks(moved, turns, math.gcd(parts, turns.rows), place_of(first))
        except MattersError as reason:
            where, why = reason.args
            note = f"{where}: rows of the whole batch are taken in turns, so ranks hand them to one another: {why}"
            notes[note] = None
    found = program if moved is flat else moved
    return found if len(notes) == len(found.notes) else replace(found, notes=tuple(notes))


def _by_blocks(program: Program, turns: Turns, parts: int, where: str) -> Program:
    """The program with these turns, taken at `where`, so.

    Raises:
        MattersError: which rows come together in a turn may tell.
    """
    old = program.graph.graph
    walk = walked(old, turns)
    after = _in_blocks(turns, parts, where)
    emit = ProgramWriter(program)
    emit.write(_Move(emit, walk, parts, after).written, _in_turn(old, walk))
    return emit.finished()


def _in_turn(graph: fx.Graph, walk: Walk) -> list[fx.Node]:
    """The graph's nodes in their order, but each behind all that it reads once rows are moved.

    Raises:
        MattersError: there is no such order.
    """
    reads: dict[fx.Node, set[fx.Node]] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        needs = set(node.all_input_nodes)
        needs.update(*walk.beside(node).values())
        if node in walk.in_order:
            for operand in node.all_input_nodes:
                if isinstance(state := walk.known.get(operand), Own):
                    needs.update(walk.of_turns(state.key))
        reads[node] = needs
        for need in needs:
            readers.setdefault(need, []).append(node)
    place = {node: index for index, node in enumerate(graph.nodes)}
    ready = [(place[node], node) for node, needs in reads.items() if not needs]
    found: list[fx.Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        found.append(node)
        for reader in readers.get(node, ()):
            reads[reader].remove(node)
            if not reads[reader]:
                heapq.heappush(ready, (place[reader], reader))
    if len(found) < len(place):
        left = min(place.keys() - set(found), key=place.__getitem__)
        raise MattersError(place_of(left), "a turn reads what follows from others")
    return found


def _in_blocks(turns: Turns, parts: int, where: str) -> Turns:
    """Turns of about as many rows each, which `parts` divides."""
    starts = tuple(round(start / parts) * parts for start in turns.starts)
    if len({*starts, turns.rows}) <= len(starts):
        raise MattersError(where, f"turns have fewer rows than the batch has parts ({parts})")
    return Turns(turns.rows, starts)


class _Move:
    """Emits turns of what they were in the old graph as they are `after`, in blocks."""

    def __init__(self, emit: ProgramWriter, walk: Walk, parts: int, after: Turns) -> None:
        self.emit, self.new, self.walk, self.parts, self.after = emit, emit.new, walk, parts, after
        self.shared: dict[object, fx.Node] = {}
        self.together: dict[int | tuple[fx.Node, ...], fx.Node] = {}
        """What is made alike of all turns' rows, by its key; and what they have beside these, as `(parts, rows)`."""
        self.in_row: dict[int, fx.Node] = {}
        self.totals: dict[tuple[int, torch.dtype], fx.Node] = {}
        """By key, sums over each turn's rows."""
        self.had: list[fx.Node] = []

    def written(self, node: fx.Node) -> fx.Node | None:
        """What stands for a node; None where that is a copy of it."""
        state = self.walk.known.get(node)
        if node in self.walk.moved:
            return self._moved(node)
        if node in self.walk.same_as:
            total = self.walk.same_as[node]
            taken = node.target is aten.sub.Tensor and node.args[1] is total
            return self.emit.call(aten.neg.default, self.new[total]) if taken else self.new[total]
        if node in self.walk.in_order:
            return self._in_order(node)
        if isinstance(state, Own):
            resized = self.after.length(state.turn) != self.walk.turns.length(state.turn)
            return self._resized(node, state) if resized or self.walk.beside(node) else None
        return None

    def _moved(self, node: fx.Node) -> fx.Node:
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

    def _in_order(self, node: fx.Node) -> fx.Node:
        """What reads a number of each row that its turn had: all of them are put together, and cut as they were."""
        turns, turn = self.walk.turns, self.walk.in_order[node]
        if is_total(node):
            return self._total(node, turn)

        def operand(index: int, old: fx.Node) -> fx.Node:
            if old not in self.walk.known:
                return self.new[old]
            key, rows = self._of_all(old)
            if key not in self.in_row:
                self.in_row[key] = self.emit.view(rows, [turns.rows])
            cut = self.emit.call(aten.slice.Tensor, self.in_row[key], 0, turns.starts[turn], turns.ends[turn])
            return self.emit.view(cut, old.meta["val"].shape)

        args, kwargs = map_operands(node, operand)
        return self.emit.call_again(node, *args, **kwargs)

    def _total(self, node: fx.Node, turn: int) -> fx.Node:
        """The sum over the rows that a turn had. Each part of the batch adds its own, of all turns."""
        turns, value = self.walk.turns, node.meta["val"]
        wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        key, rows = self._of_all(operand_nodes(node)[0])
        if (key, wide) not in self.totals:
            zero = self.emit.call(aten.full.default, [], 0, dtype=rows.meta["val"].dtype, device=torch.device("cpu"))
            each = [self.emit.call(aten.where.self, self._was_in(t), rows, zero) for t in range(len(turns.starts))]
            sums = [self.emit.call(aten.sum.dim_IntList, one, [0, 1], dtype=wide) for one in each]
            totals = self.emit.call(aten.cat.default, [self.emit.view(one, [1]) for one in sums])
            self.totals[key, wide] = totals
        total = self.emit.call(aten.select.int, self.totals[key, wide], 0, turn)
        if wide != value.dtype:
            total = self.emit.call(aten._to_copy.default, total, dtype=value.dtype)
        return self.emit.view(total, value.shape)

    def _was_in(self, turn: int) -> fx.Node:
        """Which rows a turn had, as `(parts, rows / parts)`."""
        rows = self.walk.turns.rows
        if not self.had:
            places = self.emit.call(aten.arange.default, rows, dtype=torch.int64, device=torch.device("cpu"))
            places = self._by_parts(places)
            before = [self.emit.call(aten.lt.Scalar, places, end) for end in self.walk.turns.ends]
            behind = [self.emit.call(aten.ge.Scalar, places, start) for start in self.walk.turns.starts]
            self.had = [self.emit.call(aten.logical_and.default, *each) for each in zip(before, behind, strict=True)]
        return self.had[turn]

    def _of_all(self, old: fx.Node) -> tuple[int, fx.Node]:
        """A number of each row, as `(parts, rows / parts)`, and its key: what is made as `old`, or the sum of that."""
        state = self.walk.known[old]
        assert isinstance(state, Own)
        if state.key not in self.together:
            found = [self._by_parts(self._sum_of_each(each)) for each in self.walk.of_turns(state.key)]
            self.together[state.key] = self.emit.call(aten.cat.default, found, 1)
        return state.key, self.together[state.key]

    def _sum_of_each(self, old: fx.Node) -> fx.Node:
        """What a turn has now of each row, added up to one number."""
        state, new = self.walk.known[old], self.new[old]
        assert isinstance(state, Own)
        value: Tensor = new.meta["val"]
        if value.numel() == self.after.length(state.turn):
            return new
        others = [dim for dim in range(value.dim()) if dim != state.dims[0]]
        wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else None
        return self.emit.call(aten.sum.dim_IntList, new, others, dtype=wide)

    def _of_each(self, node: fx.Node, dim: int | None, numbers: tuple[fx.Node, ...], turn: int) -> fx.Node:
        """Numbers that a node of each turn reads beside the rows along a dim of its result, for the rows that a turn
        has now."""
        turns, after, shape = self.walk.turns, self.after, numbers[turn].meta["val"].shape
        if shape.numel() == 1:
            if dim is None or not (rule_of(node.target) is POINTWISE[0] or node.target is aten.expand.default):
                raise MattersError(place_of(node), f"{node.target} reads a number that is another in each turn")
            shape = torch.Size([turns.length(turn), *[1] * (node.meta["val"].dim() - dim - 1)])
        if numbers not in self.together:
            flat = [self.emit.view(self.new[one], [one.meta["val"].numel()]) for one in numbers]
            each = [self.emit.call(aten.expand.default, one, [turns.length(t)]) for t, one in enumerate(flat)]
            self.together[numbers] = self._by_parts(self.emit.call(aten.cat.default, each))
        start, end = (at // self.parts for at in (after.starts[turn], after.ends[turn]))
        cut = self.emit.call(aten.slice.Tensor, self.together[numbers], 1, start, end)
        return self.emit.view(cut, [after.length(turn) if size > 1 else 1 for size in shape])

    def _by_parts(self, node: fx.Node) -> fx.Node:
        """A number of each row as `(parts, n / parts)`."""
        return self.emit.view(node, [self.parts, node.meta["val"].numel() // self.parts])

    def _resized(self, node: fx.Node, state: Own) -> fx.Node:
        """What a turn makes of its rows, of as many as it has now."""
        beside = self.walk.beside(node)
        values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        shapes = [
            self._shape(value.shape, dim, state.turn) if isinstance(value, Tensor) else None
            for value, dim in zip(values, state.dims, strict=True)
        ]

        def operand(index: int, old: fx.Node) -> fx.Node:
            at = self.walk.shared.get((node, index))
            if at is not None:
                return self._resized_shared(old, at, state.turn, beside)
            return self._of_each(node, state.dims[0], beside[old], state.turn) if old in beside else self.new[old]

        if is_getitem(node):
            source, which = cast(Any, node.args)
            return self.emit.call(operator.getitem, self.new[source], which)
        return self._called(node, map_operands(node, operand), shapes)

    def _shape(self, shape: torch.Size, dim: int | None, turn: int) -> tuple[int, ...]:
        before, now = self.walk.turns.length(turn), self.after.length(turn)
        return tuple(size // before * now if d == dim else size for d, size in enumerate(shape))

    def _resized_shared(self, node: fx.Node, dim: int, turn: int, beside: Beside) -> fx.Node:
        """What has one and the same for each row of a turn, for as many as it has now."""
        key = node, dim, turn, tuple(beside.items())
        if key not in self.shared:
            rule = rule_of(node.target)
            assert rule is not None
            form = rule(call_of(node))
            (factor,) = form.results[0][dim]

            def operand(index: int, old: fx.Node) -> fx.Node:
                at = next((d for d, each in enumerate(form.operands[index]) if factor in each), None)
                if at is not None:
                    return self._resized_shared(old, at, turn, beside)
                return self._of_each(node, dim, beside[old], turn) if old in beside else self.new[old]

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
        values, before = (
            each.meta["val"] if isinstance(each.meta["val"], tuple | list) else [each.meta["val"]]
            for each in (made, node)
        )
        if [tuple(v.shape) if isinstance(v, Tensor) else None for v in values] != shapes:
            raise MattersError(place_of(node), f"{node.target} is told how many rows there are")
        if any(isinstance(v, Tensor) and v.dtype != was.dtype for v, was in zip(values, before, strict=True)):
            raise MattersError(place_of(node), f"{node.target} casts a number that is another in each turn")
        return made
