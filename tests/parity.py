"""Parity of a planned program with eager on one device: shared by tests of every stage after capture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.capture.capture import capture
from passes.parity.simulate import simulate_step
from passes.planner.pipeline import prepare
from passes.price.price import price
from passes.program.local import LocalProgram
from passes.program.precision import Precision
from passes.program.program import Program
from passes.rewrite.rewrite import rewrite
from passes.solver.solve import solve
from passes.space.space import Space, search_space
from passes.tokens.routing import token_parts
from passes.tokens.token_blocks import by_blocks


@dataclass(frozen=True)
class Errors:
    """Relative errors against eager: the worst of all outputs, and of all gradients (by norm) with its parameter."""

    output: float
    gradient: float
    worst: str


def captured(
    model: nn.Module, kwargs: Mapping[str, Any], args: tuple[Any, ...] = (), precision: Precision | None = None
) -> Program:
    """The program of a global batch whose tensors all have batch dim 0."""
    leaves = [*args, *kwargs.values()]
    size = next(x.shape[0] for x in leaves if isinstance(x, torch.Tensor))
    dims = [0 if isinstance(x, torch.Tensor) else None for x in leaves]
    program = capture(model, args, kwargs, batch_dims=dims, batch_size=size, precision=precision)
    return prepare(program)


def planned(
    program: Program, mesh: Mapping[str, int], strategy: str, batch_axes: tuple[int, ...] = (0,), name: str = "h100"
) -> tuple[Space, tuple[int, ...], LocalProgram]:
    """Space, decisions and local program of the cheapest plan under `strategy`."""
    program = by_blocks(program, token_parts(program, strategy, list(mesh.values()), batch_axes))
    space = search_space(program, topology(hardware(name), mesh), batch_axes, strategy=strategy)
    priced = price(space)
    solution = solve(priced.problem, gap=1e-3)
    assignment = priced.assignment(solution.picks, len(space.sites))
    return space, assignment, rewrite(space, assignment)


def eager(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, dict[str, torch.Tensor]]:
    """(outputs, tangent of the only output where it is no loss, gradients) of the unmodified model.

    A model without a loss is given one: the mean of its output's squares.
    """
    model.zero_grad()
    out = model(*args, **kwargs)
    if isinstance(out, torch.Tensor):
        tangent = 2 * out.detach() / out.numel()
        out.backward(tangent)
        outputs = {"": out.detach()}
    else:
        tangent = None
        out["loss"].backward()
        outputs = dict(_named(out, ""))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, tangent, gradients


def _named(out: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model's output by their places, e.g. `past.0.key`."""
    if isinstance(out, torch.Tensor):
        yield name, out.detach()
    elif isinstance(out, Mapping | tuple | list):
        for key, value in out.items() if isinstance(out, Mapping) else enumerate(out):
            yield from _named(value, f"{name}.{key}" if name else str(key))


def errors(model: nn.Module, local: LocalProgram, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> Errors:
    """What all simulated ranks give, against eager."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    outputs, tangent, gradients = eager(model, args, kwargs)
    inputs = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    tangents = None if tangent is None else [tangent]
    found = simulate_step(local, parameters, dict(model.named_buffers()), inputs, tangents)
    assert set(found.gradients) == set(gradients)
    # A key's bias moves no softmax: its gradient is rounding, and has no norm to be held against.
    zero = 1e-6 * math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    off = {name: relative(found.gradients[name], gradient, zero) for name, gradient in gradients.items()}
    worst = max(off, key=off.__getitem__)
    returned = [out.name for out in local.outputs if out.kind == "output"]
    of_outputs = max(
        relative(found.outputs[name], outputs[name] if name in outputs else outputs[""]) for name in returned
    )
    return Errors(of_outputs, off[worst], worst)


def relative(found: torch.Tensor, wanted: torch.Tensor, least: float = 0.0) -> float:
    """Norm of the difference over the norm of what is wanted, or over `least` where that is more."""
    scale = max(wanted.double().norm().item(), least)
    return (found.double() - wanted.double()).norm().item() / (scale or 1.0)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Equal up to rounding: sums taken in another order are as far apart as their largest terms make them."""
    assert found.shape == wanted.shape, name
    assert relative(found, wanted) <= tolerance, f"{name}: off by {relative(found, wanted):.2g} of its norm"
