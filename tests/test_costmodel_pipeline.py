"""Pipelines and offload: arithmetic by hand, and a 1F1B pipeline played event by event."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from costmodel.offload import host_update_s
from costmodel.pipeline import alone_share, bubble_share, in_flight, spread, step_s
from costmodel.presets import hardware


def played_1f1b(stages: int, micro_batches: int, forward_s: float, backward_s: float) -> float:
    """When the last stage-0 backward ends: each stage warms up, then alternates one forward and one backward."""
    orders = []
    for stage in range(stages):
        warm = min(stages - stage - 1, micro_batches)
        order = [("f", i) for i in range(warm)]
        for i in range(micro_batches - warm):
            order += [("f", warm + i), ("b", i)]
        orders.append(order + [("b", i) for i in range(micro_batches - warm, micro_batches)])
    ends: dict[tuple[str, int, int], float] = {}
    clocks, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            if at[s] == len(orders[s]):
                continue
            kind, i = orders[s][at[s]]
            before = ("f", i, s - 1) if kind == "f" else ("b", i, s + 1)
            needed = 0 <= before[2] < stages
            if needed and before not in ends:
                continue
            start = max(clocks[s], ends.get(before, 0.0))
            clocks[s] = ends[kind, i, s] = start + (forward_s if kind == "f" else backward_s)
            at[s] += 1
    return max(clocks)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (4, 4), (4, 9), (8, 32)])
def test_a_step_takes_what_a_played_pipeline_takes(stages: int, micro_batches: int) -> None:
    total, bubble_s, messages_s = step_s(micro_batches, 3.0, 3.0, 0.0, stages)
    assert total == pytest.approx(played_1f1b(stages, micro_batches, 1.0, 2.0))
    assert bubble_s == pytest.approx(bubble_share(stages, micro_batches) * micro_batches * 3.0)
    assert messages_s == 0.0


def played_in_pairs(
    stages: int, virtual: int, micro_batches: int, alone_s: tuple[float, float], pair_s: float
) -> float:
    """Interleaved stages that run one chunk more forward than they must before their first backward, so that each then
    runs a forward and a backward of other micro-batches as a pair, in `pair_s` (Megatron-LM's combined 1F1B)."""
    chunks = []
    for first in range(0, micro_batches, stages):
        group = range(first, min(first + stages, micro_batches))
        chunks += [(chunk, i) for chunk in range(virtual) for i in group]
    ends: dict[tuple[str, int, int], float] = {}
    clocks, at = [0.0] * stages, [0] * stages
    warm = [min(len(chunks), 2 * (stages - 1 - s) + (virtual - 1) * stages + 1) for s in range(stages)]
    while any(at[s] < warm[s] + len(chunks) for s in range(stages)):
        for s in range(stages):
            forward = chunks[at[s]] if at[s] < len(chunks) else None
            backward = chunks[at[s] - warm[s]] if warm[s] <= at[s] < warm[s] + len(chunks) else None
            needed, made = [], []
            if forward is not None:
                place = forward[0] * stages + s
                needed += [("f", place - 1, forward[1])] if place else []
                made.append(("f", place, forward[1]))
            if backward is not None:
                place, last = (virtual - 1 - backward[0]) * stages + s, virtual * stages - 1
                needed.append(("b", place + 1, backward[1]) if place < last else ("f", place, backward[1]))
                made.append(("b", place, backward[1]))
            if made and all(each in ends for each in needed):
                spent_s = pair_s if len(made) == 2 else alone_s[0 if forward is not None else 1]
                clocks[s] = max([clocks[s], *(ends[each] for each in needed)]) + spent_s
                ends.update(dict.fromkeys(made, clocks[s]))
                at[s] += 1
    return max(clocks)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "virtual"), [(1, 4, 1), (2, 8, 2), (4, 8, 3), (4, 8, 12), (8, 32, 4), (8, 8, 4)]
)
def test_forward_and_backward_in_pairs_as_played(stages: int, micro_batches: int, virtual: int) -> None:
    """A chunk takes 1 s forward and 2 s backward, and sends for half as long, which a pair hides."""
    average_s = virtual * 4.5
    paired_s = virtual * (4.5 - 1.5 * (1 - alone_share(stages, micro_batches, virtual)))
    bubble_s = bubble_share(stages, micro_batches, virtual) * micro_batches * average_s
    played_s = played_in_pairs(stages, virtual, micro_batches, (1.5, 3.0), 3.0)
    assert micro_batches * paired_s + bubble_s == pytest.approx(played_s)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "virtual"), [(2, 1, 4), (4, 1, 1), (4, 3, 2), (4, 4, 2), (4, 8, 3)]
)
def test_a_forward_of_chunks_played(stages: int, micro_batches: int, virtual: int) -> None:
    """Chunk c of the layers lies on stage c % p; groups of p micro-batches go through all chunks, chunk after chunk."""
    clocks = [0.0] * stages
    ends: dict[tuple[int, int], float] = {}
    for first in range(0, micro_batches, stages):
        group = range(first, min(first + stages, micro_batches))
        for chunk, i in product(range(stages * virtual), group):
            stage = chunk % stages
            start = max(clocks[stage], ends.get((chunk - 1, i), 0.0))
            clocks[stage] = ends[chunk, i] = start + 1.0 / virtual
    assert max(clocks) == pytest.approx(step_s(micro_batches, 1.0, 1.0, 0.0, stages, virtual)[0])


def test_interleaving_divides_the_bubble() -> None:
    """arXiv 2104.04473 section 2.2: (p - 1) / (v m)."""
    assert bubble_share(8, 32, 4) == pytest.approx(7 / 128)
    assert step_s(32, 4.0, 4.0, 0.0, 8, 4)[0] == pytest.approx(32 * 4.0 + 7 / 4 * 4.0)


def test_messages_wait_unless_interleaved() -> None:
    """4 stages, 8 micro-batches, 0.1 s a message: two waits a micro-batch, six to fill and drain."""
    assert step_s(8, 3.0, 3.0, 0.1, 4)[2] == pytest.approx(2 * 8 * 0.1 + 6 * 0.1)
    assert step_s(8, 3.0, 3.0, 0.1, 4, 2)[2] == pytest.approx(6 * 0.1)
    # A chunk's forward takes 3 / (3 x 2) s, and a message 0.5 s longer.
    total, bubble_s, messages_s = step_s(8, 3.0, 3.0, 1.0, 4, 2)
    assert messages_s == pytest.approx(2 * 2 * 8 * 0.5 + 6 * 1.0)
    assert total == pytest.approx(8 * 3.0 + bubble_s + messages_s)
    assert step_s(8, 3.0, 3.0, 1.0, 1) == (24.0, 0.0, 0.0)


def test_the_first_stage_holds_a_layer_set_per_stage() -> None:
    """arXiv 2205.05198 Eq 5: L layers' worth whatever p; 1 + (p - 1) / (p v) times that where interleaved."""
    assert in_flight(8, 64) == 8.0
    assert in_flight(8, 3) == 3.0
    assert in_flight(8, 64, 4) == pytest.approx(8 * (1 + 7 / 32))


def most_alive(stages: int, micro_batches: int, virtual: int, stage: int) -> float:
    """Micro-batches of a stage, at most, whose forward ran and whose backward did not: after a warm-up it runs one of
    each in turn. Warm-up is Megatron-LM's: the stages behind; twice that, and all chunks but the last."""
    behind = stages - 1 - stage
    warm = behind if virtual == 1 else 2 * behind + (virtual - 1) * stages
    total = micro_batches * virtual
    warm = min(warm, total)
    moves = [1] * warm + [1, -1] * (total - warm) + [-1] * warm
    alive = most = 0
    for move in moves:
        alive += move
        most = max(most, alive)
    return most / virtual


@pytest.mark.parametrize(
    ("stages", "micro_batches", "virtual"), [(4, 8, 1), (4, 2, 1), (4, 16, 2), (8, 32, 4), (4, 4, 8)]
)
def test_each_stage_holds_what_it_ran_forward_and_not_back(stages: int, micro_batches: int, virtual: int) -> None:
    for stage in range(stages):
        assert in_flight(stages, micro_batches, virtual, stage) == most_alive(stages, micro_batches, virtual, stage)


@pytest.mark.parametrize(
    ("layers", "stages", "balanced"), [(7, 2, False), (10, 4, False), (13, 3, False), (8, 2, True), (9, 3, True)]
)
@pytest.mark.parametrize("outside_s", [0.0, 0.5, 3.0])
def test_uneven_layers_are_spread_at_best(layers: int, stages: int, balanced: bool, outside_s: float) -> None:
    splits = [s for s in product(range(layers + 1), repeat=stages) if sum(s) == layers]
    best = min(max([*split[:-1], split[-1] + outside_s]) for split in splits)
    most, last = spread(layers, 1.0, outside_s, stages, balanced=balanced)
    assert max(most, last + outside_s) == pytest.approx(best)
    assert any(max(split[:-1]) == most and split[-1] == last for split in splits)


@pytest.mark.parametrize(("layers", "stages"), [(94, 8), (94, 32), (94, 4), (6, 2), (4, 6), (10, 3)])
def test_ends_that_count_have_a_layer_less(layers: int, stages: int) -> None:
    """What Megatron-LM's `--account-for-...-in-pipeline-split` does: an embedding, layers and a head, cut evenly."""
    places = ["embedding", *["layer"] * layers, "head"]
    size = len(places) // stages
    counts = [places[i * size : (i + 1) * size].count("layer") for i in range(stages)]
    assert spread(layers, 1.0, 3.0, stages, ends=True) == (max(counts[:-1]), counts[-1])


def test_stages_that_divide_layers_have_as_many_each() -> None:
    assert spread(8, 1.0, 3.0, 2) == (4, 4)
    assert spread(8, 1.0, 3.0, 2, balanced=True) == (5, 3)
    assert spread(8, 1.0, 3.0, 1) == (8, 8)


def test_a_pipeline_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 micro-batches"):
        bubble_share(4, 0)


def test_an_update_on_the_host_waits_for_the_slower_of_cpu_and_wire() -> None:
    """A billion parameters on each of the ranks, 8 a node: 30 bytes each through its memory, 2 GB up and down the
    wire."""
    machine = hardware("h100")
    for ranks, sharing in ((1, 1), (4, 4), (8, 8), (32, 8)):
        cpu_s = 1e9 * (2 + 2 * 14) * sharing / 200e9
        assert host_update_s(1e9, ranks, machine) == pytest.approx(cpu_s + 2e9 / 55.4e9)


def test_a_rack_has_a_host_for_every_two_gpus() -> None:
    """64 of GB200: 32 CPUs of 512 GB/s, half of it reached, so that a rank has 128 GB/s of host memory."""
    machine = hardware("gb200")
    wire_s = 2e9 / machine.pcie_bytes_per_s
    for ranks in (2, 8, 64):
        assert host_update_s(1e9, ranks, machine) == pytest.approx(30e9 / 128e9 + wire_s, rel=0.01)
    assert host_update_s(1e9, 1, machine) == pytest.approx(30e9 / 256e9 + wire_s, rel=0.01)


def test_a_gpu_with_several_hosts_uses_one_and_slow_links_count_twice() -> None:
    machine = replace(hardware("h100"), ranks_per_node=1, hosts_per_node=2, host_bytes_per_s=400e9)
    wire_s = 2e9 / machine.pcie_bytes_per_s
    assert host_update_s(1e9, 4, machine) == pytest.approx(30e9 / 200e9 + wire_s)
    slow = replace(machine, pcie_bytes_per_s=1e9)
    assert host_update_s(1e9, 4, slow, item_bytes=4, state_bytes=8) == pytest.approx(2 * 4.0)
