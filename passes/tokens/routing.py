"""Routed experts: each rank's tokens routed by itself.

    sort(expert of each row) -> rows in that order -> products -> rows back in their places

Models sort the rows of the whole batch by expert. Nothing after that sort can follow a split of the batch: the first
rows go to expert 0, whoever's tokens they are. But where a row stands within an expert's rows does not matter, as long
as all that stands between the sort and the way back treats each row by itself. `route_by_blocks` checks just that, by
the ops' factor forms, and then sorts block by block, a block per part of the batch: exact, dropless, and local.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.program.adder import adder_before
from passes.program.graphs import drop_unread, graph_module
from passes.program.program import Program
from passes.program.routed_ops import PUT_ROWS, ROUTED_MM, ROUTED_MM_WEIGHT, TAKE_ROWS
from passes.rules.call import call_of, operand_nodes
from passes.rules.table import rule_of
from passes.tokens.expert_counts import CASTS, SAME_ENTRIES, counted_entries, counts_up, past, whole_numbers

aten = torch.ops.aten

_SORTS = {aten.sort.default, aten.sort.stable}


def has_routed(program: Program) -> bool:
    """Whether the program (as `one_form` left it) has routed experts."""
    return any(node.target is ROUTED_MM for node in program.graph.graph.nodes)


def expert_count(program: Program) -> int:
    """How many experts each mixture has, or what these counts have in common; 0 without routed experts."""
    products = (node for node in program.graph.graph.nodes if node.target is ROUTED_MM)
    return math.gcd(*(call_of(node).operands[1].shape[0] for node in products))


def token_parts(program: Program, strategy: str, sizes: Sequence[int], batch_axes: Sequence[int]) -> int:
    """How many parts the tokens have on a mesh of `sizes`.

    The batch axes split the batch. Under `fsdp` all axes do while the batch divides, then they split the sequence.
    """
    parts = math.prod(sizes[axis] for axis in batch_axes)
    if strategy != "fsdp":
        return parts
    given = next(iter(program.batch_dims.items()), None)
    if given is None:
        return parts
    shape, dim = given[0].meta["val"].shape, given[1]
    every = math.prod(sizes)
    sequence = shape[dim + 1] if len(shape) > dim + 1 else 1
    in_sequence = shape[dim] == parts and sequence % (every // parts) == 0
    return every if shape[dim] % every == 0 or in_sequence else parts


def route_by_blocks(program: Program, blocks: int) -> Program:
    """A copy of the program that sorts rows by expert within each of `blocks` equal parts of the batch.

    What cannot be cut so stays as it is, with a note.
    """
    if blocks == 1 or not has_routed(program):
        return program
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph.graph, {}))
    graph.output_node().meta = dict(program.graph.graph.output_node().meta)
    notes: dict[str, None] = {}
    order = {node: place for place, node in enumerate(graph.nodes)}
    regions: list[_Region] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in _SORTS or not _is_list(node):
            continue
        if any(node in region.sorts for region in regions):
            continue
        try:
            regions.append(_region(node, blocks, order))
        except _OrderMattersError as reason:
            notes[f"{node.meta.get('source', '')}: tokens of the whole batch are routed together: {reason}"] = None
    for region in regions:
        if region.products:
            _cut(region, blocks)
    drop_unread(graph)
    module = graph_module(program.graph, graph, class_name="Step")
    return replace(program, graph=module, notes=(*program.notes, *notes))


def _is_list(node: fx.Node) -> bool:
    """Whether the node sorts a list of integers, the smallest first."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    return value.dim() == 1 and not value.dtype.is_floating_point and not call_of(node).get("descending", False)


class _OrderMattersError(Exception):
    """Why rows may not be put in another order."""


@dataclass
class _Region:
    """What reads rows in the order of `sort`.

    `index`: node -> n, for rows that hold places in a list of n, of which block b of the rows has those of block b.
    `places`: nodes that hold, for each row in its old place, where it stands in the order.
    """

    sort: fx.Node
    size: int
    rows: dict[fx.Node, None] = field(default_factory=dict)
    index: dict[fx.Node, int] = field(default_factory=dict)
    places: dict[fx.Node, None] = field(default_factory=dict)
    moves: dict[fx.Node, None] = field(default_factory=dict)
    """Look-ups to be made block by block."""
    sorts: dict[fx.Node, None] = field(default_factory=dict)
    """Sorts of places, to be made block by block."""
    products: dict[fx.Node, None] = field(default_factory=dict)


def _region(sort: fx.Node, blocks: int, order: Mapping[fx.Node, int]) -> _Region:
    """All that depends on the order of `sort`, whose place in the graph `order` knows, as that of all nodes.

    Raises:
        _OrderMattersError: something of it may notice another order, or a block's rows are not its own.
    """
    size = sort.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    region = _Region(sort, size)
    if size % blocks:
        raise _OrderMattersError(f"{blocks} blocks do not divide {size} rows")
    for user in sort.users:
        region.rows[user] = None
        if user.args[1] == 1:
            region.index[user] = size
    waiting = [(order[reader], reader) for node in region.rows for reader in node.users]
    heapq.heapify(waiting)
    done: set[fx.Node] = set()
    while waiting:
        _, node = heapq.heappop(waiting)
        if node in done:
            continue
        done.add(node)
        if node.op == "output":
            raise _OrderMattersError("rows leave the program in that order")
        _follow(node, region, blocks)
        if node in region.rows or node in region.places:
            for reader in node.users:
                heapq.heappush(waiting, (order[reader], reader))
    return region


def _follow(node: fx.Node, region: _Region, blocks: int) -> None:
    """Note what a node makes of rows in the region's order."""
    operands = operand_nodes(node)
    ordered = [operand in region.rows for operand in operands]
    target = node.target
    if target is operator.getitem:
        source: Any = node.args[0]
        if source in region.sorts:
            (region.places if node.args[1] == 1 else region.rows)[node] = None
        elif source in region.rows:
            region.rows[node] = None
        return
    if target in _SORTS and _is_list(node) and region.index.get(operands[0]) == region.size:
        region.sorts[node] = None
        region.rows[node] = None
        return
    if target in (ROUTED_MM, ROUTED_MM_WEIGHT):
        _follow_product(node, ordered, region)
        return
    if target in (aten.index.Tensor, aten.index_put.default, aten.index_add.default, aten.index_select.default):
        move = _move(node)
        if move is not None and _follow_move(node, move, region):
            return
    if any(operand in region.places for operand in operands):
        raise _OrderMattersError(f"{target} reads where rows stand")
    if _follow_rows(node, ordered, region) and target is aten.floor_divide.default and operands[0] in region.index:
        by, n = node.args[1], region.index[operands[0]]
        if isinstance(by, int) and n % (by * blocks) == 0:
            region.index[node] = n // by


def _follow_product(node: fx.Node, ordered: Sequence[bool], region: _Region) -> None:
    mine = [True, False] if node.target is ROUTED_MM else [True, True]
    if list(ordered[:2]) != mine or _sorted_behind(node.args[2], region) is None:
        raise _OrderMattersError("a product whose groups are not counted from the sorted experts")
    region.products[node] = None
    if node.target is ROUTED_MM:
        region.rows[node] = None


def _sorted_behind(bounds: Any, region: _Region) -> fx.Node | None:
    """The count of rows per expert behind a product's bounds, where it is of the region's experts."""
    node = past(bounds, {aten.constant_pad_nd.default, *SAME_ENTRIES})
    if node.target is not aten.cumsum.default:
        return None
    counts = past(node.args[0], CASTS)
    of = counted_entries(counts, bounds.meta["val"].shape[1] - 1)
    if of is None:
        return None
    of = whole_numbers(of)
    from_sorted = of.target is operator.getitem and of.args == (region.sort, 0)
    return counts if from_sorted or of is whole_numbers(region.sort.args[0]) else None


@dataclass(frozen=True)
class _Move:
    """A look-up (`values` None) or a put of rows along dim 0."""

    x: fx.Node
    index: fx.Node
    values: fx.Node | None = None
    accumulate: bool = False


def _move(node: fx.Node) -> _Move | None:
    call, args = call_of(node), node.args
    if node.target is aten.index_select.default or node.target is aten.index_add.default:
        if args[1] not in (0, -args[0].meta["val"].dim()) or call.get("alpha", 1) != 1:  # type: ignore[union-attr]
            return None
        return _Move(args[0], args[2], args[3] if len(args) > 3 else None, True)  # type: ignore[arg-type]
    indices: Any = args[1]
    if len(indices) != 1 or indices[0].meta["val"].dim() != 1 or indices[0].meta["val"].dtype == torch.bool:
        return None
    values: Any = args[2] if node.target is aten.index_put.default else None
    if values is not None and values.meta["val"].shape[0:1] != indices[0].meta["val"].shape:
        return None
    return _Move(args[0], indices[0], values, bool(call.get("accumulate", False)))  # type: ignore[arg-type]


def _follow_move(node: fx.Node, move: _Move, region: _Region) -> bool:
    """Whether a look-up or a put is one of rows in the region's order, or back from it."""
    rows, places = region.rows, region.places
    if move.values is None:
        if move.x in rows and move.index in places:
            region.moves[node] = None
            return True
        if move.x not in rows and move.x not in places and move.index in rows:
            if region.index.get(move.index) == move.x.meta["val"].shape[0]:
                region.moves[node] = None
            rows[node] = None
            return True
        return False
    if move.x in rows or move.x in places:
        return False
    own = region.index.get(move.index) == move.x.meta["val"].shape[0]
    if own and move.values in rows and (move.accumulate or region.index[move.index] == region.size):
        region.moves[node] = None
        return True
    if own and region.index[move.index] == region.size and counts_up(move.values, region.size):
        region.moves[node] = None
        places[node] = None
        return True
    if move.index in places and move.values not in rows and move.values not in places and _constant(move.x):
        region.moves[node] = None
        rows[node] = None
        return True
    return False


def _constant(node: fx.Node) -> bool:
    """Whether all elements are equal."""
    return node.target in (aten.full.default, aten.zeros.default, aten.scalar_tensor.default) or (
        node.target in (aten.expand.default, aten.view.default, *CASTS) and _constant(node.args[0])  # type: ignore[arg-type]
    )


def _repeats(node: fx.Node, dim: int) -> bool:
    """Whether what it has along a dim is one and the same: the gradient of a sum or mean over all rows."""
    node = past(node, {aten.mul.Scalar, aten.div.Scalar, aten.neg.default, *CASTS})
    if node.target is not aten.expand.default:
        return False
    source: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    at = dim - node.meta["val"].dim() + source.dim()
    return at < 0 or int(source.shape[at]) == 1


def _follow_rows(node: fx.Node, ordered: Sequence[bool], region: _Region) -> bool:
    """Whether an op treats each row by itself, which makes its result rows; a reduction over all rows is no rows.

    Raises:
        _OrderMattersError: it does neither, or pairs rows with what stands in another order.
    """
    found = rule_of(node.target)
    if found is None:
        raise _OrderMattersError(f"{node.target} has no rule")
    form = found(call_of(node))
    operands = operand_nodes(node)
    factors = {_row_factor(form.operands[k]) for k, mine in enumerate(ordered) if mine}
    if len(factors) != 1 or None in factors:
        raise _OrderMattersError(f"{node.target} mixes rows")
    (factor,) = factors
    assert factor is not None
    for k, dims in enumerate(form.operands):
        along = None if ordered[k] else next((d for d, dim in enumerate(dims) if factor in dim), None)
        if along is not None and not _constant(operands[k]) and not _repeats(operands[k], along):
            raise _OrderMattersError(f"{node.target} pairs rows with something in another order")
    if factor in form.whole or factor in form.leading:
        raise _OrderMattersError(f"{node.target} mixes rows")
    kept = [_row_factor(dims) == factor for dims in form.results]
    if all(kept):
        region.rows[node] = None
        return True
    if any(kept) or factor not in form.reduces:
        raise _OrderMattersError(f"{node.target} mixes rows")
    return False


def _row_factor(dims: Sequence[Sequence[int]]) -> int | None:
    """The factor that dim 0 is; None where it is several, which would pair rows that stand side by side."""
    return dims[0][0] if dims and len(dims[0]) == 1 else None


# -------------------------------------------------------------------------------------------------------------- cutting
def _cut(region: _Region, blocks: int) -> None:
    """Make the region's sorts, counts, products and look-ups block by block."""
    for sort in [region.sort, *region.sorts]:
        _cut_sort(sort, region.size, blocks)
    bounds: dict[fx.Node, fx.Node] = {}
    for product in region.products:
        old: Any = product.args[2]
        if old not in bounds:
            bounds[old] = _counted(old, region, blocks)
        product.args = (*product.args[:2], bounds[old])
    for node in region.moves:
        move = _move(node)
        assert move is not None
        add = adder_before(node)
        if move.values is None:
            made = add(TAKE_ROWS, move.x, move.index, blocks)
        else:
            made = add(PUT_ROWS, move.x, move.index, move.values, blocks, move.accumulate)
        node.replace_all_uses_with(made)


def _cut_sort(sort: fx.Node, size: int, blocks: int) -> None:
    add = adder_before(sort)
    source: Any = sort.args[0]
    step = size // blocks
    table = add(aten.view.default, source, [blocks, step])
    made = add(sort.target, table, **({**sort.kwargs, "dim": 1}))
    values, indices = (add(operator.getitem, made, i) for i in (0, 1))
    starts = add(aten.arange.start_step, 0, size, step, dtype=torch.int64, device=torch.device("cpu"))
    places = add(aten.add.Tensor, indices, add(aten.view.default, starts, [blocks, 1]))
    flat = [add(aten.view.default, x, [size]) for x in (values, places)]
    sort.meta["by_blocks"] = flat[0]
    for user in list(sort.users):
        which: Any = user.args[1]
        user.replace_all_uses_with(flat[which])


def _counted(old: fx.Node, region: _Region, blocks: int) -> fx.Node:
    """The bounds of each block, counted from its sorted experts."""
    add = adder_before(old)
    ordered: fx.Node = region.sort.meta["by_blocks"]
    experts = old.meta["val"].shape[1] - 1
    table = add(aten.view.default, ordered, [blocks, region.size // blocks])
    each = add(aten.arange.start, 0, experts, dtype=ordered.meta["val"].dtype, device=torch.device("cpu"))
    asked = add(aten.expand.default, add(aten.view.default, each, [1, experts]), [blocks, experts])
    if not asked.meta["val"].is_contiguous():
        asked = add(aten.clone.default, asked, memory_format=torch.contiguous_format)
    ends = add(aten.searchsorted.Tensor, table, asked, right=True, out_int32=True)
    return add(aten.constant_pad_nd.default, ends, [1, 0], 0)
