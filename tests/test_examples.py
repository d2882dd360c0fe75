"""The demo in its quick form and the GPU script on a CPU, run as a user would; what they conclude, checked by hand."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import forked, run_script

ROOT = Path(__file__).parent.parent


def imported(folder: str, name: str) -> Any:
    """A script as a module; it finds what lies beside it."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def run(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """A script's output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def test_quick_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The first job as a user starts it; ranks of the second are forks, which do not import torch once more."""
    demo = imported("examples", "demo")
    started = demo.start_ranks

    def start(phase: Any, arguments: list[str]) -> None:
        if phase.first == 0:
            return started(phase, arguments)
        options = (*arguments, f"--from-step={phase.first}")
        print(run_script(demo.RANKS, ROOT / "examples/demo.py", *options, folder=tmp_path))
        return None

    monkeypatch.setattr(demo, "start_ranks", start)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--quick", "--out", str(tmp_path / "demo")])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = demo.main()
    printed = capfd.readouterr()
    assert code == 0, printed.out[-2000:] + printed.err[-3000:]
    for part in ("Plan 'megatron' on dp=2 x tp=2", "Plan 'fsdp' on fsdp=4", "saved a checkpoint", "the same training"):
        assert part in printed.out
    one, first, second = (
        json.loads((tmp_path / f"demo/{name}.json").read_text())["losses"]
        for name in ("one_device", "from_0", "from_4")
    )
    assert list(one) == [*first, *second]
    assert one["7"] < one["0"] - 0.5
    for step, loss in {**first, **second}.items():
        assert loss == pytest.approx(one[step], rel=1e-5), step


def test_demo_tells_another_training_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = imported("examples", "demo")
    setup = demo.Setup(steps=4, saved_at=2)
    phases = [demo.Phase({"dp": 2, "tp": 2}, "megatron", 0, 2), demo.Phase({"fsdp": 4}, "fsdp", 2, 4)]
    demo.Curve({step: 4.0 - step for step in range(4)}, 1.0, 3).save(tmp_path / "one_device.json")
    demo.Curve({0: 4.0, 1: 3.0}, 1.0, 1).save(tmp_path / "from_0.json")
    demo.Curve({2: 2.0, 3: 1.0}, 1.0, 1).save(tmp_path / "from_2.json")
    assert demo.summary(setup, phases, tmp_path)
    demo.Curve({2: 2.0, 3: 1.001}, 1.0, 1).save(tmp_path / "from_2.json")
    assert not demo.summary(setup, phases, tmp_path)
    assert "1.0e-03 (step 3)" in capsys.readouterr().out
    demo.Curve({2: 2.0, 3: float("nan")}, 1.0, 1).save(tmp_path / "from_2.json")
    assert not demo.summary(setup, phases, tmp_path)


def a_part(arguments: list[str], environment: dict[str, str]) -> int:
    """What the GPU script's process for one measurement does."""
    os.environ.update(environment)
    sys.argv = arguments
    code: int = imported("benchmarks/gpu", "run").main()
    return code


def test_gpu_script_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first measurement in a process as the script starts it, the others in forks."""
    script = imported("benchmarks/gpu", "run")
    real, started = subprocess.run, []

    def start(command: list[str], **options: Any) -> Any:
        started.append(command)
        return real(command, **options) if len(started) == 1 else forked(a_part, command[1:], options["env"])

    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--small", "--out", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert script.main() == 0
    assert len(started) == 6
    results = json.loads((tmp_path / "results.json").read_text())
    eager, planned = results["train"]
    assert (eager["how"], planned["how"]) == ("eager", "autopar")
    assert planned["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    layouts = [("dp=8", "fsdp"), ("dp=2,tp=4", "megatron")]
    hows = ("by hand", "autopar")
    assert [(r["mesh"], r["strategy"], r["how"]) for r in results["rank0"]] == [
        (*x, how) for x in layouts for how in hows
    ]
    assert all(r["step_s"] > 0 and r["kernels"] > 0 for r in results["rank0"])
    for r in results["rank0"][1::2]:
        assert r["predicted_peak_bytes"] > 0
        assert {"step", "matmul", "optimizer"} <= {kind for kind, _, _ in r["kinds"]}
        # 7 products a layer and the head, each with two in backward; the plan makes some of them again.
        assert sum(count for _, count, _, _ in r["products"]) >= 3 * (2 * 7 + 1)
    assert "| dp=2,tp=4 |" in (tmp_path / "results.md").read_text()
    # The optimizer's states, two of each of 21 parameters, are there when a step's kernels are counted.
    filled = [count for r in results["rank0"] for name, count, _ in r["longest"] if name == "aten::zeros_like"]
    assert max(filled, default=0) < 2 * 21


def by_halves(script: Any, monkeypatch: pytest.MonkeyPatch, out: Path, half: str, left: int) -> None:
    """The script for one half on a CPU, where it is ended after so many measurements."""

    def measured(arguments: Any, *part: str) -> dict[str, Any]:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return {
            "how": part[1], "dtype": part[2], "losses": [2.0, 1.0], "step_s": 1.0, "prepared_s": 0.0, "peak_bytes": 1,
            "tokens": 1,
        }  # fmt: skip

    monkeypatch.setattr(script, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--only", half, "--out", str(out)])
    script.main()


def test_gpu_script_keeps_what_it_has_where_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        by_halves(imported("benchmarks/gpu", "run"), monkeypatch, tmp_path, "train", 3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["how"] for r in results["train"]] == ["eager", "torch.compile", "torch.compile, CUDA graphs"]
    assert results["torch"] == torch.__version__
    assert "CUDA graphs" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(("what", "other"), [("device", "NVIDIA H100"), ("torch", "2.11.0"), ("command", "--small")])
def test_gpu_script_mixes_no_halves_of_two_machines(
    what: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = imported("benchmarks/gpu", "run")
    by_halves(script, monkeypatch, tmp_path, "train", 99)
    path = tmp_path / "results.json"
    last = json.loads(path.read_text()) | {"rank0": [], "note": "of another run"}
    path.write_text(json.dumps(last))
    by_halves(script, monkeypatch, tmp_path, "train", 99)
    assert json.loads(path.read_text())["note"] == "of another run"
    path.write_text(text := json.dumps(last | {what: other}))
    with pytest.raises(SystemExit, match=rf"results.json is of {what} {other}, this is "):
        by_halves(script, monkeypatch, tmp_path, "train", 99)
    assert path.read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_script_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    assert imported("benchmarks/gpu", "run").main() == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_script_on_a_gpu(tmp_path: Path) -> None:
    found = run("benchmarks/gpu/run.py", "--device", "cuda", "--small", "--out", str(tmp_path))
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
