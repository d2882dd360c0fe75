"""Normalisation keeps what a program computes and drops what says nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx, nn

from passes.capture.capture import capture
from passes.capture.normalize import (
    copy_single_parts,
    drop_no_ops,
    drop_written_slices,
    fingerprint,
    merge_equal,
    normalize,
)

aten = torch.ops.aten


def traced(function: object, *args: Tensor) -> fx.GraphModule:
    """`function`'s graph with values in every node, made by hand from fx alone."""
    gm = fx.symbolic_trace(function)  # type: ignore[arg-type]

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            out = super().run_node(n)
            n.meta |= {"val": out, "phase": n.meta.get("phase", "forward")}
            return out

    Record(gm).run(*args)
    return gm


def targets(gm: fx.GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_no_ops_go_and_real_changes_stay() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [
            aten.view.default(x, [2, 3]),
            aten.expand.default(x, [2, 3]),
            aten._to_copy.default(x, dtype=torch.float32),
            aten.clone.default(x),
            aten.slice.Tensor(x, 0, 0, 2),
            aten.permute.default(x, [0, -1]),
            aten.detach.default(x),
            aten.cat.default([aten.slice.Tensor(x, 0, 0, 0), x], 0),
            aten.mul.Tensor(x, 1),
            aten.view.default(x, [3, 2]),
            aten._to_copy.default(x, dtype=torch.float64),
            aten.permute.default(x, [1, 0]),
            aten.mul.Tensor(x, 1.5),
            aten.clone.default(aten.t.default(x), memory_format=torch.contiguous_format),
        ]

    x = torch.randn(2, 3)
    gm = traced(function, x)
    before = gm(x)
    drop_no_ops(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    for a, b in zip(before, gm(x), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    kept = [aten.view.default, aten._to_copy.default, aten.permute.default, aten.mul.Tensor, aten.t.default]
    assert targets(gm) == [*kept, aten.clone.default]


def test_a_square_transposition_is_no_no_op() -> None:
    gm = traced(lambda x: aten.permute.default(aten.transpose.int(x, 0, 1), [0, 1]), torch.randn(3, 3))
    drop_no_ops(gm.graph)
    assert targets(gm) == [aten.transpose.int]


def test_the_only_part_that_is_not_empty_is_copied_as_cat_copies_it() -> None:
    def function(x: Tensor) -> list[Tensor]:
        turned = aten.transpose.int(x, 0, 1)
        return [aten.cat.default([aten.slice.Tensor(turned, 0, 0, 0), turned], 0), aten.cat.default([turned, x], 1)]

    x = torch.randn(3, 3)
    gm = traced(function, x)
    wanted = function(x)
    copy_single_parts(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert targets(gm) == [aten.transpose.int, aten.clone.default, aten.cat.default]
    for found, each in zip(gm(x), wanted, strict=True):
        assert found.stride() == each.stride()
        torch.testing.assert_close(found, each, rtol=0, atol=0)


def test_reading_a_written_slice_reads_what_was_written() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        written = aten.select_scatter.default(x, y, 0, 1)
        return aten.select.int(written, 0, 1), aten.select.int(written, 0, 0)

    x, y = torch.randn(2, 3), torch.randn(3)
    gm = traced(function, x, y)
    drop_written_slices(gm.graph)
    gm.recompile()
    assert targets(gm) == [aten.select_scatter.default, aten.select.int]
    assert torch.equal(gm(x, y)[0], y)
    assert torch.equal(gm(x, y)[1], x[0])


def test_equal_nodes_merge_within_a_phase_and_random_ones_never() -> None:
    def function(x: Tensor) -> list[Tensor]:
        ones = [aten.mul.Tensor(x, 2), aten.mul.Tensor(x, 2), aten.mul.Tensor(x, 2.0), aten.mul.Tensor(x, 2)]
        return [*ones, aten.rand_like.default(x), aten.rand_like.default(x)]

    gm = traced(function, torch.randn(3))
    list(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor))[3].meta["phase"] = "backward"
    merge_equal(gm.graph)
    assert [(n.args[1], n.meta["phase"]) for n in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)] == [
        (2, "forward"),
        (2.0, "forward"),
        (2, "backward"),
    ]
    assert targets(gm).count(aten.rand_like.default) == 2


class Net(nn.Module):
    def __init__(self, width: int = 8, slope: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width, dtype=dtype)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x.to(self.inner.weight.dtype)) * self.slope + torch.tensor([1.0, 3.0, 2.0, 9.0])[:1]).sum()


def test_the_fingerprint_tells_structure_shapes_and_dtypes_apart() -> None:
    x = torch.randn(2, 4)
    one = capture(Net(), (x,))
    assert normalize(one).fingerprint == one.fingerprint == fingerprint(one)
    assert capture(Net(), (torch.randn(2, 4),)).fingerprint == one.fingerprint
    others = [
        capture(Net(width=9), (x,)),
        capture(Net(slope=0.25), (x,)),
        capture(Net(dtype=torch.float64), (x,)),
        capture(Net(), (torch.randn(3, 4),)),
        capture(Net().requires_grad_(False), (x,)),
    ]
    assert len({one.fingerprint, *(p.fingerprint for p in others)}) == 6


@pytest.mark.parametrize("constant", [torch.arange(4.0)[::2][:0], torch.ones(4, dtype=torch.complex64)[::2][:1]])
def test_a_constant_that_lies_in_strides_has_a_fingerprint(constant: Tensor) -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum() + constant.abs().sum()

    assert capture(Adds(), (torch.randn(2),)).fingerprint


def test_what_was_cast_as_it_was_written_is_read_as_it_was_cast() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.select_scatter(torch.zeros(2, 3, dtype=torch.float64), x, 0, 0)[0]

    (out,) = capture(Writes(), (torch.randn(3),)).graph(torch.ones(3))
    assert out.dtype == torch.float64


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_fingerprint_is_the_same_in_another_process(seed: str) -> None:
    code = (
        "import torch, sys; sys.path.insert(0, 'tests')\n"
        "from test_passes_normalize import Net, capture\n"
        "print(capture(Net(), (torch.randn(2, 4),)).fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert other.stdout.strip() == capture(Net(), (torch.randn(2, 4),)).fingerprint
