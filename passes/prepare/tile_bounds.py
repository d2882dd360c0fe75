"""Bounds of an expression over constants in each tile of its last two dims, without computing its elements.

A comparison of the queries' numbers with the keys', as causal masks are made, is decided in all tiles but those on the
diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passes.prepare.constant_values import Apply, Expr, Leaf

aten = torch.ops.aten

TILE = 256
"""Queries, and keys, of a tile."""

_Pair = tuple[Any, Any]


def bounds(expr: Expr, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Least and greatest value in each tile of the last two dims; they may be wider than the truth."""
    done: dict[int, _Pair] = {}

    def of(e: Any) -> _Pair:
        if not isinstance(e, (Leaf, Apply)):
            return e, e
        if id(e) not in done:
            if isinstance(e, Leaf):
                done[id(e)] = (_by_tile(e.data, torch.amin, tile), _by_tile(e.data, torch.amax, tile))
            else:
                done[id(e)] = _op_bounds(e.op, [of(a) for a in e.args], {k: of(v) for k, v in e.kwargs.items()})
        return done[id(e)]

    return of(expr)


def _by_tile(x: Tensor, reduce: Callable[..., Tensor], tile: int) -> Tensor:
    for dim in (-1, -2):
        if x.dim() < -dim or x.shape[dim] == 1:
            continue
        size = x.shape[dim]
        whole = size - size % tile
        parts = []
        if whole:
            parts.append(reduce(x.narrow(dim, 0, whole).unflatten(dim, (-1, tile)), dim))
        if whole < size:
            parts.append(reduce(x.narrow(dim, whole, size - whole), dim, keepdim=True))
        x = torch.cat(parts, dim)
    return x


def _op_bounds(op: Any, args: list[_Pair], kwargs: dict[str, _Pair]) -> _Pair:
    packet = op.overloadpacket
    if packet in _COMPARISONS and not kwargs:
        surely, never = _COMPARISONS[packet](args[0], args[1])
        return surely, ~never
    if packet in (aten.where, aten.masked_fill) and len(args) == 3:
        choice, a, b = args if packet is aten.where else (args[1], args[2], args[0])
        return _choice(op, choice, a, b, packet is aten.where)
    if packet in _MONOTONE and all(isinstance(low, Tensor) and low.dtype is torch.bool for low, _ in args):
        return op(*(low for low, _ in args)), op(*(high for _, high in args))
    if packet in (aten.logical_not, aten.bitwise_not) and args[0][0].dtype is torch.bool:
        return ~args[0][1], ~args[0][0]
    return _where_fixed(op, args, kwargs)


def _choice(op: Any, choice: _Pair, a: _Pair, b: _Pair, is_where: bool) -> _Pair:
    """Bounds of `a` where the choice is surely made, of `b` where it surely is not, else of both."""
    surely, maybe = choice

    def run(c: Tensor, yes: Any, no: Any) -> Tensor:
        result: Tensor = op(c, yes, no) if is_where else op(no, c, yes)
        return result

    no_choice, all_choice = torch.zeros_like(surely), torch.ones_like(surely)
    yes = run(all_choice, a[0], b[0]), run(all_choice, a[1], b[1])
    no = run(no_choice, a[0], b[0]), run(no_choice, a[1], b[1])
    low = torch.where(surely, yes[0], torch.where(maybe, torch.minimum(yes[0], no[0]), no[0]))
    high = torch.where(surely, yes[1], torch.where(maybe, torch.maximum(yes[1], no[1]), no[1]))
    return low, high


def _where_fixed(op: Any, args: list[_Pair], kwargs: dict[str, _Pair]) -> _Pair:
    """The op's value in tiles in which every operand has one value; in the others all its dtype can hold."""
    fixed = torch.ones((), dtype=torch.bool, device="cpu")
    for low, high in (*args, *kwargs.values()):
        if isinstance(low, Tensor):
            fixed = fixed & (low == high)
    exact = op(*(low for low, _ in args), **{k: low for k, (low, _) in kwargs.items()})
    least, most = _range(exact.dtype)
    return exact.masked_fill(~fixed, least), exact.masked_fill(~fixed, most)


def _range(dtype: torch.dtype) -> tuple[Any, Any]:
    if dtype is torch.bool:
        return False, True
    if dtype.is_floating_point:
        return -math.inf, math.inf
    if dtype.is_complex:
        return math.nan, math.nan
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _equal(a: _Pair, b: _Pair) -> tuple[Tensor, Tensor]:
    one = a[0] == a[1], b[0] == b[1]
    return (a[0] == b[0]) & one[0] & one[1], (a[1] < b[0]) | (a[0] > b[1])


def _unequal(a: _Pair, b: _Pair) -> tuple[Tensor, Tensor]:
    surely, never = _equal(a, b)
    return never, surely


# Operands' bounds -> where the comparison surely holds, where it surely does not.
_COMPARISONS: dict[Any, Callable[[_Pair, _Pair], tuple[Tensor, Tensor]]] = {
    aten.le: lambda a, b: (a[1] <= b[0], a[0] > b[1]),
    aten.lt: lambda a, b: (a[1] < b[0], a[0] >= b[1]),
    aten.ge: lambda a, b: (a[0] >= b[1], a[1] < b[0]),
    aten.gt: lambda a, b: (a[0] > b[1], a[1] <= b[0]),
    aten.eq: _equal,
    aten.ne: _unequal,
}
_MONOTONE = {aten.bitwise_and, aten.bitwise_or, aten.logical_and, aten.logical_or, aten.mul}
