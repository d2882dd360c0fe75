"""Weight gradients wait until something is sent: their products run beside the collectives of activations.

    dW3  dX3  dW2  dX2 [reduce-scatter dX2 .............] what reads it
    dX3  dX2 [reduce-scatter dX2 | dW3  dW2 ............] what reads it

No op of backward reads a weight's gradient, so its product can run at any time before the layer's gradients leave. What
it reads stays in memory until then. Products are shared out evenly among the collectives that follow in the layer
before the next product comes up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from passes.analysis.buckets import Gradients, layer_labels
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption
from passes.program.program import Program
from passes.program.routed_ops import ROUTED_MM_WEIGHT

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default, aten.bmm.default, ROUTED_MM_WEIGHT}


def postponed(program: Program, items: Sequence[Run | Move], gradients: Gradients) -> list[Run | Move]:
    """`items` with weight gradients of a layer put behind what is sent next in it; `gradients`: the program's."""
    sent = [_is_sent(item) and not (i and _goes_with(item, items[i - 1])) for i, item in enumerate(items)]
    if not any(sent):
        return list(items)
    labels = layer_labels(program, items)
    ends = {label: index for index, label in enumerate(labels)}
    found: list[Run | Move] = []
    waiting: list[Run] = []
    last = 0
    """Where the layer of what is waiting ends."""
    for index, item in enumerate(items):
        if waiting and (index > last or _reads(item) & {run.node for run in waiting}):
            found += waiting
            waiting.clear()
        if _is_weight_gradient(item, gradients):
            assert isinstance(item, Run)
            last = min(last, ends[labels[index]]) if waiting else ends[labels[index]]
            waiting.append(item)
            continue
        if waiting and sent[index]:
            share = -(-len(waiting) // _sent_from(items, sent, range(index, last + 1), gradients))
            found += waiting[:share]
            del waiting[:share]
        found.append(item)
    return found + waiting


def _sent_from(items: Sequence[Run | Move], sent: Sequence[bool], rest: range, gradients: Gradients) -> int:
    """How many collectives the rest of a layer has before its next weight gradient; the first item is one."""
    found = 0
    for index in rest:
        if _is_weight_gradient(items[index], gradients):
            break
        found += sent[index]
    return found


def _is_weight_gradient(item: Run | Move, gradients: Gradients) -> bool:
    """Whether an item is a product of activations that is a parameter's gradient, and nothing else."""
    if not isinstance(item, Run) or item.node.target not in _PRODUCTS:
        return False
    return gradients.of(item.node) is not None and not gradients.is_late(item)


def _is_sent(item: Run | Move) -> bool:
    """Whether an item sends an activation between ranks."""
    if not isinstance(item, Move) or item.phase != "backward" or item.reader is None:
        return False
    if item.bucket >= 0 and not item.packed:
        return False
    stored = isinstance(item.source, StoredOption) or isinstance(item.target, StoredOption)
    return not stored and any(step.is_collective for step in item.steps)


def _goes_with(item: Run | Move, before: Run | Move) -> bool:
    """Whether an item is sent together with the one before it."""
    return isinstance(item, Move) and isinstance(before, Move) and item.packed and item.bucket == before.bucket


def _reads(item: Run | Move) -> set[fx.Node]:
    return set(item.node.all_input_nodes) if isinstance(item, Run) else {item.value}
