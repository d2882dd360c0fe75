from __future__ import annotations

import os

import pytest
import torch
from rule_check import Sample, check, one_op
from rule_samples import SAMPLES, f, s

from passes.rules.call import Call
from passes.rules.discover import discover
from passes.rules.table import whole_form

aten = torch.ops.aten


@torch.library.custom_op("discovered::gated", mutates_args=())
def gated(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(x * scale, -1) * y


@gated.register_fake
def _gated(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("discovered::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.einsum("bsk,kn->bns", x, w), x.square().sum(1)


@product.register_fake
def _product(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], w.shape[1], x.shape[1]), x.new_empty(x.shape[0], x.shape[2])


@torch.library.custom_op("discovered::windows", mutates_args=())
def windows(x: torch.Tensor) -> torch.Tensor:
    """Each three neighbours change with one another."""
    return x.unflatten(1, (-1, 3)).flip(2).flatten(1, 2) if x.shape[1] % 3 == 0 else x.clone()


@windows.register_fake
def _windows(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("discovered::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


@noisy.register_fake
def _noisy(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _call(sample: Sample) -> Call:
    return one_op(sample, form=whole_form).call


def test_dims_that_an_op_leaves_apart_are_found() -> None:
    call = _call(s(torch.ops.discovered.gated.default, f(4, 6, 8), f(4, 6, 8), 2.0))
    form = discover(call).form
    assert len(form.sizes) - len(form.whole) == 2
    assert "ab_,ab_->ab_" in discover(call).line


def test_sums_are_found() -> None:
    call = _call(s(torch.ops.discovered.product.default, f(2, 12, 6), f(6, 8)))
    found = discover(call)
    # The second result lacks the columns n and does not depend on w: no split of w alone may claim it.
    assert "by sum" in found.line
    for sizes in ((2,), (2, 2), (3,)):
        check(s(torch.ops.discovered.product.default, f(2, 12, 6), f(6, 8)), sizes, form=lambda c: discover(c).form)


@pytest.mark.parametrize(
    "sample",
    [
        s(torch.ops.discovered.windows.default, f(4, 12)),
        s(torch.ops.discovered.noisy.default, f(4, 12)),
        s(aten.rand_like.default, f(4, 6)),
        s(aten.cumsum.default, f(6), 0),
        s(aten.flip.default, f(6), [0]),
    ],
    ids=str,
)
def test_what_mixes_neighbours_or_is_random_is_whole(sample: Sample) -> None:
    form = discover(_call(sample)).form
    batch = [form.operands[0][0]] if sample.target is torch.ops.discovered.windows.default else []
    assert set(range(len(form.sizes))) - form.whole == {factor for dim in batch for factor in dim}


@torch.library.custom_op("discovered::crashes", mutates_args=())
def crashes(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % 2:
        os.abort()
    return x.clone()


@crashes.register_fake
def _crashes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_kernel_that_crashes_on_parts_is_whole() -> None:
    found = discover(_call(s(torch.ops.discovered.crashes.default, f(4, 6))))
    assert "crashed" in found.line
    assert found.form.whole == set(range(len(found.form.sizes)))


def test_the_user_s_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    discover(_call(s(aten.atan2.default, f(4, 6), f(4, 6))))
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_in_arguments_keep_dims_whole() -> None:
    form = discover(_call(s(aten.view.default, f(4, 6), [2, 12]))).form
    assert form.whole == set(range(len(form.sizes)))


ONE_EACH = list({str(sample.target): sample for sample in reversed(SAMPLES)}.values())[::3]
"""A third of the ops that have a rule; each takes a while."""


@pytest.mark.parametrize("sample", ONE_EACH, ids=str)
def test_what_is_discovered_holds_on_other_sizes(sample: Sample) -> None:
    """Of ops that have a rule: the factors found by trying, executed on the sample's own sizes and values."""
    check(sample, (2,), form=lambda call: discover(call).form)
    check(sample, (3,), form=lambda call: discover(call).form)
