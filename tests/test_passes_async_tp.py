"""Micro-pipelined tensor parallelism: torch's pass on our regions, on the CPU with torch's stand-in for its kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as shared
from ranks import run_ranks
from torch import fx, nn
from torch._inductor.compile_fx import view_to_reshape
from torch._inductor.fx_passes import micro_pipeline_tp
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar import api
from costmodel.presets import hardware
from passes.lower import inductor, lower
from passes.plan.report_text import seconds_text


def llama(hidden: int = 64, heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=128,
        hidden_size=hidden, intermediate_size=2 * hidden,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class OnCpu(fx.Interpreter):
    """Runs fused ops by torch's own definitions of them in plain collectives and products; their kernels are CUDA's."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        meant = {
            torch.ops.symm_mem.fused_all_gather_matmul.default: shared._fused_all_gather_matmul_fallback,
            torch.ops.symm_mem.fused_matmul_reduce_scatter.default: shared._fused_matmul_reduce_scatter_fallback,
        }
        return super().call_function(meant.get(target, target), args, kwargs)


def trained(rank: int, ranks: int) -> tuple[float, float, list[int], list[str]]:
    """Relative error of the loss and the worst gradient against one device; fused ops in each region that has some."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "labels": ids}
    model, eager = llama(), llama()
    dist.is_nccl_available = lambda: True  # type: ignore[assignment]  # the pass asks
    api._check_async_tp = lambda *_: None  # type: ignore[assignment]
    lower.for_gloo = lambda graph: None  # type: ignore[assignment]  # a graph for CUDA keeps its collectives
    fused: list[int] = []

    def without_kernels(gm: fx.GraphModule, examples: Any, settings: dict[str, Any] | None) -> Any:
        """Inductor up to its pass."""
        view_to_reshape(gm)
        if settings is not None and settings["_micro_pipeline_tp"]:
            with shared._test_mode():  # from 2.15 on it asks for a GPU else
                micro_pipeline_tp.micro_pipeline_tp_pass(gm.graph)
            fused.append(sum("symm_mem.fused" in str(node.target) for node in gm.graph.nodes))
        return lambda values: OnCpu(gm).run(values)

    inductor.inductor_compile = without_kernels  # type: ignore[assignment]
    options = autopar.Options(async_tp=True, progress=False)
    plan = autopar.plan(model, mesh, batch, strategy="megatron", hardware="h100", options=options)
    parallel: Any = autopar.apply(model, plan, mesh)
    loss = parallel(**batch).loss
    loss.backward()
    expected = eager(**batch).loss
    expected.backward()
    errors = [
        float((p.grad.full_tensor() - q.grad).norm() / q.grad.norm())  # type: ignore[union-attr]
        for p, q in zip(parallel.parameters(), eager.parameters(), strict=True)
    ]
    return abs(float(loss / expected) - 1), max(errors), sorted(fused), list(plan.notes)


def test_products_of_a_sequence_parallel_layer_are_fused_and_right() -> None:
    """By hand: forward of a layer gathers for q, k, v and for gate, up, and scatters what the output and down
    projections give: four. Its backward gathers for these two's input gradients; what it scatters is a sum of several
    products, which torch's pass leaves."""
    for loss_error, error, fused, notes in run_ranks(trained, 2):
        assert loss_error < 1e-5
        assert error < 1e-4
        assert fused[-1] == 4
        assert 2 in fused
        assert sum(note.startswith("async_tp") for note in notes) == 1


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        ({"tp": 2}, {"compile": False}, "leave compile=True"),
        ({"dp": 2}, {}, "every axis of .* splits the batch"),
    ],
)
def test_what_it_needs_is_told(mesh: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autopar.plan(nn.Linear(2, 2), mesh, (torch.zeros(2, 2),), options=autopar.Options(async_tp=True, **options))


def test_a_cpu_mesh_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        with pytest.raises(ValueError, match="the mesh is on cpu; it takes a CUDA mesh"):
            autopar.plan(nn.Linear(2, 2), mesh, (torch.zeros(2, 2),), options=autopar.Options(async_tp=True))
    finally:
        dist.destroy_process_group()


def test_a_plan_says_what_it_would_gain() -> None:
    """The time that the note gives is that of the plan made with it; none where no axis lies within a node."""
    batch = {"input_ids": torch.zeros(4, 2048, dtype=torch.long), "labels": torch.zeros(4, 2048, dtype=torch.long)}

    def plan(nodes: int, **options: Any) -> autopar.Plan:
        machine = replace(hardware("h100"), ranks_per_node=8 // nodes)
        with torch.device("meta"):
            model = llama(2048, 16)
        return autopar.plan(
            model, {"tp": 8}, batch, hardware=machine, strategy="megatron",
            options=autopar.Options(progress=False, **options),
        )  # fmt: skip

    (note,) = (note for note in plan(1).notes if note.startswith("Options(async_tp=True)"))
    faster = plan(1, async_tp=True)
    assert f"take {seconds_text(faster.step_time_s)} per step instead of {seconds_text(plan(1).step_time_s)}" in note
    assert faster.step_time_s < plan(1).step_time_s
    assert not any(note.startswith("Options(async_tp=True)") for note in (*plan(8).notes, *faster.notes))
