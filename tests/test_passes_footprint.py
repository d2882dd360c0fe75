"""The peak of the schedule against a count on the emitted graph, op by op."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from live_bytes import step_peak
from parity import captured, planned

from passes.program import Program
from passes.recompute import Mode, recomputation
from passes.rewrite import rewrite
from passes.schedule import play


@lru_cache
def program() -> Program:
    """A LLaMA whose logits and activations outweigh what is rounded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(config), torch.empty(8, 512, dtype=torch.long)
    return captured(model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(("strategy", "mode"), [("fsdp", "pointwise"), ("megatron", "none"), ("ddp", "full")])
def test_the_peak_is_that_of_the_emitted_program(strategy: str, mode: Mode) -> None:
    """Uncompiled, where each op's result is a tensor. The schedule also has two layers' weights gathered at a time."""
    space, assignment, _ = planned(program(), {"dp": 2, "tp": 2}, strategy, name="cpu")
    space = replace(space, recomputed=recomputation(space.analysis, mode))
    schedule = play(space, assignment, optimizer="sgd", compiled=False)
    emitted, _ = step_peak(rewrite(space, assignment))
    assert schedule.peak_memory_bytes == pytest.approx(emitted, rel=0.08)
