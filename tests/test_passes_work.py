"""Arithmetic of an op on one rank, counted by hand."""

from __future__ import annotations

import pytest
import torch
from parity import captured
from torch import nn

from passes.model_flops import model_flops

BATCH, IN, OUT, LENGTH = 2, 8, 12, 40


@pytest.mark.parametrize(
    ("made", "meetings"),
    [
        (nn.Conv1d(IN, OUT, 3, padding=1), BATCH * OUT * 40 * IN * 3),
        (nn.Conv1d(IN, OUT, 4, stride=2), BATCH * OUT * 19 * IN * 4),
        (nn.Conv1d(IN, OUT, 5, padding=2, groups=4), BATCH * OUT * 40 * IN // 4 * 5),
        (nn.ConvTranspose1d(IN, OUT, 4, stride=2), BATCH * IN * 40 * OUT * 4),
    ],
    ids=["dense", "strides", "groups", "transposed"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_convolution_takes_two_flops_where_a_value_and_a_weight_meet(
    made: nn.Module, meetings: int, first: bool
) -> None:
    """Once in forward; in backward for the weight's gradient, and for the input's where something before it learns."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(LENGTH), requires_grad=not first)
            self.convolution = made

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.convolution(x + self.shift)
            return found.square().sum()

    program = captured(Model(), {"x": torch.zeros(BATCH, IN, LENGTH)})
    assert model_flops(program).flops == 2 * meetings * (2 if first else 3)
