"""Padding: a program whose uneven dims are made larger, so that a mesh axis divides them, with the same results.

A pad makes one logical dim (atom) larger wherever ops may be split along it. Each op runs in one of two ways:

    padded   on operands with the larger dim, where its factor form allows a split of it: its entries along the dim do
             not mix, or are summed, multiplied out or looked up
    exact    as it was, on operands cut to their real size; its results are padded with zeros where a padded op reads

What stands in the added entries (their *zone*, `zones.py`) is followed from op to op. Where a padded op would let them
into real entries, they are overwritten first (`padded_operands.py`): by zeros before a sum or a matrix product (one
operand zero, the other finite), by -inf before a maximum, by zeros in indices. What leaves the program is cut to its
real size.

A parameter or input whose dim is the padded one alone (a vocabulary, an FFN width, the sequence) becomes a larger
placeholder, `Input.shape` saying what it is outside; where it is part of a dim (heads of heads x head size) it is
padded inside the graph. Outputs are cut to their size where they leave.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.dims import Atom, atoms_of, is_getitem, outputs_of, value_of
from passes.padding.harmless import Key, Part, Reading, fill_of, keeps_values, needs_of, result_zone
from passes.padding.padded_operands import PaddedOperands
from passes.padding.versions import Origin, PaddedTensor, Version, Versions
from passes.padding.zones import Zone, is_number, is_pointwise, is_zero
from passes.program.emit import ProgramWriter, meta_of
from passes.program.program import Input, Output, Program
from passes.program.uniform import UNIFORM
from passes.program.walks import results_of
from passes.rewrite.local_op import LocalOp
from passes.rewrite.localize import in_dtype, run_locally
from passes.rules.call import is_tensor, operand_nodes
from passes.rules.create import FILLS, IOTAS

aten = torch.ops.aten

_APART = 127
"""How far below all that an `arange` counts its added entries are: beyond what marks a place as none (-1, -100), and so
near that powers of them are numbers where those of real positions are."""


@dataclass(frozen=True, slots=True)
class Pad:
    """The logical dim found at part `part` of dim `dim` of node `node` made larger."""

    node: str
    dim: int
    part: int
    size: int
    padded: int


@dataclass(frozen=True)
class Padded:
    """A padded program; `seen` has, per pad, a node of it that has the larger dim, and where."""

    program: Program
    seen: Mapping[Pad, tuple[fx.Node, Part]]


def pad(analysis: Analysis, pads: Sequence[Pad]) -> Padded:
    """The analysed program with these dims made larger. Its fingerprint stays that of what it was made from.

    Raises:
        ValueError: a pad that names no dim of the program, or another size than that dim has.
    """
    return _Padding(analysis, pads).padded()


def padded_atom(analysis: Analysis, each: Pad) -> Atom:
    """The logical dim that a pad makes larger.

    Raises:
        ValueError: it names no dim of the program, or another size than that dim has.
    """
    nodes = {node.name: node for node in analysis.folding.of}
    node = nodes.get(each.node)
    atoms = analysis.unified.dims(value_of(node, analysis.folding)) if node is not None else []
    if not (each.dim < len(atoms) and each.part < len(atoms[each.dim])):
        raise ValueError(f"{each} names no dim of the program")
    atom = atoms[each.dim][each.part]
    if atom.size != each.size or each.padded < each.size:
        raise ValueError(f"{each}: the dim has size {atom.size}")
    return atom


class _Padding:
    """The new graph under construction."""

    def __init__(self, analysis: Analysis, pads: Sequence[Pad]) -> None:
        self.analysis = analysis
        self.program = analysis.program
        self.pads = {id(padded_atom(analysis, each)): each for each in pads}
        """By id of the atom."""
        self.emit = ProgramWriter(self.program)
        self.versions = Versions(self.emit, {atom: each.padded for atom, each in self.pads.items()})
        self.tensors: dict[fx.Node, PaddedTensor] = {}
        self.results: dict[fx.Node, list[PaddedTensor]] = {}
        """Of ops that give several."""
        self.copies: dict[fx.Node, fx.Node] = {}
        """Nodes as they are, on exact operands."""
        self.dense: dict[fx.Node, fx.Node] = {}
        """Cut tensors -> made contiguous."""

    def padded(self) -> Padded:
        graph = self.program.graph.graph
        inputs = []
        given = iter(self.program.inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs.append(self._placeholder(node, next(given)))
            elif node.op == "get_attr":
                self._whole(node, self._copy(node))
            elif is_getitem(node):
                self.tensors[node] = self.results[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                self._run(node)
        outputs, values = self._outputs(inputs)
        self.emit.graph.output(tuple(values))
        program = self.emit.finished()
        alive = set(program.graph.graph.nodes)
        seen = {self.pads[atom]: where for atom, where in self.versions.seen.items() if where[0] in alive}
        return Padded(replace(program, inputs=tuple(inputs), outputs=outputs), seen)

    # -- what comes in and goes out ------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, given: Input) -> Input:
        new = self._copy(node)
        if not is_tensor(node):
            return given
        tensor = self._whole(node, new)
        tensor.by_phase = given.kind in ("parameter", "buffer")
        if tensor.by_phase:  # what is padded or cut of it is its layer's work
            tensor.meta = {**tensor.meta, "module": given.name.rpartition(".")[0]}
        tensor.base = frozenset(
            (d, 0)
            for d, dim in enumerate(tensor.atoms)
            if given.kind in ("parameter", "input") and len(dim) == 1 and id(dim[0]) in self.pads
        )
        if not tensor.base:
            return given
        value = node.meta["val"]
        with self.emit.mode:
            new.meta["val"] = torch.empty(self.versions.shape(tensor.atoms, tensor.base), dtype=value.dtype)
        tensor.versions.clear()  # the placeholder is no exact version any more
        self.versions.put(tensor, Version(new, dict.fromkeys(tensor.base, 0)), tensor.base)
        return replace(given, shape=tuple(int(n) for n in value.shape))

    def _outputs(self, inputs: Sequence[Input]) -> tuple[tuple[Output, ...], list[Any]]:
        outputs = []
        values: list[Any] = []
        padded = {given.name for given in inputs if given.shape is not None and given.kind == "parameter"}
        by_name = {given.name: node for node, given in self.program.placeholders.items()}
        returned = results_of(self.program.graph.graph)
        for (out, node, _, _), old in zip(outputs_of(self.program), returned, strict=True):
            if node is None:
                outputs.append(out)
                values.append(self.copies[old] if isinstance(old, fx.Node) else old)
                continue
            wanted: frozenset[Part] = frozenset()
            if out.kind == "gradient" and out.name in padded:
                wanted = self.tensors[by_name[out.name]].base
            elif out.kind == "output":  # it is cut where it leaves, so that no rank needs the dim whole for that
                tensor = self.tensors[node]
                wanted = frozenset(place for place in tensor.base if len(tensor.atoms[place[0]]) == 1)
                if wanted:
                    out = replace(out, shape=tuple(int(n) for n in node.meta["val"].shape))
            outputs.append(out)
            phase = "backward" if out.kind == "gradient" else "forward"
            version = self.versions.get(self.tensors[node], wanted, phase)
            for place in wanted if out.kind == "gradient" else ():
                if not is_zero(version.zones[place]):
                    self.versions.overwrite(self.tensors[node], version, place, 0, meta_of(node) | {"phase": phase})
            values.append(version.node)
        return tuple(outputs), values

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node as it is, on exact operands; cut ones are made contiguous where an op may need that."""
        phase = node.meta.get("phase", "forward")
        any_strides = node.op != "call_function" or is_pointwise(node.target) or keeps_values(node.target)
        exact = {old: self._exact(old, phase) for old in node.all_input_nodes}
        if not any_strides:
            exact = {old: self._dense(old, new) for old, new in exact.items()}
        new = self.emit.graph.node_copy(node, exact.__getitem__)
        new.meta = dict(node.meta)
        self.copies[node] = new
        return new

    def _exact(self, node: fx.Node, phase: str) -> fx.Node:
        if node in self.tensors:
            return self.versions.get(self.tensors[node], frozenset(), phase).node
        return self.copies[node]

    def _dense(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """`new` as contiguous as `old` was before it was padded and cut."""
        if not is_tensor(old) or not old.meta["val"].is_contiguous() or new.meta["val"].is_contiguous():
            return new
        if new not in self.dense:
            self.emit.meta = meta_of(new)
            self.dense[new] = self.emit.call(aten.clone.default, new, memory_format=torch.contiguous_format)
        return self.dense[new]

    def _whole(self, node: fx.Node, new: fx.Node) -> PaddedTensor:
        """`new` as the exact version of `node`."""
        atoms = self.analysis.unified.dims(value_of(node, self.analysis.folding))
        tensor = PaddedTensor(atoms, frozenset(), node.meta)
        self.tensors[node] = tensor
        self.versions.put(tensor, Version(new, {}), frozenset())
        return tensor

    def _run(self, node: fx.Node) -> None:
        reading = self._reading(node)
        if reading.keys:
            before = self.emit.last()
            try:
                self._run_padded(node, reading)
                return
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, NotImplementedError):
                # An op that does not take the larger sizes. Masks and pads that were made for it are right anyway.
                self._drop_after(before)
        if node.target in IOTAS and self._count(node):
            return
        new = self._copy(node)
        if is_tensor(node):
            self._whole(node, new).fill = self._fill(node)
            return
        self._results(node, new)

    def _count(self, node: fx.Node) -> bool:
        """A longer `arange`, whose added entries are no number that an index or class has; whether it was made."""
        (atoms,) = dims = self.analysis.unified.dims(value_of(node, self.analysis.folding))
        value, names = node.meta["val"], [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        whole = [id(atom) in self.pads for atom in atoms] == [True]  # of size 1 it has no part
        if not whole or "end" not in names or value.dtype.is_floating_point:
            return False
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        start, step = (in_dtype(given.get(name, number), value.dtype) for name, number in (("start", 0), ("step", 1)))
        length = self.pads[id(atoms[0])].padded
        nowhere = int(min(0, start, start + step * length)) - _APART
        if nowhere < torch.iinfo(value.dtype).min:
            return False
        self.emit.meta = meta_of(node)
        new = self.emit.call(aten.arange.start_step, start, start + step * length, step, **node.kwargs)
        tensor = self.tensors[node] = PaddedTensor(dims, frozenset({(0, 0)}), node.meta)
        version = Version(new, {(0, 0): "finite"})
        self.versions.put(tensor, version, tensor.base)
        self.versions.overwrite(tensor, version, (0, 0), nowhere, meta_of(node))
        version.zones[0, 0] = "nowhere"
        return True

    def _results(self, node: fx.Node, new: fx.Node) -> None:
        """The exact versions of an op's several results."""
        value = node.meta["val"]
        if not isinstance(value, list | tuple):
            return
        results = []
        for index, (part, dims) in enumerate(zip(value, self._result_dims(node), strict=True)):
            tensor = PaddedTensor(dims, frozenset(), node.meta)
            results.append(tensor)
            if not isinstance(part, torch.Tensor):
                continue
            picked = self.emit.graph.call_function(operator.getitem, (new, index))
            picked.meta = {**meta_of(node), "val": part}
            self.versions.put(tensor, Version(picked, {}), frozenset())
        self.results[node] = results

    def _drop_after(self, before: fx.Node) -> None:
        kept = {version.node for tensor in self.tensors.values() for version in tensor.versions.values()}
        kept |= set(self.versions.masks.values())
        for node in reversed(self.emit.since(before)):
            if not node.users and node not in kept:
                self.emit.graph.erase_node(node)

    # -- an op on padded operands --------------------------------------------------------------------------------------

    def _reading(self, node: fx.Node) -> Reading:
        """Which parts of the op's factors run padded."""
        c = self.analysis.folding.of[node]
        form, atoms = self.analysis.unified.forms[c], self.analysis.unified.atoms[c]
        place = self.analysis.places[c]
        assert place.call is not None
        operands = operand_nodes(node)
        padded = {
            (f, j): leaf
            for f in range(len(form.sizes))
            for j, leaf in enumerate(atoms[f].leaves())
            if id(leaf) in self.pads
        }
        if not padded or node.target in IOTAS:
            return Reading(node, place.call, form, {}, (), ())
        at_operands = tuple(_positions(dims, atoms) for dims in form.operands)
        at_results = tuple(_positions(dims, atoms) for dims in form.results)
        for operand, dims, positions in zip(operands, form.operands, at_operands, strict=True):
            theirs = self.tensors[operand].atoms
            for d, dim in enumerate(dims):
                if [id(a) for a in atoms_of(dim, atoms)] != [id(a) for a in theirs[d]]:
                    for key in [key for key, (dd, _) in positions.items() if dd == d]:
                        padded.pop(key, None)
        reading = Reading(node, place.call, form, padded, at_operands, at_results)
        needs = needs_of(reading)
        return replace(reading, keys={key: leaf for key, leaf in padded.items() if needs[key] is not None})

    def _run_padded(self, node: fx.Node, reading: Reading) -> None:
        operands = PaddedOperands(reading, [self.tensors[x] for x in operand_nodes(node)], self.versions)
        operands.meet_needs()
        result_dims = self._result_dims(node)
        shapes = [
            self.versions.shape(dims, reading.padded(positions))
            for dims, positions in zip(result_dims, reading.at_results, strict=True)
        ]
        self.emit.stand_for(node)
        if node.target is UNIFORM:
            new = self._uniform(node, operands.read[0].node, reading.padded(reading.at_results[0]))
        else:
            new = run_locally(self._local_op(node, [version.node for version in operands.read], shapes))
        several = isinstance(new.meta["val"], list | tuple)
        for value, shape in zip(new.meta["val"] if several else [new.meta["val"]], shapes, strict=True):
            assert not isinstance(value, torch.Tensor) or tuple(value.shape) == shape, f"{node}: {value.shape}, {shape}"
        results = []
        for index, (dims, positions) in enumerate(zip(result_dims, reading.at_results, strict=True)):
            fill = None if several else self._fill(node)
            result = PaddedTensor(dims, reading.padded(positions), node.meta, fill)
            zones = {
                positions[key]: result_zone(reading, key, index, operands.zones(key))
                for key in reading.keys
                if key in positions
            }
            part = self.emit.call(operator.getitem, new, index) if several else new
            version = Version(part, zones, self._origin(operands, shapes))
            self.versions.put(result, version, result.base)
            results.append(result)
        if several:
            self.results[node] = results
        else:
            self.tensors[node] = results[0]

    def _uniform(self, node: fx.Node, seed: fx.Node, at: frozenset[Part]) -> fx.Node:
        """Drawn part by part of each dim, as an inner one may be padded: numbers follow from the real sizes."""
        (dims,) = self._result_dims(node)

        parts = [((d, j), atom) for d, dim in enumerate(dims) for j, atom in enumerate(dim)]
        real = [atom.size for _, atom in parts]
        padded = [self.versions.length(atom, place in at) for place, atom in parts]
        numbers = self.emit.call(UNIFORM, seed, node.args[1], real, padded)
        return self.emit.view(numbers, self.versions.shape(dims, at))

    def _origin(self, operands: PaddedOperands, shapes: Sequence[tuple[int, ...]]) -> Origin | None:
        """What the op moves, where it only moves it."""
        reading, node = operands.reading, operands.reading.node
        if len(operands.read) != 1 or not keeps_values(node.target) or operands.read[0].node.op == "placeholder":
            return None
        back = {
            place: reading.at_operands[0][key]
            for key, place in reading.at_results[0].items()
            if key in reading.keys and key in reading.at_operands[0]
        }

        def again(operand: fx.Node) -> fx.Node:
            return run_locally(self._local_op(node, [operand], shapes))

        return Origin(operands.tensors[0], operands.read[0], back, again)

    def _local_op(self, node: fx.Node, operands: Sequence[fx.Node], shapes: Sequence[tuple[int, ...]]) -> LocalOp:
        place = self.analysis.places[self.analysis.folding.of[node]]
        assert place.call is not None
        assert place.op is not None
        return LocalOp(
            self.emit,
            node,
            place.call,
            place.op,
            tuple(operands),
            ((),) * len(operands),
            ((),) * len(shapes),
            tuple(shapes),
        )

    def _result_dims(self, node: fx.Node) -> list[list[list[Atom]]]:
        c = self.analysis.folding.of[node]
        form, atoms = self.analysis.unified.forms[c], self.analysis.unified.atoms[c]
        return [[atoms_of(dim, atoms) for dim in dims] for dims in form.results]

    def _fill(self, node: fx.Node) -> Zone | None:
        """The number that the op's result is everywhere."""
        if node.target in FILLS:
            filled = fill_of(node)
            return filled if is_number(filled) else None
        operands = operand_nodes(node)
        return self.tensors[operands[0]].fill if len(operands) == 1 and keeps_values(node.target) else None


def _positions(dims: Sequence[Sequence[int]], atoms: Sequence[Atom]) -> dict[Key, Part]:
    """Where each factor's atoms stand in a tensor whose dims a form describes so."""
    found: dict[Key, Part] = {}
    for d, dim in enumerate(dims):
        position = 0
        for f in dim:
            for j in range(len(atoms[f].leaves())):
                found[f, j] = (d, position)
                position += 1
    return found
