from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_models import build_moe
from ranks import run_ranks
from small_models import build
from torch.distributed.device_mesh import init_device_mesh

import autopar
from passes.capture.autocast import autocast_as, autocast_dtype
from passes.capture.capture import capture

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def test_what_is_captured_is_what_autocast_casts() -> None:
    model, _, kwargs = build("llama", 0)
    with torch.autocast(**BF16):
        graph = capture(model, (), kwargs).graph.graph
        again = capture(model, (), kwargs)
    products = [n.meta["val"].dtype for n in graph.nodes if n.target is torch.ops.aten.mm.default]
    assert set(products) == {torch.bfloat16}
    plain = capture(model, (), kwargs)
    assert plain.fingerprint != again.fingerprint
    assert {n.meta["val"].dtype for n in plain.graph.graph.nodes if n.target is torch.ops.aten.mm.default} == {
        torch.float32
    }


@pytest.mark.parametrize("name", ["gpt2", "plain", "mixtral"])
def test_a_step_under_autocast_is_eagers_under_autocast(name: str) -> None:
    """`verify` runs the unmodified model under the same autocast."""
    model, args, kwargs = (build_moe(name)[0], (), build_moe(name)[1]) if name == "mixtral" else build(name)
    with torch.autocast(**BF16):
        parity = autopar.verify(model, {"dp": 2, "tp": 2}, kwargs or args)
        assert autocast_dtype() is torch.bfloat16
    assert parity.ok, parity
    errors = [tensor.error for tensor in parity.tensors if tensor.kind == "gradient"]
    assert max(errors) > 1e-6  # it did compute in few digits


def test_autocast_inside_is_put_back() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_as(None):
            assert autocast_dtype() is None
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert autocast_dtype() is None


def _step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


def _ranks(rank: int, ranks: int) -> tuple[list[float], list[bool]]:
    """Worst gradient errors of a step under autocast and of one without it, on one module; who computed in bf16."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    model, _, whole = build("gpt2")
    mine = {name: x.chunk(ranks)[rank] for name, x in whole.items()}
    with torch.autocast(**BF16):
        plan = autopar.plan(model, mesh, mine, strategy="fsdp", options=autopar.Options(compile=False))
    parallel = autopar.apply(model, plan, mesh)
    worst, low = [], []
    for on in (True, False, True):
        with torch.autocast(**BF16, enabled=on):
            wanted_loss, wanted = _step(model, whole)
            loss, found = _step(parallel, mine)
            low.append(parallel(**mine).logits.dtype is torch.bfloat16)
        errors = [((found[n] - g).norm() / g.norm()).item() for n, g in wanted.items() if g.norm() > 1e-6]
        worst.append(max(*errors, (loss - wanted_loss).abs().item()))
    return worst, low


def test_autocast_is_part_of_a_calls_kind() -> None:
    """Under autocast the planned step runs, outside another is made, and neither is cast once more."""
    for worst, low in run_ranks(_ranks, 2, timeout_s=250):
        assert low == [True, False, True]
        assert max(worst[0], worst[2]) < 5e-2
        assert worst[1] < 1e-4
