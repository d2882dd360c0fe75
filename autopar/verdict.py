"""What a search says in words: is sharding the state enough, is sharding the computation needed, would context
parallelism or a pipeline pay.

Each answer stands with the figures it follows from, so that who disagrees can see where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from autopar.leads import ENOUGH, EXPERTS_ERROR, chosen, close
from autopar.profiling import Profiler
from autopar.reach import Reach, Times, reach_down, reach_up
from costmodel.hardware import Device
from costmodel.memory import gib
from passes.report_text import seconds_text
from passes.setup import Setup

Answer = Literal["state", "computation", "context", "pipeline", "offload", "nothing"]

_SIMPLEST_FIRST: tuple[Answer, ...] = ("state", "computation", "context", "pipeline")
_NAMES = {
    "state": "sharded state", "computation": "sharded computation", "context": "context parallelism",
    "pipeline": "a pipeline",
}  # fmt: skip


class Priced(Protocol):
    """A candidate of the search."""

    @property
    def setup(self) -> Setup: ...
    @property
    def step_time_s(self) -> float: ...
    @property
    def peak_memory_bytes(self) -> int: ...
    @property
    def over_bytes(self) -> int: ...
    @property
    def fits(self) -> bool: ...
    @property
    def seconds(self) -> Any: ...
    @property
    def hidden_s(self) -> float: ...


@dataclass(frozen=True)
class Verdict:
    """`answer`: the least that is enough: sharded state (FSDP2), sharded computation too (TP with sequence
    parallelism), context parallelism without stages, a pipeline, offload, or nothing that was tried."""

    answer: Answer
    state_s: float | None
    """Fastest step that fits with sharded state alone; None where none fits. The same for the others."""
    computation_s: float | None
    context_s: float | None
    pipeline_s: float | None
    offload_s: float | None
    text: tuple[str, ...]
    enough_gpus: int | None = None
    """The most GPUs, by doubling or halving those asked for, on which sharded state alone is enough at this batch."""
    close: tuple[Answer, ...] = ()
    """Where predictions cannot tell several ways apart: these, the chosen one among them."""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def verdict(
    found: Sequence[Priced], profiler: Profiler, gpus: int, batch: int, budget: int,
    times_on: Callable[[int], Times] | None = None, error: float = Device.step_error,
) -> Verdict:  # fmt: skip
    """Of all that a search priced. `times_on`: steps on another number of GPUs, to tell how far the answer goes;
    `error`: by how much steps are off on average."""
    plain = [c for c in found if not c.setup.fp8]

    def best(which: Callable[[Setup], bool]) -> Priced | None:
        fitting = [c for c in plain if c.fits and which(c.setup)]
        return min(fitting, key=lambda c: c.step_time_s, default=None)

    def simple(setup: Setup) -> bool:
        return setup.pp == setup.cp == 1 and not setup.offload

    state = best(lambda s: simple(s) and s.tp == 1 and s.state == "zero3")
    computation = best(lambda s: simple(s) and s.tp > 1 and s.state == "zero3")
    context = best(lambda s: s.pp == 1 and s.cp > 1 and s.ep == 1)
    pipeline = best(lambda s: s.pp > 1 and s.ep == 1) or best(lambda s: s.pp > 1)
    experts = best(lambda s: s.ep > 1)
    offloaded = best(lambda s: s.offload)
    found_ways = zip(_SIMPLEST_FIRST, (state, computation, context, pipeline), strict=True)
    resident: dict[Answer, Priced] = {name: c for name, c in found_ways if c is not None}
    ways = {name: c.step_time_s for name, c in resident.items()}
    answer: Answer = chosen(ways) if ways else "offload" if offloaded else "nothing"
    tied = tuple(close(ways, error)) if ways else ()
    if answer in resident:
        samples = f"{batch} sample{'s' * (batch > 1)}"
        divides = any(simple(c.setup) and (c.setup.tp == 1 or answer != "computation") for c in plain)
        none = ", and nothing simpler fits" if divides else f", and no simpler mesh divides {samples}"
        text = [_chosen_text(answer, resident, tied, budget, none)]
    else:
        text = _nothing_resident_text(plain, offloaded, budget)
    copied = best(lambda s: simple(s) and _is_copied(s) and s.state == "zero3")
    if answer == "state" and state is not None and copied is not None:
        text += _copies_would_do(copied, state)
    if len(tied) > 1:
        text.append(_too_close({name: resident[name] for name in tied}, answer, error))
    if answer in ("computation", "context", "pipeline", "nothing"):
        text += _why_not_state(state, plain, profiler, gpus, batch, budget)
    if answer in ("state", "computation", "context"):
        text.append(_pipeline_text(pipeline, ways[answer]))
    if answer == "state" and state is not None and pipeline is not None:
        text += _rests_on_overlap(state, pipeline)
    if experts is not None:
        text.append(_experts_text(experts))
    reach = None
    if times_on is not None and answer == "state":
        reach = reach_up(gpus, batch, times_on)
    elif times_on is not None and answer in _SIMPLEST_FIRST[1:] and (batch % gpus or state):
        reach = reach_down(gpus, batch, profiler.hardware.ranks_per_node, times_on)
    if reach is not None:
        text.append(_reach_text(reach, gpus, batch))
    state_s, computation_s, context_s, pipeline_s, offload_s = (
        c.step_time_s if c else None for c in (state, computation, context, pipeline, offloaded)
    )
    enough = reach.gpus if reach else None
    told = tied if len(tied) > 1 else ()
    return Verdict(answer, state_s, computation_s, context_s, pipeline_s, offload_s, tuple(text), enough, told)


def _chosen_text(answer: Answer, ways: Mapping[Answer, Priced], tied: Sequence[Answer], budget: int, none: str) -> str:
    """That `answer` is enough, needed or pays, and what it takes beside the others; `none`: what is said where there
    is nothing simpler."""
    best, state, near = ways[answer], ways.get("state"), [ways[each] for each in tied]
    if answer == "state":
        fastest = min(c.step_time_s for c in ways.values())
        way, waits = "Sharding the state (FSDP2)", "parameters and gradients"
        if _is_copied(best.setup):
            way, waits = "Splitting the batch over copies of the model (DDP)", "gradients"
        return (
            f"{way} is enough: {_s(best.step_time_s)} a step{_beside(best, fastest)}, in "
            f"{gib(best.peak_memory_bytes)} of {gib(budget)}; {_share(best, 'exposed state')} of the step waits "
            f"for {waits}."
        )
    if answer == "computation":
        gains = "is needed" if state is None else "is a little faster" if "state" in tied else "pays"
        return (
            f"Sharding the computation (tensor and sequence parallelism over {best.setup.tp}) "
            f"{gains}: {_s(best.step_time_s)} a step"
            f"{_against(state, best, near, none)}."
        )
    before = [each for each in _SIMPLEST_FIRST[: _SIMPLEST_FIRST.index(answer)] if each in ways]
    simpler = min((ways[each] for each in before), key=lambda c: c.step_time_s, default=None)
    gains = "is a little faster" if any(each in tied for each in before) else "pays"
    name = _NAMES[answer]
    return (
        f"{name[0].upper()}{name[1:]} {gains}: {_parts(best.setup)} {_s(best.step_time_s)} a step (priced only)"
        f"{_against(simpler, best, near, none)}."
    )


def _copies_would_do(copied: Priced, state: Priced) -> list[str]:
    """Where copies of the model fit, and are hardly slower than sharded state."""
    more = copied.step_time_s / state.step_time_s - 1
    if _is_copied(state.setup) or more > ENOUGH:
        return []
    return [
        f"Copies of the model (DDP), which is simpler, would do too: {_s(copied.step_time_s)}, {more:.1%} more, in "
        f"{gib(copied.peak_memory_bytes)}."
    ]


def _nothing_resident_text(found: Sequence[Priced], offloaded: Priced | None, budget: int) -> list[str]:
    """What comes nearest to fitting, and what offload takes where it fits."""
    text = [_nothing_fits([c for c in found if not c.setup.offload], budget)]
    if offloaded:
        text.append(
            f"Offload is the only way: optimizer states in host memory, {_s(offloaded.step_time_s)} a step with "
            f"{gib(offloaded.peak_memory_bytes)} (priced only)."
        )
    elif beside := [c.peak_memory_bytes for c in found if c.setup.offload]:
        text.append(f"Nor does it with optimizer states in host memory: the least is {gib(min(beside))}.")
    return text


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else seconds_text(seconds)


def _share(candidate: Priced, name: str) -> str:
    return f"{candidate.seconds.get(name, 0.0) / candidate.step_time_s:.0%}"


def _too_close(ways: Mapping[Answer, Priced], answer: Answer, error: float) -> str:
    """That predictions cannot tell these apart, and what chose one of them."""
    names = {name: "copies of the model" if _is_copied(c.setup) else _NAMES[name] for name, c in ways.items()}
    told = ", ".join(f"{names[name]} {_s(c.step_time_s)}" for name, c in ways.items())
    fastest = ways[answer].step_time_s == min(c.step_time_s for c in ways.values())
    why = "the fastest" if fastest else f"the simplest within {ENOUGH:.0%} of the fastest"
    return (
        f"Too close to call: {told}; predictions are off by {error:.0%} on average. The choice is "
        f"{names[answer]}, {why}."
    )


def _beside(candidate: Priced, fastest: float) -> str:
    more = candidate.step_time_s / fastest - 1
    others = "tensor parallelism or a pipeline"
    return f", {more:.0%} more than with {others}" if more > 0.005 else f" (no faster with {others})"


def _against(other: Priced | None, best: Priced, near: Sequence[Priced], none: str) -> str:
    """Beside `other`; `near`: what predictions cannot tell apart."""
    if other is None:
        return none
    if any(other is each for each in near):
        return f", {_name(other)} {_s(other.step_time_s)}"
    times = other.step_time_s / best.step_time_s
    return f", {times:.2f} times faster than {_name(other)} ({_s(other.step_time_s)})"


def _name(candidate: Priced) -> str:
    named = _named(candidate.setup)
    alone = "copies of the model alone" if _is_copied(candidate.setup) else "sharded state alone"
    return f"{named} without stages" if named else alone


def _is_copied(setup: Setup) -> bool:
    """Whether each data-parallel rank has all of the state, and nothing but the batch is split."""
    return setup.dp_shard == setup.tp == setup.pp == setup.cp == 1 < setup.dp_replicate


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


def _why_not_state(
    state: Priced | None, found: Sequence[Priced], profiler: Profiler, gpus: int, batch: int, budget: int
) -> list[str]:
    """The reasons, each with its figures: the batch per GPU, a layer's memory, exposed gathers."""
    text = []
    if batch % gpus:
        per = f"{batch / gpus:.2g} samples per GPU" if batch < gpus else f"{batch} samples, which {gpus} do not divide"
        text.append(f"Sharded state alone cannot use all GPUs: it splits the batch, and there are {per}.")
    elif state is None:
        mine = [c for c in found if _is_state(c.setup)]
        near = min(mine, key=lambda c: c.over_bytes, default=None)
        layer = profiler.profile(Setup(), replica=True)
        about = (
            f"one layer's parameters are {gib(layer.layer('bytes'))} when gathered and it keeps "
            f"{gib(layer.layer('alive.forward') - layer.layer('rest'))} of activations per sample"
        )
        if near is not None:
            text.append(
                f"Sharded state alone does not fit: {gib(near.peak_memory_bytes)}, {gib(near.over_bytes)} too much "
                f"with recompute {near.setup.recompute}; {about}."
            )
    elif _waits(state):
        per = "1 sample" if batch == gpus else f"{batch // gpus} samples"
        text.append(
            f"Sharded state alone waits {_share(state, 'exposed state')} of its step for parameters and gradients: "
            f"{per} per GPU and step are too little compute to hide them behind."
        )
    elif state.setup.recompute in _COSTLY:
        layers = "layers" if state.setup.recompute == "full" else "the wide products of layers"
        without = any(c.fits and _is_state(c.setup) and c.setup.recompute not in _COSTLY for c in found)
        how = "is fastest" if without else "fits only"
        text.append(
            f"Sharded state alone {how} where backward computes {layers} again, {_share(state, 'recompute')} of its "
            "step: each GPU holds whole samples."
        )
    return text


_COSTLY = ("widening", "full")
"""Recomputation of products."""


def _is_state(setup: Setup) -> bool:
    """Whether data-parallel ranks alone run it, their state sharded and on the device."""
    return setup.state == "zero3" and not setup.offload and setup.tp == setup.pp == setup.cp == 1


def _waits(state: Priced) -> bool:
    """Whether what it waits for is more than what is let pass as enough."""
    return bool(state.seconds.get("exposed state", 0.0) > ENOUGH * state.step_time_s)


def _rests_on_overlap(state: Priced, pipeline: Priced) -> list[str]:
    """Where a pipeline would be faster if sharded state waited for what it sends, as ZeRO-3 once did: by how much.

    Nothing where the pipeline is faster already: what chose is said where they are too close to call."""
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
        other = f"the fastest other way {_s(other_s)}" if other_s is not None else "and no other that was tried fits"
        return f" ({_s(times.state_s)} a step, {other})"

    still = "stays enough" if reach.gpus >= gpus else "is enough"
    last = f", where each has one sample{told(reach.times)}" if reach.gpus == batch else told(reach.times)
    text = f"At this global batch sharded state {still} up to {reach.gpus} GPU{'s' if reach.gpus > 1 else ''}{last}"
    if reach.beyond is not None and reach.times_beyond is not None:
        text += f", and no longer on {reach.beyond}{told(reach.times_beyond)}"
    elif reach.gpus == batch:
        text += "; more it cannot use"
    return f"{text}."


def _pipeline_text(pipeline: Priced | None, chosen_s: float) -> str:
    if pipeline is None:
        return "No pipeline fits or divides the layers."
    little = "gain little" if pipeline.step_time_s < chosen_s else "not pay"
    return (
        f"A pipeline would {little}: the best ({_mesh(pipeline.setup)}, priced only) takes {_s(pipeline.step_time_s)}, "
        f"{_share(pipeline, 'bubble')} of it bubble."
    )


def _experts_text(experts: Priced) -> str:
    return (
        f"Expert parallelism ({_mesh(experts.setup)}, priced only) takes {_s(experts.step_time_s)}, "
        f"{_share(experts, 'experts')} of it to send tokens to their experts and back; such figures are off by "
        f"{EXPERTS_ERROR:.0%} on average."
    )
