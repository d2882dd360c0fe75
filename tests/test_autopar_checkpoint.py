"""Checkpoints of a LLaMA between layouts: megatron (2, 2), fsdp (4,), plain `fully_shard`, one device; and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from small_models import build
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import autopar

STEPS = 2


def batch_of(mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    _, _, batch = build("llama")
    return batch if mesh is None else {k: v.chunk(mesh.size(0))[mesh.get_local_rank(0)] for k, v in batch.items()}


def planned(mesh: DeviceMesh, strategy: str, seed: int) -> nn.Module:
    model, _, _ = build("llama", seed)
    plan = autopar.plan(model, mesh, batch_of(mesh), strategy=strategy, options=autopar.Options(compile=False))
    return autopar.apply(model, plan, mesh)


def hand_sharded(mesh: DeviceMesh, seed: int) -> nn.Module:
    model, _, _ = build("llama", seed)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh | None, mean: bool) -> list[float]:
    found = []
    for _ in range(STEPS):
        loss = model(**batch_of(mesh)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().clone()
        if mean:  # a loss of this rank's part alone
            dist.all_reduce(value)
            value /= dist.get_world_size()
        found.append(value.item())
    return found


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: str) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: str, alone: bool = False) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path, no_dist=alone)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def travel(rank: int, ranks: int, folder: str) -> list[str]:
    wrong: list[str] = []
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))

    def check(what: str, found: list[float], wanted: list[float]) -> None:
        if max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)) > 1e-5:
            wrong.append(f"{what}: losses {found}, but the run that was saved went on with {wanted}")

    def equal(what: str, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
        if found.keys() != wanted.keys():
            wrong.append(f"{what}: keys {found.keys() ^ wanted.keys()}")
        wrong.extend(
            f"{what}: {n} differs" for n in found.keys() & wanted.keys() if not torch.equal(found[n], wanted[n])
        )

    first = planned(square, "megatron", seed=0)
    optimizer = optimizer_of(first)
    losses(first, optimizer, square, mean=False)
    save(first, optimizer, f"{folder}/megatron")
    saved = whole(first)
    wanted = losses(first, optimizer, square, mean=False)

    second = planned(line, "fsdp", seed=1)
    optimizer = optimizer_of(second)
    load(second, optimizer, f"{folder}/megatron")
    equal("fsdp on (4,)", whole(second), saved)
    check("fsdp on (4,)", losses(second, optimizer, line, mean=False), wanted)

    third = hand_sharded(line, seed=2)
    optimizer = optimizer_of(third)
    load(third, optimizer, f"{folder}/megatron")
    equal("fully_shard", whole(third), saved)
    save(third, optimizer, f"{folder}/by-hand")
    check("fully_shard", losses(third, optimizer, line, mean=True), wanted)

    alone, _, _ = build("llama", 3)
    optimizer = optimizer_of(alone)
    load(alone, optimizer, f"{folder}/megatron", alone=True)
    equal("one device", whole(alone), saved)
    if rank == 0:
        save_alone = {"model": alone.state_dict()}
        dcp.save(save_alone, checkpoint_id=f"{folder}/alone", no_dist=True)
    check("one device", losses(alone, optimizer, None, mean=False), wanted)
    dist.barrier()

    back = planned(square, "megatron", seed=4)
    optimizer = optimizer_of(back)
    load(back, optimizer, f"{folder}/by-hand")
    equal("back from fully_shard", whole(back), saved)
    check("back from fully_shard", losses(back, optimizer, square, mean=False), wanted)

    assert not torch.equal(whole(back)["lm_head.weight"], saved["lm_head.weight"])
    state = {"model": back.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/alone")
    equal(
        "back from one device", {n: t.full_tensor() for n, t in state["model"].items() if isinstance(t, DTensor)}, saved
    )
    return wrong


@pytest.mark.timeout(300)
def test_a_checkpoint_goes_on_under_every_layout(tmp_path: Path) -> None:
    assert run_ranks(travel, 4, str(tmp_path), timeout_s=280) == [[]] * 4
