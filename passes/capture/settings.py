"""What a forward reads of its modules' attributes: plain values (`self.beta`, `dropout.p`), which the graph has as
constants, and those that it writes before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Settings = dict[tuple[str, str], Any]
"""(module's name, attribute's name) -> bool, number, string, None, or a tuple of them."""


@dataclass(frozen=True)
class Reads:
    """What was read of modules. Attributes are by the names that code has for them (`layers.0.weight`)."""

    settings: Settings = field(default_factory=dict)
    before: set[str] = field(default_factory=set)
    """Numbers and tensors read as they were before."""
    after: set[str] = field(default_factory=set)
    """Those read once they had been written."""


def attributes(model: nn.Module) -> dict[tuple[int, str], tuple[str, Any]]:
    """Plain numbers and tensors that modules hold as attributes, not as parameters, buffers or modules.

    By the module's id and the attribute's key: the name that code has for it (`layers.0.beta`), and the value.
    """
    return {
        (id(module), key): (f"{prefix}.{key}" if prefix else key, value)
        for prefix, module in model.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, (bool, int, float, Tensor))
    }


@contextmanager
def settings_read(model: nn.Module) -> Iterator[Reads]:
    """Gives what is read of the model's attributes meanwhile, plain values with what they are now."""
    own = vars(nn.Module())
    held = {
        (id(module), key): (prefix, value)
        for prefix, module in model.named_modules()
        for key, value in {**_of_class(type(module)), **vars(module)}.items()
        if key not in own and _is_plain(value)
    }
    named = attributes(model)
    read = Reads()

    def getattribute(module: nn.Module, key: str) -> Any:
        place = id(module), key
        if place in held:
            prefix, value = held[place]
            read.settings[prefix, key] = value
        found = super(nn.Module, module).__getattribute__(key)
        if place in named:
            name, value = named[place]
            (read.before if found is value else read.after).add(name)
        return found

    nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign, assignment]
    try:
        yield read
    finally:
        del nn.Module.__getattribute__


def _of_class(kind: type) -> dict[str, Any]:
    """What a module's class says that a module may say otherwise."""
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        found.update((key, value) for key, value in vars(each).items() if not key.startswith("__"))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)
