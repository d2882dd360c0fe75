"""Traces added up by kind: a trace written by hand, a GPU's, and what torch.profiler records of a real step."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

import autopar
from autopar.cli import main
from autopar.planning import hardware_in
from autopar.plans.corrections import KindTimes, compared, corrected
from autopar.plans.measured import KINDS, Measured, measured
from costmodel.collectives import collective_s
from costmodel.hardware import Device, topology
from costmodel.hardware_file import save_hardware
from costmodel.presets import hardware

# name, category, thread, start and duration in microseconds
CPU = [
    ("ProfilerStep#4", "user_annotation", 1, 0, 1000),
    ("aten::linear", "cpu_op", 1, 0, 300),
    ("aten::addmm", "cpu_op", 1, 50, 200),
    ("aten::gelu", "cpu_op", 1, 300, 70),
    ("aten::scaled_dot_product_attention", "cpu_op", 1, 370, 30),
    ("_c10d_functional::reduce_scatter_tensor", "cpu_op", 1, 400, 20),
    ("c10d::reduce_scatter_tensor_coalesced_", "cpu_op", 1, 405, 10),
    ("_c10d_functional::wait_tensor", "cpu_op", 1, 420, 180),
    ("gloo:all_reduce", "user_annotation", 2, 410, 185),
    ("aten::copy_", "cpu_op", 2, 420, 100),
    ("Optimizer.step#AdamW.step", "user_annotation", 1, 600, 200),
    ("aten::mm", "cpu_op", 1, 650, 100),
]
GPU = [
    ("ProfilerStep#1", "user_annotation", 1, 0, 1000),
    ("ProfilerStep#2", "user_annotation", 1, 1000, 3000),
    ("aten::mm", "cpu_op", 1, 0, 900),
    ("nvjet_tst_128x256_64x4_h_bz_TNT", "kernel", 7, 100, 200),
    ("void pytorch_flash::flash_fwd_kernel<...>", "kernel", 7, 300, 60),
    ("triton_poi_fused_add_0", "kernel", 7, 360, 40),
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "kernel", 8, 100, 500),
    ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "kernel", 8, 700, 80),
    ("Optimizer.step#AdamW.step", "gpu_user_annotation", 7, 3000, 100),
    ("multi_tensor_apply_kernel", "kernel", 7, 3010, 50),
]


def write(path: Path, slices: list[tuple[str, str, int, float, float]]) -> Path:
    events = [
        {"ph": "X", "name": name, "cat": cat, "pid": 1, "tid": thread, "ts": start, "dur": length}
        for name, cat, thread, start, length in slices
    ]
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}))
    return path


def test_a_cpus_ops_count_without_what_they_call(tmp_path: Path) -> None:
    found = measured(write(tmp_path / "trace.json", CPU))
    assert found.steps == 1
    assert found.step_time_s == pytest.approx(1000e-6)
    wanted = {"matmul": 200, "attention": 30, "other": 100 + 70, "reduce_scatter": 185, "optimizer": 200}
    assert {k: round(1e6 * s, 3) for k, s in found.seconds.items() if s} == wanted


def test_a_gpus_kernels_count_by_name(tmp_path: Path) -> None:
    found = measured(write(tmp_path / "trace.json", GPU))
    assert found.steps == 2
    assert found.step_time_s == pytest.approx(2000e-6)  # the median of 1000 and 3000
    wanted = {"matmul": 100, "attention": 30, "other": 20, "all_gather": 250, "all_to_all": 40, "optimizer": 25}
    assert {k: round(1e6 * s, 3) for k, s in found.seconds.items() if s} == wanted


def test_a_gpus_steps_are_where_its_own_marks_are(tmp_path: Path) -> None:
    lag = [(name, cat, thread, start + 2500 * (cat == "kernel"), length) for name, cat, thread, start, length in GPU]
    marks = [(name, "gpu_user_annotation", 7, start + 2500, length) for name, _, _, start, length in GPU[:2]]
    after = ("nvjet_late", "kernel", 7, 6500, 100)  # of a step that is not marked
    moved = [each for each in lag if each[1] != "gpu_user_annotation"]
    update = ("Optimizer.step#AdamW.step", "gpu_user_annotation", 7, 5500, 100)
    found = measured(write(tmp_path / "lag.json", [*moved, *marks, update, after]))
    wanted = measured(write(tmp_path / "trace.json", GPU))
    assert found.seconds == pytest.approx(wanted.seconds)
    assert (found.steps, found.step_time_s) == (2, pytest.approx(wanted.step_time_s))


def test_a_trace_without_marks_is_told_as_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = autopar.plan(nn.Linear(16, 16), {"dp": 2}, (torch.randn(4, 16),), hardware="h100")
    plan.save(tmp_path / "plan.json")
    trace = write(tmp_path / "trace.json", [each for each in CPU if "Step#" not in each[0]])
    assert main(["diff", "--measured", str(trace), str(tmp_path / "plan.json")]) == 0
    assert "The trace marks no steps" in capsys.readouterr().out
    assert main(["diff", "--measured", str(write(trace, CPU)), str(tmp_path / "plan.json")]) == 0
    assert "marks no steps" not in capsys.readouterr().out


def rates(device: Device) -> dict[str, float]:
    """What a device's products, attention and memory reach, per second."""
    peak = device.peak_flops_per_s["float32"]
    return {
        "products": peak * device.matmul_efficiency * device.sustained,
        "attention": peak * device.attention_efficiency,
        "memory": device.memory_bytes_per_s * device.memory_efficiency,
        "cache": device.memory_efficiency * device.cache_bytes_per_s,
    }


@pytest.mark.parametrize("faster", [1.1, 1.3, 4.0])
def test_what_is_faster_than_a_peak_is_read_back_at_its_rates(faster: float, tmp_path: Path) -> None:
    cpu = hardware("cpu")
    rows = [KindTimes(kind, faster, 1.0) for kind in ("matmul", "attention", "other")]
    save_hardware(corrected(cpu, rows, "a trace"), tmp_path / "corrected.json")
    found = hardware(str(tmp_path / "corrected.json")).device
    for name, rate in rates(cpu.device).items():
        assert rates(found)[name] == pytest.approx(rate * faster), name


def test_hardware_is_corrected_by_what_was_measured() -> None:
    h100 = hardware("h100")
    rows = [KindTimes("step", 1, 9), KindTimes("matmul", 1, 2), KindTimes("other", 2, 1), KindTimes("all_gather", 1, 4)]
    found = corrected(h100, [*rows, KindTimes("all_reduce", 3, 4), KindTimes("attention", 0, 1)], "a trace")
    assert found.device.sustained == pytest.approx(h100.device.sustained / 2)
    assert rates(found.device)["memory"] == pytest.approx(rates(h100.device)["memory"] * 2)
    assert found.device.memory_efficiency == 1.0  # a share is none above 1: the peak was too low
    assert found.device.attention_efficiency == h100.device.attention_efficiency  # nothing was predicted
    assert found.intra_node.bytes_per_s == pytest.approx(h100.intra_node.bytes_per_s / 2)  # 8 s for 4
    assert found.inter_node.latency_s == pytest.approx(h100.inter_node.latency_s * 2)


@pytest.mark.parametrize("times", [0.5, 2.0])
@pytest.mark.parametrize("name", ["h100", "mi300x", "cpu"])  # multicast, wires in pairs, own figures per kind
def test_collectives_take_as_much_longer_as_was_measured(name: str, times: float) -> None:
    """Short ones and long ones, all but the copy of a rank's own part, which no wire slows."""
    machine, kinds = hardware(name), ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    if name == "cpu":
        own = dict.fromkeys(kinds, (3e-5, 2e-6, 1e9))
        machine = replace(machine, intra_node=replace(machine.intra_node, measured=own))
    found = corrected(machine, [KindTimes(kind, 1.0, times) for kind in kinds], "a trace")
    for kind, size, ranks in product(kinds, (1e3, 4e9), (4, 8, 256)):
        then, now = (topology(each, {"dp": ranks}) for each in (machine, found))
        before, after = (collective_s(kind, size, (0,), each) for each in (then, now))
        copied_s = size / ranks / then.device.memory_bytes_per_s
        assert after == pytest.approx(times * before, rel=1e-3, abs=3.01 * copied_s), (kind, size, ranks)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (gzip.compress(b"[]" * 1000, mtime=0)[:-9], "not JSON"),
        (gzip.compress(b"[]" * 1000, mtime=0)[:10] + b"\xff" * 20, "not JSON"),
        (b'{"a": 1}', "no traceEvents"),
        (b'{"traceEvents": []}', "without ops or kernels"),
        (
            b'{"traceEvents": [{"ph": "X", "name": "aten::mm", "cat": "cpu_op", "ts": 1, "dur": -3}]}',
            "an event that torch.profiler does not write",
        ),
        (b'{"traceEvents": [3]}', "an event that torch.profiler does not write"),
        (b'[{"ph": "X", "cat": "cpu_op", "ts": "now", "dur": 1}]', "an event that torch.profiler does not write"),
    ],
)
def test_what_is_no_trace_is_refused(text: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_bytes(text)
    with pytest.raises(ValueError, match=told):
        measured(tmp_path / "trace.json")


def test_what_gloo_is_asked_for_as_an_exchange_counts_as_what_the_plan_has() -> None:
    def moves(kind: str, seconds: float) -> Any:
        return SimpleNamespace(kind=kind, seconds=seconds)

    breakdown = SimpleNamespace(compute_by_kind={}, optimizer_s=0.0)
    moved = [moves("reduce_scatter", 3.0), moves("all_to_all", 1.0)]
    plan: Any = SimpleNamespace(accumulate=1, breakdown=breakdown, collectives=moved, step_time_s=4.0)
    seconds = dict.fromkeys(KINDS, 0.0) | {"all_to_all": 8.0}
    for gloo, expected in ((True, (6.0, 2.0)), (False, (0.0, 8.0))):
        rows = {row.kind: row.measured_s for row in compared(plan, Measured(9.0, seconds, 1, True, gloo))}
        assert (rows["reduce_scatter"], rows["all_to_all"]) == expected


# -- a real step -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x))).pow(2).mean()


def trace_a_step(rank: int, ranks: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    options = autopar.Options(compile=False, progress=False, pins={"up.weight": "S(0)", "down.weight": "S(1)"})
    plan = autopar.plan(Mlp(), mesh, (x,), options=options)
    model = autopar.apply(Mlp(), plan, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(f"{folder}/trace{rank}.json"),
    ) as profiler:
        for _ in range(3):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    if rank == 0:
        plan.save(f"{folder}/plan.json")


def test_a_real_trace_beside_its_plan_corrects_the_hardware(tmp_path: Path, capsys: Any) -> None:
    run_ranks(trace_a_step, 2, str(tmp_path))
    trace, plan, corrected_file = tmp_path / "trace0.json", tmp_path / "plan.json", tmp_path / "hardware.json"
    assert main(["diff", "--measured", str(trace), str(plan), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert found["steps"] == 2
    moved = {each.kind for each in autopar.Plan.load(plan).collectives}
    assert moved
    for kind in ("step", "matmul", "other", "optimizer", *moved):
        assert kinds[kind]["predicted_s"] > 0, kind
        assert kinds[kind]["measured_s"] > 0, kind
    assert sum(kinds[kind]["measured_s"] for kind in ("matmul", "other", "optimizer")) < kinds["step"]["measured_s"]
    call = ["calibrate", "--from-trace", str(trace), "--plan", str(plan), "-o", str(corrected_file), "--json"]
    assert main(call) == 0
    before, after = hardware_in(autopar.Plan.load(plan)), hardware(corrected_file)
    slower = kinds["matmul"]["measured_s"] / kinds["matmul"]["predicted_s"]
    assert rates(after.device)["products"] == pytest.approx(rates(before.device)["products"] / slower)
    made = autopar.plan(
        Mlp(), {"tp": 2}, (torch.empty(64, 256),), hardware=str(corrected_file),
        options=autopar.Options(compile=False, progress=False, pins={"up.weight": "S(0)", "down.weight": "S(1)"}),
    )  # fmt: skip
    again = made.breakdown.compute_by_kind["other"]
    assert again == pytest.approx(kinds["other"]["measured_s"], rel=0.2)
