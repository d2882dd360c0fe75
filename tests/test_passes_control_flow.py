"""Loops of torch and functions under `torch.compile`, captured as what they stand for, beside plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._ops import HigherOrderOperator

from passes.capture.capture import capture
from passes.errors import CaptureError


class Recurrent(nn.Module):
    """A recurrence over dim 1, from the last, by `run`."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


def _step(inner: nn.Module, carry: Tensor, row: Tensor) -> Tensor:
    return torch.tanh(carry * 0.5 + inner(row))


def _by_scan(inner: nn.Module, x: Tensor) -> Tensor:
    def step(carry: dict[str, Tensor], row: Tensor) -> Any:
        made = _step(inner, carry["state"], row)
        return {"state": made}, (made * 2, carry["state"].clone())

    last, (doubled, before) = scan(step, {"state": torch.zeros_like(x[:, 0])}, x, dim=1, reverse=True)
    return doubled.square().mean() + before.mean() + last["state"].sum()


def _by_hand(inner: nn.Module, x: Tensor) -> Tensor:
    state, doubled, before = torch.zeros_like(x[:, 0]), [], []
    for row in reversed(x.unbind(1)):
        before.append(state)
        state = _step(inner, state, row)
        doubled.append(state * 2)
    return torch.stack(doubled).square().mean() + torch.stack(before).mean() + state.sum()


def _mapped(inner: nn.Module, x: Tensor) -> Tensor:
    made = torch_map(lambda rows, by: {"a": inner(rows[0]) * by, "b": rows[1]}, (x, x), torch.tensor(3.0))
    return made["a"].square().mean() + made["b"].mean()


def _looped(inner: nn.Module, x: Tensor) -> Tensor:
    _, found = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))
    return inner(found).mean()


@torch.compile(fullgraph=True)
def _activated(x: Tensor) -> Tensor:
    return x.relu().square()


_KINDS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]] = {
    "scan": (_by_scan, _by_hand),
    "map": (_mapped, lambda inner, x: (inner(x) * 3).square().mean() + x.mean()),
    "while_loop": (_looped, lambda inner, x: inner(x.sin().sin().sin()).mean()),
    "torch.compile of a function beside the model": (
        lambda inner, x: _activated(inner(x)).mean(),
        lambda inner, x: inner(x).relu().square().mean(),
    ),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_step_is_that_of_plain_python(kind: str) -> None:
    written, plain = (Recurrent(run) for run in _KINDS[kind])
    x = torch.randn(6, 5, 4)
    program = capture(written, (x,), {}, batch_dims=[0], batch_size=6)
    wanted = plain(x)
    wanted.backward()
    given = {"inner.weight": plain.inner.weight, "inner.bias": plain.inner.bias}
    values = [
        torch.ones(()) if entry.kind == "tangent" else given.get(entry.name, x).detach() for entry in program.inputs
    ]
    found = {out.name: value for out, value in zip(program.outputs, program.graph(*values), strict=True)}
    torch.testing.assert_close(found.pop(""), wanted.detach())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, given[name].grad)
    assert set(found) == set(given)


def test_branches_of_torch_are_refused_with_the_line() -> None:
    called = HigherOrderOperator.__call__
    model = Recurrent(lambda inner, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (inner(x),)).mean())
    with pytest.raises(CaptureError, match=r"control_flow\.py:\d+: torch\.cond is not captured.*torch\.where"):
        capture(model, (torch.randn(6, 5, 4),), {}, batch_dims=[0], batch_size=6)
    assert HigherOrderOperator.__call__ is called
