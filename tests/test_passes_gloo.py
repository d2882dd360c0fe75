"""Collectives rewritten for gloo, on real ranks, against sums by hand."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.lower.gloo import for_gloo, gloo_step
from passes.lower.outer import assembled, op_step
from passes.program.local import TOGETHER, WAIT

c10d = torch.ops._c10d_functional
SCATTER, REDUCE, GATHER = (
    c10d.reduce_scatter_tensor.default,
    c10d.all_reduce.default,
    c10d.all_gather_into_tensor.default,
)
SHAPES = ((8, 3), (4,), (12, 0), (4, 2, 5))
ROWS_OF_FOUR = ((8, 4), (4,), (4, 6), (4, 2, 2), (4, 4))


def _graph(collective: Any, shapes: Any, rest: tuple[Any, ...], dtype: torch.dtype) -> fx.GraphModule:
    """`collective` over inputs of `shapes`; of several as one."""
    graph = fx.Graph()
    mode = FakeTensorMode()

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda x: x.meta["val"]))
        return node

    inputs = []
    for index, shape in enumerate(shapes):
        inputs.append(graph.placeholder(f"x{index}"))
        with mode:
            inputs[-1].meta["val"] = torch.empty(shape, dtype=dtype)
    if len(shapes) == 1:
        results = [call(WAIT, call(collective, inputs[0], *rest))]
    else:
        made = call(TOGETHER[collective], inputs, *rest)
        items = [call(operator.getitem, made, index) for index in range(len(shapes))]
        results = [call(WAIT, item) for item in items]
    graph.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), graph)


def _runs_as_the_sum(rank: int, ranks: int) -> None:
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for shapes in (SHAPES, SHAPES[:1], ROWS_OF_FOUR):
        for op in ("sum", "avg"):
            everyone = []
            for r in range(ranks):
                torch.manual_seed(r)
                everyone.append([torch.randint(-9, 9, shape).float() for shape in shapes])
            whole = [torch.stack(xs).sum(0) / (ranks if op == "avg" else 1) for xs in zip(*everyone, strict=True)]
            for collective, rest in ((SCATTER, (op, ranks, group)), (REDUCE, (op, group))):
                if collective is REDUCE and op == "avg":
                    continue  # gloo has none
                gm = _graph(collective, shapes, rest, torch.float32)
                for_gloo(gm)
                assert not gm.graph.find_nodes(op="call_function", target=SCATTER)
                assert not gm.graph.find_nodes(op="call_function", target=TOGETHER[collective])
                mine = [x.clone() for x in everyone[rank]]
                nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
                inputs = list(gm.graph.find_nodes(op="placeholder"))
                outer = assembled(inputs, map(op_step, nodes), gm.graph.output_node().args[0], {})  # type: ignore[arg-type]
                for found, total, x, before in zip(outer(list(mine)), whole, mine, everyone[rank], strict=True):
                    rows = total.shape[0] // ranks
                    expected = total[rank * rows : (rank + 1) * rows] if collective is SCATTER else total
                    assert torch.equal(found, expected)
                    assert torch.equal(x, before)  # inputs stay as they were


def _brings_every_part(rank: int, ranks: int) -> None:
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        for shapes in (SHAPES, SHAPES[:1], SHAPES[2:3], ((2, 3), (1, 6), (1,))):
            everyone = []
            for r in range(ranks):
                torch.manual_seed(r)
                everyone.append([torch.randint(0, 9, shape).to(dtype) for shape in shapes])
            gm = _graph(GATHER, shapes, (ranks, group), dtype)
            nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
            steps = [step for node in nodes if (step := gloo_step(node)) is not None]
            inputs = list(gm.graph.find_nodes(op="placeholder"))
            outer = assembled(inputs, steps, gm.graph.output_node().args[0], {})  # type: ignore[arg-type]
            for found, parts in zip(outer(list(everyone[rank])), zip(*everyone, strict=True), strict=True):
                assert torch.equal(found, torch.cat(parts))
                assert found.is_contiguous()


@pytest.mark.timeout(120)
def test_rewritten_collectives_give_every_ranks_sum_and_part() -> None:
    run_ranks(_on_ranks, 4, timeout_s=100)


def _on_ranks(rank: int, ranks: int) -> None:
    _runs_as_the_sum(rank, ranks)
    _brings_every_part(rank, ranks)


def test_one_exchange_of_the_same_bytes_takes_a_lists_place() -> None:
    gm = _graph(SCATTER, SHAPES, ("sum", 4, "dp"), torch.bfloat16)
    for_gloo(gm)
    (moved,) = gm.graph.find_nodes(op="call_function", target=c10d.all_to_all_single.default)
    assert moved.args[0].meta["val"].numel() == sum(torch.Size(shape).numel() for shape in SHAPES)
    assert moved.args[0].meta["val"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float16])
@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES])
def test_a_scattered_sum_keeps_its_dtype(dtype: torch.dtype, shapes: Any) -> None:
    """torch adds bools and short integers up in int64, where compiled code reads what capture saw."""
    gm = _graph(SCATTER, shapes, ("sum", 4, "dp"), dtype)
    for_gloo(gm)
    assert {node.meta["val"].dtype for node in gm.graph.output_node().all_input_nodes} == {dtype}


def test_what_is_reduced_together_lies_in_one_table_with_most_of_it_as_it_was() -> None:
    """Six columns would hold (4, 6) alone, and not (4,)."""
    gm = _graph(REDUCE, ROWS_OF_FOUR, ("sum", "dp"), torch.float32)
    for_gloo(gm)
    (table,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert table.meta["val"].shape == (8 + 1 + 6 + 4 + 4, 4)
    assert [part.name for part in table.args[0] if part.op == "placeholder"] == ["x0", "x4"]


def test_gathers_and_maxima_stay() -> None:
    for collective, rest in ((GATHER, (4, "dp")), (SCATTER, ("max", 4, "dp"))):
        gm = _graph(collective, SHAPES, rest, torch.float32)
        before = str(gm.graph)
        for_gloo(gm)
        assert str(gm.graph) == before
