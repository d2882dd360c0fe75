"""What tells calls of a parallel module apart that need different graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree

from autopar.modules import settings
from autopar.modules.runtime import Runtime
from passes.capture.autocast import autocast_dtype


class TensorKind(NamedTuple):
    """What a graph knows of a tensor that a call is given, and of a buffer."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool = False


class PlainKind(NamedTuple):
    """Anything else that a call is given: a graph is of its value; of its `repr` where it has no hash."""

    type: Any
    value: Any


class CallKind(NamedTuple):
    """Calls that are equal in this run one graph, as far as that reads no values.

    `given`: by leaf of the arguments. `trained`: which parameters require gradients, None for a call without them.
    `modes`: of each module, whether it is in training mode. `autocast`: the dtype that is cast to, None without.
    """

    structure: str
    given: tuple[TensorKind | PlainKind, ...]
    trained: tuple[bool, ...] | None
    modes: tuple[bool, ...]
    autocast: torch.dtype | None
    buffers: tuple[TensorKind | None, ...]

    def in_words(self) -> str:
        """What tells it apart that ranks have in common: not numbers and objects, whose words may differ."""
        tensors = [each for each in self.given if isinstance(each, TensorKind)]
        shapes = ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
        gradients = "no gradients" if self.trained is None else f"gradients of {sum(self.trained)} parameters"
        modes = f"{sum(self.modes)} of {len(self.modes)} modules in training mode"
        cast_to = "" if self.autocast is None else f" under autocast to {self.autocast}"
        return f"a forward of {shapes} with {gradients}, {modes}{cast_to}"


def kind_of(runtime: Runtime, leaves: Sequence[Any], in_spec: Any, trained: tuple[bool, ...] | None) -> CallKind:
    """The kind of a call with these leaves; `trained` as `CallKind` has it."""
    given = tuple(
        TensorKind(leaf.shape, leaf.dtype, leaf.requires_grad and trained is not None)
        if isinstance(leaf, torch.Tensor)
        else _plain(leaf)
        for leaf in leaves
    )
    modes = tuple(module.training for module in runtime.modules)
    buffers = tuple(
        None if (buffer := table.get(key)) is None else TensorKind(buffer.shape, buffer.dtype)
        for table, key in runtime.buffer_slots
    )
    return CallKind(str(in_spec), given, trained, modes, autocast_dtype(), buffers)


def warn_of_given(runtime: Runtime, kind: CallKind, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Says, on rank 0, which numbers, texts, functions or objects a call was given that are others than those of a
    known one, alike but for them."""
    if runtime.mesh.get_rank() != 0:
        return
    alike = [known.given for known in runtime.executables if known._replace(given=kind.given) == kind]
    before = next((given for given in reversed(alike) if _differ_by_chance(given, kind.given)), None)
    if before is None:
        return
    paths, _ = pytree.tree_flatten_with_path((args, kwargs))
    changed = [
        f"{path_text(path)} ({old.value!r}, now {new.value!r})"
        for (path, _), old, new in zip(paths, before, kind.given, strict=True)
        if isinstance(old, PlainKind) and isinstance(new, PlainKind) and old != new
    ]
    instead = "pass what changes often as a tensor, functions and objects as the same ones, and no names of samples"
    settings.warn_of_changed(changed, instead)


def path_text(path: tuple[Any, ...]) -> str:
    """`input_ids` or `args[0]` for a leaf of `(args, kwargs)`."""
    side, *rest = path
    text = pytree.keystr(tuple(rest))
    if getattr(side, "idx", 0) == 0:
        return f"args{text}"
    first, *deeper = rest
    return f"{getattr(first, 'key', first)}{pytree.keystr(tuple(deeper))}"


def _plain(leaf: Any) -> PlainKind:
    try:
        hash(leaf)
    except TypeError:
        return PlainKind(type(leaf), repr(leaf))
    is_nan = isinstance(leaf, float) and math.isnan(leaf)
    return PlainKind(type(leaf), math.nan if is_nan else leaf)  # this one is equal to itself


def _differ_by_chance(before: Sequence[TensorKind | PlainKind], now: Sequence[TensorKind | PlainKind]) -> bool:
    """Whether calls differ in numbers or texts, or in which object of a class they were given (a lambda made for
    each)."""
    differing = [(old, new) for old, new in zip(before, now, strict=True) if old != new]
    return bool(differing) and all(
        isinstance(old, PlainKind)
        and isinstance(new, PlainKind)
        and (_are_values(old, new) or _is_of_one_class(old, new))
        for old, new in differing
    )


def _are_values(*given: PlainKind) -> bool:
    return all(issubclass(each.type, int | float | str) and each.type is not bool for each in given)


def _is_of_one_class(old: PlainKind, new: PlainKind) -> bool:
    """Whether both are of a class whose objects are equal to themselves alone."""
    return old.type is new.type and old.type.__eq__ is object.__eq__
