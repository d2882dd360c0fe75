"""Running averages over ranks in compiled code, on two ranks, against arithmetic on what both have.

The sums are read by rows and by entries, so that their loops are laid out anew to be fused with a quotient's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx

from passes.lower.lower import compiled

c10d = torch.ops._c10d_functional
CODES, WIDTH, SAMPLES = 12, 24, 40


def values(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and vectors of a rank's samples, and the averages before, which all ranks share."""
    mine, shared = (torch.Generator().manual_seed(seed) for seed in (1 + rank, 0))
    return (
        torch.rand(SAMPLES, CODES, generator=mine),
        torch.randn(SAMPLES, WIDTH, generator=mine),
        torch.ones(CODES),
        torch.randn(CODES, WIDTH, generator=shared),
    )


def averaged(weights: Tensor, vectors: Tensor, counts: Tensor, sums: Tensor) -> tuple[Tensor, ...]:
    """A step of the averages, summed over ranks as a rank's program does it."""
    group = dist.group.WORLD.group_name
    counted = c10d.wait_tensor(c10d.all_reduce(weights.sum(0), "sum", group))
    counts = 0.9 * counts + 0.1 * counted
    summed = c10d.wait_tensor(c10d.all_reduce(weights.T @ vectors, "sum", group))
    sums = 0.9 * sums + 0.1 * summed
    return counts, sums / counts.unsqueeze(1), sums


def _averages(rank: int, ranks: int) -> None:
    mine = values(rank)
    gm = make_fx(averaged, tracing_mode="fake")(*mine)
    with config.patch(fx_graph_cache=False):
        found = compiled(gm)(list(mine))
    weights, vectors = (torch.cat(each) for each in zip(*(values(r)[:2] for r in range(ranks)), strict=True))
    counts, sums = 0.9 * mine[2] + 0.1 * weights.sum(0), 0.9 * mine[3] + 0.1 * weights.T @ vectors
    for result, wanted in zip(found, (counts, sums / counts[:, None], sums), strict=True):
        torch.testing.assert_close(result, wanted)


def test_averages_over_ranks_are_read_behind_the_waits_for_them() -> None:
    run_ranks(_averages, 2)
