"""Products by oneDNN, beside arithmetic in fp64 and torch's own ops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from autopar.plans.measured import _MATMUL_OP
from costmodel import products
from passes.lower.lower import compiled
from passes.lower.products import for_onednn

mm, addmm = torch.ops.autopar.mm.default, torch.ops.autopar.addmm.default


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that oneDNN is faster on, wherever the tests run."""
    monkeypatch.setattr(products, "_has_what_mkl_leaves", lambda: True)


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("sizes", [(128, 256, 384), (250, 129, 131), (1, 2048, 2048), (513, 257, 65)])
def test_products_equal_fp64(layout: str, sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    a = torch.randn(m, k) if layout[0] == "n" else torch.randn(k, m).t()
    b = torch.randn(k, n) if layout[1] == "n" else torch.randn(n, k).t()
    bias = torch.randn(n)
    exact = a.double() @ b.double()
    for found, wanted in ((mm(a, b), exact), (addmm(bias, a, b), exact + bias)):
        assert found.shape == (m, n)
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_tall_weight_copies_no_gradient_of_its_outputs() -> None:
    """oneDNN's call copies a transposed first operand, for a vocabulary's weight the largest tensor of the step."""
    outputs, rows, inputs = 1024, 512, 128
    gradient, x = torch.randn(rows, outputs), torch.randn(rows, inputs)
    mm(gradient.t(), x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        mm(gradient.t(), x)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in trace.key_averages() if "aten" in event.key)
    in_two_orders = 2 * 4 * outputs * inputs
    assert in_two_orders < allocated < in_two_orders + 4 * rows * inputs + 2**16 < 4 * gradient.numel()


def _with_gaps(size: int) -> torch.Tensor:
    return torch.randn(2 * size)[::2]


def _repeated(size: int) -> torch.Tensor:
    return torch.randn(1).expand(size)


@pytest.mark.parametrize("make", [_with_gaps, _repeated])
def test_a_bias_of_any_stride_is_added(make: Callable[[int], torch.Tensor]) -> None:
    a, b, bias = torch.randn(64, 96), torch.randn(96, 128), make(128)
    exact = a.double() @ b.double() + bias
    torch.testing.assert_close(addmm(bias, a, b).double(), exact, rtol=1e-4, atol=1e-4)


def test_operands_may_share_memory_within() -> None:
    """Frames of sound overlap, and the gradient of their layer's weight is a product with them."""
    frames = torch.randn(1000).unfold(0, 40, 15)
    gradient = torch.randn(frames.shape[0], 32)
    for a, b in ((gradient.t(), frames), (frames, frames.t()), (frames.t(), gradient), (frames.t(), frames)):
        torch.testing.assert_close(mm(a, b).double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


def _targets(gm: fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_large_products_of_fp32_are_rewritten(faster: None) -> None:
    def program(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        aten = torch.ops.aten
        return (
            aten.mm(x, w), aten.addmm(bias, x, w), aten.addmm(x, x, w), aten.addmm(bias, x, w, beta=2),
            aten.mm(x[:4], w), aten.mm(x.bfloat16(), w.bfloat16()), aten.mm(x.double(), w.double()),
        )  # fmt: skip

    given = torch.randn(256, 256), torch.randn(256, 256), torch.randn(256)
    gm = make_fx(program, tracing_mode="fake")(*given)
    for_onednn(gm)
    aten = torch.ops.aten
    made = [target for target in _targets(gm) if "mm" in str(target)]
    assert made == [mm, addmm, aten.addmm.default, aten.addmm.default, *[aten.mm.default] * 3]
    for found, wanted in zip(gm(*given), program(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_compiled_programs_call_onednn_for_their_products(faster: None) -> None:
    def program(x: torch.Tensor, w: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.mm(x, w.t()).relu(), torch.mm(gradient.t(), x)

    given = torch.randn(256, 128), torch.randn(384, 128), torch.randn(256, 384)
    gm = make_fx(program, tracing_mode="fake")(*given)
    for_onednn(gm)
    run = compiled(gm)
    with torch.no_grad():
        run(list(given))
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            found = run(list(given))
    for each, wanted in zip(found, program(*given), strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-4)
    counts = {event.key: event.count for event in trace.key_averages()}
    assert counts["autopar::mm"] == counts["mkldnn::_linear_pointwise"] == 2
    assert _MATMUL_OP.search("autopar::mm")


@pytest.mark.parametrize(
    ("capability", "maker", "wanted"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_onednn_is_taken_where_mkl_leaves_vectors_unused(
    capability: str, maker: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id\t: {maker}\n")
    products._has_what_mkl_leaves.cache_clear()
    x = torch.randn(256, 256)
    try:
        assert products.is_for_onednn(x, x) is wanted
        assert not products.is_for_onednn(x[:8], x)
        with torch.backends.mkldnn.flags(enabled=False):
            products._has_what_mkl_leaves.cache_clear()
            assert not products.is_for_onednn(x, x)
    finally:
        products._has_what_mkl_leaves.cache_clear()
