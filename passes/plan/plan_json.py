"""A plan's file: JSON with a format name and a version, one decision or parameter per line, in a stable order."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from costmodel.files import read_json

FORMAT = "autopar-plan"
VERSION = 1
NOT_IN_THE_FILE: Mapping[str, Any] = types.MappingProxyType({"in_file": False})
"""Metadata of a field that is left out of the file."""

T = TypeVar("T")


def dump(plan: Any) -> str:
    """The text of a plan's file."""
    data = {"format": FORMAT, "version": VERSION, **_plain(plan)}
    lines = [f"  {json.dumps(key)}: {_pretty(value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in _fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that its file has."""
    return [f for f in dataclasses.fields(kind) if f.metadata.get("in_file", True)]


def _pretty(value: Any) -> str:
    """One line per entry of a mapping or list of entries; the entries themselves on one line."""
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"    {json.dumps(v)}" for v in value) + "\n  ]"
    return json.dumps(value)


def parse(kind: type[T], text: str, where: str) -> T:
    """The plan (a dataclass `kind`) whose file has this text; `where` names it in errors.

    Raises:
        ValueError: not JSON, not a plan, another version, or a missing, unknown or wrong field.
    """
    try:
        data = read_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); pass a file that Plan.save wrote") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{where}: not a plan: found format {found!r}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{where}: a plan of version {data.get('version')!r}, but this autopar reads version {VERSION}; "
            "make the plan again"
        )
    fields = {key: value for key, value in data.items() if key not in ("format", "version")}
    plan = _read(kind, fields, where)
    assert isinstance(plan, kind)
    return plan


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`; `where` is its path."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: found {value!r}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin is types.UnionType:
        return None if value is None else _read(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        entries = _expect(value, list, where)
        if args[-1] is Ellipsis:
            return tuple(_read(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(entries))
        if len(entries) != len(args):
            raise ValueError(f"{where}: found {len(entries)} entries, expected {len(args)}")
        return tuple(_read(a, entry, f"{where}[{i}]") for i, (a, entry) in enumerate(zip(args, entries, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        return {key: _read(args[1], entry, f"{where}[{key!r}]") for key, entry in _expect(value, dict, where).items()}
    if kind is float:
        if value is None:
            return math.inf
        return float(_expect(value, (int, float), where))
    return _expect(value, kind, where)


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    entries = _expect(value, dict, where)
    fields = _fields(kind)
    unknown = entries.keys() - {f.name for f in fields}
    if unknown:
        raise ValueError(f"{where}: unknown field {min(unknown)!r}; known are {', '.join(f.name for f in fields)}")
    found = {}
    for f in fields:
        if f.name in entries:
            found[f.name] = _read(_hints(kind)[f.name], entries[f.name], f"{where}: {f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the field {f.name!r} is missing; pass a file that Plan.save wrote")
    return kind(**found)


def _expect(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: found {value!r}, expected {names}")
    return value
