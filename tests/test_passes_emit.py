"""Every reshard that the planner can ask for, emitted and played on all ranks, gives the layout it says."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from costmodel.hardware import topology
from costmodel.layout import Layout, Partial, Replicate, Shard, layout_text, local_shape
from costmodel.presets import hardware
from costmodel.reshard import steps
from costmodel.state import chunks, state_gather, state_scatter
from passes.parity.simulate import simulate
from passes.program.emit import Emitter
from passes.program.local import LocalInput, LocalOutput, LocalProgram, Storage
from passes.program.program import Program
from passes.rewrite.emit_steps import emit_steps

MESHES = [{"a": 2}, {"a": 1, "b": 2}, {"a": 2, "b": 2}, {"a": 2, "b": 3}, {"a": 2, "b": 2, "c": 2}]
DIMS = ((4, 6), (12,), (1,), (6,))
"""A tensor of shape (24, 12, 1, 6) whose dim 0 is a product of two atoms."""


def parts_of(full: torch.Tensor, layout: Layout, mesh: dict[str, int]) -> list[torch.Tensor]:
    """Each rank's part of `full` (expanded shape), a partial sum given as random terms; written with plain slicing."""
    sizes = list(mesh.values())
    torch.manual_seed(1)
    terms = {}
    found = []
    for rank in itertools.product(*map(range, sizes)):
        part = full
        for axis, placement in enumerate(layout):
            if isinstance(placement, Shard):
                part = part.chunk(sizes[axis], placement.dim)[rank[axis]]
        summed = [axis for axis, placement in enumerate(layout) if isinstance(placement, Partial)]
        if summed:
            members = math.prod(sizes[axis] for axis in summed)
            held = tuple(0 if axis in summed else r for axis, r in enumerate(rank))
            if held not in terms:
                noise = torch.randint(-9, 9, (members, *part.shape)).to(full)
                noise[-1] = part - noise[:-1].sum(0)
                terms[held] = iter(noise)
            part = next(terms[held])
        found.append(part)
    return found


def play(build, shape: tuple[int, ...], parts: list[torch.Tensor], mesh: dict[str, int]) -> list[torch.Tensor]:
    """The outputs of a graph of one input on all ranks."""
    emit = Emitter(fx.Graph(), FakeTensorMode(), topology(hardware("h100"), mesh))
    x = emit.placeholder("x", shape, torch.float64)
    emit.coordinates = tuple(emit.placeholder(f"coordinate_{name}", (), torch.int64) for name in mesh)
    emit.graph.output((build(emit, x),))
    scalar = Storage((), (None,) * len(mesh))
    inputs = [LocalInput("input", "x", scalar), *(LocalInput("coordinate", name, scalar) for name in mesh)]
    graph = fx.GraphModule(torch.nn.Module(), emit.graph)
    program = Program(graph, (), (), None, {}, None, {})
    local = LocalProgram(graph, tuple(inputs), (LocalOutput("output", "y", scalar),), tuple(mesh.items()), program)
    ranks = itertools.product(*map(range, mesh.values()))
    values = [[part, *(torch.tensor(c) for c in rank)] for part, rank in zip(parts, ranks, strict=True)]
    return [out[0] for out in simulate(local, values)]


def some_layouts(mesh: dict[str, int], partial: bool) -> list[Layout]:
    choices = [Replicate(), Shard(0), Shard(1), Shard(2), Shard(4), *([Partial()] if partial else [])]
    sizes = list(mesh.values())
    expanded = [size for dim in DIMS for size in dim]

    def fits(layout: Layout) -> bool:
        return all(
            expanded[d] % math.prod(s for p, s in zip(layout, sizes, strict=True) if p == Shard(d)) == 0
            for d in range(len(expanded))
        )

    return [layout for layout in itertools.product(choices, repeat=len(mesh)) if fits(layout)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_reshard_from_any_layout_to_any(mesh: dict[str, int]) -> None:
    expanded = tuple(size for dim in DIMS for size in dim)
    full = torch.arange(math.prod(expanded), dtype=torch.float64).reshape(expanded)
    topo = topology(hardware("h100"), mesh)
    pairs = list(itertools.product(some_layouts(mesh, partial=True), some_layouts(mesh, partial=False)))
    random.Random(0).shuffle(pairs)
    for source, target in pairs[:250]:
        path = steps(expanded, 8, source, target, topo)
        assert path is not None
        local = local_shape(expanded, source, topo.sizes)
        merged = (local[0] * local[1], *local[2:])
        parts = [part.reshape(merged) for part in parts_of(full, source, mesh)]
        found = play(lambda emit, x, path=path: emit_steps(emit, x, path, DIMS), merged, parts, mesh)
        wanted = parts_of(full, target, mesh)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other.reshape(one.shape)), f"{layout_text(source)} -> {layout_text(target)}"


def test_nothing_becomes_a_partial_sum() -> None:
    topo = topology(hardware("h100"), {"a": 2})
    assert steps((4,), 4, (Replicate(),), (Partial(),), topo) is None


def test_a_shard_below_another_is_not_gathered_alone() -> None:
    """S(0)S(0) splits by axis 0 first: axis 0 cannot be gathered while axis 1 is split below it."""
    topo = topology(hardware("h100"), {"a": 2, "b": 2})
    path = steps((8,), 4, (Shard(0), Shard(0)), (Replicate(), Shard(0)), topo)
    assert path is not None
    assert path[0].axes != (0,)


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 10, 250])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_stored_chunks_are_gathered_and_scattered_whole(rows: int, mesh: dict[str, int]) -> None:
    """Chunks are those of `torch.chunk` along each axis in turn."""
    topo = topology(hardware("h100"), mesh)
    axes = tuple(range(len(mesh)))
    full = torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3)
    nested = [full]
    for size in mesh.values():
        nested = [piece for part in nested for piece in _chunked(part, size)]
    assert [len(part) for part in nested] == list(chunks(rows, list(mesh.values())))
    most = len(nested[0])
    padded = [torch.cat([part, part.new_zeros(most - len(part), 3)]) for part in nested]
    whole: Layout = (Replicate(),) * len(mesh)
    of = Storage((rows, 3), (None,) * len(mesh), axes)
    gather = state_gather((rows, 3), 8, axes, whole, topo)
    found = play(lambda emit, x: emit_steps(emit, x, (gather,), ((rows,), (3,)), of), (most, 3), padded, mesh)
    assert all(torch.equal(one, full) for one in found)
    for given in ((Partial(),) * len(mesh), whole, (Partial(), *whole[1:])):
        path = state_scatter((rows, 3), 8, (rows, 3), given, whole, axes, topo)
        assert path is not None
        parts = parts_of(full, given, mesh)
        found = play(lambda emit, x, path=path: emit_steps(emit, x, path, ((rows,), (3,)), of), (rows, 3), parts, mesh)
        assert all(torch.equal(one, other) for one, other in zip(found, padded, strict=True)), given


@pytest.mark.parametrize("rows", [1, 8, 10])
def test_gradients_of_replicas_are_added_chunk_by_chunk(rows: int) -> None:
    """HSDP on 2 replicas of 4 shards: whole gradients over the shards, a quarter of them over the replicas."""
    mesh = {"dp_replicate": 2, "dp_shard": 4}
    topo = topology(hardware("h100"), mesh)
    whole: Layout = (Replicate(), Replicate())
    given: Layout = (Partial(), Partial())
    path = state_scatter((rows, 3), 8, (rows, 3), given, whole, (1,), topo)
    assert path is not None
    padded_rows = -(-rows // 4) * 4
    assert [(step.kind, step.axes, step.full_bytes) for step in path] == [
        ("state_scatter", (1,), padded_rows * 3 * 8),
        ("all_reduce", (0,), padded_rows // 4 * 3 * 8),
    ]
    full = torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3)
    of = Storage((rows, 3), (None, None), (1,))
    parts = parts_of(full, given, mesh)
    found = play(lambda emit, x: emit_steps(emit, x, path, ((rows,), (3,)), of), (rows, 3), parts, mesh)
    for rank, one in enumerate(found):
        part = _chunked(full, 4)[rank % 4]
        assert torch.allclose(one, torch.cat([part, part.new_zeros(padded_rows // 4 - len(part), 3)]))


def test_gradients_are_added_over_inner_axes_before_they_are_scattered() -> None:
    """A norm under tensor parallelism: the stream of tp carries activations, and must not wait for dp."""
    topo = topology(hardware("h100"), {"dp": 4, "tp": 2})
    path = state_scatter((8, 3), 8, (8, 3), (Partial(), Partial()), (Replicate(), Replicate()), (0,), topo)
    assert path is not None
    assert [(step.kind, step.axes) for step in path] == [("all_reduce", (1,)), ("state_scatter", (0,))]


def _chunked(part: torch.Tensor, size: int) -> list[torch.Tensor]:
    """`torch.chunk` with empty chunks for the ranks it gives none."""
    if not len(part):
        return [part] * size
    pieces = list(part.chunk(size))
    return pieces + [part[:0]] * (size - len(pieces))
