"""Hooks of modules. Those that a model comes with are part of its captured graph, as its forward's lines are.

The parallel module must not run them again around its own forward. So each module of its tree keeps them aside, for
captures to come. Those that are registered on the parallel module itself run at each call, and are in no graph.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from autopar.modules.tree import HOOKS

_KEPT = "_autopar_own_hooks"
_KIND = "_is_full_backward_hook"


def set_aside(root: nn.Module) -> None:
    """Have no module of `root` run the hooks that it has."""
    for module in root.modules():
        held: dict[str, Any] = module.__dict__
        held[_KEPT] = {name: held[name] for name in (*HOOKS, _KIND) if name in held}
        held.update({name: OrderedDict() if name in HOOKS else None for name in held[_KEPT]})


def put_back(root: nn.Module) -> None:
    """Undo `set_aside`; hooks registered since are dropped."""
    for module in root.modules():
        module.__dict__.update(module.__dict__.pop(_KEPT, {}))
