"""Evaluation: planned and run without a backward, whether it comes first or after training."""

from __future__ import annotations

from typing import Any

import torch
from moe_models import build_moe
from ranks import run_ranks
from small_models import build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autopar
from autopar.examples import as_described, described
from passes.capture.autocast import autocast_dtype
from passes.capture.capture import capture

OPTIONS = autopar.Options(compile=False)
MESH = {"dp": 2, "tp": 2}


def test_a_forward_only_step_has_no_backward_and_no_optimizer() -> None:
    model, _, kwargs = build("llama")
    trained = autopar.plan(model, MESH, kwargs, hardware="h100")
    model.eval()
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            plan = autopar.plan(model, MESH, kwargs, hardware="h100")
            assert not [one for one in plan.collectives if one.phase == "backward"]
            kinds = {kind for kind, size in plan.breakdown.memory_bytes.items() if size}
            assert not kinds & {"optimizer", "gradients"}
            assert plan.step_time_s < trained.step_time_s / 2
            program = capture(model, (), kwargs)
            assert {node.meta["phase"] for node in program.graph.graph.nodes if node.op == "call_function"} == {
                "forward"
            }


def test_verify_of_an_evaluation() -> None:
    for name, (model, args, kwargs) in {
        "plain": build("plain"),
        "mixtral": (build_moe("mixtral")[0], (), build_moe("mixtral")[1]),
    }.items():
        with torch.no_grad():
            parity = autopar.verify(model.eval(), MESH, kwargs or args)
        assert parity.ok, (name, parity)
        assert {tensor.kind for tensor in parity.tensors} == {"output"}


def test_a_plan_knows_what_it_was_made_under() -> None:
    call: Any = ((), {"x": torch.zeros(2)})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        text = described(call)
    with as_described(text):
        assert not torch.is_grad_enabled()
        assert autocast_dtype() is torch.bfloat16
        assert described(call) == text
    with as_described(described(call)):
        assert torch.is_grad_enabled()
        assert autocast_dtype() is None


def _outputs(model: nn.Module, mesh: DeviceMesh, ids: torch.Tensor) -> torch.Tensor:
    """Logits of this data-parallel rank's part of the batch."""
    out: torch.Tensor = model(ids.chunk(2)[mesh.get_local_rank("dp")])
    assert not out.requires_grad
    return out.clone()


def _ranks(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    model, (ids,), _ = build("plain")
    wanted = build("plain")[0](ids).detach().chunk(2)[mesh.get_local_rank("dp")]
    example = (ids.chunk(2)[mesh.get_local_rank("dp")],)
    trained = autopar.plan(model.train(), mesh, example, strategy="fsdp", options=OPTIONS)
    first = autopar.apply(model, trained, mesh)
    with torch.inference_mode():  # the first call of all
        torch.testing.assert_close(_outputs(first.eval(), mesh, ids), wanted)
    with torch.no_grad():
        plan = autopar.plan(model.eval(), mesh, example, strategy="fsdp", options=OPTIONS)
    evaluated = autopar.apply(model, plan, mesh)
    with torch.no_grad():
        torch.testing.assert_close(_outputs(evaluated, mesh, ids), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(_outputs(evaluated, mesh, ids), wanted)
    for again in (first, evaluated):  # and then it trains
        again.train()
        loss = again(*example).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in again.parameters())


def test_evaluation_on_real_ranks() -> None:
    run_ranks(_ranks, 2, timeout_s=250)


def _sampled_first(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    parallel = autopar.parallelize(model, mesh, (torch.ones(2, 6),), options=OPTIONS)
    with torch.inference_mode():  # what each rank draws of a mask follows from its place on the mesh
        parallel(torch.ones(2, 6))
    parallel(torch.ones(2, 6)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in parallel.parameters())


def test_training_after_draws_in_inference_mode() -> None:
    run_ranks(_sampled_first, 2)
