"""Batches put behind one another: the numbers of one device, and a batch axis that splits each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity import captured, errors, planned
from torch import Tensor, nn
from torch.nn import functional as F

from passes.prepare.joined import split_joined

aten = torch.ops.aten
BATCH, LENGTH, WIDTH = 4, 16, 16


class Comparing(nn.Module):
    """What it makes of several batches at once, compared as it is told to."""

    def __init__(self, compared: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compared = compared
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def encoded(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2)).tanh().mean(1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.compared(self.encoded(torch.cat([x, y])), x, y)}


def _chunks(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Preferences, as DPO has them."""
    chosen, rejected = z.chunk(2)
    return -F.logsigmoid(chosen.sum(-1) - rejected.sum(-1)).mean()


def _pairs(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """All against all, as SimCLR has them."""
    scores = (z @ z.t()).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.cat([torch.arange(len(x), len(z)), torch.arange(len(x))]))


def _slices(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A third batch behind them, and cuts that hold one and two."""
    z = torch.cat((z, x.mean(1)), 0)
    return (z[: len(x)] * z[len(x) : 2 * len(x)]).sum() + z[len(x) :].square().mean() + z[-len(x) :].sum()


def _heads(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Heads put behind one another, as Set Transformer has them."""
    parts = torch.cat(z[: len(x)].split(4, 1), 0)
    return torch.cat(parts.cumsum(1).split(len(x), 0), 1).square().sum()


@pytest.mark.parametrize("compared", [_chunks, _pairs, _slices, _heads])
def test_numbers_are_those_of_one_device_and_each_rank_has_its_share(
    compared: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model = Comparing(compared)
    kwargs = {name: torch.randn(BATCH, LENGTH, WIDTH) for name in "xy"}
    program = captured(model, kwargs)
    for strategy, mesh in (("ddp", {"dp": 2}), ("megatron", {"dp": 2, "tp": 2})):
        *_, local = planned(program, mesh, strategy)
        found = errors(model, local, kwargs)
        assert found.output < 1e-5, found
        assert found.gradient < 1e-4, found
        products = local.graph.graph.find_nodes(op="call_function", target=aten.mm.default)
        assert max(node.meta["val"].shape[0] for node in products) == BATCH * LENGTH


def test_what_is_no_whole_batch_stays() -> None:
    """Halves of a batch in turn, rows of weights, and what lies side by side."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.other = nn.Linear(WIDTH, BATCH), nn.Linear(WIDTH, BATCH)

        def forward(self, x: Tensor) -> Tensor:
            turned = torch.cat([x[BATCH // 2 :], x[: BATCH // 2]])
            rows = torch.cat([self.up.weight, self.other.weight])
            return (torch.cat([turned, x], 1) @ rows.t()).square().mean()

    program = captured(Rows(), {"x": torch.randn(BATCH, LENGTH, WIDTH)})
    assert split_joined(program) is program
