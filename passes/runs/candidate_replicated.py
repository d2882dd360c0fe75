"""The price of what no plan does yet, by formulas on top of a played replica: pipeline stages, context and expert
parallelism, ZeRO-1/2.

    replica      one data-parallel rank's stages: layers as scheduled, spread over the pipeline
    state        gradients reduced behind the last backward, parameters gathered behind the first forward
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel import pipeline
from costmodel.collectives import collective_s, taken_shares
from costmodel.hardware import Hardware, topology
from costmodel.token_exchange import token_exchange_s
from passes.runs.candidate_layers import (
    activations_s,
    has_whole_experts,
    operand_casts_s,
    rest_again_s,
    without_whole_blocks,
)
from passes.runs.candidate_memory import parameters_of, replicated_bytes
from passes.runs.candidate_state import Sent, added_gradients_s, experts_mesh, sent_state, tied_gradients_s, update_s
from passes.runs.depth import Profile
from passes.runs.dispatchers import copied_s
from passes.runs.estimate import Estimate, Profiler
from passes.runs.setup import Setup


def replicated(setup: Setup, profiler: Profiler) -> Estimate:
    """Parameters whole on every data-parallel rank (but for tensor parallelism), layers spread over stages."""
    hardware, found = profiler.hardware, profiler.profile(setup, replica=True)
    layers, stages, micro = max(1, found.layers), setup.pp, setup.accumulate
    layer, outside_s = _layer(setup, found, profiler), found.outside["micro_s"]
    most, last = pipeline.spread(
        layers, layer.seconds, outside_s, stages, balanced=setup.balanced, ends=setup.ends_count
    )  # fmt: skip
    slowest_s = max(most * layer.seconds, last * layer.seconds + outside_s)
    average_s = (layers * layer.alone_s + outside_s) / stages
    message_s = _message_s(setup, found, hardware)
    passed_s, bubble_s, messages_s = pipeline.step_s(micro, slowest_s, average_s, message_s, stages, setup.virtual)
    sent_s = 2 * (setup.virtual * micro + stages - 1) * message_s
    busiest = max(most, last)
    parameters, trained = (parameters_of(setup, found, busiest, of) for of in ("", "trained "))
    state = sent_state(setup, parameters, trained, found, slowest_s, hardware)
    waits_s = state.waits_s
    if stages > 1:
        waits_s += tied_gradients_s(setup, found.outside["trained tied"], hardware)
    added_s, updated_s = added_gradients_s(setup, trained, found, hardware), update_s(setup, trained, found, profiler)
    passes = micro * busiest
    seconds = {
        "compute": micro * slowest_s - passes * (layer.to_experts.waits_s + layer.to_experts.slowed_s) + added_s,
        "bubble": bubble_s,
        "messages": messages_s,
        "experts": passes * layer.to_experts.waits_s,
        "slowed": state.slowed_s + passes * layer.to_experts.slowed_s,
        "exposed state": waits_s,
        "optimizer": updated_s,
    }
    step = passed_s + added_s + waits_s + state.slowed_s + updated_s
    hidden_s = state.hidden_s + max(0.0, sent_s - messages_s)
    hidden_s += micro * layers / stages * (layer.by_parts_s + layer.to_experts.hidden_s)
    alone = without_whole_blocks(setup, profiler, replica=True)
    bytes_ = replicated_bytes(setup, found, alone, (most, last), parameters, trained)
    return Estimate(setup, step, sum(bytes_.values()), seconds, bytes_, hidden_s)


@dataclass(frozen=True)
class _Layer:
    """Seconds of a layer in a micro-batch, forward and backward; `alone_s`: with no other micro-batch beside it; what
    is hidden of its activations' collectives by parts, and what is sent to its experts."""

    seconds: float
    alone_s: float
    by_parts_s: float
    to_experts: Sent


def _layer(setup: Setup, found: Profile, profiler: Profiler) -> _Layer:
    hardware = profiler.hardware
    ring_s, attention_s = _context(setup, found, hardware)
    seconds = found.layer("micro_s") + attention_s + ring_s + rest_again_s(setup, found)
    by_parts_s = _hidden_by_parts_s(setup, found)
    seconds += _waited_by_layer_s(setup, found, hardware) - by_parts_s + _gathered_again_s(setup, found, hardware)
    seconds -= _spared_by_experts_s(setup, found) + _among_experts_s(setup, found, hardware)
    seconds += _copied_for_experts_s(setup, found, profiler)
    to_experts = _sent_to_experts(setup, found, hardware, seconds)
    seconds += to_experts.waits_s + to_experts.slowed_s
    if setup.fp8:
        seconds += operand_casts_s(setup, found, hardware) / max(1, found.layers)
    return _Layer(seconds, seconds + to_experts.hidden_s - to_experts.slowed_s, by_parts_s, to_experts)


def _hidden_by_parts_s(setup: Setup, found: Profile) -> float:
    """Per layer, what is hidden of its activations' collectives where each goes in `tp` parts around the ring, and all
    but the first run beside a product of the part before."""
    if not setup.tp_overlap or setup.tp == 1:
        return 0.0
    exposed_s = activations_s(setup, found, "exposed")
    return min(exposed_s, found.layer_total("compute.forward.matmul")) * (1 - 1 / setup.tp)


def _waited_by_layer_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """Per layer, what a replica hides of its activations' collectives, less what those take from compute."""
    if not setup.tp_waits:
        return 0.0
    slowed_s = found.layer("slowed_s") - _slowed_by_experts_s(setup, found, hardware)
    return activations_s(setup, found, "hidden") - slowed_s


def _gathered_again_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """Per layer, what gathering its activations once more takes: they come beside the products that give the gradients
    of what was gathered, as many as forward's, and take their share of those."""
    if not setup.gathers_again or setup.tp == 1 or setup.runs_whole:
        return 0.0  # a whole layer that is run again has them back
    mesh = topology(hardware, {"inner": setup.data_ranks * setup.cp, "tp": setup.tp})
    gathered = found.layer("gathered") - has_whole_experts(setup) * found.layer("among experts.gathered")
    gather_s = collective_s("all_gather", gathered, (1,), mesh)
    hidden_s = min(gather_s, found.layer_total("compute.forward.matmul"))
    return gather_s - hidden_s + taken_shares((1,), mesh)[0] * hidden_s


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
    or not (parts are balanced); of a window that is shorter than a part as many. Keys and values go around the ring
    once forward, and twice as much backward.
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
    return ring_s, (setup.cp - 1) * (attention_s - found.layer_total("windowed."))


def _sent_to_experts(setup: Setup, found: Profile, hardware: Hardware, compute_s: float) -> Sent:
    """Rows sent to their experts and back, forward and backward, and once more what is computed again. Compute waits
    for all of it; or it runs beside another micro-batch's, but for the first forwards and the last backwards (of one
    stage, one each), which have none beside them.

    Tensor-parallel ranks have the rows of their part of the sequence each.
    """
    if setup.ep == 1:
        return Sent()
    tokens = found.layer("routed tokens")
    mesh = experts_mesh(setup, hardware)
    each = setup.dispatcher == "alltoall"
    one_way_s = token_exchange_s(tokens / setup.tp, found.layer("routed") / tokens, (2,), mesh, each=each)
    sent_s = _ways(setup) * one_way_s
    if not setup.experts_beside:
        return Sent(waits_s=sent_s)
    paired = 1 - pipeline.alone_share(setup.pp, setup.accumulate, setup.virtual)
    hidden_s = paired * min(sent_s, compute_s)
    return Sent(sent_s - hidden_s, hidden_s, taken_shares((2,), mesh)[0] * hidden_s)


def _ways(setup: Setup) -> int:
    """How often a layer sends rows to experts or has them back: forward, backward, and what is computed again."""
    return 4 + (2 if setup.runs_whole else 1 if setup.recompute == "full" else 0)


def _copied_for_experts_s(setup: Setup, found: Profile, profiler: Profiler) -> float:
    """Per layer and micro-batch: what a rank copies of rows that are sent and arrive."""
    if setup.ep == 1:
        return 0.0
    tokens = found.layer("routed tokens")
    mesh = experts_mesh(setup, profiler.hardware)
    experts = found.layer("routed") / tokens
    once_s = copied_s(setup, tokens / setup.tp, experts, max(1, profiler.experts // setup.ep), mesh)
    return _ways(setup) * once_s


def _spared_by_experts_s(setup: Setup, found: Profile) -> float:
    """Per layer and micro-batch: what products take less with fewer experts that have more rows each."""
    if setup.expert_parts == 1:
        return 0.0
    return found.layer("experts.1") - found.layer(f"experts.{setup.expert_parts}")


def _among_experts_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """Per layer and micro-batch: what the replica's tensor-parallel ranks, which cut experts, send among each other,
    and those that have experts whole do not."""
    if not has_whole_experts(setup):
        return 0.0
    return found.layer_total("among experts.exposed.") + _slowed_by_experts_s(setup, found, hardware)


def _slowed_by_experts_s(setup: Setup, found: Profile, hardware: Hardware) -> float:
    """What the hidden part of that takes from compute."""
    if not has_whole_experts(setup):
        return 0.0
    mesh = topology(hardware, {"inner": setup.data_ranks * setup.cp, "tp": setup.tp})
    return taken_shares((1,), mesh)[0] * found.layer_total("among experts.hidden.")
