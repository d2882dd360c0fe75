"""What a pipeline of layers costs: bubble, uneven stages, messages between stages, activations in flight.

`p` stages of `v` chunks of layers each (1: plain 1F1B; more: interleaved), `m` micro-batches.

    step = m * slowest stage + bubble + messages
    bubble = (p - 1) / v * one micro-batch of an average stage         arXiv 2104.04473, section 2.2
             m < p: (m - 1) / v + p - m of these, as a chunk waits until all stages had the one before
    in flight on the first stage: min(m, p) micro-batches, and a share (p - 1) / (p v) more where interleaved
                                                                       arXiv 2205.05198, Eq 5
"""

from __future__ import annotations

from math import ceil


def bubble_share(stages: int, micro_batches: int, virtual: int = 1) -> float:
    """Idle time over ideal compute time.

    Raises:
        ValueError: a count that is not positive.
    """
    if min(stages, micro_batches, virtual) < 1:
        raise ValueError(f"a pipeline of {stages} stages, {virtual} chunks and {micro_batches} micro-batches cannot be")
    together = min(stages, micro_batches)
    return ((together - 1) / virtual + stages - together) / micro_batches


def in_flight(stages: int, micro_batches: int, virtual: int = 1, stage: int = 0) -> float:
    """Micro-batches whose activations a stage holds at once, the first where not said.

    Plain 1F1B runs as many forward as there are stages from here to the end before its first backward; interleaved, in
    chunks: 2 per stage behind it, all stages once for each chunk but its last, and one.
    """
    if virtual == 1 or stages == 1:
        return float(min(stages - stage, micro_batches))
    chunks = 2 * (stages - 1 - stage) + (virtual - 1) * stages + 1
    return min(float(micro_batches), chunks / virtual)


def alone_share(stages: int, micro_batches: int, virtual: int = 1) -> float:
    """Of the chunks that the last stage runs, the share whose forward and backward have no other beside them, where a
    forward of one micro-batch and a backward of another run in pairs: as many as run forward before the first backward.

    Stages before it run more alone, while they would wait for it.
    """
    return min(1.0, ((virtual - 1) * stages + 1) / (virtual * micro_batches))


def spread(
    layers: int, layer_s: float, outside_s: float, stages: int, *, balanced: bool = False, ends: bool = False
) -> tuple[int, int]:
    """Layers of the stages but the last, the most that one of them has, and of the last.

    `outside_s` is what comes before and after the layers; nearly all of it is the head, so it lies on the last stage.
    Layers are spread evenly where the stages divide them, as frameworks do unless told otherwise; else, and where they
    are to be `balanced`, the last stage gets fewer, as far as that helps. `ends`: the embedding and the head count as a
    layer each, so that the first stage and the last have one less than those between.
    """
    if stages == 1:
        return layers, layers
    if ends and (layers + 2) % stages == 0:
        most = (layers + 2) // stages
        return (most if stages > 2 else most - 1), most - 1
    if layers % stages == 0 and not balanced:
        return layers // stages, layers // stages
    ways = ((ceil((layers - last) / (stages - 1)), last) for last in range(ceil(layers / stages), -1, -1))
    return min(ways, key=lambda way: max(way[0] * layer_s, way[1] * layer_s + outside_s))


def step_s(
    micro_batches: int,
    slowest_s: float,
    average_s: float,
    message_s: float,
    stages: int,
    virtual: int = 1,
) -> tuple[float, float, float]:
    """Seconds of all micro-batches through the pipeline, and of that the bubble and the exposed messages.

    `message_s`: one boundary, one way. Plain 1F1B waits for its neighbour's message once forward and once backward per
    micro-batch; an interleaved schedule sends while the next chunk computes, and waits only where the message takes
    longer than the chunk. Filling and draining pass `stages - 1` boundaries each.
    """
    bubble_s = bubble_share(stages, micro_batches, virtual) * micro_batches * average_s
    if stages == 1:
        return micro_batches * slowest_s, 0.0, 0.0
    exposed_s = message_s if virtual == 1 else max(0.0, message_s - slowest_s / (3 * virtual))
    messages_s = 2 * virtual * micro_batches * exposed_s + 2 * (stages - 1) * message_s
    return micro_batches * slowest_s + bubble_s + messages_s, bubble_s, messages_s
