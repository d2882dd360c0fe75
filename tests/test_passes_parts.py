"""What lies between split products: told apart by hand from what is right on a rank's own part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.analysis.analysis import analyse
from passes.capture.capture import capture
from passes.plan.parts import followed
from passes.planner.pipeline import prepare


class Between(nn.Module):
    """Two products and something between."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.wide, self.one = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(4)
        self.register_buffer("fixed", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.gain
        h = self.up(x)
        match self.kind:
            case "gelu":
                h = F.gelu(h) * self.fixed
            case "heads":  # a norm inside of heads: four of four
                h = self.norm(h.unflatten(-1, (4, 4))).flatten(-2)
            case "normalized":
                h = F.normalize(h, dim=-1)
            case "softmax":
                h = h.softmax(-1)
            case "centred":
                h = h - h.mean(-1, keepdim=True)
            case "gain":
                h = h * self.one
            case "wide":
                h = h * self.wide
            case "input":
                h = h * x.mean(-1, keepdim=True)
            case "rolled":
                h = h.roll(1, -1)
        return self.down(h).sum()


@pytest.mark.parametrize(
    ("kind", "problem", "shared"),
    [
        ("gelu", "", set()),
        ("heads", "", {"norm.weight", "norm.bias"}),
        ("normalized", "cannot run on", set()),
        ("softmax", "adds up over what is split", set()),
        ("centred", "adds up over what is split", set()),
        ("gain", "", {"one"}),
        ("wide", "cannot run on", set()),
        ("input", "together with a whole result that has a gradient", set()),
        ("rolled", "cannot run on", set()),
    ],
)
def test_what_lies_between_is_followed(kind: str, problem: str, shared: set[str]) -> None:
    model = Between(kind)
    program = prepare(capture(model, (torch.randn(4, 8),), {}, batch_dims=(0,), batch_size=4, backward=False))
    found = followed(analyse(program), {"up.weight", "up.bias"}, {"down.weight"}, 2)
    assert (problem in found.problem) if problem else not found.problem, found
    assert problem or found.shared == shared


def test_a_dim_that_ranks_do_not_divide_is_not_split() -> None:
    program = prepare(capture(Between("gelu"), (torch.randn(4, 8),), {}, batch_dims=(0,), batch_size=4, backward=False))
    assert "over 3 ranks" in followed(analyse(program), {"up.weight"}, {"down.weight"}, 3).problem
