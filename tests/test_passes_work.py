"""Arithmetic of an op on one rank, counted by hand."""

from __future__ import annotations

import pytest
import torch
from parity import captured
from torch import nn

from costmodel.compute import matmul, op_s
from costmodel.presets import hardware
from passes.rules.call import call_of
from passes.rules.work import work_of
from passes.runs.model_flops import model_flops

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


@pytest.mark.parametrize(
    ("made", "rows", "inner", "columns"),
    [
        (nn.Conv2d(3, 768, 16, stride=16), 64 * 14 * 14, 3 * 16 * 16, 768),
        (nn.Conv2d(64, 256, 3, padding=1), 64 * 224 * 224, 64 * 3 * 3, 256),
        (nn.ConvTranspose2d(64, 256, 2, stride=2), 64 * 224 * 224, 64, 256 * 2 * 2),
    ],
    ids=["patches", "dense", "transposed"],
)
def test_a_convolution_takes_as_long_as_the_product_that_libraries_make_of_it(
    made: nn.Conv2d | nn.ConvTranspose2d, rows: int, inner: int, columns: int
) -> None:
    """A row of it is a position; what is read and written is less or more than the product's."""
    device = hardware("h100").device
    with torch.device("meta"):
        x = torch.empty(64, made.in_channels, 224, 224)
    program = captured(made.to("meta", torch.bfloat16), {"input": x.bfloat16()})
    (node,) = (n for n in program.graph.graph.nodes if n.target is torch.ops.aten.convolution.default)
    call = call_of(node)
    work = work_of(call, [facts.shape for facts in call.operands], [tuple(node.meta["val"].shape)])
    product = matmul(rows, columns, inner)
    assert work.flops == product.flops
    moved = work.bytes_moved / (device.memory_bytes_per_s * device.memory_efficiency)
    assert op_s(product, device) / 1.5 < op_s(work, device) < op_s(product, device) + moved
