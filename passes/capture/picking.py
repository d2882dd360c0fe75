"""`Picking`: what is known of rows that masks pick, while a model is traced that says so by its parameters.

The tracer gives every position of a mask then (`picked_rows`). What a model asks of them besides is answered here as if
some were picked, where that is right for any number of rows, and refused where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from passes.capture.picked_counts import PickedCount
from passes.capture.picked_rows import ADDS_TO, PickedRowsError, asked_of_mask
from passes.capture.values import ExampleValues, TooLargeError, UnknownValueError, off_the_record

aten = torch.ops.aten

_MOST_NUMBERED = 2**12
"""Picked rows that a model may go through one by one."""
_MEANS = {
    aten.mean.default, aten.mean.dim, aten.mse_loss.default, aten.huber_loss.default, aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default,
}  # fmt: skip
"""Ops that divide by a number of elements."""
_FILLS = {aten.ones_like.default, aten.full_like.default}
"""Ops that make as many elements as there are, rows that were not picked among them."""


class Picking:
    """Which nodes are rows that masks pick.

    `picks`: every `nonzero` that gave every position. `asked`: what was read of masks, and answered as if they picked
    some rows.
    """

    def __init__(self, values: ExampleValues, location: Callable[[], str]) -> None:
        self.picks: list[fx.Node] = []
        self.asked: list[fx.Node] = []
        self._values = values
        self._location = location
        self._sizes: dict[fx.Node, frozenset[int]] = {}

    def is_known(self, node: fx.Node) -> bool:
        """Whether the value of `node` does not follow from parameters."""
        try:
            self._values.of(node)
        except UnknownValueError:
            return False
        except TooLargeError:
            pass
        return True

    def add(self, pick: fx.Node, shape: Sequence[int]) -> None:
        """`pick` is every position of a mask of this shape."""
        self.picks.append(pick)
        self._sizes[pick] = frozenset({math.prod(shape)})
        if math.prod(shape) <= _MOST_NUMBERED:
            with off_the_record():
                self._values.set(pick, torch.ones(tuple(shape), dtype=torch.bool).nonzero())

    def follow(self, node: fx.Node, out: Any) -> None:
        """Keep which sizes of `out`, what `node` gives, are numbers of picked rows."""
        if not self.picks or not isinstance(out, Tensor) or node.target in ADDS_TO:
            return
        sizes = {size for operand in node.all_input_nodes for size in self._sizes.get(operand, ())}
        if found := sizes & set(out.shape):
            self._sizes[node] = frozenset(found)

    def sizes(self, node: fx.Node | None) -> frozenset[int]:
        """The sizes of `node` that are numbers of picked rows."""
        return self._sizes.get(node, frozenset()) if node is not None else frozenset()

    def is_number(self, node: fx.Node | None) -> bool:
        """Whether `node` is positions, or of them one."""
        while node is not None and node not in self.picks and len(node.all_input_nodes) == 1:
            (node,) = node.all_input_nodes
        return node in self.picks

    def answer(self, node: fx.Node) -> Any:
        """What `node` gives where some rows are picked, if it says whether any are, or how many; else None."""
        if self.is_known(node) or (found := asked_of_mask(node)) is None:
            return None
        self.asked.append(node)
        mask, answer = found
        return PickedCount.of(math.prod(mask.meta["val"].shape), self.refuse) if answer is None else answer

    def refuse_counting(self, node: fx.Node | None, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse `func` if what it gives has the number of picked rows of `node`, its first argument, in it."""
        if not (sizes := self.sizes(node)):
            return
        if func in _FILLS:
            self.refuse()
        if func not in _MEANS:
            return
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        dims = given.get("dim") or range(args[0].dim())
        is_mean = "reduction" not in names or given.get("reduction", 1) == 1
        if is_mean and sizes & {args[0].shape[dim] for dim in dims}:
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raises: the model computes from a number of picked rows."""
        raise PickedRowsError(
            f"{self._location()}: computes with how many rows a mask picks, which parameters say; count them by tensor "
            "ops, as in (chosen == expert).sum(), and ask for .shape[0], not len(), whether there are any"
        )
