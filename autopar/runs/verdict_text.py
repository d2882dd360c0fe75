"""A search's verdict in words.

Each answer stands with the figures it follows from, so that who disagrees can see where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.runs.leads import ENOUGH, EXPERTS_ERROR
from autopar.runs.profiling import Profiler
from autopar.runs.reach import Reach, Times
from autopar.runs.ways import SIMPLEST_FIRST, Answer, Priced, Ways, is_copied, is_simple, is_state
from costmodel.memory import gib
from passes.plan.report_text import seconds_text
from passes.runs.setup import Setup

_NAMES = {
    "state": "sharded state", "computation": "sharded computation", "context": "context parallelism",
    "pipeline": "a pipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Basis:
    """What a verdict rests on. `found`: all candidates in the precision asked for; `ways`: the fastest of each way;
    `near`: those that predictions cannot tell from the fastest, which are off by `error` on average; `budget`: bytes
    of a GPU; `reach`: how far sharded state alone goes, where that was looked for."""

    found: Sequence[Priced]
    ways: Ways
    answer: Answer
    near: tuple[Answer, ...]
    gpus: int
    batch: int
    budget: int
    error: float
    reach: Reach | None


def verdict_text(basis: Basis, profiler: Profiler) -> tuple[str, ...]:
    """The answer, then what it rests on and what else would do, a sentence or two each."""
    ways, answer = basis.ways, basis.answer
    text = _answer_text(basis)
    if answer == "state":
        text += _copies_would_do(ways)
    if len(basis.near) > 1:
        text.append(_too_close(basis))
    if answer in ("computation", "context", "pipeline", "nothing"):
        text += _why_not_state(basis, profiler)
    if answer in ("state", "computation", "context") and basis.gpus > 1:
        text.append(_pipeline_text(basis))
    if answer == "state":
        text += _rests_on_overlap(ways)
    if ways.experts is not None:
        text.append(_experts_text(ways.experts))
    if basis.reach is not None:
        text.append(_reach_text(basis.reach, basis.gpus, basis.batch))
    return tuple(text)


def _answer_text(basis: Basis) -> list[str]:
    """That the way is enough, needed or pays, and what it takes beside the others."""
    answer = basis.answer
    if answer not in basis.ways.resident:
        return _nothing_resident_text(basis)
    if answer == "state":
        return [_state_text(basis)]
    return [_computation_text(basis) if answer == "computation" else _priced_text(basis)]


def _state_text(basis: Basis) -> str:
    best = basis.ways.resident["state"]
    fastest_s = min(c.step_time_s for c in basis.ways.resident.values())
    memory = f"{gib(best.peak_memory_bytes)} of {gib(basis.budget)}"
    if basis.gpus == 1:
        return f"One GPU is enough: {_s(best.step_time_s)} a step, in {memory}."
    way, waits = "Sharding the state (FSDP2)", "parameters and gradients"
    if is_copied(best.setup):
        way, waits = "Splitting the batch over copies of the model (DDP)", "gradients"
    return (
        f"{way} is enough: {_s(best.step_time_s)} a step{_beside(best, fastest_s)}, in {memory}; "
        f"{_share(best, 'exposed state')} of the step waits for {waits}."
    )


def _computation_text(basis: Basis) -> str:
    best, state = basis.ways.resident["computation"], basis.ways.state
    gains = "is needed" if state is None else "is a little faster" if "state" in basis.near else "pays"
    return (
        f"Sharding the computation (tensor and sequence parallelism over {best.setup.tp}) "
        f"{gains}: {_s(best.step_time_s)} a step{_against(state, basis)}."
    )


def _priced_text(basis: Basis) -> str:
    """Of a way that no plan can run."""
    answer, ways = basis.answer, basis.ways.resident
    before = [each for each in SIMPLEST_FIRST[: SIMPLEST_FIRST.index(answer)] if each in ways]
    simpler = min((ways[each] for each in before), key=lambda c: c.step_time_s, default=None)
    gains = "is a little faster" if any(each in basis.near for each in before) else "pays"
    name, best = _NAMES[answer], ways[answer]
    return (
        f"{name[0].upper()}{name[1:]} {gains}: {_parts(best.setup)} {_s(best.step_time_s)} a step (priced only)"
        f"{_against(simpler, basis)}."
    )


def _copies_would_do(ways: Ways) -> list[str]:
    """Where copies of the model fit, and are hardly slower than sharded state."""
    state, copied = ways.resident["state"], ways.copied
    if copied is None or is_copied(state.setup):
        return []
    more = copied.step_time_s / state.step_time_s - 1
    if more > ENOUGH:
        return []
    return [
        f"Copies of the model (DDP), which is simpler, would do too: {_s(copied.step_time_s)}, {more:.1%} more, in "
        f"{gib(copied.peak_memory_bytes)}."
    ]


def _nothing_resident_text(basis: Basis) -> list[str]:
    """What comes nearest to fitting, and what offload takes where it fits."""
    offloaded = basis.ways.offload
    text = [_nothing_fits([c for c in basis.found if not c.setup.offload], basis.budget)]
    if offloaded is not None:
        text.append(
            f"Offload is the only way: optimizer states in host memory, {_s(offloaded.step_time_s)} a step with "
            f"{gib(offloaded.peak_memory_bytes)} (priced only)."
        )
    elif beside := [c.peak_memory_bytes for c in basis.found if c.setup.offload]:
        text.append(f"Nor does it with optimizer states in host memory: the least is {gib(min(beside))}.")
    return text


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else seconds_text(seconds)


def _share(candidate: Priced, name: str) -> str:
    return f"{candidate.seconds.get(name, 0.0) / candidate.step_time_s:.0%}"


def _too_close(basis: Basis) -> str:
    """That predictions cannot tell these apart, and what chose one of them."""
    answer, ways = basis.answer, {name: basis.ways.resident[name] for name in basis.near}
    names = {name: "copies of the model" if is_copied(c.setup) else _NAMES[name] for name, c in ways.items()}
    told = ", ".join(f"{names[name]} {_s(c.step_time_s)}" for name, c in ways.items())
    fastest = ways[answer].step_time_s == min(c.step_time_s for c in ways.values())
    why = "the fastest" if fastest else f"the simplest within {ENOUGH:.0%} of the fastest"
    return (
        f"Too close to call: {told}; predictions are off by {basis.error:.0%} on average. The choice is "
        f"{names[answer]}, {why}."
    )


def _beside(candidate: Priced, fastest_s: float) -> str:
    more = candidate.step_time_s / fastest_s - 1
    others = "tensor parallelism or a pipeline"
    return f", {more:.0%} more than with {others}" if more > 0.005 else f" (no faster with {others})"


def _against(other: Priced | None, basis: Basis) -> str:
    """The answer's step beside that of `other`; without one, that nothing simpler fits or divides the batch."""
    ways, answer = basis.ways.resident, basis.answer
    if other is None:
        return _nothing_simpler(basis)
    if any(other is ways[each] for each in basis.near):
        return f", {_name(other)} {_s(other.step_time_s)}"
    times = other.step_time_s / ways[answer].step_time_s
    return f", {times:.2f} times faster than {_name(other)} ({_s(other.step_time_s)})"


def _nothing_simpler(basis: Basis) -> str:
    setups = [c.setup for c in basis.found if is_simple(c.setup)]
    if any(setup.tp == 1 or basis.answer != "computation" for setup in setups):
        return ", and nothing simpler fits"
    return f", and no simpler mesh divides {basis.batch} sample{'s' * (basis.batch > 1)}"


def _name(candidate: Priced) -> str:
    named = _named(candidate.setup)
    alone = "copies of the model alone" if is_copied(candidate.setup) else "sharded state alone"
    return f"{named} without stages" if named else alone


def _named(setup: Setup) -> str:
    """`tensor parallelism over 4 and context parallelism over 2`."""
    ways = (("tensor", setup.tp), ("context", setup.cp), ("expert", setup.ep))
    return " and ".join(f"{name} parallelism over {size}" for name, size in ways if size > 1)


def _parts(setup: Setup) -> str:
    """`8 stages with tensor parallelism over 4 take`, `sequences in 2 parts with tensor parallelism over 4 take`."""
    staged = setup.pp > 1
    named = _named(setup if staged else replace(setup, cp=1))
    parts = f"{setup.pp} stages" if staged else f"sequences in {setup.cp} parts"
    return f"{parts}{f' with {named}' if named else ''} take"


def _nothing_fits(found: Sequence[Priced], budget: int) -> str:
    near = min(found, key=lambda c: c.over_bytes)
    return (
        f"Nothing fits in {gib(budget)} without offload: the nearest ({_mesh(near.setup)}, micro-batch "
        f"{near.setup.micro_batch}, recompute {near.setup.recompute}) needs {gib(near.peak_memory_bytes)}, "
        f"{gib(near.over_bytes)} too much."
    )


def _mesh(setup: Setup) -> str:
    more = "".join(
        f" x {name} {size}" for name, size in (("pp", setup.pp), ("cp", setup.cp), ("ep", setup.ep)) if size > 1
    )
    return f"dp {setup.data_ranks} x tp {setup.tp}{more}"


def _why_not_state(basis: Basis, profiler: Profiler) -> list[str]:
    """The reason, with its figures: the batch per GPU, a layer's memory, exposed gathers, or what is computed again."""
    batch, gpus, state = basis.batch, basis.gpus, basis.ways.state
    if batch % gpus:
        per = f"{batch / gpus:.2g} samples per GPU" if batch < gpus else f"{batch} samples, which {gpus} do not divide"
        return [f"Sharded state alone cannot use all GPUs: it splits the batch, and there are {per}."]
    if state is None:
        return _state_does_not_fit(basis.found, profiler)
    if _waits(state):
        per = "1 sample" if batch == gpus else f"{batch // gpus} samples"
        return [
            f"Sharded state alone waits {_share(state, 'exposed state')} of its step for parameters and gradients: "
            f"{per} per GPU and step are too little compute to hide them behind."
        ]
    if state.setup.recompute in _COSTLY:
        layers = "layers" if state.setup.recompute == "full" else "the wide products of layers"
        without = any(c.fits and is_state(c.setup) and c.setup.recompute not in _COSTLY for c in basis.found)
        how = "is fastest" if without else "fits only"
        return [
            f"Sharded state alone {how} where backward computes {layers} again, {_share(state, 'recompute')} of its "
            "step: each GPU holds whole samples."
        ]
    return []


def _state_does_not_fit(found: Sequence[Priced], profiler: Profiler) -> list[str]:
    near = min((c for c in found if is_state(c.setup)), key=lambda c: c.over_bytes, default=None)
    if near is None:
        return []
    layer = profiler.profile(Setup(), replica=True)
    return [
        f"Sharded state alone does not fit: {gib(near.peak_memory_bytes)}, {gib(near.over_bytes)} too much "
        f"with recompute {near.setup.recompute}; one layer's parameters are {gib(layer.layer('bytes'))} when gathered "
        f"and it keeps {gib(layer.layer('alive.forward') - layer.layer('rest'))} of activations per sample."
    ]


_COSTLY = ("widening", "full")
"""Recomputation of products."""


def _waits(state: Priced) -> bool:
    """Whether what it waits for is more than what is let pass as enough."""
    return bool(state.seconds.get("exposed state", 0.0) > ENOUGH * state.step_time_s)


def _rests_on_overlap(ways: Ways) -> list[str]:
    """Where a pipeline would be faster if sharded state waited for what it sends, as ZeRO-3 once did: by how much.

    Nothing where the pipeline is faster already: what chose is said where they are too close to call."""
    state, pipeline = ways.resident["state"], ways.pipeline
    if pipeline is None:
        return []
    gained_s = state.hidden_s - state.seconds.get("slowed", 0.0)
    waiting_s = state.step_time_s + gained_s
    if state.step_time_s > pipeline.step_time_s or waiting_s <= pipeline.step_time_s * (1 + ENOUGH):
        return []
    compute_s = sum(state.seconds.get(name, 0.0) for name in ("compute", "recompute", "slowed"))
    spare_s = pipeline.step_time_s * (1 + ENOUGH) - state.step_time_s
    hidden = 1 - spare_s / gained_s
    return [
        f"This rests on overlap: gathers and reductions take {_s(state.hidden_s)} behind {_s(compute_s)} of compute, "
        f"{state.hidden_s / compute_s:.0%} of it. It stays enough as long as {hidden:.0%} of them hide. Were none "
        f"hidden, a step would take {_s(waiting_s)}, and that pipeline would be "
        f"{waiting_s / pipeline.step_time_s:.2f} times faster."
    ]


def _reach_text(reach: Reach, gpus: int, batch: int) -> str:
    """Up to how many GPUs it is enough, with both times there, and both where it is not."""

    def told(times: Times | None) -> str:
        if times is None or times.state_s is None:
            return ""
        other_s = min(times.others_s, default=None)
        other = f"the fastest other way {_s(other_s)}" if other_s is not None else "and no other way was found"
        return f" ({_s(times.state_s)} a step, {other})"

    still = "stays enough" if reach.gpus >= gpus else "is enough"
    last = f", where each has one sample{told(reach.times)}" if reach.gpus == batch else told(reach.times)
    text = f"At this global batch sharded state {still} up to {reach.gpus} GPU{'s' if reach.gpus > 1 else ''}{last}"
    if reach.beyond is not None and reach.times_beyond is not None:
        text += f", and no longer on {reach.beyond}{told(reach.times_beyond)}"
    elif reach.gpus == batch:
        text += "; more it cannot use"
    return f"{text}."


def _pipeline_text(basis: Basis) -> str:
    pipeline, best = basis.ways.pipeline, basis.ways.resident[basis.answer]
    if pipeline is None:
        if any(c.setup.pp > 1 for c in basis.found):
            return "No pipeline fits."
        return "No pipeline was priced (none divides the GPUs, the layers and the batch, or a note says why)."
    little = "gain little" if pipeline.step_time_s < best.step_time_s else "not pay"
    return (
        f"A pipeline would {little}: the best ({_mesh(pipeline.setup)}, priced only) takes {_s(pipeline.step_time_s)}, "
        f"{_share(pipeline, 'bubble')} of it bubble."
    )


def _experts_text(experts: Priced) -> str:
    beside = (
        ", beside another micro-batch's compute (Megatron-LM's --overlap-moe-expert-parallel-comm, DualPipe)"
        if experts.setup.experts_beside
        else ""
    )
    return (
        f"Expert parallelism ({_mesh(experts.setup)}, priced only) takes {_s(experts.step_time_s)}, "
        f"{_share(experts, 'experts')} of it to send tokens to their experts and back{beside}; such figures are off by "
        f"{EXPERTS_ERROR:.0%} on average."
    )
