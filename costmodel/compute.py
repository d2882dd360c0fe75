"""Seconds that one rank's operation takes on a device.

    op_s = launch + max(arithmetic, memory)         a roofline, with a constant launch that sharding cannot save

(A matrix product takes the root of the sum of squares instead of the maximum: a tile is written when its arithmetic is
done, so the two overlap only in part where they are about as long.)

Arithmetic runs at the device's best efficiency, less what the shape costs: a matrix product is cut into output tiles
that run in waves over the SMs (a half-empty last wave or tile is wasted), and each tile pays a start-up along `k`.
Memory traffic runs at a fraction of the datasheet rate that depends on how the kind of op reads. What a fused
pointwise chain costs is the bytes that enter and leave it (`fuse`).

Nothing is free: an op of unknown kind pays its bytes at the slowest rate known, and its FLOPs off the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, hypot

from costmodel.hardware import Device, dtype_name

KINDS = ("matmul", "attention", "attention_backward", "pointwise", "reduction", "copy", "gather", "scatter", "view")
"""Kinds that `op_s` knows; any other is priced as a slow, memory-bound op."""

_RATE = {
    "matmul": 1.0,
    "attention": 1.0,
    "attention_backward": 1.0,
    "pointwise": 1.0,
    "copy": 1.0,
    "reduction": 0.9,
    "gather": 0.7,
    "scatter": 0.5,
}
"""Share of `memory_bytes_per_s * memory_efficiency` by kind: streaming; a second pass or a tree at the end; whole rows
at random; rows that are read, added to and written (atomics)."""

_UNKNOWN_RATE = 0.25
"""The same for kinds we do not know: slower than any we do."""

_REREAD = 0.15
"""Slowdown of a tile that reads its operands once more per multiply-add than the best tile does."""

_K_START = 64
"""Depth of `k` that filling the pipeline of a tile costs: a kernel's stages, 2 of 32; less for the small tiles of a
CPU."""

_CUT_K = 1024
"""Depth from which kernels cut a product along `k` to fill the last wave (split-K, stream-K)."""

_HEAD_START = 24
"""The same for attention, along the head size: softmax and rescaling per score, in units of multiply-adds."""

ATTENTION_ROWS = 128
"""Query rows of one thread block of a flash kernel."""

_WINDOW_START = 3.0
"""Blocks of keys that a row of blocks takes to start and to end: of windows of 512 and 1024 and of causal attention
over 16384 tokens three kernels' backwards are linear in a row's blocks, with 3.0, 3.3 and 3.4 blocks besides
(NVIDIA/cudnn-frontend pull request 505: FlashAttention 2 5011, 586 and 867 us, cuDNN 6448, 792 and 1169)."""

_UPDATE_OPS = 8
"""AdamW op by op: mul, lerp, mul, addcmul, sqrt, div, add and addcdiv."""

_UPDATE_TRAFFIC = 80 / 28
"""Bytes of an fp32 parameter, its gradient and its states that these move, to those that one kernel moves."""

_SMALLEST_TILE = 16
"""The smallest side of an output tile: that of one tensor core instruction."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank has to do for one op: local shapes, after sharding.

    `flops` counts a multiply-add as two, and for causal attention only the half that kernels compute. For matrix
    products `batch` independent products of (m, k) by (k, n); for attention m queries, n keys, k head size, and
    `batch` counts sequences times heads.
    """

    flops: float
    bytes_read: float
    bytes_written: float
    kind: str
    dtype: str = "float32"
    m: int = 0
    n: int = 0
    k: int = 0
    batch: int = 1
    launches: float = 1.0
    """Kernels started: a share of one for a part of a fused kernel."""

    @property
    def bytes_moved(self) -> float:
        return self.bytes_read + self.bytes_written


def matmul(m: int, n: int, k: int, *, batch: int = 1, dtype: str = "bfloat16", item_bytes: int = 2) -> Work:
    """`batch` products of (m, k) by (k, n)."""
    read = batch * (m * k + k * n) * item_bytes
    return Work(2.0 * batch * m * n * k, read, batch * m * n * item_bytes, "matmul", dtype, m, n, k, batch)


def attention(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_size: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    seen: float | None = None,
    backward: bool = False,
    dtype: str = "bfloat16",
    item_bytes: int = 2,
) -> Work:
    """Fused (flash) attention of `batch` sequences: scores never reach memory.

    Forward: two products of queries x keys x head size. Backward: five, as the scores are computed again. A causal mask
    skips the blocks above the diagonal; those on it are computed whole. `seen`: the share of blocks that another mask,
    such as a window, leaves to be computed, to which a row's start comes that hides behind no others.
    """
    products = 5 if backward else 2
    share = 0.5 + 0.5 * min(1.0, ATTENTION_ROWS / keys) if causal else 1.0
    if seen is not None:
        share = min(share, seen + _WINDOW_START * ATTENTION_ROWS / keys)
    flops = 2.0 * products * batch * heads * queries * keys * head_size * share
    q_bytes = batch * heads * queries * head_size * item_bytes
    kv_bytes = 2 * batch * (kv_heads or heads) * keys * head_size * item_bytes
    statistics = batch * heads * queries * 4
    if backward:
        read, written = 3 * q_bytes + kv_bytes + statistics, q_bytes + kv_bytes
    else:
        read, written = q_bytes + kv_bytes, q_bytes + statistics
    kind = "attention_backward" if backward else "attention"
    return Work(flops, read, written, kind, dtype, queries, keys, head_size, batch * heads)


def pointwise(bytes_read: float, bytes_written: float, *, flops: float = 0.0, dtype: str = "bfloat16") -> Work:
    """An elementwise kernel."""
    return Work(flops, bytes_read, bytes_written, "pointwise", dtype)


@lru_cache(maxsize=1 << 18)
def op_s(work: Work, device: Device) -> float:
    """Seconds that `work` takes on `device`, launched as one kernel. A view is no kernel and takes none.

    Raises:
        ValueError: a negative or absent number.
    """
    if not (work.flops >= 0 and work.bytes_read >= 0 and work.bytes_written >= 0):
        raise ValueError(f"{work.kind}: work must not be negative, found {work}")
    if work.kind == "view":
        return 0.0
    arithmetic_s, memory_s = _arithmetic_s(work, device), _memory_s(work, device)
    busy_s = hypot(arithmetic_s, memory_s) if work.kind == "matmul" else max(arithmetic_s, memory_s)
    return work.launches * device.kernel_launch_s + busy_s


def update_traffic_s(elements: float, item_bytes: int, state_bytes: float, device: Device) -> float:
    """Seconds that an optimizer's update of a parameter moves memory: `elements` of `item_bytes` on this rank, and
    `state_bytes` of states and master copies for each.

    Read and write the parameter and the states, read the gradient: on a GPU in one kernel for all parameters, on a CPU
    in `_UPDATE_OPS`, as torch's optimizers run there unless they are asked to fuse. What each parameter costs beside
    that, whatever its size, is `Device.update_s`.
    """
    moved = elements * (3 * item_bytes + 2 * state_bytes)
    if not device.is_cpu:
        return moved / (device.memory_bytes_per_s * device.memory_efficiency)
    each = Work(0.0, moved * _UPDATE_TRAFFIC / _UPDATE_OPS, 0.0, "pointwise")
    return _UPDATE_OPS * _memory_s(each, device)


def addition_s(elements: float, item_bytes: float, sum_bytes: float, device: Device) -> float:
    """Seconds that a further micro-batch's gradient takes to be added to the sum of those before it: `elements` of
    `item_bytes` are read, and as many of `sum_bytes` read and written, as one kernel."""
    return op_s(pointwise(elements * (item_bytes + sum_bytes), elements * sum_bytes), device)


def _memory_s(work: Work, device: Device) -> float:
    rate = device.memory_bytes_per_s * device.memory_efficiency * _RATE.get(work.kind, _UNKNOWN_RATE)
    if not device.cache_bytes:
        return work.bytes_moved / rate
    cached = min(work.bytes_moved, device.cache_bytes)
    return cached / (rate / device.memory_bytes_per_s * device.cache_bytes_per_s) + (work.bytes_moved - cached) / rate


def _arithmetic_s(work: Work, device: Device) -> float:
    if not work.flops:
        return 0.0
    if work.kind == "matmul" and work.m and work.n and work.k:
        return _matmul_s(work, device)
    if work.kind in ("attention", "attention_backward") and work.m and work.k:
        return _attention_s(work, device)
    return work.flops / vector_flops_per_s(device)


def tensor_flops_per_s(device: Device, dtype: str) -> float:
    """Peak rate of matrix products in `dtype`; the slowest rate of the device for a dtype it does not list."""
    return device.peak_flops_per_s.get(dtype_name(dtype)) or min(device.peak_flops_per_s.values())


def vector_flops_per_s(device: Device) -> float:
    """Rate off the tensor cores: the fp32 peak, of which elementwise code (no fused multiply-adds) reaches half."""
    return 0.5 * (device.peak_flops_per_s.get("float32") or min(device.peak_flops_per_s.values()))


def _matmul_s(work: Work, device: Device) -> float:
    """Tiles in waves: the best over the tile shapes that libraries choose from."""
    efficiency = device.matmul_efficiency
    if device.fp8_matmul_efficiency and dtype_name(work.dtype) == "float8":
        efficiency = device.fp8_matmul_efficiency
    peak = tensor_flops_per_s(device, work.dtype) * efficiency * device.sustained
    depth = 1.0 + min(_K_START, device.tile_m // 2) / work.k
    best = float("inf")
    for tile_m, tile_n, speed in _tiles(device.tile_m, device.tile_n):
        blocks = ceil(work.m / tile_m) * ceil(work.n / tile_n) * work.batch
        waves = blocks / device.sm_count
        # Stream-K and split-K cut long products along k, so that a last wave is filled where k is deep.
        slots = _filled(waves, work.k) * device.sm_count
        best = min(best, slots * tile_m * tile_n / speed)
    return 2.0 * best * work.k * depth / peak


def _filled(waves: float, k: int) -> float:
    """Waves that are paid for: whole ones, or `waves` and a little where `k` is deep enough to be cut."""
    whole = float(ceil(waves))
    if k < _CUT_K:
        return whole
    return min(whole, max(waves * 1.1, waves + 0.125))


@lru_cache(maxsize=64)
def _tiles(tile_m: int, tile_n: int) -> tuple[tuple[int, int, float], ...]:
    """Tile shapes and their speed relative to the best one.

    An SM reads `1 / tile_m + 1 / tile_n` operand items per multiply-add; a kernel with half the tile reads twice as
    much and reaches less of the peak.
    """
    found = []
    smallest = min(_SMALLEST_TILE, tile_m, tile_n)
    sides_m = {max(smallest, tile_m >> shift) for shift in range(5)}
    sides_n = {max(smallest, tile_n >> shift) for shift in range(5)}
    best = 1 / tile_m + 1 / tile_n
    for m in sides_m:
        for n in sides_n:
            if max(m, n) >= min(64, tile_m, tile_n):
                reads = (1 / m + 1 / n) / best
                found.append((m, n, 1.0 / (1.0 + _REREAD * (reads - 1.0))))
    return tuple(sorted(found, reverse=True))


def _attention_s(work: Work, device: Device) -> float:
    """Flash kernels: one thread block per head and block of rows, efficiency by head size."""
    best = device.attention_backward_efficiency if work.kind == "attention_backward" else device.attention_efficiency
    reference = 128 / (128 + _HEAD_START)
    by_head = work.k / (work.k + _HEAD_START) / reference
    rows = ceil(work.m / ATTENTION_ROWS)
    waves = rows * work.batch / device.sm_count
    spread = max(1.0, ceil(waves)) / waves if waves < 8 else 1.0
    padding = rows * ATTENTION_ROWS / work.m if device.sm_count > 32 else 1.0
    peak = tensor_flops_per_s(device, work.dtype) * best * min(1.0, by_head)
    return work.flops * spread * padding / peak
