"""What a plan's report says beside the plan: what was padded, left out, not looked at, or would do better."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from costmodel.hardware import Topology
from costmodel.layout import Partial
from costmodel.memory import OptimizerSpec, gib
from costmodel.memory import optimizer as optimizer_of
from passes.analysis.strategies import Option
from passes.padding.uneven import padding_notes
from passes.plan.report_text import seconds_text
from passes.planner.fitting import Candidate, Request, as_asked
from passes.planner.proposals import Search
from passes.play.tracks import op_cost
from passes.program.provenance import place_of
from passes.program.walks import following
from passes.space.named import tensor_axes
from passes.space.space import trained_elements


def plan_notes(chosen: Candidate, search: Search) -> tuple[str, ...]:
    """The notes of the plan that is made of `chosen`."""
    request = search.request
    return (
        *chosen.space.program.notes,
        *padding_notes(chosen.padding, chosen.space, chosen.assignment, chosen.untried),
        *_whole_notes(chosen),
        *_states_notes(chosen, request.optimizer),
        *_async_tp_notes(chosen, request),
        *_idle_notes(chosen, request),
        *_budget_notes(search.budget, search.topology),
        *_tight_notes(chosen),
        *_launch_notes(chosen, request),
        *_missed_notes(search),
    )


_SEEN = 0.05
"""The share of the products that is told of."""


def _whole_notes(chosen: Candidate) -> list[str]:
    """Where the ranks of a batch axis all compute the same products of samples: how much, and the line of the most."""
    space, notes = chosen.space, []
    samples = following(space.program.graph.graph, space.program.batch_dims)
    for axis in space.batch_axes:
        total_s, whole_s = 0.0, defaultdict[str, float](float)
        for index, (site, pick) in enumerate(zip(space.sites, chosen.assignment, strict=True)):
            option = site.options[pick]
            if not isinstance(option, Option) or (cost := op_cost(space, index, option)).kind == "other":
                continue
            node, seconds = space.folding.members[index][0], cost.seconds * site.count
            if node.meta["phase"] != "forward":
                continue
            total_s += seconds
            partial = any(isinstance(result[axis], Partial) for result in option.results)
            if option.splits[axis] is None and not partial and node in samples:
                whole_s[place_of(node)] += seconds
        share = sum(whole_s.values()) / (total_s or 1.0)
        if share >= _SEEN:
            most = max(whole_s, key=whole_s.__getitem__)
            notes.append(
                f"{share:.0%} of forward's matrix products run whole on every rank of "
                f"{space.topology.axes[axis].name}, most at {most}: what they read has no dim of samples that the axis "
                "could split"
            )
    return notes


_IN_FP32 = {"adamw": "adamw-bf16", "adam": "adamw-bf16"}
"""Optimizers budgeted with two fp32 states -> what to ask for where states are in two bytes."""


def _states_notes(chosen: Candidate, optimizer: str | OptimizerSpec) -> list[str]:
    """Where states are budgeted in fp32, but torch's optimizer keeps them in their parameters' lower dtype: by how much
    that is over."""
    spec = optimizer_of(optimizer)
    if spec.name not in _IN_FP32:
        return []
    lower = optimizer_of(_IN_FP32[spec.name])
    elements = trained_elements(chosen.space, chosen.assignment)[2]
    over = round(elements * (spec.state_bytes_per_param - lower.state_bytes_per_param))
    if not over:
        return []
    return [
        f"optimizer {spec.name!r} is budgeted with states in fp32; torch.optim's keeps those of two-byte parameters in "
        f"two bytes, {gib(over)} less on a rank: {lower.name!r} budgets that"
    ]


_WORTH_SAYING = 0.98


def _async_tp_notes(chosen: Candidate, request: Request) -> list[str]:
    """Where the step would be faster with products in parts: by how much."""
    mesh = chosen.space.topology
    if request.async_tp or not request.compiled or mesh.device.is_cpu:
        return []
    if not tensor_axes(mesh.sizes, chosen.space.batch_axes):
        return []
    space, now_s = replace(chosen.space, async_tp=True), chosen.schedule.step_time_s
    played = as_asked(space, chosen.assignment, request)
    if played.step_time_s > _WORTH_SAYING * now_s:
        return []
    return [
        f"Options(async_tp=True) or --async-tp is predicted to take {seconds_text(played.step_time_s)} per step "
        f"instead of {seconds_text(now_s)}: products go in parts beside the collectives of activations"
    ]


def _idle_notes(chosen: Candidate, request: Request) -> list[str]:
    """What was asked of gathered parameters or activations, where the plan gathers none: the other way is the same."""
    notes, now, recomputed = [], chosen.schedule, chosen.space.recomputed
    for option, asked, other in (
        ("reshard_after_forward", request.reshard, replace(recomputed, reshard=not request.reshard)),
        ("regather_activations", request.regather or None, replace(recomputed, regather=False)),
    ):
        if asked is None:
            continue
        played = as_asked(replace(chosen.space, recomputed=other), chosen.assignment, request)
        if (played.step_time_s, played.memory.bytes) == (now.step_time_s, now.memory.bytes):
            notes.append(f"{option}={asked} changes nothing: the plan gathers nothing that it could free or keep")
    return notes


_RESERVED = 1.14
"""What torch's allocator holds to what tensors take of it, in published runs (benchmarks/published_results.md)."""


def _tight_notes(chosen: Candidate) -> list[str]:
    """Where the step may not fit for what the allocator cannot use."""
    device = chosen.space.topology.device
    note = None if device.is_cpu else tight_note(chosen.schedule.peak_memory_bytes, device.usable_bytes)
    return [note] if note else []


def tight_note(peak_bytes: float, usable_bytes: float) -> str | None:
    """A note for a step that may not fit because of memory that the allocator cannot use."""
    share = peak_bytes / usable_bytes
    if share * _RESERVED <= 1:
        return None
    return (
        f"tensors take {share:.0%} of what the device has for them, and published runs reserve 14% to 20% more than "
        "theirs take: should it run out of memory, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True loses less, and a "
        "lower memory budget leaves more room"
    )


_LAUNCH_S = 80e-6
"""What the host of one machine took for each kernel of a step that waited for it (benchmarks/gpu/results.md: tp=8, of
whose kernels 78 fills are of no step)."""


def _launch_notes(chosen: Candidate, request: Request) -> list[str]:
    """Where the host that launches kernels may be what the step waits for."""
    schedule = chosen.schedule
    if chosen.space.topology.device.is_cpu or not request.compiled:
        return []
    note = launch_note(schedule.kernels, schedule.micro_batch_s)
    return [note] if note else []


def launch_note(kernels: float, seconds: float) -> str | None:
    """A note for a micro-batch whose kernels are short."""
    if seconds >= kernels * _LAUNCH_S:
        return None
    return (
        f"a micro-batch launches some {kernels:,.0f} kernels, one every {seconds_text(seconds / kernels)}: a host that "
        f"takes longer for each is what the step waits for, which is not priced ({seconds_text(_LAUNCH_S)} were seen)"
    )


def _budget_notes(budget: float, topology: Topology) -> list[str]:
    """Where the budget that was asked for is more than the device has."""
    if budget <= topology.device.memory_bytes:
        return []
    return [
        f"the memory budget is {gib(budget)}, more than the {gib(topology.device.memory_bytes)} that "
        f"{topology.hardware.label} has: what is planned may not fit there"
    ]


def _missed_notes(search: Search) -> list[str]:
    """Where the budget binds and there was no time for all that might have fitted: what was not looked at."""
    if not search.missed:
        return []
    return [
        f"within the memory budget, not looked at after {search.budgeted_s:.0f} s of the processor: "
        f"{', '.join(dict.fromkeys(search.missed))}"
    ]
