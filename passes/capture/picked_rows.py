"""`picked_as_all`: rows that a model picks by a mask, as all rows, of which those not picked count for nothing.

    tokens, slots = torch.where(chosen == e)             every position of `chosen`; which of them were picked is kept
    y = expert(x[tokens]) * weights[tokens, slots, None] every row
    out.index_add_(0, tokens, y)                         with zeros where a row was not picked

How many rows a mask picks is known when the step runs, but a graph has one shape. Where the number follows from the
inputs, the graph is that of inputs which give the same; where it follows from parameters (a loop over experts, each of
which gets the tokens that a router sends it), it is another in each step. So the tracer gives `nonzero` every position,
and here each dim of picked rows is followed through the graph, backward and all, by the ops' forms (`rules`): a row
follows from its own row alone, and what is summed over rows has zeros where a row was not picked. What is done besides
(a mean over rows, rows in another order) is refused with its line.

One element of such a dim (an expert's number, of those that were hit) is there or not, as rows are.

Looking rows up by their positions moves none of them: it is a broadcast over the mask's dims, each of which may be
split, and adding to them is a sum.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from passes.capture.row_look_ups import LookUp, Rows, both, every_position, masked, packed_view, shape_of
from passes.errors import CaptureError, UnsupportedOpError
from passes.program.adder import AdderBefore, adder_before
from passes.program.provenance import place_of
from passes.rules.call import call_of, map_operands, operand_nodes
from passes.rules.form import Form
from passes.rules.table import form_of

aten = torch.ops.aten

PICKS = aten.nonzero.default
_LOOKS_UP = {aten.index.Tensor, aten._unsafe_index.Tensor}
_PUTS = {aten.index_put.default, aten._unsafe_index_put.default}
ADDS_TO = {*_PUTS, aten.index_add.default}
_BY_NUMBER = {
    *_LOOKS_UP, *ADDS_TO, aten.index_select.default, aten.gather.default, aten.scatter_add.default,
    aten.embedding.default, aten.embedding_dense_backward.default,
}  # fmt: skip
"""Ops whose whole numbers say which rows they look at."""
_SUMS = {
    aten.sum.default, aten.sum.dim_IntList, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.mv.default, aten.dot.default, aten.native_layer_norm_backward.default,
}  # fmt: skip
"""Ops that sum over what all their operands have in common, each row's part of which is zero where its operands are."""
_SAME = {
    aten.view.default, aten._unsafe_view.default, aten.clone.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims,
}  # fmt: skip
"""Ops that leave positions what they are."""


@dataclass(frozen=True)
class _Position:
    """A tensor of positions in a mask of `shape`: of every one, or the one of this `number`; with all coordinates, or
    the one along `dim`."""

    shape: tuple[int, ...]
    dim: int | None = None
    number: int | None = None

    @property
    def along(self) -> int | None:
        """The dim of the mask that its coordinates are along, if it is one."""
        return 0 if len(self.shape) == 1 else self.dim

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that it may have."""
        every = () if self.number is not None else (math.prod(self.shape),)
        if self.dim is None and len(self.shape) > 1:
            return ((*every, len(self.shape)),)
        return (every, (*every, 1))

    @property
    def index(self) -> int | None:
        """The one coordinate that it is, if it is one."""
        if self.number is None or self.along is None:
            return None
        return self.number // math.prod(self.shape[self.along + 1 :]) % self.shape[self.along]


class PickedRowsError(CaptureError):
    """Something is done with rows that parameters pick but what treats each by itself."""


_Tags = Mapping[int | None, Rows]
"""Of one tensor: the dims of which not every element is there; under None, whether the tensor is."""
_COPIES = {aten.view.default, aten._to_copy.default, aten.clone.default}
_ANY = {aten.any.default, aten.any.dim, aten.any.dims}
_COUNTS = {aten.sum.default, aten.sum.dim_IntList}
_IF_SOME = {aten.gt.Scalar: True, aten.ne.Scalar: True, aten.eq.Scalar: False}
"""What comparing a number of rows with 0 gives where there are some."""


def asked_of_mask(node: fx.Node) -> tuple[fx.Node, bool | None] | None:
    """The mask of which `node` says whether it picks any, and what it says if so; None: how many."""
    node = _original(node)
    if node.target in _IF_SOME and node.args[1] == 0:
        found = asked_of_mask(node.all_input_nodes[0])
        return (found[0], _IF_SOME[node.target]) if found is not None and found[1] is None else None
    if node.target in _ANY:
        return node.all_input_nodes[0], True
    if node.target in _COUNTS and not node.meta["val"].dtype.is_floating_point:
        return node.all_input_nodes[0], None
    return None


def _original(node: fx.Node) -> fx.Node:
    while node.target in _COPIES:
        node = node.all_input_nodes[0]
    return node


def picked_as_all(graph: fx.Graph, picks: Sequence[fx.Node], asked: Sequence[fx.Node] = ()) -> None:
    """Rewrite what `picks` lead to, in place: `nonzero` that gave every position of its mask.

    asked: what was answered as if masks picked some rows, which only is right of masks of `picks`.

    Raises:
        PickedRowsError: something is done with picked rows but what treats each by itself.
        CaptureError: something else was asked.
    """
    picked = {_text(node.all_input_nodes[0]) for node in picks}
    for node in asked:
        found = asked_of_mask(node)
        if found is not None and _text(found[0]) not in picked:
            raise CaptureError(
                f"{place_of(node)}: the model reads whether any of a tensor, which parameters say, is true. Use tensor "
                "ops (torch.where, masks) instead"
            )
    rewriting = _Rewriting(frozenset(picks))
    for node in list(graph.nodes):
        rewriting.visit(node)
    for node in picks:
        node.replace_all_uses_with(every_position(adder_before(node), shape_of(node.all_input_nodes[0])))
        graph.erase_node(node)


class _Rewriting:
    """Goes through a graph in its order."""

    def __init__(self, picks: frozenset[fx.Node]) -> None:
        self._picks = picks
        self._tags: dict[fx.Node, Any] = {}
        """`_Tags` of a tensor; a tuple of them of several."""
        self._positions: dict[fx.Node, Any] = {}
        self._of_masks: dict[Any, Rows] = {}

    def visit(self, node: fx.Node) -> None:
        """Find what of `node` is picked rows, and rewrite it where it sums or looks up."""
        if node in self._picks:
            self._pick(node)
            return
        tagged = [operand for operand in node.all_input_nodes if self._tags.get(operand)]
        if not tagged:
            return
        if node.op == "output":
            _refuse(tagged[0], "are among what the step gives, as they come")
        if node.target is operator.getitem:
            self._tags[node] = self._tags[tagged[0]][node.args[1]]
            if tagged[0] in self._positions:
                self._positions[node] = self._positions[tagged[0]][node.args[1]]
        elif not (self._taken_apart(node) or self._looked_up(node) or self._put(node)):
            known = self._positions.get(tagged[0])
            if node.target in _SAME and isinstance(known, _Position) and shape_of(node) in known.shapes:
                self._positions[node] = known
            self._by_form(node)

    # --- positions, and elements one by one ---------------------------------------------------------------------------
    def _pick(self, node: fx.Node) -> None:
        (mask,) = node.all_input_nodes
        tags = self._tags_of(mask)
        if tags.keys() - {None}:
            _refuse(node, "are picked from again")
        shape, key = shape_of(mask), (_text(mask), tags.get(None))
        if key not in self._of_masks:
            add = adder_before(node)
            picked = mask if mask.meta["val"].dtype == torch.bool else add(aten.ne.Scalar, mask, 0)
            valid = Rows(packed_view(add, picked, [math.prod(shape)]))
            self._of_masks[key] = both(add, valid, tags.get(None))
        self._tags[node] = {0: self._of_masks[key]}
        self._positions[node] = _Position(shape)

    def _taken_apart(self, node: fx.Node) -> bool:
        """Whether `node` is coordinates of positions, or single elements of picked rows."""
        if node.target not in {aten.select.int, aten.unbind.int}:
            return False
        (of,) = node.all_input_nodes
        dim = int(node.args[1] if len(node.args) > 1 else 0) % len(shape_of(of))  # type: ignore[arg-type]
        size = shape_of(of)[dim]
        one = node.target is aten.select.int
        numbers = [int(node.args[2]) % size] if one else range(size)  # type: ignore[arg-type]
        tags = [self._element(node, of, dim, number) for number in numbers]
        self._tags[node] = tags[0] if one else tuple(tags)
        if (known := self._positions.get(of)) is not None:
            of_rows = dim in self._tags_of(of)
            parts = [replace(known, number=i) if of_rows else replace(known, dim=i) for i in numbers]
            self._positions[node] = parts[0] if one else tuple(parts)
        return True

    def _element(self, node: fx.Node, of: fx.Node, dim: int, number: int) -> _Tags:
        tags = dict(self._tags_of(of))
        rows = tags.pop(dim, None)
        left: dict[int | None, Rows] = {d if d is None or d < dim else d - 1: each for d, each in tags.items()}
        if rows is not None:
            add = adder_before(node)
            left[None] = both(add, Rows(add(aten.select.int, rows.valid, 0, number)), left.get(None))
        return left

    # --- rows by their positions --------------------------------------------------------------------------------------
    def _looked_up(self, node: fx.Node) -> bool:
        """Whether `node` looks up rows by positions alone; it is replaced then."""
        if node.target not in _LOOKS_UP:
            return False
        of: Any = node.args[0]
        found = self._look_up(node, of, _indexed(node.args[1]))
        if found is None:
            return False
        add = adder_before(node)
        new = found.read(add, of)
        tags: dict[int | None, Rows] = dict(self._tags_of(of))
        if tags.keys() - {None}:
            _refuse(node, "are looked up in others")
        if found.there is not None:
            tags[None] = both(add, found.there, tags.get(None))
        if found.rows is not None:
            tags[found.first] = found.rows
        self._tags[new] = tags
        _replace(node, new)
        return True

    def _put(self, node: fx.Node) -> bool:
        """Whether `node` writes rows, or adds to them, by positions alone; it is replaced then."""
        if node.target not in ADDS_TO:
            return False
        into: Any
        values: Any
        if node.target is aten.index_add.default:
            into, dim, index, values = node.args[:4]
            at: dict[int, Any] = {int(dim) % len(shape_of(into)): index}  # type: ignore[arg-type]
            adds = node.kwargs.get("alpha", 1) == 1
            found = self._look_up(node, into, at) if adds else None
        else:
            into, indices, values, *more = node.args
            adds = bool([*more, node.kwargs.get("accumulate", False)][0])
            found = self._look_up(node, into, _indexed(indices))
            if not adds and (found is None or (found.rows and found.numbers)):
                _refuse(node, "are written to places that are not known to differ")
        if found is None:
            return False
        add, tags = adder_before(node), dict(self._tags_of(values))
        there = both(add, found.there, tags.pop(None, None))
        missing = len(found.picked_shape(into)) - len(shape_of(values))
        known = {} if found.rows is None else {found.first - missing: found.rows}
        if any(dim not in known or known[dim].valid is not rows.valid for dim, rows in tags.items()):
            _refuse(node, "are written in other places")
        if self._tags_of(into).keys() - {None}:
            _refuse(node, "are written among others")
        spread = add(aten.expand.default, values, list(found.picked_shape(into)))
        if adds:
            for dim, rows in ((found.first, found.rows), (None, there)):
                spread = masked(add, spread, dim, rows)
            new = add(aten.add.Tensor, into, found.write(add, spread, into))
        else:
            new = found.overwrite(add, spread, into, there)
        self._tags[new] = self._tags_of(into)
        _replace(node, new)
        return True

    def _look_up(self, node: fx.Node, of: fx.Node, at: Mapping[int, fx.Node]) -> LookUp | None:
        """How rows of `of` are looked up, where it is by positions of one mask and by single ones alone."""
        shape, add = shape_of(of), adder_before(node)
        if self._tags_of(of).keys() & at.keys():
            _refuse(node, "are put in another order")
        numbers: dict[int, int] = {}
        where: dict[int, int] = {}
        rows: Rows | None = None
        there: Rows | None = None
        ones = False
        for dim, index in at.items():
            known: Any = self._positions.get(index)
            if not isinstance(known, _Position):
                return None
            tags = self._tags_of(index)
            there = both(add, there, tags.get(None))
            if known.index is not None:
                numbers[dim] = min(known.index, shape[dim] - 1)
                ones = ones or len(shape_of(index)) == 1
                continue
            along = known.along
            if along is None or along in where or known.shape[along] != shape[dim] or len(shape_of(index)) != 1:
                return None
            if rows is not None and rows.valid is not tags[0].valid:
                return None
            where[along], rows, mask = dim, tags[0], known.shape
        first = min(at) if max(at) - min(at) + 1 == len(at) else 0
        return LookUp(numbers, where, mask if where else ((1,) if ones else ()), first, rows, there)

    # --- what follows -------------------------------------------------------------------------------------------------
    def _by_form(self, node: fx.Node) -> None:
        """Each row by itself, and zeros where rows are summed."""
        call = call_of(node)
        try:
            form = form_of(call)
        except UnsupportedOpError:
            _refuse(node, f"are given to {node.target}, which no table knows")
        operands = operand_nodes(node)
        factors = self._factors(node, form, operands)
        masked: set[int] = set()
        for factor in factors:
            if factor in form.whole or factor in form.leading or form.reduces.get(factor, "sum") != "sum":
                _refuse(node, f"are mixed by {node.target}")
            if factor in form.reduces:
                masked |= _summed(node, form, factor)
        if node.target in _BY_NUMBER:
            masked |= {i for i, facts in enumerate(call.operands) if not facts.dtype.is_floating_point}
        if masked:
            add = adder_before(node)
            new = {i: self._with_zeros(add, operands[i]) for i in sorted(masked)}
            node.args, node.kwargs = map_operands(node, lambda i, operand: new.get(i, operand))
        there: Rows | None = None
        for operand in operands:
            there = both(adder_before(node), there, self._tags_of(operand).get(None))
        found: list[dict[int | None, Rows]] = []
        for dims in form.results:
            if any(len(of) > 1 and not factors.keys().isdisjoint(of) for of in dims):
                _refuse(node, f"are merged with another dim by {node.target}")
            found.append({d: factors[of[0]] for d, of in enumerate(dims) if of and of[0] in factors})
            if there is not None:
                found[-1][None] = there
        self._tags[node] = found[0] if isinstance(node.meta["val"], Tensor) else tuple(found)

    def _factors(self, node: fx.Node, form: Form, operands: Sequence[fx.Node]) -> dict[int, Rows]:
        """The op's factors of which not every element is there."""
        factors: dict[int, Rows] = {}
        for operand, dims in zip(operands, form.operands, strict=True):
            for dim, rows in self._tags_of(operand).items():
                if dim is None:
                    continue
                if len(dims[dim]) != 1:
                    _refuse(node, f"are taken apart by {node.target}")
                if factors.setdefault(dims[dim][0], rows).valid is not rows.valid:
                    _refuse(node, "of two masks are taken together")
        return factors

    def _with_zeros(self, add: AdderBefore, of: fx.Node) -> fx.Node:
        for dim, rows in self._tags_of(of).items():
            of = masked(add, of, dim, rows)
        return of

    def _tags_of(self, node: Any) -> _Tags:
        found: _Tags = self._tags.get(node, {})
        return found


def _summed(node: fx.Node, form: Form, factor: int) -> frozenset[int]:
    """The operands that get zeros where `factor` is not there, so that sums leave it out."""
    having = [i for i, dims in enumerate(form.operands) if any(factor in of for of in dims)]
    if node.target in _SUMS:
        return frozenset(having)  # all: what was computed of rows that are not there may be no number
    groups = (group.intersection(having) for group in form.linear)
    if found := next(filter(None, groups), None):
        return found
    return _refuse(node, f"are summed by {node.target}")


def _text(mask: fx.Node, depth: int = 6) -> str:
    """Equal for masks that the same ops make of the same tensors."""
    mask = _original(mask)
    drawn = torch.Tag.nondeterministic_seeded in getattr(mask.target, "tags", ())
    if depth == 0 or mask.op != "call_function" or drawn:
        return mask.name
    args = fx.map_arg((mask.args, mask.kwargs), lambda node: _text(node, depth - 1))
    return f"{mask.target}{args}"


def _indexed(indices: Any) -> dict[int, fx.Node]:
    return {dim: index for dim, index in enumerate(indices) if index is not None}


def _replace(node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _refuse(node: fx.Node, what: str) -> NoReturn:
    raise PickedRowsError(
        f"{place_of(node)}: rows that a mask picks, by what parameters or chance say, {what}. Their number is another "
        "in each step, so all rows are computed and those not picked left out, which only works where each is treated "
        "by itself: compute every row and multiply what was not picked by zero"
    )
