"""Plain values of modules that a forward reads (`self.beta`, `dropout.p`): the graph has them as constants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Settings = dict[tuple[str, str], Any]
"""(module's name, attribute's name) -> bool, number, string or None."""


@contextmanager
def settings_read(model: nn.Module) -> Iterator[Settings]:
    """Gives what is read of the model's plain values meanwhile, with the values they have now."""
    own = vars(nn.Module())
    held = {
        (id(module), key): (prefix, value)
        for prefix, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in own and isinstance(value, bool | int | float | str | None)
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
