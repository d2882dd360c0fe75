"""Stages are told on rank 0 alone: lines on standard error, loggers by name, artefacts in torch's structured trace."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

import autopar
from autopar.stages import Stages

ROOT = Path(__file__).parent.parent
PROGRAM = """
import torch, autopar
from test_autopar_stages import Square
autopar.plan(Square(), {"dp": 2}, (torch.randn(4, 16),), hardware="h100")
"""


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).pow(2).mean()


def test_torchs_own_switches_show_stages_and_artefacts(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "TORCH_LOGS": "+autopar",
        "TORCH_TRACE": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if "autopar/stages.py" in line and line.endswith("] capturing the model")]
    assert [line for line in lines if line.startswith("autopar: [") and line.endswith("s] solving auto")]
    (written,) = tmp_path.glob("*.log")
    heads = [json.loads(line.partition(" ")[2].split("] ", 1)[1]) for line in written.read_text().splitlines()
             if '"artifact"' in line]  # fmt: skip
    assert {"name": "autopar_plan", "encoding": "json"} in [head["artifact"] for head in heads]


def test_a_stage_of_many_parts_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with Stages() as tell:
        for stage in ("pricing", "playing: 1 x 4 x 1", "playing: 2 x 2 x 1", "drawing", "playing: 4 x 1 x 1"):
            tell(stage)
    told = [line.partition("s] ")[2] for line in capfd.readouterr().err.splitlines()]
    assert told == ["pricing", "playing: 1 x 4 x 1", "drawing"]


def test_no_standard_error_is_no_failure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Stages() as tell:
        tell("pricing")
    assert capfd.readouterr() == ("", "")


def test_a_stage_that_takes_long_is_told_again_with_its_time(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopar.stages._STILL_S", 0.5)
    with Stages() as tell:
        tell("compiling")
        time.sleep(1.5)
    time.sleep(1.2)
    told = [line.partition("s] ")[2] for line in capfd.readouterr().err.splitlines()]
    assert told == ["compiling", "still compiling, 1 s so far"]


def test_a_quiet_call_logs_and_prints_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="autopar"):
        autopar.plan(
            Square(), {"dp": 2}, (torch.randn(4, 16),), hardware="h100", options=autopar.Options(progress=False)
        )
    assert "capturing the model" in [record.message for record in caplog.records if record.name == "autopar.stages"]
    assert capfd.readouterr().err == ""


def test_a_rank_that_does_not_speak_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Stages(speaks=False) as tell:
        tell("anything")
    assert capfd.readouterr().err == ""


def said(rank: int, ranks: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    sys.stderr = open(f"{folder}/{rank}", "w", buffering=1)  # noqa: SIM115
    for name in ("autopar", "passes", "costmodel", "torch.__trace"):
        logging.getLogger(name).addHandler(logging.FileHandler(f"{folder}/{rank}.{name}"))
        logging.getLogger(name).setLevel(logging.DEBUG)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    autopar.parallelize(Square(), mesh, (torch.randn(4, 16),), options=autopar.Options(compile=False))


def test_parallelize_tells_each_stage_on_rank_0(tmp_path: Path) -> None:
    run_ranks(said, 2, str(tmp_path))
    lines = (tmp_path / "0").read_text().splitlines()
    stages = [line.partition("s] ")[2] for line in lines if line.startswith("autopar: [")]
    assert stages[0] == "capturing the model"
    assert stages[-2:] == ["rewriting the graph for a rank", "splitting forward and backward"]
    assert "autopar" not in (tmp_path / "1").read_text()
    assert (tmp_path / "0.autopar").read_text().splitlines() == stages
    assert (tmp_path / "0.torch.__trace").read_text()
    for name in ("autopar", "passes", "costmodel", "torch.__trace"):
        assert (tmp_path / f"1.{name}").read_text() == ""
