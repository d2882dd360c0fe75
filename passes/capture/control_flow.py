"""torch's `while_loop`, `scan` and `map` as the Python that they stand for: a graph has no loops.

Whether a loop goes on is read as any other value of the model's: it has to follow from the inputs or buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from passes.errors import CaptureError


def _while_loop(
    condition: Callable[..., Any], body: Callable[..., Any], carried: Sequence[Any], more: Sequence[Any]
) -> Any:
    values = tuple(carried)
    while condition(*values, *more):
        values = tuple(body(*values, *more))
    return values


def _scan(step: Callable[..., Any], initial: Sequence[Tensor], rows: Sequence[Tensor], more: Sequence[Any] = ()) -> Any:
    carry: Any = initial
    made = []
    for row in zip(*(each.unbind(0) for each in rows), strict=True):
        carry, out = step(*pytree.tree_leaves(carry), *row, *more)
        made.append(out)
    return carry, _stacked(made)


def _map(function: Callable[..., Any], rows: Sequence[Tensor], more: Sequence[Any]) -> Any:
    return _stacked([function(*row, *more) for row in zip(*(each.unbind(0) for each in rows), strict=True)])


def _stacked(made: Sequence[Any]) -> Any:
    return pytree.tree_map(lambda *each: torch.stack(each) if isinstance(each[0], Tensor) else each[0], *made)


_COND = (
    "torch.cond is not captured: it gives zeros for gradients of the branch that it does not take, where a graph has "
    "none. Use torch.where on what both branches give, or, where the condition follows from the inputs, a Python if"
)
_AS_PYTHON: dict[str, Callable[..., Any]] = {
    "while_loop": _while_loop,
    "scan": _scan,
    "map_impl": _map,
}


@contextmanager
def control_flow_as_python(location: Callable[[], str]) -> Iterator[None]:
    """Inside, these run so, and what is under `torch.compile` runs as what it wraps.

    location: the line of the model that is running. There `torch.cond` is a `CaptureError`.
    """
    called = HigherOrderOperator.__call__

    def call(op: HigherOrderOperator, /, *args: Any, **kwargs: Any) -> Any:
        if op.name() == "cond":
            raise CaptureError(f"{location()}: {_COND}")
        python = _AS_PYTHON.get(op.name())
        return called(op, *args, **kwargs) if python is None else python(*args, **kwargs)

    HigherOrderOperator.__call__ = call  # type: ignore[method-assign]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        HigherOrderOperator.__call__ = called  # type: ignore[method-assign]
