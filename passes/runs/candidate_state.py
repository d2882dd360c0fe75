"""What gradients, parameters and the update take where parameters are whole on every rank that has their layers."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel import offload
from costmodel.collectives import collective_s, taken_shares
from costmodel.compute import addition_s
from costmodel.hardware import Hardware, Topology, topology
from passes.runs.candidate_memory import Parameters
from passes.runs.depth import Profile
from passes.runs.estimate import Profiler
from passes.runs.setup import Setup


@dataclass(frozen=True)
class Sent:
    """Communication of state in seconds: what compute waits for, what runs hidden behind compute, and how much that
    slows compute down."""

    waits_s: float = 0.0
    hidden_s: float = 0.0
    slowed_s: float = 0.0


def update_s(setup: Setup, trained: Parameters, found: Profile, profiler: Profiler) -> float:
    """Seconds of the optimizer's update of a rank's share of a stage's trained parameters."""
    updated = trained.updated(setup)
    if setup.offload:
        return host_update_s(setup, updated, found, profiler)
    return found.whole["optimizer_s"] * updated / max(1.0, found.whole["trained elements"])


def sent_state(
    setup: Setup, parameters: Parameters, trained: Parameters, found: Profile, stage_s: float, hardware: Hardware
) -> Sent:
    """Reduction of gradients and gathers of parameters, beside a stage that computes for `stage_s` per micro-batch.

    Both happen once per step, with two exceptions: zero3 that frees parameters gathers them in each half of each
    micro-batch, and ranks that keep only their share of gradients reduce them in each micro-batch.

    `parameters`: those of the stage, of which `trained` have gradients.
    """
    if setup.data_ranks * setup.cp == 1:
        return Sent()
    mesh = topology(hardware, {"pp": setup.pp, "dp": setup.data_ranks, "cp": setup.cp, "tp": setup.tp})
    axes = (1, 2)
    reduce_s, gather_s = _exchanged_s(setup, parameters, trained, found, axes, mesh)
    each_time = setup.state == "zero3" and setup.reshard
    gathers, reductions = (setup.accumulate if each else 1 for each in (each_time, setup.reduces_each))
    again_s = gather_s if each_time else 0.0
    if not setup.overlap:
        return Sent(reductions * (reduce_s + again_s) + gathers * gather_s)
    backward_s, forward_s = stage_s * 2 / 3, stage_s / 3
    gathered = "" if setup.state == "zero3" else "trained "
    waits_s = reductions * _waits_s(reduce_s + again_s, backward_s, _alone(setup, found, "trained "))
    behind = 1.0 if setup.gathers_waited else _alone(setup, found, gathered)
    waits_s += gathers * _waits_s(gather_s, forward_s, behind)
    sms, _ = taken_shares(axes, mesh)
    behind_s = reductions * (reduce_s + again_s) + gathers * gather_s - waits_s
    return Sent(waits_s, behind_s, sms * behind_s)


def tied_gradients_s(setup: Setup, tied: float, hardware: Hardware) -> float:
    """Seconds per step of adding up `tied` gradient elements that the first and the last stage share. It happens
    between these two, after everything else, as in Megatron-LM (arXiv 1909.08053 ties them, its
    `finalize_model_grads`)."""
    if not tied:
        return 0.0
    ends = topology(hardware, {"ends": 2, "inner": setup.ranks // 2})
    return collective_s("all_reduce", tied * setup.gradient_bytes, (0,), ends)


def _alone(setup: Setup, found: Profile, of: str) -> float:
    """The share of what is sent that comes first in forward and last in backward, an embedding's or a layer's: it has
    nothing to hide behind."""
    elsewhere = found.whole.get(f"{of}experts", 0.0) * (1 - 1 / setup.expert_parts)
    sent = found.whole.get(f"{of}elements", 0.0) - elsewhere
    outside = found.outside.get(f"{of}elements", 0.0) / 2 / max(1.0, sent)
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
    alike = experts_mesh(setup, mesh.given)
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


def experts_mesh(setup: Setup, hardware: Hardware) -> Topology:
    """The mesh of routed experts: the last axis splits the experts of a layer, the one before it replicates them."""
    alike = setup.data_ranks * setup.cp * setup.tp // setup.ep
    return topology(hardware, {"pp": setup.pp, "alike": alike, "ep": setup.ep})


def added_gradients_s(setup: Setup, trained: Parameters, found: Profile, hardware: Hardware) -> float:
    """Seconds per step of adding each further micro-batch's gradients to the sum of those before."""
    if setup.adds_in_products:
        return 0.0
    item = found.whole["bytes"] / found.whole["elements"]
    return (setup.accumulate - 1) * addition_s(trained.summed(setup), item, setup.gradient_bytes, hardware.device)


def host_update_s(setup: Setup, elements: float, found: Profile, profiler: Profiler) -> float:
    """Seconds of an update of `elements` of a rank's parameters on its host, by the bytes of these and of the
    optimizer's states."""
    item = found.whole["stored bytes"] / found.whole["stored"]
    states = found.whole["states"] / max(1.0, found.whole["gradients"] / item)
    return offload.host_update_s(elements, setup.ranks, profiler.hardware, item_bytes=item, state_bytes=states)
