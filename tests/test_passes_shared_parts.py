"""Compiled steps on real ranks beside eager, where Inductor's memory or strides are not what the graph says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

import autopar
from passes.lower.outer import op_step

c10d = torch.ops._c10d_functional


class Balanced(nn.Module):
    """A router whose bias moves by its load; the load's sum over ranks goes with another."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        chosen = torch.zeros_like(share).scatter(1, share.topk(2, -1).indices, 1.0)
        load = chosen.mean(0)
        loss = (load * share.mean(0)).sum()
        with torch.no_grad():
            self.bias.copy_(load.mean() - load)
        return loss


class Joined(Balanced):
    """Sums over ranks that the model joins itself, and reads apart."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        load = share.detach().square().mean(0)
        loss = torch.cat([load, share.mean(0)]).square().sum()
        with torch.no_grad():
            self.bias.copy_(load.mean() - load)
        return loss


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, torch.tanh(self.inner(x)), torch.sigmoid(self.gate(x)))


class Transposed(nn.Module):
    """Layers on what a convolution gives, transposed: `lerp` has other strides decomposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.layers = nn.ModuleList(_Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x.unflatten(0, (-1, 2)).transpose(1, 2).repeat(1, 4, 6)[:, :8])).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Scaled(nn.Module):
    """Low-rank adapters, and an average of products that is kept in place: sums with a scaled product."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.narrow, self.wide = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.register_buffer("average", torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.T @ x, alpha=0.1)
        made = torch.add(self.base(x), x @ self.narrow.weight.T @ self.wide.weight.T, alpha=0.1)
        return (made @ self.average).square().mean()


def _main(rank: int, ranks: int, build: Callable[[], nn.Module], strategy: str) -> tuple[float, float]:
    """The largest error of a gradient or buffer, and of the loss."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    model, x = build(), torch.randn(16, 8)
    other = copy.deepcopy(model)
    wanted = other(x)
    wanted.backward()
    mine = x.chunk(ranks)[rank]
    plan = autopar.plan(model, mesh, (mine,), strategy=strategy, options=autopar.Options(progress=False))
    made = autopar.apply(model, plan, mesh)
    found = made(mine)
    found.backward()
    whole = {name: p.grad.full_tensor() for name, p in made.named_parameters()}
    pairs = [(whole[name], p.grad) for name, p in other.named_parameters()]
    buffers = dict(made.named_buffers())
    pairs += [(getattr(b, "full_tensor", lambda b=b: b)(), dict(other.named_buffers())[n]) for n, b in buffers.items()]
    error = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)
    return error, abs(float(found.detach()) - float(wanted.detach()))


@pytest.mark.parametrize(
    ("build", "strategy"), [(Balanced, "ddp"), (Joined, "ddp"), (Transposed, "fsdp"), (Scaled, "ddp")]
)
def test_a_compiled_step_is_that_of_one_device(build: Callable[[], nn.Module], strategy: str) -> None:
    for error, of_loss in run_ranks(_main, 2, build, strategy, timeout_s=300):
        assert error < 1e-4
        assert of_loss < 1e-5


@pytest.mark.parametrize("read", [False, True], ids=["joined", "joined and read"])
def test_what_is_joined_is_added_up_in_place_only_where_no_part_is_read_elsewhere(read: bool) -> None:
    """A region that gives a `cat` and a view of one of its parts has both in the same memory."""

    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        part = x.sin().sum(0)
        summed = c10d.all_reduce(torch.cat([part, w[0]]), "sum", "0")
        return (c10d.wait_tensor(summed), *([part.view(2, 3)] if read else []))

    graph = make_fx(step, tracing_mode="fake")(torch.randn(4, 6), torch.randn(2, 6)).graph
    (node,) = graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
    assert op_step(node).call is (c10d.all_reduce.default if read else c10d.all_reduce_.default)
