"""What a forward leaves in its modules for whoever called it: a graph gives what the model returns, no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def left_behind(model: nn.Module, outputs: Iterable[Tensor]) -> tuple[str, ...]:
    """Module attributes, other than parameters, buffers and submodules, that hold a differentiable tensor which no
    output was computed from. In eager, a loss that the caller makes of them trains, as that of a router in a mixture of
    experts does."""
    own = vars(nn.Module())
    made = {
        f"{prefix}.{key}" if prefix else key: {
            leaf.grad_fn for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.grad_fn is not None
        }
        for prefix, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in own
    }
    if not any(made.values()):  # as of nearly all models: nothing to compare with
        return ()
    used = functions_of(outputs)
    return tuple(name for name, functions in made.items() if not functions <= used)


def functions_of(outputs: Iterable[Tensor]) -> set[Any]:
    """The autograd nodes that `outputs` were computed by."""
    seen: set[Any] = {output.grad_fn for output in outputs} - {None}
    stack = list(seen)
    while stack:
        new = {following for following, _ in stack.pop().next_functions if following is not None} - seen
        seen |= new
        stack.extend(new)
    return seen


def left_note(names: Sequence[str]) -> str:
    """The note that names them."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"attribute {shown}: the forward leaves there what gradients flow through and what it returns is not made of; "
        "a step of the parallel model leaves nothing there, so a loss made of it needs it returned"
    )
