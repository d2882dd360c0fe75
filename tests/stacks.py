"""A small model of repeated layers, with what makes them hard to tell alike: dropout, a shared input, a tied head."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        mixed = x.cumsum(1) * angle.cos() + x.roll(1, 2) * angle.sin()
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(mixed)))))


class Stack(nn.Module):
    """Blocks that share an angle; every second one is wider inside where `alternating`."""

    def __init__(self, depth: int, dropout: float = 0.0, alternating: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Block(8, dropout) for _ in range(depth))
        if alternating:
            for layer in self.layers[1::2]:
                layer.up, layer.down = nn.Linear(8, 24), nn.Linear(24, 8)  # type: ignore[union-attr]
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        angle = torch.arange(8, device=ids.device) * 0.1
        for layer in self.layers:
            x = layer(x, angle)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())}
