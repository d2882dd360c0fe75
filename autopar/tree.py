"""Copies of a module tree that share everything but the modules themselves, their parameters and their buffers."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

Slot = tuple[dict[str, Any], str]
"""Where a parameter or buffer hangs: a module's `_parameters` or `_buffers`, and the key."""

TABLES = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_state_dict_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def copied(root: nn.Module, parameter: Callable[[str, Any], Any], buffer: Callable[[str, Any], Any]) -> nn.Module:
    """A copy of `root`'s tree with `parameter(name, old)` and `buffer(name, old)` in the place of what it holds.

    Names are the first of each tensor's; what is shared (a tied weight, a module used twice) stays shared. What modules
    hold beside (lists of modules, bound methods, lambdas) belongs to the copy, and what was compiled is plain there.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Any] = {}

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
                new.__dict__[table] = copy.copy(old.__dict__[table])
        for key, weight in old._parameters.items():
            new._parameters[key] = tensor(prefix + key, weight, parameter)
        for key, value in old._buffers.items():
            new._buffers[key] = tensor(prefix + key, value, buffer)
        for key, child in old._modules.items():
            new._modules[key] = None if child is None else visit(child, f"{prefix}{key}.")
        return new

    new = visit(root, "")
    rebind(new, {**modules, **tensors})
    return new


def rebind(root: nn.Module, new: Mapping[int, Any]) -> None:
    """Have what the modules of `root` hold refer to `new[id(old)]` in the place of old modules and tensors.

    A lambda, a bound method or a list in a module's attributes would otherwise still run the old modules. Functions and
    modules that `torch.compile` wrapped are replaced by what they wrap.
    """
    done: dict[int, Any] = {}

    def rebound(value: Any) -> Any:
        """`value` itself where nothing that it holds has changed."""
        if id(value) in new:
            return new[id(value)]
        if id(value) not in done:
            done[id(value)] = value  # where it holds itself
            done[id(value)] = remade(value)
        return done[id(value)]

    def remade(value: Any) -> Any:
        compiled = getattr(value, "_torchdynamo_orig_callable", None) if isinstance(value, FunctionType) else None
        if compiled is not None:
            return rebound(compiled)
        held, make = _parts(value)
        parts = [rebound(part) for part in held]
        return value if all(a is b for a, b in zip(held, parts, strict=True)) else make(parts)

    for module in root.modules():
        for key, value in module.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                module.__dict__[key] = rebound(value)


def _parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What a container or function holds, and what makes one like it of other parts."""
    kind = type(value)
    if kind in (list, tuple):
        return list(value), kind
    if kind in (dict, OrderedDict):
        return list(value.values()), lambda parts: kind(zip(value, parts, strict=True))
    if isinstance(value, MethodType):
        return [value.__self__], lambda parts: MethodType(value.__func__, *parts)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords], lambda parts: kind(parts[0], *parts[1], **parts[2])
    if isinstance(value, FunctionType) and value.__closure__:
        filled = [i for i, cell in enumerate(value.__closure__) if _is_filled(cell)]
        return [value.__closure__[i].cell_contents for i in filled], lambda parts: _function(value, filled, parts)
    return [], lambda parts: value


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _function(old: FunctionType, where: list[int], parts: list[Any]) -> FunctionType:
    """`old` with these contents in the cells of its closure."""
    cells = list(old.__closure__ or ())
    for i, part in zip(where, parts, strict=True):
        cells[i] = cells[i] if cells[i].cell_contents is part else CellType(part)
    made = FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__, tuple(cells))
    made.__kwdefaults__ = old.__kwdefaults__
    made.__dict__.update(old.__dict__)
    return made


def slots(root: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Every name of every parameter and buffer, tied ones and None ones too, and where it hangs."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key in table:
                yield f"{prefix}.{key}" if prefix else key, (table, key)
