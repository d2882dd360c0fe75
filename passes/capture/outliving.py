"""Tensors that a forward leaves outside of its modules: a table in a module-level dict, or one that `lru_cache` keeps.

    capture -> a tensor without values in the model's cache -give_values-> one with values, and how it is made
    another capture -remade-> the ops that make it, as in the first

So the model's own cache is as eager would have left it, and what is captured does not depend on whether it is filled.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from passes.capture.values import ExampleValues, TooLargeError, UnknownValueError


@dataclass(frozen=True)
class _Made:
    """The op that made a tensor, in a graph of such ops alone, and how often the tensor had been written to."""

    node: fx.Node
    version: int


_made: Any = WeakTensorKeyDictionary()


def give_values(nodes: Mapping[int, fx.Node], values: ExampleValues, root: nn.Module) -> None:
    """Gives what is left of a trace its values, where these follow from no input, parameter, buffer or random number.

    nodes: those of the trace's fake tensors, by these' ids. root: has the trace's constants.
    """
    # What was there before the capture is frozen (`collector.settled`), so there are few to look at.
    left = [each for each in gc.get_objects() if type(each) is Tensor and torch._is_functional_tensor(each)]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for tensor in left:
        with suppress(UnknownValueError, TooLargeError, RuntimeError):  # what autograd refers to is not swapped
            torch._sync(tensor)  # type: ignore[attr-defined]
            node = nodes.get(id(torch._from_functional_tensor(tensor)))
            if node is None or (needed := _needed(node)) is None:
                continue
            torch.utils.swap_tensors(tensor, copy.deepcopy(values.of(node)))  # expanded, it takes no more memory
            for each in needed:
                if each not in copies:
                    copies[each] = made = graph.node_copy(each, copies.__getitem__)
                    made.meta = {"constant": getattr(root, str(each.target))} if each.op == "get_attr" else {}
            _made[tensor] = _Made(copies[node], tensor._version)


def remade(
    tensor: Tensor,
    found: dict[fx.Node, Any],
    run: Callable[..., Any],
    constant: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """What the ops that made a tensor in a trace before give in this one; None of any other tensor.

    found: what they gave so far. run: runs an op. constant: what stands for a constant of the trace before.
    """
    made = _made.get(tensor)
    if made is None or made.version != tensor._version:
        return None
    for node in _needed(made.node) or ():
        if node in found:
            continue
        if node.op == "get_attr":
            found[node] = constant(node.meta["constant"])
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            found[node] = run(node.target, *args, **kwargs)
    again: Tensor = found[made.node]
    return again


def _needed(node: fx.Node) -> list[fx.Node] | None:
    """The ops that make a node, in the graph's order; None where it follows from a placeholder or from chance."""
    order: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if at in order:
            continue
        if at.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(at.target, "tags", ()):
            return None
        order[at] = None
        waiting.extend(at.all_input_nodes)
    return sorted(order)
