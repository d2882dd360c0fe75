"""Each command as a user runs it: what it prints, what it writes, its exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Here, autopar, environment, started
from schemas import conforms

from autopar.cli import main
from autopar.cli.main import COMMANDS


def test_plan_prints_the_report_and_writes_the_plan(here: Here) -> None:
    ran = here.planned
    assert ran.code == 0, ran.err
    assert "on dp=2 x tp=2 (4 x h100, 4 ranks per node)" in ran.out
    for section in ("What was decided", "Time per step", "Memory per rank", "made by hand", "Collectives"):
        assert section in ran.out
    assert json.loads(here.plan.read_text())["axes"] == [["dp", 2], ["tp", 2]]
    assert "</html>" in (here.folder / "report.html").read_text(encoding="utf-8")
    assert max(map(len, ran.out.splitlines())) <= 100
    assert "\033[" not in ran.out
    assert "solving auto" in ran.err  # a line per stage, where nobody looks on
    assert "\r" not in ran.err


def test_plan_as_json_is_the_plans_file_and_nothing_else(here: Here) -> None:
    assert here.as_json.code == 0, here.as_json.err
    assert here.as_json.json == json.loads(here.other.read_text())
    assert here.as_json.json["strategy"] == "fsdp"


def test_a_plan_has_the_options_of_its_flags(here: Here) -> None:
    on = ("plan", here.model, "--mesh", "dp=2,tp=2", "--hardware", "h100", "--strategy", "fsdp", "--json")
    assert not autopar(*on).json["options"]["async_tp"]
    for flag, name, asked in (
        ("--async-tp", "async_tp", True),
        ("--reshard-after-forward", "reshard_after_forward", True),
        ("--no-reshard-after-forward", "reshard_after_forward", False),
        ("--regather-activations", "regather_activations", True),
    ):
        found = autopar(*on, flag).json
        assert found["options"][name] is asked
        if name == "reshard_after_forward":
            gathers = [c for c in found["collectives"] if c["role"] == "parameter" and c["phase"] == "backward"]
            assert bool(gathers) is asked


def test_a_plan_that_does_not_fit_exits_1_and_says_what_would(here: Here) -> None:
    ran = autopar("plan", here.model, "--mesh", "dp=2", "--hardware", "h100", "--memory-budget", "20KiB")
    assert ran.code == 1
    assert ran.out == ""
    last = ran.err.splitlines()[-1]
    assert last.startswith("autopar plan: no plan fits")
    assert "What would fit" in last


def test_a_smaller_batch_that_fits_is_told(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """What four sequences take is too little for 16: the answer is four, by their own plan."""
    from transformers import LlamaConfig

    folder = here.folder / "long"
    folder.mkdir()
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    ).save_pretrained(folder)
    asked = ("plan", str(folder), "--mesh", "dp=2", "--hardware", "h100", "--seq", "512", "--recompute", "full")
    assert main([*asked, "--batch", "4", "--json"]) == 0
    budget = str(json.loads(capsys.readouterr().out)["peak_memory_bytes"])
    assert main([*asked, "--batch", "16", "--memory-budget", budget]) == 1
    assert "a batch per rank 4 times smaller" in capsys.readouterr().err


def test_inspect_counts_what_the_step_computes(here: Here) -> None:
    ran = autopar("inspect", here.model, "--mesh", "dp=2,tp=2", "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    products = [row for row in found["operations"] if row["op"] == "mm" and row["phase"] == "forward"]
    rows = 2 * 4 * 16
    assert [row["flops"] for row in products] == [2 * rows * 32 * 64, 2 * rows * 64 * 32, 2 * rows * 32 * 96]
    assert [row["module"] for row in products] == ["up", "down", "head"]
    assert all(row["layouts"] > 1 for row in products)
    assert found["parameters"] == 96 * 32 + 2 * 32 * 64 + 64 + 32 + 32 * 96 + 96
    assert found["inputs"] == {"ids": [8, 16], "labels": [8, 16]}
    assert found["without_rule"] == []


def test_verify_passes_and_its_tolerance_decides(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    ran = started("verify", here.model, "--plan", here.plan)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("Parity certificate: PASSED")
    on = ("--mesh", "dp=2,tp=2", "--strategy", "megatron", "--hardware", "h100")
    assert main(["verify", here.model, *on, "--tolerance", "1e-30", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    conforms(found)
    assert found["ok"] is False
    assert found["strategy"] == "megatron"


@pytest.mark.parametrize("dtypes", [(), ("--param-dtype", "bf16")], ids=["bf16", "mixed"])
def test_verify_checks_the_plan_of_a_config_on_the_plans_own_terms(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    """The plan is for bfloat16, or for float32 computed in it, and sequences of 12: `verify` is told none of it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **sizes}))
    plan = tmp_path / "plan.json"
    asked = ("--mesh", "dp=2,tp=2", "--hardware", "h100", "--batch", "2", "--seq", "12", *dtypes)
    assert main(["plan", str(tmp_path / "config.json"), *asked, "-o", str(plan)]) == 0
    ran = autopar("verify", tmp_path, "--plan", plan, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["batch_size"] == 4
    assert ran.json["dtype"] == ("float32 computed in bfloat16" if dtypes else "bfloat16")


def test_the_trace_is_the_step(here: Here) -> None:
    plan = json.loads(here.plan.read_text())
    events = json.loads((here.folder / "step.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert threads.keys() >= {event["tid"] for event in slices}
    assert set(threads.values()) <= {"compute", "communication: dp", "communication: tp"}
    parts = plan["breakdown"]
    busy = sum(event["dur"] for event in slices if threads[event["tid"]] == "compute" and event["cat"] != "optimizer")
    assert busy == pytest.approx(1e6 * (parts["compute_s"] + parts["contention_s"]), rel=1e-6)
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(1e6 * plan["step_time_s"], rel=1e-6)
    moved = sum(1 for event in slices if threads[event["tid"]] != "compute")
    assert moved == sum(each["count"] * len(each["axes"]) for each in plan["collectives"])
    memory = [sum(event["args"].values()) for event in events if event["ph"] == "C"]
    assert max(memory) == plan["peak_memory_bytes"]


def test_search_draws_the_best_plan_among_all_that_it_priced(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    page = here.folder / "search.html"
    on = ("search", here.model, "--gpus", "2", "--hardware", "h100", "--global-batch", "2", "--recompute", "full")
    assert main([*on, "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    conforms(found)
    text = page.read_text(encoding="utf-8")
    section = text.partition('<section id="frontier">')[2].partition("</section>")[0]
    (this,) = re.findall(r'scope="row">([\w=]+), this plan</th><td class="num">([^<]+)</td>', section)
    best = next(each for each in found["candidates"] if not each["priced_only"])
    assert this[0] == " ".join(f"{name}={size}" for name, size in best["mesh"].items())
    assert f"<dt>per step</dt><dd>{this[1]}</dd>" in text
    shown = re.findall(r'scope="row">([^<,]+)</th><td class="num">', section)
    assert len(shown) == len(found["candidates"]) + min(5, len(found["too_large"]))
    assert section.count("<td>ZeRO-1</td>") == sum(each["priced_only"] == ["ZeRO-1"] for each in found["candidates"])


def test_a_search_where_nothing_fits_writes_no_page(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    page = here.folder / "nothing.html"
    on = ("search", here.model, "--gpus", "1", "--hardware", "h100", "--global-batch", "1", "--recompute", "full")
    assert main([*on, "--memory-budget", "10KiB", "--html", str(page)]) == 1
    out = capsys.readouterr().out
    assert "nothing fits" in out
    assert f"{page} was not written" in out
    assert not page.exists()


def test_calibrate_writes_what_hardware_takes(here: Here) -> None:
    file = here.folder / "hardware.json"
    ran = autopar("calibrate", "--device", "cpu", "--seconds", "0.5", "-o", file, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["hardware"]["device"]["memory_bytes_per_s"] > 0
    assert main(["plan", here.model, "--mesh", "dp=2", "--hardware", str(file)]) == 0


@pytest.mark.parametrize("command", ["", *(module.__name__.rpartition(".")[2] for module in COMMANDS)])
def test_help_fits_the_terminal_and_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    text, _, _ = out.partition("\nexample:")
    assert max(map(len, text.splitlines())) <= 80
    assert "example" in out
    assert f"autopar {command}" in out
    assert "%(" not in out


def test_the_help_of_a_process_goes_to_standard_output() -> None:
    ran = autopar("--help")
    assert (ran.code, ran.err) == (0, "")
    assert "calibrate" in ran.out


def test_colour_and_a_progress_bar_are_for_terminals(here: Here) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "autopar", "diff", str(here.plan), str(here.other)]
    env = {**environment(), "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # how a terminal ends
                break
            if not part:
                break
            seen += part
    os.close(master)
    assert process.returncode == 1
    assert b"\033[31mWORSE" in seen


def test_a_config_json_and_its_folder_are_models(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    folder = here.folder / "llama"
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip
    for argument in (folder, folder / "config.json"):
        assert main(["inspect", str(argument), "--mesh", "dp=2", "--layers", "2", "--seq", "32", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        conforms(found)
        assert found["layers"] == {"model.layers.*": 2}
        assert "2 layers instead of the model's own" in found["notes"]
        assert found["inputs"]["input_ids"] == [2, 32]


def test_what_compiles_and_what_draws_is_imported_when_it_is_used() -> None:
    """Each takes a second, which no plan and no search has to wait for."""
    names = ("matplotlib", "torch._inductor.scheduler", "transformers")
    code = f"import sys, autopar.cli; print([name for name in {names} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
