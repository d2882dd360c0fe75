"""Which nodes of repeated layers are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopar

BATCH, WIDTH = 8, 16


class Translating(nn.Module):
    """An encoder and a decoder of two layers: the first turns the encoder's states as both of them read these."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.layers = nn.Transformer(WIDTH, 2, 1, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        hidden = self.layers(self.embed(src), self.embed(tgt), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tgt.flatten())


@pytest.mark.parametrize("length", [BATCH, BATCH + 2])
def test_a_sequence_as_long_as_the_batch_is_no_batch(length: int) -> None:
    """Samples are independent: ranks that have some each exchange the loss, whatever the lengths are."""
    inputs = {name: torch.randint(0, 32, (BATCH // 2, length)) for name in ("src", "tgt")}
    plan = autopar.plan(Translating(), {"dp": 2}, inputs, strategy="ddp", hardware="h100")
    assert [(each.kind, each.count) for each in plan.collectives if each.role == "activation"] == [("all_reduce", 1)]
    assert not any("attend to one another" in note for note in plan.notes)
