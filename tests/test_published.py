"""The rows of published runs, as entered: ranks, batches and figures that fit each other. None is priced."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from published import HELD_OUT, Run, runs

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
    """Products and causal attention, by hand: 2 per multiply-add, three times a forward, four with full recompute."""
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
        peak = row.machine.device.peak_flops_per_s["float8" if row.line["precision"] == "fp8" else "bfloat16"]
        assert 0.04 < flops / row.measured_s / peak < 0.8, f"{row.source} {row.line['model']}: {row.measured_s} s"


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


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    line = {**ROWS[0].line, "global_batch": str(ROWS[0].number("global_batch") + 1)}
    with pytest.raises(ValueError, match="global batch"):
        _ = Run(line).setup


def test_copies_of_a_state_that_is_not_priced_so_are_refused() -> None:
    row = next(row for row in ROWS if row.told("replicas"))
    for changed in ({"state": "zero1"}, {"replicas": "3"}):
        with pytest.raises(ValueError, match="copies"):
            _ = Run({**row.line, **changed}).setup
