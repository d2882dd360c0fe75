"""The search space: every class of nodes with the ways it can be laid out, and how tensors run between them.

A *site* is what makes a decision: an op class, a stored tensor (parameter or buffer), something the user passes or
gets. Sites read and give values; a `Wire` is a group of alike values with the sites that read them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from costmodel.hardware import Topology
from costmodel.layout import Layout, Partial, Replicate, Shard
from passes.dims import ExpandedOp, Value, expand, expanded_shape, is_getitem, outputs_of, value_of
from passes.errors import UnsupportedOpError
from passes.layers import Folding, fold
from passes.local import DimShard, Storage
from passes.program import Input, Output, Program
from passes.rules.call import Call, call_of, facts_of, is_tensor, operand_nodes
from passes.rules.form import Form, FormBuilder
from passes.rules.matmul import PRODUCTS
from passes.rules.table import form_of, whole_form
from passes.strategies import Option, StoredOption, op_options, plain_layouts, stored_options

SiteKind = Literal["op", "stored", "given", "returned"]


@dataclass(frozen=True)
class Site:
    """One decision.

    `options` are `Option`s of an op, or `StoredOption`s of anything else. `name` is a parameter's or input's name
    pattern, or the op. `count` is how many alike nodes it stands for.
    """

    kind: SiteKind
    name: str
    options: tuple[Option, ...] | tuple[StoredOption, ...]
    count: int
    call: Call | None = None
    op: ExpandedOp | None = None
    phase: str = "forward"
    dims: tuple[tuple[int, ...], ...] = ()
    """Of a stored, given or returned tensor: per dim, the sizes of its atoms."""
    itemsize: int = 4
    given: Input | None = None


@dataclass(frozen=True)
class Port:
    """Where a value is read: operand `operand` of site `site`; `stores` marks a gradient going to its parameter."""

    site: int
    operand: int
    phase: str
    stores: bool = False


@dataclass(frozen=True)
class Wire:
    """`count` alike values with the same readers."""

    value: Value
    ports: tuple[Port, ...]
    count: int


@dataclass(frozen=True)
class Space:
    """Everything a plan can choose from. Sites 0..len(folding.members)-1 are the folded nodes, then the outputs."""

    program: Program
    folding: Folding
    topology: Topology
    batch_axes: tuple[int, ...]
    sites: tuple[Site, ...]
    wires: tuple[Wire, ...]
    replicated: tuple[str, ...]
    """Ops that no rule knows; they run whole on every rank."""
    batch_atoms: frozenset[int]
    sequence_atoms: frozenset[int]
    from_parameters: frozenset[int]
    """Sites that compute from parameters alone (a transposed weight)."""
    from_data: frozenset[int]
    """Sites that compute from what the user passes; the others are the same for every batch (masks, positions)."""
    class_atoms: frozenset[int]
    """Dims that products with weights make and that no product contracts or op needs whole: vocabularies, classes."""

    def shape_of(self, value: Value) -> tuple[int, ...]:
        """Expanded shape of a value."""
        site = self.sites[value.op]
        return expanded_shape(site.op.results[value.result] if site.op else site.dims)

    def itemsize_of(self, value: Value) -> int:
        """Bytes per element of a value."""
        site = self.sites[value.op]
        if site.call is None:
            return site.itemsize
        facts = site.call.results[value.result]
        return facts.dtype.itemsize if facts else 1


def _form(call: Call, replicated: dict[str, None]) -> Form:
    try:
        return form_of(call)
    except UnsupportedOpError:
        replicated[str(call.target)] = None
        return whole_form(call)


def _plain_form(node: fx.Node) -> Form:
    facts = facts_of(node.meta.get("val"))
    build = FormBuilder()
    return build.form([], [build.dims(facts.shape)] if facts else [])


def batch_storage(shape: Sequence[int], batch_dim: int | None, axes: int, batch_axes: Sequence[int]) -> Storage:
    """How a tensor that the user passes is laid out: its batch dim split over the batch axes."""
    shards = tuple(DimShard(batch_dim) if batch_dim is not None and a in batch_axes else None for a in range(axes))
    return Storage(tuple(shape), shards)


def search_space(
    program: Program, topology: Topology, batch_axes: Sequence[int], stored: Mapping[str, Storage] | None = None
) -> Space:
    """All ways to lay `program` out over `topology`.

    `stored`: parameters (by name) that already lie somewhere; only the rest is chosen.

    Raises:
        ValueError: a batch that the batch axes do not divide.
    """
    folding = fold(program)
    replicated: dict[str, None] = {}
    by_call: dict[str, tuple[Call, Form]] = {}
    calls: list[Call | None] = []
    forms: list[Form] = []
    for members in folding.members:
        node = members[0]
        if node.op == "call_function" and not is_getitem(node):
            call = call_of(node)
            key = str(call)
            if key not in by_call:
                by_call[key] = (call, _form(call, replicated))
            calls.append(by_call[key][0])
            forms.append(by_call[key][1])
        else:
            calls.append(None)
            forms.append(_plain_form(node) if not is_getitem(node) else FormBuilder().form([], []))
    ops = expand(program, folding, forms)

    sizes = topology.sizes
    inputs = dict(zip(program.graph.graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    stored = stored or {}
    batch_atoms, sequence_atoms = _data_atoms(program, folding, ops)
    sites: list[Site] = []
    cache: dict[tuple[object, ...], tuple[Option, ...]] = {}
    for members, call, op in zip(folding.members, calls, ops, strict=True):
        node, count = members[0], len(members)
        if call is not None:
            signature = (
                op.linear,
                op.operands,
                op.results,
                tuple((x.size, x.operands, x.results, x.reduce) for x in op.leaves),
            )
            if signature not in cache:
                cache[signature] = op_options(op, sizes)
            sites.append(
                Site("op", str(call.target), cache[signature], count, call, op, node.meta.get("phase", "forward"))
            )
            continue
        given = inputs.get(node)
        dims = op.results[0] if op.results else ()
        facts = facts_of(node.meta.get("val"))
        itemsize = facts.dtype.itemsize if facts else 8
        sites.append(
            _plain_site(node, given, count, dims, itemsize, topology, batch_axes, stored, not program.has_loss)
        )
    returned = _returned_sites(program, folding, ops, topology, batch_axes)
    first_output = len(sites)
    sites += [site for site, _ in returned]
    wires = _wires(program, folding, [node for _, node in returned], first_output)
    return Space(
        program,
        folding,
        topology,
        tuple(batch_axes),
        tuple(sites),
        wires,
        tuple(replicated),
        batch_atoms,
        sequence_atoms,
        _from_parameters(sites, wires),
        _from_data(sites, wires),
        _class_atoms(sites, wires),
    )


def _plain_site(
    node: fx.Node,
    given: Input | None,
    count: int,
    dims: tuple[tuple[int, ...], ...],
    itemsize: int,
    topology: Topology,
    batch_axes: Sequence[int],
    stored: Mapping[str, Storage],
    average: bool,
) -> Site:
    sizes = topology.sizes
    whole = StoredOption((Replicate(),) * len(sizes), Storage(tuple(map(math.prod, dims)), (None,) * len(sizes)))
    name = given.name if given else str(node.target)
    if given is not None and given.kind == "parameter":
        options = stored_options(dims, sizes)
        if given.name in stored:
            options = tuple(o for o in options if o.storage == stored[given.name])
            if not options:
                raise ValueError(f"{given.name}: stored as {stored[given.name]}, which is no layout of this graph")
        return Site("stored", name, options, count, dims=dims, itemsize=itemsize, given=given)
    if given is not None and given.kind in ("input", "tangent") and given.batch_dim is not None:
        place = sum(len(dim) for dim in dims[: given.batch_dim])
        layout: Layout = tuple(Shard(place) if a in batch_axes else Replicate() for a in range(len(sizes)))
        ways = math.prod(sizes[a] for a in batch_axes)
        shape = tuple(map(math.prod, dims))
        atom = dims[given.batch_dim][0] if dims[given.batch_dim] else 1
        if ways > 1 and (atom % ways):
            raise ValueError(
                f"{given.name}: dim {given.batch_dim} has {shape[given.batch_dim]} entries over all ranks, which the "
                f"{ways} ranks of the batch axes do not divide; pass a batch of equal size on every data-parallel rank"
            )
        if ways == 1:
            layout = whole.layout
        storage = batch_storage(shape, given.batch_dim, len(sizes), batch_axes)
        return Site("given", name, (StoredOption(layout, storage),), count, dims=dims, itemsize=itemsize, given=given)
    if given is not None and given.kind == "tangent" and average:
        # Every data-parallel rank brings a term of its own: together they are a sum.
        partial: Layout = tuple(Partial() if a in batch_axes else Replicate() for a in range(len(sizes)))
        return Site(
            "given", name, (StoredOption(partial, whole.storage),), count, dims=dims, itemsize=itemsize, given=given
        )
    kind: SiteKind = "stored" if given is not None and given.kind == "buffer" else "given"
    return Site(kind, name, (whole,), count, dims=dims, itemsize=itemsize, given=given)


def _returned_sites(
    program: Program, folding: Folding, ops: Sequence[ExpandedOp], topology: Topology, batch_axes: Sequence[int]
) -> list[tuple[Site, tuple[fx.Node, Output]]]:
    found = []
    for out, node, _, given in outputs_of(program):
        if node is None or (out.kind == "gradient" and given is not None and given.kind == "parameter"):
            continue
        value = value_of(node, folding)
        dims = ops[value.op].results[value.result]
        sizes = topology.sizes
        shape = tuple(map(math.prod, dims))
        storage = batch_storage(shape, out.batch_dim, len(sizes), batch_axes)
        fixed: tuple[StoredOption, ...]
        if out.kind == "output" and program.has_loss and shape and out.batch_dim is not None:
            fixed = plain_layouts(dims, sizes)
        else:
            place = sum(len(dim) for dim in dims[: out.batch_dim]) if out.batch_dim is not None else 0
            split = out.batch_dim is not None and dims[out.batch_dim]
            layout: Layout = tuple(
                Shard(place) if split and a in batch_axes else Replicate() for a in range(len(sizes))
            )
            fixed = (StoredOption(layout, storage),)
        itemsize = node.meta["val"].dtype.itemsize
        found.append((Site("returned", out.name, fixed, 1, dims=dims, itemsize=itemsize), (node, out)))
    return found


def _data_atoms(program: Program, folding: Folding, ops: Sequence[ExpandedOp]) -> tuple[frozenset[int], frozenset[int]]:
    """Identities of the batch's and the sequence's logical dims, read off what the user passes."""
    batch, sequence = set(), set()
    for node, given in zip(program.graph.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
        if given.kind != "input" or given.batch_dim is None or not is_tensor(node):
            continue
        atoms = ops[folding.of[node]].result_atoms[0]
        if atoms[given.batch_dim]:
            batch.add(atoms[given.batch_dim][0])
        if len(atoms) > given.batch_dim + 1 and atoms[given.batch_dim + 1]:
            sequence.add(atoms[given.batch_dim + 1][0])
    return frozenset(batch), frozenset(sequence - batch)


def _wires(
    program: Program, folding: Folding, returned: Sequence[tuple[fx.Node, Output]], first_output: int
) -> tuple[Wire, ...]:
    """Values grouped by class and by who reads them."""
    ports: dict[fx.Node, dict[Port, None]] = defaultdict(dict)
    source: dict[fx.Node, fx.Node] = {}
    picks: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in program.graph.graph.nodes:
        if is_getitem(node):
            source[node] = picks.setdefault((node.args[0], node.args[1]), node)
        if node.op != "call_function" or is_getitem(node):
            continue
        for index, operand in enumerate(operand_nodes(node)):
            read = source.get(operand, operand)
            ports[read][Port(folding.of[node], index, node.meta.get("phase", "forward"))] = None
    for offset, (node, out) in enumerate(returned):
        phase = "forward" if out.kind != "gradient" else "backward"
        ports[source.get(node, node)][Port(first_output + offset, 0, phase)] = None
    for out, gradient, placeholder, given in outputs_of(program):
        if out.kind == "gradient" and gradient is not None and given is not None and given.kind == "parameter":
            assert placeholder is not None
            ports[source.get(gradient, gradient)][Port(folding.of[placeholder], 0, "backward", stores=True)] = None
    grouped: dict[tuple[Value, frozenset[Port]], int] = defaultdict(int)
    order: dict[tuple[Value, frozenset[Port]], tuple[Port, ...]] = {}
    for node, read_by in ports.items():
        key = (value_of(node, folding), frozenset(read_by))
        grouped[key] += 1
        order.setdefault(key, tuple(read_by))
    return tuple(Wire(key[0], order[key], count) for key, count in grouped.items())


def _from_parameters(sites: Sequence[Site], wires: Sequence[Wire]) -> frozenset[int]:
    readers: dict[int, set[int]] = defaultdict(set)
    sources: dict[int, set[int]] = defaultdict(set)
    for wire in wires:
        for port in wire.ports:
            if not port.stores:
                readers[wire.value.op].add(port.site)
                sources[port.site].add(wire.value.op)
    found = {i for i, site in enumerate(sites) if site.given is not None and site.given.kind == "parameter"}
    queue = list(found)
    while queue:
        for reader in readers[queue.pop()]:
            if reader not in found and sites[reader].kind == "op" and sources[reader] <= found:
                found.add(reader)
                queue.append(reader)
    return frozenset(found)


def _from_data(sites: Sequence[Site], wires: Sequence[Wire]) -> frozenset[int]:
    readers: dict[int, set[int]] = defaultdict(set)
    for wire in wires:
        for port in wire.ports:
            if not port.stores:
                readers[wire.value.op].add(port.site)
    found = {i for i, site in enumerate(sites) if site.given is not None and site.given.kind in ("input", "tangent")}
    queue = list(found)
    while queue:
        for reader in readers[queue.pop()] - found:
            found.add(reader)
            queue.append(reader)
    return frozenset(found)


def _class_atoms(sites: Sequence[Site], wires: Sequence[Wire]) -> frozenset[int]:
    from_parameters = _from_parameters(sites, wires)
    weights = {(port.site, port.operand) for wire in wires if wire.value.op in from_parameters for port in wire.ports}
    made: set[int] = set()
    other: set[int] = set()
    for index, site in enumerate(sites):
        if site.call is None or site.op is None or site.phase != "forward":
            continue
        free = {leaf.atom for leaf in site.op.leaves}
        other |= {atom for dims in site.op.result_atoms for dim in dims for atom in dim} - free
        if site.call.target not in PRODUCTS:
            continue
        for leaf in site.op.leaves:
            if leaf.results[0] is None:
                other.add(leaf.atom)
            elif any(leaf.operands[k] is not None for k in range(len(leaf.operands)) if (index, k) in weights):
                made.add(leaf.atom)
    return frozenset(made - other)
