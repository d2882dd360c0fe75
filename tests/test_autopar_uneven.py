"""Odd sizes on real ranks: AdamW steps beside one device, the last short batch, other lengths, and a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import autopar

BATCHES = [(4, 7), (4, 7), (2, 5)]
"""(rows of the whole batch, length) of each step: the last is a short batch of another length."""


def build() -> nn.Module:
    """6 heads in 2 groups, FFN 26, a vocabulary of 37."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=26, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=37,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 37, shape) for shape in BATCHES]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float]:
    """(loss, norm of the gradients before clipping)."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def train_and_travel(rank: int, ranks: int, folder: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    wrong: list[str] = []
    alone = build()
    beside = optimizer_of(alone)
    first = batches()[0].chunk(2)[mesh.get_local_rank(0)]
    example = {"input_ids": first, "labels": first}
    options = autopar.Options(compile=False)
    plan = autopar.plan(build(), mesh, example, strategy="megatron", options=options)
    if not any(each.size == 37 and each.padded == 38 for each in plan.padded):
        wrong.append(f"the vocabulary is not padded: {plan.padded}")
    model = autopar.apply(build(), plan, mesh)
    head = model.lm_head.weight
    if head.placements != (Shard(1), Shard(0)) or head.shape != (37, 24):
        wrong.append(f"lm_head lies as {head.placements}, {tuple(head.shape)}")
    optimizer = optimizer_of(model)
    for ids in batches():
        found, wanted = step(model, optimizer, ids.chunk(2)[mesh.get_local_rank(0)]), step(alone, beside, ids)
        if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(found, wanted, strict=True)):
            wrong.append(f"{tuple(ids.shape)}: loss and norm {found}, on one device {wanted}")
    trained, expected = whole(model), whole(alone)
    logits = model(input_ids=first, labels=first).logits
    with torch.no_grad():
        off = (logits.full_tensor() - alone(input_ids=batches()[0]).logits).norm()
    if tuple(logits.shape) != (4, 7, 37) or Shard(2) not in logits.placements or off > 1e-2:
        wrong.append(f"logits {tuple(logits.shape)} lie as {logits.placements}, off by {off}")
    wrong += [n for n in expected if (trained[n] - expected[n]).norm() > 1e-3 * expected[n].norm()]

    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    state = {"model": {n: torch.zeros_like(p) for n, p in expected.items()}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    wrong += [f"{n} of the checkpoint" for n, p in state["model"].items() if not torch.equal(p, trained[n])]

    again = autopar.apply(build(), plan, mesh)
    after = optimizer_of(again)
    model_state, optimizer_state = get_state_dict(again, after)
    both = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(again, after, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    wrong += [f"{n} loaded" for n, p in whole(again).items() if not torch.equal(p, trained[n])]
    if step(again, after, first) != step(model, optimizer, first):
        wrong.append("a step after the checkpoint differs")

    return wrong


@pytest.mark.timeout(300)
def test_odd_sizes_train_and_travel(tmp_path: Path) -> None:
    assert run_ranks(train_and_travel, 4, str(tmp_path), timeout_s=280) == [[]] * 4
