"""Copies of a module tree that share everything but the modules themselves, their parameters and their buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from passes.capture.rebind import rebind

Slot = tuple[dict[str, Any], str]
"""Where a parameter or buffer hangs: a module's `_parameters` or `_buffers`, and the key."""

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""A module's tables of hooks around its forward and backward."""
TABLES = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS, "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks",
)  # fmt: skip


class Children(NamedTuple):
    """By place: a module's `_modules`, a key of it, the module there, and its name."""

    tables: tuple[dict[str, Any], ...] = ()
    keys: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    names: tuple[str, ...] = ()


def children(root: nn.Module) -> Children:
    """Where each module below `root` hangs."""
    found = [
        (module._modules, key, child, f"{prefix}.{key}" if prefix else key)
        for prefix, module in root.named_modules()
        for key, child in module._modules.items()
        if child is not None
    ]
    return Children(*zip(*found, strict=True)) if found else Children()


def copied(root: nn.Module, parameter: Callable[[str, Any], Any], buffer: Callable[[str, Any], Any]) -> nn.Module:
    """A copy of `root`'s tree with `parameter(name, old)` and `buffer(name, old)` in the place of what it holds.

    Names are the first of each tensor's; what is shared (a tied weight, a module used twice) stays shared. What modules
    hold beside (lists of modules, bound methods, lambdas, hooks' handles) belongs to the copy, and what was compiled is
    plain there.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Any] = {}
    tables: dict[int, Any] = {}

    def tensor(name: str, old: Any, make: Callable[[str, Any], Any]) -> Any:
        if old is not None and id(old) not in tensors:
            tensors[id(old)] = make(name, old)
        return None if old is None else tensors[id(old)]

    def visit(old: nn.Module, prefix: str) -> nn.Module:
        if id(old) in modules:
            return modules[id(old)]
        new = object.__new__(type(old))
        modules[id(old)] = new
        new.__dict__.update(old.__dict__)
        for table in TABLES:
            if table in old.__dict__:
                tables[id(old.__dict__[table])] = new.__dict__[table] = copy.copy(old.__dict__[table])
        for key, weight in old._parameters.items():
            new._parameters[key] = tensor(prefix + key, weight, parameter)
        for key, value in old._buffers.items():
            new._buffers[key] = tensor(prefix + key, value, buffer)
        for key, child in old._modules.items():
            new._modules[key] = None if child is None else visit(child, f"{prefix}{key}.")
        return new

    new = visit(root, "")
    rebind(new, {**modules, **tensors, **tables})
    return new


def slots(root: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Every name of every parameter and buffer, tied ones and None ones too, and where it hangs."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key in table:
                yield f"{prefix}.{key}" if prefix else key, (table, key)
