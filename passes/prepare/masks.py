"""`use_causal_flag`: attention whose constant mask is causal, or lets everything through, without its mask.

    mask's nodes -> expression over small tensors -> bounds per tile of (queries, keys) -> the few mixed tiles exactly

Models that are captured without a mask of the user's write their own as an explicit (batch, 1, queries, keys) tensor.
Its values follow from the graph alone (`constant_values`), and the kernel's flag takes its place where it says the
same. Most tiles of a mask are all seen or all hidden, which their bounds tell (`tile_bounds`); the others, of a causal
mask those on its diagonal, are computed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from costmodel.compute import ATTENTION_ROWS
from passes.capture.normalize import fingerprint
from passes.prepare.constant_values import MOST_ELEMENTS, Value, compute, padded, values_of
from passes.prepare.tile_bounds import TILE, bounds
from passes.program.graphs import drop_unread
from passes.program.program import Program

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
    values = values_of(gm, [mask for _, mask in calls if mask in constant])
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
    return _without_dead(program) if changed else program


def masks_as_shares(program: Program) -> Program:
    """Drop every attention mask that depends on constants alone, as kernels have it that know windows by their size.

    Where it is neither causal nor hides nothing, the call's `seen` (`rules.call`) says which share of the blocks of
    queries and keys is not hidden as a whole. Queries are tied to their places then, as by a causal mask. For prices.
    """
    program = use_causal_flag(program)
    gm = program.graph
    calls = [(node, mask) for node in gm.graph.nodes if (mask := _only_mask(node)) is not None]
    constant = _constant_nodes(gm.graph)
    values = values_of(gm, [mask for _, mask in calls if mask in constant])
    shares: dict[fx.Node, float | None] = {}
    for node, mask in calls:
        if mask in values and mask not in shares:
            shares[mask] = _seen_share(values[mask], *_lengths(node))
        if (seen := shares.get(mask)) is not None:
            _drop_mask(node, causal=True)
            node.meta["seen"] = seen
    return _without_dead(program) if shares else program


def _without_dead(program: Program) -> Program:
    """Without what only dropped masks needed, and with a fingerprint of its own."""
    gm = program.graph
    held = _attributes(gm.graph)
    drop_unread(gm.graph)
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


# --- what a mask hides ------------------------------------------------------------------------------------------------


def _verdict(mask: Value, queries: int, keys: int) -> str:
    """ "causal": query i sees the keys up to i. "all": every key. "other": something else, or not known."""
    expr, dtype = mask.expr, mask.dtype
    if dtype is not torch.bool and not dtype.is_floating_point:
        return "other"
    tiles_down, tiles_across = -(-queries // TILE), -(-keys // TILE)
    lead = math.prod(expr.extent[:-2])
    if lead * max(tiles_down * tiles_across, TILE**2) > MOST_ELEMENTS:
        return "other"
    try:
        low, high = bounds(expr)
    except RuntimeError:  # an op that has no value at some bound, such as a quotient by 0
        return "other"
    seen, hidden = (low, ~high) if dtype is torch.bool else ((low == 0) & (high == 0), high <= _MASKED)
    seen, hidden = (_over_lead(x, tiles_down, tiles_across) for x in (seen, hidden))

    down, across = torch.arange(tiles_down, device="cpu")[:, None], torch.arange(tiles_across, device="cpu")[None, :]
    causal = queries == keys and not bool(hidden[across < down].any()) and not bool(seen[across > down].any())
    everything = not bool(hidden.any())
    mixed = ~(seen | hidden) | (down == across)
    if lead * int(mixed.sum()) * TILE**2 > _MIXED:
        return "other"
    for i, j in mixed.nonzero().tolist():
        if not (causal or everything):
            return "other"
        rows = slice(i * TILE, min((i + 1) * TILE, queries))
        columns = slice(j * TILE, min((j + 1) * TILE, keys))
        tile = compute(expr, lambda x, rows=rows, columns=columns: _part(x, rows, columns))  # type: ignore[misc]
        sees, hides = (tile, ~tile) if dtype is torch.bool else (tile == 0, tile <= _MASKED)
        key, query = (torch.arange(part.start, part.stop, device="cpu") for part in (columns, rows))
        below = key <= query[:, None]
        everything = everything and bool(sees.all())
        causal = causal and bool(torch.where(below, sees, hides).all())
    return "all" if everything else "causal" if causal else "other"


def _seen_share(mask: Value, queries: int, keys: int) -> float | None:
    """Of an attention kernel's blocks of scores, those that are not hidden as a whole; None where that is not known."""
    expr, block = mask.expr, ATTENTION_ROWS
    floating = mask.dtype.is_floating_point
    blocks = math.prod(expr.extent[:-2]) * -(-queries // block) * -(-keys // block)
    if (mask.dtype is not torch.bool and not floating) or blocks > MOST_ELEMENTS:
        return None
    try:
        _, high = bounds(expr, block)
    except RuntimeError:
        return None
    hidden = high <= _MASKED if floating else ~high
    return 1.0 - float(hidden.double().mean())


def _part(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """Rows and columns of the last two dims, where `x` varies along them."""
    if x.dim() >= 1 and x.shape[-1] > 1:
        x = x[..., columns]
    return x[..., rows, :] if x.dim() >= 2 and x.shape[-2] > 1 else x


def _over_lead(x: Tensor, tiles_down: int, tiles_across: int) -> Tensor:
    """True for the tiles in which `x` is true whatever the batch and the head."""
    x = padded(x, max(x.dim(), 2))
    return x.reshape(-1, *x.shape[-2:]).all(0).expand(tiles_down, tiles_across)
