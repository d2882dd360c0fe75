"""What stands for each random op of torch: `autopar.uniform`, and ordinary ops that make its distribution of that."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.errors import UnsupportedOpError
from passes.program.adder import Adder
from passes.program.provenance import place_of
from passes.program.uniform import UNIFORM

aten = torch.ops.aten

_MIN = 2.0**-25
"""Half of the smallest positive uniform number: stands for 0 where 0 has no image."""


def unsupported(node: fx.Node, why: str) -> UnsupportedOpError:
    """The error for a random op that cannot be made equal on every mesh."""
    return UnsupportedOpError(f"{place_of(node)}: random op {node.target}: {why}")


@dataclass
class Draws:
    """Replaces one random op: adds ops before it and draws numbers with salts of its own."""

    node: fx.Node
    emit: Adder
    seed: fx.Node
    next_salt: Callable[[], int]

    @property
    def val(self) -> Any:
        """Fake value of the op that is replaced."""
        return self.node.meta["val"]

    def bits24(self, size: Sequence[int]) -> fx.Node:
        """float32 in [0, 1)."""
        return self.emit(UNIFORM, self.seed, self.next_salt(), list(size))

    def uniform(self, size: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Numbers in [0, 1), float64 of 48 bits where `dtype` is, else float32."""
        low = self.bits24(size)
        if dtype != torch.float64:
            return low
        high = self.emit(aten._to_copy.default, self.bits24(size), dtype=torch.float64)
        low = self.emit(aten._to_copy.default, low, dtype=torch.float64)
        return self.emit(aten.add.Tensor, high, self.emit(aten.mul.Tensor, low, 2.0**-24))

    def normal(self, size: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Standard normal numbers by the inverse of their distribution, symmetric about 0."""
        centre = 2.0**-48 if dtype == torch.float64 else 2.0**-24
        draw = self.emit(aten.mul.Tensor, self.uniform(size, dtype), 2.0)
        draw = self.emit(aten.add.Tensor, self.emit(aten.sub.Tensor, draw, 1.0), centre)
        return self.emit(aten.mul.Tensor, self.emit(aten.erfinv.default, draw), math.sqrt(2.0))

    def exponential(self, size: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Positive numbers with rate 1."""
        draw = self.emit(aten.clamp_min.default, self.uniform(size, dtype), _MIN)
        return self.emit(aten.neg.default, self.emit(aten.log1p.default, self.emit(aten.neg.default, draw)))

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` as `dtype`."""
        return node if node.meta["val"].dtype == dtype else self.emit(aten._to_copy.default, node, dtype=dtype)

    def scale(self, node: fx.Node, factor: Any, shift: Any) -> fx.Node:
        """`node * factor + shift`, numbers or nodes."""
        if factor is not None and not _is_number(factor, 1):
            node = self.emit(aten.mul.Tensor, node, factor)
        if shift is not None and not _is_number(shift, 0):
            node = self.emit(aten.add.Tensor, node, shift)
        return node

    def done(self, node: fx.Node) -> fx.Node:
        """`node` in the dtype of what it replaces."""
        return self.cast(node, self.val.dtype)


Arguments = Mapping[str, Any]
Replacement = fx.Node | tuple[fx.Node, ...]


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def _rand(draws: Draws, arguments: Arguments) -> Replacement:
    """Also of `uniform(self, from, to)`."""
    val, low, high = draws.val, arguments.get("from", 0.0), arguments.get("to", 1.0)
    draw = draws.uniform(val.shape, val.dtype)
    if val.dtype in (torch.bfloat16, torch.float16):
        # Rounding to few bits would give 1.0; cut instead.
        levels = 2.0 ** (8 if val.dtype == torch.bfloat16 else 11)
        draw = draws.emit(aten.mul.Tensor, draws.emit(aten.floor.default, draws.scale(draw, levels, 0)), 1 / levels)
    return draws.done(draws.scale(draw, high - low, low))


def _bernoulli(draws: Draws, arguments: Arguments) -> Replacement:
    chances = arguments.get("p", arguments["self"])
    draw = draws.uniform(draws.val.shape, draws.val.dtype)
    if isinstance(chances, fx.Node):
        return draws.done(draws.emit(aten.lt.Tensor, draw, chances))
    return draws.done(draws.emit(aten.lt.Scalar, draw, chances))


def _native_dropout(draws: Draws, arguments: Arguments) -> Replacement:
    x, p = arguments["input"], arguments["p"]
    keep = draws.emit(aten.ge.Scalar, draws.bits24(draws.val[0].shape), p)
    kept = draws.emit(aten.mul.Tensor, x, draws.cast(keep, draws.val[0].dtype))
    return draws.emit(aten.mul.Tensor, kept, 0.0 if p == 1 else 1.0 / (1.0 - p)), keep


def _normal(draws: Draws, arguments: Arguments) -> Replacement:
    draw = draws.normal(draws.val.shape, draws.val.dtype)
    return draws.done(draws.scale(draw, arguments.get("std", 1.0), arguments.get("mean", 0.0)))


def _log_normal(draws: Draws, arguments: Arguments) -> Replacement:
    draw = draws.normal(draws.val.shape, draws.val.dtype)
    draw = draws.scale(draw, arguments.get("std", 2.0), arguments.get("mean", 1.0))
    return draws.done(draws.emit(aten.exp.default, draw))


def _exponential(draws: Draws, arguments: Arguments) -> Replacement:
    draw = draws.exponential(draws.val.shape, draws.val.dtype)
    return draws.done(draws.scale(draw, 1.0 / arguments.get("lambd", 1.0), 0))


def _cauchy(draws: Draws, arguments: Arguments) -> Replacement:
    draw = draws.emit(aten.clamp_min.default, draws.uniform(draws.val.shape, draws.val.dtype), _MIN)
    angle = draws.emit(aten.mul.Tensor, draws.emit(aten.sub.Tensor, draw, 0.5), math.pi)
    draw = draws.emit(aten.tan.default, angle)
    return draws.done(draws.scale(draw, arguments.get("sigma", 1.0), arguments.get("median", 0.0)))


def _geometric(draws: Draws, arguments: Arguments) -> Replacement:
    p = arguments["p"]
    trials = draws.exponential(draws.val.shape, draws.val.dtype)
    # At p = 1 the rate of failing is infinite, and every first trial succeeds.
    rate = -math.log1p(-p) if p < 1 else math.inf
    trials = draws.emit(aten.ceil.default, draws.scale(trials, 1.0 / rate, 0))
    return draws.done(draws.emit(aten.clamp_min.default, trials, 1.0))


def _randint(draws: Draws, arguments: Arguments) -> Replacement:
    """`random(self, from, to)` too; without bounds, every integer that the dtype holds exactly and is not negative."""
    dtype = draws.val.dtype
    low = arguments.get("low", arguments.get("from")) or 0
    high = arguments.get("high", arguments.get("to"))
    if high is None:
        high = int(2 / torch.finfo(dtype).eps) + 1 if dtype.is_floating_point else torch.iinfo(dtype).max
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        raise unsupported(draws.node, "its bounds are tensors; pass numbers")
    if high - low > 1 << 47:
        if "from" in arguments or "to" in arguments or "high" in arguments:
            raise unsupported(draws.node, f"its range has {high - low} values; at most 2^47 are drawn")
        high = low + (1 << 47)
    # 24 bits over a small range leave less bias than 2^-8 of a value's chance; larger ranges take 48 bits.
    draw = draws.uniform(draws.val.shape, torch.float32 if high - low <= 1 << 16 else torch.float64)
    draw = draws.emit(aten.floor.default, draws.emit(aten.mul.Tensor, draw, float(high - low)))
    draw = draws.emit(aten._to_copy.default, draw, dtype=torch.int64)
    return draws.done(draws.scale(draw, 1, low))


def _randperm(draws: Draws, arguments: Arguments) -> Replacement:
    ordered = draws.emit(aten.sort.default, draws.uniform(draws.val.shape, torch.float64), 0)
    return draws.done(_item(draws, ordered, 1))


def _multinomial(draws: Draws, arguments: Arguments) -> Replacement:
    weights, count = arguments["self"], arguments["num_samples"]
    facts = weights.meta["val"]
    wide = torch.float64 if facts.dtype == torch.float64 else torch.float32
    weights = draws.cast(weights, wide)
    if not arguments.get("replacement", False) or count == 1:
        # The first of independent exponential clocks to ring, the second, ...: sampling without replacement.
        clocks = draws.exponential(facts.shape, wide)
        best = draws.emit(aten.topk.default, draws.emit(aten.div.Tensor, weights, clocks), count)
        return draws.done(_item(draws, best, 1))
    sums = draws.emit(aten.cumsum.default, weights, -1)
    total = draws.emit(aten.slice.Tensor, sums, facts.dim() - 1, facts.shape[-1] - 1, facts.shape[-1])
    points = draws.emit(aten.mul.Tensor, draws.uniform(draws.val.shape, wide), total)
    found = draws.emit(aten.searchsorted.Tensor, sums, points, right=True)
    return draws.done(draws.emit(aten.clamp_max.default, found, facts.shape[-1] - 1))


def _rrelu(draws: Draws, arguments: Arguments) -> Replacement:
    x = arguments["self"]
    lower, upper = arguments.get("lower", 0.125), arguments.get("upper", 1 / 3)
    dtype = draws.val[0].dtype
    slope = draws.cast(draws.scale(draws.uniform(draws.val[0].shape, dtype), upper - lower, lower), dtype)
    one = draws.emit(aten.full.default, [], 1.0, dtype=dtype, device=_device(draws))
    noise = draws.emit(aten.where.self, draws.emit(aten.le.Scalar, x, 0), slope, one)
    return draws.emit(aten.mul.Tensor, x, noise), noise


def _item(draws: Draws, node: fx.Node, position: int) -> fx.Node:
    return draws.emit(operator.getitem, node, position)


def _device(draws: Draws) -> torch.device:
    device: torch.device = draws.seed.meta["val"].device
    return device


REPLACED: dict[str, Callable[[Draws, Arguments], Replacement]] = {
    "aten::rand": _rand,
    "aten::rand_like": _rand,
    "aten::uniform": _rand,
    "aten::randn": _normal,
    "aten::randn_like": _normal,
    "aten::normal": _normal,
    "aten::normal_functional": _normal,
    "aten::log_normal": _log_normal,
    "aten::bernoulli": _bernoulli,
    "aten::native_dropout": _native_dropout,
    "aten::exponential": _exponential,
    "aten::cauchy": _cauchy,
    "aten::geometric": _geometric,
    "aten::randint": _randint,
    "aten::randint_like": _randint,
    "aten::random": _randint,
    "aten::randperm": _randperm,
    "aten::multinomial": _multinomial,
    "aten::rrelu_with_noise_functional": _rrelu,
}
"""By the name of the op's schema."""
