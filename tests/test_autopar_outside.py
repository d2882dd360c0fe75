"""Ids and labels that are of no row: torch raises, and a loss that ranks compute together is no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autopar


class _Predicting(nn.Module):
    def __init__(self, classes: int, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.look_up = nn.Embedding(classes, 32), nn.Linear(32, classes, bias=False), look_up

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.look_up(self.embed.weight, ids).tanh())
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class _Scoring(_Predicting):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(self.look_up(self.embed.weight, ids).tanh()).log_softmax(-1)
        return -scores.gather(-1, labels.clamp(min=-1)[..., None]).mean()


def _embedded(table: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.embedding(ids, table)


def _selected(table: Tensor, ids: Tensor) -> Tensor:
    return table.index_select(0, ids.flatten()).unflatten(0, ids.shape)


def _indexed(table: Tensor, ids: Tensor) -> Tensor:
    return table[ids]


def _is_seen(model: nn.Module, ids: Tensor, labels: Tensor) -> bool:
    """No number, or torch's error where the plan has a rank look up in the whole table."""
    try:
        return bool(model(ids, labels).isnan())
    except (IndexError, RuntimeError) as error:
        return "out of" in str(error)


def _outside_the_vocabulary(rank: int, ranks: int, classes: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    ids = torch.randint(0, classes, (4, 8), generator=torch.Generator().manual_seed(1))
    ignored, from_end = ids.clone(), ids.clone()
    ignored[1, 3] = -100
    from_end[2] -= classes
    even = not classes % ranks
    options = autopar.Options(compile=False, progress=False, pins={"*.weight": "S(0)"} if even else {})
    for kind, look_up in (
        (_Predicting, _embedded), (_Predicting, _selected), (_Predicting, _indexed), (_Scoring, _embedded)
    ):  # fmt: skip
        eager = kind(classes, look_up)
        plan = autopar.plan(eager, mesh, (ids, ids), strategy="auto" if even else "megatron", options=options)
        assert even or any(f"{classes} padded to {classes + 1}" in note for note in plan.notes)
        model = autopar.apply(eager, plan, mesh)
        for wrong in (classes, -classes - 1, 10**6):
            others = ids.clone()
            others[1, 3] = wrong
            for given in ((ids, others), (others, ids)):
                with pytest.raises((IndexError, RuntimeError)):
                    eager(*given)
                assert _is_seen(model, *given), (kind, look_up, wrong)
        right = [(ids, ids)] if kind is _Scoring else [(ids, ignored)]
        right += [(from_end, ids)] if look_up is _indexed else []
        for given in right:
            torch.testing.assert_close(model(*given), eager(*given))


@pytest.mark.parametrize("classes", [96, 95])
def test_what_is_outside_the_vocabulary_makes_the_loss_no_number(classes: int) -> None:
    """Where one device raises; 95 classes are padded to 96."""
    run_ranks(_outside_the_vocabulary, 2, classes)
