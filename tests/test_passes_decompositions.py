"""Every decomposition in the table, executed beside the op that it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import captured, errors, planned
from rule_samples import b, f, i, p
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture.decompositions import DECOMPOSITIONS
from passes.rewrite.ledger import ledger

aten = torch.ops.aten


def logits(*shape: int) -> Tensor:
    """Log-probabilities along dim 1, or along the only dim."""
    return f(*shape).log_softmax(min(1, len(shape) - 1))


def _losses() -> list[tuple[Any, ...]]:
    x, y, g, one = f(5, 7), f(5, 7), f(5, 7), f()
    share, weight = torch.sigmoid(x), p(5, 7)
    found: list[tuple[Any, ...]] = []
    for r in (0, 1, 2):
        given = one if r else g
        found += [
            (aten.mse_loss.default, x, y, r),
            (aten.mse_loss_backward.default, given, x, y, r),
            (aten.smooth_l1_loss.default, x, y, r, 0.7),
            (aten.smooth_l1_loss_backward.default, given, x, y, r, 0.7),
            (aten.huber_loss.default, x, y, r, 0.7),
            (aten.huber_loss_backward.default, given, x, y, r, 0.7),
            (aten.binary_cross_entropy.default, share, share.flip(0), weight, r),
            (aten.binary_cross_entropy_backward.default, given, share, share.flip(0), weight, r),
            (aten.binary_cross_entropy_with_logits.default, x, share, None, p(7), r),
        ]
        targets = i(7, 5)
        targets[2] = -100
        flat = [
            (logits(5, 7), targets, None, (5,)),
            (logits(5, 7), targets, p(7), (5,)),
            (logits(7), i(7), None, ()),
        ]
        for scores, target, weights, shape in flat:
            found.append((aten.nll_loss_forward.default, scores, target, weights, r, -100))
            up = f(*shape) if r == 0 else one
            total = aten.nll_loss_forward.default(scores, target, weights, r, -100)[1]
            found.append((aten.nll_loss_backward.default, up, scores, target, weights, r, -100, total))
        places = i(7, 3, 2, 5)
        places[0, 0] = 6
        for weights in (None, p(7)):
            scores = logits(3, 7, 2, 5)
            found.append((aten.nll_loss2d_forward.default, scores, places, weights, r, 6))
            total = aten.nll_loss2d_forward.default(scores, places, weights, r, 6)[1]
            up = f(3, 2, 5) if r == 0 else one
            found.append((aten.nll_loss2d_backward.default, up, scores, places, weights, r, 6, total))
    return found


def _others() -> list[tuple[Any, ...]]:
    x = f(5, 7)
    soft = x.log_softmax(1)
    infinite = torch.tensor([[-torch.inf, -torch.inf], [torch.inf, 1.0], [torch.nan, 1.0], [2.0, -torch.inf]])
    return [
        (aten.softplus_backward.default, f(5, 7), x, 2.0, 1.5),
        (aten.log_sigmoid_forward.default, x),
        (aten.log_sigmoid_backward.default, f(5, 7), x, aten.log_sigmoid_forward.default(x)[1]),
        (aten._log_softmax.default, x, 1, False),
        (aten._log_softmax.default, f(5, 7, 3), 0, False),
        (aten._log_softmax.default, x.bfloat16(), -1, False),
        (aten._log_softmax_backward_data.default, f(5, 7), soft, 1, torch.float64),
        (aten.logsumexp.default, x, [1]),
        (aten.logsumexp.default, f(3, 5, 7), [-1, 0], True),
        (aten.logsumexp.default, x.bfloat16(), [0]),
        (aten.logsumexp.default, 200 * x, [0, 1]),
        (aten.logsumexp.default, infinite, [1]),
        (aten.logsumexp.default, f(), [0]),
        (aten.mean.default, x),
        (aten.mean.dim, x, [0]),
        (aten.mean.dim, f(3, 5, 7), [-1, 0], True),
        (aten.mean.dim, x.bfloat16(), [1]),
        (aten.addmm.default, f(3), f(5, 7), f(7, 3)),
        (aten.baddbmm.default, f(2, 5, 3), f(2, 5, 7), f(2, 7, 3)),
        (aten.addmv.default, f(5), f(5, 7), f(7)),
        (aten.split.Tensor, x, 3, 1),
        (aten.split.Tensor, x, 9),
        (aten.split_with_sizes.default, x, [1, 4, 2], 1),
        (aten.unsafe_split.Tensor, x, 3, 1),
        (aten.unsafe_split_with_sizes.default, x, [1, 4, 2], 1),
        (aten.unbind.int, x, 1),
        (aten.zeros.default, [3, 5]),
        (aten.ones.default, [3, 5]),
        (aten.zeros_like.default, x),
        (aten.ones_like.default, i(3, 5)),
        (aten.new_zeros.default, x, [2, 3]),
        (aten.new_ones.default, x, [2, 3]),
        (aten.full_like.default, x, 3.5),
        (aten.new_full.default, x, [2, 3], 3.5),
        (aten.scalar_tensor.default, 3.5),
        (aten.fill.Scalar, x, 2.5),
        (aten.fill.Tensor, x, f()),
        (aten.copy.default, x, f(7)),
        (aten.copy.default, x, f(5, 7).float()),
        (aten.bincount.default, i(4, 9), None, 6),
        (aten.bincount.default, i(4, 9), f(9), 4),
        (aten.bincount.default, i(4, 9).int(), f(9).float(), 4),
        (aten._unsafe_view.default, x, [7, -1]),
        (aten._reshape_alias.default, x, [7, 5], [5, 1]),
        (aten.native_dropout.default, x, 0.3, False),
        (aten.native_dropout.default, x, 0.0, True),
        (aten.native_dropout_backward.default, f(5, 7), b(5, 7), 1.5),
        (aten.bernoulli.p, x, 1.0),
        (aten.bernoulli.p, x, 0.0),
        (aten.bernoulli.default, b(5, 7).double()),
    ]


SAMPLES = [*_losses(), *_others()]
SHAPES_ALONE = [
    (aten.empty.memory_format, [3, 5]),
    (aten.empty_strided.default, [3, 5], [5, 1]),
    (aten.empty_like.default, i(3, 5)),
    (aten.new_empty.default, f(2), [3, 5]),
    (aten.new_empty_strided.default, f(2), [3, 5], [5, 1]),
    (aten._to_copy.default, f(3, 5)),
]
"""Their values are nobody's business, or they are left as they are."""
MANY = f(100_000)
DRAWN = [
    (aten.bernoulli.p, (MANY, 0.3)),
    (aten.bernoulli.default, (torch.full((100_000,), 0.3),)),
    (aten.native_dropout.default, (MANY, 0.3, True)),
    (aten.rand_like.default, (MANY,)),
    (aten.randn_like.default, (MANY,)),
    (aten.uniform.default, (MANY, -2.0, 3.0)),
    (aten.normal_functional.default, (MANY, 2.0, 3.0)),
]


def test_every_decomposition_is_tried() -> None:
    tried = {sample[0] for sample in [*SAMPLES, *SHAPES_ALONE, *DRAWN]}
    writes = {op for op in DECOMPOSITIONS if op._schema.is_mutable}  # functionalisation leaves none of these
    assert set(DECOMPOSITIONS) - writes == tried


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: str(s[0]))
def test_it_gives_what_the_op_gives(sample: Sequence[Any]) -> None:
    target, *args = sample
    found, wanted = _tensors(DECOMPOSITIONS[target](*args)), _tensors(target(*args))
    assert len(found) == len(wanted)
    if target is aten.nll_loss_forward.default and args[3] == 0:
        found, wanted = found[:1], wanted[:1]  # nobody reads a total weight where nothing is averaged
    if target is aten.log_sigmoid_forward.default:
        assert found[1].shape == wanted[1].shape
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, equal_nan=True)


class ZLoss(nn.Module):
    """A vocabulary's cross-entropy, and what keeps the logits small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 64, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(ids).tanh())
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return {"loss": loss + 0.1 * logits.logsumexp(-1).square().mean()}


def test_logits_split_along_the_vocabulary_stay_split_under_a_z_loss() -> None:
    torch.manual_seed(0)
    model, ids = ZLoss(), torch.randint(0, 64, (4, 16))
    local = planned(captured(model, {"ids": ids}), {"tp": 4}, "megatron", ())[2]
    found = errors(model, local, {"ids": ids})
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found
    logits_bytes = ids.numel() * 64 * 4
    assert all(issued.full_bytes < logits_bytes / 4 for issued in ledger(local))


@pytest.mark.parametrize("sample", SHAPES_ALONE, ids=lambda s: str(s[0]))
def test_it_gives_the_shape_that_the_op_gives(sample: Sequence[Any]) -> None:
    target, *args = sample
    found, wanted = DECOMPOSITIONS[target](*args), target(*args)
    assert found is NotImplemented or (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize(("target", "args"), DRAWN, ids=lambda s: str(s) if not isinstance(s, tuple) else "")
def test_it_draws_what_the_op_draws(target: Any, args: tuple[Any, ...]) -> None:
    """Mean and spread of 100,000 numbers, in standard errors."""
    torch.manual_seed(0)
    for one, other in zip(_tensors(DECOMPOSITIONS[target](*args)), _tensors(target(*args)), strict=True):
        assert one.dtype == other.dtype
        error = float(other.double().std()) / 100_000**0.5
        assert abs(float(one.double().mean() - other.double().mean())) < 6 * error
        assert float(one.double().std()) == pytest.approx(float(other.double().std()), rel=0.03)
