"""What the parts of the GPU suite share: models, batches, seconds and peaks."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

SMALL = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8,
)  # fmt: skip
TRAINED = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=8, max_position_embeddings=2048,
)  # fmt: skip
LLAMA3_8B_LAYERS = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
)  # fmt: skip
"""The 8B model's dimensions with 4 of its 32 layers."""


def peak_reset(device: str) -> None:
    """Forget the peak so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """Peak since the last reset; on the CPU the process's."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_s(device: str, work: Callable[[], object]) -> float:
    """Seconds of `work`, all kernels done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def new_model(config: LlamaConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def batch(config: LlamaConfig, rows: int, length: int, step: int, device: str) -> dict[str, torch.Tensor]:
    """Ids that a model can learn: a walk whose steps are small."""
    generator = torch.Generator().manual_seed(step)
    walk = torch.randint(0, 8, (rows, length), generator=generator).cumsum(1)
    ids = (walk % min(config.vocab_size, 512)).to(device)
    return {"input_ids": ids, "labels": ids}


def trained(
    model: nn.Module, config: LlamaConfig, rows: int, length: int, steps: int, device: str, clip: bool = True,
    before: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Losses and seconds of every step; `before` each is something that is not in its time."""
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    losses: list[float] = []
    seconds: list[float] = []

    def step(index: int) -> None:
        loss = model(**batch(config, rows, length, index, device)).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        losses.append(float(loss.detach()))

    for index in range(steps):
        before()
        seconds.append(timed_s(device, lambda index=index: step(index)))
    return losses, seconds
