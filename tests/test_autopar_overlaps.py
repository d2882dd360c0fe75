from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.overlaps import Overlap, overlapping

MESH = {"dp": 2}


class Tied(nn.Module):
    """Embeds ids and looks for them among rows of the same memory."""

    def __init__(self, tie: Callable[[Tied], None]) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        tie(self)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.emb(ids)).flatten(0, 1), ids.flatten())


def _by_object(model: Tied) -> None:
    model.head.weight = model.emb.weight


def _by_storage(model: Tied) -> None:
    model.head.weight.data = model.emb.weight.data


def _turned(model: Tied) -> None:
    model.head.weight.data = model.emb.weight.data.T


def _frozen(model: Tied) -> None:
    _by_storage(model)
    model.requires_grad_(False)


def _halves(model: Tied) -> None:
    model.emb.weight.data, model.head.weight.data = torch.randn(16, 8).chunk(2)


def _columns(model: Tied) -> None:
    model.emb.weight.data, model.head.weight.data = torch.randn(8, 8, 2).unbind(-1)


def _on_meta(model: Tied) -> None:
    model.to("meta")
    _by_storage(model)


@pytest.mark.parametrize("tie", [_by_storage, _turned])
def test_parameters_in_the_same_memory_are_refused(tie: Callable[[Tied], None]) -> None:
    ids = torch.arange(8).view(2, 4)
    helps = r"make them one, model.head.weight = model.emb.weight" if tie is _by_storage else "clone one of them"
    for made in (autopar.plan, autopar.verify):
        with pytest.raises(ValueError, match=rf"^emb.weight and head.weight are two tensors in the same .*; {helps}$"):
            made(Tied(tie), MESH, {"ids": ids}, hardware="cpu")


@pytest.mark.parametrize("tie", [_by_object, _frozen, _halves, _columns, _on_meta])
def test_what_is_one_or_apart_or_only_read_is_taken(tie: Callable[[Tied], None]) -> None:
    autopar.plan(Tied(tie), MESH, {"ids": torch.arange(8).view(2, 4)}, hardware="cpu")


def test_which_tensors_share_a_byte() -> None:
    """Against what is seen where one after the other is written to."""
    memory = torch.zeros(96)
    pairs = memory.view(torch.int16).view(96, 2)
    views = {
        "whole": memory, "front": memory[:10], "behind": memory[10:20], "even": memory[::2], "odd": memory[1::2],
        "square": memory[:16].view(4, 4), "turned": memory[:16].view(4, 4).T, "diagonal": memory[:16:5],
        "low": pairs[:, 0], "high": pairs[:, 1], "last": memory[95:], "many": memory[20].expand(3, 4),
        "none": memory[:0], "other": torch.zeros(96), "one": memory[3],
    }  # fmt: skip
    model = nn.Module()
    for name, view in views.items():
        model.register_buffer(name, view)
    wanted = []
    for i, (one, view) in enumerate(views.items()):
        for other, read in list(views.items())[i + 1 :]:
            memory.zero_()
            views["other"].zero_()
            value = 1.1 if view.is_floating_point() else 257  # no byte of them is zero
            (memory[20] if one == "many" else view).fill_(value)
            if bool((read.flatten().clone().view(torch.uint8) != 0).any()):
                wanted.append((one, other))
    found = overlapping(model)
    assert sorted(wanted) == sorted((each.one, each.other) for each in found)
    assert not any(each.alike for each in found)


class Views(nn.Module):
    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(8, 8), writes
        both = torch.zeros(2, 8)
        self.register_buffer("both", both)
        self.register_buffer("first", both[0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.writes:
            self.first.add_(y.detach().mean(0))
        return (y + self.both.sum(0) + self.first).square().mean()


def test_a_buffer_in_another_is_refused_where_the_step_writes_to_it() -> None:
    x = torch.randn(4, 8)
    assert overlapping(Views(True)) == (Overlap("both", "first", False),)
    with pytest.raises(ValueError, match=r"^both and first are two tensors in the same memory.*clone one of them$"):
        autopar.verify(Views(True), MESH, {"x": x}, hardware="cpu")
    assert autopar.verify(Views(False), MESH, {"x": x}, hardware="cpu").ok


class Holds(nn.Module):
    """Keeps a tensor in the memory of its weight as a plain attribute, and reads that or does not."""

    def __init__(self, reads: bool, clones: bool = False) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(8, 8), reads
        self.tied = self.linear.weight.data[:4].clone() if clones else self.linear.weight.data[:4]

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return (y @ self.tied.T if self.reads else y).square().mean()


def test_a_plain_tensor_in_a_weights_memory_is_refused_where_it_is_read() -> None:
    x = torch.randn(4, 8)
    said = r"^linear.weight and tied are two .*; read linear.weight in the forward .*, or clone tied$"
    for made in (autopar.plan, autopar.verify):
        with pytest.raises(ValueError, match=said):
            made(Holds(True), MESH, {"x": x}, hardware="cpu")
    for model in (Holds(False), Holds(True, clones=True)):
        autopar.plan(model, MESH, {"x": x}, hardware="cpu")
    frozen = Holds(True)
    frozen.linear.weight.requires_grad_(False)
    autopar.plan(frozen, MESH, {"x": x}, hardware="cpu")
    old = nn.utils.spectral_norm(nn.Linear(8, 8))
    autopar.plan(nn.Sequential(old), MESH, (x,), hardware="cpu")
