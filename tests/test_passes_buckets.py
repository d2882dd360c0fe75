"""What goes together, and where it stands, of steps made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from costmodel.layout import Partial, Replicate
from costmodel.reshard import Step
from passes.analysis.buckets import bucketed
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption

WHOLE, SUM = (Replicate(),), (Partial("sum"),)
STORED: Any = StoredOption.__new__(StoredOption)
NAMES = [f"layers.{layer}.{part}.weight" for layer in range(2) for part in ("up", "down")]
PROGRAM: Any = SimpleNamespace(inputs=[SimpleNamespace(name=name, kind="parameter") for name in NAMES])


class _Stored:
    """For whom a move is late that brings a gradient to where it is stored."""

    def is_late(self, item: Run | Move) -> bool:
        return isinstance(item, Move) and item.stores


LATE: Any = _Stored()


def _node(graph: fx.Graph, name: str, module: str, dtype: torch.dtype = torch.float32) -> fx.Node:
    node = graph.placeholder(name)
    node.meta.update(module=module, val=torch.empty(4, dtype=dtype, device="meta"))
    return node


def _step(kind: str, op: str = "", full_bytes: int = 64) -> Step:
    return Step(kind, (0,), None, None, op, full_bytes, 1e-6, SUM, WHOLE, 2)


def _run(node: fx.Node, phase: str) -> Run:
    option: Any = None
    return Run(node, option, 0, phase)


def _told(items: list[Run | Move]) -> list[tuple[str, int]]:
    """Names, and of moves by which number they go together."""
    return [(i.node.name, -2) if isinstance(i, Run) else (i.value.name, i.bucket) for i in items]


def test_a_layers_parameters_are_gathered_together_before_its_first_op() -> None:
    """Those before the layers and those behind them are no layer's."""
    graph, items = fx.Graph(), list[Run | Move]()

    def add(name: str, module: str, dtype: torch.dtype = torch.float32) -> None:
        weight, op = (_node(graph, what + name, module, dtype) for what in ("w", "o"))
        path = (_step("cast"), _step("state_gather"))
        items.extend([Move(weight, STORED, WHOLE, path, "forward", "forward", op), _run(op, "forward")])

    add("first", "embed")
    for layer in range(2):
        for part, dtype in (("up", torch.float32), ("down", torch.float32), ("odd", torch.bfloat16)):
            add(f"{layer}{part}", f"layers.{layer}.{part}", dtype)
    add("norm", "norm")
    add("last", "head")
    found = _told(bucketed(PROGRAM, items, LATE))
    assert found == [
        ("wfirst", 0), ("ofirst", -2),
        ("w0up", 1), ("w0down", 1), ("w0odd", 2), ("o0up", -2), ("o0down", -2), ("o0odd", -2),
        ("w1up", 3), ("w1down", 3), ("w1odd", 4), ("o1up", -2), ("o1down", -2), ("o1odd", -2),
        ("wnorm", 5), ("wlast", 5), ("onorm", -2), ("olast", -2),
    ]  # fmt: skip


def test_a_layers_gradients_are_stored_together_behind_its_last_op() -> None:
    graph, items = fx.Graph(), list[Run | Move]()
    for layer in (1, 0):
        for part in ("down", "up"):
            op = _node(graph, f"g{layer}{part}", f"layers.{layer}.{part}")
            path = (_step("state_scatter", "sum"),)
            items += [_run(op, "backward"), Move(op, SUM, STORED, path, "backward", "", None, stores=True)]
        items.append(_run(_node(graph, f"x{layer}", f"layers.{layer}.up"), "backward"))
    assert _told(bucketed(PROGRAM, items, LATE)) == [
        ("g1down", -2), ("g1up", -2), ("x1", -2), ("g1down", 0), ("g1up", 0),
        ("g0down", -2), ("g0up", -2), ("x0", -2), ("g0down", 1), ("g0up", 1),
    ]  # fmt: skip


def test_small_sums_that_follow_one_another_are_one() -> None:
    graph, items = fx.Graph(), list[Run | Move]()
    reader = _node(graph, "reader", "")
    for name, op, full_bytes, dtype in (
        ("loss", "sum", 4, torch.float32),
        ("count", "sum", 1 << 16, torch.float32),
        ("most", "max", 4, torch.float32),
        ("large", "sum", (1 << 16) + 1, torch.float32),
        ("other", "sum", 4, torch.float32),
        ("half", "sum", 4, torch.bfloat16),
    ):
        value = _node(graph, name, "", dtype)
        items.append(Move(value, SUM, WHOLE, (_step("all_reduce", op, full_bytes),), "forward", "", reader))
    found = bucketed(PROGRAM, items, LATE)
    assert [bucket for _, bucket in _told(found)] == [0, 0, -1, -1, -1, -1]
    assert [(i.value.name, i.packed) for i in found if isinstance(i, Move)] == [
        ("loss", True), ("count", True), ("most", False), ("large", False), ("other", False), ("half", False)
    ]  # fmt: skip
