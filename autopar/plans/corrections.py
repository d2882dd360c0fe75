"""A measured step beside the plan's prediction, kind by kind, and the hardware's figures corrected by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.plans.measured import COLLECTIVES, KINDS, Measured
from costmodel.hardware import Device, Hardware, Link
from passes.plan.plan import Plan


@dataclass(frozen=True)
class KindTimes:
    """Seconds per step of one kind of work, predicted and measured."""

    kind: str
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 where both are zero, infinite where only the prediction is."""
        if self.predicted_s:
            return self.measured_s / self.predicted_s
        return float("inf") if self.measured_s else 1.0


def compared(plan: Plan, found: Measured) -> tuple[KindTimes, ...]:
    """The whole step, then each kind of work. A collective counts its own seconds, hidden behind compute or not."""
    predicted = {kind: plan.accumulate * s for kind, s in plan.breakdown.compute_by_kind.items()}
    predicted["optimizer"] = plan.breakdown.optimizer_s
    for each in plan.collectives:
        predicted[each.kind] = predicted.get(each.kind, 0.0) + plan.accumulate * each.seconds
    seconds = dict(found.seconds)
    scattered, exchanged = predicted.get("reduce_scatter", 0.0), predicted.get("all_to_all", 0.0)
    if found.gloo and scattered and not seconds["reduce_scatter"]:
        seconds["reduce_scatter"] = seconds["all_to_all"] * scattered / (scattered + exchanged)
        seconds["all_to_all"] -= seconds["reduce_scatter"]
    rows = [KindTimes("step", plan.step_time_s, found.step_time_s)]
    return (*rows, *(KindTimes(kind, predicted.get(kind, 0.0), seconds[kind]) for kind in KINDS))


def corrected(hardware: Hardware, rows: Sequence[KindTimes], source: str) -> Hardware:
    """`hardware` with each rate divided by measured over predicted time.

    Matrix products correct what they sustain, attention its efficiencies, everything else the memory's efficiency and
    the launch. Links are corrected by the time of all collectives, and by each collective's own where a link has
    figures per collective. Where an efficiency would exceed 1, the peak was too low and is raised.
    """
    ratio = {row.kind: row.ratio for row in rows if row.predicted_s > 0 and row.measured_s > 0}
    moved = [row for row in rows if row.kind in COLLECTIVES and row.kind in ratio]
    link_ratio = sum(r.measured_s for r in moved) / sum(r.predicted_s for r in moved) if moved else 1.0
    device = hardware.device
    other = ratio.get("other", 1.0)
    attention = ratio.get("attention", 1.0)
    device = replace(
        device,
        sustained=device.sustained / ratio.get("matmul", 1.0),
        attention_efficiency=device.attention_efficiency / attention,
        attention_backward_efficiency=device.attention_backward_efficiency / attention,
        memory_efficiency=device.memory_efficiency / other,
        kernel_launch_s=device.kernel_launch_s * other,
    )
    return replace(
        hardware,
        name=f"{hardware.name}-measured" if not hardware.name.endswith("-measured") else hardware.name,
        device=_in_shares(device),
        intra_node=_slower(hardware.intra_node, link_ratio, ratio),
        inter_node=_slower(hardware.inter_node, link_ratio, ratio),
        source=f"{hardware.source}; corrected by {source}",
    )


def _in_shares(device: Device) -> Device:
    """The same rates of products, attention and memory, with no share of a peak above 1."""
    products = max(1.0, device.sustained)
    shares = {
        "matmul_efficiency": device.matmul_efficiency * products,
        "fp8_matmul_efficiency": device.fp8_matmul_efficiency * products,
        "attention_efficiency": device.attention_efficiency,
        "attention_backward_efficiency": device.attention_backward_efficiency,
    }
    peak, memory = max(1.0, *shares.values()), max(1.0, device.memory_efficiency)
    lowered: dict[str, Any] = {name: share / peak for name, share in shares.items()}
    return replace(
        device,
        peak_flops_per_s={dtype: rate * peak for dtype, rate in device.peak_flops_per_s.items()},
        sustained=device.sustained / products,
        memory_bytes_per_s=device.memory_bytes_per_s * memory,
        memory_efficiency=device.memory_efficiency / memory,
        cache_bytes_per_s=device.cache_bytes_per_s * memory,
        **lowered,
    )


def _slower(link: Link, times: float, by_kind: Mapping[str, float]) -> Link:
    measured = {
        kind: (base * (r := by_kind.get(kind, times)), hop * r, rate / r)
        for kind, (base, hop, rate) in link.measured.items()
    }
    return replace(
        link,
        bytes_per_s=link.bytes_per_s / times,
        wide_bytes_per_s=link.wide_bytes_per_s / times,
        peer_bytes_per_s=link.peer_bytes_per_s / times,
        multicast_bytes_per_s=link.multicast_bytes_per_s / times,
        latency_s=link.latency_s * times,
        pipeline_s=link.pipeline_s * times,
        base_s=link.base_s * times,
        measured=measured,
    )
