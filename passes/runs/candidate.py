"""What a training run is set to, and what it costs: schedules at full depth, and formulas for what no plan does yet.

A `Setup` that plans can do (state sharding with tensor parallelism, accumulation, recompute) is a played schedule and
nothing else (`candidate_sharded.py`). What no plan does yet (pipeline stages, context or expert parallelism, ZeRO-1/2,
fp8 products, offload) is priced on top of a played replica (`candidate_replicated.py`), and says so in `priced_only`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from costmodel.collectives import collective_s, taken_shares
from costmodel.hardware import Hardware, topology
from passes.runs.candidate_replicated import replicated
from passes.runs.candidate_sharded import sharded
from passes.runs.depth import Profile
from passes.runs.estimate import Estimate, Profiler
from passes.runs.setup import Setup

LEAST_GAIN = 0.01
"""Of a step, that another way of running the same setup may save where it is priced too."""
NO_LAYERS = "no repeated layers were found, or too few to cut"
NO_ATTENTION = "no attention kernel was found (attention that a model writes out is products like others)"
_GATHERED = 3
"""Layers whose parameters are there at once where they are freed after use, and gathered ahead."""


def estimate(setup: Setup, profiler: Profiler) -> Estimate:
    """Price `setup`.

    Raises:
        ValueError: expert parallelism that is not priced, or what is priced by layer where no layers are told apart.
    """
    if setup.ep > 1:
        _check_experts(setup, profiler)
    _check_layers(setup, profiler)
    if setup.is_played:
        return sharded(setup, profiler)
    return replicated(setup, profiler)


def kernels_of(setup: Setup, profiler: Profiler) -> float:
    """Kernels that a rank's host launches for a micro-batch."""
    found = profiler.profile(setup, replica=not setup.is_played)
    return found.whole["kernels"] / setup.pp


def _check_experts(setup: Setup, profiler: Profiler) -> None:
    ranks = setup.data_ranks * setup.cp * setup.tp
    if ranks % setup.ep or setup.ep % setup.tp:
        raise ValueError(
            f"ep={setup.ep}: not a part of the {ranks} ranks with the same layers that holds all {setup.tp} that split "
            f"them; priced are multiples of {setup.tp} that divide {ranks}"
        )
    if "experts" not in profiler.profile(setup, replica=True).whole:
        raise ValueError(f"ep={setup.ep}, but the model has no routed experts")
    if f"experts.{setup.expert_parts}" not in profiler.profile(setup, replica=True).whole:
        raise ValueError(f"ep={setup.ep}: priced are powers of two that divide a layer's routed experts")


def _check_layers(setup: Setup, profiler: Profiler) -> None:
    """That what is priced by layer has layers, and context parallelism its attention."""
    by_layer = {
        f"cp={setup.cp}": setup.cp > 1,
        f"ep={setup.ep}": setup.ep > 1,
        "whole_blocks=True": setup.runs_whole,
        "tp_overlap=True": setup.tp_overlap and not setup.is_played,
        "tp_waits=True": setup.tp_waits and not setup.is_played,
    }
    asked = [name for name, is_asked in by_layer.items() if is_asked]
    if not asked:
        return
    found = profiler.profile(setup, replica=not setup.is_played)
    if not found.layers:
        raise ValueError(f"{asked[0]}, but {NO_LAYERS}: what that takes is told from layers; leave it out")
    if setup.cp > 1 and not attends(found):
        raise ValueError(f"cp={setup.cp}, but {NO_ATTENTION}; cp=1 is priced")


def attends(found: Profile) -> bool:
    """Whether an attention kernel was found: what context parallelism is priced by."""
    return found.whole.get("keys", 0.0) > 0


@dataclass(frozen=True)
class Either:
    """What a plan decides by itself: whether gathered parameters are kept for backward, and gathered activations."""

    reshard: bool = True
    regather: bool = True


def ways_of(setup: Setup, profiler: Profiler, budget: float, either: Either) -> Iterator[Estimate]:
    """`setup` as it is; where `either` may be done, with gathered activations gathered again for backward where they do
    not fit."""
    first: Estimate | None = None
    for each in _freed_and_kept(setup, profiler, budget, either):
        first = first or each
        yield each
    if first is not None and first.peak_bytes > budget and _may_regather(setup, either):
        yield from _freed_and_kept(replace(setup, gathers_again=True), profiler, budget, either)


def is_settled(ways: Sequence[Estimate], profiler: Profiler, budget: float, either: Either) -> bool:
    """Whether to compute more again gains a setup nothing, by its `ways`: it fits as it is, and to keep its gathered
    parameters fits too, or pays nothing, or fits beside no activations."""
    freed = ways[0]
    if freed.peak_bytes > budget:
        return False
    if not _may_keep(freed, either):
        return True
    return any(kept.peak_bytes <= budget for kept in ways[1:]) or _kept_bytes(freed, profiler) > budget


def with_least_memory(setup: Setup, either: Either) -> Setup:
    """`setup` with activations gathered again, where a plan may do that."""
    return replace(setup, gathers_again=True) if _may_regather(setup, either) else setup


def _may_regather(setup: Setup, either: Either) -> bool:
    return either.regather and setup.is_played and setup.tp > 1 and not setup.gathers_again


def _freed_and_kept(setup: Setup, profiler: Profiler, budget: float, either: Either) -> Iterator[Estimate]:
    """`setup` as it is; where either may be done, with gathered parameters freed, and with them kept for backward where
    that can fit and pay: it saves no more than the step waits for state and is slowed down by what is sent."""
    freed = estimate(replace(setup, reshard=True) if either.reshard else setup, profiler)
    yield freed
    if not _may_keep(freed, either) or freed.peak_bytes > budget:
        return
    found = profiler.profile(freed.setup, replica=False)
    backward_bytes = found.whole.get("alive.last layers", 0.0)  # with what a few layers have gathered
    rest = (found.layers - _GATHERED) * _gathered_bytes(found)
    if max(_kept_bytes(freed, profiler), backward_bytes + rest) <= budget:
        yield estimate(replace(setup, reshard=False), profiler)


def _may_keep(freed: Estimate, either: Either) -> bool:
    """Whether keeping gathered parameters may pay: at most what the step waits for state and is slowed down by it."""
    setup = freed.setup
    gathers = (setup.dp_shard > 1 or setup.solved) and setup.pp == 1 and setup.state == "zero3"
    may_save_s = freed.seconds["exposed state"] + freed.seconds["slowed"]
    return either.reshard and gathers and may_save_s >= LEAST_GAIN * freed.step_s


def _kept_bytes(freed: Estimate, profiler: Profiler) -> float:
    """What is at rest, and every layer's parameters as gathered."""
    found = profiler.profile(freed.setup, replica=False)
    at_rest_bytes = sum(size for name, size in freed.bytes.items() if name != "activations and working")
    return at_rest_bytes + found.layers * _gathered_bytes(found)


def _gathered_bytes(found: Profile) -> float:
    """A layer's parameters as gathered."""
    return found.layer("elements") * found.whole["bytes"] / found.whole["elements"]


def lower_bound(setup: Setup, profiler: Profiler) -> tuple[float, float]:
    """Seconds and bytes that a plan's setup cannot go below.

    Seconds: its replica's step, slowed down by parameters gathered once and gradients reduced behind it. Bytes: its
    share of the state at rest, and what is alive as forward ends, less gradients and what is gathered again. What a
    solver finds for sharded state is other than for a replica: its seconds are the replica's compute alone, and
    slowed down, and its bytes, as what it finds for a replica or as what is done by hand, whichever is less.
    """
    found = profiler.profile(setup, replica=True)
    whole = found.whole
    update_s = whole["optimizer_s"] / setup.dp_shard
    at_rest_bytes = (whole["stored bytes"] + whole["states"]) / setup.dp_shard
    forward_bytes = whole["alive.forward"] - whole["rest"] - found.outside["gradients"]
    spared = found.layers * found.layer("gathered") if setup.gathers_again else 0.0  # parts may be made again
    size = at_rest_bytes + max(found.layers * found.saved_bytes, forward_bytes) - spared
    micro_s, slowed_s = whole["micro_s"], _slowed_at_least_s(setup, found, profiler.hardware)
    if setup.solved:  # one replica alone has no state to gather, and less reason to split its parameters
        by_hand = replace(setup, solved=False)
        micro_s -= found.total("exposed.") + whole["slowed_s"]
        split = profiler.profile(by_hand, replica=True)
        slowed_s = min(slowed_s, _slowed_at_least_s(setup, split, profiler.hardware))
        size = min(size, lower_bound(by_hand, profiler)[1])
    added_s = (setup.accumulate - 1) * whole["added_s"] / setup.dp_shard
    return setup.accumulate * (micro_s + slowed_s) + added_s + update_s, size


def _slowed_at_least_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """What sharded state makes a micro-batch take longer: it takes its share of compute while it is sent, but for what
    is sent while compute waits for activations anyway; or compute waits for it, which is longer."""
    mesh = topology(hardware, {"dp_replicate": setup.dp_replicate, "dp_shard": setup.dp_shard, "tp": setup.tp})
    size = found.whole["bytes"]
    reduced = size * found.whole["trained elements"] / found.whole["elements"]
    waits_s = found.total("exposed.activation.")
    slowed_s = 0.0
    sent: dict[int, dict[str, float]] = {
        0: {"all_reduce": reduced / setup.dp_shard}, 1: {"all_gather": size, "reduce_scatter": reduced}
    }  # fmt: skip
    for axis, collectives in sent.items():
        if mesh.sizes[axis] > 1:
            sent_s = sum(collective_s(kind, each, (axis,), mesh) for kind, each in collectives.items())
            slowed_s += min(taken_shares((axis,), mesh)) * max(0.0, sent_s - waits_s)
    return slowed_s
