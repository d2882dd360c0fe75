"""Measure the machine we are on, and fit a `Hardware` to it.

    measure()            this process (and, in a process group, every rank at once) -> `Samples`, equal on all ranks
    fit()                samples -> Hardware (`fit.py`)
    save_calibration()   both; starts ranks of its own where there is no process group and `ranks` asks for them

Ranks that share a host are measured while all of them work, as in training; `Hardware.shared_host` keeps the figures of
the whole machine, and `topology` gives each rank its share. Of this package only this file, `time_ops.py`,
`time_collectives.py` and `products.py` import torch.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from costmodel.fit import errors, fit
from costmodel.hardware import Hardware
from costmodel.hardware_file import save_hardware
from costmodel.heap import keep_freed
from costmodel.presets import hardware
from costmodel.samples import Samples
from costmodel.time_collectives import measure_groups
from costmodel.time_ops import (
    measure_attention,
    measure_cold_launch,
    measure_launch,
    measure_matmuls,
    measure_memory,
    measure_update,
)

__all__ = ["measure", "save_calibration"]

_FREED_BYTES = 1 << 28
"""More than a measured op takes and frees: it stays with the process, as what a step frees does."""


def save_calibration(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    ranks: int = 1,
    budget_s: float = 10.0,
) -> tuple[Hardware, dict[str, list[float]]]:
    """Hardware as measured here, and its relative errors on the samples; rank 0 writes both to `path`.

    In a process group every rank has to call, and all get the same. Where there is none and `ranks` is more than 1, as
    many processes are started on this machine (gloo on the CPU, NCCL on CUDA), each with its share of the cores; the
    calling script then needs the usual `if __name__ == "__main__":`.

    Raises:
        ValueError: `ranks` is no positive number, or more than there are CUDA devices.
    """
    samples = _samples(device, ranks, budget_s)
    fitted = fit(samples)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_hardware(fitted, path, asdict(samples))
    return fitted, errors(samples, fitted)


def measure(
    *,
    device: torch.device | str | None = None,
    ranks_per_node: int | None = None,
    budget_s: float = 10.0,
) -> Samples:
    """Measure this process's device and, in a process group, its collectives; the same samples on every rank.

    `ranks_per_node` defaults to `torchrun`'s; it decides which groups are inside a node and which cross nodes.
    """
    place = device_of(device)
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    share = budget_s / (2.0 if grouped else 1.2)
    if place.type == "cpu":
        keep_freed(_FREED_BYTES)

    def together() -> None:
        if grouped:
            dist.barrier()

    together()
    launch_s = measure_launch(place, 0.05 * share)
    together()
    step_launch_s = measure_cold_launch(0.05 * share) if place.type == "cpu" else launch_s
    together()
    update_s = measure_update(place, 0.05 * share)
    together()
    memory = measure_memory(place, 0.15 * share)
    together()
    matmuls = measure_matmuls(place, (torch.float32, torch.bfloat16), 0.5 * share)
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
    collectives = measure_groups(place, world, per_node, 0.5 * budget_s) if grouped else ()
    mine = Samples(
        device_name=name,
        cuda=place.type == "cuda",
        ranks_per_node=per_node,
        cores=cores,
        memory_bytes=memory_bytes,
        launch_s=launch_s,
        step_launch_s=step_launch_s,
        update_s=update_s,
        matmuls=matmuls,
        memory=memory,
        attention=attentions,
        collectives=collectives,
    )
    return _agree(mine) if grouped else mine


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
        step_launch_s=median(samples.step_launch_s for samples in gathered),
        update_s=median(samples.update_s for samples in gathered),
        matmuls=merged("matmuls"),
        memory=merged("memory"),
        attention=merged("attention"),
        collectives=merged("collectives"),
    )


def device_of(device: torch.device | str | None) -> torch.device:
    """What is measured; None: a GPU where there is one, else the CPU.

    Raises:
        ValueError: a device of another kind, or one that this machine lacks.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"device is {str(device)!r}; cpu and cuda can be measured")
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return place


def _samples(device: torch.device | str | None, ranks: int, budget_s: float) -> Samples:
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; at least 1 is needed")
    if ranks == 1 or dist.is_initialized():
        return measure(device=device, budget_s=budget_s)
    kind = device_of(device).type
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
