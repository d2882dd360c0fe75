"""Gradients of backwards that exchanged nothing: added up on this rank until one does."""

from __future__ import annotations

import torch

from autopar.modules.runtime import Executable, Runtime
from passes.lower.lower import Unreduced


def hold(runtime: Runtime, executable: Executable, terms: Unreduced) -> None:
    """Add this rank's terms of gradients to those of earlier backwards; in fp32 where their dtype is shorter."""
    dtypes = [term.dtype for term in terms.partial]
    _, before, _ = runtime.unreduced.setdefault(id(executable), (executable, Unreduced([], terms.others), dtypes))
    if before.partial:
        torch._foreach_add_(before.partial, terms.partial)
    else:
        # Compiled code may give one buffer twice, or the caller's own: sums need their own.
        before.partial = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in terms.partial]


def reduced(runtime: Runtime) -> dict[str, torch.Tensor]:
    """Gradients of everything that was held back, exchanged between ranks."""
    found: dict[str, torch.Tensor] = {}
    held, runtime.unreduced = runtime.unreduced, {}
    for executable, terms, dtypes in held.values():
        terms.partial = [term.to(dtype) for term, dtype in zip(terms.partial, dtypes, strict=True)]
        names = [output.name for output in executable.local.outputs if output.kind == "gradient"]
        for name, value in zip(names, executable.lowered.reduce(terms), strict=True):
            if value is not None:
                found[name] = value if name not in found else found[name] + value
    return found
