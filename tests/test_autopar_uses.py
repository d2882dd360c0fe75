"""What users do with a parallel module beside training: own batch classes, checkpoints of one device, wrong calls."""

from __future__ import annotations

import copy
import io
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity import assert_near
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import autopar
from autopar.examples import described, restored
from passes.capture.capture import capture
from passes.capture.inputs import flatten_inputs
from passes.capture.one_process import as_one_process
from passes.errors import CaptureError, PlanMismatchError


@dataclass(slots=True)
class Batch:
    """A batch as a user writes one."""

    x: Tensor
    y: Tensor
    scale: float = 2.0


class Regression(nn.Module):
    """Takes a `Batch`; has a method beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(7, 12), nn.Linear(12, 3)

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x).relu()
        return out

    def forward(self, batch: Batch) -> Tensor:
        return batch.scale * F.mse_loss(self.down(self.encode(batch.x)), batch.y)


def _uses(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(1)
    x, y = torch.randn(2 * ranks, 7), torch.randn(2 * ranks, 3)

    def batch(shift: float, rank: int | None) -> Batch:
        rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        return Batch(x[rows] + shift, y[rows])

    options = autopar.Options(compile=False, progress=False)
    module = autopar.parallelize(Regression(), mesh, (batch(0, rank),), options=options)
    eager = Regression()
    for shift in (0.0, 1.0):  # no tensor of the example is kept
        assert_near(module(batch(shift, rank)), eager(batch(shift, None)).detach(), "loss")

    # A checkpoint of one device, and of a module that stores its parts otherwise, load by name.
    with torch.no_grad():
        eager.up.weight.mul_(3)
    assert module.load_state_dict(eager.state_dict(), strict=True)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.full_tensor(), eager.get_parameter(name)), name

    loss = torch.compile(module)(batch(0, rank))  # ours already: it runs as it is
    loss.backward()
    assert_near(loss, eager(batch(0, None)).detach(), "loss under torch.compile")
    assert module.up.weight.grad is not None
    assert_near(copy.deepcopy(module)(batch(0, rank)), loss, "loss of a copy")

    with pytest.raises(ValueError, match=r"^up was called outside of the model's forward.*full_state_dict=True"):
        module.encode(x)
    with pytest.raises(TypeError, match="state_dict"):
        torch.save(module, io.BytesIO())
    module(batch(0, rank).__class__(x[:1], y[:1]))  # a call of a new kind is captured with inner modules as they were


def test_a_module_in_use() -> None:
    run_ranks(_uses, 2)


class Holder:
    """An object with a tensor somewhere inside."""

    def __init__(self, held: Any) -> None:
        self.parts = [{"deep": held}, self]


@pytest.mark.parametrize("held", [torch.ones(2), np.ones(2), nn.Linear(2, 2)])
def test_tensors_out_of_sight_are_refused(held: Any) -> None:
    with pytest.raises(ValueError, match=r"^cache is a Holder, an object that holds tensors.*use_cache=False"):
        flatten_inputs((), {"x": torch.ones(2), "cache": Holder(held)})
    assert len(flatten_inputs((), {"x": torch.ones(2), "settings": Holder("plain")})[0]) == 2


class Filling(nn.Module):
    """Puts what it computes into an object that it is given, as a key-value cache is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        cache.parts.append(self.layer(x))
        return self.layer(x).square().mean()


def test_an_object_that_the_forward_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="cache is a Holder"):
        autopar.plan(Filling(), {"dp": 2}, {"x": torch.ones(2, 4), "cache": Holder(None)}, hardware="h100")


Pair = namedtuple("Pair", ["x", "y"])


def test_containers_are_described_by_shapes() -> None:
    """Ranks compare descriptions: values, and where an object lies in memory, must not be in them."""
    for make in (lambda: Pair(torch.randn(2), 3), lambda: Holder(None)):
        one, other = (described(((), {"given": make()})) for _ in range(2))
        assert one == other
        with pytest.raises(PlanMismatchError, match=r"Pair|Holder"):
            restored(one)
    assert described(((), {"given": Pair(torch.ones(2), 3)})) != described(((), {"given": Pair(torch.ones(3), 3)}))


class Exchanges(nn.Module):
    """As written for `DistributedDataParallel`: statistics, a centre and negatives of all ranks' samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Linear(7, 8), nn.SyncBatchNorm(8))
        self.other = nn.Linear(3, 8)
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, other = self.one(x), self.other(y)
        ranks, total = 1, other.detach().sum(0)
        if dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(total)
            parts = [torch.zeros_like(other) for _ in range(ranks)]
            dist.all_gather(parts, other)
            other = torch.cat(parts)
        self.center.mul_(0.9).add_(total / (len(x) * ranks), alpha=0.1)
        return F.cross_entropy(one @ (other - self.center).T, torch.arange(len(x)))


def _exchanges(rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(1)
    x, y = (torch.randn(4 * ranks, width)[4 * rank : 4 * rank + 4] for width in (7, 3))
    options = autopar.Options(compile=False, progress=False)
    model = autopar.parallelize(Exchanges(), mesh, (x, y), options=options)
    loss = model(x, y)
    loss.backward()
    gradient = model.other.weight.grad
    assert dist.is_initialized()
    assert isinstance(gradient, DTensor)
    return loss.detach(), gradient.full_tensor(), model.center.clone()


def test_what_a_model_would_exchange_between_ranks_is_of_the_global_batch() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(8, 7), torch.randn(8, 3)
    eager = Exchanges()
    loss = eager(x, y)
    loss.backward()
    assert eager.other.weight.grad is not None
    wanted = loss.detach(), eager.other.weight.grad, eager.center
    for found in run_ranks(_exchanges, 2):
        for name, one, other in zip(("loss", "gradient", "center"), found, wanted, strict=True):
            assert_near(one, other, name)


def test_other_threads_keep_their_process_group_while_a_model_is_captured(tmp_path: Path) -> None:
    """One may be saving a checkpoint."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with as_one_process(), ThreadPoolExecutor(1) as other:
            assert not dist.is_initialized()
            assert other.submit(dist.get_world_size).result() == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


class _Insists(nn.Module):
    def __init__(self, exchange: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.up, self.exchange = nn.Linear(4, 4), exchange

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        self.exchange(y.detach())
        return y.square().mean()


@pytest.mark.parametrize(
    "exchange",
    [dist.all_reduce, lambda x: dist.get_rank(), lambda x: all_reduce(x, "sum", "0")],
    ids=["collective", "rank", "functional"],
)
def test_a_forward_that_needs_other_ranks_is_refused(exchange: Callable[[Tensor], object]) -> None:
    with pytest.raises(CaptureError, match=r"(?s)\.py:\d+: .*one device computes it.*is_initialized"):
        capture(_Insists(exchange), (torch.randn(2, 4),), batch_dims=[0], batch_size=2)
