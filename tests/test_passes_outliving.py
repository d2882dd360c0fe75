"""Tables that a forward keeps outside of its modules: right for later captures, and for the model itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.capture.capture import capture
from passes.program.program import Program


@functools.lru_cache
def _kept_by_function(length: int, scale: float) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length), torch.arange(4) * scale)
    return angles.cos(), angles.sin()


_TABLES: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}


def _kept_in_dict(length: int, scale: float) -> tuple[Tensor, Tensor]:
    if (length, scale) not in _TABLES:
        _TABLES[length, scale] = _kept_by_function.__wrapped__(length, scale)
    return _TABLES[length, scale]


class Rotated(nn.Module):
    table: Any = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.inner = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.kind == "class":
            if Rotated.table is None:
                Rotated.table = _kept_by_function.__wrapped__(x.shape[1], 0.3)
            cos, sin = Rotated.table
        else:
            cos, sin = (_kept_by_function if self.kind == "function" else _kept_in_dict)(x.shape[1], 0.3)
        return (y * cos + y.flip(-1) * sin).square().mean()


def _captured(model: nn.Module, x: Tensor) -> Program:
    return capture(model, (x,), {}, batch_dims=[0], batch_size=6)


def _loss(program: Program, model: nn.Module, x: Tensor) -> Tensor:
    given = dict(model.named_parameters())
    values = [torch.ones(()) if e.kind == "tangent" else given.get(e.name, x).detach() for e in program.inputs]
    found: Tensor = program.graph(*values)[0]
    return found


@pytest.mark.parametrize("kind", ["function", "dict", "class"])
def test_a_table_kept_outside_has_values_after_a_capture(kind: str) -> None:
    _kept_by_function.cache_clear()
    _TABLES.clear()
    Rotated.table = None
    model, x = Rotated(kind), torch.randn(6, 5, 4)
    programs = [_captured(model, x), _captured(model.eval(), x)]
    kept = {
        "function": lambda: _kept_by_function(5, 0.3),
        "dict": lambda: _TABLES[5, 0.3],
        "class": lambda: Rotated.table,
    }
    for found, wanted in zip(kept[kind](), _kept_by_function.__wrapped__(5, 0.3), strict=True):
        torch.testing.assert_close(found, wanted)
    eager = model(x)
    eager.backward()
    programs.append(_captured(model, x))
    assert [buffer for program in programs for buffer in program.graph.buffers()] == [], "made by ops in each"
    y = torch.randn(6, 5, 4)
    for program in programs:
        torch.testing.assert_close(_loss(program, model, y), model(y).detach())


def test_a_table_that_was_written_to_since_is_as_it_is_now() -> None:
    _TABLES.clear()
    model, x = Rotated("dict"), torch.randn(6, 5, 4)
    before = _captured(model, x)
    cos, _ = _TABLES[5, 0.3]
    cos.mul_(2.0)
    torch.testing.assert_close(_loss(_captured(model, x), model, x), model(x).detach())
    assert not torch.allclose(_loss(before, model, x), model(x).detach())


def test_a_table_of_repeated_rows_takes_no_more_memory() -> None:
    kept: dict[int, Tensor] = {}

    class Placed(Rotated):
        def forward(self, x: Tensor) -> Tensor:
            if not kept:
                kept[0] = torch.arange(x.shape[1]).expand(1 << 40, -1)
            return (self.inner(x).sum(-1) * kept[0][: len(x)]).mean()

    _captured(Placed("dict"), torch.randn(6, 5, 4))
    assert kept[0].stride() == (0, 1)
    assert kept[0][7].tolist() == [0, 1, 2, 3, 4]
