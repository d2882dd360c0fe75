"""A step is that of the plain values which its forward read from modules (`model.beta`, `dropout.p`) when it was
captured: a new value is a call of another kind."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

from torch import nn

from autopar.modules.runtime import Executable, Runtime


class Read(NamedTuple):
    """By place: a module, the name that it has in the model, an attribute of it, and the value that was read."""

    modules: tuple[nn.Module, ...] = ()
    prefixes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()


def hold(runtime: Runtime, executable: Executable) -> bool:
    """Whether modules have the values that the executable was captured with."""
    read = _read(runtime, executable)
    return tuple(map(getattr, read.modules, read.attributes, repeat(None))) == read.values


def warn_of_new(runtime: Runtime, executable: Executable) -> None:
    """Says, on rank 0, which values are others than those that the executable was captured with."""
    if runtime.mesh.get_rank() != 0:
        return
    changed = [
        f"{prefix}{'.' if prefix else ''}{attribute} ({old!r}, now {new!r})"
        for module, prefix, attribute, old in zip(*_read(runtime, executable), strict=True)
        if old != (new := getattr(module, attribute, None))
    ]
    warn_of_changed(changed, "what changes often belongs in a buffer or an input that the forward reads as a tensor")


def warn_of_changed(changed: Sequence[str], instead: str) -> None:
    """Warn that changed values make a call of another kind, and say what would not."""
    warnings.warn(
        f"{', '.join(changed[:3])} changed: the step is captured and planned anew, which takes seconds for each new "
        f"value; {instead}",
        stacklevel=3,
    )


def put_back(plain: nn.Module, executable: Executable) -> None:
    """Set the attributes of `plain`'s modules to the values that the executable was captured with."""
    for module, _, name, value in _held(plain, executable):
        setattr(module, name, value)


def _read(runtime: Runtime, executable: Executable) -> Read:
    known = runtime.settings.get(id(executable))
    if known is None:
        found = _held(runtime.modules[0], executable)
        known = runtime.settings[id(executable)] = Read(*zip(*found, strict=True)) if found else Read()
    return known


def _held(root: nn.Module, executable: Executable) -> list[tuple[nn.Module, str, str, Any]]:
    """What `Read` has by place, of the modules of `root`."""
    modules = dict(root.named_modules())
    settings = executable.local.program.settings.items()
    return [(modules[prefix], prefix, name, value) for (prefix, name), value in settings if prefix in modules]
