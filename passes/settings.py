"""Plain values of modules that a forward reads (`self.beta`, `dropout.p`): the graph has them as constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Settings = dict[tuple[str, str], Any]
"""(module's name, attribute's name) -> bool, number, string, None, or a tuple of them."""


@contextmanager
def settings_read(model: nn.Module) -> Iterator[Settings]:
    """Gives what is read of the model's plain values meanwhile, with the values they have now."""
    own = vars(nn.Module())
    held = {
        (id(module), key): (prefix, value)
        for prefix, module in model.named_modules()
        for key, value in {**_of_class(type(module)), **vars(module)}.items()
        if key not in own and _is_plain(value)
    }
    read: Settings = {}

    def getattribute(module: nn.Module, key: str) -> Any:
        if (id(module), key) in held:
            prefix, value = held[id(module), key]
            read[prefix, key] = value
        return super(nn.Module, module).__getattribute__(key)

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
