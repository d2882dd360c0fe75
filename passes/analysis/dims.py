"""Logical dims: the factors of all ops unified over the graph.

Each op names its dims by factors of its own. Where a tensor flows from one op to the next, the dims must be the same:
a dim that one op reads as `m` and another as `(b s)` is `b s` for both. `unify` finds this common refinement; its
leaves are *atoms*. A tensor is then seen through its *expanded shape*, one dim per atom (`[b*s, h]` as `[b, s, h]`), on
which every layout is a plain DTensor layout: a shard of the sequence survives the flattening of batch and sequence.
Where two ops cut a dim in ways that do not divide one another, the dim cannot be split across that edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from passes.analysis.layers import Folding
from passes.program.program import Input, Output, Program
from passes.program.walks import results_of
from passes.rules.call import is_tensor, operand_nodes
from passes.rules.form import Form


class Atom:
    """A factor of the graph, refined as ops turn out to cut it; leaves are the logical dims."""

    __slots__ = ("alias", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.alias: Atom | None = None
        self.parts: tuple[Atom, ...] = ()

    def root(self) -> Atom:
        """The atom this one was found equal to."""
        atom = self
        while atom.alias is not None:
            atom = atom.alias
        return atom

    def leaves(self) -> list[Atom]:
        """The atoms it is a product of, outermost first."""
        root = self.root()
        return [leaf for part in root.parts for leaf in part.leaves()] if root.parts else [root]


def unify(left: Sequence[Atom], right: Sequence[Atom]) -> bool:
    """Make two factorings of one dim equal, refining either; False from the first cut that does not divide."""
    while True:
        xs = [leaf for atom in left for leaf in atom.leaves()]
        ys = [leaf for atom in right for leaf in atom.leaves()]
        pair = next(((x, y) for x, y in zip(xs, ys, strict=False) if x is not y), None)
        if pair is None:
            return len(xs) == len(ys)
        x, y = pair
        if x.size == y.size:
            y.alias = x
        elif y.size % x.size == 0:
            y.parts = (Atom(x.size), Atom(y.size // x.size))
        elif x.size % y.size == 0:
            x.parts = (Atom(y.size), Atom(x.size // y.size))
        else:
            return False


@dataclass(frozen=True)
class Leaf:
    """A part of a form's factor that an axis may split: where it stands in each operand and result.

    `operands` and `results` hold the positions in the expanded shape, None where the tensor lacks the factor.
    """

    size: int
    operands: tuple[int | None, ...]
    results: tuple[int | None, ...]
    reduce: str | None
    atom: int
    """Identity of the logical dim, equal for equal dims over the whole graph."""


@dataclass(frozen=True)
class ExpandedOp:
    """A class of nodes in expanded dims: what may be split, and the expanded shapes of its operands and results."""

    leaves: tuple[Leaf, ...]
    linear: tuple[frozenset[int], ...]
    operands: tuple[tuple[tuple[int, ...], ...], ...]
    """Per operand and dim, the sizes of the atoms it consists of; `expanded_shape` flattens it."""
    results: tuple[tuple[tuple[int, ...], ...], ...]
    result_atoms: tuple[tuple[tuple[int, ...], ...], ...]
    """Per result and dim, the identities of its atoms."""


def expanded_shape(dims: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape with one dim per atom."""
    return tuple(size for dim in dims for size in dim)


def own_shape(dims: Sequence[Sequence[int]], expanded: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor whose expanded shape is `expanded`, with as many atoms per dim as `dims` has."""
    shape, start = [], 0
    for dim in dims:
        shape.append(math.prod(expanded[start : start + len(dim)]))
        start += len(dim)
    return tuple(shape)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the folded graph: result `result` of class `op`."""

    op: int
    result: int


def value_of(node: fx.Node, folding: Folding) -> Value:
    """The value a node stands for; a getitem stands for one result of its operand."""
    if is_getitem(node):
        return Value(folding.of[node.args[0]], node.args[1])  # type: ignore[index,arg-type]
    return Value(folding.of[node], 0)


def is_getitem(node: fx.Node) -> bool:
    """Whether the node picks one result of an op with several."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def outputs_of(program: Program) -> list[tuple[Output, fx.Node | None, fx.Node | None, Input | None]]:
    """Per output: what it is, its node (None where it is no tensor), and the input it belongs to, if any.

    A gradient belongs to its parameter or input, a new buffer to the old one: they are stored alike.
    """
    by_name = {
        given.name: (node, given)
        for node, given in program.placeholders.items()
        if given.kind in ("parameter", "buffer", "input")
    }
    found = []
    for out, node in zip(program.outputs, results_of(program.graph.graph), strict=True):
        tensor = node if isinstance(node, fx.Node) and is_tensor(node) else None
        placeholder, given = by_name[out.name] if out.kind != "output" else (None, None)
        found.append((out, tensor, placeholder, given))
    return found


def atoms_of(dim: Sequence[int], factors: Sequence[Atom]) -> list[Atom]:
    """The atoms of a dim that a form describes by these factors, outermost first."""
    return [leaf for factor in dim for leaf in factors[factor].leaves()]


@dataclass(frozen=True)
class Unified:
    """The factors of all classes as atoms: `atoms[c][f]` is what factor f of class c turned out to be."""

    forms: tuple[Form, ...]
    atoms: tuple[tuple[Atom, ...], ...]
    edges: tuple[tuple[int, int, Value], ...]
    """(class, operand, value that it reads there)."""

    def dims(self, value: Value) -> list[list[Atom]]:
        """Per dim of a value, the atoms it consists of."""
        return [atoms_of(dim, self.atoms[value.op]) for dim in self.forms[value.op].results[value.result]]


def unified(program: Program, folding: Folding, forms: Sequence[Form]) -> Unified:
    """Unify the dims of all classes; `forms[c]` is the factor form of class c (placeholders: no operands)."""
    atoms = tuple(tuple(Atom(size) for size in form.sizes) for form in forms)
    edges: dict[tuple[int, int, Value], None] = {}
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or is_getitem(node):
            continue
        op = folding.of[node]
        for index, operand in enumerate(operand_nodes(node)):
            edges[op, index, value_of(operand, folding)] = None

    def dims_of_value(value: Value) -> list[list[Atom]]:
        dims = forms[value.op].results[value.result]
        return [[atoms[value.op][f] for f in dim] for dim in dims]

    for op, index, value in edges:
        for factors, theirs in zip(forms[op].operands[index], dims_of_value(value), strict=True):
            unify(theirs, [atoms[op][f] for f in factors])
    for _, second, first, _ in outputs_of(program):
        if first is None or second is None:
            continue
        pair = dims_of_value(value_of(first, folding)), dims_of_value(value_of(second, folding))
        for mine, theirs in zip(*pair, strict=True):
            unify(mine, theirs)
    return Unified(tuple(forms), atoms, tuple(edges))


def expand(of: Unified) -> tuple[ExpandedOp, ...]:
    """Every class in expanded dims."""
    producers: dict[tuple[int, int], list[Value]] = {}
    for op, index, value in of.edges:
        producers.setdefault((op, index), []).append(value)
    return tuple(
        _expanded_op(
            form,
            of.atoms[op],
            [[of.dims(v) for v in producers.get((op, k), [])] for k in range(len(form.operands))],
        )
        for op, form in enumerate(of.forms)
    )


def _leaves(dim: Sequence[Atom]) -> list[Atom]:
    return [leaf for atom in dim for leaf in atom.leaves()]


_Key = tuple[int, int]
"""Of a leaf: a factor of an op's form, and which of its leaves."""


def _expanded_op(form: Form, atoms: Sequence[Atom], producers: Sequence[Sequence[list[list[Atom]]]]) -> ExpandedOp:
    """`producers[k]` are the dims, as their producers see them, of the values that reach operand k."""
    read = [
        _operand(dims, atoms, producers[index] or [[[atoms[f] for f in dim] for dim in dims]])
        for index, dims in enumerate(form.operands)
    ]
    made = [_result_places(dims, atoms) for dims in form.results]
    blocked = set().union(*(operand.blocked for operand in read))
    leaves = tuple(
        Leaf(
            atom.size,
            tuple(operand.places.get((f, j)) for operand in read),
            tuple(places.get((f, j)) for places in made),
            form.reduces.get(f),
            id(atom),
        )
        for f in range(len(form.sizes))
        for j, atom in enumerate(atoms[f].leaves())
        if f not in form.whole and (f, j) not in blocked and not (j and f in form.leading)
    )
    results = [[_leaves([atoms[f] for f in dim]) for dim in dims] for dims in form.results]
    return ExpandedOp(
        leaves,
        form.linear,
        tuple(operand.shape for operand in read),
        tuple(tuple(tuple(leaf.size for leaf in dim) for dim in dims) for dims in results),
        tuple(tuple(tuple(id(leaf) for leaf in dim) for dim in dims) for dims in results),
    )


@dataclass(frozen=True)
class _Operand:
    """`shape`: sizes of the leaves of each dim, as the first producer has them; `places`: where in the expanded shape
    the op's own leaves are; `blocked`: those that producers do not have alike, so that no axis can split them."""

    shape: tuple[tuple[int, ...], ...]
    places: dict[_Key, int]
    blocked: set[_Key]


def _operand(dims: Sequence[Sequence[int]], atoms: Sequence[Atom], producers: Sequence[list[list[Atom]]]) -> _Operand:
    """Of an operand with these factors in its dims; of a dim, leaves up to the first that differs can be split."""
    seen = [[_leaves(dim) for dim in theirs] for theirs in producers]
    first = seen[0]
    alike = all([len(dim) for dim in other] == [len(dim) for dim in first] for other in seen)
    places: dict[_Key, int] = {}
    blocked: set[_Key] = set()
    offset = 0
    for d, dim in enumerate(dims):
        own = [((f, j), leaf) for f in dim for j, leaf in enumerate(atoms[f].leaves())]
        match = alike
        for i, (key, leaf) in enumerate(own):
            match = match and all(i < len(other[d]) and other[d][i] is leaf for other in seen)
            if match:
                places[key] = offset + i
            else:
                blocked.add(key)
        offset += len(first[d])
    return _Operand(tuple(tuple(leaf.size for leaf in dim) for dim in first), places, blocked)


def _result_places(dims: Sequence[Sequence[int]], atoms: Sequence[Atom]) -> dict[_Key, int]:
    keys = [(f, j) for dim in dims for f in dim for j in range(len(atoms[f].leaves()))]
    return {key: place for place, key in enumerate(keys)}
