"""Parity of a planned program with eager on one device: shared by tests of every stage after capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from costmodel.hardware import hardware, topology
from passes.capture import capture
from passes.local import LocalProgram
from passes.price import price
from passes.program import Program
from passes.randomness import own_randomness
from passes.rewrite import rewrite
from passes.simulate import simulate_step
from passes.solve import solve
from passes.space import Space, search_space
from passes.weights import prepare_again


@dataclass(frozen=True)
class Errors:
    """Relative errors against eager: of the loss, and the worst of all gradients (by norm) with its parameter."""

    loss: float
    gradient: float
    worst: str


def captured(model: nn.Module, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> Program:
    """The program of a global batch whose tensors all have batch dim 0."""
    leaves = [*args, *kwargs.values()]
    size = next(x.shape[0] for x in leaves if isinstance(x, torch.Tensor))
    dims = [0 if isinstance(x, torch.Tensor) else None for x in leaves]
    return prepare_again(own_randomness(capture(model, args, kwargs, batch_dims=dims, batch_size=size)))


def planned(
    program: Program, mesh: Mapping[str, int], strategy: str, batch_axes: tuple[int, ...] = (0,), name: str = "h100"
) -> tuple[Space, tuple[int, ...], LocalProgram]:
    """Space, decisions and local program of the cheapest plan under `strategy`."""
    space = search_space(program, topology(hardware(name), mesh), batch_axes, strategy=strategy)
    priced = price(space)
    solution = solve(priced.problem, gap=1e-3)
    assignment = priced.assignment(solution.picks, len(space.sites))
    return space, assignment, rewrite(space, assignment)


def eager(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the unmodified model."""
    model.zero_grad()
    out = model(*args, **kwargs)
    loss = out["loss"] if isinstance(out, Mapping) else out
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def errors(model: nn.Module, local: LocalProgram, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> Errors:
    """What all simulated ranks give, against eager."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    loss, gradients = eager(model, args, kwargs)
    inputs = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    found = simulate_step(local, parameters, buffers, inputs)
    grads = found.gradients
    (loss_name,) = [given.name for given in local.inputs if given.kind == "tangent"]
    assert set(grads) == set(gradients)
    worst = max(grads, key=lambda n: relative(grads[n], gradients[n]))
    return Errors(relative(found.outputs[loss_name], loss), relative(grads[worst], gradients[worst]), worst)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    scale = wanted.double().norm().item()
    return (found.double() - wanted.double()).norm().item() / (scale or 1.0)
