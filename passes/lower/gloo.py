"""Collectives as gloo runs them fast: a rewrite of a rank's graph for CPU ranks.

    reduce_scatter              all_to_all of the chunks, then their sum
    reduce_scatter of many      the same of one packed tensor
    all_reduce of many          all_reduce of one table, into which products are written in place
    all_gather between regions  a broadcast from each rank, of all it has, to where it is received

Gloo reduces whole tensors for a reduce-scatter and then drops what is another rank's, and it takes a list one tensor
after the other. Its all-gather copies what it was given and all that it received; a broadcast is received in place, and
took two thirds of the processor's time. What a rank sends stays what a ring sends. NCCL groups a list without packing
it, so a graph for CUDA stays as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.distributed import distributed_c10d

from passes.lower.outer import Planned, op_step
from passes.program.local import TOGETHER, WAIT

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
_SCATTER, _REDUCE = c10d.reduce_scatter_tensor.default, c10d.all_reduce.default
_GATHER = c10d.all_gather_into_tensor.default
_TERMS: dict[Any, Any] = {"sum": aten.sum.dim_IntList, "avg": aten.mean.dim}


def for_gloo(gm: fx.GraphModule) -> None:
    """Rewrites the collectives of `gm` that gloo is slow at, in place."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.target is TOGETHER[_REDUCE]:
            _reduced(graph, node)
        elif node.target in (_SCATTER, TOGETHER[_SCATTER]) and node.args[1] in _TERMS:
            _scattered(graph, node)
    graph.lint()
    gm.recompile()


def gloo_step(node: fx.Node) -> Planned | None:
    """A node between regions as a step; None for an item of a gather, which the wait for it takes from the whole."""
    gather = _gather_of(node)
    if gather is None:
        return op_step(node)
    operands: Any = gather.args[0]
    shards = list(operands) if isinstance(operands, list | tuple) else [operands]
    if node is gather:
        return Planned(gathered, (shards, *node.args[1:]), {}, (node,), False)
    if node.target is not WAIT:
        return None
    (item,) = node.all_input_nodes
    index: Any = 0 if item is gather else item.args[1]
    sizes = [_shape(shard).numel() for shard in shards]
    part = sum(sizes[:index]), sizes[index], tuple(_shape(node))
    return Planned(received, (gather, *part), {}, (node,), False)


def _gather_of(node: fx.Node) -> fx.Node | None:
    """The gather that a node is, picks from or waits for."""
    while node.target in (WAIT, operator.getitem):
        (node,) = node.all_input_nodes
    return node if node.target in (_GATHER, TOGETHER[_GATHER]) else None


def gathered(shards: Sequence[torch.Tensor], ranks: int, group: str) -> torch.Tensor:
    """A row per rank with all its `shards`, flat, one behind the other; under way to here."""
    size = sum(shard.numel() for shard in shards)
    rows = shards[0].new_empty((ranks, size))
    if size:
        torch.cat([shard.view(-1) for shard in shards], out=rows[_rank(group)])
        for rank, row in enumerate(rows.view(torch.uint8).unbind()):  # gloo does not know all dtypes
            c10d.broadcast_.default(row, rank, group)
    return rows


def _rank(group: str) -> int:
    """This process's place in a group."""
    found: int = distributed_c10d._resolve_process_group(group).rank()  # type: ignore[attr-defined, arg-type]
    return found


def received(rows: torch.Tensor, start: int, size: int, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of `shape` from what all ranks have of it: `size` entries of each of `rows`, once they are here."""
    return WAIT(rows)[:, start : start + size].reshape(shape).contiguous()  # type: ignore[no-any-return]


def _reduced(graph: fx.Graph, node: fx.Node) -> None:
    operands: Any = node.args[0]
    shapes = [_shape(x) for x in operands]
    width = _common_width(shapes)
    rows = [shape.numel() // width for shape in shapes]
    with graph.inserting_before(node):
        parts = [
            x if shape == (count, width) else _call(node, aten.view.default, x, [count, width])
            for x, shape, count in zip(operands, shapes, rows, strict=True)
        ]
        packed = _call(node, aten.cat.default, parts)
        made = _call(node, _REDUCE, packed, *node.args[1:])
    waits = _waits(node)
    with graph.inserting_before(waits[0]):
        summed = _call(node, aten.split_with_sizes.default, _call(node, WAIT, made), rows)
    _replace(graph, node, waits, summed, shapes)


def _common_width(shapes: Sequence[torch.Size]) -> int:
    """The columns of a table that holds tensors of all `shapes` in whole rows, and most of their entries as they lie.

    Inductor has a product write its rows right into such a table; what has to be viewed otherwise is copied there.
    """
    entries: Counter[int] = Counter()
    for shape in shapes:
        if len(shape) == 2 and shape[1] and not any(other.numel() % shape[1] for other in shapes):
            entries[shape[1]] += shape.numel()
    return entries.most_common(1)[0][0] if entries else 1


def _scattered(graph: fx.Graph, node: fx.Node) -> None:
    operands, op, ranks, group = node.args
    assert isinstance(ranks, int)
    waits = _waits(node)
    shapes = [_shape(wait) for wait in waits]
    with graph.inserting_before(node):
        xs: Any = operands if node.target is not _SCATTER else [operands]
        rows = [_call(node, aten.view.default, x, [ranks, _shape(x).numel() // ranks]) for x in xs]
        packed = rows[0] if len(rows) == 1 else _call(node, aten.cat.default, rows, 1)
        made = _call(node, c10d.all_to_all_single.default, packed, [1] * ranks, [1] * ranks, group)
    with graph.inserting_before(waits[0]):
        whole = _call(node, _TERMS[op], _call(node, WAIT, made), [0])
        if (dtype := packed.meta["val"].dtype) != whole.meta["val"].dtype:  # torch adds whole numbers up in int64
            whole = _call(node, aten._to_copy.default, whole, dtype=dtype)
        parts = _call(node, aten.split_with_sizes.default, whole, [shape.numel() for shape in shapes])
    _replace(graph, node, waits, parts, shapes)


def _waits(node: fx.Node) -> list[fx.Node]:
    """The waits for what a collective brings, one per tensor."""
    items = [user for user in node.users if user.target is operator.getitem]
    items.sort(key=lambda item: item.args[1])  # type: ignore[arg-type, return-value]
    waits = [user for item in items or [node] for user in item.users]
    if any(wait.target is not WAIT for wait in waits):
        raise AssertionError(f"{node.name}: a collective's result is read before it is waited for")
    return waits


def _replace(
    graph: fx.Graph, node: fx.Node, waits: Sequence[fx.Node], parts: fx.Node, shapes: Sequence[torch.Size]
) -> None:
    """Puts `parts` in `shapes` where the results of the collective `node` were waited for."""
    for index, (wait, shape) in enumerate(zip(waits, shapes, strict=True)):
        with graph.inserting_before(wait):
            part = _call(wait, operator.getitem, parts, index)
            wait.replace_all_uses_with(_call(wait, aten.view.default, part, list(shape)))
        items = wait.all_input_nodes
        graph.erase_node(wait)
        if items[0] is not node:
            graph.erase_node(items[0])
    graph.erase_node(node)


def _shape(node: fx.Node) -> torch.Size:
    size: torch.Size = node.meta["val"].shape
    return size


def _call(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node, with the metadata of `like` but its own fake value."""
    made = like.graph.call_function(target, args, kwargs)
    made.meta = dict(like.meta)
    with torch.no_grad():
        made.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]), **kwargs)
    return made
