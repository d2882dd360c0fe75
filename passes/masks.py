"""`use_causal_flag`: attention whose constant mask is causal, or lets everything through, without its mask.

    mask's nodes -> expression over small tensors -> bounds per tile of (queries, keys) -> the few mixed tiles exactly

Models that are captured without a mask of the user's write their own as an explicit (batch, 1, queries, keys) tensor.
Its values follow from the graph alone, so they are read here, and the kernel's flag takes its place where it says the
same. No tensor of that shape is ever made: a value is kept at size 1 along dims on which it is constant, and what is
large in spite of that is an expression over smaller tensors, of which bounds are known per tile. A causal mask is
mixed in the tiles on its diagonal alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.normalize import fingerprint
from passes.program import Program

aten = torch.ops.aten

_ATTENTION: dict[Any, int] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 6,
}
"""Fused attention -> position of `dropout_p`; `is_causal` follows it. Queries and keys come just before `value`."""
_QUERY: dict[Any, int] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 1,
}

_MASKED = -1e4
"""An added mask at or below this hides its key."""
_TILE = 256
_DIRECT = 2**18
"""Elements up to which a pointwise result is computed at once."""
_WHOLE = 2**24
"""Elements up to which a tensor is made for an op that is not pointwise."""
_MIXED = 2**28
"""Elements, over all mixed tiles, up to which a mask is looked at."""


def use_causal_flag(program: Program) -> Program:
    """Drop attention masks that depend on constants alone and are causal (`is_causal` is set) or hide nothing.

    Forward and backward calls of the CPU's fused kernel are changed alike; masks of any other kind stay, and so does a
    mask beside `is_causal`. What only dropped masks needed is removed, and the fingerprint renewed.
    """
    gm = program.graph
    calls = [(node, mask) for node in gm.graph.nodes if (mask := _only_mask(node)) is not None]
    constant = _constant_nodes(gm.graph)
    values = _values(gm, [mask for _, mask in calls if mask in constant])
    verdicts: dict[tuple[fx.Node, int, int], str] = {}
    changed = False
    for node, mask in calls:
        value = values.get(mask)
        if value is None:
            continue
        queries, keys = _lengths(node)
        key = (mask, queries, keys)
        if key not in verdicts:
            verdicts[key] = _verdict(value, queries, keys)
        if verdicts[key] != "other":
            _drop_mask(node, causal=verdicts[key] == "causal")
            changed = True
    if not changed:
        return program
    held = _attributes(gm.graph)
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for name in held - _attributes(gm.graph):
        if name in gm._buffers:
            del gm._buffers[name]
    gm.recompile()
    return dataclasses.replace(program, fingerprint=fingerprint(program))


def _only_mask(node: fx.Node) -> fx.Node | None:
    """The mask of a fused attention call that is not causal already."""
    at = _ATTENTION.get(node.target)
    if node.op != "call_function" or at is None:
        return None
    causal = node.args[at + 1] if len(node.args) > at + 1 else node.kwargs.get("is_causal", False)
    mask = node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) and causal is False else None


def _lengths(node: fx.Node) -> tuple[int, int]:
    at = _QUERY[node.target]
    query, key = node.args[at : at + 2]
    return int(query.meta["val"].shape[-2]), int(key.meta["val"].shape[-2])  # type: ignore[union-attr]


def _drop_mask(node: fx.Node, *, causal: bool) -> None:
    at = _ATTENTION[node.target]
    kwargs = dict(node.kwargs)
    del kwargs["attn_mask"]
    dropout = node.args[at] if len(node.args) > at else kwargs.get("dropout_p", 0.0)
    kwargs.pop("dropout_p", None)
    kwargs.pop("is_causal", None)
    node.args = (*node.args[:at], dropout, causal)
    node.kwargs = kwargs


def _attributes(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value no placeholder and no random number has a part in."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        called = node.op == "call_function" and not random and all(n in constant for n in node.all_input_nodes)
        if called or node.op == "get_attr":
            constant.add(node)
    return constant


# ------------------------------------------------------------------------------------------------------- expressions
class _UnknownError(Exception):
    """This value is not worked out: its op is not known here, or it is too large."""


@dataclass(frozen=True, slots=True, eq=False)
class _Leaf:
    """A tensor with size 1 along dims on which the value it stands for is known to be constant."""

    data: Tensor

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Apply:
    """A pointwise op on expressions and numbers, computed where it is needed; `extent` is its shape as computed."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extent: tuple[int, ...]


_Expr = _Leaf | _Apply


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """What a node yields: `expr`, expanded to `shape`, whose rank a leaf has; leaves under an op may have less."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    expr: _Expr


def _compute(expr: _Expr, at: Callable[[Tensor], Tensor]) -> Tensor:
    """The expression with `at` of each leaf in the leaf's place."""
    done: dict[int, Tensor] = {}

    def of(e: Any) -> Any:
        if not isinstance(e, (_Leaf, _Apply)):
            return e
        if id(e) not in done:
            done[id(e)] = (
                at(e.data)
                if isinstance(e, _Leaf)
                else e.op(*(of(a) for a in e.args), **{k: of(v) for k, v in e.kwargs.items()})
            )
        return done[id(e)]

    result: Tensor = of(expr)
    return result


def _force(value: _Value) -> Tensor:
    """The value as one tensor, of size 1 along constant dims."""
    if isinstance(value.expr, _Leaf):
        return value.expr.data
    if math.prod(value.expr.extent) > _WHOLE:
        raise _UnknownError
    return _collapsed(_compute(value.expr, lambda x: x))


def _collapsed(x: Tensor) -> Tensor:
    """`x` at size 1 along dims on which its entries are all the same, bit by bit."""
    if x.is_complex() or not 1 < x.numel() <= _WHOLE:
        return x
    bits = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    for dim in range(x.dim()):
        if bits.shape[dim] > 1 and bool((bits == bits.narrow(dim, 0, 1)).all()):
            bits, x = bits.narrow(dim, 0, 1), x.narrow(dim, 0, 1)
    return x.contiguous()


def _padded(x: Tensor, rank: int) -> Tensor:
    return x.reshape((1,) * (rank - x.dim()) + tuple(x.shape))


def _moved(value: _Value, move: Callable[[Tensor], Tensor]) -> _Expr:
    """The value after an op that only moves elements; `move` does it to a tensor that is `value` but for constant dims.

    It may be done to the leaves, since the ops above them are pointwise. Numbers (leaves without dims) stay so.
    """
    if isinstance(value.expr, _Leaf):
        return _Leaf(_collapsed(move(value.expr.data)))
    done: dict[int, _Expr] = {}

    def of(e: Any) -> Any:
        if isinstance(e, _Leaf):
            return e if not e.data.dim() else _Leaf(_collapsed(move(_padded(e.data, len(value.shape)))))
        if not isinstance(e, _Apply):
            return e
        if id(e) not in done:
            done[id(e)] = _apply(e.op, tuple(of(a) for a in e.args), {k: of(v) for k, v in e.kwargs.items()})
        return done[id(e)]

    result: _Expr = of(value.expr)
    return result


def _apply(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Expr:
    """A pointwise op on expressions and numbers: at once where that is small."""
    parts = [a for a in (*args, *kwargs.values()) if isinstance(a, (_Leaf, _Apply))]
    extent = tuple(torch.broadcast_shapes(*(p.extent for p in parts)))
    lazy = _Apply(op, args, kwargs, extent)
    if math.prod(extent) > _DIRECT or not all(isinstance(p, _Leaf) for p in parts):
        return lazy
    return _Leaf(_collapsed(_compute(lazy, lambda x: x)))


# -------------------------------------------------------------------------------------------------- the graph's nodes
def _values(gm: fx.GraphModule, masks: list[fx.Node]) -> dict[fx.Node, _Value]:
    """Values of the constant nodes that `masks` need, as far as they can be worked out."""
    needed: set[fx.Node] = set()
    stack = list(masks)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    values: dict[fx.Node, _Value] = {}
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


def _value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, _Value]) -> _Value:
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not all(type(n) is int and n > 0 for n in val.shape):
        raise _UnknownError
    expr = _constant(gm, node) if node.op == "get_attr" else _called(node, val, values)
    if _compute(expr, lambda x: x[(slice(0, 1),) * x.dim()]).dtype != val.dtype:
        raise _UnknownError  # it rests on a default that has changed since the capture
    return _Value(tuple(val.shape), val.dtype, expr)


def _constant(gm: fx.GraphModule, node: fx.Node) -> _Expr:
    data = gm.get_buffer(str(node.target))
    if type(data) is not Tensor or data.device.type != "cpu":
        raise _UnknownError
    return _Leaf(_collapsed(data.detach()))


def _called(node: fx.Node, val: Tensor, values: dict[fx.Node, _Value]) -> _Expr:
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
        return _Leaf(torch.full((1,) * len(shape), fill, dtype=val.dtype, device="cpu"))
    if op in _ARANGES:
        if math.prod(shape) > _WHOLE or any(isinstance(a, _Value) for a in args):
            raise _UnknownError
        return _Leaf(op(*args, dtype=val.dtype, device="cpu"))
    if op in _MOVES:
        return _moved(args[0], lambda x: _MOVES[op](x, args[0].shape, shape, *args[1:], **kwargs))
    if op in _TRIANGLES:
        return _triangle(args[0], _TRIANGLES[op], *args[1:], **kwargs)
    if op is aten.cumsum.default:
        x = _stretched(_force(args[0]), args[1], args[0].shape)
        return _Leaf(_collapsed(op(x, args[1], **kwargs)))
    if op is aten.cat.default:
        return _Leaf(_collapsed(_joined(shape, *args, **kwargs)))
    if torch.Tag.pointwise in op.tags or op in _POINTWISE:
        if any(isinstance(a, (list, tuple)) for a in args):
            raise _UnknownError
        plain = {k: a.expr if isinstance(a, _Value) else a for k, a in kwargs.items()}
        return _apply(op, tuple(a.expr if isinstance(a, _Value) else a for a in args), plain)
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
    if math.prod(old) > _WHOLE:
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
    if math.prod([*torch.broadcast_shapes(*shapes), *rest]) > _WHOLE:
        raise _UnknownError
    result: Tensor = aten.index.Tensor(x, forced)
    return result


_MOVES: dict[Any, Callable[..., Tensor]] = {
    aten.expand.default: lambda x, old, new, *_, **__: _padded(x, len(new)),
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


def _triangle(value: _Value, compare: Any, diagonal: int = 0) -> _Expr:
    """`tril` or `triu`: what is on the wrong side of the diagonal becomes 0."""
    ones = (1,) * (len(value.shape) - 2)
    rows, columns = (torch.arange(n, device="cpu") for n in value.shape[-2:])
    keep = _apply(compare, (_Leaf(columns.view(*ones, 1, -1)), _Leaf((rows + diagonal).view(*ones, -1, 1))), {})
    return _apply(aten.where.self, (keep, value.expr, _Leaf(torch.zeros((), dtype=value.dtype, device="cpu"))), {})


_TRIANGLES = {aten.tril.default: aten.le.Tensor, aten.triu.default: aten.ge.Tensor}


def _joined(shape: tuple[int, ...], parts: list[_Value], dim: int = 0) -> Tensor:
    """`cat`, of size 1 along dims that are constant in every part."""
    if any(len(p.shape) != len(shape) for p in parts):
        raise _UnknownError
    forced = [_stretched(_force(p), dim, p.shape) for p in parts]
    at = dim % len(shape)
    common = [max(x.shape[d] for x in forced) for d in range(len(shape))]
    if math.prod(common[:at] + common[at + 1 :]) * shape[at] > _WHOLE:
        raise _UnknownError
    return torch.cat([x.expand([x.shape[d] if d == at else n for d, n in enumerate(common)]) for x in forced], at)


def _stretched(x: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """`x` at its full size along `dim`."""
    if not shape:
        return x
    sizes = list(x.shape)
    sizes[dim] = shape[dim]
    if math.prod(sizes) > _WHOLE:
        raise _UnknownError
    return x.expand(sizes)


# ------------------------------------------------------------------------------------------------------ what it hides
def _verdict(mask: _Value, queries: int, keys: int) -> str:
    """ "causal": query i sees the keys up to i. "all": every key. "other": something else, or not known."""
    expr, dtype = mask.expr, mask.dtype
    if dtype is not torch.bool and not dtype.is_floating_point:
        return "other"
    tiles_down, tiles_across = -(-queries // _TILE), -(-keys // _TILE)
    lead = math.prod(expr.extent[:-2])
    if lead * max(tiles_down * tiles_across, _TILE**2) > _WHOLE:
        return "other"
    try:
        low, high = _bounds(expr)
    except RuntimeError:  # an op that has no value at some bound, such as a quotient by 0
        return "other"
    seen, hidden = (low, ~high) if dtype is torch.bool else ((low == 0) & (high == 0), high <= _MASKED)
    seen, hidden = (_over_lead(x, tiles_down, tiles_across) for x in (seen, hidden))

    down, across = torch.arange(tiles_down, device="cpu")[:, None], torch.arange(tiles_across, device="cpu")[None, :]
    causal = queries == keys and not bool(hidden[across < down].any()) and not bool(seen[across > down].any())
    everything = not bool(hidden.any())
    mixed = ~(seen | hidden) | (down == across)
    if lead * int(mixed.sum()) * _TILE**2 > _MIXED:
        return "other"
    for i, j in mixed.nonzero().tolist():
        if not (causal or everything):
            return "other"
        rows = slice(i * _TILE, min((i + 1) * _TILE, queries))
        columns = slice(j * _TILE, min((j + 1) * _TILE, keys))
        tile = _compute(expr, lambda x, rows=rows, columns=columns: _part(x, rows, columns))  # type: ignore[misc]
        sees, hides = (tile, ~tile) if dtype is torch.bool else (tile == 0, tile <= _MASKED)
        key, query = (torch.arange(part.start, part.stop, device="cpu") for part in (columns, rows))
        below = key <= query[:, None]
        everything = everything and bool(sees.all())
        causal = causal and bool(torch.where(below, sees, hides).all())
    return "all" if everything else "causal" if causal else "other"


def _part(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """Rows and columns of the last two dims, where `x` varies along them."""
    if x.dim() >= 1 and x.shape[-1] > 1:
        x = x[..., columns]
    return x[..., rows, :] if x.dim() >= 2 and x.shape[-2] > 1 else x


def _over_lead(x: Tensor, tiles_down: int, tiles_across: int) -> Tensor:
    """True for the tiles in which `x` is true whatever the batch and the head."""
    x = _padded(x, max(x.dim(), 2))
    return x.reshape(-1, *x.shape[-2:]).all(0).expand(tiles_down, tiles_across)


# ----------------------------------------------------------------------------------------------------- bounds by tile
_Pair = tuple[Any, Any]


def _bounds(expr: _Expr) -> tuple[Tensor, Tensor]:
    """Least and greatest value in each tile of the last two dims; they may be wider than the truth."""
    done: dict[int, _Pair] = {}

    def of(e: Any) -> _Pair:
        if not isinstance(e, (_Leaf, _Apply)):
            return e, e
        if id(e) not in done:
            if isinstance(e, _Leaf):
                done[id(e)] = (_by_tile(e.data, torch.amin), _by_tile(e.data, torch.amax))
            else:
                done[id(e)] = _op_bounds(e.op, [of(a) for a in e.args], {k: of(v) for k, v in e.kwargs.items()})
        return done[id(e)]

    return of(expr)


def _by_tile(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    for dim in (-1, -2):
        if x.dim() < -dim or x.shape[dim] == 1:
            continue
        size = x.shape[dim]
        whole = size - size % _TILE
        parts = []
        if whole:
            parts.append(reduce(x.narrow(dim, 0, whole).unflatten(dim, (-1, _TILE)), dim))
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
