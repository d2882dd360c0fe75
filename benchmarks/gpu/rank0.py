"""Rank 0 of a layout for eight GPUs, as autopar runs it and as people write it, with collectives that move nothing."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import LLAMA3_8B_LAYERS, SMALL, batch, median, peak_bytes, peak_reset, timed_s, trained
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

import autopar
from autopar.plans.corrections import compared
from autopar.plans.measured import measured as measured_kinds
from autopar.plans.measured import read_trace
from costmodel.compute import matmul, op_s
from costmodel.hardware import Device
from costmodel.presets import hardware, preset_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from by_hand import sharded

HOWS = ("by hand", "by hand, compiled", "autopar")
LONGEST = 12
"""So many of a step's kernels are listed."""


def measure_rank0(device: str, small: bool, how: str, strategy: str, mesh_text: str) -> dict[str, Any]:
    """Rank 0's own work under `strategy` on a mesh such as "dp=2,tp=4"."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the "fake" backend

    config = SMALL if small else LLAMA3_8B_LAYERS
    rows, length, steps = (4, 16, 2) if small else (1, 4096, 12)
    sizes = {name: int(size) for name, size in (part.split("=") for part in mesh_text.split(","))}
    ranks = math.prod(sizes.values())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if small else torch.bfloat16)
    step_flops = model_flops(config, rows * sizes["dp"], length) / ranks
    example = batch(config, rows, length, 0, device)
    start = time.perf_counter()
    figures = hardware("cpu" if device == "cpu" else preset_of(torch.cuda.get_device_name()))
    plan = autopar.plan(
        model, mesh, example, strategy=strategy, hardware=figures,
        options=autopar.Options(compile=not small, optimizer="adamw" if small else "adamw-bf16"),
    )  # fmt: skip
    if how == "autopar":
        model = autopar.apply(model, plan, mesh)
    else:
        model = sharded(model, model.model.layers, mesh, compiled=how.endswith("compiled") and not small)  # type: ignore[union-attr, arg-type]
    prepared_s = time.perf_counter() - start
    model.to_empty(device=device)
    renewed(model)
    peak_reset(device)
    losses, seconds = trained(model, config, rows, length, steps, device, clip=False, before=lambda: renewed(model))
    peak = peak_bytes(device)
    step_s = median(seconds[steps // 2 :])
    found = {
        "how": how, "strategy": strategy, "mesh": mesh_text, "step_s": step_s, "peak_bytes": peak,
        "finite": all(map(math.isfinite, losses)), "prepared_s": prepared_s, "flops_per_s": step_flops / step_s,
        "peak_flops_per_s": figures.device.peak_flops_per_s,
        **traced(model, config, rows, length, device, plan if how == "autopar" else None),
    }  # fmt: skip
    if how == "autopar":
        found |= {
            "predicted_step_s": plan.step_time_s, "predicted_peak_bytes": plan.peak_memory_bytes,
            "predicted_communication_s": sum(collective.seconds for collective in plan.collectives),
            "predicted_compute_s": plan.breakdown.compute_s + plan.breakdown.optimizer_s,
            "products": products(model, device, figures.device),
        }  # fmt: skip
    dist.destroy_process_group()
    return found


def renewed(model: nn.Module) -> None:
    """Random weights: a step that took what memory held for gradients may leave NaN, on which products run faster."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0, 0.02)  # type: ignore[operator]


def model_flops(config: LlamaConfig, rows: int, length: int) -> float:
    """FLOPs of a step without recompute: 6 per weight of a product and token, and causal attention's
    6 * layers * hidden * length per token (PaLM, arXiv 2204.02311, appendix B, halved for the mask)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = config.num_key_value_heads * (hidden // heads)
    layer = 2 * hidden * hidden + 2 * hidden * width + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * hidden
    return rows * length * (6.0 * weights + 6.0 * config.num_hidden_layers * hidden * length)


def traced(
    model: nn.Module, config: LlamaConfig, rows: int, length: int, device: str, plan: autopar.Plan | None
) -> dict[str, Any]:
    """What one step launches (kernels; ops, on a CPU): how many, seconds by kind, also the plan's, and the longest."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    recorded = profile(activities=activities)
    starts = iter((lambda: None, recorded.start))

    def before() -> None:
        """Recorded is the second step: the first fills the optimizer's states."""
        timed_s(device, lambda: renewed(model))
        next(starts)()

    trained(model, config, rows, length, 2, device, clip=False, before=before)
    recorded.stop()
    category = "kernel" if device == "cuda" else "cpu_op"
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace.json")
        recorded.export_chrome_trace(path)
        counts: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for each in read_trace(path):
            if each.category == category:
                counts[each.name] += 1
                seconds[each.name] += each.end_s - each.start_s  # type: ignore[assignment]
        by_kind = measured_kinds(path)
    found: dict[str, Any] = {"kernels": counts.total(), "seconds": dict(by_kind.seconds)}
    found["longest"] = [[name, counts[name], total_s] for name, total_s in seconds.most_common(LONGEST)]
    if plan is not None:
        found["kinds"] = [[row.kind, row.predicted_s, row.measured_s] for row in compared(plan, by_kind)]
    return found


def products(model: nn.Module, device: str, on: Device) -> list[list[Any]]:
    """Every distinct matrix product of the rank's program, alone: its shape, how often, predicted and measured s."""
    counts: Counter[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = Counter()
    for executables in model.__dict__["_autopar"].executables.values():
        for node in executables[0].local.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            left, right = (operand.meta["val"] for operand in node.args)
            counts[tuple(left.shape), tuple(right.shape), left.dtype] += 1
    found = []
    for (left, right, dtype), count in sorted(counts.items(), key=str):
        a, b = torch.randn(left, device=device, dtype=dtype), torch.randn(right, device=device, dtype=dtype)
        measured_s = median([product_s(a, b, device) for _ in range(6)])
        name = str(dtype).removeprefix("torch.")
        predicted_s = op_s(matmul(left[0], right[1], left[1], dtype=name, item_bytes=dtype.itemsize), on)
        found.append([f"{left[0]} x {left[1]} x {right[1]}", count, predicted_s, measured_s])
    return found


def product_s(a: torch.Tensor, b: torch.Tensor, device: str) -> float:
    """Seconds of one product, of a run of them."""

    def work() -> None:
        for _ in range(20):
            torch.mm(a, b)

    return timed_s(device, work) / 20


def rank0_tables(results: list[dict[str, Any]]) -> str:
    """What was measured, as people read it."""
    rows = []
    for r in results:
        planned = "predicted_step_s" in r
        peak_rate = max(r["peak_flops_per_s"].values())
        rate = r["peak_flops_per_s"].get("bfloat16", peak_rate)
        rows.append(
            (r["mesh"], r["strategy"], r["how"], f"{r['step_s'] * 1e3:.1f}", f"{r['flops_per_s'] / rate:.1%}",
             r["kernels"], f"{r['peak_bytes'] / 2**30:.2f}", f"{r['prepared_s']:.0f}",
             *((f"{r['predicted_compute_s'] * 1e3:.1f}", f"{r['predicted_communication_s'] * 1e3:.1f}",
                f"{r['predicted_peak_bytes'] / 2**30:.2f}") if planned else ("", "", "")))
        )  # fmt: skip
    head = ("mesh", "strategy", "program", "ms per step, no communication", "of bf16 peak (model FLOPs)",
            "kernels per step", "peak GiB", "seconds to prepare", "predicted compute ms",
            "predicted communication ms, hidden or not", "predicted peak GiB")  # fmt: skip
    text = [tabulate(rows, head, tablefmt="github", disable_numparse=True)]
    if odd := [f"{r['how']} under {r['strategy']} on {r['mesh']}" for r in results if not r["finite"]]:
        text.append(f"\nA loss was not finite (reductions are fake), which may make products faster: {'; '.join(odd)}.")
    kinds = ("matmul", "attention", "other", "optimizer")
    busy = [
        (r["mesh"], r["strategy"], r["how"], *(f"{r['seconds'][kind] * 1e3:.2f}" for kind in kinds),
         f"{sum(r['seconds'].values()) * 1e3:.2f}", f"{r['step_s'] * 1e3:.2f}")
        for r in results
    ]  # fmt: skip
    head = ("mesh", "strategy", "program", *(f"{kind} ms" for kind in kinds), "all kernels ms", "step ms")
    text += ["\n### Kernels of one step, by kind\n", tabulate(busy, head, tablefmt="github", disable_numparse=True)]
    for r in results:
        if "kinds" not in r:
            continue
        beside_ = [(kind, f"{p * 1e3:.2f}", f"{m * 1e3:.2f}", f"{m / p:.2f}") for kind, p, m in r["kinds"] if p]
        text.append(f"\n### {r['mesh']}, {r['strategy']}: predicted and measured\n")
        text.append(
            tabulate(
                beside_, ("kind", "predicted ms", "measured ms", "ratio"), tablefmt="github", disable_numparse=True
            )
        )
        shapes = [
            (shape, count, f"{p * 1e6:.1f}", f"{m * 1e6:.1f}", f"{m / p:.2f}") for shape, count, p, m in r["products"]
        ]
        head = ("product, m x k x n", "in a step", "predicted us", "measured us", "ratio")
        text += ["", tabulate(shapes, head, tablefmt="github", disable_numparse=True)]
    for r in results:
        longest = [(f"`{name[:90]}`", count, f"{total_s * 1e3:.2f}") for name, count, total_s in r["longest"]]
        text.append(f"\n### {r['mesh']}, {r['strategy']}, {r['how']}: the longest kernels of a step\n")
        text.append(tabulate(longest, ("kernel", "times", "ms"), tablefmt="github", disable_numparse=True))
    return "\n".join(text)
