"""Products of fp32 matrices by the library that runs them fastest on this machine's CPU: what `calibrate` measures, and
what `passes.lower.products` has programs run.

torch leaves them to MKL, which gives processors that are not Intel's vectors of 256 bits. oneDNN, which torch has too
and uses for bf16, takes the 512 that they have: twice the products a second, to the same rounding. Small products stay
with MKL, as a call of oneDNN takes some 10 microseconds more.

    autopar::mm(a, b), autopar::addmm(bias, a, b)     by oneDNN; operands of any strides; `bias` is a vector
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_LEAST_FLOPS = 4e6
"""Of a product that is worth oneDNN's call: 128 x 128 x 128."""
_AS_THEY_ARE = (torch.Tag.needs_exact_strides,)  # Inductor copies no transposed operands

torch.library.define("autopar::mm", "(Tensor a, Tensor b) -> Tensor", tags=_AS_THEY_ARE)
torch.library.define("autopar::addmm", "(Tensor bias, Tensor a, Tensor b) -> Tensor", tags=_AS_THEY_ARE)


@torch.library.impl("autopar::mm", "cpu")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _linear(a, b, None)


@torch.library.impl("autopar::addmm", "cpu")
def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _linear(a, b, bias)


@torch.library.register_fake("autopar::mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("autopar::addmm")
def _(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and _copies_less_transposed(a, b):
        return _by_rows(b.t(), a.t(), None).t().contiguous()
    return _by_rows(a, b, bias)


def _by_rows(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN reads a bias as if its elements lay side by side, and takes no `b` whose rows or columns share memory.
    bias = None if bias is None else bias.contiguous()
    b = b.contiguous() if _shares_memory(b) else b
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return made


def _copies_less_transposed(a: Tensor, b: Tensor) -> bool:
    """Whether the product of the transposed operands, itself transposed, copies less: oneDNN's call copies a first
    operand whose rows do not lie one after another.

    So it is with the gradient of a weight whose outputs are far more than its inputs, a vocabulary's: `a` is the
    transposed gradient of the outputs.
    """
    (m, k), n = a.shape, b.shape[1]
    return (0 if b.t().is_contiguous() else k * n) + m * n < (0 if a.is_contiguous() else m * k)


def _shares_memory(matrix: Tensor) -> bool:
    """Whether some of a matrix's elements are the same memory, as in a view of windows that overlap."""
    (inner, size), (outer, _) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    return outer < inner * size


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` by the faster library."""
    return _linear(a, b, None) if is_for_onednn(a, b) else torch.mm(a, b)


def layers_work() -> Callable[[], Tensor]:
    """Some milliseconds of a layer's work on a CPU: two products and what is pointwise, over more than a core's cache
    holds."""
    rows, wide, narrow = torch.ones(1536, 256), torch.ones(256, 384), torch.ones(384, 256)
    return lambda: product(product(rows, wide).mul(0.5), narrow).add(1.0)


def is_for_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is faster for a product of two matrices, and they are on this CPU; looks at no values."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] >= _LEAST_FLOPS and _has_what_mkl_leaves()


@functools.cache
def _has_what_mkl_leaves() -> bool:
    """Whether this CPU has vectors of 512 bits that MKL does not use, and torch has both libraries."""
    facts = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not facts.exists():
        return False
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and bool(torch.backends.mkldnn.enabled) and "GenuineIntel" not in facts.read_text()
