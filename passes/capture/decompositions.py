"""Ops that capture replaces by simpler ones, so that a table of sharding rules stays short.

Each function takes the op's arguments and calls other aten ops, which the tracer records. They are chosen so that

- a sharded class (vocabulary) dim of a cross-entropy needs only pointwise ops and reductions: the target's logit is
  picked by comparing an `arange` along the classes with the target, never by a gather; so does their `logsumexp`;
- an op yields one tensor (`split`, `unbind` become slices and selects);
- constructors are `full` and `arange`, random ops are `rand`, `randn` and the like, all else is pointwise;
- a bias is added by a pointwise op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan, prod
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten
Recorded = Any
"""A tensor; torch.ops has no types."""
_NONE, _MEAN, _SUM = 0, 1, 2
_LOW_PRECISION = (torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------- log-softmax
def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Recorded:
    dtype = torch.float32 if half_to_float else x.dtype
    x = _cast(x, torch.float32) if x.dtype in _LOW_PRECISION else x
    if x.dim() == 0:
        return aten.full.default([], 0.0, dtype=dtype, device=x.device)
    shifted = aten.sub.Tensor(x, aten.amax.default(x, [dim], True))
    total = aten.sum.dim_IntList(aten.exp.default(shifted), [dim], True)
    return _cast(aten.sub.Tensor(shifted, aten.log.default(total)), dtype)


def _log_softmax_backward(grad: Tensor, out: Tensor, dim: int, input_dtype: torch.dtype) -> Recorded:
    total = aten.sum.dim_IntList(grad, [dim], True)
    return _cast(aten.sub.Tensor(grad, aten.mul.Tensor(aten.exp.default(out), total)), input_dtype)


def _logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Recorded:
    if not x.dtype.is_floating_point or not x.numel():
        return NotImplemented
    dtype, dims = x.dtype, list(dim) or list(range(x.dim()))
    x = _cast(x, torch.float32) if dtype in _LOW_PRECISION else x
    most = aten.amax.default(x, dims, True)
    most = aten.where.self(aten.eq.Scalar(aten.abs.default(most), inf), _zero(x), most)
    total = aten.sum.dim_IntList(aten.exp.default(aten.sub.Tensor(x, most)), dims, keepdim)
    most = most if keepdim else aten.view.default(most, list(total.shape))
    return _cast(aten.add.Tensor(aten.log.default(total), most), dtype)


# -------------------------------------------------------------------------------------- negative log-likelihood
def _is_target(x: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Mask of `x`'s shape, true where the class is the target; and the class dim."""
    dim = 0 if x.dim() == 1 else 1
    _check_target(target, (*x.shape[:dim], *x.shape[dim + 1 :]))
    classes = aten.arange.default(x.shape[dim], dtype=target.dtype, device=x.device)
    if x.dim() > dim + 1:
        classes = aten.view.default(classes, [-1] + [1] * (x.dim() - dim - 1))
    return aten.eq.Tensor(aten.unsqueeze.default(target, dim), classes), dim


def _check_target(target: Tensor, shape: tuple[int, ...]) -> None:
    """Raises RuntimeError for targets that torch's kernels refuse, as fake ones do not."""
    if target.dtype.is_floating_point or target.dtype == torch.bool:
        raise RuntimeError(f"targets in {target.dtype} are no classes; give integers, as in target.long()")
    if tuple(target.shape) != shape:
        raise RuntimeError(f"targets have shape {tuple(target.shape)} where the scores want one each, {shape}")


def _zero(like: Tensor) -> Recorded:
    return aten.full.default([], 0.0, dtype=like.dtype, device=like.device)


def _along(weight: Tensor, x: Tensor, dim: int) -> Recorded:
    return aten.view.default(weight, [-1] + [1] * (x.dim() - dim - 1)) if x.dim() > dim + 1 else weight


def _nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    hit, dim = _is_target(x, target)
    kept = aten.ne.Scalar(target, ignore_index)
    scaled = x if weight is None else aten.mul.Tensor(x, _along(weight, x, dim))
    # The class dim is summed over: at most one class is hit, so the sum picks and rounds nothing.
    picked = aten.neg.default(aten.sum.dim_IntList(aten.where.self(hit, scaled, _zero(x)), [dim]))
    # Torch raises where a target is no class. A graph cannot; its loss is no number then, which nobody overlooks.
    known = aten.logical_and.default(aten.ge.Scalar(target, 0), aten.lt.Scalar(target, x.shape[dim]))
    other = aten.where.self(kept, aten.full.default([], nan, dtype=x.dtype, device=x.device), _zero(x))
    losses = aten.where.self(aten.logical_and.default(kept, known), picked, other)
    if weight is None:
        each = _cast(kept, x.dtype)
    else:
        of_target = aten.sum.dim_IntList(aten.where.self(hit, _along(weight, x, dim), _zero(x)), [dim])
        each = aten.where.self(kept, of_target, _zero(x))
    if reduction == _NONE:
        return losses, _zero(x)
    total_weight = aten.sum.default(each)
    loss = aten.sum.default(losses)
    return (aten.div.Tensor(loss, total_weight) if reduction == _MEAN else loss), total_weight


def _nll_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Recorded:
    hit, dim = _is_target(x, target)
    kept = aten.ne.Scalar(target, ignore_index)
    scale = aten.neg.default(aten.div.Tensor(grad, total_weight) if reduction == _MEAN else grad)
    per_target = aten.unsqueeze.default(aten.where.self(kept, scale, _zero(x)), dim)
    if weight is not None:
        per_target = aten.mul.Tensor(per_target, _along(weight, x, dim))
    return aten.where.self(hit, per_target, _zero(x))


# ------------------------------------------------------------------------------------------------------ reductions
def _mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Recorded:
    return _mean_dim(x, None, False, dtype=dtype)


def _mean_dim(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Recorded:
    dtype = dtype or x.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return NotImplemented
    dims = list(range(x.dim())) if not dim else [d % max(x.dim(), 1) for d in dim]
    count = prod(x.shape[d] for d in dims) if x.dim() else 1
    wide = torch.float32 if dtype in _LOW_PRECISION else dtype
    total = aten.sum.dim_IntList(x, dims, keepdim, dtype=wide if wide != x.dtype else None)
    return _cast(aten.div.Scalar(total, count) if count else aten.mul.Scalar(total, float("nan")), dtype)


# ------------------------------------------------------------------------------------------------- matrix products
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Recorded:
    return _scaled_sum(bias, aten.mm.default(a, b), beta, alpha)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Recorded:
    return _scaled_sum(bias, aten.bmm.default(a, b), beta, alpha)


def _addmv(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Recorded:
    return _scaled_sum(bias, aten.mv.default(a, b), beta, alpha)


def _scaled_sum(bias: Tensor, product: Tensor, beta: Any, alpha: Any) -> Recorded:
    if alpha != 1:
        product = aten.mul.Scalar(product, alpha)
    if beta == 0:
        return product
    return aten.add.Tensor(product, bias if beta == 1 else aten.mul.Scalar(bias, beta))


# ----------------------------------------------------------------------------------------- several views at once
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    length = x.shape[dim]
    pieces = max(1, -(-length // size)) if size else 1
    return _slices(x, [min(size, length - i * size) for i in range(pieces)], dim)


def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    return _slices(x, sizes, dim)


def _slices(x: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(aten.slice.Tensor(x, dim, start, start + size))
        start += size
    return pieces


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [aten.select.int(x, dim, i) for i in range(x.shape[dim])]


# ---------------------------------------------------------------------------------------------------- constructors
def _full(shape: Sequence[int], value: Any, dtype: torch.dtype | None, like: Tensor | None = None) -> Recorded:
    if dtype is None:
        dtype = like.dtype if like is not None else torch.get_default_dtype()
    return aten.full.default(list(shape), value, dtype=dtype, device=torch.device("cpu"))


def _filled(value: float) -> Callable[..., Recorded]:
    def constructor(shape: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Recorded:
        return _full(shape, value, dtype)

    return constructor


def _filled_like(value: float) -> Callable[..., Recorded]:
    def constructor(x: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Recorded:
        return _full(x.shape, value, dtype, x)

    return constructor


def _new_filled(value: float) -> Callable[..., Recorded]:
    def constructor(x: Tensor, shape: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Recorded:
        return _full(shape, value, dtype, x)

    return constructor


def _full_like(x: Tensor, value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Recorded:
    return _full(x.shape, value, dtype, x)


def _new_full(x: Tensor, shape: Sequence[int], value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Recorded:
    return _full(shape, value, dtype, x)


def _scalar_tensor(value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Recorded:
    return _full([], value, dtype)


def _fill(x: Tensor, value: Any) -> Recorded:
    if isinstance(value, Tensor):
        return aten.expand.default(_cast(value, x.dtype), list(x.shape))
    return _full(x.shape, value, None, x)


def _copy(x: Tensor, src: Tensor, non_blocking: bool = False) -> Recorded:
    src = _cast(src, x.dtype)
    return src if src.shape == x.shape else aten.expand.default(src, list(x.shape))


def _cast(x: Tensor, dtype: torch.dtype) -> Recorded:
    return x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype)


def _to_copy(x: Tensor, **options: Any) -> Recorded:
    kept = {k: v for k, v in options.items() if v is not None and k in ("dtype", "memory_format")}
    return NotImplemented if kept == options else aten._to_copy.default(x, **kept)


def _bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Recorded:
    """As long as the caller says; a larger value, which would make the result longer, is an index out of range."""
    if minlength == 0:
        return NotImplemented
    dtype = torch.int64 if weights is None else torch.float32 if weights.dtype == torch.float32 else torch.float64
    each = aten.full.default(x.shape, 1, dtype=dtype, device=x.device) if weights is None else _cast(weights, dtype)
    zeros = aten.full.default([minlength], 0, dtype=dtype, device=x.device)
    return aten.scatter_add.default(zeros, 0, _cast(x, torch.int64), each)


def _unsafe_view(x: Tensor, shape: Sequence[int]) -> Recorded:
    return aten.view.default(x, list(shape))


# -------------------------------------------------------------------------------------------------------- randomness
def _rand(shape: Sequence[int], dtype: torch.dtype) -> Recorded:
    return aten.rand.default(list(shape), dtype=dtype, device=torch.device("cpu"))


def _chances(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _bernoulli_p(x: Tensor, p: float = 0.5, generator: Any = None) -> Recorded:
    return _cast(aten.lt.Scalar(_rand(x.shape, _chances(x)), p), x.dtype)


def _bernoulli(x: Tensor, *, generator: Any = None) -> Recorded:
    return _cast(aten.lt.Tensor(_rand(x.shape, _chances(x)), x), x.dtype)


def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return aten.clone.default(x), aten.full.default(list(x.shape), True, dtype=torch.bool, device=x.device)
    keep = aten.ge.Scalar(_rand(x.shape, _chances(x)), p)
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    return aten.mul.Scalar(aten.mul.Tensor(x, _cast(keep, x.dtype)), scale), keep


def _native_dropout_backward(grad: Tensor, mask: Tensor, scale: float) -> Recorded:
    return aten.mul.Scalar(aten.mul.Tensor(grad, _cast(mask, grad.dtype)), scale)


def _rand_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Recorded:
    return _rand(x.shape, dtype or x.dtype)


def _randn_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Recorded:
    return aten.randn.default(list(x.shape), dtype=dtype or x.dtype, device=x.device)


def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0, generator: Any = None) -> Recorded:
    return aten.add.Scalar(aten.mul.Scalar(_rand(x.shape, x.dtype), high - low), low)


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Recorded:
    return aten.add.Scalar(aten.mul.Scalar(_randn_like(x), std), mean)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten.mse_loss,
            aten.mse_loss_backward,
            aten.smooth_l1_loss,
            aten.smooth_l1_loss_backward,
            aten.huber_loss,
            aten.huber_loss_backward,
            aten.binary_cross_entropy,
            aten.binary_cross_entropy_backward,
            aten.binary_cross_entropy_with_logits,
            aten.softplus_backward,  # its fake strides are not the real ones
            aten.log_sigmoid_forward,  # its second result is empty on some devices
            aten.log_sigmoid_backward,
        ]
    ),
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.logsumexp.default: _logsumexp,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss2d_forward.default: _nll_loss,
    aten.nll_loss2d_backward.default: _nll_loss_backward,
    aten.mean.default: _mean,
    aten.mean.dim: _mean_dim,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.addmv.default: _addmv,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unsafe_split.Tensor: _split,  # of a graph without writes these are no other
    aten.unsafe_split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.zeros.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.empty.memory_format: _filled(0),
    aten.empty_strided.default: _filled(0),
    aten.zeros_like.default: _filled_like(0),
    aten.ones_like.default: _filled_like(1),
    aten.empty_like.default: _filled_like(0),
    aten.new_zeros.default: _new_filled(0),
    aten.new_ones.default: _new_filled(1),
    aten.new_empty.default: _new_filled(0),
    aten.new_empty_strided.default: _new_filled(0),
    aten.full_like.default: _full_like,
    aten.new_full.default: _new_full,
    aten.scalar_tensor.default: _scalar_tensor,
    aten.fill.Scalar: _fill,
    aten.fill.Tensor: _fill,
    aten.copy.default: _copy,
    aten._to_copy.default: _to_copy,
    aten.bincount.default: _bincount,
    aten._unsafe_view.default: _unsafe_view,
    aten._reshape_alias.default: lambda x, shape, stride: aten.view.default(x, list(shape)),
    aten.bernoulli.p: _bernoulli_p,
    aten.bernoulli.default: _bernoulli,
    aten.native_dropout.default: _native_dropout,
    aten.native_dropout_backward.default: _native_dropout_backward,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.uniform.default: _uniform,
    aten.normal_functional.default: _normal,
}
"""aten op -> function of its arguments; `NotImplemented` leaves the op as it is."""
