"""`PickedCount`: how many rows a mask picks, where a model asks; it is not known while the model is traced.

The tracer gives a mask's every position (`picked_rows`), so a tensor of picked rows is as long as the mask. A model may
ask whether there are any, and reshape them; what it computes from the number would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

_SIZES = {Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__}  # type: ignore[attr-defined]
_PLAIN = {Tensor.__len__}
"""Those whose result Python makes a plain number of."""
_SHAPED_BY = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten}
"""Functions that take a number of rows as a size; what makes a tensor of as many knows nothing of those not picked."""


class PickedCount(int):
    """The most rows that there can be; `refuse` is called where more is asked than whether there are any."""

    refuse: Callable[[], Any]

    @classmethod
    def of(cls, most: int, refuse: Callable[[], Any]) -> PickedCount:
        """A number of rows."""
        count = cls(most)
        count.refuse = refuse
        return count

    __hash__ = int.__hash__


def _compared(name: str) -> Callable[[PickedCount, Any], Any]:
    def compare(count: PickedCount, other: Any) -> Any:
        if isinstance(other, int) and other in (0, 1):
            return getattr(int, name)(count, other)
        return count.refuse()

    return compare


def _computed(count: PickedCount, *_: Any) -> Any:
    return count.refuse()


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(PickedCount, _name, _compared(_name))
for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "divmod", "and", "or", "lshift", "rshift"):
    setattr(PickedCount, f"__{_name}__", _computed)
    setattr(PickedCount, f"__r{_name}__", _computed)
for _name in ("neg", "int", "float", "round"):
    setattr(PickedCount, f"__{_name}__", _computed)


def is_size(func: Any) -> bool:
    """Whether `func` says how large a tensor is."""
    return func in _SIZES


def counted(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], picked: Collection[int], refuse: Callable[[], Any]
) -> Any:
    """What a function of `_SIZES` gives, with `PickedCount` for what is a number of `picked` rows."""
    size = func(*args, **kwargs)
    if func in _PLAIN and size in picked:
        return refuse()
    if isinstance(size, int):
        return PickedCount.of(size, refuse) if size in picked else size
    return torch.Size([PickedCount.of(each, refuse) if each in picked else each for each in size])


def refuse_counts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a number of picked rows as an argument that is no shape."""
    if func in _SHAPED_BY:
        return
    for value in (*args, *kwargs.values()):
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, PickedCount):
                each.refuse()
