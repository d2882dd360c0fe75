"""What a program is made of, before any mesh is known: its decisions, and how tensors run between them.

A *site* is what makes a decision: an op class, a stored tensor (parameter or buffer), something the user passes or
gets. Sites read and give values; a `Wire` is a group of alike values with the sites that read them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import fx

from passes.analysis.batch_dims import with_attending, with_batch_dims
from passes.analysis.buckets import Gradients
from passes.analysis.dims import (
    ExpandedOp,
    Unified,
    Value,
    expand,
    expanded_shape,
    is_getitem,
    outputs_of,
    unified,
    value_of,
)
from passes.analysis.flow import Flow, flow_of
from passes.analysis.fusion import Fused, Traffic, traffic
from passes.analysis.layers import Folding, fold
from passes.errors import UnsupportedOpError
from passes.program.program import Input, Output, Program
from passes.rules.call import Call, call_of, facts_of, is_tensor
from passes.rules.discover import discover, form_of_rule
from passes.rules.form import Form, FormBuilder
from passes.rules.matmul import PRODUCTS
from passes.rules.table import form_of

SiteKind = Literal["op", "stored", "given", "returned"]


@dataclass(frozen=True)
class OpenSite:
    """A site before any mesh gives it options (`space.Site`): what one decision is about.

    `name` is the op, or the name pattern of a parameter or input. `count` is how many alike nodes it stands for.
    """

    kind: SiteKind
    name: str
    count: int
    call: Call | None = None
    op: ExpandedOp | None = None
    phase: str = "forward"
    dims: tuple[tuple[int, ...], ...] = ()
    """Of a stored, given or returned tensor: per dim, the sizes of its atoms."""
    itemsize: int = 4
    given: Input | None = None
    out: Output | None = None
    traffic: Traffic | None = None
    """Of a pointwise op, copy or reduction: what of its tensors moves."""

    @property
    def parameter(self) -> Input | None:
        """The parameter that is stored; None for anything else."""
        return self.given if self.given is not None and self.given.kind == "parameter" else None


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
class Analysis:
    """Sites 0..len(folding.members)-1 are the folded nodes, then come the outputs that are no gradients."""

    program: Program
    folding: Folding
    flow: Flow
    unified: Unified
    places: tuple[OpenSite, ...]
    wires: tuple[Wire, ...]
    replicated: tuple[str, ...]
    """Ops that no rule knows and none was found for; they run whole on every rank."""
    found: Mapping[str, str]
    """Calls that no table knows -> the rule that trying them gave (`discover`), "" where they are whole."""
    batch_atoms: frozenset[int]
    sequence_atoms: frozenset[int]
    from_parameters: frozenset[int]
    """Sites that compute from parameters alone (a transposed weight)."""
    from_data: frozenset[int]
    """Sites that compute from what the user passes; the others are the same for every batch (masks, positions)."""
    class_atoms: frozenset[int]
    """Dims that products with weights make and that no product contracts or op needs whole: vocabularies, classes."""
    contracted_atoms: frozenset[int]
    """Dims that products with weights contract: hidden sizes, heads, FFN widths."""
    blocked_atoms: frozenset[int]
    """Dims that some op on the user's data needs whole."""
    weight_dims: tuple[tuple[tuple[int, int], ...], ...]
    """The dims of parameters that consist of several atoms: (identity, size) of each, outermost first."""
    added_in: Mapping[Value, torch.dtype] = field(default_factory=dict)
    """Values on their way to parameters' gradients and nowhere else, whose partial sums are added in another dtype than
    theirs."""

    @cached_property
    def gradients(self) -> Gradients:
        """Which values lead to one parameter's gradient alone."""
        return Gradients(self.program)

    def shape_of(self, value: Value) -> tuple[int, ...]:
        """Expanded shape of a value."""
        place = self.places[value.op]
        return expanded_shape(place.op.results[value.result] if place.op else place.dims)

    def itemsize_of(self, value: Value) -> int:
        """Bytes per element of a value."""
        place = self.places[value.op]
        if place.call is None:
            return place.itemsize
        facts = place.call.results[value.result]
        return facts.dtype.itemsize if facts else 1

    def dtype_of(self, value: Value) -> torch.dtype:
        """Dtype of an op's result."""
        call = self.places[value.op].call
        assert call is not None
        facts = call.results[value.result]
        assert facts is not None
        return facts.dtype


def _form(call: Call, found: dict[str, str]) -> Form:
    """The form of a call. A rule that no table has is taken from `found`, or discovered and added to it."""
    try:
        return form_of(call)
    except UnsupportedOpError:
        key = str(call)
        rule = found[key] = found[key] if key in found else discover(call).rule
        return form_of_rule(call, rule)


def _plain_form(node: fx.Node) -> Form:
    facts = facts_of(node.meta.get("val"))
    build = FormBuilder()
    return build.form([], [build.dims(facts.shape)] if facts else [])


def analyse(program: Program, known: Mapping[str, str] | None = None, *, fused: Fused = True) -> Analysis:
    """Fold the program, unify its dims, and find who reads what. The program of the result has the batch dims of its
    outputs set.

    `known`: rules of ops that no table has, found before (by the rank that planned). `fused`: whether chains of
    pointwise ops run as one kernel.
    """
    folding = fold(program)
    found = dict(known or {})
    calls, forms = _calls(folding, found)
    atoms = unified(program, folding, forms)
    ops = expand(atoms)
    batch, sequence = _data_atoms(program, folding, ops)
    program = with_batch_dims(program, folding, atoms, batch)
    program = with_attending(program, folding, atoms, batch)
    weights = program.weights()
    moved = traffic(program.graph.graph, folding, calls, fused, weights)
    returned = _returned(program)
    places = [
        *_folded_places(program, folding, calls, ops, moved, weights), *_returned_places(folding, ops, returned)
    ]  # fmt: skip
    flow = flow_of(program, folding)
    wires = _wires(program, folding, flow, returned, weights)
    reads = _reads(wires)
    from_parameters = _from_parameters(places, reads)
    from_data = _from_data(places, reads)
    class_atoms, contracted_atoms = _weight_atoms(places, wires, from_parameters)
    return Analysis(
        program=program,
        folding=folding,
        flow=flow,
        unified=atoms,
        places=tuple(places),
        wires=wires,
        replicated=tuple(dict.fromkeys(str(call.target) for call in calls if call and found.get(str(call)) == "")),
        found=found,
        batch_atoms=batch,
        sequence_atoms=sequence,
        from_parameters=from_parameters,
        from_data=from_data,
        class_atoms=class_atoms,
        contracted_atoms=contracted_atoms,
        blocked_atoms=frozenset().union(*(_blocked(places[index]) for index in from_data)),
        weight_dims=_weight_dims(places, ops),
        added_in=_added_in(places, wires),
    )


def _calls(folding: Folding, found: dict[str, str]) -> tuple[list[Call | None], list[Form]]:
    """Per site the call (alike ones are one object) and its form; None and a plain form where it is no op's."""
    by_call: dict[str, tuple[Call, Form]] = {}
    calls: list[Call | None] = []
    forms: list[Form] = []
    for members in folding.members:
        node = members[0]
        if node.op == "call_function" and not is_getitem(node):
            call = call_of(node)
            key = str(call)
            if key not in by_call:
                by_call[key] = (call, _form(call, found))
            calls.append(by_call[key][0])
            forms.append(by_call[key][1])
        else:
            calls.append(None)
            forms.append(_plain_form(node) if not is_getitem(node) else FormBuilder().form([], []))
    return calls, forms


def _folded_places(
    program: Program,
    folding: Folding,
    calls: Sequence[Call | None],
    ops: Sequence[ExpandedOp],
    moved: Sequence[Traffic | None],
    weights: Mapping[fx.Node, int],
) -> Iterator[OpenSite]:
    """The folded nodes: ops, what is stored and what is given."""
    inputs = program.placeholders
    for members, call, op, moves in zip(folding.members, calls, ops, moved, strict=True):
        node, count = members[0], sum(weights.get(member, 1) for member in members)
        if call is not None:
            phase = node.meta.get("phase", "forward")
            yield OpenSite("op", str(call.target), count, call, op, phase, traffic=moves)
            continue
        given = inputs.get(node)
        facts = facts_of(node.meta.get("val"))
        kind: SiteKind = "stored" if given is not None and given.kind in ("parameter", "buffer") else "given"
        yield OpenSite(
            kind,
            given.name if given else str(node.target),
            count,
            dims=op.results[0] if op.results else (),
            itemsize=facts.dtype.itemsize if facts else 8,
            given=given,
        )


def _returned(program: Program) -> list[tuple[fx.Node, Output]]:
    """What the step gives to its caller: all but parameters' gradients, which go to where these are stored."""
    return [
        (node, out)
        for out, node, _, given in outputs_of(program)
        if node is not None and not (out.kind == "gradient" and given is not None and given.kind == "parameter")
    ]


def _returned_places(
    folding: Folding, ops: Sequence[ExpandedOp], returned: Sequence[tuple[fx.Node, Output]]
) -> Iterator[OpenSite]:
    for node, out in returned:
        value = value_of(node, folding)
        dims, itemsize = ops[value.op].results[value.result], node.meta["val"].dtype.itemsize
        yield OpenSite("returned", out.name, 1, dims=dims, itemsize=itemsize, out=out)


def _weight_dims(places: Sequence[OpenSite], ops: Sequence[ExpandedOp]) -> tuple[tuple[tuple[int, int], ...], ...]:
    found: dict[tuple[tuple[int, int], ...], None] = {}
    for place, op in zip(places, ops, strict=False):
        if place.parameter is not None:
            for sizes, atoms in zip(op.results[0], op.result_atoms[0], strict=True):
                if len(sizes) > 1:
                    found[tuple(zip(atoms, sizes, strict=True))] = None
    return tuple(found)


def _added_in(places: Sequence[OpenSite], wires: Sequence[Wire]) -> dict[Value, torch.dtype]:
    """The dtype in which partial sums are added, for values that lead to parameters' gradients alone.

    Such a value comes from backward ops on such values alone. A plan may add its terms before the gradient is finished,
    such as before a transpose; then it uses the dtype of the gradient's reduction.
    """
    given = [place.given.dtypes for place in places if place.given is not None and place.given.dtypes is not None]
    wanted = {dtypes.reduced for dtypes in given if dtypes.reduced != dtypes.computed}
    if not wanted:
        return {}
    ports: dict[Value, list[Port]] = defaultdict(list)
    reads: dict[int, set[Value]] = defaultdict(set)
    gives: dict[int, set[Value]] = defaultdict(set)
    for wire in wires:
        ports[wire.value] += wire.ports
        gives[wire.value.op].add(wire.value)
        for port in wire.ports:
            if not port.stores:
                reads[port.site].add(wire.value)
    backward = {i for i, place in enumerate(places) if place.kind == "op" and place.phase == "backward"}
    found = {value for value in ports if value.op in backward}
    while True:
        passing = {site for site in backward if gives[site] and gives[site] | reads[site] <= found}
        kept = {value for value in found if all(port.stores or port.site in passing for port in ports[value])}
        if kept == found:
            return dict.fromkeys(found, wanted.pop())
        found = kept


def _blocked(place: OpenSite) -> frozenset[int]:
    """Atoms in the op's results that it needs whole."""
    if place.op is None:
        return frozenset()
    free = {leaf.atom for leaf in place.op.leaves}
    return frozenset(atom for dims in place.op.result_atoms for dim in dims for atom in dim if atom not in free)


def _data_atoms(program: Program, folding: Folding, ops: Sequence[ExpandedOp]) -> tuple[frozenset[int], frozenset[int]]:
    """Identities of the batch's and the sequence's logical dims, read off what the user passes."""
    batch, sequence = set(), set()
    for node, given in program.placeholders.items():
        if given.kind != "input" or given.batch_dim is None or not is_tensor(node):
            continue
        atoms = ops[folding.of[node]].result_atoms[0]
        if atoms[given.batch_dim]:
            batch.add(atoms[given.batch_dim][0])
        if len(atoms) > given.batch_dim + 1 and atoms[given.batch_dim + 1]:
            sequence.add(atoms[given.batch_dim + 1][0])
    return frozenset(batch), frozenset(sequence - batch)


def _wires(
    program: Program,
    folding: Folding,
    flow: Flow,
    returned: Sequence[tuple[fx.Node, Output]],
    weights: Mapping[fx.Node, int],
) -> tuple[Wire, ...]:
    """Values grouped by class and by who reads them."""
    ports: dict[fx.Node, dict[Port, None]] = defaultdict(dict)
    for node, operands in flow.operands.items():
        for index, operand in enumerate(operands):
            ports[operand][Port(folding.of[node], index, node.meta.get("phase", "forward"))] = None
    for site, (node, out) in enumerate(returned, start=len(folding.members)):
        phase = "forward" if out.kind != "gradient" else "backward"
        ports[flow.source.get(node, node)][Port(site, 0, phase)] = None
    for out, gradient, placeholder, given in outputs_of(program):
        if out.kind == "gradient" and gradient is not None and given is not None and given.kind == "parameter":
            assert placeholder is not None
            ports[flow.source.get(gradient, gradient)][Port(folding.of[placeholder], 0, "backward", stores=True)] = None
    grouped: dict[tuple[Value, frozenset[Port]], int] = defaultdict(int)
    order: dict[tuple[Value, frozenset[Port]], tuple[Port, ...]] = {}
    for node, read_by in ports.items():
        key = (flow.value[node], frozenset(read_by))
        grouped[key] += weights.get(node, 1)
        order.setdefault(key, tuple(read_by))
    return tuple(Wire(key[0], order[key], count) for key, count in grouped.items())


def _reads(wires: Sequence[Wire]) -> dict[int, set[int]]:
    """Per site, the sites whose values it reads; a gradient's storage reads nothing."""
    reads: dict[int, set[int]] = defaultdict(set)
    for wire in wires:
        for port in wire.ports:
            if not port.stores:
                reads[port.site].add(wire.value.op)
    return reads


def _from_parameters(places: Sequence[OpenSite], reads: Mapping[int, set[int]]) -> frozenset[int]:
    parameters = {i for i, place in enumerate(places) if place.parameter is not None}
    return _grown(parameters, reads, lambda site, found: places[site].kind == "op" and reads[site] <= found)


def _from_data(places: Sequence[OpenSite], reads: Mapping[int, set[int]]) -> frozenset[int]:
    data = {i for i, place in enumerate(places) if place.given is not None and place.given.kind in ("input", "tangent")}
    return _grown(data, reads, lambda site, found: True)


def _grown(
    sites: Iterable[int], reads: Mapping[int, set[int]], joins: Callable[[int, set[int]], bool]
) -> frozenset[int]:
    """`sites`, and then every site that reads one of those found so far and joins them."""
    found = set(sites)
    readers: dict[int, set[int]] = defaultdict(set)
    for site, sources in reads.items():
        for source in sources:
            readers[source].add(site)
    queue = list(found)
    while queue:
        for reader in readers[queue.pop()] - found:
            if joins(reader, found):
                found.add(reader)
                queue.append(reader)
    return frozenset(found)


def _weight_atoms(
    places: Sequence[OpenSite], wires: Sequence[Wire], from_parameters: frozenset[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """(class atoms, contracted atoms)."""
    weights = {(port.site, port.operand) for wire in wires if wire.value.op in from_parameters for port in wire.ports}
    made: set[int] = set()
    contracted: set[int] = set()
    other: set[int] = set()
    for index, place in enumerate(places):
        if place.call is None or place.op is None or place.phase != "forward":
            continue
        other |= _blocked(place)
        if place.call.target not in PRODUCTS:
            continue
        for leaf in place.op.leaves:
            of_weight = any(leaf.operands[k] is not None for k in range(len(leaf.operands)) if (index, k) in weights)
            if leaf.results[0] is None:
                other.add(leaf.atom)
                if of_weight:
                    contracted.add(leaf.atom)
            elif of_weight:
                made.add(leaf.atom)
    return frozenset(made - other), frozenset(contracted)
