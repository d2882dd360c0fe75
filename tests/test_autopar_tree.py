"""Copies of modules run on their own parameters, however these are reached."""

from __future__ import annotations

import copy
import functools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from parity import captured
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
        return self.out(_found(self.run)(x).relu()).square().mean()


def _found(held: Any) -> Any:
    """What is called, out of what holds it."""
    match held:
        case weakref.ref():
            return held()
        case dict():
            return held["inner"]
        case set() | frozenset():
            return next(iter(held))
        case list() | tuple() | deque():
            return _found(held[0])
        case SimpleNamespace():
            return held.inner
        case _:
            return held


class Stage(NamedTuple):
    inner: nn.Module


@dataclass(frozen=True)
class Runs:
    inner: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class RunsBySlot:
    __slots__ = ("inner",)

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Named(dict[str, Any]):
    """A dict of a class of its own, with an attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner=inner)
        self.too = inner


def _compiled_in_place(inner: nn.Module) -> nn.Module:
    inner.compile()
    return inner


_WAYS: dict[str, Callable[[nn.Module], object]] = {
    "bound method": lambda inner: inner.forward,
    "lambda": lambda inner: lambda x: inner(x),
    "lambda of a tensor": lambda inner: lambda x, w=None: x @ inner.weight.t() + _bias(inner),
    "partial": lambda inner: functools.partial(inner.forward),
    "list": lambda inner: [{"inner": inner}],
    "deque": lambda inner: deque([inner], maxlen=1),
    "set": lambda inner: {inner},
    "named tuple": Stage,
    "dict of a class of its own": Named,
    "object": Runs,
    "object in an object": lambda inner: SimpleNamespace(inner=Runs(inner)),
    "object without a dict": RunsBySlot,
    "default argument": lambda inner: lambda x, run=inner: run(x),
    "default of a keyword": lambda inner: lambda x, *, run=inner: run(x),
    "lru_cache": lambda inner: functools.lru_cache(lambda x: inner(x)),
    "weak reference": weakref.ref,
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


def test_handles_of_hooks_are_the_copys() -> None:
    """Also where the hook is a method, for which the copy has another."""

    class Hooked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.handles = [self.register_forward_hook(self.doubled, with_kwargs=True)]

        def doubled(self, module: nn.Module, args: object, kwargs: object, out: Tensor) -> Tensor:
            return out + self.weight.sum()

    x = torch.ones(1, 4)
    model = Hooked()
    plain = nn.functional.linear(x, model.weight, model.bias)
    once = copied(model, lambda _, old: nn.Parameter(old.detach()), lambda _, old: old)
    once.handles[0].remove()  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(once(x), plain)
    torch.testing.assert_close(model(x), plain + model.weight.sum())
    other = copied(model, lambda _, old: nn.Parameter(old.detach()), lambda _, old: old)
    del model
    again = copy.deepcopy(other)
    again.handles[0].remove()  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(again(x), plain)
    torch.testing.assert_close(other(x), plain + other.weight.sum())  # type: ignore[operator]


def test_models_that_hold_their_parts_otherwise_are_planned() -> None:
    for way in _WAYS:
        parity = autopar.verify(Indirect(way), {"dp": 2, "tp": 2}, (torch.randn(4, 8),), strategy="megatron")
        assert parity.ok, (way, parity)
        assert sum(tensor.kind == "gradient" for tensor in parity.tensors) == 4, way


class Gained(nn.Module):
    """Reads a frozen weight and a buffer through an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.frozen = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.register_buffer("gain", torch.ones(()))
        self.run = Gains(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.linear(x)).square().mean()


class Gains:
    def __init__(self, model: Gained) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.model.frozen) * self.model.gain


def test_what_an_object_reads_of_the_model_is_read_in_each_step() -> None:
    program = captured(Gained(), {"x": torch.randn(4, 4)})
    assert {given.name for given in program.inputs} >= {"linear.weight", "frozen", "gain"}
    read = {node.target for node in program.graph.graph.nodes if node.op == "get_attr"}
    assert not read


class Linked:
    """Refers to the one that made it, and to the next."""

    def __init__(self, made_by: object, after: Linked | None = None) -> None:
        self.made_by, self.after = made_by, after


@pytest.mark.parametrize("names", [("holder", "held"), ("held", "holder")])
def test_what_objects_that_hold_each_other_reach_is_the_copys(names: tuple[str, ...]) -> None:
    """Wherever one starts: from the object that has the model, or from what has that object alone."""
    model = nn.Linear(2, 2)
    holder = SimpleNamespace(model=model)
    held = Linked(holder)
    holder.held = (held, lambda held=held: (held.made_by.model, model, holder))
    for name in names:
        setattr(model, name, {"holder": holder, "held": [held]}[name])
    copy: Any = copied(model, lambda _, old: nn.Parameter(old.detach()), lambda _, old: old)
    assert copy.holder.model is copy
    assert copy.held[0].made_by is copy.holder
    assert copy.holder.held[0] is copy.held[0]
    assert all(a is b for a, b in zip(copy.holder.held[1](), (copy, copy, copy.holder), strict=True))
    assert (holder.model, held.made_by) == (model, holder)


def test_a_long_chain_of_objects_is_followed() -> None:
    model = nn.Linear(2, 2)
    chain: Linked | None = None
    for _ in range(3000):
        chain = Linked(None, chain)
    model.chain = chain  # type: ignore[assignment]
    copy: Any = copied(model, lambda _, old: nn.Parameter(old.detach()), lambda _, old: old)
    assert copy.chain is chain


def test_what_holds_no_part_of_the_model_stays_the_same_object() -> None:
    model = nn.Linear(2, 2)
    held = [Runs(nn.ReLU()), RunsBySlot(nn.ReLU()), SimpleNamespace(a=1), lambda x, y=2: x, deque([1]), {1, 2}]
    held.append(held)  # type: ignore[arg-type]
    model.held = held  # type: ignore[assignment]
    copy = copied(model, lambda _, old: nn.Parameter(old.detach()), lambda _, old: old)
    assert copy.held is held
