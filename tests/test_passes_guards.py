from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.capture.capture import capture
from passes.capture.guards import broken
from passes.planner.pipeline import prepare
from passes.program.program import Fixed, Guards, Program


class Reads(nn.Module):
    """A model that reads its mask in the way it is told to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "branch":
            return y * 2 if mask.all() else y
        if self.how == "item":
            return y * mask.sum().item()
        if self.how == "tolist":
            return y * max(mask.sum(-1).tolist())
        if self.how == "select":
            return y[mask].sum() * torch.ones(2)
        if self.how == "equal":
            return y * (3 if torch.equal(mask, torch.ones_like(mask)) else 5)
        return y * mask.unsqueeze(-1)


FULL = torch.ones(2, 3, dtype=torch.bool)
ONE_LESS = torch.tensor([[True, True, True], [True, True, False]])
OTHER_ONE_LESS = torch.tensor([[True, True, True], [True, False, True]])


def captured(how: str, mask: Tensor) -> Program:
    x = torch.randn(2, 3, 4)
    return prepare(capture(Reads(how), (x, mask), batch_dims=[0, 0], batch_size=2))


@pytest.mark.parametrize("how", ["branch", "item", "tolist", "select", "equal"])
def test_what_was_read_is_told_from_other_values(how: str) -> None:
    guards = captured(how, ONE_LESS).guards
    assert guards is not None
    x = torch.randn(2, 3, 4)

    def of(mask: Tensor) -> Any:
        return broken(guards, {"args.0": x, "args.1": mask}, {})

    assert not of(ONE_LESS)
    (fixed, *_) = of(FULL)
    assert "test_passes_guards.py" in fixed.where
    # Another mask that gives the same value is no other: what is guarded is what was read.
    assert not of(OTHER_ONE_LESS)


class Rotary(nn.Module):
    """Has a buffer that stays a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("inverse", torch.arange(1, 5) ** -1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.inverse.cos()


def test_a_model_that_reads_nothing_has_no_guards() -> None:
    assert captured("", ONE_LESS).guards is None
    assert capture(Rotary(), (torch.randn(2, 4),), batch_dims=[0], batch_size=2).guards is None


def test_a_counter_in_a_buffer_is_guarded() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("scale", torch.full((), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.linear(x) * float(self.scale)
            return y if self.calls.item() > 1 else y * 0

    program = capture(Counts(), (torch.randn(2, 4),), batch_dims=[0], batch_size=2)
    assert program.guards is not None
    assert not program.guards.inputs
    assert sorted(program.guards.buffers) == ["calls", "scale"]

    def of(calls: int, scale: float) -> list[Fixed]:
        return broken(program.guards, {}, {"calls": torch.tensor(calls), "scale": torch.tensor(scale)})

    assert not of(0, 3.0)
    assert [fixed.buffers for fixed in of(7, 3.0)] == [("calls",)]
    assert [fixed.buffers for fixed in of(0, 2.0)] == [("scale",)]
    (note,) = program.notes  # the step does not write to `scale`
    line = Counts.forward.__code__.co_firstlineno + 3
    assert re.search(rf"test_passes_guards.py:{line}: .* writes to the buffer calls: each new value is captured", note)


def test_a_value_of_an_input_and_a_buffer_is_told_as_one_of_the_input() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("scale", torch.full((), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * float(x.max() * self.scale)

    guards = capture(Scales(), (torch.ones(2, 4),), batch_dims=[0], batch_size=2).guards
    assert guards is not None
    assert (guards.inputs, guards.buffers) == (("args.0",), ("scale",))
    for x, scale in ((2.0, 3.0), (1.0, 2.0)):
        (fixed,) = broken(guards, {"args.0": torch.full((2, 4), x)}, {"scale": torch.tensor(scale)})
        assert fixed.buffers == ()
    assert not broken(guards, {"args.0": torch.ones(2, 4)}, {"scale": torch.tensor(3.0)})


class Spoken(nn.Module):
    """A connectionist loss, whose state is as long as the longest target."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        lengths = (targets >= 0).sum(-1)
        scores = self.linear(x).log_softmax(-1).transpose(0, 1)
        return nn.functional.ctc_loss(scores, targets[targets >= 0], torch.full((2,), 8), lengths)


def test_a_shape_is_guarded_without_what_it_does_not_follow_from() -> None:
    """Parameters lie in parts where guards run, and the whole forward would run again on every rank."""
    x = torch.randn(2, 8, 4)
    targets, shorter = torch.tensor([[1, 2, 3], [1, 2, -1]]), torch.tensor([[1, 2, -1], [1, 2, -1]])
    guards = capture(Spoken(), (x, targets), batch_dims=[0, 0], batch_size=2).guards
    assert guards is not None
    assert guards.inputs == ("args.1",)
    assert not broken(guards, {"args.1": targets}, {})
    assert broken(guards, {"args.1": shorter}, {})


class AsksWhetherItIsCompiled(nn.Module):
    """Scales its input where a value is positive, and shifts it where it is told that it is being compiled."""

    def __init__(self, follows_from: str) -> None:
        super().__init__()
        self.follows_from = follows_from
        self.scale = nn.Parameter(torch.full((3,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return x + self.scale
        read = {"input": x, "parameter": self.scale}[self.follows_from]
        return x * self.scale if read.sum().item() > 0 else x


def test_numbers_are_those_of_eager_where_they_follow_from_the_inputs() -> None:
    x = torch.ones(2, 3)
    program = capture(AsksWhetherItIsCompiled("input"), (x,), {}, batch_dims=[0], batch_size=2)
    placeholders = {"args.0": x, "scale": torch.full((3,), 3.0)}
    out, *_ = program.graph(*(placeholders.get(i.name, torch.ones(2, 3)) for i in program.inputs))
    assert torch.equal(out, torch.full((2, 3), 3.0))
    assert not any("whether it is compiled" in note for note in program.notes)


def test_a_model_that_is_told_that_it_is_compiled_is_named_in_the_report() -> None:
    model = AsksWhetherItIsCompiled("parameter")
    program = capture(model, (torch.ones(2, 3),), {}, batch_dims=[0], batch_size=2)
    (note,) = [note for note in program.notes if "whether it is compiled" in note]
    assert "test_passes_guards.py:" in note
    assert torch.compiler.is_compiling.__module__ == "torch.compiler"


def test_a_tensor_with_nan_holds_for_the_same_and_for_no_other() -> None:
    def guard(x: Tensor) -> tuple[Tensor]:
        return (x * 1,)

    value = torch.tensor([1.0, float("nan")])
    guards = Guards(torch.fx.symbolic_trace(guard), ("x",), (), (Fixed("line", "numpy", value),))
    assert not broken(guards, {"x": value.clone()}, {})
    for other in (torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 1.0]), value[:1]):
        assert broken(guards, {"x": other}, {})
