"""Mixed precision: parameters stored in one dtype, computed with in another, their gradients added up in a third.

    parameter   stored    -cast->  computed  -gather->  compute
    gradient    computed  -cast->  reduced   -add up->  -cast->  stored

The program is captured in the dtypes that it computes in. What a parameter is stored as, and where its gradient is
added, its `Input` says (`dtypes`), and the itinerary of every layout has the casts: what is gathered and added is what
stands between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context in which ops and modules make tensors of `dtype` where they are told none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Dtypes of one parameter: at rest, in compute, and in which partial sums of its gradient are added."""

    stored: torch.dtype
    computed: torch.dtype
    reduced: torch.dtype


@dataclass(frozen=True, slots=True)
class Precision:
    """What a step computes in: FSDP2's `MixedPrecisionPolicy`, for the model as a whole.

    `parameters`: the dtype of parameters in compute. `reductions`: that in which partial sums of their gradients are
    added over ranks (default: the gradients' own). `outputs`: of what the model returns. `cast_inputs`: floating inputs
    are cast to `parameters`. None leaves dtypes as they are; tensors that are not floating stay as they are.
    """

    parameters: torch.dtype | None = None
    reductions: torch.dtype | None = None
    outputs: torch.dtype | None = None
    cast_inputs: bool = True

    def dtypes_of(self, parameter: Tensor) -> Dtypes | None:
        """The dtypes of a parameter; None where all three are its own."""
        stored = parameter.dtype
        if not stored.is_floating_point:
            return None
        computed = self.parameters or stored
        found = Dtypes(stored, computed, self.reductions or computed)
        return found if found != Dtypes(stored, stored, stored) else None

    def cast_input(self, leaf: Any) -> Any:
        """An input of the model as its forward gets it."""
        return _cast(leaf, self.parameters) if self.cast_inputs else leaf

    def cast_output(self, leaf: Any) -> Any:
        """An output of the model's forward as its caller gets it."""
        return _cast(leaf, self.outputs)

    def notes(self, parameters: Sequence[Tensor]) -> tuple[str, ...]:
        """Notes for the user on the dtypes in force."""
        every = [dtypes for parameter in parameters if (dtypes := self.dtypes_of(parameter)) is not None]
        found = []
        for dtypes in dict.fromkeys(every):
            stored, computed, reduced = map(dtype_text, (dtypes.stored, dtypes.computed, dtypes.reduced))
            found.append(
                f"mixed precision: parameters and gradients are {stored}, as the optimizer finds them; parameters are "
                f"gathered and computed with in {computed}, their gradients added over ranks in {reduced}"
            )
            if dtypes.computed.itemsize > dtypes.stored.itemsize:
                found.append(
                    f"parameters are stored in {stored}, below {computed} that they are computed in, so that there is "
                    f"no {computed} copy for the optimizer; convert the model to {computed} to have one"
                )
        if torch.float16 in {dtypes.computed for dtypes in every}:
            found.append("float16 gradients may underflow to zero: scale the loss, as torch.amp.GradScaler does")
        return tuple(found)


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    cast = dtype is not None and isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != dtype
    return leaf.to(dtype) if cast else leaf


def dtype_text(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """`torch.bfloat16` for `bfloat16`."""
    found: torch.dtype = getattr(torch, name)
    return found
