"""Bytes of the busiest rank of a setup: the played peak, or what formulas make of a played replica.

    at rest       parameters, gradients and optimizer states, whole or a share of the data ranks'
    activations   what layers keep for backward: of each layer of the stage, of each micro-batch in flight
    working       on top of that, the more of two moments: the loss, or a layer's backward, with the layer's gradients
                  where those are not made in what keeps them

A layer that is run again as a whole keeps its input alone (2sbh bytes in bf16, arXiv 2205.05198 Table 2), and one
whose gathered activations are gathered again (`Setup.gathers_again`) a rank's part of them; but for the one that
backward is in, which has all its activations back. Where forward of one micro-batch runs beside backward of another
(`Setup.experts_beside`), layer by layer, one layer more is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.pipeline import in_flight
from passes.runs.depth import PLACES, Profile
from passes.runs.setup import Setup


@dataclass(frozen=True)
class Parameters:
    """Elements of a stage's parameters, and of them those in routed experts, of which a rank has 1 / `parts`."""

    elements: float
    experts: float
    parts: int

    @property
    def held(self) -> float:
        """Elements that a rank holds."""
        return self.elements - self.experts * (1 - 1 / self.parts)

    def updated(self, setup: Setup) -> float:
        """Elements that a rank's optimizer updates, if all of these are trained. Experts make no difference: a rank has
        fewer of their elements, and shares them with as many ranks fewer."""
        return self.held if setup.state == "zero0" else self.elements / (setup.data_ranks * setup.cp)

    def summed(self, setup: Setup) -> float:
        """Elements of which a rank keeps the sum of gradients, if all of these are trained."""
        return self.elements / (setup.data_ranks * setup.cp) if setup.reduces_each else self.held


def parameters_of(setup: Setup, found: Profile, layers: float, of: str = "") -> Parameters:
    """Parameters of an end stage with `layers` layers; `of`: "" for all, "trained " for those with gradients."""
    elements = found.layer(f"{of}elements") * layers + outside_elements(setup, found, of)
    return Parameters(elements, found.layer(f"{of}experts") * layers, setup.expert_parts)


def sharded_peak_bytes(setup: Setup, found: Profile, layer: Profile | None) -> float:
    """The peak of a played schedule, which updates on the rank unless the host does; `layer`: where layers are run
    again as a whole, the schedule without that."""
    alive = {place: (layer or found).whole.get(f"alive.{place}", 0.0) for place in PLACES}
    if setup.offload:
        del alive["update"]
    if layer is not None:
        spared = layer.saved_bytes - layer.layer("boundary")
        # layers that have their input and nothing else when most is alive there
        for place, inputs_alone in (("forward", layer.layers), ("last layers", layer.layers - 1), ("first layers", 1)):
            alive[place] -= inputs_alone * spared
    return max(alive.values())


def at_rest(found: Profile, setup: Setup) -> dict[str, float]:
    """What a rank with sharded state holds all step long."""
    held = {"parameters": found.whole["stored bytes"], "optimizer": found.whole["states"]}
    if setup.accumulate > 1:
        held["gradients"] = found.whole["gradients"]
    return held


def replicated_bytes(
    setup: Setup,
    found: Profile,
    layer: Profile | None,
    layers: tuple[int, int],
    parameters: Parameters,
    trained: Parameters,
) -> dict[str, float]:
    """Of the busiest stage with `parameters`, of which `trained` have gradients; from a replica's schedule. `layer`: as
    above; `layers`: of the first stage and of the last."""
    states = found.whole["states"] / max(1.0, found.whole["trained elements"])
    kept, working = _activations(setup, layer or found, layers, whole_blocks=layer is not None)
    return {
        "parameters": _parameters(setup, found, parameters),
        "gradients": trained.summed(setup) * setup.gradient_bytes,
        "optimizer": 0.0 if setup.offload else trained.updated(setup) * states,
        "activations": kept,
        "working": working,
    }


def _parameters(setup: Setup, found: Profile, stage: Parameters) -> float:
    """What a rank holds, in the dtype of compute, with a share of all in that of storage where it is another; under
    zero3 the share, and gathered what the stage has of no layer and two layers, or all where nothing is freed."""
    whole = found.whole
    item, stored_item = whole["bytes"] / whole["elements"], whole["stored bytes"] / whole["stored"]
    share = stage.elements * stored_item / (setup.data_ranks * setup.cp)
    if setup.state == "zero3":
        layer = found.layer("elements") - found.layer("experts") * (1 - 1 / stage.parts)
        at_once = outside_elements(setup, found) + 2 * layer
        return share + item * (min(stage.held, at_once) if setup.reshard else stage.held)
    return stage.held * item + (share if stored_item != item else 0.0)


def outside_elements(setup: Setup, found: Profile, of: str = "") -> float:
    """Parameters of no layer on one of the end stages: an embedding or a head, what is both on either."""
    outside, ends = found.outside, min(setup.pp, 2)
    elements, tied = (outside.get(f"{of}{name}", 0.0) for name in ("elements", "tied"))
    return (elements + (tied if ends > 1 else 0.0)) / ends


def _activations(setup: Setup, found: Profile, layers: tuple[int, int], *, whole_blocks: bool) -> tuple[float, float]:
    """What layers keep for backward, and what is on top, of the first or the last stage: the one with more."""
    saved, rest, stages = found.saved_bytes, found.whole["rest"], setup.pp
    spared = found.layer("spared") if setup.gathers_again else 0.0
    kept_bytes = found.layer("boundary") if whole_blocks else saved - spared
    backward = max(0.0, found.whole["bare.last layers"] - rest - found.layers * saved) + saved - kept_bytes
    head = found.outside["bare.forward"] - found.outside["rest"]
    if not _made_in_place(setup, found):
        backward += _fresh_bytes(setup, found)
        head = found.outside["alive.forward"] - found.outside["rest"]

    def of(stage: int) -> tuple[float, float]:
        kept = layers[stage > 0] * in_flight(stages, setup.accumulate, setup.virtual, stage)
        kept += setup.experts_beside  # the layer whose forward runs beside another's backward
        return kept_bytes * kept, max(backward, head) if stage == stages - 1 else backward

    return max(of(0), of(stages - 1), key=sum)


def _made_in_place(setup: Setup, found: Profile) -> bool:
    """Whether a gradient is what a rank keeps of it as it is made: the only one of a step, or added to those before
    within the product."""
    item = found.whole["bytes"] / found.whole["elements"]
    once = setup.accumulate == 1 and setup.gradient_bytes == item
    return not setup.reduces_each and (setup.adds_in_products or once)


def _fresh_bytes(setup: Setup, found: Profile) -> float:
    """One layer's gradients before they are added to those of other micro-batches, or reduced."""
    item = found.whole["bytes"] / found.whole["elements"]
    elsewhere = found.layer("trained experts") * (1 - 1 / setup.expert_parts)
    return item * (found.layer("trained elements") - elsewhere)
