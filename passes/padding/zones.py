"""What is known of the entries that padding adds to a tensor: a small abstract interpretation.

A *zone* is all entries of a tensor whose index along one padded dim lies beyond the dim's real size. It is

    a number       every entry is that number (0, -inf, True)
    "positive"     every entry is finite and above zero, "nonnegative" finite and at least zero, "finite" finite
    "edge"         every entry is finite, but a sum of two may not be (what is masked by the least float)
    "real"         copies of entries of a tensor that lacks the dim, which are no "nowhere"
    "nowhere"      an integer that no index or class equals (what `arange` gives there)
    "any"          nothing is known

Zones are what proves that padding does no harm: zero times finite adds nothing to a sum. Real entries count as finite:
where they are not, neither is the model's own result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from passes.rules.pointwise import pointwise
from passes.rules.table import rule_of

aten = torch.ops.aten

Zone = float | int | bool | str
_LARGE = torch.finfo(torch.float16).max
_FIRST_TIMES = {
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
    aten.leaky_relu_backward.default,
    aten.hardtanh_backward.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default,
    aten.elu_backward.default,
    aten.mish_backward.default,
}
"""The first operand times a finite function of the others."""
_KEEPS_FINITE = _FIRST_TIMES | {
    aten.neg.default,
    aten.abs.default,
    aten.sub.Tensor,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.mish.default,
    aten.softplus.default,
    aten.erf.default,
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.minimum.default,
    aten.maximum.default,
    aten.sin.default,
    aten.cos.default,
    aten.sign.default,
    aten.floor.default,
    aten.round.default,
    aten._to_copy.default,
    aten.clone.default,
    torch.ops.prims.convert_element_type.default,
}
_ADDITIONS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar}
_KEEPS_EDGES = _KEEPS_FINITE - _ADDITIONS - _FACTORS - _FIRST_TIMES - {aten.gelu.default, aten.elu.default}
_EQUALITIES = {aten.eq.Tensor, aten.ne.Tensor, aten.eq.Scalar, aten.ne.Scalar}
_COPIES = {
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    torch.ops.prims.convert_element_type.default,
}


def is_pointwise(target: Any) -> bool:
    """Whether each entry of the result follows from the operands' entries at the same place."""
    return rule_of(target) is pointwise


def is_number(zone: Zone) -> bool:
    """Whether the zone's entries are all one number."""
    return not isinstance(zone, str)


def is_zero(zone: Zone) -> bool:
    """Whether all entries are zero (or False)."""
    return not isinstance(zone, str) and zone == 0


def is_finite(zone: Zone) -> bool:
    """Whether all entries are finite for certain."""
    return zone != "any" if isinstance(zone, str) else math.isfinite(zone)


def is_edge(zone: Zone) -> bool:
    """Whether entries may be finite numbers so large that a sum of two is infinite in some dtype."""
    return zone == "edge" if isinstance(zone, str) else _LARGE <= abs(zone) < math.inf


def _nonnegative(zone: Zone) -> bool:
    return zone in ("nonnegative", "positive") if isinstance(zone, str) else 0 <= zone < math.inf


def _positive(zone: Zone) -> bool:
    return zone == "positive" if isinstance(zone, str) else 0 < zone < math.inf


def join(zones: Sequence[Zone]) -> Zone:
    """What holds of entries that come from any of `zones`."""
    first = zones[0]
    if all(type(zone) is type(first) and zone == first for zone in zones):
        return first
    if any(map(is_edge, zones)) and all(map(is_finite, zones)):
        return "edge"
    if all(map(_positive, zones)):
        return "positive"
    if all(map(_nonnegative, zones)):
        return "nonnegative"
    return "finite" if all(map(is_finite, zones)) else "any"


def unknown(dtype: torch.dtype) -> Zone:
    """The zone of entries about which nothing was found out."""
    return "any" if dtype.is_floating_point or dtype.is_complex else "finite"


def pointwise_zone(node: fx.Node, given: Sequence[Zone], dtypes: Sequence[torch.dtype], result: torch.dtype) -> Zone:
    """The zone of a pointwise op's result; `given` and `dtypes` are of its tensor operands in order."""
    zone = _of_some_operands(node, given, result)
    if zone is None and given and all(map(is_number, given)):
        zone = _computed(node, given, dtypes)
    if zone is None:
        zone = _of_all_operands(node, given)
    if zone == "edge" and any(_reach(dtype) > _reach(result) for dtype in dtypes):
        zone = "any"
    if zone == "positive" and any(_least(dtype) < _least(result) for dtype in dtypes):
        zone = "nonnegative"
    return "finite" if zone == "real" or (zone == "any" and unknown(result) == "finite") else zone


def _reach(dtype: torch.dtype) -> float:
    """The largest number of a floating dtype; 0 of another."""
    return torch.finfo(dtype).max if dtype.is_floating_point else 0.0


def _least(dtype: torch.dtype) -> float:
    """The smallest number above zero of a floating dtype, but for denormal ones; 1 of another."""
    return torch.finfo(dtype).tiny if dtype.is_floating_point else 1.0


def _computed(node: fx.Node, given: Sequence[Zone], dtypes: Sequence[torch.dtype]) -> Zone | None:
    """What the op itself makes of the operands' numbers; None where that is no number."""
    values = iter([torch.tensor(zone, dtype=dtype) for zone, dtype in zip(given, dtypes, strict=True)])

    def value(argument: Any) -> Any:
        return next(values) if isinstance(argument, fx.Node) else argument

    try:
        args = fx.map_arg(node.args, value)
        found = node.target(*args, **fx.map_arg(node.kwargs, value))  # type: ignore[operator]
        number: Zone = found.item()
    except (RuntimeError, TypeError, AttributeError, StopIteration, ValueError):
        return None
    return None if number != number else number


# --- where some operands decide -----------------------------------------------------------------------------------


def _of_some_operands(node: fx.Node, given: Sequence[Zone], result: torch.dtype) -> Zone | None:
    """The zone of an op whose result may follow from some of its operands; None where it does not."""
    target = node.target
    if target in _ANDS:
        return False if any(zone is False for zone in given) else None
    if target in _ORS:
        return True if any(zone is True for zone in given) and result is torch.bool else None
    zone_of = _BY_SOME_OPERANDS.get(target)
    return None if zone_of is None else zone_of(node, given)


def _where(node: fx.Node, given: Sequence[Zone]) -> Zone:
    return _chosen(*given)


def _masked_fill(node: fx.Node, given: Sequence[Zone]) -> Zone:
    value: Any = node.args[2]
    return _chosen(given[1], value, given[0])


def _chosen(condition: Zone, yes: Zone, no: Zone) -> Zone:
    if not is_number(condition):
        return join([yes, no])
    return yes if condition else no


def _equality(node: fx.Node, given: Sequence[Zone]) -> Zone | None:
    """An index that no row has equals no real one, and no number."""
    others = [zone for zone in given if zone != "nowhere"]
    apart = len(others) == len(given) - 1 and all(zone == "real" or is_number(zone) for zone in others)
    return node.target in (aten.ne.Tensor, aten.ne.Scalar) if apart else None


def _copy(node: fx.Node, given: Sequence[Zone]) -> Zone | None:
    copied = given[0]
    return copied if isinstance(copied, str) and copied != "nowhere" else None


def _product(node: fx.Node, given: Sequence[Zone]) -> Zone | None:
    """Zero times finite numbers is zero, and a square is not negative."""
    if any(map(is_zero, given)) and all(map(is_finite, given)):
        return 0
    if node.args[0] is node.args[1] and is_finite(given[0]) and not is_edge(given[0]):
        return "nonnegative"
    return None


def _first_times(node: fx.Node, given: Sequence[Zone]) -> Zone | None:
    zero = is_zero(given[0]) and all(map(is_finite, given)) and not any(map(is_edge, given))
    return 0 if zero else None


def _with_infinity(node: fx.Node, given: Sequence[Zone]) -> Zone | None:
    """One infinite operand of a sum or difference, the other one finite."""
    if len(given) != 2 or "alpha" in node.kwargs:
        return None
    infinite = [zone for zone in given if is_number(zone) and isinstance(zone, float) and math.isinf(zone)]
    if len(infinite) != 1 or not all(is_finite(zone) for zone in given if zone is not infinite[0]):
        return None
    return infinite[0] if infinite[0] is given[0] or node.target is aten.add.Tensor else -infinite[0]


_ANDS = {aten.logical_and.default, aten.bitwise_and.Tensor}
_ORS = {aten.logical_or.default, aten.bitwise_or.Tensor}
_BY_SOME_OPERANDS: dict[Any, Callable[[fx.Node, Sequence[Zone]], Zone | None]] = {
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    **dict.fromkeys(_EQUALITIES, _equality),
    **dict.fromkeys(_COPIES, _copy),
    aten.mul.Tensor: _product,
    **dict.fromkeys(_FIRST_TIMES, _first_times),
    aten.add.Tensor: _with_infinity,
    aten.sub.Tensor: _with_infinity,
}


# --- where all operands count -------------------------------------------------------------------------------------


def _of_all_operands(node: fx.Node, given: Sequence[Zone]) -> Zone:
    """What the zones of an op's operands, and the numbers among its arguments, tell of its result."""
    target = node.target
    numbers = [a for a in node.args if isinstance(a, int | float) and not isinstance(a, bool)]
    finite = all(map(is_finite, given))
    if any(map(is_edge, [*given, *numbers] if target in _ADDITIONS | _FACTORS else given)):
        return _of_edges(node, [*given, *numbers])
    zone_of = _BY_ALL_OPERANDS.get(target)
    zone = None if zone_of is None else zone_of(node, given, numbers)
    if zone is not None:
        return zone
    return "finite" if finite and target in _KEEPS_FINITE else "any"


def _of_edges(node: fx.Node, operands: Sequence[Zone]) -> Zone:
    edges = sum(map(is_edge, operands))
    kept = edges == 1 and "alpha" not in node.kwargs if node.target in _ADDITIONS else node.target in _KEEPS_EDGES
    return "edge" if kept and all(map(is_finite, operands)) else "any"


def _sum(node: fx.Node, given: Sequence[Zone], numbers: Sequence[float]) -> Zone | None:
    terms = [*given, *numbers]
    if "alpha" in node.kwargs or not all(map(_nonnegative, terms)):
        return None
    return "positive" if any(map(_positive, terms)) else "nonnegative"


def _multiple(node: fx.Node, given: Sequence[Zone], numbers: Sequence[float]) -> Zone | None:
    factors = [*given, *numbers]
    if not all(map(_nonnegative, factors)):
        return None
    return "positive" if all(map(_positive, factors)) else "nonnegative"


def _quotient(node: fx.Node, given: Sequence[Zone], numbers: Sequence[float]) -> Zone:
    operands = [*given, *numbers]
    if len(operands) < 2 or not all(map(is_finite, given)):
        return "any"
    dividend, divisor = operands[:2]
    if is_number(divisor) and divisor != 0:
        keeps_sign = _positive(divisor) and isinstance(dividend, str) and dividend != "nowhere"
        return dividend if keeps_sign else "finite"
    if _positive(divisor) or divisor == "real":  # where that is zero the model's own result is no number
        return 0 if is_zero(dividend) else "finite"
    return "any"


def _power(node: fx.Node, given: Sequence[Zone], numbers: Sequence[float]) -> Zone:
    if not numbers or numbers[0] < 0 or not all(map(is_finite, given)):
        return "any"
    if numbers[0] % 2 == 0:
        return "nonnegative"
    return "finite" if numbers[0] == int(numbers[0]) else "any"


def _root(node: fx.Node, given: Sequence[Zone], numbers: Sequence[float]) -> Zone | None:
    if _positive(given[0]):
        return "positive"
    return "nonnegative" if node.target is aten.sqrt.default and _nonnegative(given[0]) else None


_BY_ALL_OPERANDS: dict[Any, Callable[[fx.Node, Sequence[Zone], Sequence[float]], Zone | None]] = {
    aten.add.Tensor: _sum,
    aten.add.Scalar: _sum,
    **dict.fromkeys(_FACTORS, _multiple),
    aten.div.Scalar: _quotient,
    aten.div.Tensor: _quotient,
    aten.pow.Tensor_Scalar: _power,
    **dict.fromkeys([aten.rsqrt.default, aten.reciprocal.default, aten.sqrt.default], _root),
}
