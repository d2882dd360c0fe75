"""Kinds of parameters: tied, used twice, frozen in part, adapters beside frozen weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from passes.capture.capture import capture
from passes.rewrite.ledger import ledger

MESH = {"dp": 2, "tp": 2}
aten = torch.ops.aten


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def check(model: nn.Module, inputs: Any, strategy: str = "auto") -> autopar.Parity:
    """Parity with eager on one device; gradients of just what is trained."""
    parity = autopar.verify(model, MESH, inputs, strategy=strategy)
    assert parity.ok, parity
    assert {tensor.name for tensor in parity.tensors if tensor.kind == "gradient"} == trained_names(model)
    return parity


def lora(rank: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    """A LLaMA with `peft`'s adapters beside its attention and its MLP, of which some values are not zero."""
    peft = pytest.importorskip("peft")
    model, _, kwargs = build("llama")
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config), kwargs


@pytest.mark.parametrize("strategy", ["auto", "megatron"])
def test_adapters_of_peft(strategy: str) -> None:
    model, kwargs = lora()
    assert all("lora" in name for name in trained_names(model))
    check(model, kwargs, strategy)


class Adapted(nn.Linear):
    """A linear layer with an adapter of rank 2, by hand."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, bias=False)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(inner, 2, bias=False), nn.Linear(2, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Blocks(nn.Module):
    """Two blocks of adapted layers between frozen embeddings; loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(Adapted(32, 64), nn.GELU(), Adapted(64, 32)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return {"loss": F.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), ids.roll(1, -1).flatten())}


def test_frozen_weights_cost_no_gradient() -> None:
    """No product makes one, no collective adds one up, and nobody budgets for one."""
    torch.manual_seed(0)
    model, ids = Blocks(), torch.randint(0, 64, (8, 6))
    check(model, {"ids": ids})
    program = capture(model, (), {"ids": ids})
    outputs = {out.name for out in program.outputs if out.kind == "gradient"}
    assert outputs == trained_names(model)
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad}
    made = [
        tuple(node.meta["val"].shape)
        for node in program.graph.graph.nodes
        if node.target is aten.mm.default and node.meta["phase"] == "backward"
    ]
    assert not {shape for shape in made if shape in frozen or shape[::-1] in frozen}
    plan = autopar.plan(model, MESH, {"ids": ids}, strategy="ddp", hardware="h100")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory, rounding = plan.breakdown.memory_bytes, 512 * len(trained_names(model))
    assert memory.get("gradients", 0) <= 4 * trained + rounding
    assert memory.get("optimizer", 0) <= 8 * trained + 2 * rounding
    local = autopar.planning.rewritten(
        autopar.planning.captured(model, (), {"ids": torch.cat([ids, ids])}, batch_dims=[0], batch_size=16), plan
    )
    reduced = [one.full_bytes for one in ledger(local) if one.kind == "all_reduce" and one.phase == "backward"]
    assert sum(reduced) <= 4 * trained + 64


class Shared(nn.Module):
    """One block called three times, a parameter with two names, and one of two layers frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.again = self.block
        self.gates = nn.ParameterList([nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(32))])
        self.gates[1].requires_grad_(False)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block, gate in ((self.block, self.gates[0]), (self.again, self.gates[1]), (self.block, self.gates[0])):
            x = x + gate * block(x)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, -1).flatten()), "last": x}


@pytest.mark.parametrize("strategy", ["auto", "megatron"])
def test_tied_shared_and_partly_frozen(strategy: str) -> None:
    torch.manual_seed(0)
    check(Shared(), {"ids": torch.randint(0, 64, (8, 8))}, strategy)
