"""`LookUp`: rows of a tensor by their positions in a mask, read and written without an index.

read:  a tensor's dims that a mask has too, in its order -> broadcast over the mask's others -> rows
write: rows -> the mask's dims -> summed over those that the tensor has not
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program.adder import AdderBefore

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """What is there of a dim: `valid` is a node of booleans, one per element, or of a single one for a whole tensor."""

    valid: fx.Node


@dataclass(frozen=True)
class LookUp:
    """Rows of a tensor by position: dims in `numbers` at one place, `where` has the dim for some of a mask's dims.

    `mask`: its shape; (1,) or () where only single rows are taken. `first`: the place of the rows in the result.
    `rows`: which of them are there; `there`: whether any is.
    """

    numbers: Mapping[int, int]
    where: Mapping[int, int]
    mask: tuple[int, ...]
    first: int
    rows: Rows | None
    there: Rows | None

    def picked_shape(self, of: fx.Node) -> list[int]:
        """The shape of what is looked up."""
        left = [size for dim, size in enumerate(shape_of(of)) if dim not in {*self.numbers, *self.where.values()}]
        return [*left[: self.first], *([math.prod(self.mask)] if self.mask else []), *left[self.first :]]

    def read(self, add: AdderBefore, of: fx.Node) -> fx.Node:
        """The rows."""
        for dim in sorted(self.numbers, reverse=True):
            of = add(aten.select.int, of, dim, self.numbers[dim])
        if not self.where:
            return add(aten.unsqueeze.default, of, self.first) if self.mask else of
        order = self._order(len(shape_of(of)))
        of = _permuted(add, of, order)
        for dim in self._others:
            of = add(aten.unsqueeze.default, of, dim)
        left = shape_of(of)[len(self.mask) :]
        of = add(aten.expand.default, of, [*self.mask, *left])
        return _moved(add, packed_view(add, of, [math.prod(self.mask), *left]), 0, self.first)

    def write(self, add: AdderBefore, values: fx.Node, into: fx.Node) -> fx.Node:
        """What `values` of rows add to a tensor like `into`."""
        values = self._gathered(add, values)
        shape = list(shape_of(into))
        for dim in sorted(self.numbers):
            # Dims that come later are still missing: the sizes are those of what this one is put back into.
            later = [d for d in self.numbers if d > dim]
            sizes = [size for d, size in enumerate(shape) if d not in later]
            values = add(aten.select_backward.default, values, sizes, dim, self.numbers[dim])
        return values

    def overwrite(self, add: AdderBefore, values: fx.Node, into: fx.Node, there: Rows | None) -> fx.Node:
        """`into` with `values` where rows are there."""
        if self.rows is None:
            ((dim, number),) = self.numbers.items()
            assert there is not None
            old = add(aten.select.int, into, dim, number)
            values = add(aten.squeeze.dim, values, self.first) if self.mask else values
            new = add(aten.where.self, there.valid, values, old)
            return add(aten.select_scatter.default, into, new, dim, number)
        rows = self._last(add, both(add, self.rows, there))
        new = self._gathered(add, masked(add, values, self.first, rows))
        count = _along(add, rows.valid, 0, 1 + len(shape_of(into)) - len(self.where))
        count = add(aten._to_copy.default, _moved(add, count, 0, self.first), dtype=torch.float32)
        written = add(aten.gt.Scalar, self._gathered(add, count), 0)
        return add(aten.where.self, written, new, into)

    def _last(self, add: AdderBefore, rows: Rows) -> Rows:
        """Of rows that are written to one place the last, as eager leaves it."""
        if not self._others:
            return rows
        ones = [size if dim in self._others else 1 for dim, size in enumerate(self.mask)]
        order = add(aten.arange.start_step, 1, math.prod(ones) + 1, 1, dtype=torch.int64, device=torch.device("cpu"))
        valid = add(aten.view.default, rows.valid, list(self.mask))
        order = add(aten.mul.Tensor, add(aten.view.default, order, ones), valid)
        is_last = add(aten.eq.Tensor, order, add(aten.amax.default, order, self._others, True))
        return Rows(packed_view(add, add(aten.logical_and.default, valid, is_last), [math.prod(self.mask)]))

    @property
    def _others(self) -> list[int]:
        """The mask's dims that the tensor has not."""
        return [dim for dim in range(len(self.mask)) if dim not in self.where]

    def _gathered(self, add: AdderBefore, values: fx.Node) -> fx.Node:
        """Sums of rows at one place, as dims of the tensor that they are looked up in (less those in `numbers`)."""
        if not self.where:
            return add(aten.squeeze.dim, values, self.first) if self.mask else values
        values = _moved(add, values, self.first, 0)
        left = shape_of(values)[1:]
        values = packed_view(add, values, [*self.mask, *left])
        if self._others:
            values = add(aten.sum.dim_IntList, values, self._others, False, dtype=values.meta["val"].dtype)
        order = self._order(len(shape_of(values)))
        return _permuted(add, values, [order.index(dim) for dim in range(len(order))])

    def _order(self, dims: int) -> list[int]:
        """Dims looked up, in the mask's order, then the others; of the tensor without those in `numbers`."""
        taken = [self.where[dim] - sum(d < self.where[dim] for d in self.numbers) for dim in sorted(self.where)]
        return [*taken, *(dim for dim in range(dims) if dim not in taken)]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node gives."""
    return tuple(node.meta["val"].shape)


def both(add: AdderBefore, one: Rows | None, other: Rows | None) -> Any:
    """What is there by both."""
    if one is None or other is None or one.valid is other.valid:
        return one or other
    return Rows(add(aten.logical_and.default, one.valid, other.valid))


def masked(add: AdderBefore, of: fx.Node, dim: int | None, rows: Rows | None) -> fx.Node:
    """`of` with zeros where it is not there."""
    if rows is None:
        return of
    val = of.meta["val"]
    valid = rows.valid if dim is None else _along(add, rows.valid, dim, val.dim())
    return add(aten.where.self, valid, of, add(aten.full.default, [], 0, dtype=val.dtype, device=val.device))


def _along(add: AdderBefore, valid: fx.Node, dim: int, dims: int) -> fx.Node:
    """`valid` as the dim `dim` of `dims`."""
    shape = [1] * dims
    shape[dim] = shape_of(valid)[0]
    return add(aten.view.default, valid, shape)


def packed_view(add: AdderBefore, of: fx.Node, shape: Sequence[int]) -> fx.Node:
    """The same elements in another shape, copied where they do not lie in order."""
    if list(shape_of(of)) == list(shape):
        return of
    if not of.meta["val"].is_contiguous():
        of = add(aten.clone.default, of, memory_format=torch.contiguous_format)
    return add(aten.view.default, of, list(shape))


def _moved(add: AdderBefore, of: fx.Node, source: int, target: int) -> fx.Node:
    order = list(range(len(shape_of(of))))
    order.insert(target, order.pop(source))
    return _permuted(add, of, order)


def _permuted(add: AdderBefore, of: fx.Node, order: Sequence[int]) -> fx.Node:
    return of if list(order) == sorted(order) else add(aten.permute.default, of, list(order))


def every_position(add: AdderBefore, shape: Sequence[int]) -> fx.Node:
    """Positions of all elements of a tensor of `shape`, in order: (elements, dims)."""
    along = []
    for dim, size in enumerate(shape):
        one = add(aten.arange.start_step, 0, size, 1, dtype=torch.int64, device=torch.device("cpu"))
        one = add(aten.view.default, one, [size if d == dim else 1 for d in range(len(shape))])
        along.append(packed_view(add, add(aten.expand.default, one, list(shape)), [math.prod(shape)]))
    return add(aten.stack.default, along, 1)
