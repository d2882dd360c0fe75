"""`autopar.uniform`: random numbers that do not depend on the mesh.

The value of element `i` of a random tensor is a function of (user's seed, step, number of the op, `i`), where `i` is
the element's row-major index in the *global* tensor. A rank that holds a part computes just its part, any two layouts
agree, and a mask that is recomputed for backward is the mask of forward.

    uniform_values   the numbers of a whole tensor, eagerly; what the op gives on one device
    emit_uniform     one rank's part of them, as integer arithmetic that Inductor fuses into its user

The arithmetic is written once: `_key` and `_bits` take tensors and nodes of a graph under construction (`_Traced`)
alike. The generator is counter-based. With `mix` a bijection of 32-bit words of good avalanche, and (a, b) a 64-bit
key:

    bits(i) = mix(mix(i ^ a) + b)            uniform(i) = (bits(i) >> 8) / 2^24

Words are kept in int64 and masked; multipliers have 31 bits, so that no product overflows in any backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.program.adder import Adder, kept_meta

aten = torch.ops.aten

_MASK = (1 << 32) - 1
_MULTIPLIERS = (0x5A48AAB7, 0x5D85AF15)
"""Of 150 random pairs, the one whose avalanche was measured least biased."""
_SALTS = (0x6C8E9CF5, 0x3C79AC49)
_SEED = (0x2545F491, 0x1B873593)
_HIGH = 0x7FEB352D
_BLOCK = 1 << 18


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def _mix(x: Any) -> Any:
    """A bijection of 32-bit words; an int, a tensor or a traced node."""
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 16)


def _step_key(seed: Any) -> tuple[Any, Any]:
    """The 64-bit key of a (user's seed, step)."""
    words = _mix((_mix((seed & _MASK) ^ _SEED[0]) + ((seed >> 32) & _MASK)) & _MASK)
    of_seed, of_step = words[0], words[1]
    a = _mix(of_seed ^ ((of_step + _SEED[1]) & _MASK))
    return a, _mix((of_step + a) & _MASK)


def _key(step_key: tuple[Any, Any], salt: int) -> tuple[Any, Any]:
    """The key of one op in one step."""
    a, b = step_key
    return a ^ _mix(_mix(salt ^ _SALTS[0])), b ^ _mix(_mix(salt ^ _SALTS[1]))


def _bits(index: Any, key: tuple[Any, Any], count: int) -> Any:
    """32 random bits for each index below `count`."""
    a, b = key
    if count > _MASK + 1:
        b = (b + (index >> 32) * _HIGH) & _MASK
        index = index & _MASK
    return _mix((_mix(index ^ a) + b) & _MASK)


def uniform_values(seed: Tensor, salt: int, size: Sequence[int]) -> Tensor:
    """float32 numbers in [0, 1), multiples of 2^-24, for a whole tensor of `size`; `seed` is (user's seed, step)."""
    count = math.prod(size)
    key = _key(_step_key(seed), salt)
    values = torch.empty(count, dtype=torch.float32, device=seed.device)
    for start in range(0, count, _BLOCK):
        index = torch.arange(start, min(start + _BLOCK, count), device=seed.device)
        values[start : start + _BLOCK] = (_bits(index, key, count) >> 8).to(torch.float32) * 2.0**-24
    return values.view(list(size))


@torch.library.custom_op(
    "autopar::uniform", mutates_args=(), schema="(Tensor seed, int salt, int[] size, int[]? padded=None) -> Tensor"
)
def _uniform(seed: Tensor, salt: int, size: Sequence[int], padded: Sequence[int] | None = None) -> Tensor:
    values = uniform_values(seed, salt, size)
    if padded is None:
        return values
    pads = [n for whole, part in zip(reversed(padded), reversed(size), strict=True) for n in (0, whole - part)]
    return torch.nn.functional.pad(values, pads)


@_uniform.register_fake
def _(seed: Tensor, salt: int, size: Sequence[int], padded: Sequence[int] | None = None) -> Tensor:
    return seed.new_empty(size if padded is None else padded, dtype=torch.float32)


UNIFORM = torch.ops.autopar.uniform.default


# --- emission ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Traced:
    """An int64 tensor in a graph under construction, with the operators that the arithmetic uses.

    With `shared`, an equal op that the graph already has is used again.
    """

    node: fx.Node
    emit: Adder
    shared: bool = False

    def _then(self, target: Any, *args: Any) -> _Traced:
        args = (self.node, *(arg.node if isinstance(arg, _Traced) else arg for arg in args))
        if self.shared:
            for user in self.node.users:
                if user.target is target and user.args == args:
                    return replace(self, node=user)
        return replace(self, node=self.emit(target, *args))

    def __xor__(self, other: Any) -> _Traced:
        overload = aten.bitwise_xor.Tensor if isinstance(other, _Traced) else aten.bitwise_xor.Scalar
        return self._then(overload, other)

    def __and__(self, mask: int) -> _Traced:
        return self._then(aten.bitwise_and.Scalar, mask)

    def __rshift__(self, bits: int) -> _Traced:
        return self._then(aten.bitwise_right_shift.Tensor_Scalar, bits)

    def __mul__(self, factor: int) -> _Traced:
        return self._then(aten.mul.Tensor, factor)

    def __add__(self, other: Any) -> _Traced:
        return self._then(aten.add.Tensor, other)

    def __getitem__(self, position: int) -> _Traced:
        return self._then(aten.select.int, 0, position)


def emit_uniform(
    graph: fx.Graph,
    seed: fx.Node,
    salt: int,
    local_size: Sequence[int],
    starts: Sequence[fx.Node | int],
    global_size: Sequence[int],
    meta: Mapping[str, Any] | None = None,
) -> fx.Node:
    """One rank's part of `autopar.uniform(seed, salt, global_size)`, as ops added at the graph's insertion point.

    The part has `local_size` and begins, in each dim, at the global index `starts` (an int, or a node that yields an
    int64 scalar tensor); of a padded tensor, it may reach beyond `global_size`, where any numbers are given. `meta`
    gives the new nodes' phase, module and source. What depends on `seed` alone is put behind the placeholders, once per
    graph.
    """
    local, whole = tuple(local_size), tuple(global_size)
    if not len(local) == len(whole) == len(starts):
        raise ValueError(f"sizes {local} and {whole} and {len(starts)} starts are not of one rank")
    for dim, (part, size, start) in enumerate(zip(local, whole, starts, strict=True)):
        if isinstance(start, int) and not 0 <= start <= max(0, size - part):
            raise ValueError(f"dim {dim}: a part of {part} that starts at {start} does not lie within {size}")
    fake_mode = seed.meta["val"].fake_mode
    emit = Adder(graph, kept_meta(meta or {}), fake_mode)
    step_key = _emit_step_key(graph, seed, fake_mode)
    key = _key((replace(step_key[0], emit=emit, shared=False), replace(step_key[1], emit=emit, shared=False)), salt)
    index = _emit_index(emit, local, starts, whole, seed.meta["val"].device)
    bits = _bits(_Traced(index, emit), key, math.prod(whole)) >> 8
    return emit(aten.mul.Tensor, emit(aten._to_copy.default, bits.node, dtype=torch.float32), 2.0**-24)


def _emit_step_key(graph: fx.Graph, seed: fx.Node, fake_mode: Any) -> tuple[_Traced, _Traced]:
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    emit = Adder(graph, {"phase": "forward", "module": "", "source": ""}, fake_mode)
    traced = _Traced(seed, emit, shared=True)
    if first is None:
        return _step_key(traced)
    with graph.inserting_before(first):
        return _step_key(traced)


def _emit_index(
    emit: Adder,
    local: tuple[int, ...],
    starts: Sequence[fx.Node | int],
    whole: tuple[int, ...],
    device: torch.device,
) -> fx.Node:
    """Global row-major index of each element of the part, in the part's shape (or one that broadcasts to it)."""
    terms: list[fx.Node] = []
    offset_nodes: list[fx.Node] = []
    offset = 0
    stride = 1
    last = len(local)
    for dim in reversed(range(len(local))):
        # Dims that are held whole run on in the index, so they share one `arange` with the next dim to their left.
        if local[dim] == whole[dim] and dim > 0:
            continue
        count = math.prod(local[dim:last])
        rows = emit(aten.arange.default, count, dtype=torch.int64, device=device)
        rows = emit(aten.view.default, rows, [*local[dim:last], *[1] * (len(local) - last)])
        terms.append(rows if stride == 1 else emit(aten.mul.Tensor, rows, stride))
        inner = stride * math.prod(whole[dim + 1 : last])
        start = starts[dim]
        if isinstance(start, fx.Node):
            offset_nodes.append(start if inner == 1 else emit(aten.mul.Tensor, start, inner))
        else:
            offset += start * inner
        stride = inner * whole[dim]
        last = dim
    if not terms:
        terms.append(emit(aten.arange.default, 1, dtype=torch.int64, device=device))
        terms[0] = emit(aten.view.default, terms[0], [])
    index = terms[0]
    for term in (*terms[1:], *offset_nodes):
        index = emit(aten.add.Tensor, index, term)
    return index if offset == 0 else emit(aten.add.Tensor, index, offset)
