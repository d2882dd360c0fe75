"""Whole programs under plans drawn at random: each op on its parts, in ways that no solver would choose."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from parity import captured, errors
from random_plans import every_option, random_plan
from small_models import build
from torch import nn

from passes.program.program import Program


def _mixtral() -> tuple[nn.Module, dict[str, Any]]:
    """Four routed experts, two per token, with the router's auxiliary loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=4,
        output_router_logits=True,
    )
    torch.manual_seed(0)
    ids = torch.randint(0, 96, (4, 8))
    return _LossAlone(MixtralForCausalLM(config)), {"input_ids": ids, "labels": ids}


class _LossAlone(nn.Module):
    """A model of which only the loss is wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.model(**inputs).loss}


class _Convolutions(nn.Module):
    """Dense, grouped and depthwise convolutions, group norm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 6)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.gelu(self.grouped(self.stem(pixels)))
        x = self.up(self.norm(self.depthwise(x)))
        x = torch.nn.functional.avg_pool2d(x, 2).flatten(2).mean(-1)
        return {"loss": torch.nn.functional.cross_entropy(self.head(x), labels)}


def _convolutions() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return _Convolutions(), {"pixels": torch.randn(4, 4, 9, 9), "labels": torch.randint(0, 6, (4,))}


@lru_cache
def _program(name: str) -> tuple[nn.Module, dict[str, Any], Program]:
    if name in ("mixtral", "convolutions"):
        model, kwargs = _mixtral() if name == "mixtral" else _convolutions()
    else:
        model, _, kwargs = build(name)
    return model, kwargs, captured(model, kwargs)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 2}, {"dp": 4}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "convolutions"])
def test_any_plan_computes_what_one_device_does(name: str, mesh: dict[str, int], seed: int) -> None:
    model, kwargs, program = _program(name)
    _, local = random_plan(every_option(program, mesh), seed)
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-3, found


class _Turned(nn.Module):
    """A kernel that takes its operands to be in row-major memory, which those of two transposes are unless a part of
    them is moved in between."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.GroupNorm(2, 6)
        if kernel == "weight_norm":
            self.one = nn.utils.parametrizations.weight_norm(self.one)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y, z = ((layer(x).mT * self.scale).mT.contiguous() for layer in (self.one, self.two))
        if self.kernel == "attention":
            q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (y, z, x))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.kernel == "group_norm":
            y = self.norm(y) * x * z
        return {"loss": y.tanh().square().mean()}


@pytest.mark.parametrize("kernel", ["attention", "group_norm", "weight_norm"])
def test_kernels_read_their_operands_as_they_lie(kernel: str) -> None:
    torch.manual_seed(0)
    model, kwargs = _Turned(kernel), {"x": torch.randn(4, 6, 8)}
    space = every_option(captured(model, kwargs), {"tp": 2}, ())
    for seed in range(8):
        found = errors(model, random_plan(space, seed)[1], kwargs)
        assert found.output < 1e-5, (seed, found)
        assert found.gradient < 1e-3, (seed, found)
