"""Hardware: presets and their sources, meshes laid over nodes, and files read back."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from costmodel.compute import matmul, op_s
from costmodel.hardware import dtype_name, topology
from costmodel.hardware_file import load_hardware, save_hardware
from costmodel.host_memory import host_memory_bytes
from costmodel.presets import (
    fitted,
    hardware,
    hardware_names,
    preset_of,
    slow_dtype_notes,
    sources,
    with_attention,
)

H100 = hardware("h100")


@pytest.mark.parametrize("name", ["a100-40gb", "a100-80gb", "h100", "h200", "b200", "gb300", "mi300x", "cpu"])
def test_presets_are_known(name: str) -> None:
    machine = hardware(name)
    assert name in hardware_names()
    assert machine.name == name
    assert 0 < machine.device.usable_bytes < machine.device.memory_bytes
    assert {"float32", "bfloat16"} <= set(machine.device.peak_flops_per_s)


@pytest.mark.parametrize("name", hardware_names())
def test_every_figure_has_a_source(name: str) -> None:
    """All numbers of a preset appear with a text; those of the data file hold nothing else."""
    found = sources(name)
    machine = hardware(name)
    if name != "cpu":
        for field in ("memory_bytes_per_s", "memory_bytes", "sm_count", "matmul_efficiency", "sustained"):
            value, source = found[f"device.{field}"]
            assert value == getattr(machine.device, field)
            assert len(source) > 20
        for link in ("intra_node", "inter_node"):
            assert found[f"{link}.bytes_per_s"][0] == getattr(machine, link).bytes_per_s
    assert all(source for _, source in found.values())


def test_published_figures() -> None:
    """Datasheet numbers, typed again here."""
    assert hardware("a100-40gb").device.memory_bytes_per_s == 1.555e12
    assert hardware("a100-80gb").device.peak_flops_per_s["bfloat16"] == 312e12
    assert H100.device.peak_flops_per_s["float8"] == 1979e12
    assert H100.device.peak_flops_per_s["float32"] == 67e12
    assert hardware("h200").device.memory_bytes_per_s == 4.8e12
    assert hardware("b200").device.peak_flops_per_s["bfloat16"] == 2250e12
    assert 72 * hardware("gb200").device.peak_flops_per_s["float8"] == 360e15  # of a rack, dense
    assert hardware("gb200").device.memory_bytes / 2**30 == pytest.approx(184.3, abs=0.1)
    assert hardware("h800").intra_node.bytes_per_s == pytest.approx(160e9, rel=0.05)  # DeepSeek-V3's report
    assert hardware("a800").intra_node.bytes_per_s / hardware("a100-80gb").intra_node.bytes_per_s == pytest.approx(
        400 / 600, rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "cores", "multiply_adds", "clock_hz"),
    [("mi300x", 304 * 4, 256, 2.1e9), ("mi325x", 304 * 4, 256, 2.1e9), ("mi350x", 256 * 4, 512, 2.2e9),
     ("mi355x", 256 * 4, 512, 2.4e9)],
)  # fmt: skip
def test_matrix_cores_times_their_clock(name: str, cores: int, multiply_adds: int, clock_hz: float) -> None:
    """AMD's peaks from cores, multiply-adds of a cycle and clock; fp8 is twice bf16. A CU has four cores."""
    device = hardware(name).device
    assert device.peak_flops_per_s["bfloat16"] == pytest.approx(2 * cores * multiply_adds * clock_hz, rel=1e-4)
    assert device.peak_flops_per_s["float8"] == pytest.approx(4 * cores * multiply_adds * clock_hz, rel=1e-4)
    assert device.sm_count == cores // 4


@pytest.mark.parametrize(
    ("name", "sms", "flops", "clock_hz"),
    [("a100-pcie-40gb", 108, 2048, 1.41e9), ("a100-pcie-80gb", 108, 2048, 1.41e9), ("h100-pcie", 114, 4096, 1.62e9),
     ("h100-nvl", 132, 4096, 1.545e9), ("h200-nvl", 132, 4096, 1.545e9), ("gh200", 132, 4096, 1.83e9),
     ("l40s", 142, 1024, 2.49e9), ("l4", 58, 1024, 2.04e9), ("a10g", 80, 512, 1.71e9), ("a10", 72, 1024, 1.695e9),
     ("rtx-4090", 128, 512, 2.52e9), ("rtx-3090", 82, 512, 1.695e9), ("v100-sxm2-32gb", 80, 1024, 1.53e9)],
)  # fmt: skip
def test_tensor_cores_times_their_clock(name: str, sms: int, flops: int, clock_hz: float) -> None:
    """NVIDIA's fp16 peaks from SMs, dense FLOPs of a clock and SM (added in fp32), and clock; fp8 is twice."""
    device = hardware(name).device
    assert device.sm_count == sms
    assert device.peak_flops_per_s["float16"] == pytest.approx(sms * flops * clock_hz, rel=0.003)
    if "float8" in device.peak_flops_per_s:
        assert device.peak_flops_per_s["float8"] == pytest.approx(2 * device.peak_flops_per_s["float16"], rel=0.015)


def test_best_products_as_measured() -> None:
    """TFLOP/s of the best bf16 and fp8 products that were found, typed again here."""
    for name, bf16, fp8 in (
        ("b300", 1769.0, 3353.3), ("gb300", 1845.0, 3615.6), ("mi300x", 668.4, 1159.5), ("mi325x", 784.9, 1408.1),
        ("mi350x", 1206.0, 2660.0), ("mi355x", 1565.0, 3293.2),
    ):  # fmt: skip
        device = hardware(name).device
        peaks = device.peak_flops_per_s
        assert device.matmul_efficiency * peaks["bfloat16"] == pytest.approx(bf16 * 1e12, rel=0.003)
        assert device.fp8_matmul_efficiency * peaks["float8"] == pytest.approx(fp8 * 1e12, rel=0.003)
    for name, dtype, best in (
        ("a100-pcie-40gb", "bfloat16", 234.1), ("a100-pcie-80gb", "bfloat16", 252.9), ("h100-pcie", "bfloat16", 495.9),
        ("l4", "bfloat16", 70.9), ("a10g", "bfloat16", 69.5), ("a10", "bfloat16", 56.0),
        ("rtx-4090", "bfloat16", 163.0), ("h20", "bfloat16", 141.9), ("gh200", "bfloat16", 821.0),
        ("v100-sxm2-32gb", "float16", 84.0), ("v100-sxm2-32gb", "bfloat16", 9.4),
    ):  # fmt: skip
        device = hardware(name).device
        assert device.matmul_efficiency * device.peak_flops_per_s[dtype] == pytest.approx(best * 1e12, rel=0.003)


@pytest.mark.parametrize(("dtype", "item", "measured"), [("bfloat16", 2, 616.42e12), ("float8", 1, 1143.18e12)])
def test_ten_products_that_amd_timed(dtype: str, item: int, measured: float) -> None:
    """AMD's typical attained FLOPs of an MI325X: DeepSeek V3's products of 32 and 32768 rows, each run for 30 s."""
    device = hardware("mi325x").device
    shapes = [
        (m, n, k) for m in (32, 32768) for n, k in ((2112, 7168), (3072, 1536), (7168, 2048), (4608, 7168), (7168, 256))
    ]
    seconds = sum(op_s(matmul(m, n, k, dtype=dtype, item_bytes=item), device) for m, n, k in shapes)
    assert sum(2 * m * n * k for m, n, k in shapes) / seconds == pytest.approx(measured, rel=0.07)


def test_memory_of_newer_parts() -> None:
    """GiB, as driver or torch print it, or as the specification has it less 1%."""
    assert hardware("mi300x").device.memory_bytes / 2**30 == pytest.approx(191.98, abs=0.1)
    assert hardware("b300").device.memory_bytes / 2**20 == pytest.approx(275040 * 182630 / 183359, rel=0.001)
    for name, gib in (("mi325x", 256), ("mi355x", 288), ("gb300", 279)):
        assert 0.99 * gib < hardware(name).device.memory_bytes / 2**30 <= gib
    for name, mib in (
        ("a100-pcie-40gb", 40326), ("h100-pcie", 81008), ("a10g", 22587), ("h20", 97285), ("rtx-3090", 24259),
        ("v100-sxm2-16gb", 16160), ("l40s", 44.39 * 1024), ("h100-nvl", 93.0 * 1024), ("rtx-4090", 23.64 * 1024),
        ("v100-sxm2-32gb", 31.75 * 1024),
    ):  # fmt: skip
        assert hardware(name).device.memory_bytes / 2**20 == pytest.approx(mib, rel=0.0005)


@pytest.mark.parametrize(
    ("name", "wire"),
    [("a100-pcie-40gb", 31e9), ("a100-pcie-80gb", 31e9), ("h100-pcie", 63e9), ("h100-nvl", 63e9), ("h200-nvl", 63e9),
     ("l40s", 31e9), ("l4", 31e9), ("a10g", 31e9), ("a10", 31e9), ("rtx-4090", 31e9), ("rtx-3090", 31e9)],
)  # fmt: skip
def test_cards_talk_over_pcie(name: str, wire: float) -> None:
    """Below PCIe 4's or 5's wire, the same for two as for eight, and without multicast."""
    machine = hardware(name)
    assert machine.intra_node.name.startswith("PCIe")
    assert 0.4 * wire < machine.intra_node.bytes_per_s < machine.pcie_bytes_per_s < wire
    assert machine.intra_node.rate_of(2) == machine.intra_node.bytes_per_s
    assert machine.intra_node.multicast_bytes_per_s == 0
    assert machine.inter_node.bytes_per_s < wire


def test_pairs_are_wired_without_a_switch() -> None:
    """64 GB/s a direction and pair on MI300X, 76.5 on MI355X; no multicast; nothing reaches more than its wires."""
    for name, wire in (("mi300x", 64e9), ("mi355x", 76.5e9)):
        link = hardware(name).intra_node
        assert link.multicast_bytes_per_s == 0
        assert 0.7 < link.peer_bytes_per_s / wire < 0.8
        assert link.bytes_per_s < 7 * wire
        assert [link.rate_of(ranks) / link.peer_bytes_per_s for ranks in (2, 4)] == pytest.approx([1, 3])
        assert link.rate_of(8) == link.bytes_per_s
    assert H100.intra_node.rate_of(2) == H100.intra_node.bytes_per_s


def test_a_part_under_a_lower_cap_takes_over_the_rest() -> None:
    """500 of 700 W: at the floor of voltage the clock goes with power, 0.714."""
    capped = hardware("h100-500w")
    assert capped.device.memory_bytes_per_s == 2.4e12
    assert capped.device.sustained == pytest.approx(H100.device.sustained * 500 / 700, rel=0.01)
    assert capped.device.sm_count == H100.device.sm_count
    assert capped.intra_node == H100.intra_node


@pytest.mark.parametrize("ranks", [1, 8, 1000])
def test_all_wait_for_the_slowest(ranks: int) -> None:
    """Against draws: the slowest of `ranks` devices whose speeds are normal, on average over 2000 clusters."""
    spread = H100.device.speed_spread
    draws = np.random.default_rng(0).normal(1.0, spread, (2000, ranks)).min(axis=1).mean()
    slowest = topology(H100, {"dp": ranks}).device
    part = topology(H100, {"tp": 1}, ranks).device
    assert slowest == part
    for field in ("sustained", "attention_efficiency", "attention_backward_efficiency"):
        assert getattr(slowest, field) / getattr(H100.device, field) == pytest.approx(draws, abs=0.001)
    assert slowest.memory_bytes_per_s == H100.device.memory_bytes_per_s
    assert topology(topology(H100, {"dp": ranks}).hardware, {"dp": ranks}).device == slowest  # not twice
    assert topology(hardware("cpu"), {"dp": 4}).device.sustained == hardware("cpu").device.sustained


def test_attention_kernels_can_be_chosen() -> None:
    slower = with_attention(H100, "fa2").device
    assert slower.attention_efficiency < H100.device.attention_efficiency
    assert with_attention(H100, "cudnn") == H100
    with pytest.raises(ValueError, match="no figures for attention kernels 'magic' on h100; known are fa1, fa2, cudnn"):
        with_attention(H100, "magic")


def test_fitted_parameters_are_few_and_listed() -> None:
    assert 0 < len(fitted()) < 10
    assert fitted()["sustained (H100; all other GPUs but A100 take it over)"].startswith(str(H100.device.sustained))
    assert fitted()["sustained (A100)"].startswith(str(hardware("a100-80gb").device.sustained))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'v100'; known are a100-40gb, .*h100.*cpu"):
        hardware("v100")


def test_none_is_this_machine() -> None:
    assert hardware(None).name in hardware_names()
    assert hardware(H100) is H100


def test_device_names_lead_to_presets() -> None:
    assert preset_of("NVIDIA A100-SXM4-40GB") == "a100-40gb"
    assert preset_of("NVIDIA A100-SXM4-80GB") == "a100-80gb"
    assert preset_of("NVIDIA H100 80GB HBM3") == "h100"
    assert preset_of("NVIDIA H200") == "h200"
    assert preset_of("NVIDIA B200") == "b200"
    assert preset_of("NVIDIA GB200") == "gb200"
    assert preset_of("NVIDIA B300 SXM6 AC") == "b300"
    assert preset_of("NVIDIA GB300") == "gb300"
    assert preset_of("AMD Instinct MI300X VF") == "mi300x"
    assert preset_of("AMD Instinct MI325X") == "mi325x"
    assert preset_of("AMD Instinct MI350X") == "mi350x"
    assert preset_of("AMD Instinct MI355X") == "mi355x"
    assert preset_of("NVIDIA H800") == "h800"
    assert preset_of("NVIDIA A800-SXM4-80GB") == "a800"
    assert preset_of("Tesla T4") is None


def test_cards_lead_to_presets_of_their_own() -> None:
    """Not to the SXM part's, nor to that of a card whose name begins theirs."""
    for device, name in (
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("NVIDIA L40", None),
        ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ):
        assert preset_of(device) == name


def test_dtype_names() -> None:
    names = [dtype_name(name) for name in ("torch.bfloat16", "bf16", "float8_e4m3fn", "int64")]
    assert names == ["bfloat16", "bfloat16", "float8", "int64"]


@pytest.mark.parametrize(
    ("mesh", "in_node", "nodes"),
    [
        ({"tp": 8}, (8,), (1,)),
        ({"dp": 8, "tp": 8}, (1, 8), (8, 1)),
        ({"dp": 8, "tp": 4}, (2, 4), (4, 1)),
        ({"dp": 2, "tp": 4}, (2, 4), (1, 1)),
        ({"dp": 4, "tp": 16}, (1, 8), (4, 2)),
        ({"dp_replicate": 2, "dp_shard": 16, "tp": 4}, (1, 2, 4), (2, 8, 1)),
        ({"dp": 128, "tp": 8}, (1, 8), (128, 1)),
        ({"tp": 8, "dp": 8}, (1, 8), (8, 1)),
        ({"dp": 4, "tp": 6}, (1, 6), (4, 1)),
        ({"dp": 1, "tp": 1}, (1, 1), (1, 1)),
    ],
)
def test_axes_on_nodes_of_eight(mesh: dict[str, int], in_node: tuple[int, ...], nodes: tuple[int, ...]) -> None:
    laid = topology(H100, mesh)
    assert tuple(axis.in_node for axis in laid.axes) == in_node
    assert tuple(axis.nodes for axis in laid.axes) == nodes
    assert laid.sizes == tuple(mesh.values())


@pytest.mark.parametrize("mesh", [{"dp": 8, "tp": 4}, {"dp_replicate": 2, "dp_shard": 16, "tp": 4}, {"a": 3, "b": 24}])
def test_in_node_counts_match_ranks_listed_one_by_one(mesh: dict[str, int]) -> None:
    """Walk the ranks of the first group of every axis and count those on rank 0's node."""
    laid = topology(H100, mesh)
    for axis in laid.axes:
        group = [index * axis.stride for index in range(axis.size)]
        assert axis.in_node == sum(rank // 8 == 0 for rank in group)


def test_describe_says_what_crosses_nodes() -> None:
    lines = topology(H100, {"dp_replicate": 2, "dp_shard": 16, "tp": 4}).describe()
    assert lines[0] == "128 x h100, 8 ranks per node"
    assert lines[1].startswith("dp_replicate: 2 ranks, crosses nodes, one rank in each of 2")
    assert lines[2].startswith("dp_shard: 16 ranks, crosses nodes, 2 ranks in each of 8")
    assert lines[3].startswith("tp: 4 ranks, inside a node")
    assert topology(H100, {"dp": 1}).describe()[0] == "1 x h100, 1 rank per node"


def test_a_preset_is_found_in_either_case_and_before_a_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("h100").write_text("none of ours")
    assert hardware("h100") == hardware("H100") == H100
    Path("mine").write_text("none of ours")
    with pytest.raises(ValueError, match="'mine' is not JSON"):
        hardware("mine")
    Path("mine").unlink()
    with pytest.raises(
        ValueError, match=r"unknown hardware 'mine'; known are a100-40gb, .*, cpu, or the path of a file"
    ):
        hardware("mine")


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ({"dp": 12}, "12 x h100, priced as 6 ranks in each of 2 nodes of 8"),
        ({"dp": 3, "tp": 4}, "12 x h100, priced as 4 ranks in each of 3 nodes of 8"),
        ({"dp": 13}, "13 x h100, priced as 1 rank in each of 13 nodes of 8"),
        ({"dp": 2, "tp": 12}, "24 x h100, priced as 6 ranks in each of 4 nodes of 8"),
        ({"dp": 3, "tp": 8}, "24 x h100, 8 ranks per node"),
        ({"dp": 6}, "6 x h100, 6 ranks per node"),
    ],
)
def test_nodes_that_the_mesh_does_not_fill_are_told_as_they_are_priced(mesh: dict[str, int], told: str) -> None:
    assert topology(H100, mesh).describe()[0] == told


@pytest.mark.parametrize("size", [0, -2, 2.0, "4", True])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match="'tp' has size"):
        topology(H100, {"dp": 2, "tp": size})  # type: ignore[dict-item]


def test_a_mesh_without_axes_or_with_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="no axis"):
        topology(H100, {})
    with pytest.raises(ValueError, match="'dp' is named 2 times"):
        topology(H100, [("dp", 2), ("dp", 4)])


def test_axes_are_found_by_name() -> None:
    laid = topology(H100, {"dp": 2, "tp": 4})
    assert laid.axis("tp") == 1
    with pytest.raises(ValueError, match="no mesh axis 'pp'; the mesh has dp, tp"):
        laid.axis("pp")


def test_ranks_of_one_host_share_it() -> None:
    alone = hardware("cpu")
    shared = topology(alone, {"dp": 2, "tp": 2})
    assert shared.device.peak_flops_per_s["float32"] == alone.device.peak_flops_per_s["float32"] / 4
    assert shared.device.memory_bytes == alone.device.memory_bytes // 4
    assert not any(axis.crosses_nodes for axis in shared.axes)


def test_topologies_hash_compare_and_pickle() -> None:
    one, two = (topology(hardware("h100"), {"dp": 2, "tp": 4}) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != topology(hardware("h200"), {"dp": 2, "tp": 4})
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_saved_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    link = replace(H100.intra_node, measured={"all_gather": (1e-3, 1e-4, 1e9)})
    mine = replace(H100, name="mine", intra_node=link)
    save_hardware(mine, path, {"matmul": [1, 2]})
    assert load_hardware(path) == mine
    assert hardware(str(path)).name == "mine"
    assert json.loads(path.read_text())["samples"] == {"matmul": [1, 2]}


def test_a_file_says_what_is_other_than_in_a_preset(tmp_path: Path) -> None:
    """Rates that are shares of a link's go with it; everything else stays as it was."""
    path = tmp_path / "slow.json"
    device = {"memory_bytes": 64 << 30, "peak_flops_per_s": {"bfloat16": 5e14}}
    body = {"ranks_per_node": 4, "inter_node": {"bytes_per_s": 12e9}, "device": device}
    content = {"format": "autopar-hardware", "version": 2, "base": "h100", "hardware": body}
    path.write_text(json.dumps(content))
    found = hardware(path)
    half = 12e9 / H100.inter_node.bytes_per_s
    inter = replace(
        H100.inter_node,
        name="96 Gb/s per rank",
        bytes_per_s=12e9,
        wide_bytes_per_s=half * H100.inter_node.wide_bytes_per_s,
    )
    peaks = {**H100.device.peak_flops_per_s, "bfloat16": 5e14}
    assert (found.name, found.label, H100.label) == ("slow", "h100 as in slow", "h100")
    assert found.ranks_per_node == 4
    assert found.intra_node == H100.intra_node
    assert found.inter_node == inter
    assert found.device == replace(H100.device, memory_bytes=64 << 30, peak_flops_per_s=peaks)
    assert found.source.startswith("the preset h100, but for device, inter_node, ranks_per_node")
    with pytest.raises(ValueError, match="base: found 'h100', expected"):
        load_hardware(path)
    for change, message in (
        ({"base": "h900"}, "slow.json': base: unknown hardware 'h900'; known are a100-40gb"),
        ({"base": 7}, "base: found 7, expected a preset's name"),
        ({"hardware": {"colour": "red"}}, "unknown \\['colour'\\]; its fields are name, device, "),
        ({"hardware": {"device": {"memory": 1}}}, "unknown \\['memory'\\]; its fields are .*memory_bytes, "),
        ({"hardware": {"inter_node": {"bytes_per_s": -1}}}, "inter_node.bytes_per_s: found -1"),
        ({"hardware": {"inter_node": 12e9}}, "hardware.inter_node: found float, expected an object"),
        ({"hardware": 12}, "hardware: found int, expected an object"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            hardware(path)


def test_whole_numbers_of_a_file_are_integers_however_written(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    body = {"ranks_per_node": 4.0, "device": {"sm_count": 66.0, "memory_bytes": 64e9}}
    path.write_text(json.dumps({"format": "autopar-hardware", "version": 2, "base": "h100", "hardware": body}))
    found = hardware(str(path))
    whole = (found.ranks_per_node, found.device.sm_count, found.device.memory_bytes)
    assert whole == (4, 66, 64_000_000_000)
    assert {type(each) for each in whole} == {int}
    assert topology(found, {"dp": 8}).axes[0].in_node == 4


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    with pytest.raises(ValueError, match="cannot be read"):
        hardware(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_hardware(path)
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="is not a hardware file"):
        load_hardware(path)
    save_hardware(H100, path)
    good = json.loads(path.read_text())
    for change, message in (
        (lambda c: c.update(version=99), "version 99"),
        (lambda c: c["hardware"].pop("device"), "missing \\['device'\\]"),
        (lambda c: c["hardware"]["intra_node"].update(bytes_per_s=-1), "intra_node.bytes_per_s: found -1"),
        (lambda c: c["hardware"]["device"].update(sm_count="many"), "device.sm_count: found 'many'"),
        (lambda c: c["hardware"].update(ranks_per_node=1.5), "ranks_per_node: found 1.5, expected a whole number"),
        (
            lambda c: c["hardware"]["device"].update(reserve_bytes=10**12),
            "reserve_bytes: found 1000000000000, expected",
        ),
        (lambda c: c["hardware"]["device"].update(cache_bytes=10**6), "cache_bytes_per_s: found 0, expected"),
        (lambda c: c["hardware"].update(ranks_per_node=10**400), "not JSON: a number of 401 digits"),
        (lambda c: c["hardware"]["device"].update(peak_flops_per_s={}), "peak_flops_per_s"),
        (
            lambda c: c["hardware"]["device"].update(sustained=1.2),
            "device.sustained: found 1.2, expected a share of at most 1",
        ),
        (
            lambda c: c["hardware"]["device"].update(speed_spread=0.5),
            "device.speed_spread: found 0.5, expected a share of at most 0.1",
        ),
        (lambda c: c["hardware"]["inter_node"].update(measured={"all_gather": [1]}), "measured.all_gather"),
        (
            lambda c: c["hardware"]["inter_node"].update(measured={"all_gather": [0, 0, 0]}),
            "all_gather\\[2\\]: found 0",
        ),
        (
            lambda c: c["hardware"]["device"]["peak_flops_per_s"].update(bf16=1e14),
            "peak_flops_per_s: found 'bf16', expected names among bfloat16, float16",
        ),
        (
            lambda c: c["hardware"]["inter_node"].update(measured={"allgather": [0, 0, 1]}),
            "inter_node.measured: found 'allgather', expected names among all_gather, reduce_scatter",
        ),
        (lambda c: c["hardware"].update(colour="red"), "unknown \\['colour'\\]"),
    ):
        broken = json.loads(json.dumps(good))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            load_hardware(path)


@pytest.mark.parametrize(
    ("listed", "files", "expected"),
    [
        ("0::/job/step\n", {"job/memory.max": "3000000", "job/step/memory.max": "max"}, 3_000_000),
        ("0::/of/the/host\n", {"memory.max": "2000000"}, 2_000_000),
        ("0::/../..\n", {"memory.max": "2000000"}, 2_000_000),
        (
            "5:cpu:/step\n4:memory:/po:d\n0::/\n",
            {"memory/po:d/memory.limit_in_bytes": "4000000", "memory/step/memory.limit_in_bytes": "1000000"},
            4_000_000,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("0::/\n", {}, None),
    ],
)
def test_memory_is_what_a_container_is_held_to(
    tmp_path: Path, listed: str, files: dict[str, str], expected: int | None
) -> None:
    """Both versions of control groups, limits of an outer group, paths that are the host's, and none at all."""
    (tmp_path / "cgroup").write_text(listed)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    pages = Path("/proc/meminfo").read_text().split()
    found = host_memory_bytes(tmp_path / "fs", tmp_path / "cgroup")
    assert found == (expected or int(pages[pages.index("MemTotal:") + 1]) * 1024)


def test_a_dtype_that_is_as_fast_is_not_advised_against() -> None:
    v100, h100 = hardware("v100-sxm2-32gb").device, hardware("h100").device
    assert h100.peak_flops_per_s["float16"] == h100.peak_flops_per_s[h100.half]
    assert slow_dtype_notes(h100, "float16") == []
    (note,) = slow_dtype_notes(v100, "bfloat16")
    assert note.endswith("train in float16 there")
