"""What pointwise chains move, on a graph small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from moved_bytes import bytes_a_logit
from torch import nn

from autopar import planning
from passes.analysis.analysis import Analysis, analyse

ROWS, WIDTH = 4, 8


class Chain(nn.Module):
    """A product between two chains, and a sum at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.sigmoid(x * 2.0 + 1.0) @ self.weight
        return (torch.tanh(made) * made).sum()


def analysis(*, fused: bool) -> Analysis:
    program = planning.captured(Chain(), (torch.randn(ROWS, WIDTH),), {}, batch_dims=[0], batch_size=ROWS)
    return analyse(program, fused=fused)


def moved(found: Analysis, phase: str) -> dict[str, tuple[float, float]]:
    """Per op of a phase, tensors of full size that it reads and writes."""
    result = {}
    for place in found.places:
        if place.kind == "op" and place.phase == phase and place.call is not None and place.traffic is not None:
            shapes = [operand.shape for operand in place.call.operands]
            reads = sum(share for share, shape in zip(place.traffic.reads, shapes, strict=True) if len(shape) == 2)
            result[str(place.call.target).split(".")[1]] = (reads, sum(place.traffic.writes))
    return result


def test_eager_ops_each_read_and_write() -> None:
    found = moved(analysis(fused=False), "forward")
    assert found["sigmoid"] == (1.0, 1.0)
    assert found["tanh"] == (1.0, 1.0)
    assert found["mul"][0] >= 1.0


def test_a_compiled_chain_reads_what_enters_and_writes_what_leaves() -> None:
    """Before the product: x is read once, sigmoid's result written. After it: the product is read once, by one of tanh
    and its factor."""
    found = moved(analysis(fused=True), "forward")
    before = [found[name] for name in ("add", "sigmoid")]
    assert sum(writes for _, writes in before) == 1.0
    assert found["sigmoid"] == (0.0, 1.0)
    assert found["tanh"] == (1.0, 0.0)
    assert sum(reads for reads, _ in found.values()) == 2.0


def test_a_compiled_step_moves_less_than_an_eager_one() -> None:
    for phase in ("forward", "backward"):
        eager, compiled = (sum(map(sum, moved(analysis(fused=fused), phase).values())) for fused in (False, True))
        assert compiled < eager


class Standardized(nn.Module):
    """What a batch norm by hand asks for: the variance and the mean over all but the last dim, in one op."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x @ self.weight, (0, 1))
        return (variance + mean).sum()


def test_a_sum_over_rows_with_two_results_writes_both() -> None:
    inputs = (torch.randn(ROWS, 3, WIDTH),)
    program = planning.captured(Standardized(), inputs, {}, batch_dims=[0], batch_size=ROWS)
    both = torch.ops.aten.var_mean.correction
    (found,) = (place.traffic for place in analyse(program).places if place.call and place.call.target is both)
    assert found is not None
    assert (found.reads, found.writes) == ((1.0,), (1.0, 1.0))


def test_a_compiled_loss_reads_the_logits_twice_and_writes_their_gradient() -> None:
    """2 bytes each, as Inductor's kernels do: which word is the target each makes for itself."""
    assert bytes_a_logit(True) == pytest.approx(6, rel=0.05)
