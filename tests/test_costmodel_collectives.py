"""Collective prices: ring arithmetic by hand, limits, and measured bus bandwidths."""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from importlib import resources
from statistics import median

import pytest

from costmodel.collectives import (
    COLLECTIVES,
    collective_s,
    group,
    taken_shares,
    wire_bytes,
)
from costmodel.hardware import Hardware, topology
from costmodel.presets import hardware

H100 = hardware("h100")
PRESETS = {"A100": "a100-80gb", "H100": "h100", "H200": "h200", "B200": "b200-efa", "MI300X": "mi300x"}
GIB = 1 << 30


def machine_of(row: dict[str, str]) -> Hardware:
    machine = hardware(next(preset for name, preset in PRESETS.items() if name in row["hardware"]))
    if row["algo"] in ("Ring", "NVLS off (ring)"):
        return replace(machine, intra_node=replace(machine.intra_node, multicast_bytes_per_s=0))
    return machine


def measured_s(row: dict[str, str]) -> float:
    """Seconds from the bus bandwidth (nccl-tests' convention), or from the algorithm's, where the row says so."""
    payload, rate, ranks = float(row["payload_bytes"]), float(row["busbw_gb_per_s"]) * 1e9, int(row["gpus"])
    if "ALGO" in row["algo"]:
        return payload / rate
    passes = 2 if row["collective"] == "all_reduce" else 1
    return passes * (ranks - 1) / ranks * payload / rate


def table() -> list[dict[str, str]]:
    text = resources.files("costmodel").joinpath("data/collectives_busbw.csv").read_text()
    return [row for row in csv.DictReader(text.splitlines()) if row["payload_bytes"]]


def test_collectives_agree_with_measured_bus_bandwidths() -> None:
    """Median error at most 5% over all rows (15% was asked), 90% of the rows within 15%.

    The far rows are 4 B200 nodes at 32 to 128 KiB: 0.01 to 0.45 GB/s, slower than at four times the size, a start-up
    effect of that run.
    """
    errors = []
    for row in table():
        mesh = topology(machine_of(row), {"x": int(row["gpus"])})
        mine = collective_s(row["collective"], float(row["payload_bytes"]), (0,), mesh)
        errors.append(abs(mine / measured_s(row) - 1))
    print(
        f"{len(errors)} rows, median {median(errors):.1%}, mean {sum(errors) / len(errors):.1%}, max {max(errors):.0%}"
    )
    assert len(errors) == 115
    assert median(errors) < 0.05
    assert sorted(errors)[int(0.9 * len(errors))] < 0.15


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter"])
def test_each_kind_agrees_by_itself(collective: str) -> None:
    errors = [
        abs(
            collective_s(
                collective, float(row["payload_bytes"]), (0,), topology(machine_of(row), {"x": int(row["gpus"])})
            )
            / measured_s(row)
            - 1
        )
        for row in table()
        if row["collective"] == collective
    ]
    assert median(errors) < 0.05


def test_all_to_all_inside_a_node() -> None:
    """autoparallel's fit for H100, 8 ranks and 32 MB or more: 380 GB/s and 50 us (collectives_busbw.csv)."""
    payload = 256e6
    assert collective_s("all_to_all", payload, (0,), topology(H100, {"ep": 8})) == pytest.approx(
        50e-6 + payload * 7 / 8 / 380e9, rel=0.15
    )


def test_large_all_gather_by_hand() -> None:
    """64 GiB on 16 H100 in 2 nodes: 15/16 of it at min(372, 8 x 47.7) GB/s, and 4 GiB are copied at HBM's third."""
    payload = 64 * GIB
    mesh = topology(H100, {"dp": 16})
    by_hand = 15 / 16 * payload / 372e9 + 3 * payload / 16 / 3.35e12
    assert collective_s("all_gather", payload, (0,), mesh) == pytest.approx(by_hand, rel=0.005)
    assert collective_s("reduce_scatter", payload, (0,), mesh) == collective_s("all_gather", payload, (0,), mesh)


def test_one_rank_per_node_has_one_network_card() -> None:
    """dp over 4 nodes beside tp=8: 3/4 of 4 GiB at 47.7 GB/s."""
    mesh = topology(H100, {"dp": 4, "tp": 8})
    assert collective_s("all_gather", 4 * GIB, (0,), mesh) == pytest.approx(0.75 * 4 * GIB / 47.7e9, rel=0.02)


def test_two_ranks_per_node_pool_their_cards() -> None:
    """dp=8 beside tp=4: 2 ranks in each of 4 nodes, so 7/8 of 4 GiB at 2 x 47.7 GB/s."""
    mesh = topology(H100, {"dp": 8, "tp": 4})
    assert group((0,), mesh) == (8, 2, 4)
    assert collective_s("all_gather", 4 * GIB, (0,), mesh) == pytest.approx(7 / 8 * 4 * GIB / 95.4e9, rel=0.02)


def test_rings_through_many_nodes_as_published() -> None:
    """Two publications: FSDP's prefetch in backward and an all-gather of nccl-tests.

    arXiv 2304.11277, sections 5.2, 5.4: without prefetch a step of GPT-175B on A100s, 17.0 s at 173 TFLOP/s, takes 18%
    longer on 128 to 512 GPUs: its gathers of backward, each waited for. 96 layers of 12 x 12288^2 parameters in bf16.
    NVIDIA/nccl issue 1218: 2 GB on 32 nodes of 8 H100, 200 GB/s of bus bandwidth, in one iteration.
    """
    a100 = hardware("a100-80gb")
    flops = 96 * 2048 * 96 * 12288**2 * (1 + 2048 / (6 * 12288) + 50000 / (16 * 96 * 12288))
    extra_s = 0.18 * flops / 173e12
    assert extra_s == pytest.approx(3.06, rel=0.01)
    for gpus in (128, 256, 512):
        gathers_s = 96 * collective_s("all_gather", 2 * 12 * 12288**2, (0,), topology(a100, {"dp": gpus}))
        assert gathers_s == pytest.approx(extra_s, rel=0.15)
    gather_s = collective_s("all_gather", 2e9, (0,), topology(H100, {"dp": 256}))
    assert 2e9 * 255 / 256 / gather_s == pytest.approx(200e9, rel=0.1)


@pytest.mark.parametrize(("ranks", "busbw"), [(2, 47.671e9), (8, 312.912e9)])
def test_a_node_without_a_switch_as_measured(ranks: int, busbw: float) -> None:
    """4 GiB on MI300X (stas00/ml-engineering, network/README.md): two GPUs have one wire, eight have seven each."""
    reduce_s = collective_s("all_reduce", 4 * GIB, (0,), topology(hardware("mi300x"), {"x": ranks}))
    assert 2 * (ranks - 1) / ranks * 4 * GIB / reduce_s == pytest.approx(busbw, rel=0.02)


@pytest.mark.parametrize(
    ("name", "ranks", "busbw"),
    [("a100-pcie-80gb", 3, 20e9), ("a100-pcie-80gb", 8, 21e9), ("h100-pcie", 4, 35e9), ("rtx-4090", 4, 12.7e9),
     ("v100-sxm2-32gb", 8, 130e9)],
)  # fmt: skip
def test_cards_and_v100_as_measured(name: str, ranks: int, busbw: float) -> None:
    """1 GiB, by the figures that their presets name."""
    reduce_s = collective_s("all_reduce", GIB, (0,), topology(hardware(name), {"x": ranks}))
    assert 2 * (ranks - 1) / ranks * GIB / reduce_s == pytest.approx(busbw, rel=0.05)


def test_groups_of_a_node_without_a_switch_by_hand() -> None:
    """4 GiB, gathered by 4 of 8: three wires of 48.3 GB/s each; sent to one: a single wire; 2 x 4 over two nodes: those
    three, less than the four cards."""
    mesh = topology(hardware("mi300x"), {"dp": 2, "tp": 4})
    copy_s = 3 * GIB / 5.3e12
    assert collective_s("all_gather", 4 * GIB, (1,), mesh) == pytest.approx(3 * GIB / 144.9e9 + copy_s, rel=0.005)
    assert collective_s("all_to_all", 4 * GIB, (1,), mesh) == pytest.approx(3 * GIB / 144.9e9 + copy_s, rel=0.005)
    assert collective_s("send_recv", 4 * GIB, (0,), mesh) == pytest.approx(4 * GIB / 48.3e9, rel=0.005)
    across = topology(hardware("mi300x"), {"cp": 2, "dp": 2, "tp": 4})
    assert group((0, 2), across) == (8, 4, 2)
    gather_s = collective_s("all_gather", 4 * GIB, (0, 2), across)
    assert gather_s == pytest.approx(3.5 * GIB / 144.9e9 + copy_s / 2, rel=0.005)


def plain(intra: tuple[float, ...], inter: tuple[float, ...], **links: float) -> Hardware:
    """Nodes of 8 with links of (rate, latency, base), and memory that copies in no time."""
    names = ("bytes_per_s", "latency_s", "base_s")
    inside = {"pipeline_s": 0.0, "multicast_bytes_per_s": links.get("switch", 0.0)}
    across = {"pipeline_s": 0.0, "wide_bytes_per_s": links.get("wide", 0.0)}
    return replace(
        H100,
        device=replace(H100.device, memory_bytes_per_s=1e30),
        intra_node=replace(H100.intra_node, **dict(zip(names, intra, strict=True)), **inside),
        inter_node=replace(H100.inter_node, **dict(zip(names, inter, strict=True)), **across),
    )


NODE, TWO, FOUR, ACROSS = {"x": 8}, {"x": 16}, {"x": 32}, {"x": 2, "y": 8}
"""One to four nodes of 8 ranks, and a rank of each of two."""


@pytest.mark.parametrize(
    ("kind", "mesh", "seconds"),
    [
        ("all_gather", NODE, 10_007),
        ("all_gather", TWO, 1_000_114),
        ("reduce_scatter", ACROSS, 1_000_100),
        ("all_reduce", NODE, 10_014),
        ("all_reduce", TWO, 1_000_214),  # a tree: 7 hops up and down in the node, 1 up and down outside
        ("all_reduce", FOUR, 1_000_414),
        ("all_reduce", {"x": 3, "y": 8}, 1_000_400),
        ("all_to_all", NODE, 10_008),
        ("all_to_all", TWO, 1_000_116),  # 8 in the node, 8 more through the card
        ("broadcast", NODE, 10_007),
        ("broadcast", TWO, 1_000_114),
        ("send_recv", {"x": 2}, 10_001),
        ("send_recv", ACROSS, 1_000_100),
    ],
)
def test_hops_are_those_counted_by_hand(kind: str, mesh: dict[str, int], seconds: float) -> None:
    """Of a message of no bytes: hops of 1 s in a node and 100 s outside, starts of 10,000 s and 1,000,000 s."""
    machine = plain((1.0, 1.0, 1e4), (1.0, 100.0, 1e6))
    assert collective_s(kind, 0.0, (0,), topology(machine, mesh)) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "mesh", "rates", "share"),
    [
        ("all_gather", NODE, (100, 1), 7 / 8 / 100),
        ("all_gather", TWO, (100, 1), 15 / 16 / 8),
        ("all_gather", TWO, (1, 100), 15 / 16),
        ("all_gather", ACROSS, (1, 100), 1 / 2 / 100),
        ("reduce_scatter", {"x": 4, "y": 4}, (100, 1), 3 / 4 / 2),
        ("all_reduce", NODE, (100, 1), 2 * 7 / 8 / 100),
        ("all_reduce", TWO, (100, 1), 1 / 8),  # a tree
        ("all_reduce", FOUR, (100, 1), 2 * 31 / 32 / 8),
        ("all_reduce", TWO, (1, 100), 2 * 7 / 8),
        ("all_reduce", ACROSS, (100, 1), 1),
        ("all_to_all", NODE, (100, 1), 7 / 8 / 100),
        ("all_to_all", TWO, (100, 1), 8 / 16),
        ("all_to_all", TWO, (1, 100), 7 / 16),
        ("broadcast", NODE, (100, 1), 1 / 100),
        ("broadcast", TWO, (100, 1), 1 / 8),
        ("send_recv", {"x": 2}, (100, 1), 1 / 100),
        ("send_recv", ACROSS, (100, 1), 1),
    ],
)
def test_bytes_are_those_counted_by_hand(
    kind: str, mesh: dict[str, int], rates: tuple[float, float], share: float
) -> None:
    """Of a message so large that nothing else counts, over links of these rates."""
    machine = plain((rates[0], 0.0, 0.0), (rates[1], 0.0, 0.0))
    assert collective_s(kind, 1e9, (0,), topology(machine, mesh)) == pytest.approx(1e9 * share)


def test_a_switch_and_wide_rings_by_hand() -> None:
    switched = plain((100.0, 0.0, 0.0), (1e3, 0.0, 0.0), switch=1e3)
    for mesh, share in ((NODE, (1 + 1 / 8) / 1e3), (TWO, (1 + 1 / 8) / 1e3), ({"x": 2}, 1 / 100)):
        assert collective_s("all_reduce", 1e9, (0,), topology(switched, mesh)) == pytest.approx(1e9 * share), mesh
    wide = plain((100.0, 0.0, 0.0), (1.0, 0.0, 0.0), wide=0.5)
    for mesh, rate in (({"x": 120}, 8), ({"x": 128}, 4), ({"x": 64, "y": 2}, 4)):
        share = (mesh["x"] - 1) / mesh["x"] / rate
        assert collective_s("all_gather", 1e9, (0,), topology(wide, mesh)) == pytest.approx(1e9 * share), mesh


def test_small_messages_cost_latency_only() -> None:
    """A kilobyte over 8 ranks of a node: 8 us and 7 hops of 2.2 us."""
    mesh = topology(H100, {"tp": 8})
    assert collective_s("all_gather", 1024, (0,), mesh) == pytest.approx(8e-6 + 7 * 2.2e-6, rel=0.01)


def test_all_reduce_latency_grows_with_the_logarithm_of_nodes() -> None:
    small = [collective_s("all_reduce", 1024, (0,), topology(H100, {"dp": 8 * nodes})) for nodes in (16, 32, 64)]
    assert small[1] - small[0] == pytest.approx(small[2] - small[1], rel=0.01)
    gather = [collective_s("all_gather", 1024, (0,), topology(H100, {"dp": 8 * nodes})) for nodes in (16, 32, 64)]
    assert gather[2] - gather[1] == pytest.approx(2 * (gather[1] - gather[0]), rel=0.01)


def test_several_axes_form_one_group() -> None:
    """A collective over (dp, tp) is that of the flattened mesh, in any order."""
    split, flat = topology(H100, {"dp": 8, "tp": 4}), topology(H100, {"x": 32})
    for kind in COLLECTIVES:
        assert collective_s(kind, 1e8, (0, 1), split) == pytest.approx(collective_s(kind, 1e8, (0,), flat))
        assert collective_s(kind, 1e8, (1, 0), split) == collective_s(kind, 1e8, (0, 1), split)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_group_of_one_is_free_and_no_other_is(kind: str) -> None:
    mesh = topology(H100, {"dp": 1, "tp": 8})
    assert collective_s(kind, 1e9, (0,), mesh) == 0.0
    assert collective_s(kind, 1e9, (), mesh) == 0.0
    assert collective_s(kind, 0, (1,), mesh) > 0.0


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("name", ["a100-80gb", "h100", "b200", "b200-efa", "cpu"])
def test_time_grows_with_bytes_and_no_wire_is_beaten(kind: str, name: str) -> None:
    machine = hardware(name)
    for mesh in ({"x": 2}, {"x": 8}, {"x": 4, "y": 8}, {"x": 16, "y": 2}):
        laid = topology(machine, mesh)
        times = [collective_s(kind, 2.0**power, (0,), laid) for power in range(10, 36)]
        assert times == sorted(times)
        assert len(set(times)) == len(times)


def test_an_all_reduce_costs_no_more_than_its_two_halves() -> None:
    for mesh in ({"x": 2}, {"x": 8}, {"x": 32}, {"x": 1024}):
        laid = topology(H100, mesh)
        for payload in (1e3, 1e6, 1e9):
            halves = collective_s("all_gather", payload, (0,), laid) + collective_s(
                "reduce_scatter", payload, (0,), laid
            )
            assert collective_s("all_reduce", payload, (0,), laid) <= halves


def test_the_heavy_axis_belongs_inside_the_node() -> None:
    inside, across = topology(H100, {"dp": 8, "tp": 8}), topology(H100, {"tp": 8, "dp": 8})
    assert collective_s("all_reduce", 1e8, (0,), across) > 5 * collective_s("all_reduce", 1e8, (1,), inside)


def test_point_to_point_by_hand() -> None:
    """100 MB between nodes at 47.7 GB/s and some latency."""
    seconds = collective_s("send_recv", 1e8, (0,), topology(H100, {"pp": 4, "tp": 8}))
    assert seconds == pytest.approx(1e8 / 47.7e9 + 22e-6, rel=0.01)


def test_volume_of_the_ring_forms() -> None:
    assert wire_bytes("all_reduce", 800, 8) == 2 * 700
    assert wire_bytes("all_gather", 800, 8) == wire_bytes("reduce_scatter", 800, 8) == 700
    assert wire_bytes("all_to_all", 800, 8) == 700
    assert wire_bytes("send_recv", 800, 8) == 800
    assert wire_bytes("all_reduce", 800, 1) == 0


def test_mistakes_are_refused() -> None:
    mesh = topology(H100, {"tp": 8})
    with pytest.raises(ValueError, match="unknown collective 'gossip'; known are all_gather"):
        collective_s("gossip", 1.0, (0,), mesh)
    with pytest.raises(ValueError, match="negative"):
        collective_s("all_reduce", -1.0, (0,), mesh)
    with pytest.raises(ValueError, match="unknown collective"):
        wire_bytes("gossip", 1.0, 2)


@pytest.mark.parametrize(
    ("nodes", "gb_per_s"),
    [(1, 480.0), (2, 470.0), (4, 365.84)],
)
def test_all_reduce_over_nodes_that_no_figure_was_taken_from(nodes: int, gb_per_s: float) -> None:
    """H100 HGX, 8 x 400 Gb/s each, best bus bandwidth (NVIDIA/nccl-tests issue 309): within 10%.

    The step down from 2 to 4 nodes is the tree's: 2 nodes carry the payload across once, 4 nodes twice.
    """
    payload, ranks = 16 * GIB, 8 * nodes
    seconds = collective_s("all_reduce", payload, (0,), topology(H100, {"x": ranks}))
    assert 2 * (ranks - 1) / ranks * payload / seconds == pytest.approx(gb_per_s * 1e9, rel=0.1)


def test_a_tiny_all_reduce_over_32_nodes() -> None:
    """62 to 71 us for up to 128 bytes on 32 DGX A100 (NVIDIA/nccl issue 652): the right size, not more."""
    assert 45e-6 < collective_s("all_reduce", 64, (0,), topology(hardware("a100-80gb"), {"x": 256})) < 100e-6


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_all_to_all_over_nodes_is_bound_by_one_card(nodes: int) -> None:
    """A payload's rate of N / (N - 1) times a card's (NVIDIA/nccl-tests issue 130)."""
    ranks, payload = 8 * nodes, 16 * GIB
    seconds = collective_s("all_to_all", payload, (0,), topology(H100, {"ep": ranks}))
    assert payload / seconds == pytest.approx(nodes / (nodes - 1) * 47.7e9, rel=0.02)


def test_calibrated_figures_replace_the_formulas() -> None:
    """4 ranks: 1 ms, 3 hops of 0.1 ms and 3/4 of 4 MB at 1 GB/s; kinds that were not measured keep the formula."""
    machine = replace(H100, intra_node=replace(H100.intra_node, measured={"all_gather": (1e-3, 1e-4, 1e9)}))
    mesh, plain = topology(machine, {"tp": 4}), topology(H100, {"tp": 4})
    assert collective_s("all_gather", 4e6, (0,), mesh) == pytest.approx(1e-3 + 3e-4 + 3e-3)
    assert collective_s("reduce_scatter", 4e6, (0,), mesh) == collective_s("reduce_scatter", 4e6, (0,), plain)
    across = topology(machine, {"dp": 4, "tp": 8})
    assert collective_s("all_gather", 4e6, (0,), across) == collective_s(
        "all_gather", 4e6, (0,), topology(H100, {"dp": 4, "tp": 8})
    )
    figures = dict.fromkeys(("all_gather", "all_reduce", "send_recv"), (1e-3, 1e-4, 1e9))
    machine = replace(H100, inter_node=replace(H100.inter_node, measured=figures))
    one = topology(machine, {"dp": 4, "tp": 8})  # a rank in each of 4 nodes
    assert collective_s("all_reduce", 4e6, (0,), one) == pytest.approx(1e-3 + 6e-4 + 6e-3)
    assert collective_s("send_recv", 4e6, (0,), one) == pytest.approx(1e-3 + 1e-4 + 4e-3)
    pooled = [collective_s("all_gather", 4e6, (0,), topology(each, {"dp": 16})) for each in (machine, H100)]
    assert pooled[0] == pooled[1]


def test_pricing_is_fast() -> None:
    """50,000 distinct prices and as many repeats within seconds."""
    mesh = topology(H100, {"dp": 8, "tp": 8})
    start = time.process_time()
    for _ in range(2):
        for size in range(50_000):
            collective_s("all_gather", size, (0, 1), mesh)
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize(
    ("mesh", "axes", "sms", "port"),
    [
        ({"dp": 8}, (0,), 24, 372e9),
        ({"dp": 64}, (0,), 16, 372e9),  # NCCL's log: 16 channels; 8 cards carry more than a GPU's NVLinks
        ({"dp": 8, "tp": 8}, (0,), 2, 47.7e9),
        ({"dp": 8, "tp": 8}, (0, 1), 16, 372e9),
        ({"dp": 8, "tp": 2}, (0,), 8, 4 * 47.7e9),
    ],
)
def test_a_collective_takes_sms_and_memory_from_compute(
    mesh: dict[str, int], axes: tuple[int, ...], sms: int, port: float
) -> None:
    """Two channels per network card of the group, or those inside a node; each byte at the port is written and read.
    What PyTorch FSDP's runs lost is more than either, on H100."""
    wider = replace(H100, device=replace(H100.device, sm_count=132 // 4, memory_bytes_per_s=3.35e12 / 20))
    taken = taken_shares(axes, topology(wider, mesh))
    own = sms / 33, min(1.0, 20 * 2 * port / (0.87 * 3.35e12))
    assert taken == pytest.approx(tuple(max(0.26, share) for share in own))
    assert taken_shares(axes, topology(H100, mesh)) == (0.26, 0.26)
    assert taken_shares((0,), topology(hardware("cpu"), {"dp": 4})) == (0.0, 0.0)


def test_a_rack_has_no_more_channels_than_nccl() -> None:
    """64 cards of a rack would be 128 channels, of the 148 SMs that a GPU has; there are 32, here of 64 SMs."""
    rack = replace(hardware("gb200"), device=replace(hardware("gb200").device, sm_count=64))
    assert taken_shares((0,), topology(rack, {"dp": 256}))[0] == 0.5
