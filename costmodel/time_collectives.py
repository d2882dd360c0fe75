"""Times of collectives between the ranks of a job: the samples that say what a `Link` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist

from costmodel.products import layers_work
from costmodel.samples import CollectiveSample

_CPU_PAYLOADS = (1 << 12, 1 << 18, 1 << 21, 1 << 23)
_CUDA_PAYLOADS = (1 << 12, 1 << 18, 1 << 22, 1 << 25, 1 << 28, 1 << 30)

_TRIES = 3
_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def measure_groups(place: torch.device, world: int, per_node: int, budget_s: float) -> tuple[CollectiveSample, ...]:
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
            if (times := _collective_seconds(run, place, everyone, each_s)) is not None:
                found.append(CollectiveSample(kind, ranks, 4 * count, across, *times))
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
) -> tuple[float, float] | None:
    """Seconds per call, and those of them in which the process kept a core busy; None where noise hides them.

    The ranks agree on how many calls, and on the slowest's time. On a CPU what is timed is work and a call in turn, and
    the same work alone.
    """
    work = layers_work() if device.type == "cpu" else None

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
        seconds, cpu_s = (both - alone).tolist()
        return seconds, cpu_s

    run()
    once = float(timed(1, *([work] if work else []), run)[0])
    calls = max(4, min(100, int(budget_s / 4 / max(once, 1e-6))))
    return seen(lambda: block(calls))


def seen(block: Callable[[], tuple[float, float]]) -> tuple[float, float] | None:
    """The middle one of three blocks' (seconds, busy seconds); of three more where it takes less than no time, as work
    alone may take longer than with a call beside other jobs. None where that goes on."""
    for _ in range(_TRIES):
        seconds, busy_s = median_low([block() for _ in range(3)])
        if seconds > 0:
            return seconds, max(0.0, busy_s)
    return None
