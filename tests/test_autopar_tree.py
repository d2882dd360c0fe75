"""Copies of modules run on their own parameters, however these are reached."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import autopar
from autopar.modules.tree import copied


class Indirect(nn.Module):
    """Runs `inner` by another way than an attribute."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.run = _WAYS[way](self.inner)

    def forward(self, x: Tensor) -> Tensor:
        held = self.run
        run = held[0]["inner"] if isinstance(held, list) else held
        return self.out(run(x).relu()).square().mean()


def _compiled_in_place(inner: nn.Module) -> nn.Module:
    inner.compile()
    return inner


_WAYS: dict[str, Callable[[nn.Module], object]] = {
    "bound method": lambda inner: inner.forward,
    "lambda": lambda inner: lambda x: inner(x),
    "lambda of a tensor": lambda inner: lambda x, w=None: x @ inner.weight.t() + _bias(inner),
    "partial": lambda inner: functools.partial(inner.forward),
    "list": lambda inner: [{"inner": inner}],
    "torch.compile of it": torch.compile,
    "torch.compile of its method": lambda inner: torch.compile(inner.forward),
    "compile()": _compiled_in_place,
}


def _bias(inner: nn.Module) -> Tensor:
    bias = inner.bias
    assert isinstance(bias, Tensor)
    return bias


def test_a_copy_runs_on_its_own_parameters() -> None:
    """Gradients reach the copy's parameters, none the original's; the original still runs on its own."""
    x = torch.randn(4, 8)
    for way in _WAYS:
        model = Indirect(way)
        copy = copied(model, lambda _, old: nn.Parameter(2 * old.detach()), lambda _, old: old)
        with torch.no_grad():
            wanted = (x @ (2 * model.inner.weight).t() + 2 * model.inner.bias).relu()
            wanted = (wanted @ (2 * model.out.weight).t() + 2 * model.out.bias).square().mean()
        loss = copy(x)
        torch.testing.assert_close(loss, wanted)
        loss.backward()
        assert all(p.grad is not None for p in copy.parameters()), way
        assert all(p.grad is None for p in model.parameters()), way


def test_hooks_of_loading_get_the_copys_modules() -> None:
    model, seen = nn.Sequential(nn.Linear(8, 4)), []

    def note(module: nn.Module, *args: object) -> None:
        seen.append(module)

    model[0].register_load_state_dict_pre_hook(note)
    copy = copied(model, lambda _, old: nn.Parameter(old.detach()), lambda _, old: old)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]
    state = model.state_dict()
    del model, seen[:]
    copy.load_state_dict(state)
    assert seen == [copy[0]]  # type: ignore[index]


def test_models_that_hold_their_parts_otherwise_are_planned() -> None:
    for way in _WAYS:
        parity = autopar.verify(Indirect(way), {"dp": 2, "tp": 2}, (torch.randn(4, 8),), strategy="megatron")
        assert parity.ok, (way, parity)
        assert sum(tensor.kind == "gradient" for tensor in parity.tensors) == 4, way
