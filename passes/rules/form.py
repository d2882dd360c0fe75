"""Factor form: what an op lets one mesh axis do.

An op's tensors are described by *factors*, loop indices of the einsum that the op would be if it were one. Each dim of
each operand and result is an ordered list of factors, outermost first: a matrix product is `mk,kn->mn`, and
`view([b, s, h] -> [b*s, h])` is `b s h -> (b s) h`. A dim of size 1 has no factor.

From a form everything else follows. A mesh axis may split one factor: operands and results that have it are sharded
there, operands that lack it are whole, and a result that lacks it is a partial sum (`reduces`). Factors in `whole`
cannot be split, because the op mixes elements along them (softmax) or cuts them (slices). Where a result is linear in
a group of operands taken together, partial sums may flow through: `linear` lists those groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Dims = tuple[tuple[int, ...], ...]
"""Per dim of one tensor, the factors it is made of, outermost first."""


@dataclass(frozen=True)
class Form:
    """An op on given shapes, in factor form. Operands are the tensor arguments in the order they are passed."""

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: tuple[int, ...]
    whole: frozenset[int] = frozenset()
    reduces: dict[int, str] = field(default_factory=dict)
    """Factors that a result may lack, and how the parts recombine: "sum" or "max"."""
    linear: tuple[frozenset[int], ...] = ()
    """Groups of operand indices. Partial sums in all of a group, the others whole, give a partial sum."""
    leading: frozenset[int] = frozenset()
    """Factors that are looked up by index: where such a factor turns out to be a product (`(b s)`), only its outermost
    part may be split, so that each rank holds one contiguous range."""

    def __post_init__(self) -> None:
        for factor in range(len(self.sizes)):
            if factor in self.whole or factor in self.reduces:
                continue
            for result in self.results:
                assert any(factor in dim for dim in result), f"factor {factor} is lost by a result: {self}"


class FormBuilder:
    """Collects factors while a rule is worked out."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.whole: set[int] = set()
        self.leading: set[int] = set()
        self.reduces: dict[int, str] = {}

    def factor(
        self, size: int, *, whole: bool = False, leading: bool = False, reduce: str | None = None
    ) -> tuple[int, ...]:
        """A new factor as a dim of its own; a size of 1 needs none."""
        if size == 1:
            return ()
        self.sizes.append(size)
        index = len(self.sizes) - 1
        if whole:
            self.whole.add(index)
        if leading:
            self.leading.add(index)
        if reduce:
            self.reduces[index] = reduce
        return (index,)

    def dims(self, shape: Iterable[int], *, whole: bool | Collection[int] = False, reduce: str | None = None) -> Dims:
        """A factor per dim of `shape`; `whole`: those that cannot be split, or whether all of them cannot."""
        return tuple(
            self.factor(size, whole=whole if isinstance(whole, bool) else d in whole, reduce=reduce)
            for d, size in enumerate(shape)
        )

    def form(self, operands: Sequence[Dims], results: Sequence[Dims], linear: Iterable[Iterable[int]] = ()) -> Form:
        """The finished form."""
        return Form(
            tuple(operands),
            tuple(results),
            tuple(self.sizes),
            frozenset(self.whole),
            dict(self.reduces),
            tuple(frozenset(group) for group in linear),
            frozenset(self.leading),
        )


def broadcast(dims: Dims, shape: Sequence[int]) -> Dims:
    """Dims of a tensor of `shape` that is broadcast to one of `dims`: a size of 1 has no factor there."""
    skip = len(dims) - len(shape)
    return tuple(dims[skip + i] if size != 1 else () for i, size in enumerate(shape))


def without(dims: Dims, dim: int) -> Dims:
    """All dims but one."""
    return dims[:dim] + dims[dim + 1 :]


def replaced(dims: Dims, dim: int, factors: tuple[int, ...]) -> Dims:
    """The dims, one of them made of other factors."""
    return (*dims[:dim], factors, *dims[dim + 1 :])


def einsum_form(equation: str, shapes: Sequence[Sequence[int]]) -> Form:
    """Form of `"mk,kn->mn"` for operands of `shapes`; letters that a result lacks are summed."""
    left, right = equation.split("->")
    inputs, outputs = left.split(","), right.split(",")
    build = FormBuilder()
    of: dict[str, tuple[int, ...]] = {}
    for letters, shape in zip(inputs, shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            if letter not in of:
                summed = any(letter not in output for output in outputs)
                of[letter] = build.factor(size, reduce="sum" if summed else None)
    return build.form(
        [tuple(of[letter] for letter in letters) for letters in inputs],
        [tuple(of[letter] for letter in letters) for letters in outputs],
    )


def view_dims(build: FormBuilder, source: Sequence[int], target: Sequence[int]) -> tuple[Dims, Dims]:
    """Factors of the dims of `source` and `target`, two shapes of the same elements in the same order.

    Dims are grouped where their running products meet; within a group every boundary of either shape is a cut, where
    the cuts divide one another. Where they do not (6, 4 -> 4, 6), the group's dims cannot be split.
    """
    if 0 in source:
        return build.dims(source, whole=True), build.dims(target, whole=True)
    source_dims: list[tuple[int, ...]] = [()] * len(source)
    target_dims: list[tuple[int, ...]] = [()] * len(target)
    i = j = 0
    while i < len(source) or j < len(target):
        group_i, group_j, left, right = [], [], 1, 1
        while True:
            if left <= right and i < len(source):
                left *= source[i]
                group_i.append(i)
                i += 1
            elif j < len(target):
                right *= target[j]
                group_j.append(j)
                j += 1
            else:
                break
            if left == right and left > 1:
                break
        _cut_group(build, source, target, group_i, group_j, source_dims, target_dims)
    return tuple(source_dims), tuple(target_dims)


def _cut_group(
    build: FormBuilder,
    source: Sequence[int],
    target: Sequence[int],
    group_i: Sequence[int],
    group_j: Sequence[int],
    source_dims: list[tuple[int, ...]],
    target_dims: list[tuple[int, ...]],
) -> None:
    def boundaries(shape: Sequence[int], group: Sequence[int]) -> list[int]:
        edges, product = [], 1
        for dim in group:
            product *= shape[dim]
            edges.append(product)
        return edges

    edges_i, edges_j = boundaries(source, group_i), boundaries(target, group_j)
    cuts = sorted({1, *edges_i, *edges_j})
    if any(b % a for a, b in pairwise(cuts)):
        for dim in group_i:
            source_dims[dim] = build.factor(source[dim], whole=True)
        for dim in group_j:
            target_dims[dim] = build.factor(target[dim], whole=True)
        return
    pieces = {cut: build.factor(cut // before) for before, cut in pairwise(cuts)}
    for group, edges, dims in ((group_i, edges_i, source_dims), (group_j, edges_j, target_dims)):
        start = 1
        for dim, end in zip(group, edges, strict=True):
            dims[dim] = tuple(f for cut in cuts if start < cut <= end for f in pieces[cut])
            start = end
