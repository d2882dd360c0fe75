"""Bisection names the node at which a local program was broken on purpose, and nothing where it was not."""

from __future__ import annotations

import copy
import random
from functools import lru_cache

import pytest
import torch
from parity import captured, planned
from small_models import build
from torch import fx

from passes.parity.bisect import Divergence, difference, first_divergence
from passes.parity.simulate import local_inputs
from passes.program.local import WAIT, LocalProgram

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
AXES = {"dp": 2, "tp": 2}


@lru_cache
def step(name: str, strategy: str) -> tuple[LocalProgram, list[list[torch.Tensor]], list[torch.Tensor]]:
    """A local program, what each rank's placeholders get, and what the program's get."""
    model, args, kwargs = build(name)
    _, _, local = planned(captured(model, kwargs, args), AXES, strategy)
    random = torch.Generator().manual_seed(0)
    # Biases start at zero, where no scaling would show.
    parameters = {n: p.detach() + 0.02 * torch.randn(p.shape, generator=random) for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    inputs = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    whole, tangents, left = [], [], iter(inputs)
    for node, given in zip(local.program.graph.graph.find_nodes(op="placeholder"), local.program.inputs, strict=True):
        if given.kind in ("parameter", "buffer"):
            whole.append((parameters | buffers)[given.name])
        elif given.kind == "input":
            whole.append(next(left))
        else:
            whole.append(torch.randn(node.meta["val"].shape, generator=random))
            tangents.append(whole[-1])
    return local, local_inputs(local, parameters, buffers, inputs, tangents, (0, 0)), whole


def broken(local: LocalProgram) -> tuple[LocalProgram, fx.Graph]:
    """A copy to break."""
    graph = copy.deepcopy(local.graph)
    for mine, old in zip(graph.graph.nodes, local.graph.graph.nodes, strict=True):
        mine.meta = dict(old.meta)
    return LocalProgram(graph, local.inputs, local.outputs, local.axes, local.program), graph.graph


def search(name: str, strategy: str, local: LocalProgram) -> Divergence | None:
    _, per_rank, whole = step(name, strategy)
    return first_divergence(local, per_rank, whole, 1e-4)


def parts(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that hold a part of a floating-point value."""
    return [n for n in graph.nodes if "part_of" in n.meta and n.meta["val"].dtype.is_floating_point]


@pytest.mark.parametrize("strategy", ["megatron", "fsdp"])
@pytest.mark.parametrize("name", ["llama", "plain", "hand"])
def test_a_right_program_has_no_divergence(name: str, strategy: str) -> None:
    assert search(name, strategy, step(name, strategy)[0]) is None


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("name", ["llama", "plain"])
def test_a_scaled_value_is_found_wherever_it_is(name: str, seed: int) -> None:
    local, graph = broken(step(name, "megatron")[0])
    node = random.Random(seed).choice(parts(graph))
    wanted = node.meta["part_of"][0]
    with graph.inserting_after(node):
        scaled = graph.call_function(aten.mul.Tensor, (node, 1.5))
    scaled.meta = dict(node.meta)
    del node.meta["part_of"]
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    local.graph.recompile()
    found = search(name, "megatron", local)
    assert found is not None
    assert found.node == wanted
    assert found.error == pytest.approx(0.5, rel=1e-3)


def test_a_dropped_reduction_is_found_with_its_module_and_line() -> None:
    local, graph = broken(step("llama", "megatron")[0])
    waits = [n for n in parts(graph) if n.target == WAIT and n.args[0].target == c10d.all_reduce.default]
    wait = next(n for n in waits if n.meta["source"])
    wanted, place = wait.meta["part_of"][0], (wait.meta["module"], wait.meta["source"])
    wait.target, wait.args = aten.alias.default, (wait.args[0].args[0],)
    local.graph.recompile()
    found = search("llama", "megatron", local)
    assert found is not None
    assert found.node == wanted
    assert found.how in ("move", "replicas")
    assert (found.module, found.source) == place
    assert found.source in str(found)


def test_a_gradient_that_is_not_added_over_ranks_is_found_at_the_output() -> None:
    """Stored gradients go from partial sums to chunks in one reduce-scatter: only the output shows what it did."""
    local, graph = broken(step("llama", "fsdp")[0])
    results = [n for n in graph.output_node().args[0] if n.target == WAIT]
    scatter = next(n.args[0] for n in results if n.args[0].target == c10d.reduce_scatter_tensor.default)
    scatter.args = (scatter.args[0], "max", *scatter.args[2:])
    local.graph.recompile()
    found = search("llama", "fsdp", local)
    assert found is not None
    assert found.how == "output"
    assert "gradient" in found.detail


def test_a_slice_of_the_wrong_part_is_found() -> None:
    """A rank that takes its neighbour's part."""
    local, graph = broken(step("llama", "megatron")[0])
    picks = [n for n in graph.nodes if n.target == aten.index_select.default and n.meta["val"].dtype.is_floating_point]
    assert picks
    pick = picks[0]
    with graph.inserting_before(pick):
        rank = graph.call_function(aten.rsub.Scalar, (pick.args[2], 1))
    rank.meta = dict(pick.args[2].meta)
    pick.args = (pick.args[0], pick.args[1], rank)
    local.graph.recompile()
    found = search("llama", "megatron", local)
    assert found is not None
    after = pick
    while "part_of" not in after.meta:
        (after,) = after.users
    assert found.node == after.meta["part_of"][0]


def test_an_op_that_cannot_run_is_named() -> None:
    local, graph = broken(step("plain", "megatron")[0])
    product = graph.find_nodes(op="call_function", target=aten.mm.default)[3]
    product.args = (product.args[1], product.args[1])
    local.graph.recompile()
    found = search("plain", "megatron", local)
    assert found is not None
    assert found.how == "crash"
    assert found.node == product.name


def test_equal_infinities_are_no_difference() -> None:
    mask = torch.tensor([0.0, float("-inf")])
    assert difference(mask, mask.clone()) == 0
    assert difference(torch.zeros(2), mask) == float("inf")
    assert difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
