"""Dropout on real ranks: masks by the global element, the step and the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import autopar

P = 0.25


class Dropping(nn.Module):
    """Two layers with dropout between and behind; returns what is kept of ones, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        kept = F.dropout(torch.ones_like(x), P, self.training)
        for layer in self.layers:
            x = F.dropout(F.gelu(layer(x)), P, self.training)
        return {"loss": x.square().mean(), "kept": kept}


def _module(mesh: Any, x: Tensor, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    plan = autopar.plan(
        Dropping(), mesh, (x,), strategy="fsdp", options=autopar.Options(compile=False, seed=5, **options)
    )
    torch.manual_seed(0)
    return autopar.apply(Dropping(), plan, mesh)


def _steps(model: nn.Module, x: Tensor, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(x)["loss"]
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


def _ranks(rank: int, ranks: int) -> tuple[list[float], Tensor]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    x = torch.ones(64 // ranks, 16, 32)
    model = _module(mesh, x)
    kept = model(x)["kept"]
    assert kept.to_local().numel() == x.numel()  # split, along whichever dim: what it is made of is no input
    share = (kept.to_local() != 0).float().mean().item()
    assert abs(share - (1 - P)) < 0.02, share  # 5 standard deviations of 16384 draws are 0.017
    assert set(kept.to_local().unique().tolist()) == {0.0, torch.tensor(1 / (1 - P)).item()}
    whole = kept.full_tensor()
    assert not torch.equal(whole[:32], whole[32:])  # ranks drop different elements
    assert model.random_steps == 1
    model.random_steps = 0
    losses = _steps(model, x, 4)
    assert model.random_steps == 4
    # As if it were stopped after two steps.
    stopped = _module(mesh, x)
    assert _steps(stopped, x, 2) == losses[:2]
    resumed = _module(mesh, x)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.random_steps == 0
    resumed.random_steps = stopped.random_steps
    assert _steps(resumed, x, 2) == losses[2:]
    with pytest.raises(ValueError, match="-1"):
        resumed.random_steps = -1
    # What is computed again for backward is dropped alike.
    again = _module(mesh, x, recompute="full")
    torch.testing.assert_close(_steps(again, x, 4), losses, rtol=1e-6, atol=0.0)
    dist.barrier()
    return losses, whole


def test_dropout_on_ranks() -> None:
    """Reproducible over a stop, right in its statistics, and the same on one rank as on two."""
    (two, whole), _ = run_ranks(_ranks, 2, timeout_s=250)
    ((one, alone),) = run_ranks(_ranks, 1, timeout_s=250)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0.0)
    assert torch.equal(whole, alone)


def _seeds_that_differ(rank: int, ranks: int, differ: bool) -> list[float]:
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    x, options = torch.randn(4, 16, 32), autopar.Options(compile=False, progress=False, seed=3 + differ * rank)
    model = autopar.parallelize(Dropping(), mesh, (x,), strategy="megatron", options=options)
    return _steps(model, x, 3)


def test_all_ranks_draw_by_rank_0s_seed() -> None:
    """A script that seeds each rank by its number would have ranks that share a batch drop other elements of it."""
    alike, other = (run_ranks(_seeds_that_differ, 2, differ) for differ in (False, True))
    assert other == alike
