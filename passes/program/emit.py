"""Building graphs: nodes with fake values, and reshapes that always work.

`Emitter` builds a rank's, where every tensor has the shape of the rank's part; `ProgramWriter` a program's anew.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from costmodel.hardware import Topology
from passes.program.fakes import DynamicOutputShapeException, FakeTensorMode
from passes.program.graphs import drop_unread, graph_module
from passes.program.local import WAIT
from passes.program.program import Program

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

    def call_again(self, node: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """`call` of a node's op; where the shape of its result depends on values, on such as the node had."""
        try:
            return self.call(node.target, *args, **kwargs)
        except DynamicOutputShapeException:
            return self.known(node.meta["val"], node.target, *args, **kwargs)

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


class ProgramWriter(Emitter):
    """Writes a program that is not laid out yet anew; `new`: what stands for each of its nodes so far."""

    def __init__(self, program: Program) -> None:
        self.old = program.graph.graph
        mode = next(v.fake_mode for node in self.old.nodes if hasattr(v := node.meta.get("val"), "fake_mode"))
        super().__init__(fx.Graph(), mode, None)  # type: ignore[arg-type]
        self.program = program
        self.new: dict[fx.Node, fx.Node] = {}

    def written(self, write: Callable[[fx.Node], fx.Node | None]) -> Program:
        """The program with what `write` makes of each node, and a copy of it where that is None."""
        self.write(write)
        return self.finished()

    def write(self, write: Callable[[fx.Node], fx.Node | None], nodes: Iterable[fx.Node] | None = None) -> None:
        """Add what `write` makes of each node, or a copy where that is None; `nodes`: in an order of their own."""
        for node in self.old.nodes if nodes is None else nodes:
            if node not in self.new:
                self.stand_for(node)
                made = write(node)
                self.new[node] = self.graph.node_copy(node, self.new.__getitem__) if made is None else made

    def finished(self) -> Program:
        """The program with the new graph in the place of its own, less what nothing reads; the fingerprint is kept."""
        drop_unread(self.graph)
        relax_views(self.graph)
        self.graph.lint()
        return replace(self.program, graph=graph_module(self.program.graph, self.graph))


def relax_views(graph: fx.Graph) -> None:
    """Make views reshapes, where tensors may lie otherwise in memory than when the graph was captured."""
    for view in SAME_STRIDES:
        for node in graph.find_nodes(op="call_function", target=view):
            node.target = aten.reshape.default


def _key(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"T{tuple(value.shape)}{value.stride()}{value.dtype}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_key, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_key(v)}" for k, v in value.items()) + "}"
    return repr(value)
