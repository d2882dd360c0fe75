from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.overlaps import check_apart, placed
from passes.capture.capture import capture
from passes.program.program import Constant
from passes.program.spans import sharing, span_of

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


def _by_storage_and_listed(model: Tied) -> None:
    model.register_buffer("listed", model.emb.weight)
    _by_storage(model)


def _turned(model: Tied) -> None:
    model.head.weight.data = model.emb.weight.data.T


def _frozen(model: Tied) -> None:
    _by_storage(model)
    model.requires_grad_(False)


def _frozen_and_not_read(model: Tied) -> None:
    """What is trained alone is elsewhere."""
    model.emb.weight.requires_grad_(False)
    model.spare = nn.Parameter(model.emb.weight.data)


def _halves(model: Tied) -> None:
    model.emb.weight.data, model.head.weight.data = torch.randn(16, 8).chunk(2)


def _columns(model: Tied) -> None:
    model.emb.weight.data, model.head.weight.data = torch.randn(8, 8, 2).unbind(-1)


def _on_meta(model: Tied) -> None:
    model.to("meta")
    _by_storage(model)


@pytest.mark.parametrize("tie", [_by_storage, _by_storage_and_listed, _turned])
def test_parameters_in_the_same_memory_are_refused(tie: Callable[[Tied], None]) -> None:
    ids = torch.arange(8).view(2, 4)
    helps = "clone one of them" if tie is _turned else r"make them one, model.head.weight = model.emb.weight"
    for made in (autopar.plan, autopar.verify):
        with pytest.raises(ValueError, match=rf"^emb.weight and head.weight are two tensors in the same .*; {helps}$"):
            made(Tied(tie), MESH, {"ids": ids}, hardware="cpu")


@pytest.mark.parametrize("tie", [_by_object, _frozen, _frozen_and_not_read, _halves, _columns, _on_meta])
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
    wanted = []
    for i, (one, view) in enumerate(views.items()):
        for other, read in list(views.items())[i + 1 :]:
            memory.zero_()
            views["other"].zero_()
            value = 1.1 if view.is_floating_point() else 257  # no byte of them is zero
            (memory[20] if one == "many" else view).fill_(value)
            if bool((read.flatten().clone().view(torch.uint8) != 0).any()):
                wanted.append((one, other))
    names, spans = zip(*((name, span) for name, view in views.items() if (span := span_of(view))), strict=True)
    assert wanted == [(names[one], names[other]) for one, other in sharing(spans)]


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
    with pytest.raises(ValueError, match=r"^both and first are two tensors in the same memory.*clone one of them$"):
        autopar.verify(Views(True), MESH, {"x": x}, hardware="cpu")
    assert autopar.verify(Views(False), MESH, {"x": x}, hardware="cpu").ok


class Reads(nn.Module):
    """Reads a tensor that it keeps in something of its own."""

    def __init__(self, kept: Callable[[nn.Linear], Tensor], form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(8, 8), form
        tensor = kept(self.linear)
        forms = {"attribute": tensor, "list": [tensor], "dict": {0: tensor}, "object": SimpleNamespace(tensor=tensor)}
        self.held: Any = forms.get(form, lambda: tensor)
        ELSEWHERE[:] = [tensor]

    def forward(self, x: Tensor) -> Tensor:
        tensor = self.held
        match self.form:
            case "list" | "dict":
                tensor = self.held[0]
            case "object":
                tensor = self.held.tensor
            case "closure":
                tensor = self.held()
            case "global":
                tensor = ELSEWHERE[0]
            case "nothing":
                return self.linear(x).square().mean()
        return (self.linear(x) @ tensor.T).square().mean()


ELSEWHERE: list[Tensor] = []
X = torch.arange(32.0).view(4, 8) / 8
FORMS = ("attribute", "list", "dict", "object", "closure", "global")


def _lies_in(linear: nn.Linear) -> Tensor:
    return linear.weight.data[:4]


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_tensor_in_a_weights_memory_is_refused_where_it_is_read(form: str) -> None:
    said = (
        r"^\S+test_autopar_overlaps.py:\d+: reads a \(4, 8\) tensor in the memory of linear.weight, .* or keep a clone$"
    )
    for made in (autopar.plan, autopar.verify):
        with pytest.raises(ValueError, match=said):
            made(Reads(_lies_in, form), MESH, {"x": X}, hardware="cpu")
    autopar.plan(Reads(lambda linear: _lies_in(linear).clone(), form), MESH, {"x": X}, hardware="cpu")
    frozen = Reads(_lies_in, form)
    frozen.linear.weight.requires_grad_(False)
    autopar.plan(frozen, MESH, {"x": X}, hardware="cpu")


def test_what_is_not_read_may_lie_in_a_weights_memory() -> None:
    autopar.plan(Reads(_lies_in, "nothing"), MESH, {"x": X}, hardware="cpu")
    old = nn.utils.spectral_norm(nn.Linear(8, 8))
    autopar.plan(nn.Sequential(old), MESH, (X,), hardware="cpu")


def test_an_evaluation_between_steps_reads_what_training_writes() -> None:
    model = Reads(_lies_in, "list")
    held = placed(model)
    with torch.no_grad():
        program = capture(model, (X,))
        check_apart(placed(model), program)  # for evaluation alone
        with pytest.raises(ValueError, match=r"reads a .* in the memory of linear.weight"):
            check_apart(held, program)


def test_memory_that_is_another_tensors_by_now_is_no_weights() -> None:
    model = Reads(lambda linear: X, "nothing")
    held = placed(model)
    reads = replace(capture(model, (X,)), constants=(Constant("model.py:1", held[0].span),))
    with pytest.raises(ValueError, match=r"^model.py:1: reads a \(8, 8\) tensor in the memory of linear.weight"):
        check_apart(held, reads)
    del model
    gc.collect()
    check_apart(held, reads)


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_whose_gradient_would_be_lost_is_refused(form: str) -> None:
    for kept in (lambda linear: linear.weight.view(8, 8), lambda linear: linear.weight * 2):
        for made in (autopar.plan, autopar.verify):
            with pytest.raises(autopar.CaptureError, match="requires a gradient and is none of the model's"):
                made(Reads(kept, form), MESH, {"x": X}, hardware="cpu")
        with torch.no_grad():
            autopar.plan(Reads(lambda linear: linear.weight * 2, form), MESH, {"x": X}, hardware="cpu")


def test_a_detached_tensor_is_a_constant_unless_it_may_be_trained() -> None:
    class Detaches(nn.Module):
        def __init__(self, kept: Tensor) -> None:
            super().__init__()
            self.linear, self.kept = nn.Linear(8, 8), [kept]

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) @ self.kept[0].detach()).square().mean()

    weight = nn.Parameter(torch.ones(8, 8))
    autopar.plan(Detaches(weight * 2), MESH, {"x": X}, hardware="cpu")
    with pytest.raises(
        autopar.CaptureError, match=r"requires a gradient and is none of the model's.*requires_grad=False"
    ):
        autopar.plan(Detaches(weight), MESH, {"x": X}, hardware="cpu")
