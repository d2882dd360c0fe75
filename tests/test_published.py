"""The rows of published runs, as entered: ranks, batches and figures that fit each other. And how a file is read:
what it may lack, and what is refused."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moved_bytes import bytes_a_logit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import published
from published import HELD_OUT, Fault, RefusedError, Run, read, runs

from costmodel.presets import hardware

ROWS = runs()


@pytest.mark.parametrize("path", sorted({row.file.name for row in ROWS}))
def test_ranks_and_batch_are_those_of_the_gpus(path: str) -> None:
    rows = [row for row in ROWS if row.file.name == path]
    assert rows
    for row in rows:
        number, told = row.number, f"{row.source} {row.line['model']} on {row.line['gpus']}"
        assert number("dp") * number("tp") * number("pp") * number("cp") == number("gpus") == row.setup.ranks, told
        assert row.setup.global_batch == number("global_batch"), told


def test_no_run_computes_faster_than_its_gpus() -> None:
    """Products and causal attention, by hand: 2 per multiply-add, three times a forward, four with full recompute.

    An RTX 4090 clocks above what its peak is told for: 81%. Where a source tells the rate itself, it is that: AWS's
    runs of one sequence at a time reach 1% and 3%.
    """
    told = {15.76: 153.9, 33.36: 72.7, 12.21: 198.6, 34.17: 71.0, 8.6: 43.9, 27.89: 13.5, 9.24: 40.8, 27.14: 13.9}
    for row in ROWS:
        n = row.number
        hidden, head = n("hidden"), n("hidden") // n("heads")
        head = int(row.told("head") or head)
        gates = 3 if row.line["family"] in ("llama", "qwen3_moe") else 2  # of experts, those that a token has: `ffn`
        width = n("heads") * head
        per_layer = 2 * hidden * width + 2 * hidden * n("kv_heads") * head + gates * hidden * n("ffn")
        forward = 2 * (n("layers") * (per_layer + n("seq") * width) + hidden * n("vocab"))
        times = 4 if row.line["recompute"] == "full" else 3
        flops = times * forward * n("seq") * n("global_batch") / n("gpus")
        dtype = {"fp8": "float8", "fp16": "float16"}.get(row.line["precision"], "bfloat16")
        peak = row.machine.device.peak_flops_per_s[dtype]
        if row.line["source"].startswith("awslabs"):
            assert flops / row.measured_s == pytest.approx(1e12 * told[row.measured_s], rel=0.02)
            continue
        assert 0.04 < flops / row.measured_s / peak < 0.82, f"{row.source} {row.line['model']}: {row.measured_s} s"


def test_a_network_of_its_own_and_copies_of_the_state() -> None:
    row = next(row for row in ROWS if row.told("replicas") and row.told("node_gbps"))
    assert row.file == HELD_OUT
    assert row.setup.dp_replicate == int(row.told("replicas"))
    assert row.setup.data_ranks == row.number("dp")
    preset = replace(row, line={**row.line, "node_gbps": ""}).machine
    # 400 of 8 x 200 gigabits per second
    assert row.line["hardware"] == "a100-80gb"
    assert row.told("node_gbps") == "400"
    assert row.machine.inter_node.bytes_per_s == pytest.approx(preset.inter_node.bytes_per_s / 4)
    assert row.machine.inter_node.wide_bytes_per_s == pytest.approx(preset.inter_node.wide_bytes_per_s / 4)
    assert row.machine.intra_node == preset.intra_node


# -- what a file may lack, and what is refused -------------------------------------------------------------------------

LATE = next(row for row in ROWS if row.line["model"] == "MPT-125m" and row.number("gpus") == 8)
PLAIN = replace(LATE, line={**LATE.line, "gathers": ""})
PIPELINE = next(row for row in ROWS if row.number("virtual") > 1 and row.number("tp") > 1)
COPIES = next(row for row in ROWS if row.told("replicas"))
ON_B200 = next(row for row in ROWS if row.line["hardware"] == "b200")
OPTIONAL = ("tp", "pp", "virtual", "cp", "tp_overlap", "state_overlap", "balanced", "experts_beside", "gathers",
            "dispatcher", "ends", "experts_cut", "replicas", "node_gbps", "node_gpus", "ep", "head", "experts",
            "experts_per_token", "peak_gib", "peak_of", "assumed", "added")  # fmt: skip


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def refused(row: Run, **changed: str) -> list[Fault]:
    with pytest.raises(RefusedError) as raised:
        replace(row, line={**row.line, **changed})
    return list(raised.value.faults)


def columns(row: Run, **changed: str) -> list[str]:
    return [fault.column for fault in refused(row, **changed)]


@pytest.mark.parametrize("absent", [True, False])
def test_optional_columns_may_be_absent_or_empty(tmp_path: Path, absent: bool) -> None:
    line = {name: value for name, value in PLAIN.line.items() if name not in OPTIONAL}
    if not absent:
        line |= dict.fromkeys(OPTIONAL, "")
    (row,) = runs(write(tmp_path / "mine.csv", [line]))
    assert row.setup == PLAIN.setup
    assert row.machine == PLAIN.machine
    assert row.measured_s == PLAIN.measured_s


def test_all_bad_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", [
        PLAIN.line,
        {**PLAIN.line, "hardware": "h10", "measured": "fast"},
        {**PLAIN.line, "gpus": "9"},
        {**PIPELINE.line, "micro_batch": ""},
        PIPELINE.line,
    ])  # fmt: skip
    found, faults = read(path)
    assert [row.line["model"] for row in found] == [PLAIN.line["model"], PIPELINE.line["model"]]
    assert [(fault.file, fault.line, fault.column, fault.found) for fault in faults] == [
        (path, 3, "measured", "fast"), (path, 3, "hardware", "h10"), (path, 4, "gpus", "9"),
        (path, 5, "micro_batch", ""),
    ]  # fmt: skip
    assert str(faults[2]) == f"{path}:4, column gpus: found '9'; dp x tp x pp x cp is 8"
    with pytest.raises(RefusedError, match="h10"):
        runs(path)


def test_good_rows_are_priced_beside_bad_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden": "64", "layers": "2", "heads": "2", "kv_heads": "2", "ffn": "128", "vocab": "128", "seq": "32"}
    good = {**PLAIN.line, **small, "model": "small"}
    path = write(tmp_path / "mine.csv", [good, {**good, "state": "zero4"}])
    monkeypatch.setattr(sys, "argv", ["published.py", "--data", str(path)])
    monkeypatch.setattr(published, "results", lambda chosen, jobs: iter(published._priced(chosen)))  # in this process
    assert published.main() == 1
    printed = capsys.readouterr()
    assert "| small " in printed.out
    assert f"{path}:3, column state: found 'zero4'; known are zero0, " in printed.err
    assert "1 rows refused, 1 priced" in printed.err


def test_a_row_without_a_price_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(prices: object, run: Run) -> None:
        raise ValueError("no figures for this")

    monkeypatch.setattr(published.Prices, "of", without)
    monkeypatch.setattr(published.Prices, "__init__", lambda prices, run: None)
    (fault,) = published._priced([replace(PLAIN, at=7)])
    assert isinstance(fault, Fault)
    assert (fault.line, fault.instead) == (7, "no figures for this")
    assert PLAIN.line["model"] in fault.found


@pytest.mark.parametrize(
    ("column", "typo", "known"),
    [
        ("attention", "fa3", "fa1, fa2, cudnn, aiter, aiter16, unfused"), ("hardware", "h100x", "h100"),
        ("state", "fsdp", "zero3"),
        ("family", "mpt", "gpt"), ("tied", "true", "yes, no"), ("precision", "fp4", "bf16, fp16, fp8"),
        ("stored", "float32", "bf16, fp32"), ("gradients", "float32", "bf16, fp32"), ("gathers", "waits", "waited"),
        ("sequence_parallel", "1", "yes, no"), ("recompute", "some", "selective"), ("compiled", "true", "blocks"),
        ("tp_overlap", "true", "waited"), ("state_overlap", "waited", "yes, gradients, no"), ("added", "yes", "apart"),
        ("unit", "s", "s/step"), ("peak_of", "used", "allocated, reserved"),
    ],
)  # fmt: skip
def test_a_typo_is_refused_with_what_is_known(column: str, typo: str, known: str) -> None:
    (fault,) = refused(PLAIN, **{column: typo})
    assert (fault.column, fault.found) == (column, typo)
    assert known in fault.instead


@pytest.mark.parametrize("value", ["", "-1", "0", "1.5", "many", "nan"])
def test_a_count_that_is_none_is_refused(value: str) -> None:
    assert columns(PLAIN, layers=value) == ["layers"]


@pytest.mark.parametrize("value", ["", "-1", "0", "inf", "quick"])
def test_a_measurement_that_is_none_is_refused(value: str) -> None:
    assert columns(PLAIN, measured=value) == ["measured"]


def test_ranks_that_are_not_the_gpus_are_refused() -> None:
    assert columns(PLAIN, gpus="16") == ["gpus"]
    assert columns(PLAIN, cp="2") == ["gpus"]


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    (fault,) = refused(PLAIN, global_batch=str(PLAIN.number("global_batch") + 1))
    assert fault.column == "global_batch"
    assert fault.instead == f"a multiple of dp x micro_batch = {8 * PLAIN.number('micro_batch')} would do"


def test_copies_of_a_state_that_is_not_priced_so_are_refused() -> None:
    assert columns(COPIES, state="zero1") == ["replicas"]
    assert columns(COPIES, replicas="3") == ["replicas"]


def test_chunks_that_do_not_divide_a_stage_are_refused() -> None:
    """96 layers on 16 stages are 6 each: 3 chunks do, 5 do not. 126 on 8 are 16, the last stage having fewer."""
    many = {"layers": "96", "dp": "1", "tp": "8", "pp": "16", "cp": "1", "gpus": "128"}
    many |= {"global_batch": "64", "micro_batch": "1"}
    assert replace(PIPELINE, line={**PIPELINE.line, **many, "virtual": "3"}).setup.virtual == 3
    assert columns(PIPELINE, **many, virtual="5") == ["virtual"]
    uneven = {**many, "layers": "126", "pp": "8", "gpus": "64"}
    assert replace(PIPELINE, line={**PIPELINE.line, **uneven, "virtual": "2"}).setup.virtual == 2
    assert columns(PIPELINE, **uneven, virtual="3") == ["virtual"]
    assert columns(PIPELINE, **{**many, "layers": "8"}, virtual="1") == ["pp"]
    assert columns(PLAIN, virtual="2") == ["virtual"]


def test_flops_of_a_mixture_are_those_of_a_tokens_experts() -> None:
    """By hand, of Mixtral 8x22B: two of eight experts in each of 56 layers, the head, causal attention."""
    row = next(row for row in ROWS if row.line["model"] == "Mixtral 8x22B" and row.line["precision"] == "bf16")
    layer = 6144 * (2 * 48 * 128 + 2 * 8 * 128) + 2 * 3 * 6144 * 16384
    token = 6 * (56 * layer + 6144 * 32768) + 3 * 56 * 2 * 2 * 6144 * 4096 / 2
    assert row.measured_s == pytest.approx(256 * 4096 * token / 128 / float(row.line["measured"]) / 1e12)


def test_gradients_that_are_added_up_apart() -> None:
    assert PIPELINE.setup.adds_in_products
    assert not replace(PIPELINE, line={**PIPELINE.line, "added": "apart"}).setup.adds_in_products
    assert columns(PLAIN, added="apart") == ["added"]


def test_what_of_state_was_waited_for() -> None:
    """Sharded parameters are gathered as plans do it; copies of all gather nothing."""
    staged = {"state": "zero1"}
    for told, overlap, gathers_waited in (("", True, False), ("gradients", True, True), ("no", False, False)):
        setup = replace(PIPELINE, line={**PIPELINE.line, **staged, "state_overlap": told}).setup
        assert (setup.overlap, setup.gathers_waited) == (overlap, gathers_waited)
    assert columns(PLAIN, state_overlap="no") == ["state_overlap"]
    assert columns(PIPELINE, state="zero0", state_overlap="gradients") == ["state_overlap"]


def test_experts_of_a_model_without_them_are_refused() -> None:
    assert columns(PLAIN, ep="2", experts="8", experts_beside="yes") == ["ep", "experts"]
    assert columns(PLAIN, experts_beside="yes") == ["experts_beside"]
    assert columns(PLAIN, dispatcher="deepep") == ["dispatcher"]
    assert columns(PLAIN, ends="yes") == ["ends"]
    assert columns(PLAIN, experts_cut="yes") == ["experts_cut"]
    row = next(row for row in ROWS if row.line["experts"])
    assert columns(row, experts="", head="") == ["head", "experts"]


def test_heads_that_tensor_parallel_ranks_cannot_share_are_refused() -> None:
    changed = {"hidden": "3072", "heads": "24", "kv_heads": "24", "dp": "1", "tp": "16", "gpus": "16"}
    (fault,) = refused(PLAIN, **changed)
    assert (fault.column, fault.found, fault.instead) == ("tp", "16", "a divisor of 24 heads would do")
    assert columns(PLAIN, heads="7", kv_heads="7", hidden="704") == ["heads"]


@pytest.mark.parametrize(("preset", "of_preset"), [("h100-500w", "h100"), ("b200-efa", "b200"), ("h800", "h100")])
def test_a_network_of_its_own_beside_any_preset(preset: str, of_preset: str) -> None:
    row = replace(ON_B200, line={**ON_B200.line, "hardware": preset, "node_gbps": "800"})
    link, full = row.machine.inter_node, hardware(preset).inter_node
    assert link.bytes_per_s == pytest.approx(full.bytes_per_s / 4)  # 800 of 8 x 400 gigabits per second
    assert link.latency_s == full.latency_s
    like = replace(ON_B200, line={**ON_B200.line, "hardware": of_preset}).machine.device
    assert row.machine.device.attention_efficiency == like.attention_efficiency


def test_a_network_of_its_own_where_the_usual_one_is_not_known_is_refused() -> None:
    (fault,) = refused(PLAIN, hardware="cpu", attention="unfused", node_gbps="100")
    assert fault.column == "node_gbps"
    assert "h100" in fault.instead


def test_the_slow_sixteen_bits_of_a_gpu_are_refused() -> None:
    """V100 multiplies bf16 at 14 TFLOP/s, fp16 at 125."""
    (fault,) = refused(PLAIN, hardware="v100-sxm2-32gb", attention="unfused")
    assert (fault.column, fault.instead) == ("precision", "on v100-sxm2-32gb fp16 would do")
    row = replace(PLAIN, line={**PLAIN.line, "hardware": "v100-sxm2-32gb", "attention": "unfused", "precision": "fp16"})
    made = published.model_of(replace(row, line={**row.line, "stored": "bf16", "layers": "1"}))
    assert {p.dtype for p in made.parameters()} == {torch.float16}


def test_kernels_without_figures_are_refused() -> None:
    (fault,) = refused(ON_B200, attention="fa2")
    assert fault.column == "attention"
    assert fault.instead == "no figures for attention kernels 'fa2' on b200; known are cudnn"
    assert columns(PLAIN, hardware="a100-80gb", precision="fp8") == ["precision"]


def test_columns_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    line = {("atention" if name == "attention" else name): value for name, value in PLAIN.line.items()}
    found, faults = read(write(tmp_path / "mine.csv", [line]))
    assert not found
    assert [(fault.line, fault.column) for fault in faults] == [(1, "attention"), (1, "atention")]
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert {"source", "model", "measured"} <= {fault.column for fault in read(empty)[1]}


def test_a_row_of_too_many_values_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", [PLAIN.line])
    path.write_text(path.read_text(encoding="utf-8").rstrip() + ", and more\n", encoding="utf-8")
    found, (fault,) = read(path)
    assert not found
    assert (fault.line, fault.found) == (2, " and more")


class Moved(TorchDispatchMode):
    """Bytes that ops read and write, views and what is picked by index apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not any(word in str(func) for word in ("nll_loss", "index")):
            read = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            self.bytes += sum(t.numel() * t.itemsize for t in (*read, made))
        elif "nll_loss_backward" in str(func):
            self.bytes += made.numel() * made.itemsize  # zeros, but for one entry a row
        return made


def megatrons(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """What Megatron-LM's vocabulary-parallel cross-entropy runs on one rank's logits, forward and backward."""
    rows = torch.arange(len(targets))
    found = logits.float()
    found -= found.amax(-1, keepdim=True)
    found[rows, targets]
    torch.exp(found, out=found)
    found.div_(found.sum(-1, keepdim=True))
    found[rows, targets] -= 1.0
    found.mul_(torch.full((len(targets), 1), 1 / len(targets))).bfloat16()


@pytest.mark.parametrize(("compiled", "known"), [("no", 36), ("layers", 52)])
def test_a_loss_moves_what_its_ops_do(compiled: str, known: int) -> None:
    """Per logit in bf16, of torch's cross-entropy in fp32 and of Megatron-LM's, as a dispatcher counts them."""
    logits = torch.randn(64, 4096).bfloat16()
    targets = torch.randint(0, 4096, (64,))
    with Moved() as moved:
        if compiled == "layers":
            megatrons(logits, targets)
        else:
            nn.functional.cross_entropy(logits.requires_grad_().float(), targets).backward()
    assert moved.bytes / logits.numel() == pytest.approx(known, rel=0.01)

    row = replace(PLAIN, line={**PLAIN.line, "compiled": compiled})
    assert bytes_a_logit(published._fused(row)) == pytest.approx(known, rel=0.1)
