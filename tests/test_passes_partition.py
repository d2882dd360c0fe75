"""Results of a backward are written to by whoever gets them: each must be in memory of its own."""

from __future__ import annotations

import pytest
import torch
from parity import captured, planned
from torch import fx, nn

from passes.partition import split


class Rows(nn.Module):
    """Two weights whose gradients are rows of one product, apart from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ torch.cat([self.upper, self.lower]).t()).square().mean()}


class Overlapping(nn.Module):
    """Four biases of one sum: two have one gradient, the third a part of it, the fourth another that overlaps."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)
        self.head, self.tail = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = nn.functional.pad(self.head, (0, 3)) + nn.functional.pad(self.tail, (3, 0))
        return {"loss": (self.left(x) + self.right(x) + parts).tanh().mean()}


class Complex(nn.Module):
    """A complex weight's parts as two real parameters, and the sum of a parameter, whose gradient is what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.again = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(6, 2))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        turned = torch.view_as_complex(self.pairs) + torch.view_as_complex(self.again)
        return {"loss": (x * turned.abs()).mean() + self.scale}


@pytest.mark.parametrize(("model", "copies"), [(Rows, 0), (Overlapping, None), (Complex, None)])
def test_gradients_do_not_share_memory(model: type[nn.Module], copies: int | None) -> None:
    torch.manual_seed(0)
    program = captured(model(), {"x": torch.randn(4, 6)})
    backward = split(planned(program, {"dp": 1}, "auto")[2]).backward
    assert backward is not None
    clones = backward.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert copies is None or len(clones) == copies  # what shares nothing is not copied
    given = []
    for node in backward.graph.find_nodes(op="placeholder"):
        val = node.meta["val"]
        given.append(torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).fill_(1))
    results = [result for result in fx.Interpreter(backward).run(*given) if result is not None]
    for number, result in enumerate(results, 2):
        result.fill_(number)
    assert [result.unique().tolist() for result in results] == [[n] for n in range(2, 2 + len(results))]
    assert all(value.unique().tolist() == [1] for value in given)
