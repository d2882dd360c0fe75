"""Modules that reach their parts by lists, bound methods, lambdas, objects or what `torch.compile` made."""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

_TABLES = ("_parameters", "_buffers", "_modules")
_HOLD_NOTHING = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NOT_ENTERED = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
"""Packages whose objects are not looked into."""
_OPAQUE = (type, ModuleType, Tensor)


def rebind(root: nn.Module, new: Mapping[int, Any]) -> None:
    """Have what the modules of `root` hold refer to `new[id(old)]` in the place of old modules and tensors.

    A lambda, a bound method, a list or an object of the user's in a module's attributes would otherwise still run the
    old modules. Functions and modules that `torch.compile` wrapped are replaced by what they wrap.
    """
    done: dict[int, Any] = {}

    def rebound(value: Any) -> Any:
        """`value` itself where nothing that it holds has changed."""
        if type(value) in _HOLD_NOTHING:
            return value
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
            if key not in _TABLES:
                module.__dict__[key] = rebound(value)


def _parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What a container, function or object holds, and what makes one like it of other parts."""
    kind = type(value)
    if isinstance(value, (dict, list, set, frozenset, deque)):
        return _of_container(value)
    if isinstance(value, tuple):
        return list(value), getattr(kind, "_make", kind)
    if isinstance(value, MethodType):
        return [value.__self__], lambda parts: MethodType(value.__func__, *parts)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords], lambda parts: kind(parts[0], *parts[1], **parts[2])
    if isinstance(value, functools._lru_cache_wrapper):  # what it keeps is of the old parts
        return [value.__wrapped__], lambda parts: functools.lru_cache(**value.cache_parameters())(*parts)
    if isinstance(value, weakref.ref):
        return [value()], lambda parts: weakref.ref(*parts)
    if kind is _WrappedHook:  # of `load_state_dict`; refers to its module weakly
        return [value.hook, value.module() if value.with_module else None], lambda parts: _WrappedHook(*parts)
    if isinstance(value, FunctionType):
        return _of_function(value)
    return _of_object(value)


def _of_container(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What a container holds, and attributes of a class of its own."""
    own: dict[str, Any] = getattr(value, "__dict__", {})
    held = list(value.values()) if isinstance(value, dict) else list(value)

    def made(parts: list[Any]) -> Any:
        inside, attributes = parts[: len(held)], dict(zip(own, parts[len(held) :], strict=True))
        if isinstance(value, frozenset):
            return type(value)(inside)
        new = copy.copy(value)
        if isinstance(value, dict):
            for key, part in zip(value, inside, strict=True):
                dict.__setitem__(new, key, part)
        elif isinstance(value, set):
            new.clear()
            new.update(inside)
        else:
            for place, part in enumerate(inside):
                new[place] = part
        if attributes:
            new.__dict__.update(attributes)
        return new

    return [*held, *own.values()], made


def _of_object(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The attributes of an object of a class that is neither torch's nor Python's own."""
    kind = type(value)
    slots = [name for each in kind.__mro__ for name in _slots(each) if hasattr(value, name)]
    own: dict[str, Any] = getattr(value, "__dict__", {})
    if isinstance(value, _OPAQUE) or not (own or slots):
        return [], lambda parts: value
    if kind is not SimpleNamespace and kind.__module__.partition(".")[0] in _NOT_ENTERED:
        return [], lambda parts: value

    def made(parts: list[Any]) -> Any:
        try:
            new = SimpleNamespace() if kind is SimpleNamespace else object.__new__(kind)
        except TypeError:  # of a class that is not Python's alone, whose state is not all here
            return value
        for name, part in zip((*slots, *own), parts, strict=True):
            if name in own:
                new.__dict__[name] = part
            else:
                object.__setattr__(new, name, part)
        return new

    return [*(getattr(value, name) for name in slots), *own.values()], made


def _of_function(value: FunctionType) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """What a function has in its closure and in the defaults of its arguments."""
    filled = [i for i, cell in enumerate(value.__closure__ or ()) if _is_filled(cell)]
    held = [value.__closure__[i].cell_contents for i in filled]  # type: ignore[index]
    return [*held, value.__defaults__, value.__kwdefaults__], lambda parts: _function(value, filled, parts)


def _slots(kind: type) -> tuple[str, ...]:
    """Names that a class keeps attributes under without a dict."""
    names = kind.__dict__.get("__slots__", ())
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if not name.startswith("__"))


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _function(old: FunctionType, where: list[int], parts: list[Any]) -> FunctionType:
    """`old` with these contents in the cells of its closure, and behind them its defaults."""
    *inside, defaults, by_name = parts
    cells = list(old.__closure__ or ())
    for i, part in zip(where, inside, strict=True):
        cells[i] = cells[i] if cells[i].cell_contents is part else CellType(part)
    made = FunctionType(old.__code__, old.__globals__, old.__name__, defaults, tuple(cells))
    made.__kwdefaults__ = by_name
    made.__dict__.update(old.__dict__)
    return made
