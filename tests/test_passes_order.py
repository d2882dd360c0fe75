"""The order in which a model makes its masks and tables says nothing about the program, or about the plan for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autopar

KINDS = ("full", "window", "wide")


class Kinds(nn.Module):
    """A mask and an angle per kind of layer, made in a given order; one mask shares its steps with the others."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleDict({kind: nn.Linear(16, 16) for kind in KINDS})
        for number, kind in enumerate(KINDS):
            self.register_buffer(f"frequency_{kind}", torch.arange(1.0, 9.0) / (number + 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        places = torch.arange(ids.shape[1])
        ahead = places[None, :] - places[:, None]
        width = {"full": 99, "window": 2, "wide": 4}
        masks = {kind: (ahead <= 0) & (ahead > -width[kind]) for kind in self.order}
        angles = {}
        for kind in self.order:
            angle = places[:, None] * getattr(self, f"frequency_{kind}")
            angles[kind] = torch.cat([angle.cos(), angle.sin()], -1)
        for kind in KINDS:
            x = x + masks[kind].float() @ self.layers[kind](x * angles[kind])
        return x.square().mean()


def test_neither_program_nor_plan_tells_the_order_of_a_set() -> None:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    options = autopar.Options(progress=False)
    orders = (KINDS, ("window", "wide", "full"), ("wide", "full", "window"))
    plans = [
        autopar.plan(Kinds(order), {"dp": 2, "tp": 2}, (ids,), hardware="h100", options=options) for order in orders
    ]
    assert plans[0].fingerprint == plans[1].fingerprint == plans[2].fingerprint
    assert plans[0].to_json() == plans[1].to_json() == plans[2].to_json()


def test_a_program_whose_order_was_settled_computes_what_the_model_does() -> None:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    parity = autopar.verify(Kinds(("wide", "full", "window")), {"dp": 2, "tp": 2}, (ids,))
    assert parity.ok, parity
