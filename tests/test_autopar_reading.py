"""Models that read values of their inputs, on real ranks whose batches give different values, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autopar
from autopar import examples
from autopar.reading import MOST_GRAPHS
from passes.errors import CaptureError

OPTIONS = autopar.Options(compile=False)


class Branches(nn.Module):
    """Takes another way where some batch row has padding, and cuts the sequence at the longest row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(-1).max().item())
        x = self.embed(ids[:, :longest])
        if not mask.all():
            x = x * mask[:, :longest].unsqueeze(-1)
        return self.down(torch.relu(self.up(x))).square().mean()


def batch(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(6) < torch.tensor(lengths).unsqueeze(-1)


BATCHES = [
    batch(1, [6, 6, 5, 2]),  # rank 0's part alone has no padding
    batch(2, [3, 4, 2, 4]),
    batch(3, [6, 6, 6, 6]),
    batch(4, [1, 2, 6, 5]),  # the same graph as the first
]


def eager(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids, mask)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _train(rank: int, ranks: int, planned: bool) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    part = mesh.get_local_rank("dp")
    model = Branches()

    def mine(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return ids.chunk(2)[part], mask.chunk(2)[part]

    if planned:
        plan = autopar.plan(model, mesh, mine(*BATCHES[0]), strategy="megatron", options=OPTIONS)
        module = autopar.apply(model, autopar.Plan.from_json(plan.to_json()), mesh)
    else:
        module = autopar.parallelize(model, mesh, mine(*BATCHES[0]), options=OPTIONS)
    for ids, mask in [*BATCHES, *BATCHES]:
        wanted, gradients = eager(model, ids, mask)
        module.zero_grad()
        loss = module(*mine(ids, mask))
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
    (graphs,) = module.__dict__["_autopar"].executables.values()
    return len(graphs)


@pytest.mark.parametrize("planned", [False, True])
def test_each_batch_runs_the_graph_of_its_values(planned: bool) -> None:
    assert run_ranks(_train, 4, planned) == [3] * 4


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum() * float(x.max())


def _never_the_same(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    module = autopar.parallelize(Grows(), mesh, (torch.zeros(2, 2),), options=OPTIONS)
    try:
        for step in range(MOST_GRAPHS + 1):
            module(torch.full((2, 2), float(step)))
    except CaptureError as error:
        return str(error)
    return ""


def test_a_value_that_is_never_the_same_is_an_error_that_names_the_line() -> None:
    (told,) = run_ranks(_never_the_same, 1)
    assert "test_autopar_reading.py" in told
    assert "16 different" in told


class Queue(nn.Module):
    """Compares each batch with the last rows, which it writes at a place that it keeps in a buffer."""

    def __init__(self, keeps_tensors: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.keeps_tensors = nn.Linear(4, 4), keeps_tensors
        self.register_buffer("rows", torch.randn(80, 4))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y, (count, size) = self.linear(x), (len(x), len(self.rows))
        loss = (y @ self.rows.clone().T).logsumexp(-1).mean()
        with torch.no_grad():
            if self.keeps_tensors:  # as the error says
                self.rows.index_copy_(0, (self.position + torch.arange(count)) % size, y)
                self.position.copy_((self.position + count) % size)
            else:
                place = int(self.position)
                self.rows[place : place + count] = y
                self.position[0] = (place + count) % size
        return loss


def _queued(rank: int, ranks: int, keeps_tensors: bool) -> tuple[str, tuple[str, ...], int]:
    """The error, the notes of the plan, and how many graphs there are."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    batches = torch.randn(MOST_GRAPHS + 6, 4, 4, generator=torch.Generator().manual_seed(1))
    model, alone = Queue(keeps_tensors), Queue(keeps_tensors)
    module = autopar.parallelize(model, mesh, (batches[0].chunk(ranks)[rank],), options=OPTIONS)
    told = ""
    try:
        for x in batches:
            torch.testing.assert_close(module(x.chunk(ranks)[rank]).detach(), alone(x).detach())
    except CaptureError as error:
        told = str(error)
    (graphs,) = module.__dict__["_autopar"].executables.values()
    return told, graphs[-1].local.program.notes, len(graphs)


def test_a_position_in_a_buffer_is_told_with_what_does_instead() -> None:
    for told, notes, graphs in run_ranks(_queued, 2, False):
        assert graphs == MOST_GRAPHS
        assert "writes to the buffer position: keep it a tensor" in told
        assert "pad the inputs" not in told
        assert any("writes to the buffer position" in note for note in notes)


def test_a_position_that_stays_a_tensor_is_one_graph() -> None:
    assert run_ranks(_queued, 2, True) == [("", (), 1)] * 2


def test_a_plan_keeps_the_values_that_its_graph_follows_from() -> None:
    ids, mask = BATCHES[0]
    call: Any = examples.call_of(Branches(), (ids, mask))
    _, kept = examples.restored(examples.described(call, ("mask",)))
    assert kept["ids"].is_meta
    assert torch.equal(kept["mask"], mask)
