"""Building a rank's graph: nodes with fake values, reshapes that always work, and the steps of a reshard.

Every tensor of the local graph has the shape of the rank's part. Collectives work on its expanded shape (one dim per
atom), where a layout is a plain one; reshapes between the two cost nothing.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from costmodel.hardware import Topology
from costmodel.layout import Layout, local_shape
from costmodel.reshard import Step
from costmodel.state import chunks
from passes.dims import own_shape
from passes.fakes import FakeTensorMode
from passes.graphs import graph_module
from passes.local import TOGETHER, WAIT, Storage
from passes.precision import dtype_named
from passes.program import Program

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
SAME_STRIDES = (aten.view.default, aten._unsafe_view.default)
"""Ops that fail where their operand lies otherwise in memory than when the graph was captured; `reshape` copies."""


class Parts:
    """Nodes that together stand for the results of one op; picking one of them (`getitem`) costs no node."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = tuple(nodes)
        self.meta = {"val": tuple(node.meta["val"] for node in nodes)}


def meta_of(node: fx.Node) -> dict[str, Any]:
    """Phase, module and source line of a node: the metadata of nodes that stand for it."""
    return {
        "phase": node.meta.get("phase", "forward"),
        "module": node.meta.get("module", ""),
        "source": node.meta.get("source", ""),
    }


class Emitter:
    """Adds nodes to a local graph; each has `val`, and the metadata (`phase`, `module`, `source`) now in force."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode, topology: Topology) -> None:
        self.graph = graph
        self.mode = mode
        self.topology = topology
        self.coordinates: tuple[fx.Node, ...] = ()
        self.meta: Mapping[str, Any] = {}
        self._values: dict[str, Any] = {}

    def stand_for(self, node: fx.Node) -> None:
        """Give nodes that are added from now on the phase, module and source line of `node`."""
        seen = {"seen": node.meta["seen"]} if "seen" in node.meta else {}  # of an attention (`rules.call`)
        self.meta = meta_of(node) | seen

    def last(self) -> fx.Node:
        """The node added last."""
        node: fx.Node = next(iter(reversed(self.graph.nodes)))
        return node

    def since(self, node: fx.Node) -> list[fx.Node]:
        """The nodes added after `node`, in order."""
        found = []
        for each in reversed(self.graph.nodes):
            if each is node:
                break
            found.append(each)
        return found[::-1]

    def placeholder(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """A new input."""
        node: fx.Node = self.graph.placeholder(name)
        with self.mode:
            node.meta.update(val=torch.empty(tuple(shape), dtype=dtype), phase="forward", module="", source="")
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """`target(*args, **kwargs)` as a node.

        Raises:
            RuntimeError: the op refuses these shapes.
        """
        if target is operator.getitem and isinstance(args[0], Parts):
            part: fx.Node = args[0].nodes[args[1]]
            return part
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        node.meta["val"] = self._value(node)
        return node

    def known(self, value: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """`call`, for an op whose result has a data-dependent shape that is known to be that of `value`."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        with self.mode:
            node.meta["val"] = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), value)
        return node

    def _value(self, node: fx.Node) -> Any:
        def fake(value: Any) -> Any:
            return value.meta["val"]

        args = fx.map_arg(node.args, fake)
        kwargs = fx.map_arg(node.kwargs, fake)
        key = f"{node.target}{_key(args)}{_key(kwargs)}"
        if key not in self._values:
            with self.mode, torch.no_grad():
                self._values[key] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[key]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Local shape of a node."""
        return tuple(node.meta["val"].shape)

    def contiguous(self, x: fx.Node) -> fx.Node:
        """`x` in row-major memory."""
        if x.meta["val"].is_contiguous():
            return x
        return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)

    def view(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """`x` in another shape, copied only where its strides do not allow a view."""
        if self.shape(x) == tuple(shape):
            return x
        value = x.meta["val"]
        if not value.is_contiguous():
            try:
                with self.mode:
                    value.view(tuple(shape))
            except (RuntimeError, ValueError):
                x = self.contiguous(x)
        return self.call(aten.view.default, x, list(shape))

    def move_dim(self, x: fx.Node, source: int, target: int) -> fx.Node:
        """Dim `source` moved to position `target`."""
        if source == target:
            return x
        order = list(range(len(self.shape(x))))
        order.insert(target, order.pop(source))
        return self.call(aten.permute.default, x, order)

    def coordinate(self, axes: Sequence[int]) -> fx.Node:
        """This rank's index in the group that `axes` form, an int64 scalar."""
        sizes = self.topology.sizes
        place = self.coordinates[axes[0]]
        for axis in axes[1:]:
            place = self.call(aten.mul.Tensor, place, sizes[axis])
            place = self.call(aten.add.Tensor, place, self.coordinates[axis])
        return place

    def group(self, axes: Sequence[int]) -> tuple[int, str]:
        """(ranks, name) of the group that `axes` form."""
        members = self.topology.axes
        return math.prod(members[a].size for a in axes), ",".join(members[a].name for a in axes)

    def wait(self, x: fx.Node) -> fx.Node:
        """The result of a collective, after a wait for it."""
        return self.call(WAIT, x)


def emitter_like(graph: fx.Graph) -> Emitter:
    """An emitter of an empty graph on the fake tensors of `graph`, for programs that are not laid out yet."""
    mode = next(v.fake_mode for n in graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))
    return Emitter(fx.Graph(), mode, None)  # type: ignore[arg-type]


def relax_views(graph: fx.Graph) -> None:
    """Make views reshapes, where tensors may lie otherwise in memory than when the graph was captured."""
    for view in SAME_STRIDES:
        for node in graph.find_nodes(op="call_function", target=view):
            node.target = aten.reshape.default


def written_anew(program: Program, emit: Emitter) -> Program:
    """`program` with the graph that was emitted in the place of its own; it keeps its fingerprint."""
    relax_views(emit.graph)
    emit.graph.lint()
    return replace(program, graph=graph_module(program.graph, emit.graph))


def _key(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"T{tuple(value.shape)}{value.stride()}{value.dtype}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_key, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_key(v)}" for k, v in value.items()) + "}"
    return repr(value)


def emit_steps(
    emit: Emitter,
    x: fx.Node,
    steps: Sequence[Step],
    dims: Sequence[Sequence[int]],
    storage: Storage | None = None,
    padding: Sequence[int] = (),
) -> fx.Node:
    """Bring `x`, the part of a tensor whose dims consist of atoms of sizes `dims`, through `steps`.

    `storage` and `padding` are those of the `StoredOption` that the steps come from or go to, if any.
    """
    for step in steps:
        if step.ranks == 1:
            continue
        if step.kind == "cast" or step.kind.startswith("state_"):
            (x,) = emit_together(emit, [x], [[step]], [(storage, padding)])
        else:
            x = _expanded_step(emit, x, step, dims)
    return x


def emit_together(
    emit: Emitter,
    xs: Sequence[fx.Node],
    paths: Sequence[Sequence[Step]],
    stored: Sequence[tuple[Storage | None, Sequence[int]]],
) -> list[fx.Node]:
    """Bring several parts through steps that differ in sizes alone; each collective is issued once, for all of them.

    `stored`: per part, storage and padding of the `StoredOption` that it comes from or goes to, if any.
    """
    parts = list(xs)
    dims = [storage.state_dim if storage is not None else 0 for storage, _ in stored]
    for steps in zip(*paths, strict=True):
        first = steps[0]
        if first.kind == "cast":
            parts = [emit.call(aten._to_copy.default, x, dtype=dtype_named(first.dtype)) for x in parts]
            continue
        if first.kind in _PADDING:
            parts = [_PADDING[first.kind](emit, x, padding) for x, (_, padding) in zip(parts, stored, strict=True)]
            continue
        if first.ranks == 1:
            continue
        ranks, name = emit.group(first.axes)
        if first.kind == "all_reduce":
            parts = _collected(emit, c10d.all_reduce.default, parts, first.op, name)
            continue
        parts = [_moved(emit, x, dim, 0) for x, dim in zip(parts, dims, strict=True)]
        if first.kind == "state_slice":
            parts = [_state_slice(emit, x, step) for x, step in zip(parts, steps, strict=True)]
        elif first.kind == "state_gather":
            parts = _collected(emit, c10d.all_gather_into_tensor.default, parts, ranks, name)
            for index, (storage, _) in enumerate(stored):
                assert storage is not None
                rows = storage.computed_shape(emit.topology.sizes)[dims[index]]
                parts[index] = _unpadded(emit, parts[index], first, rows)
        elif first.kind == "state_scatter":
            padded = [_padded(emit, x, first.axes) for x in parts]
            parts = _collected(emit, c10d.reduce_scatter_tensor.default, padded, first.op, ranks, name)
        else:
            raise AssertionError(first)
        parts = [_moved(emit, x, 0, dim) for x, dim in zip(parts, dims, strict=True)]
    return parts


def emit_packed(emit: Emitter, xs: Sequence[fx.Node], steps: Sequence[Step]) -> list[fx.Node]:
    """Add up partial sums packed into one tensor, by the single step that each of them would take."""
    (step,) = steps
    _, name = emit.group(step.axes)
    shapes = [emit.shape(x) for x in xs]
    packed = emit.call(
        aten.cat.default, [emit.view(x, (math.prod(shape),)) for x, shape in zip(xs, shapes, strict=True)]
    )
    made = emit.call(c10d.all_reduce.default, packed, step.op, name)
    made.meta["packed"] = len(xs)
    summed = emit.wait(made)
    ends = itertools.accumulate(map(math.prod, shapes))
    return [
        emit.view(emit.call(aten.slice.Tensor, summed, 0, end - math.prod(shape), end), shape)
        for end, shape in zip(ends, shapes, strict=True)
    ]


def _collected(emit: Emitter, collective: Any, xs: Sequence[fx.Node], *rest: Any) -> list[fx.Node]:
    """The results of one collective over `xs`."""
    xs = [emit.contiguous(x) for x in xs]
    if len(xs) == 1:
        return [emit.wait(emit.call(collective, xs[0], *rest))]
    made = emit.call(TOGETHER[collective], list(xs), *rest)
    items = [emit.call(operator.getitem, made, index) for index in range(len(xs))]
    return [emit.wait(item) for item in items]


def _with_padding(emit: Emitter, x: fx.Node, padding: Sequence[int]) -> fx.Node:
    zeros = [n for each in reversed(padding) for n in (0, each)]
    return emit.call(aten.constant_pad_nd.default, x, zeros, 0)


def _without_padding(emit: Emitter, x: fx.Node, padding: Sequence[int]) -> fx.Node:
    for dim, each in enumerate(padding):
        x = emit.call(aten.slice.Tensor, x, dim, 0, emit.shape(x)[dim] - each) if each else x
    return emit.contiguous(x)


_PADDING = {"state_pad": _with_padding, "state_cut": _without_padding}


def _moved(emit: Emitter, x: fx.Node, source: int, target: int) -> fx.Node:
    """Dim `source` moved to place `target`, in row-major memory: chunks of another dim than 0 are moved as rows."""
    return emit.contiguous(emit.move_dim(x, source, target)) if source != target else x


def _local(emit: Emitter, dims: Sequence[Sequence[int]], layout: Layout) -> tuple[int, ...]:
    return local_shape([size for dim in dims for size in dim], layout, emit.topology.sizes)


def _expanded_step(emit: Emitter, x: fx.Node, step: Step, dims: Sequence[Sequence[int]]) -> fx.Node:
    before, after = _local(emit, dims, step.before), _local(emit, dims, step.after)
    ranks, name = emit.group(step.axes)
    if step.kind == "all_reduce":
        return emit.wait(emit.call(c10d.all_reduce.default, emit.contiguous(x), step.op, name))
    x = emit.view(x, before)
    if step.kind == "all_gather":
        assert step.source is not None
        x = emit.contiguous(_to_front(emit, x, step.source))
        x = emit.wait(emit.call(c10d.all_gather_into_tensor.default, x, ranks, name))
        x = _from_front(emit, x, step.source, after)
    elif step.kind == "reduce_scatter":
        assert step.target is not None
        x = emit.contiguous(_to_front(emit, x, step.target))
        x = emit.wait(emit.call(c10d.reduce_scatter_tensor.default, x, step.op, ranks, name))
        x = _from_front(emit, x, step.target, after)
    elif step.kind == "slice":
        assert step.target is not None
        d = step.target
        x = emit.view(x, (*before[:d], ranks, before[d] // ranks, *before[d + 1 :]))
        place = emit.view(emit.coordinate(step.axes), (1,))
        x = emit.view(emit.call(aten.index_select.default, x, d, place), after)
    elif step.kind == "all_to_all":
        x = _all_to_all(emit, x, step, before, after)
    else:
        raise AssertionError(step)
    # Row-major, as the ops' own results are: fused kernels rely on it (CPU attention is silently wrong otherwise).
    return emit.view(emit.contiguous(x), own_shape(dims, after))


def _to_front(emit: Emitter, x: fx.Node, dim: int) -> fx.Node:
    """Dim `dim` first; dims of size 1 before it are no obstacle."""
    shape = emit.shape(x)
    if math.prod(shape[:dim]) == 1:
        return emit.view(x, (shape[dim], *shape[:dim], *shape[dim + 1 :]))
    return emit.move_dim(x, dim, 0)


def _from_front(emit: Emitter, x: fx.Node, dim: int, shape: Sequence[int]) -> fx.Node:
    if math.prod(shape[:dim]) == 1:
        return emit.view(x, shape)
    return emit.move_dim(x, 0, dim)


def _all_to_all(emit: Emitter, x: fx.Node, step: Step, before: Sequence[int], after: Sequence[int]) -> fx.Node:
    ranks, name = emit.group(step.axes)
    source, target = step.source, step.target
    assert source is not None
    assert target is not None
    x = emit.view(x, (*before[:target], ranks, before[target] // ranks, *before[target + 1 :]))
    x = emit.contiguous(emit.move_dim(x, target, 0))
    shape = emit.shape(x)
    ones = [1] * ranks
    x = emit.wait(emit.call(c10d.all_to_all_single.default, x, ones, ones, name))
    x = emit.view(x, shape)
    x = emit.move_dim(x, 0, source)
    return emit.view(x, after)


def _runs(emit: Emitter, rows: int, axes: Sequence[int]) -> list[tuple[int, int]]:
    """The padded chunks of a group end to end, as runs of (rows of the tensor, rows of padding)."""
    parts = chunks(rows, [emit.topology.sizes[axis] for axis in axes])
    runs: list[tuple[int, int]] = []
    for part in parts:
        if runs and not runs[-1][1]:
            runs[-1] = (runs[-1][0] + part, parts[0] - part)
        elif runs and not part:
            runs[-1] = (runs[-1][0], runs[-1][1] + parts[0])
        else:
            runs.append((part, parts[0] - part))
    return runs


def _unpadded(emit: Emitter, x: fx.Node, step: Step, rows: int) -> fx.Node:
    """What a gather of padded chunks brought, without the padding."""
    kept, start = [], 0
    for real, padding in _runs(emit, rows, step.axes):
        if real:
            kept.append((start, start + real))
        start += real + padding
    if kept in ([(0, emit.shape(x)[0])], []):  # nothing to cut off, or a parameter with no rows at all
        return x
    parts = [emit.call(aten.slice.Tensor, x, 0, first, last) for first, last in kept]
    return parts[0] if len(parts) == 1 else emit.call(aten.cat.default, parts)


def _padded(emit: Emitter, x: fx.Node, axes: Sequence[int]) -> fx.Node:
    """The chunks of a group end to end, each padded to the largest."""
    runs = _runs(emit, emit.shape(x)[0], axes)
    if len(runs) == 1:
        (_, padding), rank = runs[0], len(emit.shape(x))
        return emit.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1) + [0, padding], 0) if padding else x
    pieces, start = [], 0
    for real, padding in runs:
        piece = emit.call(aten.slice.Tensor, x, 0, start, start + real)
        pads = [0, 0] * (len(emit.shape(x)) - 1) + [0, padding]
        pieces.append(emit.call(aten.constant_pad_nd.default, piece, pads, 0) if padding else piece)
        start += real
    return emit.call(aten.cat.default, pieces)


def _state_slice(emit: Emitter, x: fx.Node, step: Step) -> fx.Node:
    ranks, _ = emit.group(step.axes)
    x = _padded(emit, x, step.axes)
    rows, *rest = emit.shape(x)
    x = emit.view(x, (ranks, rows // ranks, *rest))
    place = emit.view(emit.coordinate(step.axes), (1,))
    return emit.view(emit.call(aten.index_select.default, x, 0, place), (rows // ranks, *rest))
