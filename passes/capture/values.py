"""Real values of a captured graph's nodes, computed on demand from the example inputs.

A model may read a value while it runs: `.item()`, `.tolist()`, a branch on a tensor, the size of `nonzero`. Where the
value follows from the example inputs and the buffers alone, it is computed here, by running just the nodes it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
_UNIFORM = {aten.rand.default}
_MOST_BYTES = 1 << 32
"""Of one value that is computed on this host."""
_KEPT_ELEMENTS = 1 << 20
"""Of one value that is kept for others that need it; larger ones are computed again."""


class TooLargeError(Exception):
    """A value needs a tensor of this shape and dtype, larger than are computed on this host."""


class UnknownValueError(Exception):
    """A value depends on `what`, which capture does not know."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@contextmanager
def off_the_record() -> Iterator[None]:
    """Inside, ops on real tensors run at once, whatever is being traced."""
    functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
    with torch._C._ExcludeDispatchKeyGuard(functionalize), _disable_current_modes(), torch.no_grad():
        yield


def run_real(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives on real tensors while fake tensors are being traced."""
    with off_the_record():
        return func(*args, **kwargs)


class ExampleValues:
    """Values of nodes of one growing graph, each computed at most once."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Any] = {}
        self._unknown: dict[fx.Node, str] = {}
        self._from_inputs: set[fx.Node] = set()

    def set(self, node: fx.Node, value: torch.Tensor, is_input: bool = False) -> None:
        """Give a leaf of the graph its value."""
        self._known[node] = value
        if is_input:
            self._from_inputs.add(node)

    def set_unknown(self, node: fx.Node, what: str) -> None:
        """Say why a leaf of the graph has no value."""
        self._unknown[node] = what

    def of(self, node: fx.Node) -> Any:
        """Value of `node`.

        Raises `UnknownValueError` where it depends on a parameter, on chance or on fake inputs, and `TooLargeError`.

        A value that is the same whatever uniform random numbers are drawn (`rand() < 0.0`) is known.
        """
        if node in self._known:
            return self._known[node]
        order = self._needed(node)
        for needed in order:
            if any(parent in self._from_inputs for parent in needed.all_input_nodes):
                self._from_inputs.add(needed)
        if not any(n.target in _UNIFORM for n in order):
            self._known.update(self._run(order, {}))
            return self._known[node]
        low, high = (self._run(order, dict.fromkeys(_UNIFORM, u))[node] for u in (0.0, 1.0 - 2.0**-24))
        with off_the_record():
            same = torch.equal(low, high)
        if not same:
            raise UnknownValueError("random numbers")
        self._known[node] = low
        return low

    def depends_on_inputs(self, node: fx.Node) -> bool:
        """Whether a value that `of` gave follows from the user's inputs, not from the model alone."""
        return node in self._from_inputs

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        """Nodes to run for `node`, in the order of the graph."""
        order: list[fx.Node] = []
        seen: set[fx.Node] = set()
        stack = [(node, False)]
        while stack:
            current, done = stack.pop()
            if done:
                order.append(current)
                continue
            if current in seen or current in self._known:
                continue
            seen.add(current)
            if current in self._unknown:
                raise UnknownValueError(self._unknown[current])
            if current.op != "call_function":
                raise UnknownValueError(current.name)
            target: Any = current.target
            tags = getattr(target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags and target not in _UNIFORM:
                raise UnknownValueError("random numbers")
            stack.append((current, True))
            stack.extend((parent, False) for parent in current.all_input_nodes)
        return order

    def _run(self, order: list[fx.Node], uniforms: Mapping[Any, float]) -> dict[fx.Node, Any]:
        """Values of the last of `order`, and of those before it that are small."""
        values: dict[fx.Node, Any] = {}
        last_user = {parent: node for node in order for parent in node.all_input_nodes}

        def value(node: fx.Node) -> Any:
            return values[node] if node in values else self._known[node]

        with off_the_record():
            for node in order:
                _check_size(node)
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                target: Any = node.target
                if target in uniforms:
                    val = node.meta["val"]
                    values[node] = torch.full(val.shape, uniforms[target], dtype=val.dtype)
                else:
                    values[node] = target(*args, **kwargs)
                for parent in node.all_input_nodes:
                    if parent in values and last_user[parent] is node and _elements(values[parent]) > _KEPT_ELEMENTS:
                        del values[parent]
        return values


def _check_size(node: fx.Node) -> None:
    if getattr(node.target, "is_view", False):
        return
    for val in pytree.tree_leaves(node.meta["val"]):
        if isinstance(val, torch.Tensor) and val.numel() * val.element_size() > _MOST_BYTES:
            raise TooLargeError(f"{tuple(val.shape)} {str(val.dtype).removeprefix('torch.')}")


def _elements(value: Any) -> int:
    return sum(x.numel() for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))
