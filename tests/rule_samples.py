"""At least one sample of every op that a rule knows, with values drawn from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rule_check import Sample
from torch import Tensor

from passes.program import routed_ops

aten = torch.ops.aten
prims = torch.ops.prims
_drawn = torch.Generator().manual_seed(0)


def f(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=_drawn, dtype=torch.float64).to(dtype)


def p(*shape: int) -> Tensor:
    """Positive numbers."""
    return f(*shape).abs() + 0.5


def i(high: int, *shape: int, low: int = 0) -> Tensor:
    """Integers from `low` to `high` - 1."""
    return torch.randint(low, high, shape, generator=_drawn)


def b(*shape: int) -> Tensor:
    """True or false."""
    return torch.rand(shape, generator=_drawn) > 0.5


def c(*shape: int) -> Tensor:
    """Complex numbers."""
    return torch.complex(f(*shape), f(*shape))


def s(target: Any, *args: Any, splits: int = 0, skip: tuple[int, ...] = (), **kwargs: Any) -> Sample:
    """A sample; `splits` is how many ways an axis of two must at least have to split it."""
    return Sample(target, args, kwargs, splits, skip)


def _views() -> list[Sample]:
    x = f(4, 6, 5)
    same = [s(op, x, splits=2) for op in (aten.clone.default, aten.alias.default, aten.detach.default)]
    same += [s(op, x, splits=2) for op in (aten.lift_fresh_copy.default, aten.contiguous.default)]
    return [
        *same,
        *[
            s(op, f(*a), list(b_), splits=n)
            for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
            for a, b_, n in [
                ((4, 6, 8), (24, 8), 3),
                ((24, 8), (4, 6, 8), 3),
                ((4, 6, 8), (4, 6, 2, 4), 4),
                ((4, 1, 6), (1, 24, 1), 2),
                ((6, 4), (4, 6), 0),
                ((7, 6), (42,), 1),
                ((2, 3, 4, 5), (6, 20), 2),
            ]
        ],
        s(aten.t.default, f(4, 6), splits=2),
        s(aten.t.default, f(4), splits=1),
        s(aten.transpose.int, x, 0, -1, splits=2),
        s(aten.transpose.int, x, -2, 0, splits=2),
        s(aten.permute.default, x, [2, 0, 1], splits=2),
        s(aten.permute.default, x, [-1, 0, -2], splits=2),
        s(aten.squeeze.default, f(4, 1, 6), splits=2),
        s(aten.squeeze.dim, f(4, 1, 6), 1, splits=2),
        s(aten.squeeze.dims, f(1, 4, 1, 6), [0, -2], splits=2),
        s(aten.unsqueeze.default, f(4, 6), -1, splits=2),
        s(aten.unsqueeze.default, f(0, 6), 0, splits=1),
        s(aten.expand.default, f(4, 1, 6), [4, 8, 6], splits=3),
        s(aten.expand.default, f(4, 1), [2, -1, 6], splits=3),
        s(aten.slice.Tensor, f(4, 6), 1, 1, 5, splits=1),
        s(aten.slice.Tensor, f(4, 6), -1, 0, 9223372036854775807, splits=2),
        s(aten.slice.Tensor, f(4, 6), 0, -3, 9223372036854775807, 2, splits=1),
        s(aten.slice.Tensor, f(4, 6), 0, splits=2),
        s(aten.slice_backward.default, f(4, 3), [4, 6], 1, 0, 3, 1, splits=1),
        s(aten.slice_backward.default, f(4, 3), [4, 6], 1, 3, 2**63 - 1, 1, splits=1),
        s(aten.slice_backward.default, f(4, 3), [4, 6], 1, -4, -1, 1, splits=1),
        s(aten.slice_backward.default, f(4, 6), [4, 6], 1, 0, 6, 1, splits=1),
        s(aten.slice_backward.default, f(4, 6), [4, 6], 1, -6, 2**63 - 1, 1, splits=1),
        s(aten.constant_pad_nd.default, f(4, 6), [1, 2], splits=1),
        s(aten.constant_pad_nd.default, f(4, 6), [0, 0, 1, 0], 3.0, splits=1),
        s(aten.constant_pad_nd.default, f(4, 6), [1, -1], splits=1),
        s(aten.constant_pad_nd.default, f(4, 6), [0, 0, -1, 1], splits=1),
        s(aten.select.int, f(4, 6), -1, 2, splits=1),
        s(aten.select_backward.default, f(4), [4, 6], 1, 2, splits=1),
        s(aten.cat.default, [f(4, 6), f(4, 2), f(4, 1)], 1, splits=1),
        s(aten.cat.default, [f(4, 6), f(0), f(2, 6)], -2, splits=1),
        s(aten.stack.default, [f(4, 6), f(4, 6)], 1, splits=2),
        s(aten.stack.default, [f(4, 6)] * 3, -1, splits=2),
        s(aten.repeat.default, f(4, 3), [2, 1, 2], splits=3),
        s(aten.repeat.default, f(4, 6), [1, 1], splits=2),
        s(aten.repeat.default, f(1, 6), [4, 1], splits=2),
        s(aten.slice_scatter.default, f(4, 6), f(4, 2), 1, 2, 4, splits=1),
        s(aten.slice_scatter.default, f(4, 6), f(4, 6), -1, -6, 6, splits=2),
        s(aten.select_scatter.default, f(4, 6), f(4), -1, 2, splits=1),
        s(aten.split.Tensor, f(4, 7), 3, 1, splits=1),
        s(aten.split.Tensor, f(4, 6), 2, splits=1),
        s(aten.split_with_sizes.default, f(4, 6), [1, 5], -1, splits=1),
        s(aten.unbind.int, f(4, 6), 1, splits=1),
        s(aten.diagonal.default, f(4, 6, 6), 1, -2, -1, splits=1),
        s(aten.diagonal.default, f(4, 6, 5), 0, 0, 2, splits=1),
        s(aten.diagonal_backward.default, f(4, 5), [4, 6, 6], 1, -2, -1, splits=1),
        s(aten.unfold.default, f(4, 7), 1, 3, 2, splits=1),
        s(aten.unfold.default, f(6, 4), -2, 2, 2, splits=1),
        s(aten.unfold_backward.default, f(4, 3, 3), [4, 7], 1, 3, 2, splits=1),
        s(aten.view_as_real.default, c(4, 6), splits=2),
        s(aten.view_as_complex.default, f(4, 6, 2), splits=2),
        s(aten.as_strided.default, f(4, 6), [3, 6], [6, 1], 6),
        s(aten.as_strided.default, f(4, 6), [3, 4, 2], [6, 1, 6]),
        s(aten.as_strided_scatter.default, f(4, 6), f(2, 6), [2, 6], [12, 1]),
    ]


def _pointwise() -> list[Sample]:
    return [
        s(aten._to_copy.default, f(4, 6), dtype=torch.float32, splits=2),
        s(aten.to.dtype, f(4, 6), torch.float32, splits=2),
        s(prims.convert_element_type.default, f(4, 6), torch.float32, splits=2),
        s(aten.where.self, b(4, 6), f(4, 6), f(6), splits=2),
        s(aten.masked_fill.Scalar, f(4, 6), b(4, 1), 0, splits=2),
        s(aten.masked_fill.Scalar, f(4, 6), b(6), 2.0, splits=2),
        s(aten.masked_fill.Tensor, f(4, 6), b(4, 6), f(), splits=2),
        s(aten.floor_divide.default, i(9, 4, 6), 2, splits=2),
        s(aten.floor_divide.default, i(9, 4, 6), i(4, 6, low=1), splits=2),
        s(aten.polar.default, p(4, 6), f(6), splits=2),
        s(aten.complex.default, f(4, 6), f(4, 6), splits=2),
        s(aten._conj.default, c(4, 6), splits=2),
        s(aten.add.Tensor, f(4, 6), f(6), splits=2),
        s(aten.add.Tensor, f(4, 1), f(6), alpha=2, splits=2),
        s(aten.add.Tensor, f(4, 6), 1.0, splits=2),
        s(aten.sub.Tensor, f(5, 6), f(5, 6), splits=1),
        s(aten.mul.Tensor, f(4, 6), f(), splits=2),
        s(aten.mul.Tensor, f(4, 6), f(4, 1), splits=2),
        s(aten.mul.Tensor, f(4, 6), 3.0, splits=2),
        s(aten.mul.Tensor, f(4, 6), i(4, 6), splits=2),
        s(aten.div.Tensor, f(4, 6), p(), splits=2),
        s(aten.div.Tensor, f(4, 6), p(4, 6), splits=2),
        s(aten.div.Tensor_mode, f(4, 6), p(), rounding_mode="floor", splits=2),
        s(aten.mul.Scalar, f(4, 6), 3.0, splits=2),
        s(aten.div.Scalar, f(4, 6), 3.0, splits=2),
        s(aten.neg.default, f(4, 6, 1), splits=2),
        s(aten.eq.Tensor, i(3, 4, 6), i(3, 6), splits=2),
        s(aten.silu_backward.default, f(4, 6), f(4, 6), splits=2),
        s(aten.relu.default, f(), splits=0),
        s(aten.clamp.default, f(4, 6), -0.5, 0.5, splits=2),
        s(aten.clip.default, f(4, 6), min=0, splits=2),
        s(aten.clamp.Tensor, f(4, 6), f(6), p(4, 1), splits=2),
        s(aten.clip.Tensor, f(4, 6), max=f(4, 6), splits=2),
        s(aten.div.Scalar_mode, f(4, 6), 2.0, rounding_mode="trunc", splits=2),
        s(aten.round.decimals, f(4, 6), decimals=2, splits=2),
    ]


def _reductions() -> list[Sample]:
    whole = [
        aten.amin.default,
        aten.mean.dim,
        aten.prod.dim_int,
        aten.any.dim,
        aten.all.dim,
        aten.logsumexp.default,
        aten.argmax.default,
        aten.argmin.default,
        aten.max.dim,
        aten.min.dim,
        aten.median.dim,
        aten.nanmedian.dim,
        aten.mode.default,
    ]
    listed = {aten.amin.default, aten.mean.dim, aten.logsumexp.default}
    unnamed = [
        aten.mean.default,
        aten.any.default,
        aten.all.default,
        aten.prod.default,
        aten.min.default,
        aten.median.default,
        aten.count_nonzero.default,
    ]
    return [
        s(aten.sum.default, f(4, 6), splits=2),
        s(aten.sum.default, i(5, 4, 6), splits=2),
        s(aten.sum.dim_IntList, f(4, 6, 5), [1], splits=2),
        s(aten.sum.dim_IntList, f(4, 6, 5), [0, -1], True, splits=2),
        s(aten.sum.dim_IntList, f(4, 6), None, splits=2),
        s(aten.sum.dim_IntList, b(4, 6), [0], splits=2),
        s(aten.sum.dim_IntList, 30 * f(4, 6), [1], dtype=torch.long, splits=1),
        s(aten.sum.dim_IntList, f(4, 6), [], splits=2),
        s(aten.nansum.default, f(4, 6), [1], splits=1),
        s(aten.amax.default, f(4, 6), [-1], splits=2),
        s(aten.amax.default, f(4, 6), [0], True, splits=2),
        s(aten.amax.default, f(4, 6), splits=2),
        s(aten.max.default, f(4, 6), splits=2),
        *[s(op, f(4, 6), [1] if op in listed else 1, splits=1) for op in whole],
        *[s(op, f(4, 6), [-2] if op in listed else -2, True, splits=1) for op in whole if op != aten.mode.default],
        s(aten.mode.default, f(4, 6), splits=1),
        s(aten.kthvalue.default, f(4, 6), 2, splits=1),
        s(aten.any.dims, b(4, 6, 2), [0, 1], splits=1),
        s(aten.any.dims, b(4, 6), None),
        s(aten.any.dims, b(4, 6), [], True, splits=2),
        s(aten.count_nonzero.dim_IntList, i(2, 4, 6), [1], splits=1),
        s(aten.aminmax.default, f(4, 6), dim=1, splits=1),
        s(aten.var.correction, f(4, 6), [1], correction=1, splits=1),
        s(aten.std.correction, f(4, 6), [1], correction=0, keepdim=True, splits=1),
        s(aten.var_mean.correction, f(4, 6), [1], correction=0, keepdim=True, splits=1),
        s(aten.std_mean.correction, f(4, 6), [0], correction=0, splits=1),
        s(aten.linalg_vector_norm.default, f(4, 6), 2, [1], splits=1),
        s(aten.linalg_vector_norm.default, f(4, 6), 1),
        *[s(op, f(4, 6)) for op in unnamed],
        *[s(op, f(4, 6), 1, False, splits=1) for op in (aten._softmax.default, aten._log_softmax.default)],
        s(aten._safe_softmax.default, f(4, 6), -1, splits=1),
        *[
            s(op, f(4, 6), f(4, 6), -1, torch.float64, splits=1)
            for op in (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
        ],
        *[
            s(op, f(4, 6, 2), d, splits=2)
            for op in (
                aten.cumsum.default,
                aten.cumprod.default,
                aten.logcumsumexp.default,
                aten.cummax.default,
                aten.cummin.default,
                aten.sort.default,
                aten.argsort.default,
            )
            for d in (1, -1)
        ],
        s(aten.cumsum.default, i(5, 4, 6), 0, splits=1),
        s(aten.cumsum.default, 30 * f(4, 6), 0, dtype=torch.long, splits=1),
        s(aten.sort.default, f(4, 6), splits=1),
        s(aten.sort.stable, i(3, 4, 6), stable=True, dim=1, splits=1),
        s(aten.argsort.stable, i(3, 4, 6), stable=True, dim=-1, splits=1),
        s(aten.flip.default, f(4, 6), [1], splits=1),
        s(aten.roll.default, f(4, 6), [1], [1], splits=1),
        s(aten.roll.default, f(4, 6), [1]),
        s(aten.triu.default, f(4, 6, 6), 1, splits=1),
        s(aten.tril.default, f(4, 6, 6), -1, splits=1),
        s(aten.topk.default, f(4, 6), 2, splits=1),
        s(aten.topk.default, f(4, 6, 2), 3, 1, splits=2),
        s(aten.topk.default, f(), 1),
    ]


def _products() -> list[Sample]:
    return [
        s(aten.mm.default, f(4, 6), f(6, 8), splits=3),
        s(aten.mm.default, f(4, 5), f(5, 3), splits=1),
        s(aten.mm.default, f(4, 1), f(1, 6), splits=2),
        s(aten.bmm.default, f(2, 4, 6), f(2, 6, 8), splits=4),
        s(aten.bmm.default, f(1, 4, 6), f(1, 6, 7), splits=2),
        s(aten.mv.default, f(4, 6), f(6), splits=2),
        s(aten.dot.default, f(6), f(6), splits=1),
        s(aten.addmm.default, f(8), f(4, 6), f(6, 8), splits=3),
        s(aten.addmm.default, f(4, 1), f(4, 6), f(6, 8), beta=2, alpha=3, splits=3),
        s(aten.addmm.default, f(1), f(4, 6), f(6, 8), splits=3),
        s(aten.baddbmm.default, f(2, 4, 8), f(2, 4, 6), f(2, 6, 8), splits=4),
        s(aten.baddbmm.default, f(4, 1), f(2, 4, 6), f(2, 6, 8), beta=0.5, splits=4),
    ]


def _bounds(*blocks: tuple[int, ...]) -> torch.Tensor:
    """Where each expert's rows begin and end in each block, for these numbers of rows."""
    return torch.tensor([[0, *torch.tensor(counts).cumsum(0).tolist()] for counts in blocks], dtype=torch.int32)


def _experts() -> list[Sample]:
    counts = [(3, 1, 0, 4), (0, 0, 8, 0), (2, 2, 2, 2), (8, 0, 0, 0), (0, 1, 2, 3), (0, 0, 0, 0), (0, 0, 0, 8)]
    mm, weight = routed_ops.ROUTED_MM, routed_ops.ROUTED_MM_WEIGHT
    take, put = routed_ops.TAKE_ROWS, routed_ops.PUT_ROWS
    several = _bounds((3, 1, 0, 2), (0, 0, 6, 0), (1, 2, 0, 3), (0, 0, 0, 6))
    bf16 = torch.bfloat16
    own = torch.cat([torch.randint(0, 3, (4,)) + 3 * block for block in range(4)])
    places = torch.cat([torch.randperm(6) + 6 * block for block in range(2)])
    return [
        *[s(mm, f(8, 6), f(4, 6, 2), _bounds(n), splits=4) for n in counts],
        *[s(weight, f(8, 6), f(8, 2), _bounds(n), splits=4) for n in counts],
        s(mm, f(24, 6), f(4, 6, 2), several, splits=5),
        s(weight, f(24, 6), f(24, 2), several, splits=5),
        s(mm, f(4, 6), f(4, 6, 2), _bounds((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0)), splits=4),
        s(mm, f(12, 3), f(6, 3, 5), _bounds((1, 2, 3, 1, 0, 5)), splits=2),
        s(mm, f(8, 16, dtype=bf16), f(4, 16, 32, dtype=bf16), _bounds((3, 1, 0, 4)), splits=4),
        s(mm, f(8, 6, dtype=bf16), f(4, 6, 4, dtype=bf16), _bounds((2, 1, 0, 1), (0, 4, 0, 0)), splits=4),
        s(weight, f(8, 6, dtype=bf16), f(8, 4, dtype=bf16), _bounds((3, 1, 0, 4)), splits=4),
        s(take, f(12, 6), own, 4, splits=3),
        s(take, f(12), own, 4, splits=2),
        s(put, f(12, 6), own, f(16, 6), 4, True, splits=3),
        s(put, f(12, 6), places, f(12, 6), 2, False, splits=2),
    ]


def _indexing() -> list[Sample]:
    weight = f(8, 6)
    return [
        s(aten.embedding.default, weight, i(8, 4, 3), splits=3),
        s(aten.embedding.default, weight, i(8, 5), splits=2),
        s(aten.embedding_dense_backward.default, f(4, 3, 6), i(8, 4, 3), 8, -1, False, splits=3),
        s(aten.embedding_dense_backward.default, f(4, 6), i(8, 4), 8, 2, False, splits=3),
        s(aten.embedding_dense_backward.default, f(4, 6), i(8, 4), 8, -1, True, splits=1),
        s(aten.gather.default, f(4, 6), 1, i(6, 4, 2), splits=3),
        s(aten.gather.default, f(4, 6), -2, i(4, 2, 6), splits=3),
        s(aten.gather.default, f(4, 6), 1, i(6, 3, 2), splits=2),
        s(aten.index_select.default, f(4, 6), 1, i(6, 4), splits=3),
        s(aten.index_select.default, f(4, 6), -2, i(4, 3), splits=2),
        s(aten.index_select.default, f(), 0, torch.tensor([0])),
        s(aten.scatter.value, f(4, 6), 1, i(6, 4, 2), 2.0, splits=1),
        s(aten.scatter.src, f(4, 6), 1, torch.tensor([[1, 3]] * 4), f(4, 2), splits=1),
        s(aten.scatter.src, f(4, 6), 0, torch.tensor([[1] * 3]), f(2, 6)),
        s(aten.scatter.reduce, f(4, 6), 1, i(6, 4, 2), f(4, 2), reduce="add", splits=1),
        s(aten.scatter.value_reduce, f(4, 6), 1, i(6, 4, 2), 2.0, reduce="add", splits=1),
        s(aten.scatter_reduce.two, f(4, 6), 1, i(6, 4, 2), f(4, 2), "amax", splits=1),
        s(aten.scatter_add.default, f(4, 6), 1, i(6, 4, 2), f(4, 2), splits=3),
        s(aten.scatter_add.default, f(4, 6), 0, i(4, 8, 6), f(8, 6), splits=3),
        s(aten.scatter_add.default, f(4, 6), 0, i(4, 2, 3), f(8, 6)),
        s(aten.index_add.default, f(4, 6), 0, i(4, 8), f(8, 6), splits=3),
        s(aten.index_add.default, f(4, 6), -1, i(6, 3), f(4, 3), alpha=2, splits=2),
        s(aten.index_copy.default, f(4, 6), 1, torch.tensor([4, 1]), f(4, 2), splits=1),
        s(aten.index_fill.int_Scalar, f(4, 6), 1, torch.tensor([4, 1]), 2.0, splits=1),
        s(aten.index_fill.int_Tensor, f(4, 6), 1, torch.tensor([4, 1]), f(), splits=1),
        s(aten.index_reduce.default, f(4, 6), 1, i(6, 2), f(4, 2), "amax", splits=1),
        *[
            s(op, *args, splits=n)
            for op in (aten.index.Tensor, aten._unsafe_index.Tensor)
            for *args, n in [
                (f(8, 6), [i(8, 4, low=-8)], 3),
                (f(8, 6), [i(8, 4, 2)], 4),
                (f(4, 8, 6), [None, i(8, 2, 3, low=-8)], 4),
                (f(4, 6, 8), [i(4, 2), i(6, 2)], 2),
                (f(4, 6, 8), [i(4, 2, 1), None, i(8, 2)], 3),
                (f(4, 6, 8), [None, i(6, 4, 1), i(8, 2)], 3),
                (f(4, 6), [i(4)], 1),
            ]
        ],
        s(aten.index.Tensor, f(4, 6), [torch.tensor([True, False, True, True])]),
        *[
            s(op, *args, accumulate, splits=n if accumulate else 0)
            for op in (aten.index_put.default, aten._unsafe_index_put.default)
            for accumulate in (True, False)
            for *args, n in [
                (f(8, 6), [torch.tensor([2, -1, 0, -3])], f(4, 6), 3),
                (f(8, 6), [torch.tensor([[2, 5], [1, 7]])], f(6), 4),
                (f(4, 8, 6), [None, torch.tensor([0, 3, -2])], f(4, 3, 6), 3),
                (f(4, 8, 6), [None, torch.tensor([0, 3])], f(), 4),
                (f(4, 6, 8), [torch.tensor([0, 1]), torch.tensor([3, 1])], f(2, 8), 2),
                (f(4, 6, 8), [torch.tensor([0, 1]), None, torch.tensor([3, 1])], f(2, 6), 2),
            ]
        ],
        s(aten.index_put.default, f(8, 6), [i(8, 40)], f(40, 6), True, splits=3),
        s(aten.index_put.default, f(8, 6), [i(8, 0)], f(0, 6)),  # nothing was picked
        s(aten.index_put.default, f(4, 8, 6), [i(4, 0), None, i(6, 0)], f(0, 8)),
        s(aten.index.Tensor, f(8, 6), [i(8, 0)]),
        s(aten.index_put.default, f(4, 6), [b(4, 6)], f()),
        *_of_one_row(),
        s(aten.searchsorted.Tensor, f(5).sort().values, f(4, 6), splits=2),
        s(aten.searchsorted.Tensor, f(4, 5).sort().values, f(4, 6), right=True, splits=2),
        s(aten.bucketize.Tensor, f(4, 6), f(5).sort().values, splits=2),
        s(aten.histc.default, f(24), 4, -2, 2, splits=1),
        s(aten.histc.default, f(24), 4),
        s(aten.bincount.default, i(4, 24)),
        s(aten.masked_scatter.default, f(4, 6), b(4, 6), f(24)),
        s(aten.masked_scatter_backward.default, f(4, 6), b(4, 6), [24]),
        s(aten.masked_select.default, f(4, 6), torch.tensor([[True, False] * 3] * 4)),
        s(aten.nonzero.default, torch.tensor([[1.0, 0.0, 2.0]])),
        s(aten.nonzero_static.default, i(2, 4, 6), size=8),
        s(aten.take.default, f(4, 6), i(24, 4)),
        s(aten.put.default, f(4, 6), torch.tensor([3, 1]), f(2)),
        s(aten.unique_dim.default, i(2, 4, 6), 0),
        s(aten._unique2.default, i(4, 12)),
        s(aten.unique_consecutive.default, i(2, 12)),
        s(aten.repeat_interleave.Tensor, torch.tensor([2, 1, 3])),
        s(aten._embedding_bag.default, weight, i(8, 6), torch.tensor([0, 2, 3])),
    ]


def _of_one_row() -> list[Sample]:
    """Look-ups where there is but one place to look, as in an embedding of the only kind of token."""
    row, first = f(1, 6), torch.zeros(4, dtype=torch.long)
    return [
        s(aten.embedding.default, row, first, splits=2),
        s(aten.embedding_dense_backward.default, f(4, 6), first, 1, -1, False, splits=2),
        s(aten.gather.default, row, 0, torch.zeros(4, 6, dtype=torch.long), splits=2),
        s(aten.index_select.default, row, 0, first, splits=2),
        s(aten.index.Tensor, row, [first], splits=2),
        s(aten.index_put.default, row, [first], f(4, 6), True, splits=2),
        s(aten.index_add.default, row, 0, first, f(4, 6), splits=2),
        s(aten.scatter_add.default, row, 0, torch.zeros(4, 6, dtype=torch.long), f(4, 6), splits=2),
    ]


def _created() -> list[Sample]:
    filled: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.full.default, ([4, 6], 2.0)),
        (aten.zeros.default, ([4, 6],)),
        (aten.ones.default, ([4, 6],)),
        (aten.new_full.default, (f(3), [4, 6], 2.0)),
        (aten.new_zeros.default, (f(3), [4, 6])),
        (aten.new_ones.default, (f(4, 6), [4, 6])),
        (aten.full_like.default, (f(4, 6), 2.0)),
        (aten.zeros_like.default, (f(4, 6),)),
        (aten.ones_like.default, (f(4, 6),)),
    ]
    unset = [(aten.empty.memory_format, ([4, 6],)), (aten.empty_like.default, (f(4, 6),))]
    return [
        *[s(op, *args, splits=2) for op, args in filled],
        *[s(op, *args, splits=2, skip=(0,)) for op, args in unset],
        s(aten.new_empty.default, f(3), [4, 6], splits=2, skip=(0,)),
        s(aten.scalar_tensor.default, 2.0),
        s(aten.arange.default, 12, splits=1),
        s(aten.arange.default, 12, dtype=torch.float32, splits=1),
        s(aten.arange.start, 3, 15, splits=1),
        s(aten.arange.start_step, 3, 27, 2, splits=1),
        s(aten.arange.start_step, 0.5, 6.5, 0.5, splits=1),
        s(aten.arange.start_step, 11, -1, -1, splits=1),
        s(aten.arange.start_step, 1.0, 13.0, 1.0, dtype=torch.int64, splits=1),
        s(aten.arange.start_step, 0.5, 15, 2.5, dtype=torch.int64, splits=1),
        s(prims.iota.default, 12, start=2, step=3, dtype=torch.int64, device="cpu", requires_grad=False, splits=1),
        s(aten.eye.default, 6),
        s(aten.eye.m, 4, 6),
        s(aten.randperm.default, 6, skip=(0,)),
        s(aten.tril_indices.default, 4, 6),
        s(aten.triu_indices.default, 4, 6),
        s(torch.ops.autopar.uniform.default, torch.tensor([3, 4]), 7, [4, 6], splits=2),
    ]


def _norms() -> list[Sample]:
    x, w = f(4, 6, 5), f(5)
    mean, rstd = f(4, 6, 1), p(4, 6, 1)
    rows = f(4, 6, 8)
    stats = f(6), p(6)
    grouped = (4, 6, 10, 3)
    back = (f(4, 6, 10), f(4, 6, 10), f(4, 3), p(4, 3))
    legit = aten._native_batch_norm_legit_functional.default
    return [
        s(aten.native_layer_norm.default, x, [5], w, f(5), 1e-5, splits=2),
        s(aten.native_layer_norm.default, x, [6, 5], None, None, 1e-5, splits=1),
        s(aten.native_layer_norm_backward.default, f(4, 6, 5), x, [5], mean, rstd, w, f(5), [True] * 3, splits=2),
        s(aten._fused_rms_norm.default, rows, [8], f(8), 1e-5, splits=2),
        s(aten._fused_rms_norm_backward.default, f(4, 6, 8), rows, [8], p(4, 6, 1), f(8), [True] * 2, splits=2),
        s(aten.native_group_norm.default, f(4, 6, 10), f(6), f(6), *grouped, 1e-5, splits=1),
        s(aten.native_group_norm.default, f(4, 6, 10), None, None, *grouped, 1e-5, splits=1),
        s(aten.native_group_norm_backward.default, *back, f(6), *grouped, [True] * 3, splits=1),
        s(aten.native_group_norm_backward.default, *back, None, *grouped, [True, False, False], splits=1),
        s(aten.native_batch_norm.default, f(4, 6, 5), f(6), f(6), None, None, True, 0.1, 1e-5, splits=1),
        s(aten.native_batch_norm.default, f(4, 6, 5), f(6), f(6), *stats, False, 0.1, 1e-5),
        s(aten._native_batch_norm_legit.no_stats, f(4, 6, 5), f(6), f(6), True, 0.1, 1e-5, splits=1),
        s(legit, f(4, 6, 5), f(6), f(6), *stats, True, 0.1, 1e-5, splits=1),
        s(
            aten.native_batch_norm_backward.default,
            *(f(4, 6, 5), f(4, 6, 5), f(6), f(6), p(6), f(6), p(6), True, 1e-5, [True] * 3),
            splits=1,
        ),
        s(aten._weight_norm_interface.default, f(4, 6), p(4, 1), 0, splits=1),
        s(
            aten._weight_norm_interface_backward.default,
            *(f(4, 6), f(4, 6), p(4, 1), p(4, 1), 0),
            splits=1,
        ),
    ]


def _attention() -> list[Sample]:
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    found = []
    for causal, mask, (q, k) in [
        (False, None, (4, 4)),
        (True, None, (4, 4)),
        (False, (2, 1, 6, 8), (4, 4)),
        (False, (2, 4, 6, 8), (4, 4)),
        (False, (6, 8), (4, 4)),
    ]:
        # float32: torch 2.11 is told another dtype of float64's log-sum-exp than it gives.
        query, key, value = (f(2, n, m, 4, dtype=torch.float32) for n, m in ((q, 6), (k, 8), (k, 8)))
        given: dict[str, Any] = {"attn_mask": f(*mask, dtype=torch.float32)} if mask else {}
        out, lse = forward(query, key, value, 0.0, causal, **given)
        found.append(s(forward, query, key, value, 0.0, causal, splits=2 if causal else 3, **given))
        found.append(
            s(
                backward,
                *(f(2, q, 6, 4, dtype=torch.float32), query, key, value, out, lse, 0.0, causal),
                splits=2 if causal else 3,
                **given,
            )
        )
    return found


def _windows() -> list[Sample]:
    x1, x2 = f(4, 6, 8), f(4, 6, 5, 7)
    convolution, backward = aten.convolution.default, aten.convolution_backward.default
    found = []
    for x, w, bias, stride, pad, transposed, groups, n in [
        (x2, (8, 6, 3, 3), True, [1, 1], [1, 1], False, 1, 3),
        (x2, (8, 6, 2, 2), False, [2, 2], [0, 0], False, 1, 3),
        (x1, (6, 1, 4), True, [1], [3], False, 6, 2),
        (x1, (12, 1, 4), False, [1], [0], False, 6, 3),
        (x1, (4, 3, 3), True, [1], [0], False, 2, 3),
        (x1, (4, 3, 3), False, [1], [1], False, 2, 3),
        (x2, (6, 8, 2, 2), True, [2, 2], [0, 0], True, 1, 3),
        (x1, (6, 2, 3), True, [1], [0], True, 2, 3),
        (f(4, 3, 7), (5, 3, 2), True, [1], [0], False, 1, 1),
    ]:
        weight = f(*w)
        channels = w[1] * groups if transposed else w[0]
        n_spatial = len(stride)
        common = (stride, pad, [1] * n_spatial, transposed, [0] * n_spatial, groups)
        bias_t = f(channels) if bias else None
        found.append(s(convolution, x, weight, bias_t, *common, splits=n))
        y = convolution(x, weight, bias_t, *common)
        found.append(
            s(
                *(backward, f(*y.shape), x, weight, [channels] if bias else None, *common, [True, True, bias]),
                splits=n,
            )
        )
    only_weight = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False])
    found.append(s(backward, f(4, 8, 3, 5), x2, f(8, 6, 3, 3), None, *only_weight, splits=3))
    pooled, where = aten.max_pool2d_with_indices.default(x2, [2, 2], [1, 1])
    pooled3, where3 = aten.max_pool3d_with_indices.default(f(4, 2, 4, 4, 4), [2, 2, 2])
    apool, awhere = aten.adaptive_max_pool2d.default(x2, [2, 3])
    up2 = [
        (aten.upsample_nearest2d.default, ([10, 14],)),
        (aten._upsample_nearest_exact2d.default, ([10, 14],)),
        (aten.upsample_bilinear2d.default, ([10, 14], False)),
        (aten._upsample_bilinear2d_aa.default, ([10, 14], False)),
        (aten.upsample_bicubic2d.default, ([10, 14], False)),
        (aten._upsample_bicubic2d_aa.default, ([10, 14], False)),
    ]
    down2 = [
        (aten.upsample_nearest2d_backward.default, ()),
        (aten._upsample_nearest_exact2d_backward.default, ()),
        (aten.upsample_bilinear2d_backward.default, (False,)),
        (aten._upsample_bilinear2d_aa_backward.default, (False,)),
        (aten.upsample_bicubic2d_backward.default, (False,)),
        (aten._upsample_bicubic2d_aa_backward.default, (False,)),
    ]
    x3 = f(4, 2, 4, 4, 4)
    return [
        *found,
        s(aten.avg_pool1d.default, x1, [2], splits=2),
        s(aten.avg_pool2d.default, x2, [2, 2], [1, 1], splits=2),
        s(aten.avg_pool2d_backward.default, f(4, 6, 2, 3), x2, [2, 2], [2, 2], [0, 0], False, True, None, splits=2),
        s(aten.avg_pool3d.default, x3, [2, 2, 2], splits=2),
        s(
            aten.avg_pool3d_backward.default,
            *(f(4, 2, 2, 2, 2), x3, [2, 2, 2], [2, 2, 2], [0, 0, 0], False, True, None),
            splits=2,
        ),
        s(aten.max_pool2d_with_indices.default, x2, [2, 2], [1, 1], splits=2),
        s(
            aten.max_pool2d_with_indices_backward.default,
            *(f(*pooled.shape), x2, [2, 2], [1, 1], [0, 0], [1, 1], False, where),
            splits=2,
        ),
        s(aten.max_pool3d_with_indices.default, x3, [2, 2, 2], splits=2),
        s(
            aten.max_pool3d_with_indices_backward.default,
            *(f(*pooled3.shape), x3, [2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False, where3),
            splits=2,
        ),
        s(aten.adaptive_max_pool2d.default, x2, [2, 3], splits=2),
        s(aten.adaptive_max_pool2d_backward.default, f(*apool.shape), x2, awhere, splits=2),
        s(aten._adaptive_avg_pool2d.default, x2, [2, 3], splits=2),
        s(aten._adaptive_avg_pool2d_backward.default, f(4, 6, 2, 3), x2, splits=2),
        s(aten._adaptive_avg_pool3d.default, x3, [2, 2, 2], splits=2),
        s(aten._adaptive_avg_pool3d_backward.default, f(4, 2, 2, 2, 2), x3, splits=2),
        s(aten.reflection_pad1d.default, x1, [1, 2], splits=2),
        s(aten.reflection_pad1d_backward.default, f(4, 6, 11), x1, [1, 2], splits=2),
        s(aten.replication_pad1d.default, x1, [1, 2], splits=2),
        s(aten.replication_pad1d_backward.default, f(4, 6, 11), x1, [1, 2], splits=2),
        s(aten.reflection_pad2d.default, x2, [1, 2, 0, 1], splits=2),
        s(aten.reflection_pad2d_backward.default, f(4, 6, 6, 10), x2, [1, 2, 0, 1], splits=2),
        s(aten.replication_pad2d.default, x2, [1, 2, 0, 1], splits=2),
        s(aten.replication_pad2d_backward.default, f(4, 6, 6, 10), x2, [1, 2, 0, 1], splits=2),
        s(aten.upsample_nearest1d.default, x1, [12], splits=2),
        s(aten.upsample_nearest1d_backward.default, f(4, 6, 12), [12], [4, 6, 8], splits=2),
        s(aten.upsample_linear1d.default, x1, [12], True, splits=2),
        s(aten.upsample_linear1d_backward.default, f(4, 6, 12), [12], [4, 6, 8], True, splits=2),
        *[s(op, x2, *args, splits=2) for op, args in up2],
        *[s(op, f(4, 6, 10, 14), [10, 14], [4, 6, 5, 7], *args, splits=2) for op, args in down2],
        s(aten.upsample_nearest3d.default, x3, [6, 6, 6], splits=2),
        s(aten.upsample_nearest3d_backward.default, f(4, 2, 6, 6, 6), [6, 6, 6], [4, 2, 4, 4, 4], splits=2),
        s(aten.upsample_trilinear3d.default, x3, [6, 6, 6], False, splits=2),
        s(aten.upsample_trilinear3d_backward.default, f(4, 2, 6, 6, 6), [6, 6, 6], [4, 2, 4, 4, 4], False, splits=2),
        s(aten.im2col.default, x2, [2, 2], [1, 1], [0, 0], [1, 1], splits=2),
        s(aten.col2im.default, f(4, 24, 24), [5, 7], [2, 2], [1, 1], [0, 0], [1, 1], splits=2),
        s(aten.grid_sampler_2d.default, x2, f(4, 2, 6, 2).tanh(), 0, 0, False, splits=4),
        s(
            aten.grid_sampler_2d_backward.default,
            *(f(4, 6, 2, 6), x2, f(4, 2, 6, 2).tanh(), 0, 0, False, [True, True]),
            splits=4,
        ),
        s(aten.glu.default, f(4, 6), -1, splits=1),
        s(aten.glu_backward.default, f(4, 3), f(4, 6), 1, splits=1),
    ]


def _algebra() -> list[Sample]:
    square = f(4, 3, 3)
    positive = square @ square.mT + torch.eye(3, dtype=torch.float64)
    # One right-hand side for as many matrices as it has rows.
    shared = [(aten._linalg_solve_ex.default, {}), (aten.linalg_solve_triangular.default, {"upper": True})]
    batch: list[Callable[..., Any]] = [
        aten.linalg_cholesky_ex.default,
        aten.linalg_inv_ex.default,
        aten.linalg_qr.default,
        aten.linalg_lu_factor_ex.default,
        aten._linalg_eigh.default,
        aten._linalg_svd.default,
        aten._linalg_det.default,
        aten._linalg_slogdet.default,
        aten.linalg_matrix_exp.default,
    ]
    return [
        *[s(op, positive, splits=1) for op in batch],
        s(aten.linalg_solve_triangular.default, positive.triu(), f(4, 3, 2), upper=True, splits=1),
        s(aten._linalg_solve_ex.default, positive, f(4, 3, 2), splits=1),
        s(aten._linalg_solve_ex.default, positive[0], f(3, 2)),
        s(aten._linalg_solve_ex.default, positive, f(4, 3), splits=1),
        *[s(op, positive.triu()[:3], f(3, 2), **how) for op, how in shared],
        s(aten.linalg_cross.default, f(4, 3), f(1, 3), splits=1),
        s(aten._fft_c2c.default, c(4, 6), [1], 0, True, splits=1),
        s(aten._fft_c2c.default, c(4, 6, 2), [1, 2], 1, False, splits=1),
        s(aten._fft_r2c.default, f(4, 6), [1], 0, True, splits=1),
        s(aten._fft_c2r.default, c(4, 4), [1], 0, 6, splits=1),
        s(aten._cdist_forward.default, f(4, 3), f(6, 3), 2.0, None),
        s(aten._cdist_backward.default, f(4, 6), f(4, 3), f(6, 3), 2.0, p(4, 6)),
        *_ctc(),
    ]


def _ctc() -> list[Sample]:
    log_probs = f(8, 2, 5).log_softmax(-1)
    targets, lengths, target_lengths = i(5, 2, 3, low=1), torch.tensor([8, 7]), torch.tensor([3, 2])
    loss, alpha = aten._ctc_loss.Tensor(log_probs, targets, lengths, target_lengths)
    lists = ([8, 7], [3, 2])
    return [
        s(aten._ctc_loss.Tensor, log_probs, targets, lengths, target_lengths, skip=(1,)),
        s(aten._ctc_loss.default, log_probs, targets, *lists, skip=(1,)),
        s(aten._ctc_loss_backward.Tensor, f(2), log_probs, targets, lengths, target_lengths, loss, alpha, 0),
        s(aten._ctc_loss_backward.default, f(2), log_probs, targets, *lists, loss, alpha, 0),
    ]


SAMPLES: tuple[Sample, ...] = (
    *_views(),
    *_pointwise(),
    *_reductions(),
    *_products(),
    *_experts(),
    *_indexing(),
    *_created(),
    *_norms(),
    *_attention(),
    *_windows(),
    *_algebra(),
)
