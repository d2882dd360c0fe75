"""Values of a graph's constant nodes, in little memory.

    node -> expression over small tensors

A mask that a model writes is a (batch, 1, queries, keys) tensor whose values follow from the graph alone. No tensor of
that shape is ever made: a value is kept at size 1 along dims on which it is constant, and what is large in spite of
that is an expression over smaller tensors, which is computed where it is looked at (`compute`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_DIRECT = 2**18
"""Elements up to which a pointwise result is computed at once."""
MOST_ELEMENTS = 2**24
"""Elements up to which a tensor is made for an op that is not pointwise."""


# --- expressions ------------------------------------------------------------------------------------------------------


class _UnknownError(Exception):
    """This value is not worked out: its op is not known here, or it is too large."""


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A tensor with size 1 along dims on which the value it stands for is known to be constant."""

    data: Tensor

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Apply:
    """A pointwise op on expressions and numbers, computed where it is needed; `extent` is its shape as computed."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extent: tuple[int, ...]


Expr = Leaf | Apply


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What a node yields: `expr`, expanded to `shape`, whose rank a leaf has; leaves under an op may have less."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    expr: Expr


def compute(expr: Expr, at: Callable[[Tensor], Tensor]) -> Tensor:
    """The expression with `at` of each leaf in the leaf's place."""
    done: dict[int, Tensor] = {}

    def of(e: Any) -> Any:
        if not isinstance(e, (Leaf, Apply)):
            return e
        if id(e) not in done:
            done[id(e)] = (
                at(e.data)
                if isinstance(e, Leaf)
                else e.op(*(of(a) for a in e.args), **{k: of(v) for k, v in e.kwargs.items()})
            )
        return done[id(e)]

    result: Tensor = of(expr)
    return result


def _force(value: Value) -> Tensor:
    """The value as one tensor, of size 1 along constant dims."""
    if isinstance(value.expr, Leaf):
        return value.expr.data
    if math.prod(value.expr.extent) > MOST_ELEMENTS:
        raise _UnknownError
    return _collapsed(compute(value.expr, lambda x: x))


def _collapsed(x: Tensor) -> Tensor:
    """`x` at size 1 along dims on which its entries are all the same, bit by bit."""
    if x.is_complex() or not 1 < x.numel() <= MOST_ELEMENTS:
        return x
    bits = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    for dim in range(x.dim()):
        if bits.shape[dim] > 1 and bool((bits == bits.narrow(dim, 0, 1)).all()):
            bits, x = bits.narrow(dim, 0, 1), x.narrow(dim, 0, 1)
    return x.contiguous()


def padded(x: Tensor, rank: int) -> Tensor:
    return x.reshape((1,) * (rank - x.dim()) + tuple(x.shape))


def _moved(value: Value, move: Callable[[Tensor], Tensor]) -> Expr:
    """The value after an op that only moves elements; `move` does it to a tensor that is `value` but for constant dims.

    It may be done to the leaves, since the ops above them are pointwise. Numbers (leaves without dims) stay so.
    """
    if isinstance(value.expr, Leaf):
        return Leaf(_collapsed(move(value.expr.data)))
    done: dict[int, Expr] = {}

    def of(e: Any) -> Any:
        if isinstance(e, Leaf):
            return e if not e.data.dim() else Leaf(_collapsed(move(padded(e.data, len(value.shape)))))
        if not isinstance(e, Apply):
            return e
        if id(e) not in done:
            done[id(e)] = _apply(e.op, tuple(of(a) for a in e.args), {k: of(v) for k, v in e.kwargs.items()})
        return done[id(e)]

    result: Expr = of(value.expr)
    return result


def _apply(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expr:
    """A pointwise op on expressions and numbers: at once where that is small."""
    parts = [a for a in (*args, *kwargs.values()) if isinstance(a, (Leaf, Apply))]
    extent = tuple(torch.broadcast_shapes(*(p.extent for p in parts)))
    lazy = Apply(op, args, kwargs, extent)
    if math.prod(extent) > _DIRECT or not all(isinstance(p, Leaf) for p in parts):
        return lazy
    return Leaf(_collapsed(compute(lazy, lambda x: x)))


# --- the graph's nodes ------------------------------------------------------------------------------------------------


def values_of(gm: fx.GraphModule, masks: list[fx.Node]) -> dict[fx.Node, Value]:
    """Values of the constant nodes that `masks` need, as far as they can be worked out."""
    needed: set[fx.Node] = set()
    stack = list(masks)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    values: dict[fx.Node, Value] = {}
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node not in needed or any(n not in values for n in node.all_input_nodes):
                continue
            try:
                value = _value(gm, node, values)
            except _UnknownError:
                continue
            values[node] = value
    return values


def _value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not all(type(n) is int and n > 0 for n in val.shape):
        raise _UnknownError
    expr = _constant(gm, node) if node.op == "get_attr" else _called(node, val, values)
    if compute(expr, lambda x: x[(slice(0, 1),) * x.dim()]).dtype != val.dtype:
        raise _UnknownError  # it rests on a default that has changed since the capture
    return Value(tuple(val.shape), val.dtype, expr)


def _constant(gm: fx.GraphModule, node: fx.Node) -> Expr:
    data = gm.get_buffer(str(node.target))
    if type(data) is not Tensor or data.device.type != "cpu":
        raise _UnknownError
    return Leaf(_collapsed(data.detach()))


def _called(node: fx.Node, val: Tensor, values: dict[fx.Node, Value]) -> Expr:
    op: Any = node.target
    shape = tuple(val.shape)
    args: tuple[Any, ...] = fx.map_arg(node.args, lambda n: values[n])  # type: ignore[arg-type, return-value]
    kwargs: dict[str, Any] = fx.map_arg(node.kwargs, lambda n: values[n])  # type: ignore[arg-type, return-value]
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory", "memory_format")}
    if op in _COPIES:
        return args[0].expr  # type: ignore[no-any-return]
    if op in _FILLS:
        fill = kwargs.get("fill_value", args[-1]) if _FILLS[op] is None else _FILLS[op]
        if not isinstance(fill, (bool, int, float)):
            raise _UnknownError
        return Leaf(torch.full((1,) * len(shape), fill, dtype=val.dtype, device="cpu"))
    if op in _ARANGES:
        if math.prod(shape) > MOST_ELEMENTS or any(isinstance(a, Value) for a in args):
            raise _UnknownError
        return Leaf(op(*args, dtype=val.dtype, device="cpu"))
    if op in _MOVES:
        return _moved(args[0], lambda x: _MOVES[op](x, args[0].shape, shape, *args[1:], **kwargs))
    if op in _TRIANGLES:
        return _triangle(args[0], _TRIANGLES[op], *args[1:], **kwargs)
    if op is aten.cumsum.default:
        x = _stretched(_force(args[0]), args[1], args[0].shape)
        return Leaf(_collapsed(op(x, args[1], **kwargs)))
    if op is aten.cat.default:
        return Leaf(_collapsed(_joined(shape, *args, **kwargs)))
    if torch.Tag.pointwise in op.tags or op in _POINTWISE:
        if any(isinstance(a, (list, tuple)) for a in args):
            raise _UnknownError
        plain = {k: a.expr if isinstance(a, Value) else a for k, a in kwargs.items()}
        return _apply(op, tuple(a.expr if isinstance(a, Value) else a for a in args), plain)
    raise _UnknownError


_POINTWISE = {
    aten._to_copy.default,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.where.Scalar,
    aten.masked_fill.Tensor,
    aten.floor_divide.default,
}
"""Pointwise ops that are not tagged so."""
_COPIES = {aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
_FILLS: dict[Any, float | None] = {
    **dict.fromkeys([aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default]),
    **dict.fromkeys([aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default], 0.0),
    **dict.fromkeys([aten.ones.default, aten.ones_like.default, aten.new_ones.default], 1.0),
}
"""Op -> what it fills its result with; None: its last argument."""
_ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}


# A move takes the tensor (of size 1 along constant dims), the shape it stands for, and the result's shape.
def _move_slice(
    x: Tensor, old: Any, new: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    return x if x.shape[dim] == 1 else aten.slice.Tensor(x, dim, start, end, step)


def _move_view(x: Tensor, old: tuple[int, ...], new: tuple[int, ...], *_: Any, **__: Any) -> Tensor:
    if [n for n in old if n > 1] == [n for n in new if n > 1]:
        sizes = iter([have for have, n in zip(x.shape, old, strict=True) if n > 1])
        return x.reshape([next(sizes) if n > 1 else 1 for n in new])
    if x.numel() == 1:
        return x.reshape((1,) * len(new))
    if math.prod(old) > MOST_ELEMENTS:
        raise _UnknownError
    return x.expand(old).reshape(new)


def _move_squeeze(x: Tensor, old: tuple[int, ...], new: tuple[int, ...], *dims: Any) -> Tensor:
    chosen: Any = range(len(old)) if not dims else dims[0]
    at = {d % max(len(old), 1) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    return x.reshape([have for d, have in enumerate(x.shape) if d not in at or old[d] != 1])


def _move_index(x: Tensor, old: tuple[int, ...], new: tuple[int, ...], indices: Any) -> Tensor:
    forced: list[Tensor | None] = []
    for dim, index in enumerate(indices):
        at = None if index is None else _force(index)
        if at is not None and at.dtype in (torch.bool, torch.uint8):
            raise _UnknownError
        # A constant dim is read at 0, which leaves the index no dims to vary along.
        forced.append(at if at is None or x.shape[dim] > 1 else at.new_zeros((1,) * at.dim()))
    shapes = [tuple(i.shape) for i in forced if i is not None]
    rest = [n for d, n in enumerate(x.shape) if d >= len(forced) or forced[d] is None]
    if math.prod([*torch.broadcast_shapes(*shapes), *rest]) > MOST_ELEMENTS:
        raise _UnknownError
    result: Tensor = aten.index.Tensor(x, forced)
    return result


_MOVES: dict[Any, Callable[..., Tensor]] = {
    aten.expand.default: lambda x, old, new, *_, **__: padded(x, len(new)),
    aten.unsqueeze.default: lambda x, old, new, dim: x.unsqueeze(dim),
    aten.squeeze.default: _move_squeeze,
    aten.squeeze.dim: _move_squeeze,
    aten.squeeze.dims: _move_squeeze,
    aten.permute.default: lambda x, old, new, dims: x.permute(dims),
    aten.transpose.int: lambda x, old, new, a, b: x.transpose(a, b),
    aten.t.default: lambda x, old, new: x.t(),
    aten.flip.default: lambda x, old, new, dims: x.flip(dims),
    aten.slice.Tensor: _move_slice,
    aten.select.int: lambda x, old, new, dim, at: x.select(dim, 0 if x.shape[dim] == 1 else at),
    aten.view.default: _move_view,
    aten._unsafe_view.default: _move_view,
    aten.reshape.default: _move_view,
    aten.index.Tensor: _move_index,
}


def _triangle(value: Value, compare: Any, diagonal: int = 0) -> Expr:
    """`tril` or `triu`: what is on the wrong side of the diagonal becomes 0."""
    ones = (1,) * (len(value.shape) - 2)
    rows, columns = (torch.arange(n, device="cpu") for n in value.shape[-2:])
    keep = _apply(compare, (Leaf(columns.view(*ones, 1, -1)), Leaf((rows + diagonal).view(*ones, -1, 1))), {})
    return _apply(aten.where.self, (keep, value.expr, Leaf(torch.zeros((), dtype=value.dtype, device="cpu"))), {})


_TRIANGLES = {aten.tril.default: aten.le.Tensor, aten.triu.default: aten.ge.Tensor}


def _joined(shape: tuple[int, ...], parts: list[Value], dim: int = 0) -> Tensor:
    """`cat`, of size 1 along dims that are constant in every part."""
    if any(len(p.shape) != len(shape) for p in parts):
        raise _UnknownError
    forced = [_stretched(_force(p), dim, p.shape) for p in parts]
    at = dim % len(shape)
    common = [max(x.shape[d] for x in forced) for d in range(len(shape))]
    if math.prod(common[:at] + common[at + 1 :]) * shape[at] > MOST_ELEMENTS:
        raise _UnknownError
    return torch.cat([x.expand([x.shape[d] if d == at else n for d, n in enumerate(common)]) for x in forced], at)


def _stretched(x: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """`x` at its full size along `dim`."""
    if not shape:
        return x
    sizes = list(x.shape)
    sizes[dim] = shape[dim]
    if math.prod(sizes) > MOST_ELEMENTS:
        raise _UnknownError
    return x.expand(sizes)
