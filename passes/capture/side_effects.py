"""What a forward does beside what it returns: the model is put back as it was, and notes tell what is lost by that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from passes.capture.slots import Slot
from passes.capture.tracing import unwrapped


def mutated_notes(slots: Sequence[Slot]) -> list[str]:
    """Notes on inputs and parameters that the forward writes to in place."""
    written = [slot.input for slot in slots if unwrapped(slot.view) is not slot.fake]
    return [
        f"{what.kind} {what.name}: the forward writes to it in place; only the graph sees what it wrote"
        for what in written
        if what.kind != "buffer"
    ]


def empty_buffers(model: nn.Module) -> dict[str, None]:
    """Buffers without a tensor, by name."""
    return {
        f"{prefix}.{key}" if prefix else key: None
        for prefix, module in model.named_modules()
        for key, value in module._buffers.items()
        if value is None
    }


def attribute_notes(before: Mapping[str, Any], after: Mapping[str, Any], but: Collection[str]) -> list[str]:
    """Notes on attributes that the forward changes and the next eager call would read. Attributes named in `but` are
    overwritten before they are read, as `torch.nn.utils.weight_norm` does with a weight."""

    def changed(old: Any, new: Any) -> bool:
        return old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new)

    return [
        f"attribute {name}: the forward changes it, and every step finds it as the first one did; what one step leaves "
        "to the next is for a buffer that is a tensor from the start"
        for name, old in before.items()
        if name in after and name not in but and changed(old, after[name])
    ]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context that restores, on exit, every attribute of the model's modules and the contents of their lists, dicts and
    sets."""
    before = []
    for module in model.modules():
        attributes = dict(module.__dict__)
        held = {k: v.copy() for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}
        before.append((module, attributes, held))
    try:
        yield
    finally:
        for module, attributes, held in before:
            for key, content in held.items():
                _restore(attributes[key], content)
            _restore(module.__dict__, attributes)


def _restore(container: Any, content: Any) -> None:
    if len(container) == len(content) and all(
        (a is b) for a, b in zip(_parts(container), _parts(content), strict=True)
    ):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _parts(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for key, value in container.items():
            yield key
            yield value
    else:
        yield from container
