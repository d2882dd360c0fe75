"""Where weight gradients run that wait for what is sent, of steps made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from costmodel.layout import Partial, Replicate
from costmodel.reshard import Step
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption
from passes.play.postpone import postponed
from passes.program.routed_ops import ROUTED_MM_WEIGHT

aten = torch.ops.aten
WHOLE, SUM = (Replicate(),), (Partial("sum"),)
STORED: Any = StoredOption.__new__(StoredOption)
PROGRAM: Any = SimpleNamespace(inputs=[SimpleNamespace(name=f"layers.{i}.w", kind="parameter") for i in range(2)])
ADD = Step("all_reduce", (0,), None, None, "sum", 64, 1e-6, SUM, WHOLE, 2)
HALVE = replace(ADD, kind="slice")


class _Named:
    """For whom what is called g is a parameter's gradient, and late what works on one that is finished."""

    def of(self, node: fx.Node) -> fx.Node | None:
        return node if node.name.startswith(("g", "late")) else None

    def is_late(self, item: Run | Move) -> bool:
        return isinstance(item, Run) and item.node.name.startswith("late")


def items_of(told: str) -> list[Run | Move]:
    """`layer:name` each. Ops: g, gb and gr are products that are gradients; `r_NAME` reads a value, as the move
    `m_NAME` does. What is sent: s, `later`; p and q, as one of their letter each. Other moves are not."""
    graph, found, nodes = fx.Graph(), list[Run | Move](), dict[str, fx.Node]()
    odd: dict[str, dict[str, Any]] = {
        "forward": {"phase": "forward"},
        "out": {"reader": None},
        "rest": {"source": STORED},
        "home": {"target": STORED},
        "many": {"bucket": 0},
        "cut": {"steps": (HALVE,)},
        "p": {"bucket": 1, "packed": True},
        "q": {"bucket": 2, "packed": True},
        "later": {"steps": (HALVE, ADD)},
    }
    targets = {"gb": aten.bmm.default, "gr": ROUTED_MM_WEIGHT, "gadd": aten.add.Tensor}
    for each in told.split():
        layer, name = each.split(":")
        reads = nodes.get(name.partition("_")[2])
        kind = name.rstrip("0123456789").partition("_")[0]
        is_op = kind in ("x", "y", "g", "gb", "gr", "gadd", "late", "r", "mm")
        node = graph.placeholder(name)
        if is_op:
            target = targets.get(kind, aten.mm.default if kind[0] in "glm" else aten.neg.default)
            node = graph.create_node("call_function", target, (reads or node,), name=name)
        node.meta["module"] = f"layers.{layer}"
        nodes[name] = node
        option: Any = None
        if is_op:
            found.append(Run(node, option, 0, "backward"))
        else:
            move = Move(reads or node, SUM, WHOLE, (ADD,), "backward", "", node)
            found.append(replace(move, **odd.get(kind, {})))
    return found


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("1:g1 1:x1 1:s 1:x2", "x1 g1 s x2"),
        ("1:g1 1:g2 1:g3 1:x1 1:s1 1:x2 1:s2 1:x3", "x1 g1 g2 s1 x2 g3 s2 x3"),  # shared out, more of them first
        ("1:g1 1:g2 1:s1 1:x1 1:g3 1:s2 1:x2", "g1 g2 s1 x1 g3 s2 x2"),  # all before the next comes up
        ("1:g1 1:x1 0:x2 0:s1", "x1 g1 x2 s1"),  # a layer ends
        ("1:g1 1:g2 1:g3 1:g4 1:s1 0:s2 1:x1 1:s3", "g1 g2 s1 g3 s2 x1 g4 s3"),  # another layer's within
        ("1:g1 0:g2 0:x1 1:x2 1:s1", "x1 g1 g2 x2 s1"),  # the first layer to end
        ("1:g1 0:g2 1:x1 0:x2 0:s1", "x1 g1 g2 x2 s1"),
        ("1:g1 1:g2 1:x1 1:r_g2 1:s1", "x1 g1 g2 r_g2 s1"),  # one is read
        ("1:g1 1:x1 1:m_g1 1:x2", "x1 g1 m_g1 x2"),
        ("1:g1 1:g2 1:p1 1:p2 1:x1 1:s1", "g1 p1 p2 x1 g2 s1"),  # sent as one
        ("1:g1 1:g2 1:p1 1:q1 1:x1", "g1 p1 g2 q1 x1"),
        ("1:g1 1:x1 1:later1", "x1 g1 later1"),
        ("1:gb 1:gr 1:x1 1:s1", "x1 gb gr s1"),
        ("1:gadd 1:late 1:mm 1:x1 1:s1", "gadd late mm x1 s1"),  # no products of activations that are gradients
        *(
            (f"1:g1 1:{kind} 1:x1 1:s1", f"{kind} x1 g1 s1")
            for kind in ("forward", "out", "rest", "home", "many", "cut")
        ),
        ("1:g1 1:cut 1:x1", "g1 cut x1"),  # nothing is sent
        ("1:g1 1:s1 1:x1 1:g2 1:x2", "g1 s1 x1 x2 g2"),  # at the end
    ],
)
def test_products_are_shared_out_among_what_is_sent(given: str, wanted: str) -> None:
    items = items_of(given)
    gradients: Any = _Named()
    found = postponed(PROGRAM, items, gradients)
    names = {id(item): name.split(":")[1] for item, name in zip(items, given.split(), strict=True)}
    assert " ".join(names[id(item)] for item in found) == wanted
