"""Softmax and argmax over a vocabulary: torch's numbers, of logits that stay split."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from parity import captured, errors, planned
from torch import Tensor, nn
from torch.nn import functional as F

from passes.prepare.by_reductions import by_reductions

aten = torch.ops.aten
BATCH, LENGTH, WIDTH = 4, 8, 16
ONE_OP = {aten._softmax.default, aten._softmax_backward_data.default, aten.argmax.default, aten.max.dim}
Made = Callable[[Tensor, Tensor], Tensor]


class Scores(nn.Module):
    """What is made of two heads' scores."""

    def __init__(self, made: Made, classes: int) -> None:
        super().__init__()
        self.made = made
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head, self.teacher = nn.Linear(WIDTH, classes, bias=False), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.up(x).tanh()
        with torch.no_grad():
            taught = self.teacher(h)
        made = self.made(self.head(h) / 2, taught)
        return {"loss": made if made.dim() == 0 else self.head(h).square().mean(), "made": made}


def _distilled(x: Tensor, taught: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(x / 2, -1), F.softmax(taught / 2, -1), reduction="batchmean")


def _entropy(x: Tensor, taught: Tensor) -> Tensor:
    chances = x.flatten(0, 1).softmax(-1)
    return -(chances * torch.where(chances > 0, chances, 1).log()).sum(-1).mean()


def _turned(x: Tensor, taught: Tensor) -> Tensor:
    """Classes in the middle, in bf16."""
    return (x.mT.bfloat16().softmax(1) * taught.mT).float().sum(1).square().mean()


def _accuracy(x: Tensor, taught: Tensor) -> Tensor:
    return (x.softmax(-1).argmax(-1) == taught.argmax(-1)).float()


def _kept(x: Tensor, taught: Tensor) -> Tensor:
    return x.mT.argmax(1, keepdim=True)


def _confident(x: Tensor, taught: Tensor) -> Tensor:
    """A gradient through the largest, which are those of whole numbers often."""
    largest, which = (8 * x).round().max(-1)
    surest = taught.mT.max(1, keepdim=True).values
    return (largest.square() - 8 * x.max(-1).values * (which % 3)).mean() + surest.mean()


def _guess(x: Tensor, taught: Tensor) -> Tensor:
    return (3 * x).round().mT.max(1).indices


MADE: list[Made] = [_distilled, _entropy, _turned, _accuracy, _kept, _confident, _guess]


@pytest.mark.parametrize("classes", [48, 37])
@pytest.mark.parametrize("made", MADE)
def test_scores_stay_split(made: Made, classes: int) -> None:
    """37 classes are padded. No rank has all scores of a sample."""
    torch.manual_seed(0)
    model, kwargs = Scores(made, classes), {"x": torch.randn(BATCH, LENGTH, WIDTH)}
    program = captured(model, kwargs)
    assert not any(node.target in ONE_OP for node in program.graph.graph.nodes)
    _, _, local = planned(program, {"dp": 2, "tp": 2}, "megatron")
    found = errors(model, local, kwargs)
    assert found.output < (1e-2 if made is _turned else 1e-5), found
    assert found.gradient < (1e-2 if made is _turned else 1e-4), found
    if classes % 2 == 0:
        values = [node.meta.get("val") for node in local.graph.graph.nodes]
        wide = {tuple(value.shape) for value in values if isinstance(value, Tensor) and classes in value.shape}
        assert all(shape in ((classes, WIDTH), (WIDTH, classes), (classes,)) for shape in wide), wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ties_and_what_is_no_number_are_as_in_torch(dtype: torch.dtype) -> None:
    rows = torch.randn(64, 37, generator=torch.Generator().manual_seed(0)).round()
    rows[0], rows[1], rows[2] = 1.0, -math.inf, math.nan
    rows[3, [2, 9]], rows[4, [5, 7]] = math.inf, math.nan
    rows[5, 3], rows[5, 8], rows[6, :36] = math.inf, math.nan, -math.inf

    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 37, bias=False, dtype=dtype)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            scores = x + 0 * self.head(torch.ones(1, 1, dtype=dtype)).detach()
            return scores.argmax(-1), scores.softmax(-1), *scores.max(-1), self.head.weight.sum()

    model = Fed()
    program = captured(model, {"x": rows.to(dtype)})
    assert not any(node.target in ONE_OP for node in program.graph.graph.nodes)
    exponentials = program.graph.graph.find_nodes(op="call_function", target=aten.exp.default)
    wide = torch.float64 if dtype is torch.float64 else torch.float32  # bf16 sums would be off by more than a rounding
    assert [node.meta["val"].dtype for node in exponentials] == [wide]
    assert "test_passes_by_reductions.py" in exponentials[0].meta["source"]
    known = {"x": rows.to(dtype), "head.weight": model.head.weight.detach()}
    values = [known.get(one.name, torch.ones(())) for one in program.inputs]
    chosen, chances, largest, which, *_ = torch.fx.Interpreter(program.graph).run(*values)
    torch.testing.assert_close(chosen, rows.to(dtype).argmax(-1))
    torch.testing.assert_close(largest, rows.to(dtype).max(-1).values, equal_nan=True)
    torch.testing.assert_close(which, rows.to(dtype).max(-1).indices)
    torch.testing.assert_close(chances, rows.to(dtype).softmax(-1), equal_nan=True)


def test_attention_and_routers_stay_one_op() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.router = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            query, key, value = self.qkv(x).chunk(3, -1)
            x = (query @ key.mT).softmax(-1) @ value
            weights = self.router(x).softmax(-1)
            return {"loss": (weights.amax(-1) * x.mean(-1)).mean(), "expert": weights.argmax(-1)}

    program = captured(Mixed(), {"x": torch.randn(BATCH, LENGTH, WIDTH)})
    assert sum(node.target in ONE_OP for node in program.graph.graph.nodes) == 5
    assert by_reductions(program) is program


def test_dims_of_one_entry_or_of_positions_too_stay_one_op() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, 48)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            scores = self.head(x)
            one, all_of_a_sample = scores[..., None].softmax(-1), scores.flatten(1).softmax(-1)
            return {"loss": one.mean() + all_of_a_sample.square().mean()}

    program = captured(Pooled(), {"x": torch.randn(BATCH, LENGTH, WIDTH)})
    assert sum(node.target is aten._softmax.default for node in program.graph.graph.nodes) == 2
