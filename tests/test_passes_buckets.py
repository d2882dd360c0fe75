"""What goes together, and where it stands, of steps made by hand."""

from __future__ import annotations

import operator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from costmodel.layout import Partial, Replicate
from costmodel.reshard import Step
from passes.analysis.buckets import Gradients, bucketed, layer_labels
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption
from passes.program.program import Input, InputKind, Output, OutputKind, Program

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
    steps = (_step("all_reduce", "sum"), _step("all_to_all"))
    for path in ((steps[0], steps[0]), (steps[1],), (replace(steps[0], ranks=1),)):
        for name in ("one", "two"):
            items.append(Move(_node(graph, name, ""), SUM, WHOLE, path, "forward", "", reader))
    none = len(items)
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
    assert [bucket for _, bucket in _told(found)] == [-1] * none + [0, 0, -1, -1, -1, -1]
    assert [(i.value.name, i.packed) for i in found[none:] if isinstance(i, Move)] == [
        ("loss", True), ("count", True), ("most", False), ("large", False), ("other", False), ("half", False)
    ]  # fmt: skip


def _called(graph: fx.Graph, name: str, target: Any, *operands: fx.Node, module: str = "") -> fx.Node:
    node = graph.create_node("call_function", target, operands, name=name)
    node.meta.update(module=module, val=torch.empty(4, device="meta"))
    return node


def test_what_leads_to_one_gradient_and_to_nothing_else() -> None:
    graph, aten = fx.Graph(), torch.ops.aten
    kinds: dict[str, InputKind] = {**dict.fromkeys("abcde", "parameter"), "h": "buffer", "x": "input"}
    a, b, c, d, e, h, x = (_node(graph, name, "") for name in kinds)
    product = _called(graph, "product", aten.mm.default, x, a)
    turned = _called(graph, "turned", aten.t.default, product)
    read = _called(graph, "read", aten.mm.default, x, b)
    norm = _called(graph, "norm", aten.neg.default, read)
    alone = _called(graph, "alone", aten.mm.default, x, c)
    squared = _called(graph, "squared", aten.mul.Tensor, alone, alone)
    pair = _called(graph, "pair", aten.split.Tensor, d)
    half = _called(graph, "half", operator.getitem, pair)
    half.args = pair, 0
    one = _called(graph, "one", aten.mm.default, x, e)
    both = _called(graph, "both", aten.add.Tensor, one, norm)
    new, of_x = _called(graph, "new", aten.neg.default, h), _called(graph, "of_x", aten.neg.default, x)
    changed, made = _called(graph, "changed", aten.neg.default, b), _called(graph, "made", aten.full.default)
    outputs = {turned: "a", read: "b", squared: "c", half: "d", both: "e", of_x: "x"}
    graph.output([*outputs, new, changed, norm, made])
    told: list[tuple[OutputKind, str]] = [("gradient", of) for of in outputs.values()]
    told += [("buffer", "h"), ("buffer", "b"), *[("output", "")] * 2]
    program = Program(
        graph=fx.GraphModule(torch.nn.Module(), graph),
        inputs=tuple(Input(kind, name) for name, kind in kinds.items()),
        outputs=tuple(Output(kind, name) for kind, name in told),
        out_spec=None,
        out_constants={},
    )
    gradients = Gradients(program)
    leads = {node.name: found.name for node in graph.nodes if node.op != "output" and (found := gradients.of(node))}
    assert leads == {
        "product": "turned", "turned": "turned", "alone": "squared", "squared": "squared", "half": "half",
        "both": "both",
    }  # fmt: skip
    runs = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.name for node in runs if gradients.is_late(_run(node, "backward"))] == ["turned", "squared"]

    def is_late(value: fx.Node, reader: fx.Node | None = None, *, stores: bool = False) -> bool:
        return gradients.is_late(Move(value, SUM, WHOLE, (), "backward", "", reader, stores))

    assert is_late(product, turned)
    assert is_late(turned, stores=True)
    assert not is_late(turned)
    assert not is_late(read, stores=True)
    assert not is_late(read, norm)


def test_what_is_done_to_gradients_goes_in_turn_ops_and_moves() -> None:
    """Behind their layer: ops on what is there, moves of all that is there then, ops on that, and its moves. What
    cannot go together goes alone."""
    graph, aten = fx.Graph(), torch.ops.aten
    x = _node(graph, "x", "")
    sums, shares = (_step("all_reduce", "sum"),), (_step("state_scatter", "sum"),)

    def move(value: fx.Node, path: tuple[Step, ...], reader: fx.Node | None = None) -> Move:
        return Move(value, SUM, STORED, path, "backward", "", reader, stores=True)

    p, q, s, u, v = (_called(graph, name, aten.mm.default, x, module="layers.1.up") for name in "pqsuv")
    pair = _called(graph, "pair", aten.split.Tensor, x, module="layers.1.up")
    half = _called(graph, "half", operator.getitem, pair, module="layers.0.up")
    tp = _called(graph, "tp", aten.t.default, p, module="layers.1.up")
    tq = _called(graph, "tq", aten.t.default, q, module="layers.0.up")
    end, low = _node(graph, "end", "layers.1.up"), _node(graph, "low", "layers.0.up")
    items: list[Run | Move] = [
        *(_run(node, "backward") for node in (p, q, s, u, v, pair)),
        move(q, sums, tq), _run(tp, "backward"), move(tp, sums), move(v, sums), move(tp, shares),
        _run(tq, "backward"), move(tq, shares), move(s, (*sums, _step("all_to_all"))), move(u, ()),
        _run(end, "backward"), _run(low, "backward"), move(half, sums),
    ]  # fmt: skip

    class Late(_Stored):
        def is_late(self, item: Run | Move) -> bool:
            return super().is_late(item) or (isinstance(item, Run) and item.node in (tp, tq))

    gradients: Any = Late()
    assert _told(bucketed(PROGRAM, items, gradients)) == [
        *((name, -2) for name in ("p", "q", "s", "u", "v", "pair", "end")),
        ("tp", -2), ("q", 0), ("tp", 0), ("v", 0), ("half", 0), ("s", -1), ("u", -1),
        ("tq", -2), ("tp", 1), ("tq", 1), ("low", -2),
    ]  # fmt: skip


def test_what_is_read_or_sent_another_way_stays_where_it_is() -> None:
    graph = fx.Graph()
    weight, op, first = (_node(graph, name, "layers.0.up") for name in ("w", "o", "first"))
    gather = (_step("state_gather"),)
    items: list[Run | Move] = [
        _run(first, "forward"),
        Move(weight, STORED, WHOLE, gather, "forward", "", None),
        Move(weight, STORED, WHOLE, (*gather, _step("all_to_all")), "forward", "", op),
        Move(weight, STORED, WHOLE, (*gather, *gather), "forward", "", op),
        Move(weight, STORED, WHOLE, (_step("state_slice"),), "forward", "", op),
        _run(op, "forward"),
    ]
    assert bucketed(PROGRAM, items, LATE) == items


def test_what_has_no_module_belongs_to_the_layer_around_it_in_its_phase() -> None:
    graph = fx.Graph()
    told = (
        ("forward", ""), ("forward", "layers.0.up"), ("forward", ""), ("forward", "norm"), ("forward", ""),
        ("forward", "layers.1.up"), ("forward", ""), ("backward", ""), ("backward", "layers.1.down"),
        ("backward", "layers.1.up"), ("backward", ""), ("backward", "layers.0.up"), ("backward", "embed"),
    )  # fmt: skip
    items: list[Run | Move] = [_run(_node(graph, "op", module), phase) for phase, module in told]
    items.append(Move(_node(graph, "w", "layers.0.up"), SUM, WHOLE, (), "backward", "", _node(graph, "r", "embed")))

    def grouped(program: Any) -> list[int]:
        labels = layer_labels(program, items)
        return [labels.index(label) for label in labels]

    assert grouped(PROGRAM) == [0, 1, 1, 3, 3, 5, 5, 7, 8, 8, 8, 11, 12, 12]
    flat = SimpleNamespace(
        inputs=[
            SimpleNamespace(name="up.weight", kind="parameter"),
            SimpleNamespace(name="layers.0.up.x", kind="input"),
            SimpleNamespace(name="layers.1.up.x", kind="input"),
        ]
    )
    assert grouped(flat) == [0, 1, 0, 3, 0, 5, 0, 7, 8, 9, 7, 11, 12, 12]
