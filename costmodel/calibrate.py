"""Measure the machine we are on, and fit a `Hardware` to it.

    Samples        what was measured: matrix products, memory traffic, attention, launches, collectives
    measure()      this process (and, in a process group, every rank at once) -> Samples, the same on every rank
    fit()          Samples + a hardware to start from -> Hardware
    calibrate()    both; starts ranks of its own where there is no process group and `ranks` asks for them

Ranks that share a host are measured while all of them work, as in training; `Hardware.shared_host` keeps the figures of
the whole machine, and `topology` gives each rank its share. This is the one file of the package that imports torch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, cycle
from math import ceil, log
from pathlib import Path
from statistics import median, median_low
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.multiprocessing.spawn import spawn

from costmodel.collectives import collective_s, ring_hops, wire_bytes
from costmodel.compute import Work, attention, matmul, op_s
from costmodel.hardware import Device, Hardware, Link, hardware, load_hardware, preset_of, save_hardware, topology
from costmodel.heap import keep_freed
from costmodel.products import product

__all__ = [
    "Samples",
    "calibrate",
    "errors",
    "fit",
    "load_hardware",
    "measure",
    "measure_collectives",
    "save_calibration",
    "save_hardware",
]


@dataclass(frozen=True)
class MatmulSample:
    dtype: str
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True)
class MemorySample:
    """An elementwise op that moves `bytes_moved` in all and writes a new tensor."""

    bytes_moved: int
    seconds: float


@dataclass(frozen=True)
class AttentionSample:
    dtype: str
    heads: int
    sequence: int
    head_size: int
    backward: bool
    seconds: float


@dataclass(frozen=True)
class CollectiveSample:
    """`bytes` of the full tensor; `across` where every rank of the group is on a node of its own.

    `cpu_s`: of `seconds`, what the rank's process kept a core busy; 0 on a GPU.
    """

    kind: str
    ranks: int
    bytes: int
    across: bool
    seconds: float
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Samples:
    """All that was measured, per rank, with every rank of the machine busy."""

    device_name: str
    cuda: bool
    ranks_per_node: int
    cores: int
    memory_bytes: int
    launch_s: float
    update_s: float
    matmuls: tuple[MatmulSample, ...]
    memory: tuple[MemorySample, ...]
    attention: tuple[AttentionSample, ...]
    collectives: tuple[CollectiveSample, ...]


# Measuring.

_CPU_SHAPES = ((96, 96, 96), (256, 256, 256), (512, 64, 512), (512, 512, 512), (256, 2048, 512), (1024, 1024, 1024))
_CUDA_SHAPES = ((512, 512, 512), (2048, 2048, 2048), (8192, 1024, 4096), (8192, 4096, 512), (8192, 8192, 8192))
_CPU_BYTES = (3 << 15, 3 << 18, 3 << 21, 3 << 23, 60 << 20)
_CUDA_BYTES = (1 << 20, 3 << 24, 3 << 28, 3 << 30)
_CPU_PAYLOADS = (1 << 12, 1 << 18, 1 << 21, 1 << 23)
_CUDA_PAYLOADS = (1 << 12, 1 << 18, 1 << 22, 1 << 25, 1 << 28, 1 << 30)

_TOUCHED_BYTES = 32 << 20
"""What ops on a CPU go over before they come to the same operands again: more than a core's own caches hold."""
_MOST_OPERANDS = 64
_KEPT = 4
"""Results of ops that are still there when a CPU makes the next."""
_FREED_BYTES = 1 << 28
"""More than a measured op takes and frees: it stays with the process, as what a step frees does."""

_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


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
    """Seconds of an op on 16 elements."""
    x = torch.ones(16, device=device)
    return _seconds(lambda: x + x, device, budget_s)


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


def measure_collectives(
    group: dist.ProcessGroup | None = None,
    *,
    crossing: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    across: bool = False,
    budget_s: float = 6.0,
) -> tuple[CollectiveSample, ...]:
    """Each collective at several sizes over `group` (default: all ranks); every rank of it has to call.

    A sample is the time of the slowest rank. `across` says that no two ranks of the group share a node. On a CPU each
    collective follows work of some milliseconds, whose own time is taken off: ranks that come from work are not there
    all at once, least of all where they outnumber the cores, and their caches are full of other things.

    `crossing`: this rank's group of another axis of the mesh, of as many ranks. Calls go to the two in turn, and every
    rank of the job has to call: as in training no part of the job runs ahead while another waits, which hides what a
    collective takes where ranks share cores.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError("no process group: call torch.distributed.init_process_group() first, or run under torchrun")
    place = torch.device(device)
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return ()
    payloads = _CUDA_PAYLOADS if place.type == "cuda" else _CPU_PAYLOADS
    each_s = budget_s / (len(payloads) * len(_KINDS))
    groups, everyone = ([group], group) if crossing is None else ([group, crossing], None)
    found = []
    for payload in payloads:
        count = payload // 4 // ranks * ranks
        full, part, out = (torch.ones(size, device=place) for size in (count, count // ranks, count))
        for kind in _KINDS:
            run = _in_turn([_collective(kind, full, part, out, each) for each in groups])
            seconds, cpu_s = _collective_seconds(run, place, everyone, each_s)
            found.append(CollectiveSample(kind, ranks, 4 * count, across, seconds, cpu_s))
    return tuple(found)


def _in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Runs one of them a call, each in its turn."""
    turns = cycle(runs)
    return lambda: next(turns)()


def _collective(
    kind: str, full: torch.Tensor, part: torch.Tensor, out: torch.Tensor, group: dist.ProcessGroup | None
) -> Callable[[], Any]:
    first = dist.get_global_rank(group, 0) if group is not None else 0
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    ranks = full.numel() // part.numel()
    rows = out.view(ranks, -1)
    mine, sources = dist.get_rank(group), range(ranks) if group is None else dist.get_process_group_ranks(group)

    def spread() -> None:
        """An all-gather as programs for CPU ranks do it."""
        rows[mine].copy_(part)
        works = [dist.broadcast(row, rank, group, async_op=True) for rank, row in zip(sources, rows, strict=True)]
        for work in works:
            work.wait()
        full.copy_(out)

    def exchange() -> None:
        """A reduce-scatter as programs for CPU ranks do it."""
        dist.all_to_all_single(out, full, group=group)
        torch.sum(rows, 0, out=part)

    runs: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(full, group=group),
        "all_gather": spread if full.is_cpu else lambda: gather(out, part, group=group),
        "reduce_scatter": exchange if full.is_cpu else lambda: scatter(part, full, group=group),
        "all_to_all": lambda: dist.all_to_all_single(out, full, group=group),
        "broadcast": lambda: dist.broadcast(full, first, group=group),
    }
    return runs[kind]


def _collective_seconds(
    run: Callable[[], Any], device: torch.device, group: dist.ProcessGroup | None, budget_s: float
) -> tuple[float, float]:
    """Seconds per call, and those of them in which the process kept a core busy.

    The ranks agree on how many calls, and on the slowest's time. On a CPU what is timed is work and a call in turn, and
    the same work alone.
    """
    work = _work() if device.type == "cpu" else None

    def timed(calls: int, *parts: Callable[[], Any]) -> torch.Tensor:
        dist.barrier(group=group)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(calls):
            for part in parts:
                part()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = (time.perf_counter() - start_s, time.process_time() - start_cpu_s)
        elapsed = torch.tensor(spent, dtype=torch.float64, device=device) / calls
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=group)
        return elapsed.cpu()

    def block(calls: int) -> tuple[float, float]:
        if work is None:
            return float(timed(calls, run)[0]), 0.0
        both, alone = timed(calls, work, run), timed(calls, work)
        seconds, cpu_s = (both - alone).clamp(min=1e-6).tolist()
        return seconds, cpu_s

    run()
    once = float(timed(1, *([work] if work else []), run)[0])
    calls = max(4, min(100, int(budget_s / 4 / max(once, 1e-6))))
    return median_low([block(calls) for _ in range(3)])


def _work() -> Callable[[], Any]:
    """Some milliseconds of a layer's work: two products and what is pointwise, over more than a core's cache holds."""
    rows, wide, narrow = torch.ones(1536, 256), torch.ones(256, 384), torch.ones(384, 256)
    return lambda: product(product(rows, wide).mul(0.5), narrow).add(1.0)


def measure(
    *,
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    ranks_per_node: int | None = None,
    budget_s: float = 10.0,
) -> Samples:
    """Measure this process's device and, in a process group, its collectives; the same samples on every rank.

    `ranks_per_node` defaults to `torchrun`'s; it decides which groups are inside a node and which cross nodes.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    share = budget_s / (2.0 if grouped else 1.2)
    kinds = tuple(dtypes or (torch.float32, torch.bfloat16))
    if place.type == "cpu":
        keep_freed(_FREED_BYTES)

    def together() -> None:
        if grouped:
            dist.barrier()

    together()
    launch_s = measure_launch(place, 0.05 * share)
    together()
    update_s = measure_update(place, 0.05 * share)
    together()
    memory = measure_memory(place, 0.2 * share)
    together()
    matmuls = measure_matmuls(place, kinds, 0.5 * share)
    together()
    attentions = measure_attention(place, torch.bfloat16 if place.type == "cuda" else torch.float32, 0.2 * share)
    if place.type == "cuda":
        facts = torch.cuda.get_device_properties(place)
        name, memory_bytes, cores = facts.name, facts.total_memory, facts.multi_processor_count
    else:
        generic = hardware("cpu").device
        name, memory_bytes, cores = "cpu", generic.memory_bytes, generic.sm_count
    world = dist.get_world_size() if grouped else 1
    per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    per_node = per_node if per_node < world and world % per_node == 0 else world
    collectives = _measure_groups(place, world, per_node, 0.5 * budget_s) if grouped else ()
    mine = Samples(
        device_name=name,
        cuda=place.type == "cuda",
        ranks_per_node=per_node,
        cores=cores,
        memory_bytes=memory_bytes,
        launch_s=launch_s,
        update_s=update_s,
        matmuls=matmuls,
        memory=memory,
        attention=attentions,
        collectives=collectives,
    )
    return _agree(mine) if grouped else mine


def _measure_groups(place: torch.device, world: int, per_node: int, budget_s: float) -> tuple[CollectiveSample, ...]:
    """Groups of a whole node, of half a node, and of one rank per node; all groups of a kind run at once.

    Where ranks share cores, half a node's are measured beside those that cross them.
    """
    layouts: list[tuple[bool, list[list[int]], list[list[int]]]] = []
    for size in sorted({per_node, max(2, per_node // 2)} - {1}):
        if per_node % size == 0:
            inside = [list(range(start, start + size)) for start in range(0, world, size)]
            parts = per_node // size
            strided = [
                list(range(node + start, node + per_node, parts))
                for node in range(0, world, per_node)
                for start in range(parts)
            ]
            layouts.append((False, inside, strided if parts > 1 and place.type == "cpu" else []))
    if per_node < world:
        layouts.append((True, [list(range(start, world, per_node)) for start in range(per_node)], []))
    found: list[CollectiveSample] = []
    for across, members, others in layouts:
        own, crossing = _own_group(members), _own_group(others)
        share_s = budget_s / len(layouts)
        found += measure_collectives(own, crossing=crossing, device=place, across=across, budget_s=share_s)
        dist.barrier()
    return tuple(found)


def _own_group(members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Makes all these groups, on every rank; the one that this rank is in."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    own = [group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks]
    return own[0] if own else None


def _agree(mine: Samples) -> Samples:
    """The median over ranks of every time, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)

    def merged(name: str) -> tuple[Any, ...]:
        columns = zip(*(getattr(samples, name) for samples in gathered), strict=True)
        return tuple(replace(column[0], seconds=median(sample.seconds for sample in column)) for column in columns)

    first: Samples = gathered[0]
    return replace(
        first,
        launch_s=median(samples.launch_s for samples in gathered),
        update_s=median(samples.update_s for samples in gathered),
        matmuls=merged("matmuls"),
        memory=merged("memory"),
        attention=merged("attention"),
        collectives=merged("collectives"),
    )


# Fitting.


def fit(samples: Samples, base: Hardware | None = None) -> Hardware:
    """The hardware that explains `samples` best; what was not measured is taken from `base`.

    Rates are fitted to relative errors. On a host whose ranks share it the result holds the whole machine's rates.
    """
    start = base or hardware((preset_of(samples.device_name) or "h100") if samples.cuda else "cpu")
    per_rank = _fit_device(samples, start.device if samples.cuda else _one_rank(start.device, samples))
    device = per_rank if samples.cuda else _whole_machine(per_rank, samples)
    intra = _fit_link(samples, per_rank, start.intra_node, across=False)
    inter = _fit_link(samples, per_rank, start.inter_node, across=True)
    if not samples.cuda:
        intra = _whole_link(intra, samples.ranks_per_node)
    several = any(sample.across for sample in samples.collectives)
    return replace(
        start,
        name="calibrated-" + (samples.device_name.lower().replace(" ", "-") if samples.cuda else "cpu"),
        device=device,
        intra_node=intra,
        inter_node=inter,
        ranks_per_node=samples.ranks_per_node if samples.cuda or several else start.ranks_per_node,
        source=f"measured on {samples.device_name}, {samples.ranks_per_node} ranks per node, all at once",
        shared_host=not samples.cuda,
    )


def _one_rank(device: Device, samples: Samples) -> Device:
    """The generic host, cut down to one of the measured ranks, as a start for the fit."""
    return replace(device, sm_count=max(1, samples.cores // samples.ranks_per_node))


def _fit_device(samples: Samples, start: Device) -> Device:
    launch_s = samples.launch_s
    sizes = sorted(samples.memory, key=lambda sample: sample.bytes_moved)
    cache_bytes, cache_rate, rate = _fit_memory(sizes, launch_s) if sizes else (0, 0.0, start.memory_bytes_per_s)
    device = replace(
        start,
        memory_bytes=samples.memory_bytes,
        memory_bytes_per_s=rate,
        memory_efficiency=1.0,
        sustained=1.0,
        cache_bytes=0 if samples.cuda else cache_bytes,
        cache_bytes_per_s=0.0 if samples.cuda else cache_rate,
        kernel_launch_s=launch_s,
        update_s=samples.update_s,
    )
    peaks = dict(device.peak_flops_per_s)
    for dtype in {sample.dtype for sample in samples.matmuls}:
        ratios = []
        for sample in samples.matmuls:
            if sample.dtype == dtype and sample.seconds > 3 * launch_s:
                ratios.append(op_s(_matmul_work(sample), device) / sample.seconds)
        peaks[dtype] = device.peak_flops_per_s.get(dtype, peaks["float32"]) * (median(ratios) if ratios else 1.0)
    measured = {sample.dtype for sample in samples.matmuls}
    scale = median([peaks[dtype] / device.peak_flops_per_s.get(dtype, peaks[dtype]) for dtype in measured] or [1.0])
    for dtype in set(peaks) - measured:
        peaks[dtype] *= scale
    device = replace(device, peak_flops_per_s=peaks)
    for attended in samples.attention:
        ratio = op_s(_attention_work(attended), device) / attended.seconds
        field = "attention_backward_efficiency" if attended.backward else "attention_efficiency"
        changed: dict[str, Any] = {field: min(1.0, getattr(device, field) * ratio)}
        device = replace(device, **changed)
    return device


def _fit_memory(samples: Sequence[MemorySample], launch_s: float) -> tuple[int, float, float]:
    """(cache bytes, cache rate, memory rate), with the edge of the cache at the sample that fits best."""
    times = [max(sample.seconds - launch_s, 1e-9) for sample in samples]
    sizes = [sample.bytes_moved for sample in samples]
    best: tuple[float, int, float, float] | None = None
    for edge in sizes:
        inside = median(seconds / size for seconds, size in zip(times, sizes, strict=True) if size <= edge)
        beyond = [
            (seconds - edge * inside) / (size - edge) for seconds, size in zip(times, sizes, strict=True) if size > edge
        ]
        outside = max(inside, median(beyond)) if beyond else inside
        miss = 0.0
        for seconds, size in zip(times, sizes, strict=True):
            mine = min(size, edge) * inside + max(0, size - edge) * outside
            miss += abs(log(mine / seconds))
        if best is None or miss < best[0]:
            best = (miss, edge, 1 / inside, 1 / outside)
    assert best is not None
    return best[1:]


def _matmul_work(sample: MatmulSample) -> Work:
    return matmul(sample.m, sample.n, sample.k, dtype=sample.dtype, item_bytes=2 if "16" in sample.dtype else 4)


def _attention_work(sample: AttentionSample) -> Work:
    return attention(
        1,
        sample.heads,
        sample.sequence,
        sample.sequence,
        sample.head_size,
        backward=sample.backward,
        dtype=sample.dtype,
        item_bytes=2 if "16" in sample.dtype else 4,
    )


def _whole_machine(device: Device, samples: Samples) -> Device:
    """One rank's figures -> those of the host it shares with `ranks_per_node` others; what `topology` undoes."""
    ranks = samples.ranks_per_node
    return replace(
        device,
        peak_flops_per_s={dtype: rate * ranks for dtype, rate in device.peak_flops_per_s.items()},
        memory_bytes_per_s=device.memory_bytes_per_s * ranks,
        cache_bytes=device.cache_bytes * ranks,
        cache_bytes_per_s=device.cache_bytes_per_s * ranks,
        kernel_launch_s=device.kernel_launch_s / max(1.0, ranks / samples.cores),
        update_s=device.update_s / max(1.0, ranks / samples.cores),
        sm_count=samples.cores,
    )


def _whole_link(link: Link, ranks: int) -> Link:
    return replace(
        link,
        bytes_per_s=link.bytes_per_s * ranks,
        measured={kind: (base, hop, rate * ranks) for kind, (base, hop, rate) in link.measured.items()},
    )


def _fit_link(samples: Samples, device: Device, start: Link, *, across: bool) -> Link:
    """Base, hop and rate of each collective by itself, and of all ring collectives together for what is derived."""
    mine = [sample for sample in samples.collectives if sample.across == across]
    if not mine:
        return start
    measured: dict[str, tuple[float, float, float]] = {}
    for kind in sorted({sample.kind for sample in mine}):
        measured[kind] = _fit_collective([sample for sample in mine if sample.kind == kind])
    rings = [sample for sample in mine if sample.kind in ("all_gather", "reduce_scatter", "all_reduce")]
    base_s, hop_s, rate = _fit_collective(rings or mine)
    # Sends between two ranks take part in no collective we time; a broadcast is a chain of them.
    measured["send_recv"] = measured.get("broadcast", (base_s, hop_s, rate))
    sms = start.sms if samples.cuda else _kept_busy(mine, samples)
    return replace(start, base_s=base_s, latency_s=hop_s, bytes_per_s=rate, pipeline_s=0.0, sms=sms, measured=measured)


def _kept_busy(collectives: Sequence[CollectiveSample], samples: Samples) -> float:
    """Cores, of those that one rank has, that a collective keeps busy while it runs."""
    share = median(min(1.0, sample.cpu_s / sample.seconds) for sample in collectives)
    return share * max(1.0, samples.ranks_per_node / samples.cores)


def _fit_collective(samples: Sequence[CollectiveSample]) -> tuple[float, float, float]:
    """(base_s, hop_s, bytes_per_s) of the least relative error."""
    several = len({sample.ranks for sample in samples}) > 1
    columns = [
        (
            1.0,
            float(ring_hops(sample.kind, sample.ranks)) if several else 0.0,
            wire_bytes(sample.kind, sample.bytes, sample.ranks),
        )
        for sample in samples
    ]
    base_s, hop_s, per_byte = _non_negative(columns, [sample.seconds for sample in samples])
    slowest = max(wire_bytes(sample.kind, sample.bytes, sample.ranks) / sample.seconds for sample in samples)
    return base_s, hop_s, 1 / per_byte if per_byte > 0 else slowest


def _non_negative(columns: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Coefficients >= 0 for which `columns @ coefficients` is near `targets`, too small and too large alike.

    The few unknowns allow to try every set of them that is not zero. Rows are weighted by the geometric mean of target
    and prediction, again and again, which tends to the least squares of the logarithms' differences.
    """
    rows, wanted = np.asarray(columns, dtype=float), np.asarray(targets, dtype=float)
    unknowns = rows.shape[1]
    best, coefficients = float("inf"), [0.0] * unknowns
    for count in range(1, unknowns + 1):
        for chosen in combinations(range(unknowns), count):
            part = rows[:, chosen]
            scale = np.linalg.norm(part, axis=0)
            if not scale.all():
                continue
            predicted = wanted
            for _ in range(8):
                weights = 1 / np.sqrt(wanted * predicted)
                weighted = (part / scale) * weights[:, None]
                solved = np.linalg.lstsq(weighted, wanted * weights, rcond=None)[0] / scale
                if (solved < 0).any() or (part @ solved <= 0).any():
                    break
                predicted = part @ solved
            else:
                miss = float(np.sum(np.log(predicted / wanted) ** 2))
                if miss < best - 1e-12:
                    best = miss
                    coefficients = [0.0] * unknowns
                    for index, value in zip(chosen, solved, strict=True):
                        coefficients[index] = float(value)
    return coefficients


def errors(samples: Samples, fitted: Hardware) -> dict[str, list[float]]:
    """Relative error of `fitted` on every sample, by what was measured: how far to trust it."""
    mesh = topology(fitted, {"node": samples.ranks_per_node})
    device = mesh.device
    found: dict[str, list[float]] = {"matmul": [], "memory": [], "attention": []}
    for multiplied in samples.matmuls:
        found["matmul"].append(op_s(_matmul_work(multiplied), device) / multiplied.seconds - 1)
    for moved in samples.memory:
        work = Work(0.0, moved.bytes_moved * 2 / 3, moved.bytes_moved / 3, "pointwise")
        found["memory"].append(op_s(work, device) / moved.seconds - 1)
    for attended in samples.attention:
        found["attention"].append(op_s(_attention_work(attended), device) / attended.seconds - 1)
    for sample in samples.collectives:
        if sample.across:
            laid = topology(fitted, {"group": sample.ranks, "node": samples.ranks_per_node})
        else:
            laid = topology(fitted, {"rest": ceil(samples.ranks_per_node / sample.ranks), "group": sample.ranks})
        mine = collective_s(sample.kind, sample.bytes, (laid.axis("group"),), laid)
        found.setdefault(sample.kind, []).append(mine / sample.seconds - 1)
    return {kind: values for kind, values in found.items() if values}


def calibrate(
    *,
    device: torch.device | str | None = None,
    ranks: int = 1,
    base: Hardware | None = None,
    budget_s: float = 10.0,
) -> Hardware:
    """Hardware as measured here; in a process group every rank has to call, and all get the same.

    Where there is no process group and `ranks` is more than 1, as many processes are started on this machine (gloo on
    the CPU, NCCL on CUDA), each with its share of the cores; the calling script then needs the usual
    `if __name__ == "__main__":`.

    Raises:
        ValueError: `ranks` is no positive number, or more than there are CUDA devices.
    """
    return fit(_samples(device, ranks, budget_s), base)


def save_calibration(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    ranks: int = 1,
    base: Hardware | None = None,
    budget_s: float = 10.0,
) -> tuple[Hardware, dict[str, list[float]]]:
    """`calibrate`, written to `path` with its samples by rank 0; the hardware and its errors on the samples."""
    samples = _samples(device, ranks, budget_s)
    fitted = fit(samples, base)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_hardware(fitted, path, asdict(samples))
    return fitted, errors(samples, fitted)


def _samples(device: torch.device | str | None, ranks: int, budget_s: float) -> Samples:
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; at least 1 is needed")
    if ranks == 1 or dist.is_initialized():
        return measure(device=device, budget_s=budget_s)
    kind = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu").type
    if kind == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"{ranks} ranks asked for, but this machine has {torch.cuda.device_count()} CUDA devices")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, args=(ranks, kind, budget_s, folder), nprocs=ranks)
        samples: Samples = torch.load(Path(folder) / "samples", weights_only=False)
    return samples


def _worker(rank: int, ranks: int, kind: str, budget_s: float, folder: str) -> None:
    """One started rank: join, measure, let rank 0 write what it found."""
    place = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(max(1, hardware("cpu").device.sm_count // ranks))
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        samples = measure(device=place, ranks_per_node=ranks, budget_s=budget_s)
        if rank == 0:
            torch.save(samples, Path(folder) / "samples")
        dist.barrier()
    finally:
        dist.destroy_process_group()
