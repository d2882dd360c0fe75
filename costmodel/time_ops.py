"""Times of single ops on this process's device: the samples that say what a `Device` does in a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from costmodel.products import layers_work, product
from costmodel.samples import AttentionSample, MatmulSample, MemorySample

_CPU_SHAPES = ((96, 96, 96), (256, 256, 256), (512, 64, 512), (512, 512, 512), (256, 2048, 512), (1024, 1024, 1024))
_CUDA_SHAPES = ((512, 512, 512), (2048, 2048, 2048), (8192, 1024, 4096), (8192, 4096, 512), (8192, 8192, 8192))
_CPU_BYTES = (3 << 15, 3 << 18, 3 << 21, 3 << 23, 60 << 20)
_CUDA_BYTES = (1 << 20, 3 << 24, 3 << 28, 3 << 30)
_TOUCHED_BYTES = 32 << 20
"""What ops on a CPU go over before they come to the same operands again: more than a core's own caches hold."""
_MOST_OPERANDS = 64
_LEAST_LAUNCHES = 16
"""Of which a median is taken, however little time there is."""
_KEPT = 4
"""Results of ops that are still there when a CPU makes the next."""


def _seconds(run: Callable[[], Any], device: torch.device, budget_s: float, before: int = 1) -> float:
    """Seconds of `run`: the median of 3 blocks that take about `budget_s` together, each the mean of its runs.

    Means within a block, because where ranks outnumber cores a run now and then waits for its turn. `before`: runs
    after which all memory that they take is mapped.
    """

    def block(runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / runs

    block(before)
    runs = max(1, min(100_000, int(budget_s / 4 / max(block(2), 1e-7))))
    return median([block(runs) for _ in range(3)])


def measure_matmuls(device: torch.device, dtypes: Sequence[torch.dtype], budget_s: float) -> tuple[MatmulSample, ...]:
    """Products of several sizes in each of `dtypes`; a dtype that the device does not multiply is left out."""
    shapes = _CUDA_SHAPES if device.type == "cuda" else _CPU_SHAPES
    each_s = budget_s / (len(shapes) * len(dtypes))
    found = []
    for dtype in dtypes:
        for m, n, k in shapes:
            try:
                seconds = _matmul_seconds(m, n, k, dtype, device, each_s)
            except RuntimeError:
                break
            found.append(MatmulSample(str(dtype).removeprefix("torch."), m, n, k, seconds))
    return tuple(found)


def _matmul_seconds(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, budget_s: float) -> float:
    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)

    pairs = _untouched(operands, (m * k + k * n + m * n) * dtype.itemsize, device)
    return _seconds(lambda: product(*next(pairs)), device, budget_s)


def measure_memory(device: torch.device, budget_s: float) -> tuple[MemorySample, ...]:
    """`x + y` into a new tensor: two reads and a write. On a CPU the last few results are kept, as in a step."""
    sizes = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    counts = [bytes_moved // 12 for bytes_moved in sizes]
    return tuple(MemorySample(12 * n, _sum_seconds(n, device, budget_s / len(sizes))) for n in counts)


def _sum_seconds(count: int, device: torch.device, budget_s: float) -> float:
    pairs = _untouched(lambda: (torch.ones(count, device=device), torch.ones(count, device=device)), 12 * count, device)
    kept = 1 if device.type == "cuda" else _KEPT
    results: deque[torch.Tensor] = deque(maxlen=kept)
    return _seconds(lambda: results.append(torch.add(*next(pairs))), device, budget_s, before=2 * kept)


def _untouched(make: Callable[[], Any], size: int, device: torch.device) -> Iterator[Any]:
    """Operands for one op after the other, which moves `size` bytes: on a CPU those last touched a while ago, as the
    operands of a step's ops were."""
    count = 1 if device.type == "cuda" else max(1, min(_MOST_OPERANDS, _TOUCHED_BYTES // size))
    return cycle([make() for _ in range(count)])


def measure_launch(device: torch.device, budget_s: float) -> float:
    """Seconds of an op on 16 elements, again and again."""
    x = torch.ones(16, device=device)
    return _seconds(lambda: x + x, device, budget_s)


def measure_cold_launch(budget_s: float) -> float:
    """The same on a CPU behind a layer's work, which has filled the caches with other things than the op's code.

    So a step launches its ops: ten times as long as again and again. The median, of a rank that has its core to itself:
    the op is too short to be interrupted often.
    """
    x, work = torch.ones(16), layers_work()
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < _LEAST_LAUNCHES or time.perf_counter() < end:
        work()
        start = time.perf_counter()
        x + x
        found.append(time.perf_counter() - start)
    return median(found)


def measure_update(device: torch.device, budget_s: float) -> float:
    """Seconds per parameter, whatever its size, of clipping gradients and of AdamW's step.

    Of DTensors, where there is a process group.
    """
    params = [torch.nn.Parameter(torch.ones(16, 16, device=device)) for _ in range(16)]
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        whole = [DTensor.from_local(p.data, mesh, [Replicate()], run_check=False) for p in params]
        params = [torch.nn.Parameter(p) for p in whole]
    for p in params:
        p.grad = torch.ones_like(p)
    optim = torch.optim.AdamW(params)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optim.step()

    return _seconds(update, device, budget_s) / len(params)


def measure_attention(device: torch.device, dtype: torch.dtype, budget_s: float) -> tuple[AttentionSample, ...]:
    """Fused attention, forward and backward, without a mask."""
    heads, sequence, head_size = (32, 4096, 128) if device.type == "cuda" else (4, 512, 64)
    attend = torch.nn.functional.scaled_dot_product_attention

    def operands() -> tuple[torch.Tensor, ...]:
        shape = (1, heads, sequence, head_size)
        return tuple(torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in "qkv")

    def run(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        q, k, v = inputs
        return attend(q, k, v)

    def attended() -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        inputs = operands()
        out = run(inputs)
        return out, inputs, torch.ones_like(out)

    size = 4 * heads * sequence * head_size * dtype.itemsize
    inputs, outputs = _untouched(operands, size, device), _untouched(attended, 2 * size, device)
    with torch.no_grad():
        forward_s = _seconds(lambda: run(next(inputs)), device, budget_s / 3)

    def backward() -> None:
        out, given, grad = next(outputs)
        torch.autograd.grad(out, given, grad, retain_graph=True)

    backward_s = _seconds(backward, device, budget_s / 3)
    name = str(dtype).removeprefix("torch.")
    return (
        AttentionSample(name, heads, sequence, head_size, False, forward_s),
        AttentionSample(name, heads, sequence, head_size, True, backward_s),
    )
