"""Where collectives of activations are put in graphs made by hand, and what is read off such graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from passes.play.sending import send_early
from passes.program.local import WAIT, bind_groups, groups_used
from passes.rewrite.ledger import Issued, ledger

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
WORDS: Any = SimpleNamespace(instance=lambda module: module.split(".")[0])


class Made:
    """A graph whose nodes are made one by one."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def given(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta.update(phase="", module="", val=torch.empty(4, 2, device="meta"))
        return node

    def call(self, target: Any, *args: Any, name: str, phase: str = "forward", module: str = "one.up") -> fx.Node:
        node = self.graph.create_node("call_function", target, args, name=name)
        node.meta.update(phase=phase, module=module, val=torch.empty(4, 2, device="meta"))
        return node

    def sent(self, x: fx.Node, name: str, phase: str = "forward", module: str = "one.up") -> list[fx.Node]:
        """A gather of a tensor of which a view is sent."""
        view = self.call(aten.view.default, x, [4, 2], name=f"{name}_view", phase=phase, module=module)
        gather = c10d.all_gather_into_tensor.default
        made = self.call(gather, view, 2, "tp", name=name, phase=phase, module=module)
        return [view, made, self.call(WAIT, made, name=f"{name}_wait", phase=phase, module=module)]

    def order(self) -> list[str]:
        return [node.name for node in self.graph.nodes if node.op == "call_function"]


def test_what_is_sent_starts_where_its_operand_is_made() -> None:
    made = Made()
    a = made.call(aten.relu.default, made.given("x"), name="a")
    made.call(aten.sin.default, a, name="b", module="one.down")
    send_early(WORDS, [made.sent(a, "sent", module="one.down")])
    assert made.order() == ["a", "sent_view", "sent", "b", "sent_wait"]


@pytest.mark.parametrize(("module", "phase"), [("two.up", "forward"), ("one.up", "backward")])
def test_it_stays_in_its_layer_and_its_phase(module: str, phase: str) -> None:
    made = Made()
    a = made.call(aten.relu.default, made.given("x"), name="a")
    made.call(aten.sin.default, a, name="b")
    made.call(aten.sin.default, a, name="c", module=module, phase=phase)
    send_early(WORDS, [made.sent(a, "sent", module=module, phase=phase)])
    assert made.order() == ["a", "b", "sent_view", "sent", "c", "sent_wait"]


def test_collectives_keep_their_order() -> None:
    made = Made()
    x = made.given("x")
    a, b = (made.call(aten.relu.default, x, name=name) for name in "ab")
    first = made.sent(b, "first")
    made.call(aten.sin.default, a, name="c")
    second = made.sent(a, "second")
    send_early(WORDS, [first, second, [made.call(aten.view.default, a, [8], name="local")]])
    sent = ["first_view", "first", "second_view", "second"]
    assert made.order() == ["a", "b", *sent, "first_wait", "c", "second_wait", "local"]


def test_what_was_kept_from_forward_is_sent_where_its_readers_module_begins() -> None:
    made = Made()
    kept = made.call(aten.relu.default, made.given("x"), name="kept")
    for name, module in (("a", "one.up"), ("b", "one.down"), ("c", "one.down")):
        made.call(aten.sin.default, kept, name=name, module=module, phase="backward")
    send_early(WORDS, [made.sent(kept, "sent", module="one.down", phase="backward")])
    assert made.order() == ["kept", "a", "sent_view", "sent", "b", "c", "sent_wait"]


def _program(graph: fx.Graph) -> Any:
    return SimpleNamespace(graph=fx.GraphModule(torch.nn.Module(), graph))


def test_the_ledger_counts_full_buffers_and_what_goes_together() -> None:
    """Of a gather what it makes, of a reduction what it is given; bytes of fp32 and bf16."""
    made = Made()
    x, y = made.given("x"), made.given("y")
    y.meta["val"] = torch.empty(6, dtype=torch.bfloat16, device="meta")
    both = made.call(c10d.all_gather_into_tensor_coalesced.default, [x, y], 2, "dp", name="both", phase="backward")
    both.meta["val"] = [torch.empty(8, 2, device="meta"), torch.empty(12, dtype=torch.bfloat16, device="meta")]
    total = made.call(c10d.all_reduce.default, x, "sum", "dp,tp", name="total")
    total.meta["packed"] = 3
    scattered = made.call(c10d.reduce_scatter_tensor.default, x, "avg", 2, "tp", name="scattered")
    scattered.meta["val"] = torch.empty(2, 2, device="meta")
    made.call(c10d.all_to_all_single.default, x, [2, 2], [2, 2], "tp", name="swapped")
    made.graph.output((made.call(WAIT, total, name="waited"),))
    program = _program(made.graph)
    assert ledger(program) == (
        Issued("all_gather", "dp", 64 + 24, "backward", "", "one.up", "both", "", 2),
        Issued("all_reduce", "dp,tp", 32, "forward", "", "one.up", "total", "sum", 3),
        Issued("reduce_scatter", "tp", 32, "forward", "", "one.up", "scattered", "avg", 1),
        Issued("all_to_all", "tp", 32, "forward", "", "one.up", "swapped", "", 1),
    )
    assert groups_used(program.graph) == ("dp", "dp,tp", "tp")
    bind_groups(program.graph, {"dp": "7", "dp,tp": "8", "tp": "9"})
    assert [issued.group for issued in ledger(program)] == ["7", "8", "9", "9"]
