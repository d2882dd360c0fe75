"""Graphs cut into regions: what is compiled once, the order between regions, and the numbers, against the simulator."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import pytest
import torch
from parity import captured, planned
from stacks import Stack
from torch import fx, nn

from passes.lower.lower import _interpreted, _Runner, lower
from passes.lower.overlap import arranged
from passes.lower.partition import split
from passes.lower.regions import Cut, Region, cut
from passes.parity.simulate import local_inputs, simulate
from passes.program.local import COLLECTIVES, WAIT, LocalInput, LocalInputKind, LocalOutput, LocalProgram, Storage

IDS = torch.arange(4 * 6).view(4, 6) % 16


def local_of(model: nn.Module, mesh: dict[str, int], strategy: str = "fsdp") -> LocalProgram:
    return planned(captured(model, {"ids": IDS}), mesh, strategy)[2]


def stepped(local: LocalProgram, model: nn.Module, **options: Any) -> tuple[list[Any], list[Any]]:
    """(what the simulator gives, what the lowered program gives) on the one rank of a mesh."""
    (values,) = local_inputs(local, dict(model.named_parameters()), {}, [IDS], None, (7, 3))
    (wanted,) = simulate(local, [values])
    lowered = lower(local, **options)
    given = [v for v, i in zip(values, local.inputs, strict=True) if i.kind != "tangent"]
    results, saved = lowered.forward(given)
    return wanted, [*results, *lowered.backward(saved, [torch.tensor(1.0)])]


@pytest.mark.parametrize("alternating", [False, True])
def test_regions_compute_what_the_whole_graph_does(alternating: bool) -> None:
    torch.manual_seed(0)
    model = Stack(4, dropout=0.5, alternating=alternating)
    wanted, found = stepped(local_of(model, {"dp": 1}), model, compile=False)
    torch.testing.assert_close(found, wanted)


def test_compiled_regions_compute_what_the_whole_graph_does() -> None:
    torch.manual_seed(0)
    model = Stack(3, dropout=0.5)
    wanted, found = stepped(local_of(model, {"dp": 1}), model, compile=True)
    torch.testing.assert_close(found, wanted)


class Spoken(nn.Module):
    """A connectionist loss: its state is as long as the longest target, which only values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = self.linear(x).tanh().log_softmax(-1).transpose(0, 1)
        lengths = (targets >= 0).sum(-1)
        return nn.functional.ctc_loss(scores, targets[targets >= 0], torch.full((2,), 8), lengths) * 2


def test_an_op_whose_shape_follows_from_values_runs_beside_what_is_compiled() -> None:
    torch.manual_seed(0)
    model = Spoken()
    x, targets = torch.randn(2, 8, 4), torch.tensor([[1, 2, 3], [1, 2, -1]])
    local = planned(captured(model, {"x": x, "targets": targets}), {"dp": 1}, "fsdp")[2]
    (values,) = local_inputs(local, dict(model.named_parameters()), {}, [x, targets], None, (7, 3))
    lowered = lower(local, compile=True)
    results, saved = lowered.forward([v for v, i in zip(values, local.inputs, strict=True) if i.kind != "tangent"])
    gradients = lowered.backward(saved, [torch.tensor(1.0)])
    loss = model(x, targets)
    loss.backward()
    torch.testing.assert_close(results[0], loss.detach())
    found = dict(zip([o.name for o in local.outputs if o.kind == "gradient"], gradients, strict=True))
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})
    assert lowered.bodies > 2  # what is before and behind the loss is compiled


@pytest.mark.parametrize(("alternating", "kinds"), [(False, 1), (True, 2)])
def test_what_is_compiled_does_not_grow_with_depth(alternating: bool, kinds: int) -> None:
    """Embedding and layers' start, each kind of layer, the head; the same again for backward, and ends that differ."""
    counts = [lower(local_of(Stack(depth, 0.5, alternating), {"dp": 4}), compile=False).bodies for depth in (5, 6, 9)]
    assert counts[0] == counts[1] == counts[2] <= 2 * (2 + kinds) + 2


def test_layers_drop_different_elements() -> None:
    """Blocks that only drop: what the first keeps, the second still drops from."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Dropout(0.5)) for _ in range(2))
            self.layers = nn.ModuleList(layers)
            for parameter in self.parameters():
                nn.init.ones_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            for layer in self.layers:
                x = layer(x)
            return {"x": x}

    model, x = Drops(), torch.ones(4096, 1)
    local = planned(captured(model, {"x": x}), {"dp": 1}, "ddp")[2]
    (values,) = local_inputs(local, dict(model.named_parameters()), {}, [x], [x], (1, 1))
    kept = simulate(local, [values])[0][0]
    share = float((kept != 0).float().mean())
    assert 0.2 < share < 0.3  # a quarter; a half where both layers draw one mask
    given = [v for v, i in zip(values, local.inputs, strict=True) if i.kind != "tangent"]
    torch.testing.assert_close(lower(local, compile=False).forward(given)[0][0], kept)


# --- the order --------------------------------------------------------------------------------------------------------


def cuts(depth: int) -> list[tuple[fx.GraphModule, Cut]]:
    """Forward and backward of a stack under FSDP on four ranks."""
    local = local_of(Stack(depth), {"dp": 4})
    halves = split(local)
    constant = {
        node.name
        for node, given in zip(local.graph.graph.find_nodes(op="placeholder"), local.inputs, strict=True)
        if given.kind in ("parameter", "buffer", "coordinate")
    }

    def layer_of(module: str) -> str:
        return ".".join(module.split(".")[:2]) if module.startswith("layers.") else ""

    found = []
    for gm, backward in ((halves.forward, False), (halves.backward, True)):
        assert gm is not None
        constants = [node for node in gm.graph.find_nodes(op="placeholder") if node.name in constant]
        found.append((gm, cut(gm, constants, layer_of, backward)))
    return found


def test_the_order_reads_nothing_before_it_is_there_and_leaves_nothing_out() -> None:
    for gm, parts in cuts(5):
        known = {node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")}
        ran: list[fx.Node] = []
        for part in arranged(parts):
            nodes = part.nodes if isinstance(part, Region) else (part,)
            inside = set(nodes)
            for node in nodes:
                assert all(operand in known or operand in inside for operand in node.all_input_nodes)
            known |= set(part.gives) if isinstance(part, Region) else inside
            ran += nodes
        results = gm.graph.output_node().all_input_nodes
        assert all(node in known for node in results)
        once = [node for node in gm.graph.nodes if node.target in COLLECTIVES or node.target is WAIT]
        assert all(ran.count(node) == 1 for node in once)


def test_gathers_are_issued_one_layer_ahead_and_reductions_waited_for_behind() -> None:
    for (_, parts), backward in zip(cuts(6), (False, True), strict=True):
        order = list(arranged(parts))
        at = {part: index for index, part in enumerate(order)}
        regions = [part for part in order if isinstance(part, Region)]
        layers = [r for r in regions if any(str(n.meta.get("module")).endswith(".down") for n in r.nodes)]
        assert len(layers) == 6
        for before, region in pairwise(layers):
            waits = {x for n in region.nodes for x in n.all_input_nodes if x.target is WAIT}
            assert waits
            for wait in waits:
                assert at[before] < at[wait] < at[region]
                (gather,) = wait.all_input_nodes
                previous = regions[regions.index(before) - 1]
                assert at[previous] < at[gather] < at[before]
        if backward:
            reductions = [n for n in parts.drains if n.target in COLLECTIVES]
            assert len(reductions) >= 6  # one per layer: weights, biases and the norm's together
            for reduction in reductions:
                (made,) = (r for r in regions if reduction.all_input_nodes[0] in r.gives)
                waits = {w for x in reduction.users for w in (x.users if x.target is operator.getitem else (x,))}
                later = regions[regions.index(made) + 1 :]
                assert at[made] < at[reduction]
                assert all(at[reduction] < at[region] for region in later)
                assert all(at[wait] > (at[later[0]] if later else at[reduction]) for wait in waits)


def test_a_gradient_whose_part_a_coordinate_picks_is_reduced_outside_of_regions_and_once() -> None:
    """All of it is added up, then each rank takes the rows it stores."""
    c10d, aten = torch.ops._c10d_functional, torch.ops.aten
    graph = fx.Graph()
    x, coordinate, weight = (graph.placeholder(name) for name in ("x", "coordinate", "weight"))
    x.meta["val"], coordinate.meta["val"] = torch.arange(8.0).view(4, 2), torch.tensor(1)
    weight.meta["val"] = torch.ones(2)

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        # Of one rank: what is reduced is what it was.
        given = fx.map_arg(args, lambda node: node.meta["val"])
        made.meta["val"] = given[0] if target in (WAIT, c10d.all_reduce.default) else target(*given)
        return made

    gradient = call(aten.mul.Tensor, x, 2.0)
    summed = call(WAIT, call(c10d.all_reduce.default, gradient, "sum", "dp"))
    rows = call(aten.view.default, summed, [2, 2, 2])
    graph.output((call(aten.index_select.default, rows, 0, call(aten.view.default, coordinate, [1])),))
    gm = fx.GraphModule(nn.Module(), graph)
    parts = cut(gm, [coordinate], lambda _: "", True)
    assert [region.nodes for region in parts.regions] == [(gradient,)]
    kinds: dict[str, LocalInputKind] = {"x": "tangent", "dp": "coordinate", "weight": "parameter"}
    inputs = tuple(LocalInput(kind, name, Storage((), (None,))) for name, kind in kinds.items())
    outputs = (LocalOutput("gradient", "weight", Storage((), (None,))),)
    local = LocalProgram(gm, inputs, outputs, (("dp", 1),), None)  # type: ignore[arg-type]
    made = _Runner(local, torch.device("cpu"), _interpreted).apart(gm)
    assert (made.gradients, made.partial) == (1, 1)
    held, partial, place = made.first([x.meta["val"], coordinate.meta["val"], torch.ones(2)])
    assert held is None
    assert torch.equal(partial, 2 * x.meta["val"])
    assert torch.equal(place, coordinate.meta["val"])
