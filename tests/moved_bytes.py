"""Bytes that a step's pointwise ops and reductions move, as the analysis has them: for tests of losses."""

from __future__ import annotations

import math

import torch
from torch import nn

from autopar import planning
from passes.analysis.analysis import analyse
from passes.analysis.fusion import Fused

ROWS, WIDTH = 64, 16


class Head(nn.Module):
    """bf16 logits of so many words, and their loss in fp32."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, WIDTH, dtype=torch.bfloat16, device="meta"))

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy((x @ self.weight.T).float(), targets)


def bytes_a_logit(fused: Fused) -> float:
    """Of that loss, forward and backward: what more words move."""
    few, many = (_moved(words, fused) for words in (4096, 8192))
    return (many - few) / (ROWS * 4096)


def _moved(words: int, fused: Fused) -> float:
    inputs = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16), torch.empty(ROWS, dtype=torch.long)
    program = planning.captured(Head(words), inputs, {}, batch_dims=[0, 0], batch_size=ROWS)
    found = 0.0
    for place in analyse(program, fused=fused).places:
        if place.call is None or place.traffic is None:
            continue
        shares = (*place.traffic.reads, *place.traffic.writes)
        for share, facts in zip(shares, (*place.call.operands, *place.call.results), strict=True):
            found += place.count * share * facts.dtype.itemsize * math.prod(facts.shape) if facts else 0.0
    return found
