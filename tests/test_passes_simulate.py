from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from passes.parity.scattered import ReplicaMismatchError, SimulationError, coordinates, gather, groups, scatter
from passes.parity.simulate import simulate, simulate_step
from passes.program.local import DimShard, LocalInput, LocalOutput, LocalProgram, Storage, bind_groups
from passes.program.program import Input, Output, Program
from passes.rewrite.ledger import ledger

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
WAIT = c10d.wait_tensor.default
MESH = (("dp", 2), ("tp", 2))
CUBE = (("a", 2), ("b", 2), ("c", 3))


class Builder:
    """Makes a local graph by hand; every node has its fake value, phase, module and source."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(f"in_{len(self.graph.nodes)}")
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def __call__(self, target: Any, *args: Any, phase: str = "forward", **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*given[0], **given[1])
        node.meta |= {"phase": phase, "module": "block.mlp", "source": "model.py:3"}
        return node

    def collective(self, target: Any, *args: Any, phase: str = "forward") -> fx.Node:
        return self(WAIT, self(target, *args, phase=phase), phase=phase)

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return fx.GraphModule({}, self.graph)


def program_of(
    module: fx.GraphModule,
    axes: tuple[tuple[str, int], ...],
    inputs: Sequence[LocalInput] = (),
    outputs: Sequence[LocalOutput] = (),
    batch_dims: dict[str, int] | None = None,
) -> LocalProgram:
    kinds = ("parameter", "buffer", "input", "tangent")
    known = tuple(
        Input(i.kind, i.name, batch_dim=(batch_dims or {}).get(i.name)) for i in inputs if i.kind in kinds  # type: ignore[arg-type]
    )  # fmt: skip
    results = tuple(Output(o.kind, o.name) for o in outputs)
    return LocalProgram(
        module, tuple(inputs), tuple(outputs), axes, Program(module, known, results, None, {}, None, {})
    )


def values(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank))


# -------------------------------------------------------------------------------------------------- groups and ranks
def test_groups_of_a_cube() -> None:
    assert coordinates(CUBE)[:4] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)]
    assert groups(CUBE, "c") == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert groups(CUBE, "a") == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    assert groups(CUBE, "a,c") == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert groups(CUBE, "a,b,c") == [list(range(12))]


@pytest.mark.parametrize("name", ["x", "c,a", "a,a", ""])
def test_a_group_that_no_axes_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="named by axes of the mesh"):
        groups(CUBE, name)


# -------------------------------------------------------------------------------------------------------- collectives
def collectives_graph(groups_used: Sequence[tuple[str, int]]) -> fx.GraphModule:
    """Every collective over each group, of an input of 24 rows; results feed ordinary ops."""
    build = Builder()
    x = build.input(24, 2)
    results = []
    for group, ranks in groups_used:
        results.append(build.collective(c10d.all_gather_into_tensor.default, x, ranks, group))
        for op in ("sum", "max", "min", "avg"):
            results.append(build.collective(c10d.all_reduce.default, x, op, group))
        results.append(build.collective(c10d.reduce_scatter_tensor.default, x, "sum", ranks, group))
        rows = [24 // ranks] * ranks
        results.append(build.collective(c10d.all_to_all_single.default, x, rows, rows, group))
        results.append(build(aten.mul.Tensor, results[-1], 2.0))
    return build.module(*results)


@pytest.mark.parametrize(("axes", "group"), [(MESH, "dp"), (MESH, "tp"), (MESH, "dp,tp"), (CUBE, "b"), (CUBE, "a,c")])
def test_collectives_are_the_arithmetic_they_stand_for(axes: tuple[tuple[str, int], ...], group: str) -> None:
    members = groups(axes, group)
    ranks = len(members[0])
    x = [values(rank, 24, 2) for rank in range(len(coordinates(axes)))]
    results = simulate(program_of(collectives_graph([(group, ranks)]), axes), [[one] for one in x])
    for ids in members:
        for position, rank in enumerate(ids):
            gathered, total, most, least, mean, scattered, swapped, doubled = results[rank]
            rows = 24 // ranks
            mine = slice(position * rows, (position + 1) * rows)
            assert torch.equal(gathered, torch.cat([x[i] for i in ids]))
            by_hand = x[ids[0]].clone()
            for i in ids[1:]:
                by_hand += x[i]
            assert torch.allclose(total, by_hand, atol=1e-6)
            assert torch.allclose(mean, by_hand / ranks, atol=1e-6)
            assert torch.allclose(scattered, by_hand[mine], atol=1e-6)
            for row in range(24):
                for column in range(2):
                    several = [float(x[i][row, column]) for i in ids]
                    assert float(most[row, column]) == max(several)
                    assert float(least[row, column]) == min(several)
            assert torch.equal(swapped, torch.cat([x[i][mine] for i in ids]))
            assert torch.equal(doubled, 2 * swapped)


def test_a_tensor_may_be_sent_twice_together() -> None:
    build = Builder()
    x, y = build.input(2), build.input(3)
    sent = build(c10d.all_gather_into_tensor_coalesced.default, [x, y, x], 2, "tp")
    module = build.module(*(build(operator.getitem, sent, place) for place in range(3)))
    given = [[values(rank, 2), values(10 + rank, 3)] for rank in range(2)]
    (found, other) = simulate(program_of(module, (("tp", 2),)), given)
    wanted = [torch.cat([mine[place] for mine in given]) for place in (0, 1, 0)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(wanted, found, other, strict=True))


def test_all_to_all_whose_rows_do_not_fit_is_refused() -> None:
    """Each rank would send one row to rank 0 and two to rank 1, which expects one from each."""
    build = Builder()
    x = build.input(3, 1)
    module = build.module(build.collective(c10d.all_to_all_single.default, x, [1, 1], [1, 2], "tp"))
    with pytest.raises(SimulationError, match=r"rows \[2, 2\] arrive, but \[1, 1\] are expected"):
        simulate(program_of(module, (("tp", 2),)), [[torch.zeros(3, 1)], [torch.zeros(3, 1)]])


def _on_real_ranks(rank: int, ranks: int) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    names = {"dp": mesh.get_group("dp").group_name, "tp": mesh.get_group("tp").group_name}
    names["dp,tp"] = dist.group.WORLD.group_name  # type: ignore[union-attr]
    module = bind_groups(collectives_graph(ALL_GROUPS), names)
    results = [tensor.clone() for tensor in module(values(rank, 24, 2))]
    placed = []
    for shape, placements in PLACED:
        tensor = distribute_tensor(values(0, *shape), mesh, placements, src_data_rank=None)
        placed.append(tensor.to_local().clone())
    return results, placed


ALL_GROUPS = [("tp", 2), ("dp", 2), ("dp,tp", 4)]
PLACED = [
    ((9, 3), (Shard(0), Shard(0))),
    ((3, 2), (Shard(0), Shard(0))),
    ((5, 4), (Shard(0), Shard(1))),
    ((5, 4), (Shard(0), Replicate())),
    ((8, 4), (Replicate(), Shard(1))),
    ((10, 3), (_StridedShard(0, split_factor=2), Shard(0))),
    ((12, 3), (Replicate(), _StridedShard(0, split_factor=3))),
]
STORED = [
    Storage((9, 3), (None, None), (0, 1)),
    Storage((3, 2), (None, None), (0, 1)),
    Storage((5, 4), (None, DimShard(1)), (0,)),
    Storage((5, 4), (None, None), (0,)),
    Storage((8, 4), (None, DimShard(1))),
    Storage((10, 3), (None, DimShard(0)), (0,)),
    Storage((12, 3), (None, DimShard(0, 3))),
]


def test_real_ranks_give_the_same() -> None:
    """Four gloo processes run the same graph; and hold DTensors as `scatter` deals them out."""
    real = run_ranks(_on_real_ranks, 4)
    played = simulate(program_of(collectives_graph(ALL_GROUPS), MESH), [[values(rank, 24, 2)] for rank in range(4)])
    parts = [scatter(values(0, *storage.shape), storage, MESH) for storage in STORED]
    for rank in range(4):
        results, placed = real[rank]
        assert len(results) == len(played[rank]) == 24
        for got, expected in zip(played[rank], results, strict=True):
            assert torch.allclose(got, expected, atol=1e-6)
        for mine, expected in zip(parts, placed, strict=True):
            assert torch.equal(mine[rank][: expected.shape[0]], expected)
            assert mine[rank][expected.shape[0] :].count_nonzero() == 0


# ---------------------------------------------------------------------------------------------------- scatter, gather
def test_a_strided_shard_takes_a_part_of_each_block() -> None:
    """Three blocks of four rows (a fused QKV weight): each rank gets two rows of each."""
    full = torch.arange(12)
    parts = scatter(full, Storage((12,), (None, DimShard(0, 3))), MESH)
    assert [part.tolist() for part in parts] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]] * 2


def test_two_axes_split_one_dim_the_earlier_first() -> None:
    parts = scatter(torch.arange(8), Storage((8,), (DimShard(0), DimShard(0))), MESH)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    parts = scatter(torch.arange(8), Storage((8,), (DimShard(0, 2), DimShard(0, 2))), MESH)
    assert [part.tolist() for part in parts] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_state_axes_split_what_the_shards_leave() -> None:
    """tp takes columns or halves first; dp stores that part in chunks."""
    full = torch.arange(8)
    parts = scatter(full, Storage((8,), (None, DimShard(0)), (0,)), MESH)
    assert [part.tolist() for part in parts] == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_uneven_chunks_are_padded_and_may_be_empty() -> None:
    full = torch.arange(1, 6).float()
    axes = (("dp", 4),)
    parts = scatter(full, Storage((5,), (None,), (0,)), axes)
    assert [part.tolist() for part in parts] == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_replicas_are_one_object() -> None:
    parts = scatter(torch.arange(8), Storage((8,), (DimShard(0), None)), MESH)
    assert parts[0] is parts[1]
    assert parts[0] is not parts[2]


SHARDS = [None, DimShard(0), DimShard(1), DimShard(0, 3)]


@pytest.mark.parametrize("first", SHARDS)
@pytest.mark.parametrize("second", SHARDS)
@pytest.mark.parametrize("state_axes", [(), (0,), (1,), (0, 1)])
def test_gather_undoes_scatter(first: DimShard | None, second: DimShard | None, state_axes: tuple[int, ...]) -> None:
    axes = (("dp", 2), ("tp", 4))
    shards = tuple(None if axis in state_axes else shard for axis, shard in enumerate((first, second)))
    storage = Storage((48, 8, 3), shards, state_axes)
    full = values(1, 48, 8, 3)
    parts = scatter(full, storage, axes)
    assert all(part.is_contiguous() and tuple(part.shape) == storage.padded_shape([2, 4]) for part in parts)
    assert torch.equal(gather(parts, storage, axes), full)
    rows = Storage((7, 8), tuple(s if s and s.dim == 1 else None for s in shards), state_axes)
    full = values(2, 7, 8)
    assert torch.equal(gather(scatter(full, rows, axes), rows, axes), full)


def test_scalars_go_through() -> None:
    storage = Storage((), (None, None))
    assert gather(scatter(torch.tensor(3.0), storage, MESH), storage, MESH) == 3


def test_gather_finds_replicas_that_differ() -> None:
    storage = Storage((4, 2), (DimShard(0), None))
    parts = [part.clone() for part in scatter(values(0, 4, 2), storage, MESH)]
    assert torch.equal(gather(parts, storage, MESH), values(0, 4, 2))
    parts[3][1, 0] += 0.5
    with pytest.raises(
        ReplicaMismatchError, match=r"^w: ranks 2 and 3 .*1 of 4 elements differ; the first at \[1, 0\]"
    ):
        gather(parts, storage, MESH, "w")


def test_gather_takes_nan_as_equal_to_itself_only() -> None:
    storage = Storage((2,), (None,))
    axes = (("tp", 2),)
    gather([torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])], storage, axes)
    with pytest.raises(ReplicaMismatchError):
        gather([torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])], storage, axes)


def test_gather_refuses_bad_parts() -> None:
    storage = Storage((3,), (None,), (0,))
    axes = (("dp", 2),)
    with pytest.raises(SimulationError, match="padding is not zero"):
        gather([torch.ones(2), torch.ones(2)], storage, axes)
    with pytest.raises(SimulationError, match=r"rank 1 holds shape \(1,\)"):
        gather([torch.ones(2), torch.ones(1)], storage, axes)
    with pytest.raises(ValueError, match="was given for"):
        scatter(torch.ones(4), storage, axes)


# ---------------------------------------------------------------------------------------------------------- simulate
def test_values_are_freed_after_their_last_use() -> None:
    build = Builder()
    node = build.input(2)
    for _ in range(20):
        node = build(aten.add.Tensor, node, 1.0)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def observe(_: fx.Node, each: list[Any]) -> None:
        nonlocal most
        alive.extend(weakref.ref(value) for value in each)
        most = max(most, sum(ref() is not None for ref in alive))

    axes = (("tp", 2),)
    results = simulate(program_of(build.module(node), axes), [[torch.zeros(2)], [torch.ones(2)]], observe)
    assert [mine[0].tolist() for mine in results] == [[20, 20], [21, 21]]
    assert len(alive) == 40
    assert most <= 4


def test_equal_work_is_done_once() -> None:
    build = Builder()
    x = build.input(2)
    module = build.module(build(aten.add.Tensor, x, 1.0))
    shared, other = torch.zeros(2), torch.zeros(2)
    results = simulate(program_of(module, MESH), [[shared], [shared], [other], [shared]])
    assert results[0][0] is results[1][0]
    assert results[0][0] is results[3][0]
    assert results[0][0] is not results[2][0]


def test_ops_with_several_results_lists_constants_and_keywords() -> None:
    build = Builder()
    x = build.input(2, 4)
    pair = build(aten.topk.default, x, 2, dim=1)
    best, where = build(operator.getitem, pair, 0), build(operator.getitem, pair, 1)
    joined = build(aten.cat.default, [best, x], 1)
    constant = build.graph.get_attr("table")
    constant.meta["val"] = None
    scaled = build.graph.call_function(aten.mul.Tensor, (joined, constant))
    build.graph.output((scaled, where))
    module = fx.GraphModule({"table": torch.full((6,), 2.0)}, build.graph)
    rows = torch.tensor([[1.0, 4.0, 2.0, 3.0], [8.0, 5.0, 6.0, 7.0]])
    ((got, found),) = simulate(program_of(module, (("tp", 1),)), [[rows]])
    assert got.tolist() == [[8, 6, 2, 8, 4, 6], [16, 14, 16, 10, 12, 14]]
    assert found.tolist() == [[1, 3], [0, 3]]


def failing(target: Any, *args: Any) -> fx.GraphModule:
    build = Builder()
    x = build.input(2, 2)
    node = build.graph.call_function(target, (x, *args))
    node.meta |= {"source": "model.py:3"}
    return build.module(node)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (aten.view.default, ([3],), r"view.* \(model\.py:3\): RuntimeError"),
        (aten.add_.Tensor, (1.0,), "writes to its operands"),
        (c10d.broadcast.default, (0, "tp"), "is none of"),
        (c10d.all_reduce.default, ("product", "tp"), "known are sum, avg, max, min"),
        (c10d.all_gather_into_tensor.default, (4, "tp"), "says its group has 4 ranks, but it has 2"),
        (c10d.all_reduce.default, ("sum", "ep"), "named by axes of the mesh"),
    ],
)
def test_what_a_node_does_wrong_is_said_with_its_place(target: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        simulate(program_of(failing(target, *args), (("tp", 2),)), [[torch.ones(2, 2)]] * 2)


def test_metadata_that_promises_another_shape_is_found() -> None:
    build = Builder()
    x = build.input(4, 2)
    node = build(aten.sum.dim_IntList, x, [0])
    with build.mode:
        node.meta["val"] = torch.empty(4)
    with pytest.raises(SimulationError, match=r"model\.py:3.*rank 0 has \(2,\).*says \(4,\)"):
        simulate(program_of(build.module(node), (("tp", 2),)), [[torch.ones(4, 2)]] * 2)


def test_inputs_must_fit_ranks_and_placeholders() -> None:
    build = Builder()
    module = build.module(build(aten.neg.default, build.input(2)))
    with pytest.raises(ValueError, match="2 ranks take 1 inputs each"):
        simulate(program_of(module, (("tp", 2),)), [[torch.ones(2)]])


# ------------------------------------------------------------------------------------------------------- a whole step
def linear_step(*, wrong: str = "") -> LocalProgram:
    """tanh(x @ w) with a mean loss: batch over dp, columns of w over tp, its 5 rows stored in chunks over dp.

    `wrong` leaves out a collective of the backward, or the offset of a rank.
    """
    build = Builder()
    w, x = build.input(3, 2), build.input(4, 5)
    loss_tangent, y_tangent = build.input(), build.input(4, 2)
    seed, dp, tp = build.input(2, dtype=torch.int64), build.input(dtype=torch.int64), build.input(dtype=torch.int64)
    gathered = build.collective(c10d.all_gather_into_tensor.default, w, 2, "dp")
    whole = build(aten.slice.Tensor, gathered, 0, 0, 5)
    y = build(aten.tanh.default, build(aten.mm.default, x, whole))
    part = build(aten.div.Tensor, build(aten.sum.default, y), 32.0)
    loss = build.collective(c10d.all_reduce.default, part, "sum", "dp" if wrong == "loss" else "dp,tp")
    # The average over the batch axis, for a tangent that has a batch dim.
    into_y = build(aten.add.Tensor, build(aten.div.Tensor, y_tangent, 2.0), build(aten.div.Tensor, loss_tangent, 32.0))
    into_y = build(aten.tanh_backward.default, into_y, y, phase="backward")
    into_w = build(aten.mm.default, build(aten.t.default, x), into_y, phase="backward")
    padded = build(aten.constant_pad_nd.default, into_w, [0, 0, 0, 1], phase="backward")
    gradient = build.collective(c10d.reduce_scatter_tensor.default, padded, "sum", 2, "dp", phase="backward")
    place = build(aten.add.Tensor, build(aten.mul.Tensor, dp, 10), tp)
    place = build(aten.view.default, build(aten.add.Tensor, place, build(aten.sum.default, seed)), [1, 1])
    whole_axes = (None, None)
    columns = Storage((5, 4), (None, DimShard(1)), (0,))
    logits = Storage((8, 4), (DimShard(0), DimShard(1)))
    return program_of(
        build.module(loss, y, gradient, place),
        MESH,
        [
            LocalInput("parameter", "w", columns),
            LocalInput("input", "x", Storage((8, 5), (DimShard(0), None))),
            LocalInput("tangent", "loss", Storage((), whole_axes)),
            LocalInput("tangent", "y", logits),
            LocalInput("seed", "seed", Storage((2,), whole_axes)),
            LocalInput("coordinate", "dp", Storage((), whole_axes)),
            LocalInput("coordinate", "tp", Storage((), whole_axes)),
        ],
        [
            LocalOutput("output", "loss", Storage((), whole_axes)),
            LocalOutput("output", "y", logits),
            LocalOutput("gradient", "w", columns),
            LocalOutput("buffer", "place", Storage((2, 2), (DimShard(0), DimShard(1)))),
        ],
        {"x": 0, "y": 0},
    )


def test_a_step_equals_autograd_on_the_full_tensors() -> None:
    w, x, tangent = values(1, 5, 4).requires_grad_(), values(2, 8, 5), values(3, 8, 4)
    got = simulate_step(linear_step(), {"w": w}, {}, [x], [torch.tensor(3.0), tangent], seed=(100, 7))
    y = (x @ w).tanh()
    loss = y.mean()
    (gradient,) = torch.autograd.grad([loss, y], w, [torch.tensor(3.0), tangent])
    assert torch.allclose(got.outputs["loss"], loss)
    assert torch.allclose(got.outputs["y"], y)
    assert torch.allclose(got.gradients["w"], gradient, atol=1e-6)
    assert list(got.outputs) == ["loss", "y"]
    assert got.buffers["place"].tolist() == [[107, 108], [117, 118]]


def test_a_missing_collective_is_found_where_replicas_part() -> None:
    arguments: Any = ({"w": values(1, 5, 4)}, {}, [values(2, 8, 5)], [torch.tensor(1.0), torch.zeros(8, 4)])
    simulate_step(linear_step(), *arguments)
    with pytest.raises(
        ReplicaMismatchError, match=r"output loss \(node wait_tensor.* \(model\.py:3\)\): ranks 0 and 1"
    ):
        simulate_step(linear_step(wrong="loss"), *arguments)


def test_a_step_says_what_it_lacks() -> None:
    x, tangents = values(2, 8, 5), [torch.tensor(1.0), torch.zeros(8, 4)]
    with pytest.raises(ValueError, match="parameter w was not given"):
        simulate_step(linear_step(), {}, {}, [x], tangents)
    with pytest.raises(ValueError, match="has 1 inputs, 2 were given"):
        simulate_step(linear_step(), {"w": values(1, 5, 4)}, {}, [x, x], tangents)
    with pytest.raises(ValueError, match="tangent y has shape"):
        simulate_step(linear_step(), {"w": values(1, 5, 4)}, {}, [x])


# -------------------------------------------------------------------------------------------------------------- ledger
def test_ledger_lists_collectives_in_order() -> None:
    issued = ledger(linear_step())
    assert [(i.kind, i.group, i.full_bytes, i.phase, i.op) for i in issued] == [
        ("all_gather", "dp", 6 * 2 * 4, "forward", ""),
        ("all_reduce", "dp,tp", 4, "forward", "sum"),
        ("reduce_scatter", "dp", 6 * 2 * 4, "backward", "sum"),
    ]
    assert {(i.source, i.module) for i in issued} == {("model.py:3", "block.mlp")}
    swap = ledger(program_of(collectives_graph([("tp", 2)]), MESH))[-1]
    assert (swap.kind, swap.full_bytes) == ("all_to_all", 24 * 2 * 4)
