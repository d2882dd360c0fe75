"""Program + decisions -> one rank's program, with explicit collectives.

Every rank runs the same graph; what it has to know of itself comes in as its mesh coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx

from costmodel.layout import Layout
from passes.analysis.dims import is_getitem, value_of
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import Option, StoredOption
from passes.play.itinerary import Returned, itinerary, returned
from passes.play.sending import send_early
from passes.price.conversion import read_state
from passes.price.per_rank import option_local_shapes
from passes.program.emit import Emitter, relax_views
from passes.program.fakes import FakeTensorMode
from passes.program.graphs import graph_module
from passes.program.local import LocalInput, LocalOutput, LocalProgram, Storage
from passes.program.walks import results_of
from passes.rewrite.emit_steps import emit_packed, emit_steps, emit_together
from passes.rewrite.local_op import LocalOp
from passes.rewrite.localize import run_locally
from passes.rules.call import operand_nodes
from passes.space.space import Space
from passes.space.words import Words

aten = torch.ops.aten

Where = Layout | StoredOption


def rewrite(space: Space, assignment: Sequence[int]) -> LocalProgram:
    """One rank's program when site i of `space` takes option `assignment[i]`."""
    return _Rewriter(space, assignment).program()


def _bucket(item: Run | Move) -> int:
    return item.bucket if isinstance(item, Move) else -1


class _Rewriter:
    """The local graph under construction; `env` finds a global node's local part by its layout."""

    def __init__(self, space: Space, assignment: Sequence[int]) -> None:
        self.space = space
        self.assignment = assignment
        self.root = torch.nn.Module()
        self.emit = Emitter(fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True), space.topology)
        self.env: dict[tuple[fx.Node, str, Where], fx.Node] = {}
        self.source_of: dict[fx.Node, fx.Node] = {}
        self.picked: dict[tuple[fx.Node, int], fx.Node] = {}
        self.sent: list[list[fx.Node]] = []
        """The nodes of each move of an activation."""

    def program(self) -> LocalProgram:
        space = self.space
        inputs = self._placeholders()
        for _, group in groupby(itinerary(space, self.assignment), key=_bucket):
            items = list(group)
            if isinstance(items[0], Move) and items[0].bucket >= 0:
                self._move_together(items)  # type: ignore[arg-type]
                continue
            for item in items:
                if isinstance(item, Move):
                    self._move(item)
                else:
                    self._run(item)
        outputs, values = self._outputs()
        self.emit.graph.output(tuple(values))
        if self.sent:
            send_early(Words(space), self.sent)
        graph = graph_module(self.root, self.emit.graph)
        graph.graph.eliminate_dead_code()
        relax_views(graph.graph)
        graph.recompile()
        axes = tuple((axis.name, axis.size) for axis in space.topology.axes)
        return LocalProgram(graph, inputs, outputs, axes, space.program)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _placeholders(self) -> tuple[LocalInput, ...]:
        space, emit = self.space, self.emit
        sizes = space.topology.sizes
        found: list[LocalInput] = []
        placed: list[tuple[fx.Node, fx.Node, StoredOption]] = []
        for node, given in space.program.placeholders.items():
            option = self._option(node)
            assert isinstance(option, StoredOption)
            value = node.meta["val"]
            shape = option.storage.padded_shape(sizes)
            dtype = given.dtypes.stored if given.dtypes is not None else value.dtype
            local = emit.placeholder(node.name, shape, dtype)
            found.append(LocalInput(given.kind, given.name, option.storage))
            placed.append((node, local, option))
        scalar = Storage((), (None,) * len(sizes))
        emit.coordinates = tuple(
            emit.placeholder(f"coordinate_{axis.name}", (), torch.int64) for axis in space.topology.axes
        )
        found += [LocalInput("coordinate", axis.name, scalar) for axis in space.topology.axes]
        for node in space.program.graph.graph.find_nodes(op="get_attr"):
            value = getattr(space.program.graph, str(node.target))
            setattr(self.root, str(node.target), value)
            local = emit.graph.get_attr(str(node.target))
            local.meta.update(node.meta)
            with emit.mode:
                local.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            option = self._option(node)
            placed.append((node, local, option))  # type: ignore[arg-type]
        tangents = set(space.program.placeholders_of("tangent"))
        for node, local, option in placed:
            self._put(node, read_state(option), self._averaged(local) if node in tangents else local)
        return tuple(found)

    def _averaged(self, local: fx.Node) -> fx.Node:
        """A tangent of this rank's own loss: the ranks' losses are averaged."""
        ways = math.prod(self.space.topology.sizes[axis] for axis in self.space.batch_axes)
        if self.space.program.has_loss or ways == 1:
            return local
        self.emit.meta = {"phase": "backward", "module": "", "source": ""}
        return self.emit.call(aten.div.Tensor, local, ways)

    # -- body ----------------------------------------------------------------------------------------------------------

    def _option(self, node: fx.Node) -> Option | StoredOption:
        site = self.space.folding.of[node]
        return self.space.sites[site].options[self.assignment[site]]

    def _put(self, node: fx.Node, where: Where, local: fx.Node, era: str = "") -> None:
        self.env[node, era, where] = local
        if not isinstance(where, StoredOption):
            local.meta.setdefault("part_of", (node.name, where))

    def _get(self, node: fx.Node, where: Where, phase: str) -> fx.Node:
        node = self.source_of.get(node, node)
        for era in (phase, ""):
            if (node, era, where) in self.env:
                return self.env[node, era, where]
        raise AssertionError(f"{node.name}: nothing brought it to {where}")

    def _meta(self, node: fx.Node, phase: str) -> None:
        self.emit.meta = {
            "phase": phase,
            "module": node.meta.get("module", ""),
            "source": node.meta.get("source", ""),
        }

    def _move(self, move: Move) -> None:
        local = self._get(move.value, move.source, move.era)
        self._meta(move.place, move.phase)
        value = value_of(move.value, self.space.folding)
        site = self.space.sites[value.op]
        dims = site.op.results[value.result] if site.op is not None else site.dims
        stored = next((x for x in (move.source, move.target) if isinstance(x, StoredOption)), None)
        of_stored = (stored.storage, stored.padding) if stored else (None, ())
        before = self.emit.last()
        moved = emit_steps(self.emit, local, move.steps, dims, *of_stored)
        if stored is None:
            self.sent.append(self.emit.since(before))
        self._put(move.value, move.target, moved, move.era)

    def _move_together(self, moves: Sequence[Move]) -> None:
        self._meta(moves[0].place, moves[0].phase)
        stored = []
        for move in moves:
            option = next((x for x in (move.source, move.target) if isinstance(x, StoredOption)), None)
            stored.append((option.storage, option.padding) if option else (None, ()))
        parts = [self._get(move.value, move.source, move.era) for move in moves]
        if moves[0].packed:
            before = self.emit.last()
            moved = emit_packed(self.emit, parts, moves[0].steps)
            self.sent.append(self.emit.since(before))
        else:
            moved = emit_together(self.emit, parts, [move.steps for move in moves], stored)
        for move, part in zip(moves, moved, strict=True):
            self._put(move.value, move.target, part, move.era)

    def _run(self, run: Run) -> None:
        site = self.space.sites[run.site]
        assert site.call is not None
        assert site.op is not None
        operands = tuple(
            self._get(operand, layout, run.phase)
            for operand, layout in zip(operand_nodes(run.node), run.option.operands, strict=True)
        )
        self._meta(run.node, run.phase)
        _, results = option_local_shapes(site, run.option, self.space.topology.sizes)
        op = LocalOp(
            self.emit,
            run.node,
            site.call,
            site.op,
            operands,
            run.option.operands,
            run.option.results,
            tuple(results),
        )
        local = run_locally(op)
        self._check(run.node, local, results)
        if isinstance(run.node.meta["val"], list | tuple):
            self._pick_results(run, local)
        else:
            self._put(run.node, run.option.results[0], local, run.era)

    def _pick_results(self, run: Run, local: fx.Node) -> None:
        for user in run.node.users:
            if is_getitem(user):
                first = self.picked.setdefault((run.node, user.args[1]), user)  # type: ignore[arg-type]
                self.source_of[user] = first
                if first is user:
                    part = self.emit.call(user.target, local, user.args[1])
                    self._put(user, run.option.results[user.args[1]], part, run.era)  # type: ignore[index]

    def _check(self, node: fx.Node, local: fx.Node, shapes: Sequence[tuple[int, ...]]) -> None:
        values = local.meta["val"]
        for value, shape in zip(values if isinstance(values, list | tuple) else [values], shapes, strict=True):
            if node.target is aten._embedding_bag.default and not value.numel():
                continue  # which bag a row is in: left out by the kernel for dense rows, and then made by backward's
            if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
                raise AssertionError(f"{node.name} ({node.target}): local shape {tuple(value.shape)}, planned {shape}")

    def _cut(self, item: Returned, value: fx.Node) -> fx.Node:
        """What leaves, without the padding of dims that are whole."""
        self._meta(item.node, item.phase)
        for dim, zeros in enumerate(item.option.padding):
            if zeros:
                value = self.emit.call(aten.slice.Tensor, value, dim, 0, self.emit.shape(value)[dim] - zeros)
        return value

    # -- outputs -------------------------------------------------------------------------------------------------------

    def _outputs(self) -> tuple[tuple[LocalOutput, ...], list[Any]]:
        program = self.space.program
        leaving = {item.index: item for item in returned(self.space, self.assignment)}
        found, values = [], []
        nodes = results_of(program.graph.graph)
        for index, (out, node) in enumerate(zip(program.outputs, nodes, strict=True)):
            item = leaving.get(index)
            if item is None:
                found.append(LocalOutput(out.kind, out.name, Storage((), (None,) * len(self.space.topology.axes))))
                values.append(node)
                continue
            found.append(LocalOutput(out.kind, out.name, item.option.storage))
            value = self._get(item.node, item.target, item.phase)
            values.append(value if item.stores else self._cut(item, value))
        return tuple(found), values
