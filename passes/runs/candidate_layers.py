"""What a schedule of layers does not tell: a forward that is run again to its end, and operands cast to fp8."""

from __future__ import annotations

from dataclasses import replace

from costmodel.hardware import Hardware
from passes.runs.depth import Profile
from passes.runs.estimate import Profiler
from passes.runs.setup import Setup

_CAST_BYTES = 2.0
"""Each tensor that layers multiply is an operand of two products: it is read in 2 bytes, and written in 1 as it is and
in 1 transposed, 4 for both."""


def rest_again_s(setup: Setup, found: Profile) -> float:
    """What a layer's forward holds beyond what backward computes again."""
    if not setup.runs_whole:
        return 0.0
    kinds = ("matmul", "attention", "other")
    rest = sum(
        found.layer(f"compute.forward.{k}") - found.layer(f"compute.again.{k}") - found.layer(f"compute.within.{k}")
        for k in kinds
    )
    return max(0.0, rest) + activations_s(setup, found, "exposed", "forward")


def activations_s(setup: Setup, found: Profile, kind: str, phase: str = "") -> float:
    """Per layer, what tensor-parallel ranks send of activations, "exposed" or "hidden", in one phase or both.

    Where ranks share experts, these are whole, and rows come to them from each rank's own part of the sequence
    (`_sent_to_experts`): nothing is gathered for them or added up among tensor-parallel ranks.
    """
    sent_s = found.layer_total(f"{kind}.activation.{phase}")
    return sent_s - found.layer_total(f"among experts.{kind}.{phase}") if has_whole_experts(setup) else sent_s


def has_whole_experts(setup: Setup) -> bool:
    """Whether a tensor-parallel rank has some of the experts whole, and its part of the sequence to send to others."""
    return setup.ep > 1 and setup.tp > 1 and setup.sequence_parallel and not setup.experts_cut


def without_whole_blocks(setup: Setup, profiler: Profiler, *, replica: bool) -> Profile | None:
    """Where layers are run again as a whole, the profile of the setup without that."""
    if not setup.runs_whole:
        return None
    return profiler.profile(replace(setup, recompute=setup.in_block), replica=replica)


def operand_casts_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """Casts to fp8 of the layers' operands, each once per product, in a micro-batch. Parameters that stay on a rank are
    cast once per step, as Transformer Engine's weight caching does: its share of that. Where no layers are told apart,
    of all operands, each time."""
    rate = hardware.device.memory_bytes_per_s * hardware.device.memory_efficiency
    if not found.layers:
        return _CAST_BYTES * found.whole["operands"] / rate
    elsewhere = found.layer("experts") * (1 - 1 / setup.expert_parts)
    operands = found.layer("operands") - 2 * elsewhere
    if setup.state != "zero3":
        operands -= 2 * (found.layer("elements") - elsewhere) * (1 - 1 / setup.accumulate)
    return _CAST_BYTES * found.layers * max(0.0, operands) / rate
