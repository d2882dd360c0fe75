"""Calibration: fits recover a machine they are given samples of; real measurements give a usable file."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import costmodel
from costmodel import time_collectives
from costmodel.calibrate import save_calibration
from costmodel.fit import errors, fit
from costmodel.hardware import topology
from costmodel.hardware_file import load_hardware
from costmodel.presets import hardware
from costmodel.samples import AttentionSample, CollectiveSample, MatmulSample, MemorySample, Samples
from costmodel.time_collectives import measure_collectives, measure_groups, seen

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def wire_and_hops(kind: str, ranks: int, size: int) -> tuple[float, int]:
    """Ring volume and steps, written down again."""
    if kind == "all_reduce":
        return 2 * size * (ranks - 1) / ranks, 2 * (ranks - 1)
    return (size if kind == "broadcast" else size * (ranks - 1) / ranks), ranks - 1


def invented(*, ranks: int = 4, across: bool = False) -> Samples:
    """A host of 2 cores with 4 ranks: 40 fp32 GFLOP/s, 20 GB/s within 6 MB and 4 GB/s beyond, 10 us a launch, per rank;
    60 us a launch in a step, on a core of one's own; collectives start in 100 us, hop in 50 us and move 1 GB/s,
    reduce-scatter half of that."""
    launch = 10e-6
    matmuls = tuple(
        MatmulSample(dtype, m, n, k, launch + 2 * m * n * k / rate)
        for dtype, rate in (("float32", 40e9), ("bfloat16", 80e9))
        for m, n, k in ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024))
    )
    memory = tuple(
        MemorySample(size, launch + min(size, 6e6) / 20e9 + max(0.0, size - 6e6) / 4e9)
        for size in (96_000, 768_000, 6_000_000, 24_000_000, 60_000_000)
    )
    flops = 4 * 4 * 512**2 * 64
    attended = (
        AttentionSample("float32", 4, 512, 64, False, launch + flops / 20e9),
        AttentionSample("float32", 4, 512, 64, True, launch + 2.5 * flops / 16e9),
    )
    collectives = []
    for group in {ranks, max(2, ranks // 2)}:
        for kind in KINDS:
            for size in (4096, 1 << 18, 1 << 22, 1 << 24):
                wire, hops = wire_and_hops(kind, group, size)
                rate = 0.5e9 if kind == "reduce_scatter" else 1e9
                seconds = 100e-6 + hops * 50e-6 + wire / rate
                collectives.append(CollectiveSample(kind, group, size, across, seconds, cpu_s=0.3 * seconds))
    return Samples(
        "cpu", False, ranks, 2, 16 << 30, launch, 60e-6, 400e-6, matmuls, memory, attended, tuple(collectives)
    )


def test_fit_recovers_the_machine() -> None:
    samples = invented()
    fitted = fit(samples)
    rank = topology(fitted, {"x": 4})
    assert fitted.shared_host
    assert rank.device.memory_bytes_per_s == pytest.approx(4e9, rel=0.02)
    assert rank.device.cache_bytes_per_s == pytest.approx(20e9, rel=0.02)
    assert rank.device.cache_bytes == pytest.approx(6e6, rel=0.01)
    assert rank.device.kernel_launch_s == pytest.approx(60e-6 * 4 / 2), "4 ranks on 2 cores: twice as long"
    assert rank.device.update_s == pytest.approx(400e-6)
    assert rank.device.memory_bytes == 4 << 30
    assert rank.hardware.intra_node.sms == pytest.approx(0.3 * 4 / 2), "4 ranks on 2 cores: half a core each"
    link = rank.hardware.intra_node
    for kind in KINDS:
        base_s, hop_s, rate = link.measured[kind]
        assert base_s == pytest.approx(100e-6, rel=0.01)
        assert hop_s == pytest.approx(50e-6, rel=0.01)
        assert rate == pytest.approx(0.5e9 if kind == "reduce_scatter" else 1e9, rel=0.01)


def test_fit_explains_its_samples() -> None:
    samples = invented()
    found = errors(samples, fit(samples))
    assert set(found) == {"matmul", "memory", "attention", *KINDS}
    for kind, values in found.items():
        assert max(map(abs, values)) < (0.15 if kind == "matmul" else 0.03), kind


def test_a_time_that_hardly_grows_with_size_tells_no_rate() -> None:
    """On a busy machine all sizes take about as long; a slope through the noise once was 2e12 bytes/s."""
    sizes = (4096, 1 << 18, 1 << 22, 1 << 24)
    flat = tuple(CollectiveSample("all_gather", 2, n, False, 50e-3 * (1 + n / 2e12), 1e-3) for n in sizes)
    assert 1.6e8 < fit(replace(invented(), collectives=flat)).intra_node.measured["all_gather"][2] / 4 < 1.7e8


def test_a_rank_of_a_smaller_group_gets_a_larger_share() -> None:
    fitted = fit(invented())
    two, four = (topology(fitted, {"x": ranks}).device for ranks in (2, 4))
    assert two.peak_flops_per_s["float32"] == pytest.approx(2 * four.peak_flops_per_s["float32"])


def test_groups_across_nodes_fit_the_other_link() -> None:
    """4 ranks on 2 nodes of 2, of which only the groups across were timed."""
    samples = replace(invented(ranks=2, across=True), ranks_per_node=2)
    fitted = fit(samples)
    assert fitted.ranks_per_node == 2
    assert fitted.inter_node.measured["all_gather"][2] == pytest.approx(1e9, rel=0.01)
    assert not fitted.intra_node.measured


def test_without_collectives_the_link_stays_as_it_was() -> None:
    fitted = fit(replace(invented(), collectives=(), ranks_per_node=1))
    assert fitted.intra_node == hardware("cpu").intra_node


def test_a_known_gpu_starts_from_its_preset() -> None:
    samples = replace(
        invented(), device_name="NVIDIA H200", cuda=True, collectives=(), memory=(MemorySample(3 << 30, 7.6e-4),)
    )
    fitted = fit(samples)
    assert fitted.device.sm_count == 132
    assert not fitted.shared_host
    assert fitted.device.memory_bytes_per_s == pytest.approx((3 << 30) / 7.5e-4, rel=0.01)
    assert fitted.intra_node == hardware("h200").intra_node


def test_calibrating_two_ranks_gives_a_file_that_reads_back(tmp_path: Path) -> None:
    """Real processes over gloo, with little time: the figures are rough, so only their sanity is checked."""
    path = tmp_path / "here.json"
    fitted, found = save_calibration(path, device="cpu", ranks=2, budget_s=1.5)
    assert load_hardware(path) == fitted
    assert set(KINDS) < set(found)
    rank = topology(fitted, {"x": 2})
    assert 1e8 < rank.device.peak_flops_per_s["float32"] < 1e13
    assert 1e7 < rank.device.memory_bytes_per_s < 1e12
    assert 0 < rank.device.kernel_launch_s < 1e-2
    samples = json.loads(path.read_text())["samples"]
    assert samples["step_launch_s"] > samples["launch_s"], "an op's code has left the caches when a step comes to it"
    for base_s, hop_s, rate in rank.hardware.intra_node.measured.values():
        assert base_s + hop_s >= 0
        assert 1e5 < rate < 1e12


def groups_of(rank: int, ranks: int) -> tuple[CollectiveSample, ...]:
    """With one size and one block of calls, whatever noise there is: in this process alone."""
    time_collectives._CPU_PAYLOADS = (1 << 12,)
    time_collectives.seen = lambda block: block()  # type: ignore[assignment]
    return measure_groups(torch.device("cpu"), ranks, ranks, budget_s=0.1)


def test_four_ranks_measure_groups_of_all_and_of_half() -> None:
    """Half the ranks in turn with groups that cross theirs: where ranks could wait for each other forever."""
    for samples in run_ranks(groups_of, 4):
        sizes = {(sample.kind, sample.ranks) for sample in samples}
        assert sizes == {(kind, ranks) for kind in KINDS for ranks in (2, 4)}


def test_mistakes_are_refused(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="no process group"):
        measure_collectives()
    with pytest.raises(ValueError, match="ranks is 0"):
        save_calibration(tmp_path / "hardware.json", ranks=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA devices"):
            save_calibration(tmp_path / "hardware.json", device="cuda", ranks=2)


MEASURING = ("calibrate.py", "time_ops.py", "time_collectives.py", "products.py")


def test_only_what_is_measured_imports_torch_and_nothing_imports_upwards() -> None:
    """What a calibration runs, and the products that it times and programs run."""
    for file in Path(costmodel.__file__).parent.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
        assert not names & {"passes", "autopar"}, file
        assert "torch" not in names or file.name in MEASURING, file


def test_times_that_noise_hides_are_no_times() -> None:
    """Blocks of work alone that took longer than with a collective: asked again, and left out if that goes on."""
    noisy = iter([(-2e-4, 1e-4), (-1e-4, 0.0), (3e-4, 1e-4), (2e-4, -1e-5), (1e-4, 0.0), (4e-4, 2e-4)])
    assert seen(lambda: next(noisy)) == (2e-4, 0.0)
    assert seen(lambda: (-1e-5, 1e-5)) is None
