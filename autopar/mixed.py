"""`Options(mp_policy=...)`: FSDP2's `MixedPrecisionPolicy`, checked, and in a plan's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from passes.program.precision import Precision, dtype_named, dtype_text

_DTYPES = ("param_dtype", "reduce_dtype", "output_dtype")
_FIELDS = (*_DTYPES, "cast_forward_inputs")


def precision_of(policy: Any) -> Precision | None:
    """What `policy` asks of the compiler; None where it asks for nothing.

    Raises:
        ValueError: no `MixedPrecisionPolicy`, or a dtype in it that is none of floating-point numbers.
    """
    if policy is None:
        return None
    if not isinstance(policy, MixedPrecisionPolicy):
        raise ValueError(
            f"Options(mp_policy={policy!r}) is a {type(policy).__name__}; pass "
            "torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
        )
    for name in (field.name for field in fields(policy)):
        if name not in _FIELDS and getattr(policy, name) is not None:
            raise ValueError(
                f"MixedPrecisionPolicy({name}=...): autopar has one dtype for all parameters; leave it out"
            )
    for name in _DTYPES:
        dtype = getattr(policy, name)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"MixedPrecisionPolicy({name}={dtype!r}): not a floating-point dtype; pass torch.bfloat16, "
                "torch.float16, torch.float32, or None"
            )
        if dtype is not None and dtype.itemsize < 2:
            raise ValueError(
                f"MixedPrecisionPolicy({name}={dtype}): eight bits need scales, which autopar does not keep; pass "
                "torch.bfloat16, torch.float16, torch.float32, or None"
            )
    found = Precision(policy.param_dtype, policy.reduce_dtype, policy.output_dtype, policy.cast_forward_inputs)
    return None if found == Precision(cast_inputs=found.cast_inputs) else found


def policy_code(policy: MixedPrecisionPolicy) -> str:
    """A policy as code: what of it is not the default."""
    default = MixedPrecisionPolicy()
    said = [f"{name}={x!r}" for name in _FIELDS if (x := getattr(policy, name)) != getattr(default, name)]
    return f"MixedPrecisionPolicy({', '.join(said)})"


def policy_json(policy: MixedPrecisionPolicy | None) -> dict[str, Any] | None:
    """A policy as a plan's file keeps it: `{"param_dtype": "bfloat16", ...}`."""
    if policy is None:
        return None
    told = {name: getattr(policy, name) for name in _FIELDS}
    return {name: dtype_text(x) if isinstance(x, torch.dtype) else x for name, x in told.items()}


def policy_from(kept: Any) -> MixedPrecisionPolicy | None:
    """The policy that a plan's file has.

    Raises:
        ValueError: no object, or an unknown field or dtype.
    """
    if kept is None:
        return None
    if not isinstance(kept, Mapping):
        raise ValueError(f"the plan's mp_policy is {kept!r}, no object of dtypes; write null where there is none")
    for name, value in kept.items():
        if name not in _FIELDS:
            raise ValueError(f"the plan's mp_policy: unknown field {name!r}; known are {', '.join(_FIELDS)}")
        if name in _DTYPES and value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise ValueError(f"the plan's mp_policy: {name} is {value!r}, which is no dtype; write bfloat16, float32")
    made: dict[str, Any] = {
        name: dtype_named(x) if name in _DTYPES and x is not None else x for name, x in kept.items()
    }
    return MixedPrecisionPolicy(**made)
