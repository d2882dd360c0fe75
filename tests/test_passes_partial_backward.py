"""Backward through some of a step's outputs: what autograd gives on one device, whatever the others' derivatives."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from parity import captured, planned, relative
from torch import fx, nn

from passes.lower.lower import lower
from passes.lower.partial_backward import of_arrived
from passes.program.local import COLLECTIVES

OUTPUTS = ("plain", "overflows", "at_zero", "joined", "apart")


class Several(nn.Module):
    """Scalars of one trunk: some have infinite derivatives, some meet in a `chunk`, one has a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.left, self.right, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = x
        for layer in self.trunk:
            h = h + layer(h)
        one, two = self.left(h).chunk(2, -1)
        mse = one.square().mean()
        return {
            "plain": mse,
            "overflows": (two * 1e3).exp().mean() + (mse + 200).exp(),
            "at_zero": (self.right(h) - self.right(h).detach()).square().mean().sqrt(),
            "joined": (one + two).sin().mean(),
            "apart": self.own(x).square().mean(),
        }


@pytest.mark.parametrize("compile", [False, True])
def test_gradients_of_any_outputs_are_those_of_autograd(compile: bool) -> None:
    torch.manual_seed(0)
    model, x = Several(), torch.randn(4, 8)
    local = planned(captured(model, {"x": x}), {"dp": 1}, "ddp")[2]
    lowered = lower(local, compile=compile)
    assert lowered.of_arrived is not None
    named = dict(model.named_parameters()) | {"x": x}
    values = [named[entry.name].detach() for entry in local.inputs if entry.kind in ("parameter", "input")]
    subsets = chain.from_iterable(combinations(OUTPUTS, count) for count in range(1, 5))
    for arrived in [("plain",), ("apart", "joined"), ("plain", "apart"), ("overflows",)] if compile else subsets:
        weights = {name: torch.tensor(1.0 + index) for index, name in enumerate(arrived)}
        out = model(x)
        wanted = torch.autograd.grad(
            [out[name] for name in arrived], list(model.parameters()), list(weights.values()), allow_unused=True
        )
        some = lowered.of_arrived(frozenset(arrived))
        _, saved = lowered.forward([*values, torch.tensor(0)])
        asked = [entry.name for entry in local.inputs if entry.kind == "tangent" and entry.name in arrived]
        found = some.backward(list(saved), [weights[name] for name in asked])
        for (name, _), gradient, by_hand in zip(model.named_parameters(), found, wanted, strict=True):
            assert (gradient is None) == (by_hand is None), f"{name} of {arrived}"
            if by_hand is not None and by_hand.isfinite().all():
                assert relative(gradient, by_hand, 1e-4) < 1e-5, f"{name} of {arrived}"
            elif by_hand is not None:
                assert torch.equal(gradient.isfinite(), by_hand.isfinite()), f"{name} of {arrived}"


def test_what_no_gradient_arrives_at_sends_nothing() -> None:
    local = planned(captured(Several(), {"x": torch.randn(4, 8)}), {"dp": 2}, "ddp")[2]
    lowered = lower(local, compile=False)
    assert lowered.halves.backward is not None
    whole = lowered.halves.backward
    some = of_arrived(local.program, whole, {f"tangent_{name}": name for name in OUTPUTS}, ("apart",))
    assert 0 < _sent(some) < _sent(whole)


def _sent(gm: fx.GraphModule) -> int:
    return sum(node.target in COLLECTIVES for node in gm.graph.nodes)
