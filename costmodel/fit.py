"""The hardware that explains what was measured, and how far it is from each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil, log
from statistics import median
from typing import Any

import numpy as np

from costmodel.collectives import collective_s, ring_hops, wire_bytes
from costmodel.compute import Work, attention, matmul, op_s
from costmodel.hardware import Device, Hardware, Link, topology
from costmodel.presets import hardware, preset_of
from costmodel.samples import AttentionSample, CollectiveSample, MatmulSample, MemorySample, Samples

LEAST_SHARE = 0.01
"""Of the longest sample's time: a slope that explains less of it is noise."""


def fit(samples: Samples) -> Hardware:
    """The hardware that explains `samples` best; what was not measured is taken from the preset of the device.

    Rates are fitted to relative errors. On a host whose ranks share it the result holds the whole machine's rates.
    """
    start = hardware((preset_of(samples.device_name) or "h100") if samples.cuda else "cpu")
    per_rank = _fit_device(samples, start.device if samples.cuda else _one_rank(start.device, samples))
    per_rank = replace(per_rank, kernel_launch_s=samples.step_launch_s * _ranks_per_core(samples))
    device = per_rank if samples.cuda else _whole_machine(per_rank, samples)
    intra = _fit_link(samples, start.intra_node, across=False)
    inter = _fit_link(samples, start.inter_node, across=True)
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
        kernel_launch_s=device.kernel_launch_s / _ranks_per_core(samples),
        update_s=device.update_s / _ranks_per_core(samples),
        sm_count=samples.cores,
    )


def _whole_link(link: Link, ranks: int) -> Link:
    return replace(
        link,
        bytes_per_s=link.bytes_per_s * ranks,
        measured={kind: (base, hop, rate * ranks) for kind, (base, hop, rate) in link.measured.items()},
    )


def _fit_link(samples: Samples, start: Link, *, across: bool) -> Link:
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
    return share * _ranks_per_core(samples)


def _ranks_per_core(samples: Samples) -> float:
    """How many times as long as on a core of its own a rank takes; 1 on a GPU."""
    return 1.0 if samples.cuda else max(1.0, samples.ranks_per_node / samples.cores)


def _fit_collective(samples: Sequence[CollectiveSample]) -> tuple[float, float, float]:
    """(base_s, hop_s, bytes_per_s) of the least relative error.

    Where the time hardly grows with the size, noise alone makes the slope: the rate is then the highest one seen, a
    bound from below.
    """
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
    wires = [wire for _, _, wire in columns]
    told = per_byte * max(wires) > LEAST_SHARE * max(sample.seconds for sample in samples)
    return base_s, hop_s, 1 / per_byte if told else max(w / s.seconds for w, s in zip(wires, samples, strict=True))


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
    device = replace(mesh.device, kernel_launch_s=samples.launch_s)
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
