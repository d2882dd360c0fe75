"""What an op asks of padding, and what it makes of it: by its factor form, and a table of the ops that sum or look up.

An op runs on a larger dim without harm where the dim's entries stay apart (every result keeps the factor), or where
what the added entries bring to a sum, maximum or look-up is nothing. `needs_of` says what must stand in them for that;
`result_zone` what then stands in the results'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from passes.dims import Atom
from passes.rules.call import Call, Operand
from passes.rules.create import FILLS
from passes.rules.form import Form
from passes.rules.table import rule_of
from passes.work import VIEWS
from passes.zones import Zone, is_edge, is_finite, is_number, is_pointwise, is_zero, join, pointwise_zone, unknown

aten = torch.ops.aten

Key = tuple[int, int]
"""(factor of the op's form, which of its atoms)."""
Place = tuple[int, int]
"""A part of a tensor's dim: (dim, position among the dim's atoms)."""


@dataclass(frozen=True)
class Reading:
    """An op with the parts of its factors that are to run padded, and where they stand in operands and results."""

    node: fx.Node
    call: Call
    form: Form
    keys: Mapping[Key, Atom]
    at_operands: tuple[Mapping[Key, Place], ...]
    at_results: tuple[Mapping[Key, Place], ...]


@dataclass(frozen=True, slots=True)
class Need:
    """What must stand in an operand's added entries: zeros, anything finite, or what no maximum takes.

    "product": zeros in this operand or in `other`, and both finite.
    """

    operand: int
    what: Literal["zero", "finite", "lowest", "product"]
    other: int = -1


_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_MAXIMA = {aten.amax.default, aten.max.default}
_PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
_NORMS = {aten.native_layer_norm.default, aten._fused_rms_norm.default}
_TIMES_GRADIENT = {
    aten.native_layer_norm_backward.default,
    aten._fused_rms_norm_backward.default,
    _FLASH_BACKWARD,
    aten._softmax_backward_data.default,
}
"""Linear in their first operand, the gradient; all else in them is finite where their operands are."""
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
_MOVES = VIEWS | {
    aten.cat.default,
    aten.stack.default,
    aten.repeat.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.flip.default,
    aten.roll.default,
}
_MOVES_AMONG_ZEROS = {
    aten.constant_pad_nd.default,
    aten.slice_backward.default,
    aten.select_backward.default,
    aten.triu.default,
    aten.tril.default,
}
_INDEX_OPERANDS: dict[Any, tuple[int, ...]] = {
    aten.embedding.default: (1,),
    aten.embedding_dense_backward.default: (1,),
    aten.gather.default: (1,),
    aten.index_select.default: (1,),
    aten.index_add.default: (1,),
    aten.scatter_add.default: (1,),
}
_INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor}
_ACCUMULATES = {aten.index_put.default, aten._unsafe_index_put.default}
_QUOTIENTS = {
    aten.floor_divide.default,
    aten.div.Tensor_mode,
    aten.remainder.Tensor,
    aten.remainder.Scalar_Tensor,
    aten.fmod.Tensor,
}
_LOOKUPS = {aten.gather.default, aten.index_select.default, *_INDEXED}
_DIVERGES = {aten._linalg_eigh.default, aten._linalg_svd.default}
"""They raise where a matrix has an entry that is not finite."""
_ADDS_AT = {aten.index_add.default: 2, aten.scatter_add.default: 2}


def keeps_values(target: Any) -> bool:
    """Whether a tensor that is one number everywhere stays so."""
    return target in _MOVES or target in (aten.clone.default, aten._to_copy.default)


def looked_up(reading: Reading) -> int | None:
    """The dim of its first operand in which the op looks up what its second has; None where it does not.

    Advanced indexing never reads a padded dim.
    """
    if reading.node.target is aten.embedding.default:
        return 0
    if reading.node.target in (aten.gather.default, aten.index_select.default):
        return int(reading.call.get("dim")) % max(1, len(reading.call.operands[0].shape))
    return None


def needs_of(reading: Reading) -> dict[Key, tuple[Need, ...] | None]:
    """Per key what must stand in the operands' added entries; None where the op cannot run padded along it."""
    return {key: _needs(reading, key) for key in reading.keys}


def _needs(reading: Reading, key: Key) -> tuple[Need, ...] | None:
    target, form = reading.node.target, reading.form
    have = [k for k, positions in enumerate(reading.at_operands) if key in positions]
    lost = any(key not in positions for positions in reading.at_results)
    if target in (_FLASH, _FLASH_BACKWARD) and _runs_causal(reading, key):
        if target is _FLASH_BACKWARD:
            return _times_gradient(reading)
        return (Need(1, "finite"), Need(2, "finite"))  # a key that is not looked at counts zero times its value
    if key[0] in form.whole or (key[1] and key[0] in form.leading):
        return None
    if target in _QUOTIENTS and 1 in have and not reading.call.operands[1].dtype.is_floating_point:
        return None  # a whole number is not divided by an added zero
    if not lost and (is_pointwise(target) or target in _MOVES or target in _MOVES_AMONG_ZEROS or target in FILLS):
        return ()
    indices = tuple(Need(k, "zero") for k in _indices(reading) if k in have)
    if target in _INDEXED | _ACCUMULATES:
        if 0 in have and key[0] in form.leading:
            return None  # an index from the end would mean another row
        if target in _INDEXED:
            return indices
        values = len(reading.at_operands) - 1
        if not reading.call.get("accumulate") or not {0, values} & set(have):
            return None  # added rows would not be zeros
        return (*indices, Need(values, "zero"))
    if target in _PRODUCTS and lost:
        a, b = _PRODUCTS[target]
        return (Need(a, "product", b),)
    if target in _SUMS and lost:
        return (Need(0, "zero"),)
    if target in _MAXIMA and lost:
        return (Need(0, "lowest"),)
    if target is aten.embedding_dense_backward.default:
        return (*indices, Need(0, "zero")) if 0 in have and lost else indices
    if target in _ADDS_AT:
        return (*indices, Need(_ADDS_AT[target], "zero")) if lost else indices
    if target in _INDEX_OPERANDS:
        return indices
    if lost:
        return _times_gradient(reading) if target in _TIMES_GRADIENT else None
    if target in _DIVERGES:
        return (Need(0, "finite"),)
    whole_numbers = any(not reading.call.operands[k].dtype.is_floating_point for k in have)
    return None if whole_numbers and not _is_known(target) else ()


def _is_known(target: Any) -> bool:
    return target in _PRODUCTS or target in _SUMS or target in _MAXIMA or target in (aten.cumsum.default,)


def _times_gradient(reading: Reading) -> tuple[Need, ...]:
    floats = [k for k, facts in enumerate(reading.call.operands) if k and facts.dtype.is_floating_point]
    return (Need(0, "zero"), *(Need(k, "finite") for k in floats))


def _indices(reading: Reading) -> tuple[int, ...]:
    target = reading.node.target
    if target in _INDEXED or target in _ACCUMULATES:
        found = reading.call.get("indices")
        return tuple(index.index for index in found if isinstance(index, Operand))
    return _INDEX_OPERANDS.get(target, ())


def _runs_causal(reading: Reading, key: Key) -> bool:
    """Queries and keys of a causal attention made longer alike: real queries do not look at what comes behind them."""
    call = reading.call
    if not call.get("is_causal", False) or isinstance(call.get("attn_mask"), Operand):
        return False
    names = [n for n, argument in call.arguments.items() if isinstance(argument, Operand)]
    query_at, key_at = (reading.at_operands[names.index(n)] for n in ("query", "key"))
    atom = reading.keys[key]
    rows = {k for k, place in query_at.items() if place[0] == 2}
    columns = {k for k, place in key_at.items() if place[0] == 2}
    both = [{k for k in side if k in reading.keys and reading.keys[k] is atom} for side in (rows, columns)]
    return key in rows | columns and all(both) and len(rows) == len(columns) == 1


def result_zone(reading: Reading, key: Key, result: int, given: Sequence[Zone]) -> Zone:
    """What stands in the added entries of a result along `key`; `given` what does in each operand's.

    An operand that lacks the dim has "real" there, or the number it consists of, or "finite" where "nowhere" stands in
    other added entries of it.
    """
    node, target = reading.node, reading.node.target
    facts = reading.call.results[result]
    assert facts is not None
    have = [k for k, positions in enumerate(reading.at_operands) if key in positions]
    mine = [given[k] for k in have]
    finite = all(map(is_finite, given))
    summable = finite and not any(map(is_edge, given))
    nothing = unknown(facts.dtype)
    if target in FILLS:
        return fill_of(node)
    if is_pointwise(target):
        return pointwise_zone(node, given, [operand.dtype for operand in reading.call.operands], facts.dtype)
    if target in _MOVES:
        return join(mine or list(given))
    if target in _MOVES_AMONG_ZEROS:
        return join([*(mine or given), reading.call.get("value", 0)])
    if target in _PRODUCTS:
        factors = _PRODUCTS[target]
        added = [zone for k, zone in enumerate(given) if k not in factors]
        zero = any(is_zero(given[k]) for k in factors) and all(map(is_zero, added))
        return 0 if zero and finite else _rest(summable, nothing)
    if target in _SUMS:
        return given[0] if is_zero(given[0]) or given[0] in ("nonnegative", "positive") else _rest(summable, nothing)
    if target in _MAXIMA:
        return given[0]
    if target is aten.embedding.default:
        return given[0] if 0 in have else "finite"
    if target is aten.embedding_dense_backward.default:
        return _added([given[0]], summable, nothing) if 0 in have else 0
    if target in _TIMES_GRADIENT:
        # A causal attention's columns: the gradient's rows there are zero, by what `needs_of` asks.
        zero = is_zero(given[0]) or (target is _FLASH_BACKWARD and 0 not in have and key[0] in reading.form.whole)
        return 0 if zero and finite else _rest(summable, nothing)
    if target in _NORMS:
        return _rest(summable, nothing)
    if target in _SOFTMAX:
        return "nonnegative" if finite else nothing
    if target is _FLASH:
        return 0 if result == 0 and finite and is_zero(given[2]) else _rest(finite, nothing)
    if target in _LOOKUPS:
        return given[0] if 0 in have else _rest(is_finite(given[0]), nothing)
    if target in _ADDS_AT or target in _ACCUMULATES:
        values = _ADDS_AT.get(target, len(given) - 1)
        if target in _ACCUMULATES and values not in have and not is_zero(given[values]):
            return _rest(summable, nothing)  # a value for many places is added in added ones too
        return given[0] if values not in have else _added([given[0], given[values]], summable, nothing)
    if rule_of(target) is not None and str(target).startswith("autopar.uniform"):
        return "nonnegative"
    return nothing


def _added(zones: Sequence[Zone], summable: bool, nothing: Zone) -> Zone:
    """Of sums of some of such entries, or of none."""
    if all(map(is_zero, zones)):
        return 0
    above = all(zone in ("nonnegative", "positive") or is_zero(zone) for zone in zones)
    return "nonnegative" if above else _rest(summable, nothing)


def _rest(finite: bool, nothing: Zone) -> Zone:
    return "finite" if finite else nothing


def fill_of(node: fx.Node) -> Zone:
    """The number that a constructor fills its result with."""
    value = node.args[1] if node.target is aten.full.default and len(node.args) > 1 else None
    if node.target is aten.scalar_tensor.default:
        value = node.args[0]
    if isinstance(value, int | float) and is_number(value):
        return value
    return unknown(node.meta["val"].dtype)
