"""Training on real gloo ranks against the unmodified model on one device given the whole batch.

Per model, mesh and strategy: loss, every gradient, the gradient norm of each of 5 AdamW steps, and the parameters after
them. Models, meshes and strategies that share a process group run in one start of the ranks.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_models import MODELS, build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import autopar

STRATEGIES = {(4,): ("ddp", "fsdp", "auto"), (2, 2): ("fsdp", "megatron", "auto")}
"""By mesh; without a tensor axis `megatron` stores and computes as `fsdp` does, and with one `ddp` leaves it idle."""
RUNS = [*((name, (2, 2)) for name in MODELS), ("gpt2", (4,)), ("hand", (4,))]
"""On one axis a tied table that four ranks do not divide, and frozen parameters; the other models have neither."""
STEPS = 3


def local_batch(value: Any, mesh: DeviceMesh) -> Any:
    """This data-parallel rank's part of a global input."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.chunk(mesh.size(0))[mesh.get_local_rank(0)]


def loss_of(out: Any, sharded: bool, mesh: DeviceMesh | None) -> torch.Tensor:
    """The model's loss, or the user's own: the mean of the output's squares."""
    if isinstance(out, torch.Tensor):
        return out.square().mean()
    loss: torch.Tensor = out["loss"]
    return loss


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


Trained = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""(losses, gradient norms, first gradients, last parameters)."""


def train(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trained:
    """A few steps.

    Plain SGD with momentum beside AdamW would say little more; AdamW divides by a gradient's own size, so a parameter
    whose gradient is rounding noise moves by the learning rate whichever way the noise falls. eps keeps that small.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        loss = loss_of(model(*args, **kwargs), False, None)
        loss.backward()
        if not step:
            first = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, first, {n: whole(p.detach()) for n, p in model.named_parameters()}


def makes(plan: autopar.Plan) -> str:
    """What of a plan its program is made of: alike plans, as `auto`'s and `fsdp`'s often are, run the same steps."""
    ways = (plan.reshard, plan.regather, plan.postpone, plan.recompute)
    kept = (plan.decisions, plan.solved, plan.padded, plan.repeated_keys, ways)
    return repr((kept, sorted(str(c) for c in plan.collectives)))


def check(mesh: DeviceMesh, name: str, strategy: str, compile: bool, checked: set[str], wanted: Trained) -> str:
    """What differs by more than it may, or "" where nothing does; `checked` is of plans that were trained before."""
    model, args, kwargs = build(name)
    local_args = tuple(local_batch(x, mesh) for x in args)
    local_kwargs = {key: local_batch(x, mesh) for key, x in kwargs.items()}
    example = dict(inspect.signature(model.forward).bind(*local_args, **local_kwargs).arguments)
    options = autopar.Options(compile=compile)
    plan = autopar.plan(model, mesh, example, strategy=strategy, options=options)
    if makes(plan) in checked:
        return ""
    checked.add(makes(plan))
    found = train(autopar.apply(model, plan, mesh), local_args, local_kwargs)
    wrong = []
    losses = [torch.tensor(x[0]) for x in (found, wanted)]
    if name == "plain":  # the user's loss is of this rank's part; the whole batch's is the mean over the batch axis
        torch.distributed.all_reduce(losses[0], group=mesh.get_group(0))
        losses[0] /= mesh.size(0)
    if relative(*losses) > 1e-5:
        wrong.append(f"losses {found[0]} but eager has {wanted[0]}")
    if relative(torch.tensor(found[1]), torch.tensor(wanted[1])) > 1e-4:
        wrong.append(f"gradient norms {found[1]} but eager has {wanted[1]}")
    if set(found[2]) != set(wanted[2]):
        wrong.append(f"gradients of {sorted(found[2])} but eager has {sorted(wanted[2])}")
    total = torch.stack([g.norm() for g in wanted[2].values()]).norm()
    for what, i, tolerance in (("gradient", 2, 1e-4), ("parameter", 3, 1e-4)):
        for key in wanted[i]:
            difference = (found[i][key] - wanted[i][key]).norm()
            scale = wanted[i][key].norm()
            if difference > tolerance * scale and difference > (1e-7 * total if i == 2 else 0):
                wrong.append(f"{what} {key}: {(difference / scale).item():.2e} of its norm")
    return f"{name} {tuple(mesh.shape)} {strategy}: " + "; ".join(wrong) if wrong else ""


def check_all(
    rank: int, ranks: int, name: str, shape: tuple[int, ...], strategies: tuple[str, ...], compile: bool
) -> str:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    checked: set[str] = set()
    wanted = train(*build(name))
    return "\n".join(filter(None, (check(mesh, name, each, compile, checked, wanted) for each in strategies)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "shape"), RUNS, ids=str)
def test_training_on_real_ranks_is_training_on_one_device(name: str, shape: tuple[int, ...]) -> None:
    assert set(run_ranks(check_all, 4, name, shape, STRATEGIES[shape], False, timeout_s=280)) == {""}


@pytest.mark.timeout(580)
@pytest.mark.parametrize(("name", "strategy", "shape"), [("llama", "megatron", (1, 2)), ("gpt2", "fsdp", (2,))])
def test_compiled_training_is_training_on_one_device(name: str, strategy: str, shape: tuple[int, ...]) -> None:
    ranks = torch.Size(shape).numel()
    assert set(run_ranks(check_all, ranks, name, shape, (strategy,), True, timeout_s=560)) == {""}
