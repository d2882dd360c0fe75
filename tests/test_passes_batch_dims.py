"""The batch dim of what a model returns without a loss: by what the dim is, not by its length."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import autopar
from passes.analysis.analysis import analyse
from passes.capture.capture import capture
from passes.planner.pipeline import prepare

BATCH = 4
LENGTH = 8
"""A multiple of the batch, as widths are: lengths tell nothing."""
WIDTH = 16
OPTIONS = autopar.Options(compile=False, progress=False, batch_dims={"x": 1})


class Returning(nn.Module):
    """What it is told to, of itself, its input and the hidden states."""

    def __init__(self, returned: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.positions = nn.Buffer(torch.randn(LENGTH, WIDTH))
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        return self.returned(self, x, self.up(x).tanh())


FIRST: Mapping[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int | None]] = {
    "samples": (lambda m, x, h: h, 0),
    "tokens": (lambda m, x, h: h.flatten(0, 1), 0),
    "sequence first": (lambda m, x, h: h.transpose(0, 1), 1),
    "heads first": (lambda m, x, h: h.unflatten(-1, (4, 4)).permute(2, 0, 1, 3), 1),
    "all pairs": (lambda m, x, h: h.flatten(0, 1) @ h.flatten(0, 1).t(), 0),
    "mean over the batch": (lambda m, x, h: h.mean(0), None),
    "covariance": (lambda m, x, h: h.flatten(0, 1).t() @ h.flatten(0, 1), None),
    "a weight": (lambda m, x, h: m.other.weight * 1.5, None),
    "rows of a weight": (lambda m, x, h: m.other.weight[:BATCH] @ m.other.weight.t(), None),
    "a buffer": (lambda m, x, h: m.positions + 1, None),
    "a weight for each sample": (lambda m, x, h: (m.other.weight * 2).expand(x.shape[0], -1, -1), 0),
    "zeros": (lambda m, x, h: torch.zeros(x.shape[0], 3), 0),
    "twice": (lambda m, x, h: torch.cat([h, h]), 0),
    "tokens by position": (lambda m, x, h: h.transpose(0, 1).flatten(0, 1), 0),
    "the input": (lambda m, x, h: x, 0),
}


@pytest.mark.parametrize("name", FIRST)
def test_batch_dims_of_outputs(name: str) -> None:
    returned, dim = FIRST[name]
    model, x = Returning(lambda m, x, h: (h, returned(m, x, h))), torch.randn(BATCH, LENGTH, WIDTH)
    program = analyse(prepare(capture(model, (x,), batch_dims=(0,), batch_size=BATCH))).program
    assert [out.batch_dim for out in program.outputs if out.kind == "output"] == [0, dim]
    differentiable = [out.batch_dim for out in program.outputs if out.kind == "output" and out.requires_grad]
    assert [given.batch_dim for given in program.inputs if given.kind == "tangent"] == differentiable
    told = [note for note in program.notes if note.startswith("output 1: samples are the inner part of its dim 0")]
    assert len(told) == (name in ("twice", "tokens by position"))


def test_a_loss_leaves_outputs_as_they_were() -> None:
    model, x = Returning(lambda m, x, h: (h.mean(), m.other.weight * 1.5)), torch.randn(BATCH, LENGTH, WIDTH)
    program = prepare(capture(model, (x,), batch_dims=(0,), batch_size=BATCH))
    assert analyse(program).program == program


class SequenceFirst(nn.Module):
    """Logits of [sequence, batch], and a weight for a penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0)
        self.head = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.layer(self.embed(x))), self.head.weight.t() * 1.5


@pytest.mark.parametrize("length", [LENGTH, 7])
def test_a_batch_in_the_second_dim_on_a_mesh(length: int) -> None:
    """Seven positions are padded over four ranks."""
    torch.manual_seed(0)
    x = torch.randint(0, 12, (length, 2))
    for strategy in ("fsdp", "megatron"):
        parity = autopar.verify(
            SequenceFirst(), {"dp": 2, "tp": 4}, {"x": x}, strategy=strategy, hardware="cpu", options=OPTIONS
        )
        assert parity.ok, parity


def _loss(out: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    logits, weight = out
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + weight.square().sum()


def _on_ranks(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager = SequenceFirst()
    x, labels = (torch.randint(0, 12, (LENGTH, BATCH)) for _ in range(2))
    mine, own = x.chunk(ranks, 1)[rank], labels.chunk(ranks, 1)[rank]
    model = autopar.parallelize(eager, mesh, {"x": mine}, strategy="fsdp", options=OPTIONS)
    out = model(x=mine)
    for found, wanted in zip(out, eager(mine), strict=True):
        torch.testing.assert_close(found, wanted)
    _loss(out, own).backward()
    _loss(eager(x), labels).backward()
    for name, parameter in model.named_parameters():
        wanted = eager.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted, atol=1e-5, rtol=1e-4)


def test_each_rank_has_its_samples_and_the_whole_of_what_has_none() -> None:
    run_ranks(_on_ranks, 2)


class Attending(nn.Module):
    """A layer of `torch.nn.TransformerEncoder`, or attention that gives its weights, over samples side by side."""

    def __init__(self, batch_first: bool, fused: bool = True, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.length_dim, self.fused, self.causal = int(batch_first), fused, causal
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=batch_first)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        length = x.shape[self.length_dim]
        mask = nn.Transformer.generate_square_subsequent_mask(length) if self.causal else None
        h = self.layer(x, mask) if self.fused else self.attention(x, x, x)[0]
        return F.mse_loss(h, y)


@pytest.mark.parametrize(("fused", "causal"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_batch_that_attends_to_itself_is_told(batch_first: bool, fused: bool, causal: bool) -> None:
    x = torch.randn(BATCH, LENGTH, WIDTH)
    model = Attending(batch_first, fused, causal)
    program = analyse(prepare(capture(model, (x, x), batch_dims=(0, 0), batch_size=BATCH))).program
    told = [note for note in program.notes if "samples attend to one another" in note]
    assert told == ([] if batch_first else [program.attends])
    assert bool(program.attends) != batch_first


def _sequence_first(rank: int, ranks: int) -> tuple[list[str], list[Tensor]]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(1)
    x, y = (torch.randn(LENGTH, BATCH, WIDTH).chunk(ranks, 1)[rank].contiguous() for _ in range(2))
    said, losses = [], []
    for dims in (None, {"x": 1, "y": 1}):
        options = autopar.Options(compile=False, progress=False, batch_dims=dims)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = autopar.parallelize(Attending(batch_first=False), mesh, {"x": x, "y": y}, options=options)
        said.append(" ".join(str(each.message) for each in caught if "attend" in str(each.message)))
        losses.append(model(x, y).detach())
    return said, losses


def test_sequences_first_are_warned_of() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(LENGTH, BATCH, WIDTH), torch.randn(LENGTH, BATCH, WIDTH)
    wanted = Attending(batch_first=False)(x, y)
    (first, *others) = run_ranks(_sequence_first, 2)
    for said, losses in (first, *others):
        assert abs(losses[0] - wanted) > 1e-3 * wanted  # of sequences twice as long
        assert abs(losses[1] - wanted) < 1e-6 * wanted
        assert not said[1]
    assert "where the batch is dim 0 of 'x' and dim 0 of 'y'" in first[0][0]
