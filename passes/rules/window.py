"""Convolutions and other ops that run a window over positions: batch and channels may be split, positions not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passes.rules.call import Call, Operand
from passes.rules.form import Dims, Form, FormBuilder
from passes.rules.table import rule

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------------------- convolution
class _Convolution:
    """Dims of a convolution's tensors: batch, groups, channels of a group on both sides, positions."""

    def __init__(self, call: Call, x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> None:
        self.build = build = FormBuilder()
        groups = call.get("groups")
        self.batch = build.factor(x[0], reduce="sum")
        self.group = build.factor(groups)
        # The bias gradient lacks the input channels: every rank that has some of them has all of it, which max keeps.
        self.inner = build.factor(x[1] // groups, reduce="sum" if "grad_output" not in call.arguments else "max")
        self.outer = build.factor(y[1] // groups, reduce="sum")
        kernel = build.dims(weight[2:], whole=True)
        self.x: Dims = (self.batch, self.group + self.inner, *build.dims(x[2:], whole=True))
        self.y: Dims = (self.batch, self.group + self.outer, *build.dims(y[2:], whole=True))
        self.weight: Dims = (
            (self.group + self.inner, self.outer, *kernel)
            if call.get("transposed")
            else (self.group + self.outer, self.inner, *kernel)
        )
        self.bias: Dims = (self.group + self.outer,)


@rule(aten.convolution.default)
def _convolution(call: Call) -> Form:
    of = _Convolution(call, call.facts("input").shape, call.facts("weight").shape, call.result.shape)
    operands = [of.x, of.weight]
    if isinstance(call.get("bias"), Operand):
        operands.append(of.bias)
    return of.build.form(operands, [of.y])


@rule(aten.convolution_backward.default)
def _convolution_backward(call: Call) -> Form:
    gradient, x, weight = (call.facts(name).shape for name in ("grad_output", "input", "weight"))
    of = _Convolution(call, x, weight, gradient)
    made = [of.x, of.weight, of.bias]
    results = [dims if facts else () for dims, facts in zip(made, call.results, strict=True)]
    of.build.reduces |= dict.fromkeys(of.group, "sum")
    return of.build.form([of.y, of.x, of.weight], results)


# -------------------------------------------------------------------------------- ops on the last dims of their tensors
POOLS = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool2d_backward.default: 2,
    aten.avg_pool3d.default: 3,
    aten.avg_pool3d_backward.default: 3,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool2d_with_indices_backward.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.max_pool3d_with_indices_backward.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool2d_backward.default: 2,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d_backward.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool3d_backward.default: 3,
    aten.reflection_pad1d.default: 1,
    aten.reflection_pad1d_backward.default: 1,
    aten.reflection_pad2d.default: 2,
    aten.reflection_pad2d_backward.default: 2,
    aten.replication_pad1d.default: 1,
    aten.replication_pad1d_backward.default: 1,
    aten.replication_pad2d.default: 2,
    aten.replication_pad2d_backward.default: 2,
    aten.upsample_nearest1d.default: 1,
    aten.upsample_linear1d.default: 1,
    aten.upsample_nearest2d.default: 2,
    aten._upsample_nearest_exact2d.default: 2,
    aten.upsample_bilinear2d.default: 2,
    aten._upsample_bilinear2d_aa.default: 2,
    aten.upsample_bicubic2d.default: 2,
    aten._upsample_bicubic2d_aa.default: 2,
    aten.upsample_nearest3d.default: 3,
    aten.upsample_trilinear3d.default: 3,
}
"""Ops on planes: dims before the last n are batch and channels, alike in every operand and result."""

UPSAMPLE_BACKWARDS = {
    aten.upsample_nearest1d_backward.default: 1,
    aten.upsample_linear1d_backward.default: 1,
    aten.upsample_nearest2d_backward.default: 2,
    aten._upsample_nearest_exact2d_backward.default: 2,
    aten.upsample_bilinear2d_backward.default: 2,
    aten._upsample_bilinear2d_aa_backward.default: 2,
    aten.upsample_bicubic2d_backward.default: 2,
    aten._upsample_bicubic2d_aa_backward.default: 2,
    aten.upsample_nearest3d_backward.default: 3,
    aten.upsample_trilinear3d_backward.default: 3,
}
"""The same; they carry the size of their result."""

LINEAR_ALGEBRA = {
    aten.linalg_cholesky_ex.default: 2,
    aten.linalg_inv_ex.default: 2,
    aten.linalg_qr.default: 2,
    aten.linalg_lu_factor_ex.default: 2,
    aten.linalg_solve_triangular.default: 2,
    aten._linalg_eigh.default: 2,
    aten._linalg_svd.default: 2,
    aten._linalg_det.default: 2,
    aten._linalg_slogdet.default: 2,
    aten._linalg_solve_ex.default: 2,
    aten.linalg_matrix_exp.default: 2,
}
"""Ops on matrices: dims before the last two are batch; each result starts with them."""


def _has_shared_matrix(call: Call) -> bool:
    """Whether the whole batch has one right-hand side, whose rows may be as many as the batch has matrices."""
    first, *others = (facts.shape for facts in call.operands)
    vectors = first[:-1] if call.target is aten._linalg_solve_ex.default else first
    return any(len(shape) < len(first) and shape != vectors for shape in others)


def _planes(call: Call, last: int) -> Form:
    first = call.operands[0].shape
    build = FormBuilder()
    batch = build.dims(first[: len(first) - last])

    def dims(shape: Sequence[int]) -> Dims:
        return batch + build.dims(shape[len(batch) :], whole=True)

    shapes = [facts.shape for facts in (*call.operands, *filter(None, call.results))]
    if _has_shared_matrix(call) or any(shape[: len(batch)] != first[: len(batch)] for shape in shapes):
        build.whole |= {factor for dim in batch for factor in dim}
        return build.form(
            [build.dims(facts.shape, whole=True) for facts in call.operands],
            [build.dims(facts.shape, whole=True) if facts else () for facts in call.results],
        )
    return build.form(
        [dims(facts.shape) for facts in call.operands], [dims(facts.shape) if facts else () for facts in call.results]
    )


@rule(*POOLS, *UPSAMPLE_BACKWARDS, *LINEAR_ALGEBRA)
def _last_dims(call: Call) -> Form:
    return _planes(call, {**POOLS, **UPSAMPLE_BACKWARDS, **LINEAR_ALGEBRA}[call.target])


@rule(aten.im2col.default, aten.col2im.default)
def _columns(call: Call) -> Form:
    """Columns hold (channels, kernel) in one dim; channels may be split."""
    x, y = call.operands[0].shape, call.results[0].shape if call.results[0] else ()
    image, columns = (x, y) if call.target is aten.im2col.default else (y, x)
    build = FormBuilder()
    batch = build.dims(image[: len(image) - 3])
    channels = build.factor(image[-3])
    kernel = build.factor(columns[-2] // image[-3], whole=True)
    rolled: Dims = (*batch, channels, *build.dims(image[-2:], whole=True))
    flat: Dims = (*batch, channels + kernel, build.factor(columns[-1], whole=True))
    return build.form([rolled], [flat]) if image is x else build.form([flat], [rolled])


@rule(aten.grid_sampler_2d.default)
def _grid_sampler(call: Call) -> Form:
    x, grid = call.operands[0].shape, call.operands[1].shape
    build = FormBuilder()
    batch, channels = build.factor(x[0]), build.factor(x[1])
    places = build.dims(grid[1:3])
    pair = build.factor(grid[3], whole=True)
    source: Dims = (batch, channels, *build.dims(x[2:], whole=True))
    return build.form([source, (batch, *places, pair)], [(batch, channels, *places)])


@rule(aten.grid_sampler_2d_backward.default)
def _grid_sampler_backward(call: Call) -> Form:
    x, grid = call.operands[1].shape, call.operands[2].shape
    build = FormBuilder()
    batch, channels = build.factor(x[0]), build.factor(x[1], reduce="sum")
    places = build.dims(grid[1:3], reduce="sum")
    source: Dims = (batch, channels, *build.dims(x[2:], whole=True))
    sampled: Dims = (batch, *places, build.factor(grid[3], whole=True))
    results = [dims if facts else () for dims, facts in zip([source, sampled], call.results, strict=True)]
    build.reduces |= dict.fromkeys(batch, "sum")
    return build.form([(batch, channels, *places), source, sampled], results)
