"""Padding: a program whose uneven dims are made larger, so that a mesh axis divides them, with the same results.

A pad makes one logical dim (atom) larger wherever ops may be split along it. Each op runs in one of two ways:

    padded   on operands with the larger dim, where its factor form allows a split of it: its entries along the dim do
             not mix, or are summed, multiplied out or looked up
    exact    as it was, on operands cut to their real size; its results are padded with zeros where a padded op reads

What stands in the added entries (their *zone*, `passes/zones.py`) is followed from op to op. Where a padded op would
let them into real entries, they are overwritten first: by zeros before a sum or a matrix product (one operand zero, the
other finite), by -inf before a maximum, by zeros in indices. The overwritten tensor takes the place of the old one, so
that one mask serves all later readers. What leaves the program is cut to its real size.

A parameter or input whose dim is the padded one alone (a vocabulary, an FFN width, the sequence) becomes a larger
placeholder, `Input.shape` saying what it is outside; where it is part of a dim (heads of heads x head size) it is
padded inside the graph. Outputs are cut to their size where they leave.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from passes.analysis import Analysis
from passes.dims import Atom, atoms_of, is_getitem, outputs_of, value_of
from passes.emit import emitter_like, written_anew
from passes.harmless import Key, Need, Place, Reading, fill_of, keeps_values, looked_up, needs_of, result_zone
from passes.local_op import LocalOp
from passes.localize import in_dtype, run_locally
from passes.program import Input, Output, Program
from passes.rules.call import is_tensor, operand_nodes
from passes.rules.create import FILLS, IOTAS
from passes.uniform import UNIFORM
from passes.walks import results_of
from passes.zones import Zone, is_edge, is_finite, is_number, is_pointwise, is_zero, join

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
    seen: Mapping[Pad, tuple[fx.Node, Place]]


def pad(analysis: Analysis, pads: Sequence[Pad]) -> Padded:
    """The analysed program with these dims made larger. Its fingerprint stays that of what it was made from.

    Raises:
        ValueError: a pad that names no dim of the program, or another size than that dim has.
    """
    sizes = {id(padded_atom(analysis, each)): (each, each.padded) for each in pads}
    return _Padding(analysis, sizes).padded()


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


@dataclass
class _Version:
    """A tensor with some of its places padded, and what stands there."""

    node: fx.Node
    zones: dict[Place, Zone]
    origin: _Origin | None = None


@dataclass
class _Origin:
    """What a moved tensor was made of: to overwrite entries there serves the other readers too."""

    known: _Known
    version: _Version
    back: Mapping[Place, Place]
    """Places of the moved tensor -> of the other."""
    again: Callable[[fx.Node], fx.Node]
    """The move of another node."""


@dataclass
class _Known:
    """A tensor of the old program in the new one. `base` is how its op made it; other versions follow from that."""

    atoms: list[list[Atom]]
    base: frozenset[Place]
    meta: Mapping[str, Any]
    fill: Zone | None = None
    """The number that the whole tensor consists of, where it does."""
    by_phase: bool = False
    """A stored tensor: padded for forward, and again for backward."""
    versions: dict[tuple[frozenset[Place], str], _Version] = field(default_factory=dict)


class _Padding:
    """The new graph under construction."""

    def __init__(self, analysis: Analysis, sizes: Mapping[int, tuple[Pad, int]]) -> None:
        self.analysis = analysis
        self.program = analysis.program
        self.sizes = sizes
        self.emit = emitter_like(self.program.graph.graph)
        self.known: dict[fx.Node, _Known] = {}
        self.results: dict[fx.Node, list[_Known]] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.masks: dict[tuple[Any, ...], fx.Node] = {}
        self.dense: dict[fx.Node, fx.Node] = {}
        self.seen: dict[Pad, tuple[fx.Node, Place]] = {}

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
                self._pick(node)
            elif node.op == "call_function":
                self._run(node)
        outputs, values = self._outputs(inputs)
        self.emit.graph.output(tuple(values))
        self.emit.graph.eliminate_dead_code()
        program = written_anew(self.program, self.emit)
        alive = set(program.graph.graph.nodes)
        seen = {each: where for each, where in self.seen.items() if where[0] in alive}
        return Padded(replace(program, inputs=tuple(inputs), outputs=outputs), seen)

    # -- what comes in and goes out ------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, given: Input) -> Input:
        new = self._copy(node)
        if not is_tensor(node):
            return given
        known = self._whole(node, new)
        known.by_phase = given.kind in ("parameter", "buffer")
        if known.by_phase:  # what is padded or cut of it is its layer's work
            known.meta = {**known.meta, "module": given.name.rpartition(".")[0]}
        known.base = frozenset(
            (d, 0)
            for d, dim in enumerate(known.atoms)
            if given.kind in ("parameter", "input") and len(dim) == 1 and id(dim[0]) in self.sizes
        )
        if not known.base:
            return given
        value = node.meta["val"]
        with self.emit.mode:
            new.meta["val"] = torch.empty(self._shape(known.atoms, known.base), dtype=value.dtype)
        known.versions.clear()  # the placeholder is no exact version any more
        self._put(known, _Version(new, dict.fromkeys(known.base, 0)), known.base)
        return replace(given, shape=tuple(int(n) for n in value.shape))

    def _outputs(self, inputs: Sequence[Input]) -> tuple[tuple[Output, ...], list[Any]]:
        found = []
        shapes = {given.name for given in inputs if given.shape is not None and given.kind == "parameter"}
        by_name = {given.name: node for given, node in self._given()}
        values: list[Any] = []
        returned = results_of(self.program.graph.graph)
        for (out, node, _, _), old in zip(outputs_of(self.program), returned, strict=True):
            if node is None:
                found.append(out)
                values.append(self.copies[old] if isinstance(old, fx.Node) else old)
                continue
            wanted: frozenset[Place] = frozenset()
            if out.kind == "gradient" and out.name in shapes:
                wanted = self.known[by_name[out.name]].base
            elif out.kind == "output":  # it is cut where it leaves, so that no rank needs the dim whole for that
                known = self.known[node]
                wanted = frozenset(place for place in known.base if len(known.atoms[place[0]]) == 1)
                if wanted:
                    out = replace(out, shape=tuple(int(n) for n in node.meta["val"].shape))
            found.append(out)
            version = self._version(node, wanted, "backward" if out.kind == "gradient" else "forward")
            for place in wanted if out.kind == "gradient" else ():
                if not is_zero(version.zones[place]):
                    self._overwrite(self.known[node], version, place, 0, {**_meta(node), "phase": "backward"})
            values.append(version.node)
        return tuple(found), values

    def _given(self) -> list[tuple[Input, fx.Node]]:
        nodes = self.program.graph.graph.find_nodes(op="placeholder")
        return list(zip(self.program.inputs, nodes, strict=True))

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
        if node in self.known:
            return self._version(node, frozenset(), phase).node
        return self.copies[node]

    def _dense(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """`new` as contiguous as `old` was before it was padded and cut."""
        if not is_tensor(old) or not old.meta["val"].is_contiguous() or new.meta["val"].is_contiguous():
            return new
        if new not in self.dense:
            self.emit.meta = _meta(new)
            self.dense[new] = self.emit.call(aten.clone.default, new, memory_format=torch.contiguous_format)
        return self.dense[new]

    def _whole(self, node: fx.Node, new: fx.Node) -> _Known:
        """`new` as the exact version of `node`."""
        atoms = self.analysis.unified.dims(value_of(node, self.analysis.folding))
        known = _Known(atoms, frozenset(), node.meta)
        self.known[node] = known
        self._put(known, _Version(new, {}), frozenset())
        return known

    def _pick(self, node: fx.Node) -> None:
        made = self.results[node.args[0]][node.args[1]]  # type: ignore[index]
        self.known[node] = made

    def _run(self, node: fx.Node) -> None:
        reading = self._reading(node)
        if reading.keys:
            before = list(self.emit.graph.nodes)[-1]
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
        whole = [id(atom) in self.sizes for atom in atoms] == [True]  # of size 1 it has no part
        if not whole or "end" not in names or value.dtype.is_floating_point:
            return False
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        start, step = (in_dtype(given.get(name, number), value.dtype) for name, number in (("start", 0), ("step", 1)))
        length = self.sizes[id(atoms[0])][1]
        nowhere = int(min(0, start, start + step * length)) - _APART
        if nowhere < torch.iinfo(value.dtype).min:
            return False
        self.emit.meta = _meta(node)
        new = self.emit.call(aten.arange.start_step, start, start + step * length, step, **node.kwargs)
        known = self.known[node] = _Known(dims, frozenset({(0, 0)}), node.meta)
        version = _Version(new, {(0, 0): "finite"})
        self._put(known, version, known.base)
        self._overwrite(known, version, (0, 0), nowhere, _meta(node))
        version.zones[0, 0] = "nowhere"
        return True

    def _results(self, node: fx.Node, new: fx.Node) -> None:
        value = node.meta["val"]
        if not isinstance(value, list | tuple):
            return
        made = []
        for index, (part, dims) in enumerate(zip(value, self._result_dims(node), strict=True)):
            known = _Known(dims, frozenset(), node.meta)
            made.append(known)
            if not isinstance(part, torch.Tensor):
                continue
            picked = self.emit.graph.call_function(operator.getitem, (new, index))
            picked.meta = {**_meta(node), "val": part}
            self._put(known, _Version(picked, {}), frozenset())
        self.results[node] = made

    def _drop_after(self, before: fx.Node) -> None:
        kept = {version.node for known in self.known.values() for version in known.versions.values()}
        kept |= set(self.masks.values())
        for node in reversed(list(self.emit.graph.nodes)):
            if node is before:
                return
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
            if id(leaf) in self.sizes
        }
        if not padded or node.target in IOTAS:
            return Reading(node, place.call, form, {}, (), ())
        at_operands = tuple(_positions(dims, atoms) for dims in form.operands)
        at_results = tuple(_positions(dims, atoms) for dims in form.results)
        for operand, dims, positions in zip(operands, form.operands, at_operands, strict=True):
            theirs = self.known[operand].atoms
            for d, dim in enumerate(dims):
                if [id(a) for a in atoms_of(dim, atoms)] != [id(a) for a in theirs[d]]:
                    for key in [key for key, (dd, _) in positions.items() if dd == d]:
                        padded.pop(key, None)
        reading = Reading(node, place.call, form, padded, at_operands, at_results)
        needs = needs_of(reading)
        return replace(reading, keys={key: leaf for key, leaf in padded.items() if needs[key] is not None})

    def _run_padded(self, node: fx.Node, reading: Reading) -> None:
        phase = node.meta.get("phase", "forward")
        operands = operand_nodes(node)
        versions = [
            self._version(x, _places(reading, positions), phase)
            for x, positions in zip(operands, reading.at_operands, strict=True)
        ]
        needs = needs_of(reading)
        for key in reading.keys:
            for need in needs[key] or ():
                self._meet(reading, key, need, operands, versions)
        self._turn_away(reading, versions)
        shapes = [
            self._shape(dims, _places(reading, positions))
            for dims, positions in zip(self._result_dims(node), reading.at_results, strict=True)
        ]
        self.emit.meta = _meta(node)
        if node.target is UNIFORM:
            new = self._uniform(node, versions[0].node, _places(reading, reading.at_results[0]))
        else:
            new = run_locally(self._local_op(node, versions, shapes))
        values = new.meta["val"] if isinstance(new.meta["val"], list | tuple) else [new.meta["val"]]
        for value, shape in zip(values, shapes, strict=True):
            assert not isinstance(value, torch.Tensor) or tuple(value.shape) == shape, f"{node}: {value.shape}, {shape}"
        several = isinstance(new.meta["val"], list | tuple)
        made = []
        for index, (dims, positions) in enumerate(zip(self._result_dims(node), reading.at_results, strict=True)):
            known = _Known(dims, _places(reading, positions), node.meta, fill=None if several else self._fill(node))
            zones = {
                positions[key]: result_zone(reading, key, index, self._zones(reading, key, operands, versions))
                for key in reading.keys
                if key in positions
            }
            part = self.emit.call(operator.getitem, new, index) if several else new
            origin = self._origin(node, reading, operands, versions, shapes)
            self._put(known, _Version(part, zones, origin), known.base)
            made.append(known)
        if several:
            self.results[node] = made
        else:
            self.known[node] = made[0]

    def _uniform(self, node: fx.Node, seed: fx.Node, at: frozenset[Place]) -> fx.Node:
        """Drawn part by part of each dim, as an inner one may be padded: numbers follow from the real sizes."""
        (dims,) = self._result_dims(node)

        def drawn(at: frozenset[Place]) -> list[int]:
            return [self._length(atom, (d, j) in at) for d, dim in enumerate(dims) for j, atom in enumerate(dim)]

        numbers = self.emit.call(UNIFORM, seed, node.args[1], drawn(frozenset()), drawn(at))
        return self.emit.view(numbers, self._shape(dims, at))

    def _origin(
        self,
        node: fx.Node,
        reading: Reading,
        operands: Sequence[fx.Node],
        versions: Sequence[_Version],
        shapes: Sequence[tuple[int, ...]],
    ) -> _Origin | None:
        if len(operands) != 1 or not keeps_values(node.target) or versions[0].node.op == "placeholder":
            return None
        back = {
            place: reading.at_operands[0][key]
            for key, place in reading.at_results[0].items()
            if key in reading.keys and key in reading.at_operands[0]
        }

        def again(operand: fx.Node) -> fx.Node:
            return run_locally(self._local_op(node, [_Version(operand, {})], shapes))

        return _Origin(self.known[operands[0]], versions[0], back, again)

    def _local_op(self, node: fx.Node, versions: Sequence[_Version], shapes: Sequence[tuple[int, ...]]) -> LocalOp:
        place = self.analysis.places[self.analysis.folding.of[node]]
        assert place.call is not None
        assert place.op is not None
        return LocalOp(
            self.emit,
            node,
            place.call,
            place.op,
            tuple(version.node for version in versions),
            ((),) * len(versions),
            ((),) * len(shapes),
            tuple(shapes),
        )

    def _result_dims(self, node: fx.Node) -> list[list[list[Atom]]]:
        c = self.analysis.folding.of[node]
        form, atoms = self.analysis.unified.forms[c], self.analysis.unified.atoms[c]
        return [[atoms_of(dim, atoms) for dim in dims] for dims in form.results]

    def _zones(
        self, reading: Reading, key: Key, operands: Sequence[fx.Node], versions: Sequence[_Version]
    ) -> list[Zone]:
        found: list[Zone] = []
        for operand, version, positions in zip(operands, versions, reading.at_operands, strict=True):
            fill = self.known[operand].fill
            beside: Zone = "finite" if "nowhere" in version.zones.values() else "real"
            found.append(version.zones[positions[key]] if key in positions else beside if fill is None else fill)
        return found

    def _fill(self, node: fx.Node) -> Zone | None:
        """The number that the op's result is everywhere."""
        if node.target in FILLS:
            filled = fill_of(node)
            return filled if is_number(filled) else None
        operands = operand_nodes(node)
        return self.known[operands[0]].fill if len(operands) == 1 and keeps_values(node.target) else None

    def _meet(
        self, reading: Reading, key: Key, need: Need, operands: Sequence[fx.Node], versions: list[_Version]
    ) -> None:
        """Overwrite added entries where an op needs others than stand there."""
        zones = self._zones(reading, key, operands, versions)

        def overwrite(operand: int, fill: float | int) -> None:
            place = reading.at_operands[operand].get(key)
            if place is not None:
                self._overwrite(self.known[operands[operand]], versions[operand], place, fill, _meta(reading.node))

        zone = zones[need.operand]
        if (
            (need.what == "zero" and not is_zero(zone))
            or (need.what in ("finite", "summable") and not is_finite(zone))
            or (need.what == "summable" and is_edge(zone))
        ):
            overwrite(need.operand, 0)
        elif need.what == "lowest":
            dtype = reading.call.operands[need.operand].dtype
            lowest = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
            if not is_number(zones[need.operand]) or zones[need.operand] != lowest:
                overwrite(need.operand, lowest)
        elif need.what == "product":
            pair = (need.operand, need.other)
            for k in pair:
                if not is_finite(zones[k]):
                    overwrite(k, 0)
            if not any(is_zero(zone) for zone in self._zones(reading, key, operands, versions)):
                overwrite(max(pair, key=lambda k: (_phase(operands[k]) == "backward", -_size(versions[k]))), 0)

    def _turn_away(self, reading: Reading, versions: list[_Version]) -> None:
        """Indices that name added rows go behind all rows: they are no row's, and a look-up is to find none there."""
        dim = looked_up(reading)
        if dim is None or all(d != dim for d, _ in versions[0].zones):
            return
        emit, (source, index) = self.emit, versions
        emit.meta = _meta(reading.node)
        added = emit.call(aten.ge.Scalar, index.node, reading.call.operands[0].shape[dim])
        behind = emit.call(aten.masked_fill.Scalar, index.node, added, emit.shape(source.node)[dim])
        versions[1] = _Version(behind, index.zones)

    # -- versions of a tensor ------------------------------------------------------------------------------------------

    def _put(self, known: _Known, version: _Version, places: frozenset[Place], phase: str = "") -> None:
        known.versions[places, phase if known.by_phase else ""] = version
        for place in places:
            atom = known.atoms[place[0]][place[1]]
            if version.node.op == "call_function" and version.node.target not in (aten.constant_pad_nd.default,):
                self.seen.setdefault(self.sizes[id(atom)][0], (version.node, place))

    def _version(self, node: fx.Node, places: frozenset[Place], phase: str) -> _Version:
        """The tensor with exactly these places padded."""
        known = self.known[node]
        key = (places, phase if known.by_phase else "")
        if key not in known.versions:
            at, version = known.base, known.versions[known.base, ""]
            self.emit.meta = {key: known.meta.get(key, "") for key in ("module", "source")} | {"phase": phase}
            for place in sorted(at - places):
                at = at - {place}
                zones = {p: z for p, z in version.zones.items() if p != place}
                version = _Version(self._resized(known, version.node, at | {place}, place, None), zones)
            for place in sorted(places - at):
                fill: Any = known.fill if known.fill is not None else 0
                zones = _overwritten(version.zones, place, fill)
                new = self._resized(known, version.node, at, place, fill)
                at = at | {place}
                version = _Version(new, zones)
            self._put(known, version, places, phase)
        return known.versions[key]

    def _resized(self, known: _Known, node: fx.Node, at: frozenset[Place], place: Place, fill: Any) -> fx.Node:
        """`node`, whose places `at` are padded, with `place` cut to its real size, or padded by `fill`."""
        emit, (d, part) = self.emit, place
        lengths = [self._length(atom, (d, j) in at) for j, atom in enumerate(known.atoms[d])]
        atom = known.atoms[d][part]
        shape, before, after = emit.shape(node), math.prod(lengths[:part]), math.prod(lengths[part + 1 :])
        split = (*([before] if before > 1 else []), lengths[part], *([after] if after > 1 else []))
        dim = d + (before > 1)
        x = emit.view(node, (*shape[:d], *split, *shape[d + 1 :]))
        size = atom.size
        if fill is None:
            x = emit.call(aten.slice.Tensor, x, dim, 0, size)
        else:
            size = self.sizes[id(atom)][1]
            behind = len(emit.shape(x)) - dim - 1
            x = emit.call(aten.constant_pad_nd.default, x, [0, 0] * behind + [0, size - atom.size], fill)
        return emit.view(x, (*shape[:d], before * size * after, *shape[d + 1 :]))

    def _overwrite(
        self, known: _Known, version: _Version, place: Place, fill: float | int, meta: Mapping[str, Any]
    ) -> None:
        """Put `fill` into the added entries; the result takes the version's place.

        Zeros go to where a moved tensor comes from: what else is made of that is zero there too, then.
        """
        emit, (d, part) = self.emit, place
        at = frozenset(version.zones)
        origin = version.origin
        if fill == 0 and origin is not None and place in origin.back and origin.known.meta["phase"] == meta["phase"]:
            self._overwrite(origin.known, origin.version, origin.back[place], fill, meta)
            emit.meta = meta
            version.node = origin.again(origin.version.node)
            version.zones = _overwritten(version.zones, place, fill)
            return
        lengths = tuple(self._length(atom, (d, j) in at) for j, atom in enumerate(known.atoms[d]))
        behind = len(emit.shape(version.node)) - d - 1
        mask = self._beyond(lengths, part, known.atoms[d][part].size, behind)
        emit.meta = meta
        version.node = emit.call(aten.masked_fill.Scalar, version.node, mask, fill)
        version.zones = _overwritten(version.zones, place, fill)
        version.origin = None  # to move that again would undo this
        self._put(known, version, at, str(meta["phase"]))

    def _beyond(self, lengths: tuple[int, ...], part: int, size: int, behind: int) -> fx.Node:
        """Mask of a dim's entries that were added at its part `part`, to be broadcast against `behind` more dims."""
        key = (lengths, part, size, behind)
        if key not in self.masks:
            emit = self.emit
            emit.meta = {"phase": "forward", "module": "", "source": ""}
            index = emit.call(aten.arange.start, 0, lengths[part], dtype=torch.int64, device=torch.device("cpu"))
            mask = emit.call(aten.ge.Scalar, index, size)
            before, after = math.prod(lengths[:part]), math.prod(lengths[part + 1 :])
            if before * after > 1:
                mask = emit.view(mask, (1, lengths[part], 1))
                mask = emit.call(aten.expand.default, mask, [before, lengths[part], after])
            self.masks[key] = emit.view(mask, (math.prod(lengths), *[1] * behind))
        return self.masks[key]

    def _length(self, atom: Atom, padded: bool) -> int:
        return self.sizes[id(atom)][1] if padded else atom.size

    def _shape(self, dims: Sequence[Sequence[Atom]], at: frozenset[Place]) -> tuple[int, ...]:
        return tuple(
            math.prod(self._length(atom, (d, j) in at) for j, atom in enumerate(dim)) for d, dim in enumerate(dims)
        )


def _places(reading: Reading, positions: Mapping[Key, Place]) -> frozenset[Place]:
    return frozenset(positions[key] for key in reading.keys if key in positions)


def _positions(dims: Sequence[Sequence[int]], atoms: Sequence[Atom]) -> dict[Key, Place]:
    """Where each factor's atoms stand in a tensor whose dims a form describes so."""
    found: dict[Key, Place] = {}
    for d, dim in enumerate(dims):
        position = 0
        for f in dim:
            for j in range(len(atoms[f].leaves())):
                found[f, j] = (d, position)
                position += 1
    return found


def _overwritten(zones: Mapping[Place, Zone], place: Place, fill: Zone) -> dict[Place, Zone]:
    """What stands in each place when one is overwritten; entries that lie in two may change in both."""
    return {p: z if z == fill else join([z, fill]) for p, z in zones.items()} | {place: fill}


def _phase(node: fx.Node) -> str:
    return str(node.meta.get("phase", "forward"))


def _size(version: _Version) -> int:
    return math.prod(version.node.meta["val"].shape)


def _meta(node: fx.Node) -> dict[str, Any]:
    return {
        "phase": node.meta.get("phase", "forward"),
        "module": node.meta.get("module", ""),
        "source": node.meta.get("source", ""),
    }
