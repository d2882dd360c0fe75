"""On one CUDA device: kernels, every rank of a plan played there, and compiled training beside eager on that device."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_models import build_moe
from parity import captured, eager, planned, relative
from ranks import run_ranks
from small_models import build
from staged import through_the_cpu
from test_passes_lower import attention
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autopar
from costmodel.hardware_file import load_hardware
from passes.lower.retarget import retarget
from passes.parity.simulate import simulate_step

DEVICE = torch.device(os.environ.get("AUTOPAR_GPU_TESTS_ON", "cuda"))
"""The tests' own logic can be tried on a CPU."""
STARTED = "spawn" if DEVICE.type == "cuda" else "forkserver"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank, one axis."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh(DEVICE.type, (1,), mesh_dim_names=("dp",))
    dist.destroy_process_group()


def moved(tree: Any) -> Any:
    """The same on the device."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), tree)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "groups"), [(16, 1), (6, 1), (16, 2), (6, 4), (128, 2)])
def test_attention_kernels(mask: bool, dtype: torch.dtype, dim: int, groups: int) -> None:
    """The kernels that take the CPU's place give its output and gradients, on random operands."""
    gm = attention(mask, dtype, causal=not mask, dim=dim, groups=groups)
    torch.manual_seed(0)
    operands = [torch.randn(2, 4 // share, 5, dim, dtype=dtype) for share in (1, groups, groups)]
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    tangent = torch.randn(2, 5, 4 * dim, dtype=dtype)
    wanted_of = [x.double().requires_grad_() for x in operands]
    keys, values = (x.repeat_interleave(groups, 1) for x in wanted_of[1:])
    out = nn.functional.scaled_dot_product_attention(wanted_of[0], keys, values, allowed).transpose(1, 2).flatten(2)
    wanted = [out, *torch.autograd.grad(out, wanted_of, tangent.double())]
    with torch.no_grad():
        found = fx.Interpreter(retarget(gm, DEVICE)).run(*moved([*operands, allowed, tangent]))
    for mine, right in zip(found, wanted, strict=True):
        assert mine.device.type == DEVICE.type
        assert relative(mine.cpu(), right) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def example(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model on the device, and its batch by name."""
    if name == "mixtral":
        model, batch = build_moe(name)
        return model.to(DEVICE), moved(batch)
    model, args, batch = build(name)
    return model.to(DEVICE), moved({**dict(zip(("ids", "targets"), args, strict=False)), **batch})


@pytest.mark.parametrize("strategy", ["fsdp", "megatron", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "hand", "mixtral"])
def test_every_rank_of_four(name: str, strategy: str) -> None:
    """Four ranks played on the device, in the graphs made for it, give the numbers of one in eager mode there."""
    model, batch = example(name)
    _, _, local = planned(captured(model, batch), {"dp": 2, "tp": 2}, strategy)
    outputs, tangent, gradients = eager(model, (), batch)
    found = simulate_step(
        replace(local, graph=retarget(local.graph, DEVICE)),
        {parameter: p.detach() for parameter, p in model.named_parameters()},
        dict(model.named_buffers()),
        [x for x in batch.values() if isinstance(x, torch.Tensor)],
        None if tangent is None else [tangent],
    )
    assert relative(found.outputs["loss"], outputs["loss"]) < 1e-5
    whole = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    for parameter, gradient in gradients.items():
        assert relative(found.gradients[parameter], gradient, 1e-4 * whole) < 1e-3, parameter


def trained(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype | None = None) -> list[float]:
    """Losses of three steps, by the loop anybody writes."""
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=DEVICE.type == "cuda")
    losses = []
    for _ in range(3):
        with torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(**batch)
        loss = out.square().mean() if isinstance(out, torch.Tensor) else out["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "plain", "hand", "mixtral"])
def test_compiled_training_is_eagers(mesh: DeviceMesh, name: str) -> None:
    model, batch = example(name)
    whole = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, batch, options=autopar.Options(compile=True))
    assert trained(parallel, batch) == pytest.approx(trained(whole, batch), rel=2e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_half_precision(mesh: DeviceMesh, name: str) -> None:
    """bf16 weights, where flash attention and grouped products run: eager's losses within bf16's rounding."""
    model, batch = example(name)
    model = model.to(torch.bfloat16)
    whole = copy.deepcopy(model)
    parallel = autopar.parallelize(model, mesh, batch, options=autopar.Options(compile=True))
    assert trained(parallel, batch) == pytest.approx(trained(whole, batch), rel=1e-2)


def test_autocast(mesh: DeviceMesh) -> None:
    """fp32 weights under bf16 autocast, as eager gives it within bf16's rounding."""
    model, batch = example("llama")
    whole = copy.deepcopy(model)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        parallel = autopar.parallelize(model, mesh, batch, options=autopar.Options(compile=True))
    right = trained(whole, batch, torch.bfloat16)
    assert trained(parallel, batch, torch.bfloat16) == pytest.approx(right, rel=1e-2)


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_never_waits_for_the_device(mesh: DeviceMesh, compile: bool) -> None:
    """Forward, backward, clipping and the optimizer's step, dropout among them: any synchronisation raises."""
    model, batch = example("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    parallel = autopar.parallelize(model, mesh, batch, options=autopar.Options(compile=compile))
    optim = torch.optim.AdamW(parallel.parameters(), lr=1e-3, fused=DEVICE.type == "cuda")
    losses = []
    for step in range(4):
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            loss = parallel(**batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
            optim.step()
            optim.zero_grad()
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
    assert losses[-1] < losses[0]


def beside_eager(
    rank: int, ranks: int, name: str, strategy: str, async_tp: bool
) -> tuple[list[float], list[float], int]:
    """Losses of this rank's program on its rows, of the whole model on all, and how many fused products a step ran."""
    os.environ |= {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "LOCAL_RANK": "0"}  # the device is everybody's
    mesh = init_device_mesh(DEVICE.type, (ranks,), mesh_dim_names=("tp" if strategy == "megatron" else "dp",))
    staged = through_the_cpu() if DEVICE.type == "cuda" else None
    model, batch = example(name)
    right = trained(copy.deepcopy(model), batch)
    if strategy != "megatron":
        batch = {key: value.chunk(ranks)[rank] for key, value in batch.items()}
    options = autopar.Options(async_tp=async_tp, progress=False)
    plan = autopar.plan(model, mesh, batch, strategy=strategy, options=options)
    parallel = autopar.apply(model, plan, mesh)
    losses = trained(parallel, batch)
    with torch.profiler.profile() as recorded:
        parallel(**batch)
    del staged
    return losses, right, sum("symm_mem::fused" in event.name for event in recorded.events())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_ranks_on_one_device(name: str, strategy: str) -> None:
    """Real transfers, through the CPU: the mean of the ranks' losses is eager's on all rows."""
    found = run_ranks(beside_eager, 2, name, strategy, False, timeout_s=200, start=STARTED)
    assert [sum(each) / 2 for each in zip(*(losses for losses, _, _ in found), strict=True)] == pytest.approx(
        found[0][1], rel=2e-5
    )


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the fused products are CUDA kernels")
def test_micro_pipelined_products_on_one_device() -> None:
    """torch's fused gathers and products between two ranks that share a GPU's memory: eager's losses."""
    for losses, right, fused in run_ranks(beside_eager, 2, "llama", "megatron", True, timeout_s=200, start=STARTED):
        assert losses == pytest.approx(right, rel=2e-5)
        assert fused > 0


def test_calibrates(tmp_path: Path) -> None:
    """Measured rates of this device are those of a device: not above its preset's peaks, nor a tenth of them."""
    from autopar.cli import main

    path = tmp_path / "measured.json"
    assert main(["calibrate", "-o", str(path)]) == 0
    found = load_hardware(path).device
    if DEVICE.type == "cuda":
        assert not found.is_cpu
        assert 50e12 < found.peak_flops_per_s["bfloat16"] < 2.5e15
        assert 0.5e12 < found.memory_bytes_per_s < 10e12
