"""What a training run is set to, and what it costs: schedules at full depth, and formulas for what no plan does yet.

A `Setup` that plans can do (state sharding with tensor parallelism, accumulation, recompute) is a played schedule and
nothing else. What no plan does yet (pipeline stages, context or expert parallelism, ZeRO-1/2, fp8 products, offload) is
priced on top of a played replica, and says so in `priced_only`.

    replica      one data-parallel rank's stages: layers as scheduled, spread over the pipeline
    state        gradients reduced behind the last backward, parameters gathered behind the first forward
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from costmodel import offload, pipeline
from costmodel.collectives import collective_s, taken_shares
from costmodel.compute import addition_s
from costmodel.hardware import Hardware, Topology, topology
from costmodel.memory import OptimizerSpec
from costmodel.token_exchange import token_exchange_s
from passes.candidate_memory import Parameters, at_rest, parameters_of, replicated_bytes, sharded_peak_bytes
from passes.depth import Profile
from passes.setup import Setup

_CAST_BYTES = 2.0
"""Each tensor that layers multiply is an operand of two products: it is read in 2 bytes, and written in 1 as it is and
in 1 transposed, 4 for both."""
LEAST_GAIN = 0.01
"""Of a step, that another way of running the same setup may save where it is priced too."""
NO_LAYERS = "no repeated layers were found, or too few to cut"
NO_ATTENTION = "no attention kernel was found (attention that a model writes out is products like others)"
_GATHERED = 3
"""Layers whose parameters are there at once where they are freed after use, and gathered ahead."""


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one rank, the busiest stage's; `seconds` and `bytes` add up to the two totals."""

    setup: Setup
    step_s: float
    peak_bytes: float
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    hidden_s: float = 0.0
    """What is sent behind compute: gathers of parameters and reductions of gradients, and what a pipeline hides of
    activations."""


class Profiler(Protocol):
    """Gives schedules at full depth."""

    @property
    def hardware(self) -> Hardware:
        """What they run on."""

    @property
    def optimizer(self) -> OptimizerSpec:
        """What the optimizer keeps."""

    def profile(self, setup: Setup, *, replica: bool) -> Profile:
        """Of the setup's mesh; `replica`: of one data-parallel rank and one context-parallel part alone."""


def estimate(setup: Setup, profiler: Profiler) -> Estimate:
    """Price `setup`.

    Raises:
        ValueError: expert parallelism that is not priced, or what is priced by layer where no layers are told apart.
    """
    if setup.ep > 1:
        _check_experts(setup, profiler)
    _check_layers(setup, profiler)
    if setup.is_played:
        return _sharded(setup, profiler)
    return _replicated(setup, profiler)


def kernels_of(setup: Setup, profiler: Profiler) -> float:
    """Kernels that a rank's host launches for a micro-batch."""
    found = profiler.profile(setup, replica=not setup.is_played)
    return found.whole["kernels"] / setup.pp


def _check_experts(setup: Setup, profiler: Profiler) -> None:
    ranks = setup.data_ranks * setup.cp * setup.tp
    if setup.state == "zero3":
        raise ValueError(
            f"ep={setup.ep} with zero3: expert parallelism is priced with parameters that stay on a rank; zero1 is one"
        )
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

    Seconds: its replica's step, slowed down by parameters gathered once and gradients reduced behind it, less what it
    would not gather again if it kept parameters. Bytes: its share of the state at rest, and what is alive as forward
    ends, less gradients and what is gathered again; of what a solver finds for a replica or of what is done by hand,
    the less, as the solver's picks for sharded state are others.
    """
    found = profiler.profile(setup, replica=True)
    whole = found.whole
    update_s = whole["optimizer_s"] / setup.dp_shard
    at_rest_bytes = (whole["stored bytes"] + whole["states"]) / setup.dp_shard
    forward_bytes = whole["alive.forward"] - whole["rest"] - found.outside["gradients"]
    spared = found.layers * found.layer("gathered") if setup.gathers_again else 0.0  # parts may be made again
    working_bytes = max(found.layers * found.saved_bytes, forward_bytes) - spared
    micro_s = whole["micro_s"] + _slowed_at_least_s(setup, found, profiler.hardware)
    if setup.solved:  # its tensor-parallel ranks may gather parameters too
        waited_s, behind_s = (found.total(f"{kind}.parameter.backward.") for kind in ("exposed", "hidden"))
        mesh = topology(profiler.hardware, {"dp": setup.data_ranks, "tp": setup.tp})
        micro_s -= waited_s + max(taken_shares((1,), mesh)) * behind_s
    added_s = (setup.accumulate - 1) * whole["added_s"] / setup.dp_shard
    size = at_rest_bytes + working_bytes
    if setup.solved:  # one replica alone has no state to gather, and less reason to split its parameters
        size = min(size, lower_bound(replace(setup, solved=False), profiler)[1])
    return setup.accumulate * micro_s + added_s + update_s, size


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


def _rest_again_s(setup: Setup, found: Profile) -> float:
    """What a layer's forward holds beyond what backward computes again."""
    if not setup.runs_whole:
        return 0.0
    kinds = ("matmul", "attention", "other")
    rest = sum(
        found.layer(f"compute.forward.{k}") - found.layer(f"compute.again.{k}") - found.layer(f"compute.within.{k}")
        for k in kinds
    )
    return max(0.0, rest) + found.layer_total("exposed.activation.forward.")


def _waited_s(setup: Setup, found: Profile) -> float:
    """Gathers and reductions of a micro-batch one after another: parameters come for forward, for backward, and for
    forward once more where layers are run again as a whole."""
    passes = 3 if setup.runs_whole else 2
    reduced_s = found.total("exposed.gradient.") + found.total("hidden.gradient.")
    return passes * found.whole["bytes"] / setup.gather_bytes_per_s + reduced_s


def _hidden_by_parts_s(setup: Setup, found: Profile) -> float:
    """Per layer, what is hidden of its activations' collectives where each goes in `tp` parts around the ring, and all
    but the first run beside a product of the part before."""
    if not setup.tp_overlap or setup.tp == 1:
        return 0.0
    exposed_s = found.layer_total("exposed.activation.")
    return min(exposed_s, found.layer_total("compute.forward.matmul")) * (1 - 1 / setup.tp)


def _waited_by_layer_s(setup: Setup, found: Profile) -> float:
    """Per layer, what a replica hides of its activations' collectives, less what those take from compute."""
    if not setup.tp_waits:
        return 0.0
    return found.layer_total("hidden.activation.") - found.layer("slowed_s")


def _gathered_again_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """Per layer, what gathering its activations once more takes: they come beside the products that give the gradients
    of what was gathered, as many as forward's, and take their share of those."""
    if not setup.gathers_again or setup.tp == 1 or setup.runs_whole:
        return 0.0  # a whole layer that is run again has them back
    mesh = topology(hardware, {"inner": setup.data_ranks * setup.cp, "tp": setup.tp})
    gather_s = collective_s("all_gather", found.layer("gathered"), (1,), mesh)
    hidden_s = min(gather_s, found.layer_total("compute.forward.matmul"))
    return gather_s - hidden_s + taken_shares((1,), mesh)[0] * hidden_s


def _sharded(setup: Setup, profiler: Profiler) -> Estimate:
    """State sharded over the batch axes, gathered for every micro-batch: the schedule itself."""
    found = profiler.profile(setup, replica=False)
    whole = found.whole
    again_s = found.layers * _rest_again_s(setup, found)
    micro_s = whole["micro_s"] + again_s
    casts_s = _casts_s(setup, found, profiler.hardware) if setup.fp8 else 0.0
    update_s = whole["optimizer_s"]
    state_s, slowed_s = found.total("exposed.parameter.") + found.total("exposed.gradient."), whole["slowed_s"]
    mesh = topology(profiler.hardware, {"dp": setup.data_ranks, "tp": setup.tp})
    waited_s = found.total("hidden.activation.") if setup.tp_waits else 0.0
    if waited_s:
        spared_s = min(slowed_s, waited_s * min(taken_shares((1,), mesh)))
        micro_s, slowed_s = micro_s + waited_s - spared_s, slowed_s - spared_s
    late_s = found.total("hidden.parameter.backward.") if setup.gathers_late else 0.0
    if setup.gather_bytes_per_s:
        micro_s -= state_s
        state_s = _waited_s(setup, found)
        micro_s += state_s
        if setup.tp == 1:  # nothing is sent beside compute
            micro_s -= slowed_s
            slowed_s = 0.0
    elif late_s:
        spared_s = min(slowed_s, late_s * min(taken_shares((0,), mesh)))
        micro_s += late_s - spared_s
        state_s, slowed_s = state_s + late_s, slowed_s - spared_s
    seconds = {
        "compute": found.total("compute.forward.") + found.total("compute.backward."),
        "recompute": found.total("compute.again.") + again_s,
        "slowed": slowed_s,
        "casts": casts_s,
        "exposed state": state_s,
        "exposed activations": found.total("exposed.activation.") + waited_s,
    }
    seconds = {name: setup.accumulate * value for name, value in seconds.items()}
    added_s = (setup.accumulate - 1) * whole["added_s"]
    seconds["compute"] += added_s
    seconds["optimizer"] = update_s
    bytes_ = at_rest(found, setup)
    peak = sharded_peak_bytes(found, _layer(setup, profiler, replica=False))
    if setup.offload:
        item = whole["stored bytes"] / whole["stored"]
        seconds["optimizer"] = _host_update_s(setup, whole["gradients"] / item, found, profiler)
        peak -= bytes_.pop("optimizer")
    step = setup.accumulate * (micro_s + casts_s) + added_s + seconds["optimizer"]
    seconds["between"] = max(0.0, step - sum(seconds.values()))
    bytes_["activations and working"] = max(0.0, peak - sum(bytes_.values()))
    hidden_s = 0.0
    if not setup.gather_bytes_per_s:
        hidden_s = setup.accumulate * (found.total("hidden.parameter.") + found.total("hidden.gradient.") - late_s)
    return Estimate(setup, step, peak, seconds, bytes_, hidden_s)


def _layer(setup: Setup, profiler: Profiler, *, replica: bool) -> Profile | None:
    """Where layers are run again as a whole, the profile of the setup without that."""
    if not setup.runs_whole:
        return None
    return profiler.profile(replace(setup, recompute=setup.in_block), replica=replica)


def _replicated(setup: Setup, profiler: Profiler) -> Estimate:
    """Parameters whole on every data-parallel rank (but for tensor parallelism), layers spread over stages."""
    hardware = profiler.hardware
    found = profiler.profile(setup, replica=True)
    outside = found.outside
    layers, stages, micro = max(1, found.layers), setup.pp, setup.accumulate
    ring_s, attention_s = _context(setup, found, hardware)
    layer_s = found.layer("micro_s") + attention_s + ring_s + _rest_again_s(setup, found)
    by_parts_s = _hidden_by_parts_s(setup, found)
    layer_s += _waited_by_layer_s(setup, found) - by_parts_s + _gathered_again_s(setup, found, hardware)
    layer_s -= _spared_by_experts_s(setup, found)
    to_experts = _sent_to_experts(setup, found, hardware, layer_s)
    layer_s += to_experts.waits_s + to_experts.slowed_s
    casts_s = _casts_s(setup, found, hardware) if setup.fp8 else 0.0
    layer_s += casts_s / layers
    outside_s = outside["micro_s"]
    most, last = pipeline.spread(layers, layer_s, outside_s, stages, balanced=setup.balanced)
    slowest_s = max(most * layer_s, last * layer_s + outside_s)
    average_s = (layers * layer_s + outside_s) / stages
    message_s = _message_s(setup, found, hardware)
    passed_s, bubble_s, messages_s = pipeline.step_s(micro, slowest_s, average_s, message_s, stages, setup.virtual)
    sent_s = 2 * (setup.virtual * micro + stages - 1) * message_s
    # the busiest stage's share of the parameters
    share = max(most, last) / layers
    parameters, trained = (parameters_of(setup, found, layers * share, of) for of in ("", "trained "))
    waits_s, behind_s, slowed_s, update_s = _state(setup, parameters, trained, found, slowest_s, profiler)
    if stages > 1:
        waits_s += _tied_s(setup, outside["trained tied"], hardware)
    added_s = _added_s(setup, trained, found, hardware)
    step = passed_s + added_s + waits_s + slowed_s + update_s
    hidden_s = behind_s + max(0.0, sent_s - messages_s)
    hidden_s += micro * layers / stages * (by_parts_s + to_experts.hidden_s)
    layers_s = micro * share * layers
    seconds = {
        "compute": micro * slowest_s - layers_s * (to_experts.waits_s + to_experts.slowed_s) + added_s,
        "bubble": bubble_s,
        "messages": messages_s,
        "experts": layers_s * to_experts.waits_s,
        "slowed": slowed_s + layers_s * to_experts.slowed_s,
        "exposed state": waits_s,
        "optimizer": update_s,
    }
    bytes_ = replicated_bytes(setup, found, _layer(setup, profiler, replica=True), (most, last), parameters, trained)
    return Estimate(setup, step, sum(bytes_.values()), seconds, bytes_, hidden_s)


def _message_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """What one stage sends to the next of a micro-batch. Where every tensor-parallel rank has all of it, each sends its
    part and they gather what arrives (arXiv 2104.04473, section 4.1)."""
    if setup.pp == 1:
        return 0.0
    sizes = {"pp": setup.pp, "inner": setup.data_ranks * setup.cp, "tp": setup.tp}
    mesh, message = topology(hardware, sizes), found.layer("boundary")
    if setup.sequence_parallel or setup.tp == 1:
        return collective_s("send_recv", message, (0,), mesh)
    return collective_s("send_recv", message / setup.tp, (0,), mesh) + collective_s("all_gather", message, (2,), mesh)


def _context(setup: Setup, found: Profile, hardware: Hardware) -> tuple[float, float]:
    """Per layer and micro-batch: exposed ring messages, and attention over the keys of other ranks.

    A profile with context parallelism is of one part of the sequence. Its queries meet `cp` times as many keys, causal
    or not (parts are balanced). Keys and values go around the ring once forward, and twice as much backward.
    """
    if setup.cp == 1:
        return 0.0, 0.0
    forward_s = found.layer("compute.forward.attention")
    attention_s = forward_s + found.layer("compute.backward.attention") + found.layer("compute.again.attention")
    mesh = topology(hardware, {"cp": setup.cp, "tp": setup.tp})
    part = found.layer("keys")
    ring_s = 0.0
    for passes, compute_s in ((1, forward_s), (2, attention_s - forward_s)):
        hop_s = collective_s("send_recv", passes * part, (0,), mesh)
        ring_s += (setup.cp - 1) * max(0.0, hop_s - compute_s)
    return ring_s, (setup.cp - 1) * attention_s


@dataclass(frozen=True)
class _Beside:
    """Per layer and micro-batch, what is sent: what compute waits for, what is hidden behind it, and what that slows it
    down by."""

    waits_s: float = 0.0
    hidden_s: float = 0.0
    slowed_s: float = 0.0


def _sent_to_experts(setup: Setup, found: Profile, hardware: Hardware, compute_s: float) -> _Beside:
    """Rows sent to their experts and back, forward and backward, and once more what is computed again. Compute waits
    for all of it; or it runs beside another micro-batch's, but for the first forward and the last backward, which have
    none beside them.

    Tensor-parallel ranks have the rows of their part of the sequence each.
    """
    if setup.ep == 1:
        return _Beside()
    tokens = found.layer("routed tokens")
    mesh = _experts_mesh(setup, hardware)
    one_way_s = token_exchange_s(tokens / setup.tp, found.layer("routed") / tokens, (2,), mesh)
    again = 2 if setup.runs_whole else 1 if setup.recompute == "full" else 0
    sent_s = (4 + again) * one_way_s
    if not setup.experts_beside:
        return _Beside(waits_s=sent_s)
    hidden_s = (1 - 1 / setup.accumulate) * min(sent_s, compute_s)
    return _Beside(sent_s - hidden_s, hidden_s, taken_shares((2,), mesh)[0] * hidden_s)


def _experts_mesh(setup: Setup, hardware: Hardware) -> Topology:
    """Its last axis has the ranks that share a layer's experts, the one before those that have the same ones."""
    alike = setup.data_ranks * setup.cp * setup.tp // setup.ep
    return topology(hardware, {"pp": setup.pp, "alike": alike, "ep": setup.ep})


def _spared_by_experts_s(setup: Setup, found: Profile) -> float:
    """Per layer and micro-batch: what products take less with fewer experts that have more rows each."""
    if setup.expert_parts == 1:
        return 0.0
    return found.layer("experts.1") - found.layer(f"experts.{setup.expert_parts}")


def _casts_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
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


def _added_s(setup: Setup, trained: Parameters, found: Profile, hardware: Hardware) -> float:
    """Once per step: gradients of all micro-batches but the first, added to the sum of those before."""
    if setup.adds_in_products:
        return 0.0
    item = found.whole["bytes"] / found.whole["elements"]
    return (setup.accumulate - 1) * addition_s(trained.summed(setup), item, setup.gradient_bytes, hardware.device)


def _host_update_s(setup: Setup, elements: float, found: Profile, profiler: Profiler) -> float:
    """An update of so many of a rank's parameters on its host, of the bytes that they and the optimizer's states
    have."""
    item = found.whole["stored bytes"] / found.whole["stored"]
    states = found.whole["states"] / max(1.0, found.whole["gradients"] / item)
    return offload.host_update_s(elements, setup.ranks, profiler.hardware, item_bytes=item, state_bytes=states)


def _state(
    setup: Setup, parameters: Parameters, trained: Parameters, found: Profile, stage_s: float, profiler: Profiler
) -> tuple[float, float, float, float]:
    """Exposed and hidden seconds of gradient reduction and of parameters' gathers, what the hidden take from compute,
    and the update. Once per step, but that zero3 which frees parameters gathers them for each half of each micro-batch,
    and that ranks which keep shares of gradients reduce those of each.

    `parameters`: of a stage, of which `trained` have gradients.
    """
    hardware, updated = profiler.hardware, trained.updated(setup)
    update_s = found.whole["optimizer_s"] * updated / max(1.0, found.whole["trained elements"])
    if setup.offload:
        update_s = _host_update_s(setup, updated, found, profiler)
    if setup.data_ranks * setup.cp == 1:
        return 0.0, 0.0, 0.0, update_s
    mesh = topology(hardware, {"pp": setup.pp, "dp": setup.data_ranks, "cp": setup.cp, "tp": setup.tp})
    axes = (1, 2)
    reduce_s, gather_s = _exchanged_s(setup, parameters, trained, found, axes, mesh)
    each_time = setup.state == "zero3" and setup.reshard
    gathers, reductions = (setup.accumulate if each else 1 for each in (each_time, setup.reduces_each))
    again_s = gather_s if each_time else 0.0
    if not setup.overlap:
        return reductions * (reduce_s + again_s) + gathers * gather_s, 0.0, 0.0, update_s
    backward_s, forward_s = stage_s * 2 / 3, stage_s / 3
    gathered = "" if setup.state == "zero3" else "trained "
    waits_s = reductions * _waits_s(reduce_s + again_s, backward_s, _alone(setup, found, "trained "))
    waits_s += gathers * _waits_s(gather_s, forward_s, _alone(setup, found, gathered))
    sms, _ = taken_shares(axes, mesh)
    behind_s = reductions * (reduce_s + again_s) + gathers * gather_s - waits_s
    return waits_s, behind_s, sms * behind_s, update_s


def _tied_s(setup: Setup, tied: float, hardware: Hardware) -> float:
    """Once per step: gradients of so many parameters that the first stage and the last both have, added up between
    the two when all else is through, as in Megatron-LM (arXiv 1909.08053 ties them, its `finalize_model_grads`)."""
    if not tied:
        return 0.0
    ends = topology(hardware, {"ends": 2, "inner": setup.ranks // 2})
    return collective_s("all_reduce", tied * setup.gradient_bytes, (0,), ends)


def _alone(setup: Setup, found: Profile, of: str) -> float:
    """The share of what is sent that comes first in forward and last in backward, an embedding's or a layer's: it has
    nothing to hide behind."""
    outside = found.outside.get(f"{of}elements", 0.0) / 2 / max(1.0, found.whole.get(f"{of}elements", 0.0))
    return max(min(1.0, setup.pp / max(1.0, found.layers)), outside)


def _waits_s(sent_s: float, compute_s: float, alone: float) -> float:
    """What compute waits for of what is sent beside it, a share of which is `alone`."""
    return max(sent_s - compute_s, sent_s * alone)


def _exchanged_s(
    setup: Setup, parameters: Parameters, trained: Parameters, found: Profile, axes: tuple[int, ...], mesh: Topology
) -> tuple[float, float]:
    """Seconds to reduce the gradients of a stage over the axes, and to gather what was updated, under zero3 all. Of
    routed experts that ranks share fewer have the same."""
    item = found.whole["bytes"] / found.whole["elements"]
    sent = parameters if setup.state == "zero3" else trained
    if trained.parts == 1:
        return _reduced_s(setup, trained.elements, axes, mesh), _gathered_s(setup, item * sent.elements, axes, mesh)
    alike = _experts_mesh(setup, mesh.given)
    reduce_s = _reduced_s(setup, trained.elements - trained.experts, axes, mesh)
    gather_s = _gathered_s(setup, item * (sent.elements - sent.experts), axes, mesh)
    reduce_s += _reduced_s(setup, trained.experts / trained.parts, (1,), alike)
    return reduce_s, gather_s + _gathered_s(setup, item * sent.experts / trained.parts, (1,), alike)


def _reduced_s(setup: Setup, elements: float, axes: tuple[int, ...], mesh: Topology) -> float:
    """Gradients of so many parameters, whole or in shares."""
    if not elements:
        return 0.0
    kind = "all_reduce" if setup.state == "zero0" else "reduce_scatter"
    return collective_s(kind, elements * setup.gradient_bytes, axes, mesh)


def _gathered_s(setup: Setup, size: float, axes: tuple[int, ...], mesh: Topology) -> float:
    """So many bytes of parameters, of which ranks have shares."""
    return collective_s("all_gather", size, axes, mesh) if size and setup.state != "zero0" else 0.0
