"""What a forward leaves in its modules for whoever called it: a graph gives what the model returns, no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def left_behind(model: nn.Module, outputs: Iterable[Tensor]) -> tuple[str, ...]:
    """Attributes of modules that hold, outside of their tables, what gradients flow through and no output is made of.

    A loss that the caller makes of them, as that of a router in a mixture of experts, trains.
    """
    own, used = vars(nn.Module()), functions_of(outputs)
    return tuple(
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in own and any(_is_apart(leaf, used) for leaf in pytree.tree_leaves(value))
    )


def functions_of(outputs: Iterable[Tensor]) -> set[Any]:
    """The nodes of autograd's graph that made `outputs`."""
    seen: set[Any] = {output.grad_fn for output in outputs} - {None}
    stack = list(seen)
    while stack:
        new = {following for following, _ in stack.pop().next_functions if following is not None} - seen
        seen |= new
        stack.extend(new)
    return seen


def _is_apart(leaf: Any, used: set[Any]) -> bool:
    return isinstance(leaf, Tensor) and leaf.grad_fn is not None and leaf.grad_fn not in used


def left_note(names: Sequence[str]) -> str:
    """What is said of them."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"attribute {shown}: the forward leaves there what gradients flow through and what it returns is not made of; "
        "a step of the parallel model leaves nothing there, so a loss made of it needs it returned"
    )
