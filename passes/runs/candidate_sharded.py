"""The price of what plans do: state sharded over the batch axes, as the schedule has it."""

from __future__ import annotations

from costmodel.collectives import taken_shares
from costmodel.hardware import topology
from passes.runs.candidate_layers import operand_casts_s, rest_again_s, without_whole_blocks
from passes.runs.candidate_memory import at_rest, sharded_peak_bytes
from passes.runs.candidate_state import host_update_s
from passes.runs.depth import Profile
from passes.runs.estimate import Estimate, Profiler
from passes.runs.setup import Setup


def sharded(setup: Setup, profiler: Profiler) -> Estimate:
    """State sharded over the batch axes, gathered for every micro-batch: the schedule itself."""
    found = profiler.profile(setup, replica=False)
    whole = found.whole
    again_s = found.layers * rest_again_s(setup, found)
    micro_s = whole["micro_s"] + again_s
    casts_s = operand_casts_s(setup, found, profiler.hardware) if setup.fp8 else 0.0
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
    peak = sharded_peak_bytes(setup, found, without_whole_blocks(setup, profiler, replica=False))
    if setup.offload:
        item = whole["stored bytes"] / whole["stored"]
        seconds["optimizer"] = host_update_s(setup, whole["gradients"] / item, found, profiler)
        peak -= bytes_.pop("optimizer")
    step = setup.accumulate * (micro_s + casts_s) + added_s + seconds["optimizer"]
    seconds["between"] = max(0.0, step - sum(seconds.values()))
    bytes_["activations and working"] = max(0.0, peak - sum(bytes_.values()))
    hidden_s = 0.0
    if not setup.gather_bytes_per_s:
        hidden_s = setup.accumulate * (found.total("hidden.parameter.") + found.total("hidden.gradient.") - late_s)
    return Estimate(setup, step, peak, seconds, bytes_, hidden_s)


def _waited_s(setup: Setup, found: Profile) -> float:
    """Gathers and reductions of a micro-batch one after another: parameters come for forward, for backward, and for
    forward once more where layers are run again as a whole."""
    passes = 3 if setup.runs_whole else 2
    reduced_s = found.total("exposed.gradient.") + found.total("hidden.gradient.")
    return passes * found.whole["bytes"] / setup.gather_bytes_per_s + reduced_s
