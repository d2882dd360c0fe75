"""Modules that reach their parts by lists, bound methods, lambdas, objects or what `torch.compile` made."""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.utils.hooks import RemovableHandle

_TABLES = ("_parameters", "_buffers", "_modules")
_HOLD_NOTHING = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NOT_ENTERED = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
"""Packages whose objects are not looked into."""
_OPAQUE = (type, ModuleType, Tensor)


def rebind(root: nn.Module, new: Mapping[int, Any]) -> None:
    """Have what the modules of `root` hold refer to `new[id(old)]` in the place of old modules, tensors and tables.

    A lambda, a bound method, a list or an object of the user's in a module's attributes would otherwise still run the
    old modules. Functions and modules that `torch.compile` wrapped are replaced by what they wrap. What holds nothing
    of all that stays the same object.
    """
    attributes = _attributes(root)
    apart = _taken_apart((value for _, _, value in attributes), new)
    changed = _that_reach({*new, *(key for key, one in apart.items() if isinstance(one, _Made) and one.changes)}, apart)
    filled = {key: one for key in changed if isinstance(one := apart[key], _Filled)}
    # What can be filled later is begun first, so that nothing that holds itself, over whatever, finds what it was.
    anew = {*changed, *new}
    again = {key: one.begin(anew) for key, one in filled.items()}

    def rebound(value: Any) -> Any:
        value = new.get(id(value), value)
        if (key := id(value)) not in changed:
            return value
        if isinstance(one := apart[key], _Made) and key not in again:
            again[key] = one.make([rebound(part) for part in one.held])
        return again[key]

    for key, one in sorted(filled.items(), key=lambda item: item[1].hashes):
        one.fill(again[key], [rebound(part) for part in one.held])
    for table, name, value in attributes:
        table[name] = rebound(value)


def tensors_beside(root: nn.Module) -> list[Tensor]:
    """Tensors that the modules of `root` hold, or reach, beside their parameters and buffers."""
    apart = _taken_apart((value for _, _, value in _attributes(root)), {})
    return [one.value for one in apart.values() if isinstance(one.value, Tensor)]


def _attributes(root: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """What modules hold beside parameters, buffers and modules, with the table and the name that have it."""
    tables = [module.__dict__ for module in root.modules()]
    return [(table, name, value) for table in tables for name, value in table.items() if name not in _TABLES]


class _Made(NamedTuple):
    """What `make` makes of its parts at once. `changes`: another stands for it whatever they are."""

    value: Any
    """Alive, so that its id stays its own."""
    held: Sequence[Any] = ()
    make: Callable[[list[Any]], Any] = tuple
    changes: bool = False


class _Filled(NamedTuple):
    """What is begun without its parts, given the ids of what changes, and filled with them later.

    `hashes`: filling it asks for its parts' hash.
    """

    value: Any
    held: Sequence[Any]
    begin: Callable[[set[int]], Any]
    fill: Callable[[Any, list[Any]], None]
    hashes: bool = False


_Apart = _Made | _Filled
"""A value, what it holds, and how to have one like it of other parts."""


def _taken_apart(values: Iterable[Any], new: Mapping[int, Any]) -> dict[int, _Apart]:
    """By id: these, what they hold, what that holds and so on, up to what `new` has another for."""
    apart: dict[int, _Apart] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) not in _HOLD_NOTHING and id(value) not in apart and id(value) not in new:
            apart[id(value)] = one = _parts(value)
            waiting.extend(one.held)
    return apart


def _that_reach(wanted: Iterable[int], apart: Mapping[int, _Apart]) -> set[int]:
    """Ids of what is taken apart and is one of `wanted`, or holds one of them, at whatever depth."""
    holders = defaultdict(list)
    for key, one in apart.items():
        for part in one.held:
            if type(part) not in _HOLD_NOTHING:
                holders[id(part)].append(key)
    found: set[int] = set()
    waiting = [holder for key in wanted for holder in ([key] if key in apart else holders[key])]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting.extend(holders[key])
    return found


def _parts(value: Any) -> _Apart:
    kind = type(value)
    if isinstance(value, frozenset):
        return _Made(value, list(value), kind)
    if isinstance(value, (dict, list, set, deque)):
        return _of_container(value)
    if isinstance(value, tuple):
        return _Made(value, value, getattr(kind, "_make", kind))
    if isinstance(value, MethodType):
        return _Made(value, [value.__self__], lambda parts: MethodType(value.__func__, *parts))
    if isinstance(value, functools.partial):
        held = [value.func, value.args, value.keywords]
        return _Made(value, held, lambda parts: kind(parts[0], *parts[1], **parts[2]))
    if isinstance(value, functools._lru_cache_wrapper):  # what it keeps is of the old parts
        cached = functools.lru_cache(**value.cache_parameters())
        return _Made(value, [value.__wrapped__], lambda parts: cached(*parts))
    if isinstance(value, weakref.ref):
        return _Made(value, [value()], lambda parts: weakref.ref(*parts))
    if kind is RemovableHandle:  # of a hook; refers to a module's tables weakly
        tables = [ref() for ref in (value.hooks_dict_ref, *value.extra_dict_ref)]
        return _Made(value, tables, lambda parts: _handle(value.id, *parts))
    if kind is _WrappedHook:  # of `load_state_dict`; refers to its module weakly
        held = [value.hook, value.module() if value.with_module else None]
        return _Made(value, held, lambda parts: _WrappedHook(*parts))
    if isinstance(value, FunctionType):
        return _of_function(value)
    return _of_object(value)


def _handle(number: int, hooks: Any, *extra: Any) -> RemovableHandle:
    handle = object.__new__(RemovableHandle)
    handle.__setstate__((hooks, number, extra))
    return handle


def _of_container(value: Any) -> _Apart:
    """What a container holds, and attributes of a class of its own."""
    own: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    held = list(value.values()) if isinstance(value, dict) else list(value)

    def fill(new: Any, parts: list[Any]) -> None:
        inside = parts[: len(held)]
        if isinstance(value, dict):
            for key, part in zip(value, inside, strict=True):
                dict.__setitem__(new, key, part)
        elif isinstance(value, set):
            new.clear()
            new.update(inside)
        else:
            for place, part in enumerate(inside):
                new[place] = part
        if own:
            new.__dict__.update(zip(own, parts[len(held) :], strict=True))

    def begin(changed: set[int]) -> Any:
        return copy.copy(value)

    return _Filled(value, [*held, *own.values()], begin, fill, hashes=isinstance(value, set))


def _of_object(value: Any) -> _Apart:
    """The attributes of an object of a class that is neither torch's nor Python's own."""
    kind = type(value)
    slots = [name for each in kind.__mro__ for name in _slots(each) if hasattr(value, name)]
    own: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    if isinstance(value, _OPAQUE) or not (own or slots):
        return _Made(value)
    if kind is not SimpleNamespace and kind.__module__.partition(".")[0] in _NOT_ENTERED:
        return _Made(value)

    def begin(changed: set[int]) -> Any:
        try:
            return SimpleNamespace() if kind is SimpleNamespace else object.__new__(kind)
        except TypeError:  # of a class that is not Python's alone, whose state is not all here
            return value

    def fill(new: Any, parts: list[Any]) -> None:
        if new is value:
            return
        for name, part in zip((*slots, *own), parts, strict=True):
            if name in own:
                new.__dict__[name] = part
            else:
                object.__setattr__(new, name, part)

    held = [*(getattr(value, name) for name in slots), *own.values()]
    return _Filled(value, held, begin, fill)


def _of_function(value: FunctionType) -> _Apart:
    """What a function has in its closure and in the defaults of its arguments; of what `torch.compile` made, what it
    runs."""
    if (compiled := getattr(value, "_torchdynamo_orig_callable", None)) is not None:
        return _Made(value, [compiled], lambda parts: parts[0], changes=True)
    cells = list(value.__closure__ or ())
    filled = [i for i, cell in enumerate(cells) if _is_filled(cell)]

    def begin(changed: set[int]) -> FunctionType:
        own = [CellType() if i in filled and id(c.cell_contents) in changed else c for i, c in enumerate(cells)]
        new = FunctionType(value.__code__, value.__globals__, value.__name__, None, tuple(own))
        new.__dict__.update(value.__dict__)
        return new

    def fill(new: Any, parts: list[Any]) -> None:
        *inside, new.__defaults__, new.__kwdefaults__ = parts
        for i, part in zip(filled, inside, strict=True):
            if new.__closure__[i] is not cells[i]:
                new.__closure__[i].cell_contents = part

    held = [*(cells[i].cell_contents for i in filled), value.__defaults__, value.__kwdefaults__]
    return _Filled(value, held, begin, fill)


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
