"""What trainers keep of a parallel module."""

from __future__ import annotations

import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import autopar
from autopar.checkpoints import load_whole_optimizer, whole_state


class Tied(nn.Module):
    """The head is the embedding's weight, and is followed by another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=True)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.embedding(ids)).flatten(0, 1), ids.flatten())


def _kept(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.zeros(2, 4, dtype=torch.long)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    options = autopar.Options(compile=False, progress=False)
    module = autopar.apply(model, autopar.plan(model, mesh, (ids,), strategy="fsdp", options=options), mesh)
    assert any(placement.is_shard() for placement in module.embedding.weight.placements)
    for _ in range(2):  # the second one would meet what the first left over
        state = whole_state(module, keep=rank == 0)
        assert list(state) == (list(model.state_dict()) if rank == 0 else [])
        for name, value in model.state_dict().items() if rank == 0 else ():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    if rank == 0:
        assert state["head.weight"] is state["embedding.weight"]
    _steps_of_one_number(mesh)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).mean()


def _steps_of_one_number(mesh: DeviceMesh) -> None:
    """A count of steps has the shape of a parameter that is one number, not its dtype: 257 is none in bfloat16."""
    model, x = Scaled(), torch.ones(2, 4, dtype=torch.bfloat16)
    one = torch.optim.AdamW(model.parameters())
    model(x).backward()
    one.step()
    saved = one.state_dict()
    del one
    saved["state"][0]["step"].fill_(257.0)
    options = autopar.Options(compile=False, progress=False)
    module = autopar.apply(model, autopar.plan(model, mesh, (x,), strategy="fsdp", options=options), mesh)
    optimizer = torch.optim.AdamW(module.parameters())
    load_whole_optimizer(module, optimizer, saved)
    (state,) = optimizer.state.values()
    assert isinstance(state["exp_avg"], DTensor)
    assert not isinstance(state["step"], DTensor)
    assert state["step"].item() == 257.0


def test_weights_come_whole_and_states_in_parts() -> None:
    run_ranks(_kept, 2)
