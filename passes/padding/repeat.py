"""Grouped attention with keys and values repeated for every query head.

Where a mesh axis divides neither the key-value heads nor the query heads of each, fused grouped attention leaves it no
dim of heads to split. Repeated by an index, keys and values have the queries' heads as one dim, which the axis may
divide; the projections of keys and values then run whole on its ranks, and their gradients are sums over them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from passes.program.emit import ProgramWriter
from passes.program.program import Program

aten = torch.ops.aten
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_KEYS: dict[Any, tuple[int, int]] = {_FORWARD: (1, 2), _BACKWARD: (2, 3)}
"""Where keys and values stand among an attention's arguments."""


def grouped_heads(program: Program) -> frozenset[tuple[int, int]]:
    """(key-value heads, query heads of each) of every grouped attention."""
    found = set()
    for node in program.graph.graph.find_nodes(op="call_function", target=_FORWARD):
        heads, kv_heads = (int(x.meta["val"].shape[1]) for x in node.args[:2])
        if heads != kv_heads:
            found.add((kv_heads, heads // kv_heads))
    return frozenset(found)


def is_worth_repeating(program: Program, parts: int) -> bool:
    """Whether `parts` ranks could split the queries' heads with less padding than the heads of one group."""

    def larger(size: int) -> float:
        return -(-size // parts) * parts / size

    return any(
        kv_heads % parts and group % parts and larger(kv_heads * group) < larger(group)
        for kv_heads, group in grouped_heads(program)
    )


def repeat_keys(program: Program) -> Program:
    """The program with the keys and values of grouped attention repeated. It keeps its fingerprint."""
    emit = ProgramWriter(program)

    def write(node: fx.Node) -> fx.Node | None:
        if node.target not in _KEYS or _heads(node) is None:
            return None
        return _forward(emit, node) if node.target is _FORWARD else _backward(emit, node)

    return emit.written(write)


def _heads(node: fx.Node) -> tuple[int, int] | None:
    """(query heads, key-value heads) where they differ."""
    key = _KEYS[node.target][0]
    heads, kv_heads = (int(node.args[i].meta["val"].shape[1]) for i in (key - 1, key))  # type: ignore[union-attr]
    return (heads, kv_heads) if heads != kv_heads else None


def _repeated(emit: ProgramWriter, node: fx.Node) -> tuple[list[object], fx.Node]:
    """The attention's arguments with keys and values repeated, and the key-value head of each query head."""
    heads, kv_heads = _heads(node) or (1, 1)
    index = emit.call(aten.arange.start, 0, heads, dtype=torch.int64, device=torch.device("cpu"))
    index = emit.call(aten.div.Tensor_mode, index, heads // kv_heads, rounding_mode="floor")
    args: list[object] = list(fx.map_arg(node.args, emit.new.__getitem__))
    for place in _KEYS[node.target]:
        args[place] = emit.call(aten.index_select.default, args[place], 1, index)
    return args, index


def _forward(emit: ProgramWriter, node: fx.Node) -> fx.Node:
    args, _ = _repeated(emit, node)
    return emit.call(node.target, *args, **fx.map_arg(node.kwargs, emit.new.__getitem__))


def _backward(emit: ProgramWriter, node: fx.Node) -> fx.Node:
    """The gradients of repeated keys and values added up."""
    args, index = _repeated(emit, node)
    made = emit.call(node.target, *args, **fx.map_arg(node.kwargs, emit.new.__getitem__))
    for user in list(node.users):
        position = user.args[1]
        part = emit.call(operator.getitem, made, position)
        if position:
            shape = [int(n) for n in user.meta["val"].shape]
            zeros = emit.call(aten.full.default, shape, 0, dtype=user.meta["val"].dtype, device=torch.device("cpu"))
            part = emit.call(aten.index_add.default, zeros, 1, index, part)
        emit.new[user] = part
    return made
