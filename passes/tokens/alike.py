"""What is made of rows that are taken in turns: whether it tells which of them came together in a turn.

It does not where each row is treated by itself and alike in every turn, and what turns make of their rows is added up,
or put back in its place. `Walk` goes through a graph and checks that by the ops' factor forms. It is sure of nothing
else, and says of the first op that is anything else why it may matter.

Where it does matter, but to one number of each row alone (a mean over the tokens of a turn that are not ignored), those
numbers are cheap to bring together: `walked` has them read in their own order, as they stood in their own turns. What
each turn reads beside its rows, one number (its mean's divisor) or one for each of them, may then be its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes.analysis.dims import is_getitem
from passes.program.provenance import place_of
from passes.program.walks import cut_of, made_of
from passes.rules.call import Call, Operand, call_of, is_tensor, operand_nodes
from passes.rules.create import IOTAS
from passes.rules.form import Form
from passes.rules.table import rule_of
from passes.tokens.turn_states import Listed, MattersError, Own, State, Sum, Turns, Written

aten = torch.ops.aten
_ADDS = {aten.add.Tensor, aten.sub.Tensor}
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_COUNTED = {*IOTAS, torch.ops.autopar.uniform.default}
"""Ops of whose result each element depends on where it is."""
TOLD = {
    aten.view.default: "size",
    aten._unsafe_view.default: "size",
    aten.reshape.default: "shape",
    aten.expand.default: "size",
    aten.full.default: "size",
    aten.slice_backward.default: "input_sizes",
    aten.select_backward.default: "input_sizes",
}
"""Ops that are told the shape of their result, and the name of that argument."""


@dataclass
class Walk:
    """`visit` each node, in the graph's order; then `known` and `moved` say what to move."""

    turns: Turns
    known: dict[fx.Node, State] = field(default_factory=dict)
    """What depends on which rows come together."""
    moved: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """What cuts rows, or puts them in their places: (turn, rows of the whole tensor)."""
    shared: dict[tuple[fx.Node, int], int] = field(default_factory=dict)
    """(node, operand) -> the dim along which that is paired with rows, and has one and the same for each."""
    same_as: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What adds a turn's sum to zeros, or takes it from them: that sum."""
    in_order: dict[fx.Node, int] = field(default_factory=dict)
    """What reads one number of each row of a turn, of the rows that the turn has in this graph: the turn."""
    ones: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    """What a node reads beside a turn's rows, one number or one for each of them: other turns' may be others."""
    made: dict[tuple[int, int], fx.Node] = field(default_factory=dict)
    """(key, turn) -> what is made so of its rows."""
    apart: frozenset[int] = frozenset()
    """Keys of sums over rows that are to be taken in order."""
    _keys: dict[object, int] = field(default_factory=dict)
    _beside: dict[tuple[int, int], list[tuple[fx.Node, ...]]] = field(default_factory=dict)
    """(key, turn) -> the `ones` of what is alike but for these."""
    _narrow: dict[fx.Node, int] = field(default_factory=dict)
    """Keys of sums over rows of one number of each, or of all that they have."""
    _equal: dict[fx.Node, int] = field(default_factory=dict)
    """Nodes that all turns share but for which of several equal parts they are, or of several constants."""

    def visit(self, node: fx.Node) -> None:
        """Note what a node makes of rows in turns.

        Raises:
            MattersError: it may tell which of them came together.
        """
        states = [self.known[operand] for operand in node.all_input_nodes if operand in self.known]
        if not states:
            self._visit_shared(node)
        elif node.op == "output":
            source = next(operand for operand in node.all_input_nodes if operand in self.known)
            raise MattersError(place_of(source), "what a turn makes of them leaves the program")
        elif is_getitem(node):
            (state,) = states
            assert isinstance(state, Own)
            which: Any = node.args[1]
            key = self._key(state.key, which)
            self.known[node] = self._made_alike(node, Own(state.turn, (state.dims[which],), key, (key,)))
        elif any(isinstance(state, Listed) for state in states):
            self._visit_listed(node)
        else:
            found = self._together(node) or self._own(node, states)
            if found is not None and not self._is_of_all(found):
                self.known[node] = found

    def narrow_before(self, node: fx.Node) -> set[int]:
        """Keys of the sums over rows, of one number of each, that a node follows from through what is `known`."""
        behind = made_of(node.all_input_nodes, lambda each: each not in self.known)
        return {self._narrow[each] for each in behind if each in self._narrow and each in self.known}

    def of_turns(self, key: int) -> list[fx.Node]:
        """What is made alike of each turn's rows.

        Raises:
            MattersError: it is not, of some.
        """
        turns = range(len(self.turns.starts))
        found = [self.made[key, turn] for turn in turns if (key, turn) in self.made]
        if len(found) < len(turns):
            raise MattersError(place_of(found[0]), "what is made of them is not made alike in each turn")
        return found

    def beside(self, node: fx.Node) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """For each of the numbers that a node reads beside a turn's rows, where turns' are others: those of all turns.

        Raises:
            MattersError: it is not made alike in each turn.
        """
        state = self.known.get(node)
        if node not in self.ones or not isinstance(state, Own):
            return {}
        read = [self.ones[each] for each in self.of_turns(state.key)]
        found: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for one, *all_ in zip(self.ones[node], *read, strict=True):
            if found.setdefault(one, tuple(all_)) != tuple(all_):
                raise MattersError(place_of(node), "what is read beside them is not made alike in each turn")
        return {one: all_ for one, all_ in found.items() if not self._is_one(all_)}

    def _is_one(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether these are one and the same number."""
        return nodes[0].meta["val"].numel() == 1 and len({self._equal.get(each, each) for each in nodes}) == 1

    def _is_of_all(self, state: State) -> bool:
        """Whether it has the same of each turn, so that it does not tell any more which rows were in which."""
        every = len(self.turns.starts)
        if isinstance(state, Sum):
            keys, counts = {key for key, _ in state.terms}, Counter(state.terms)
            return all(len({counts[key, turn] for turn in range(every)}) == 1 for key in keys)
        return isinstance(state, Written) and len(state.turns) == every

    def _key(self, *what: object) -> int:
        return self._keys.setdefault(what, len(self._keys))

    # ------------------------------------------------------------------------------------------ what all turns share
    def _visit_shared(self, node: fx.Node) -> None:
        """A cut into turns, or one of equal parts of what is everywhere the same (the gradient of a list's mean), or a
        constant that each turn makes for itself, and what follows from these."""
        source: Any = node.args[0] if node.args else None
        if node.target is aten.slice.Tensor and (cut := cut_of(node)):
            rows = source.meta["val"].shape[0]
            turn = self.turns.turn(*cut, rows)
            if turn is not None:
                self.moved[node] = turn, rows
                key = self._key("rows", source)
                self.known[node] = self._made_alike(node, Own(turn, (0,), key, (key,)))
                return
        if node.target in (aten.slice.Tensor, aten.select.int):
            dim: Any = node.args[1] if len(node.args) > 1 else 0
            dim %= source.meta["val"].dim()
            try:
                whole = self._everywhere(source, dim, source.meta["val"].shape[dim])
            except MattersError:
                return
            self._equal[node] = self._key("part", whole, dim, _shape(node.meta["val"].shape, None, 1))
        elif is_tensor(node) and (_is_constant(node) or not self._equal.keys().isdisjoint(node.all_input_nodes)):
            described = [self._same(operand) for operand in operand_nodes(node)]
            self._equal[node] = self._key(node.target, _arguments(call_of(node)), *described, node.meta["val"].shape)

    def _same(self, node: fx.Node, ones: list[fx.Node] | None = None) -> tuple[object, ...]:
        """What a tensor that all turns share is; where it is one number, which may be another in each turn, it is added
        to `ones` instead."""
        value = node.meta["val"]
        if ones is not None and value.numel() == 1:
            ones.append(node)
            return "one", value.dtype, value.shape
        return ("equal", self._equal[node]) if node in self._equal else ("same", node)

    def _everywhere(self, node: fx.Node, dim: int, count: int, ones: list[fx.Node] | None = None) -> tuple[object, ...]:
        """What a tensor that all turns share is, where all that it has along a dim is one and the same."""
        where, why = place_of(node), "rows are paired with what each of a turn has its own of"
        rule = rule_of(node.target) if node.op == "call_function" else None
        if rule is None or node.target in _COUNTED or not is_tensor(node):
            raise MattersError(where, why)
        call = call_of(node)
        form = rule(call)
        factor = _alone(form.results[0], dim)
        if factor is None or factor in form.whole or factor in form.leading:
            raise MattersError(where, why)
        described: list[object] = []
        for operand, dims in zip(operand_nodes(node), form.operands, strict=True):
            at = _dim_of(dims, factor)
            described.append(self._same(operand, ones) if at is None else self._everywhere(operand, at, count, ones))
        return (node.target, _arguments(call), *described, _shape(node.meta["val"].shape, dim, count))

    # ------------------------------------------------------------------------------------------- what is put together
    def _together(self, node: fx.Node) -> Sum | Written | None:
        """Where it adds up what turns make, or puts rows where they belong."""
        arguments: Any = node.args
        if node.target is aten.slice_backward.default:
            return self._put(node, arguments[0])
        if node.target is aten.slice_scatter.default:
            return self._written(node, *arguments[:2])
        if node.target is aten.cat.default:
            return self._cat(node, arguments[0])
        if node.target not in _ADDS or node.kwargs:
            return self._of_each_term(node)
        states = {k: self.known[each] for k, each in enumerate(arguments) if each in self.known}
        of = [self._terms(node, k, state) for k, state in states.items()]
        turns = {turn for terms in of for _, turn in terms}
        if not all(of) or (len(turns) == 1 and not any(isinstance(state, Sum) for state in states.values())):
            return None
        return Sum(tuple(sorted(term for terms in of for term in terms)))

    def _of_each_term(self, node: fx.Node) -> Sum | None:
        """What an op that is linear makes of a sum of what some turns make."""
        operands = operand_nodes(node)
        sums = {k: state for k, each in enumerate(operands) if isinstance(state := self.known.get(each), Sum)}
        rule = rule_of(node.target)
        if len(sums) != 1 or rule is None or any(isinstance(self.known.get(each), Own | Written) for each in operands):
            return None
        call, ((at, state),) = call_of(node), sums.items()
        if frozenset({at}) not in rule(call).linear:
            return None
        described = [("summed",) if k == at else self._same(each) for k, each in enumerate(operands)]
        what = node.target, _arguments(call), tuple(described), node.meta["val"].shape
        return Sum(tuple(sorted((self._key(*what, key), turn) for key, turn in state.terms)))

    def _terms(self, node: fx.Node, index: int, state: State) -> list[tuple[int, int]]:
        """What an operand of a sum or difference adds to it, with the turn of each; nothing where that is not told."""
        terms: Sequence[tuple[int, int]] = state.terms if isinstance(state, Sum) else ()
        if isinstance(state, Own) and state.dims == (None,):
            terms = [(key, state.turn) for key in state.terms]
        negative = node.target is aten.sub.Tensor and index == 1
        return [(self._key("negative", key), turn) for key, turn in terms] if negative else list(terms)

    def _is_cut(self, node: fx.Node, state: State | None) -> bool:
        """Whether a slice is where a turn's rows are, of a tensor that has all."""
        cut = cut_of(node)
        if cut is None or not isinstance(state, Own) or state.dims != (0,):
            return False
        return self.turns.turn(*cut, node.meta["val"].shape[0]) == state.turn

    def _put(self, node: fx.Node, rows: fx.Node) -> Sum | None:
        """Rows of a turn, put among zeros."""
        state = self.known[rows]
        if not self._is_cut(node, state):
            return None
        assert isinstance(state, Own)
        self.moved[node] = state.turn, node.meta["val"].shape[0]
        return Sum(((self._key(node.target, state.key), state.turn),))

    def _written(self, node: fx.Node, base: fx.Node, rows: fx.Node) -> Written | None:
        """A tensor to which a turn's rows are written: turns before it wrote theirs, or none did."""
        state, before = self.known.get(rows), self.known.get(base, Written(frozenset(), -1))
        if not self._is_cut(node, state) or not isinstance(before, Written):
            return None
        assert isinstance(state, Own)
        if state.turn in before.turns or before.key not in (-1, state.key):
            raise MattersError(place_of(node), "what is written of them is not made alike in each turn")
        self.moved[node] = state.turn, node.meta["val"].shape[0]
        return Written(before.turns | {state.turn}, state.key)

    def _cat(self, node: fx.Node, parts: Sequence[fx.Node]) -> Written | None:
        """All turns' rows, one behind the other."""
        states = [self.known.get(part) for part in parts]
        own = [state for state in states if isinstance(state, Own) and state.dims == (0,)]
        dim = call_of(node).get("dim", 0) % node.meta["val"].dim()
        if dim or len(own) < len(states) or [state.turn for state in own] != list(range(len(self.turns.starts))):
            return None
        if len({state.key for state in own}) > 1:
            raise MattersError(place_of(node), "what is put together of them is not made alike in each turn")
        self.moved[node] = 0, node.meta["val"].shape[0]
        return Written(frozenset(state.turn for state in own), own[0].key)

    def _visit_listed(self, node: fx.Node) -> None:
        """What an op makes of a list of turns' sums: a list, or the sum of all."""
        states = [self.known.get(operand) for operand in operand_nodes(node)]
        rule, why = rule_of(node.target), f"{node.target} reads a list of turns' sums"
        if rule is None or sum(state is not None for state in states) > 1:
            raise MattersError(place_of(node), why)
        form = rule(call_of(node))
        (index,) = (k for k, state in enumerate(states) if state is not None)
        state = states[index]
        assert isinstance(state, Listed)
        factor = _alone(form.operands[index], state.dim)
        shared = any(factor in dim for k, dims in enumerate(form.operands) for dim in dims if k != index)
        if factor is None or factor in form.whole or factor in form.leading or shared or len(form.results) > 1:
            raise MattersError(place_of(node), why)
        if node.target not in _SUMS and not _is_linear(node, form, {index}):
            raise MattersError(place_of(node), why)
        at = _dim_of(form.results[0], factor)
        if at is not None:
            self.known[node] = Listed(at)

    # ------------------------------------------------------------------------------------------ what one turn's become
    def _own(self, node: fx.Node, states: Sequence[State]) -> Own | Listed | None:
        """What an op makes of one turn's rows, where it treats each by itself or adds over all of them; nothing where
        it reads them in order."""
        where = place_of(node)
        own = [state for state in states if isinstance(state, Own)]
        if len(own) < len(states):
            raise MattersError(where, f"{node.target} reads what some of the turns make of them")
        if len({state.turn for state in own}) > 1:
            return self._listed(node)
        rule = rule_of(node.target)
        if rule is None:
            raise MattersError(where, f"{node.target} has no rule")
        call = call_of(node)
        form = rule(call)
        if any(state.dims == (None,) for state in own):
            return self._of_sums(node, call, form)
        is_narrow = all(self._is_narrow(operand) for operand in node.all_input_nodes if operand in self.known)
        try:
            found = self._of_rows(node, call, form)
            alike = node.meta["val"].dtype == operand_nodes(node)[0].meta["val"].dtype if is_total(node) else False
            if any(at is not None for at in found.dims) or not (is_narrow or alike):
                return found
            self._narrow[node] = found.key
            if found.key not in self.apart:
                return found
        except MattersError:
            if not is_narrow:
                raise
        self.in_order[node] = own[0].turn
        return None

    def _is_narrow(self, node: fx.Node) -> bool:
        """Whether it has one number of each row of a turn."""
        state = self.known[node]
        return isinstance(state, Own) and node.meta["val"].numel() == self.turns.length(state.turn)

    def _listed(self, node: fx.Node) -> Listed:
        """The sums of all turns, side by side."""
        where, why = place_of(node), f"{node.target} reads rows of several turns"
        if node.target not in (aten.cat.default, aten.stack.default):
            raise MattersError(where, why)
        states = [self.known.get(operand) for operand in operand_nodes(node)]
        sums = [state for state in states if isinstance(state, Own) and state.dims == (None,)]
        dim = call_of(node).get("dim", 0) % node.meta["val"].dim()
        each_once = sorted(state.turn for state in sums) == list(range(len(self.turns.starts)))
        if len(sums) < len(states) or not each_once or node.meta["val"].shape[dim] != len(sums):
            raise MattersError(where, why)
        if len({state.key for state in sums}) > 1:
            raise MattersError(where, "what is put together of them is not made alike in each turn")
        return Listed(dim)

    def _of_rows(self, node: fx.Node, call: Call, form: Form) -> Own:
        operands = operand_nodes(node)
        own = {k: state for k, operand in enumerate(operands) if isinstance(state := self.known.get(operand), Own)}
        turn = next(iter(own.values())).turn
        count, mixes = self.turns.length(turn), MattersError(place_of(node), f"{node.target} mixes rows")
        factors = {_outermost(form.operands[k], state.dims[0]) for k, state in own.items()}
        factor = factors.pop()
        if factor is None or factors or form.sizes[factor] % count or factor in form.whole or factor in form.leading:
            raise mixes
        described: list[object] = []
        ones: list[fx.Node] = []
        for k, operand in enumerate(operands):
            at = _dim_of(form.operands[k], factor)
            if k in own:
                described.append(own[k].key)
            elif at is None:
                described.append(self._same(operand, ones))
            elif _outermost(form.operands[k], at) == factor:
                described.append(self._paired(node, k, at, count, ones))
            else:
                raise mixes
        dims = tuple(_dim_of(result, factor) for result in form.results)
        for result, at in zip(form.results, dims, strict=True):
            if form.reduces.get(factor) != "sum" if at is None else _outermost(result, at) != factor:
                raise mixes
        shapes = [_shape(f.shape, at, count) if f else () for f, at in zip(call.results, dims, strict=True)]
        key = self._key(node.target, _arguments(call), *described, *shapes)
        if ones:
            self.ones[node] = tuple(ones)
            alike = self._beside.setdefault((key, turn), [])
            if self.ones[node] not in alike:
                alike.append(self.ones[node])
            key = self._key(key, alike.index(self.ones[node]))
        return self._made_alike(node, Own(turn, dims, key, (key,)))

    def _made_alike(self, node: fx.Node, state: Own) -> Own:
        self.made.setdefault((state.key, state.turn), node)
        return state

    def _paired(self, node: fx.Node, index: int, at: int, count: int, ones: list[fx.Node]) -> tuple[object, ...]:
        """What all turns share and an op pairs with the rows of one: the same for each, or a number for each."""
        operand, inside = operand_nodes(node)[index], list[fx.Node]()
        try:
            described = self._everywhere(operand, at, count, inside)
        except MattersError:
            value = operand.meta["val"]
            if value.numel() != count:
                raise
            ones.append(operand)
            return "each", value.dtype, _shape(value.shape, at, count)
        self.shared[node, index] = at
        ones += inside
        return described

    def _of_sums(self, node: fx.Node, call: Call, form: Form) -> Own:
        """What an op makes of sums over a turn's rows, where that is the sum of what it would make of each row's."""
        operands = operand_nodes(node)
        own = {k: state for k, operand in enumerate(operands) if isinstance(state := self.known.get(operand), Own)}
        first, turn = next(iter(own.values())), next(iter(own.values())).turn
        described = [own[k].key if k in own else self._same(operand) for k, operand in enumerate(operands)]
        key = self._key(node.target, _arguments(call), *described, *[f.shape if f else () for f in call.results])
        sums = all(state.dims == (None,) for state in own.values())
        if sums and node.target in _ADDS and not node.kwargs:
            if _adds_nothing(node, own):
                self.same_as[node] = operands[next(iter(own))]
            if call.get("other") == 0:
                return first
            terms = [term for k, state in own.items() for term, _ in self._terms(node, k, state)]
            return Own(turn, (None,), key, tuple(sorted(terms)))
        if not sums or not _is_linear(node, form, own.keys()):
            raise MattersError(place_of(node), f"{node.target} reads a turn's sum over rows")
        return Own(turn, tuple(None for _ in form.results), key, (key,))


def _is_constant(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.all_input_nodes


def _is_linear(node: fx.Node, form: Form, own: Set[int]) -> bool:
    """Whether an op makes of sums, its operands `own`, the sum of what it would make of their terms."""
    to_float = node.target is aten._to_copy.default and node.meta["val"].dtype.is_floating_point
    return frozenset(own) in form.linear or to_float


def walked(graph: fx.Graph, turns: Turns) -> Walk:
    """The graph, walked.

    Raises:
        MattersError: which rows come together in a turn may tell.
    """
    apart, keys = frozenset[int](), dict[object, int]()
    while True:
        walk = Walk(turns, apart=apart, _keys=keys)
        for node in graph.nodes:
            try:
                walk.visit(node)
            except MattersError:
                more = walk.narrow_before(node)
                if not more:
                    raise
                apart |= more
                break
        else:
            return walk


def is_total(node: fx.Node) -> bool:
    """Whether a node is the sum of all that a tensor has."""
    return node.target in _SUMS and bool(node.meta["val"].numel() == 1)


def _adds_nothing(node: fx.Node, own: Mapping[int, Own]) -> bool:
    """Whether all else that is added up is zeros, as many and in the same dtype."""
    operands = operand_nodes(node)
    rest = [operand for k, operand in enumerate(operands) if k not in own]
    if len(own) != 1 or not all(each.target is aten.full.default and each.args[1] == 0 for each in rest):
        return False
    alike = {(each.meta["val"].shape, each.meta["val"].dtype) for each in (node, operands[next(iter(own))])}
    return len(alike) == 1 and (len(rest) == 1 or call_of(node).get("other") == 0)


def _outermost(dims: Sequence[Sequence[int]], at: int | None) -> int | None:
    """The outermost factor of a dim."""
    return dims[at][0] if at is not None and dims[at] else None


def _alone(dims: Sequence[Sequence[int]], at: int) -> int | None:
    """The factor that a dim is, where it is one."""
    return dims[at][0] if len(dims[at]) == 1 else None


def _dim_of(dims: Sequence[Sequence[int]], factor: int) -> int | None:
    """The dim that has a factor."""
    return next((d for d, dim in enumerate(dims) if factor in dim), None)


def _arguments(call: Call) -> str:
    """What a call is told beside its tensors and the shape of its result."""
    return str(
        {
            name: value
            for name, value in call.arguments.items()
            if name != TOLD.get(call.target) and not isinstance(value, Operand)
        }
    )


def _shape(shape: Sequence[int], dim: int | None, count: int) -> tuple[object, ...]:
    """A shape of which `count` rows are the outermost part of a dim, with no word of how many these are."""
    return tuple(("rows", size // count) if d == dim else size for d, size in enumerate(shape))
