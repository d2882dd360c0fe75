"""What an op asks of padding, and what it makes of it: by its factor form, and a table of the ops that sum or look up.

An op runs on a larger dim without harm where the dim's entries stay apart (every result keeps the factor), or where
what the added entries bring to a sum, maximum or look-up is nothing. `needs_of` says what must stand in them for that;
`result_zone` what then stands in the results'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from passes.analysis.dims import Atom
from passes.padding.zones import (
    Zone,
    is_edge,
    is_finite,
    is_number,
    is_pointwise,
    is_zero,
    join,
    pointwise_zone,
    unknown,
)
from passes.rules.call import Call, Operand
from passes.rules.create import FILLS
from passes.rules.form import Form
from passes.rules.table import rule_of
from passes.rules.work import VIEWS

aten = torch.ops.aten

Key = tuple[int, int]
"""(factor of the op's form, which of its atoms)."""
Part = tuple[int, int]
"""A part of a tensor's dim: (dim, position among the dim's atoms)."""


@dataclass(frozen=True)
class Reading:
    """An op with the parts of its factors that are to run padded, and where they stand in operands and results."""

    node: fx.Node
    call: Call
    form: Form
    keys: Mapping[Key, Atom]
    at_operands: tuple[Mapping[Key, Part], ...]
    at_results: tuple[Mapping[Key, Part], ...]

    def padded(self, positions: Mapping[Key, Part]) -> frozenset[Part]:
        """The places of an operand or result that are padded."""
        return frozenset(positions[key] for key in self.keys if key in positions)


@dataclass(frozen=True, slots=True)
class Need:
    """What must stand in an operand's added entries: zeros, anything finite, or what no maximum takes.

    "summable": anything of which sums are finite too. "product": zeros in this operand or in `other`, and both finite.
    """

    operand: int
    what: Literal["zero", "finite", "summable", "lowest", "product"]
    other: int = -1


_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_MAXIMA = {aten.amax.default, aten.max.default}
_PRODUCTS: dict[Any, tuple[int, int]] = {
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
"""Linear in their first operand, the gradient; all else in them is finite where sums of their operands are."""
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
_COUNTS = {*_PRODUCTS, *_SUMS, *_MAXIMA, aten.cumsum.default}
"""They run on whole numbers too, whatever these are."""
_ADDS_AT: dict[Any, int] = {aten.index_add.default: 2, aten.scatter_add.default: 2}


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
    if _runs_causal(reading, key):
        # A key that is not looked at counts zero times its value.
        return (
            _times_gradient(reading)
            if reading.node.target is _FLASH_BACKWARD
            else (Need(1, "summable"), Need(2, "finite"))
        )
    if key[0] in reading.form.whole or (key[1] and key[0] in reading.form.leading):
        return None
    if reading.node.target in _INDEXED | _ACCUMULATES:
        return _needs_of_indexed(reading, key)
    if any(key not in positions for positions in reading.at_results):
        return _needs_where_dropped(reading, key)
    return _needs_where_kept(reading, key)


def _needs_of_indexed(reading: Reading, key: Key) -> tuple[Need, ...] | None:
    """Of `x[indices]`, and of `x[indices] += values`."""
    have = _having(reading, key)
    if 0 in have and key[0] in reading.form.leading:
        return None  # an index from the end would mean another row
    if reading.node.target in _INDEXED:
        return _index_needs(reading, have)
    values = len(reading.at_operands) - 1
    if not reading.call.get("accumulate") or not {0, values} & set(have):
        return None  # added rows would not be zeros
    return (*_index_needs(reading, have), Need(values, "zero"))


def _needs_where_dropped(reading: Reading, key: Key) -> tuple[Need, ...] | None:
    """Where a result lacks the factor: its added entries are summed up, compared or looked up."""
    target, have = reading.node.target, _having(reading, key)
    if target in _PRODUCTS:
        a, b = _PRODUCTS[target]
        return (Need(a, "product", b),)
    if target in _SUMS:
        return (Need(0, "zero"),)
    if target in _MAXIMA:
        return (Need(0, "lowest"),)
    if target is aten.embedding_dense_backward.default and 0 in have:
        return (*_index_needs(reading, have), Need(0, "zero"))
    if target in _ADDS_AT:
        return (*_index_needs(reading, have), Need(_ADDS_AT[target], "zero"))
    if target in _INDEX_OPERANDS:
        return _index_needs(reading, have)
    return _times_gradient(reading) if target in _TIMES_GRADIENT else None


def _needs_where_kept(reading: Reading, key: Key) -> tuple[Need, ...] | None:
    """Where every result has the factor: entries stay apart, but some ops fail on what may stand in added ones."""
    target, have = reading.node.target, _having(reading, key)
    whole_numbers = [k for k in have if not reading.call.operands[k].dtype.is_floating_point]
    if target in _QUOTIENTS and 1 in whole_numbers:
        return None  # a whole number is not divided by an added zero
    if is_pointwise(target) or target in _MOVES or target in _MOVES_AMONG_ZEROS or target in FILLS:
        return ()
    if target in _INDEX_OPERANDS:
        return _index_needs(reading, have)
    if target in _DIVERGES:
        return (Need(0, "summable"),)
    return None if whole_numbers and target not in _COUNTS else ()


def _having(reading: Reading, key: Key) -> list[int]:
    """Operands that have the padded part."""
    return [k for k, positions in enumerate(reading.at_operands) if key in positions]


def _index_needs(reading: Reading, have: Sequence[int]) -> tuple[Need, ...]:
    """Added entries of indices are to name a row that there is."""
    return tuple(Need(k, "zero") for k in _indices(reading) if k in have)


def _times_gradient(reading: Reading) -> tuple[Need, ...]:
    floats = [k for k, facts in enumerate(reading.call.operands) if k and facts.dtype.is_floating_point]
    return (Need(0, "zero"), *(Need(k, "finite" if k == _mask_of(reading) else "summable") for k in floats))


def _mask_of(reading: Reading) -> int | None:
    """The operand that is only added to an attention's scores."""
    mask = reading.call.get("attn_mask")
    return mask.index if isinstance(mask, Operand) else None


def _indices(reading: Reading) -> tuple[int, ...]:
    """The operands that are indices."""
    target = reading.node.target
    if target in _INDEXED or target in _ACCUMULATES:
        found = reading.call.get("indices")
        return tuple(index.index for index in found if isinstance(index, Operand))
    return _INDEX_OPERANDS.get(target, ())


def _runs_causal(reading: Reading, key: Key) -> bool:
    """Queries and keys of a causal attention made longer alike: real queries do not look at what comes behind them."""
    call = reading.call
    if reading.node.target not in (_FLASH, _FLASH_BACKWARD):
        return False
    if not call.get("is_causal", False) or isinstance(call.get("attn_mask"), Operand):
        return False
    names = [n for n, argument in call.arguments.items() if isinstance(argument, Operand)]
    query_at, key_at = (reading.at_operands[names.index(n)] for n in ("query", "key"))
    atom = reading.keys[key]
    rows = {k for k, place in query_at.items() if place[0] == 2}
    columns = {k for k, place in key_at.items() if place[0] == 2}
    both = [{k for k in side if k in reading.keys and reading.keys[k] is atom} for side in (rows, columns)]
    return key in rows | columns and all(both) and len(rows) == len(columns) == 1


# --- what then stands in results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Padded:
    """An op that runs padded along `key`, and what stands in its operands' added entries there."""

    reading: Reading
    key: Key
    result: int
    """Which of its results is asked for."""
    given: Sequence[Zone]

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        facts = self.reading.call.results[self.result]
        assert facts is not None
        return facts.dtype

    @property
    def have(self) -> list[int]:
        """Operands that have the padded part."""
        return _having(self.reading, self.key)

    @property
    def own(self) -> Sequence[Zone]:
        """The zones of these; of all operands where none has it."""
        return [self.given[k] for k in self.have] or self.given

    @property
    def finite(self) -> bool:
        """Whether all operands are finite."""
        return all(map(is_finite, self.given))

    def finite_if(self, certain: bool) -> Zone:
        """Finite numbers where that is certain, else what the dtype tells alone."""
        return "finite" if certain else unknown(self.dtype)

    @property
    def summable(self) -> bool:
        """Whether sums of what the op multiplies are finite too; an attention's mask is added alone."""
        mask = _mask_of(self.reading)
        return self.finite and not any(is_edge(zone) for k, zone in enumerate(self.given) if k != mask)

    @property
    def sums(self) -> Zone:
        """Sums of operands, or of their products."""
        return self.finite_if(self.finite and not any(map(is_edge, self.given)))

    def sum_of(self, zones: Sequence[Zone]) -> Zone:
        """Sums of some of the entries of `zones`, or of none."""
        if all(map(is_zero, zones)):
            return 0
        return "nonnegative" if all(_above(zone) or is_zero(zone) for zone in zones) else self.sums


def _above(zone: Zone) -> bool:
    return zone in ("nonnegative", "positive")


def result_zone(reading: Reading, key: Key, result: int, given: Sequence[Zone]) -> Zone:
    """What stands in the added entries of a result along `key`; `given` what does in each operand's.

    An operand that lacks the dim has "real" there, or the number it consists of, or "finite" where "nowhere" stands in
    other added entries of it.
    """
    op, target = _Padded(reading, key, result, given), reading.node.target
    if target in FILLS:
        return fill_of(reading.node)
    if is_pointwise(target):
        return pointwise_zone(reading.node, given, [operand.dtype for operand in reading.call.operands], op.dtype)
    if (zone_of := _RESULTS.get(target)) is not None:
        return zone_of(op)
    if rule_of(target) is not None and str(target).startswith("autopar.uniform"):
        return "nonnegative"
    return unknown(op.dtype)


def _product(op: _Padded) -> Zone:
    factors = _PRODUCTS[op.reading.node.target]
    added = [zone for k, zone in enumerate(op.given) if k not in factors]
    zero = any(is_zero(op.given[k]) for k in factors) and all(map(is_zero, added))
    return 0 if zero and op.finite else op.sums


def _sum(op: _Padded) -> Zone:
    terms = op.given[0]
    return terms if is_zero(terms) or _above(terms) else op.sums


def _gradient(op: _Padded) -> Zone:
    """Linear in the gradient; a causal attention's columns have zeros in the gradient's rows, by `needs_of`."""
    columns = op.reading.node.target is _FLASH_BACKWARD and 0 not in op.have and op.key[0] in op.reading.form.whole
    return 0 if (is_zero(op.given[0]) or columns) and op.summable else op.sums


def _attention(op: _Padded) -> Zone:
    """The output, of which no more than the values is made, and sums of exponentials."""
    return 0 if op.result == 0 and op.summable and is_zero(op.given[2]) else op.finite_if(op.summable)


def _look_up(op: _Padded) -> Zone:
    return op.given[0] if 0 in op.have else op.finite_if(is_finite(op.given[0]))


def _add_at(op: _Padded) -> Zone:
    values = _ADDS_AT[op.reading.node.target]
    return op.sum_of([op.given[0], op.given[values]]) if values in op.have else op.given[0]


def _accumulate(op: _Padded) -> Zone:
    values = len(op.given) - 1
    if values in op.have:
        return op.sum_of([op.given[0], op.given[values]])
    # A value for many places is added in added ones too.
    return op.given[0] if is_zero(op.given[values]) else op.sums


_RESULTS: dict[Any, Callable[[_Padded], Zone]] = {
    **dict.fromkeys(_MOVES, lambda op: join(op.own)),
    **dict.fromkeys(_MOVES_AMONG_ZEROS, lambda op: join([*op.own, op.reading.call.get("value", 0)])),
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_MAXIMA, lambda op: op.given[0]),
    aten.embedding.default: lambda op: op.given[0] if 0 in op.have else "finite",
    aten.embedding_dense_backward.default: lambda op: op.sum_of([op.given[0]]) if 0 in op.have else 0,
    **dict.fromkeys(_TIMES_GRADIENT, _gradient),
    **dict.fromkeys(_NORMS, lambda op: op.sums),
    **dict.fromkeys(_SOFTMAX, lambda op: "nonnegative" if op.finite else unknown(op.dtype)),
    _FLASH: _attention,
    **dict.fromkeys(_LOOKUPS, _look_up),
    **dict.fromkeys(_ADDS_AT, _add_at),
    **dict.fromkeys(_ACCUMULATES, _accumulate),
}


def fill_of(node: fx.Node) -> Zone:
    """The number that a constructor fills its result with."""
    value = node.args[1] if node.target is aten.full.default and len(node.args) > 1 else None
    if node.target is aten.scalar_tensor.default:
        value = node.args[0]
    if isinstance(value, int | float) and is_number(value):
        return value
    return unknown(node.meta["val"].dtype)
