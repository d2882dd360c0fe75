"""The peak of the schedule against a count on the emitted graph, op by op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from live_bytes import step_peak
from parity import captured, planned
from small_models import sized_llama
from torch import fx, nn

from passes.play.schedule import play
from passes.program.program import Program
from passes.rewrite.rewrite import rewrite
from passes.space.recompute import Mode, recomputation


@lru_cache
def program(vocabulary: int = 4096, attention: str = "sdpa") -> Program:
    """A LLaMA whose logits and activations outweigh what is rounded."""
    model = sized_llama(256, 704, 2, 8, 4, vocabulary, attn_implementation=attention)
    ids = torch.empty(8, 512, dtype=torch.long, device="meta")
    return captured(model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    ("strategy", "mode", "regather"),
    [("fsdp", "pointwise", False), ("megatron", "none", False), ("megatron", "none", True), ("ddp", "full", False)],
)
def test_the_peak_is_that_of_the_emitted_program(strategy: str, mode: Mode, regather: bool) -> None:
    """Uncompiled, where each op's result is a tensor. The schedule also has two layers' weights gathered at a time."""
    space, assignment, _ = planned(program(), {"dp": 2, "tp": 2}, strategy, name="cpu")
    space = replace(space, recomputed=replace(recomputation(space.analysis, mode), regather=regather))
    schedule = play(space, assignment, optimizer="sgd", compiled=False)
    emitted, _ = step_peak(rewrite(space, assignment))
    assert schedule.peak_memory_bytes == pytest.approx(emitted, rel=0.08)


@pytest.mark.parametrize("mode", ["pointwise", "selective", "full"])
def test_what_is_computed_again_uncompiled_is_there_one_after_the_other(mode: Mode) -> None:
    """Scores of attention that is written out: scaled, masked and their softmax are tensors and take time each."""
    space, assignment, _ = planned(program(512, "eager"), {"dp": 2}, "ddp", name="cpu")
    space = replace(space, recomputed=recomputation(space.analysis, mode))
    schedule, compiled = (play(space, assignment, optimizer="sgd", compiled=how) for how in (False, True))
    emitted, _ = step_peak(rewrite(space, assignment))
    assert schedule.peak_memory_bytes == pytest.approx(emitted, rel=0.001)
    assert schedule.micro_batch_s > compiled.micro_batch_s


def test_gloo_packs_what_it_gathers_together_and_receives_all_terms_of_a_sum() -> None:
    """As many bytes again as buckets of several gathers and all scatters move; NCCL takes none of that."""
    copies = {}
    for name in ("cpu", "h100"):
        space, assignment, _ = planned(program(), {"dp": 4}, "fsdp", name=name)
        schedule = play(space, assignment, events=True)
        found = schedule.memory.buffers
        copies[name] = sum(buffer.bytes for buffer in found if buffer.kind == "communication")
        gathers = sum(c.bytes for c in schedule.collectives if c.kind == "all_gather" and c.tensors > 1)
        scatters = sum(c.bytes for c in schedule.collectives if c.kind == "reduce_scatter")
    assert gathers
    assert scatters
    assert copies == {"cpu": gathers + scatters, "h100": 0}


def test_a_step_may_be_compiled_in_part() -> None:
    """No op or every op chosen is the uncompiled or the compiled step; without the loss, its fp32 copies of the logits
    are written: 4 bytes for each of 4 x 512 x 2048 on a rank, the logits and their gradient at least."""
    space, assignment, _ = planned(program(), {"dp": 2, "tp": 2}, "megatron", name="cpu")

    def peak(compiled: bool | Callable[[fx.Node], bool]) -> int:
        return play(space, assignment, optimizer="sgd", compiled=compiled).peak_memory_bytes

    assert peak(lambda node: False) == peak(False)
    assert peak(lambda node: True) == peak(True)
    layers_alone = peak(lambda node: "layers" in str(node.meta.get("module", "")))
    assert peak(True) + 4 * 4 * 512 * 2048 <= layers_alone <= peak(False)


class Loss(nn.Module):
    """Two small products and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


@pytest.mark.parametrize(("machine", "held"), [("cpu", 7 * 5 + 5 + 5 * 3 + 3), ("h100", 4 * 512 // 4)])
def test_a_cpu_has_no_allocator_that_rounds_up(machine: str, held: int) -> None:
    """4 bytes for each of 58 elements in four parameters, and 8 of Adam's states; on a GPU multiples of 512 bytes."""
    space, assignment, _ = planned(captured(Loss(), {"x": torch.empty(4, 7)}), {"dp": 1}, "ddp", name=machine)
    found = play(space, assignment, optimizer="adamw").memory
    assert found.by_kind["parameters"] == 4 * held
    assert machine == "h100" or found.by_kind["optimizer"] == 8 * held


class Head(nn.Module):
    """bf16 logits of many classes, and their loss in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4096, 64, dtype=torch.bfloat16, device="meta"))

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = x @ self.weight.T
        return {"loss": nn.functional.cross_entropy(logits.float(), classes)}


def test_casts_and_the_loss_are_computed_by_what_reads_them() -> None:
    """Compiled, 2048 x 4096 logits are in memory in bf16, and so is their gradient; the fp32 values of neither are."""
    x = torch.empty(2048, 64, dtype=torch.bfloat16, device="meta")
    batch = {"x": x, "classes": torch.empty(2048, dtype=torch.long, device="meta")}
    space, assignment, _ = planned(captured(Head(), batch), {"dp": 1}, "ddp", name="cpu")
    logits = 2048 * 4096 * 2
    assert play(space, assignment, optimizer="sgd").peak_memory_bytes == pytest.approx(2 * logits, rel=0.1)
    assert play(space, assignment, optimizer="sgd", compiled=False).peak_memory_bytes > 6 * logits
