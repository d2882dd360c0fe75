"""Modules that reach their parts by lists, bound methods, lambdas or what `torch.compile` made."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

_TABLES = ("_parameters", "_buffers", "_modules")
_HOLD_NOTHING = (bool, int, float, str, type(None), set)


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
            if key not in _TABLES and type(value) not in _HOLD_NOTHING:
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
    if kind is _WrappedHook:  # of `load_state_dict`; refers to its module weakly
        return [value.hook, value.module() if value.with_module else None], lambda parts: _WrappedHook(*parts)
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
