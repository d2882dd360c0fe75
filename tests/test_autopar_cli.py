"""The commands as a user runs them: processes, their output, their exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks import forked
from schemas import conforms

from autopar.cli import main
from autopar.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
MODELS = """
import torch
from torch import nn
from torch.nn import functional as F


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 96)

    def forward(self, ids, labels):
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(x)))
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def build():
    ids = torch.randint(0, 96, (4, 16))
    return Tiny(), {"ids": ids, "labels": ids}


def wider():
    model, inputs = build()
    model.up, model.down = nn.Linear(32, 256), nn.Linear(256, 32)
    return model, inputs


def number():
    return 3


def fails():
    return build()[0].nothing


def no_inputs():
    return Tiny()


def nothing():
    pass


def leaves():
    raise SystemExit(0)


def wants(size):
    return build()


def too_long():
    return build()[0], {"ids": torch.zeros(4, 16, dtype=torch.long), "labels": torch.zeros(4, 8, dtype=torch.long)}


def talks():
    print("made by hand")
    return build()


def branches():
    class Branch(Tiny):
        def forward(self, ids, labels):
            out = super().forward(ids, labels)
            return out if out["loss"] > 1 else None

    return Branch(), build()[1]
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        found = json.loads(self.out)
        conforms(found)
        return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def started(*arguments: object) -> Ran:
    """`python -m autopar ...`, from the start of Python on."""
    command = [sys.executable, "-m", "autopar", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    return Ran(done.returncode, done.stdout, done.stderr)


def autopar(*arguments: object) -> Ran:
    """The same in a process that has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = forked(command, [str(each) for each in arguments], str(out), str(err), environment())
        return Ran(code, out.read_text("utf-8"), err.read_text("utf-8"))


def command(words: list[str], out: str, err: str, environment: dict[str, str]) -> int:
    """Exit code of the command, whose standard output and error go to these files."""
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@dataclass(frozen=True)
class Here:
    """A folder with models, and two plans for one of them."""

    folder: Path
    model: str
    plan: Path
    other: Path
    planned: Ran
    as_json: Ran


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "models.py").write_text(MODELS, encoding="utf-8")
    model = f"{folder}/models.py:build"
    plan, other = folder / "plan.json", folder / "other.json"
    on = ("plan", model, "--mesh", "dp=2,tp=2", "--hardware", "h100")
    planned = autopar(*on, "-o", plan, "--html", folder / "report.html", "--trace", folder / "step.json")
    as_json = autopar(*on, "--strategy", "fsdp", "--json", "-o", other)
    edit(plan, folder / "edited.json", "up.weight", at_rest="RS(0)", in_compute="RS(0)")
    (folder / "bytes.json").write_bytes(b"\xd8\x00\xff")
    (folder / "heads").mkdir()
    (folder / "heads" / "config.json").write_text('{"model_type": "llama", "hidden_size": 30}', encoding="utf-8")
    edit(plan, folder / "edited-badly.json", "up.bias", at_rest="RR", in_compute="RS(1)")
    return Here(folder, model, plan, other, planned, as_json)


def edit(plan: Path, to: Path, parameter: str, **changed: object) -> None:
    """What a person does in an editor: other values on the line of one parameter."""
    lines = plan.read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith(f'    "{parameter}": {{'))
    head, _, body = lines[number].partition(": ")
    entry = json.loads(body.rstrip(",")) | changed
    lines[number] = f"{head}: {json.dumps(entry)}{',' if body.endswith(',') else ''}"
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- each command ------------------------------------------------------------------------------------------------------


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


def test_a_plan_that_does_not_fit_exits_1_and_says_what_would(here: Here) -> None:
    ran = autopar("plan", here.model, "--mesh", "dp=2", "--hardware", "h100", "--memory-budget", "20KiB")
    assert ran.code == 1
    assert ran.out == ""
    last = ran.err.splitlines()[-1]
    assert last.startswith("autopar plan: no plan fits")
    assert "What would fit" in last


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


def test_diff_says_what_changed_and_exits_1_where_it_got_worse(here: Here) -> None:
    assert main(["diff", str(here.plan), str(here.plan)]) == 0
    ran = autopar("diff", here.plan, here.other, "--json")
    assert ran.code == 1
    found = ran.json
    assert "step" in found["worse"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    plans = [json.loads(path.read_text()) for path in (here.plan, here.other)]
    assert figures["step"]["before"] == plans[0]["step_time_s"]
    assert figures["peak memory"]["after"] == plans[1]["peak_memory_bytes"]
    assert {"name": "strategy", "before": plans[0]["strategy"], "after": "fsdp"} in found["made_for"]
    assert any(change["name"] == "up.weight" for change in found["parameters"])
    assert main(["diff", str(here.plan), str(here.other), "--max-regression", "1000%"]) == 0


def test_check_plans_again_and_fails_on_a_plan_that_got_worse(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(here.plan), here.model]) == 0
    assert "The same decisions" in capsys.readouterr().out
    better = json.loads(here.plan.read_text())
    better["step_time_s"] /= 2
    kept = here.folder / "better.json"
    kept.write_text(json.dumps(better), encoding="utf-8")
    ran = autopar("check", kept, here.model, "--json")
    assert ran.code == 1
    assert ran.json["worse"] == ["step"]
    assert main(["check", str(kept), here.model, "--max-regression", "150%"]) == 0


def test_an_edited_line_is_kept_when_the_plan_is_solved_again(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    again, unpinned = here.folder / "again.json", here.folder / "unpinned.json"
    assert main(["plan", here.model, "--from", str(here.folder / "edited.json"), "-o", str(again)]) == 0
    report = capsys.readouterr().out
    kept, made = json.loads(here.plan.read_text()), json.loads(again.read_text())
    before, after = kept["parameters"]["up.weight"], made["parameters"]["up.weight"]
    assert before["in_compute"] != "RS(0)"  # else the edit asks for nothing
    assert (after["in_compute"], after["pinned"]) == ("RS(0)", True)
    assert [key for key, line in made["parameters"].items() if line["pinned"]] == ["up.weight"]
    assert made["axes"] == kept["axes"]
    assert made["example"] == kept["example"]
    assert made["options"]["hardware_figures"] == kept["options"]["hardware_figures"]
    assert "pinned" in report
    # The line stays when the plan is solved once more, and is free again when the mark goes.
    assert main(["plan", here.model, "--from", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["up.weight"]["in_compute"] == "RS(0)"
    edit(again, unpinned, "up.weight", pinned=False)
    assert main(["plan", here.model, "--from", str(unpinned), "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    assert free["parameters"] == kept["parameters"]
    assert free["step_time_s"] == kept["step_time_s"] <= made["step_time_s"]


def test_a_line_can_be_edited_at_rest(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    edited = here.folder / "at-rest.json"
    edit(here.plan, edited, "head.weight", at_rest="S(0)S(0)", in_compute="RS(0)")
    assert main(["plan", here.model, "--from", str(edited), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)["parameters"]["head.weight"]
    assert (line["at_rest"], line["in_compute"]) == ("S(0)S(0)", "RS(0)")


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


def test_check_of_a_model_that_grew_says_the_graph_changed(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(here.plan), here.model.replace("build", "wider")]) == 1
    out = capsys.readouterr().out
    assert "graph: " in out
    assert "WORSE: peak memory" in out


def test_explain_prices_the_runners_up(here: Here) -> None:
    ran = autopar("explain", here.other, "up.weight", "--model", here.model, "--json")
    assert ran.code == 0, ran.err
    (one,) = ran.json["parameters"].values()
    assert one["shape"] == [64, 32]
    layouts = {other["layout"]: other for other in one["alternatives"]}
    assert set(layouts) == {"S(0)R", "S(1)R", "RS(0)", "RS(1)"}
    times = [other["step_time_s"] for other in one["alternatives"] if other["step_time_s"] is not None]
    assert times == sorted(times)
    assert len(times) >= 2
    assert all(c["value"].startswith("up.") or "up" in c["module"] for c in ran.json["collectives"])
    assert {c["kind"] for c in ran.json["collectives"]} >= {"all_gather", "reduce_scatter"}


def test_explain_finds_by_source_line(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(i for i, text in enumerate(MODELS.splitlines(), 1) if "F.cross_entropy" in text)
    assert main(["explain", str(here.plan), f"models.py:{line}"]) == 0
    assert f"models.py:{line}" in capsys.readouterr().out


def test_explain_solves_an_ops_runner_up(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(i for i, text in enumerate(MODELS.splitlines(), 1) if "self.down(F.gelu" in text)
    call = ["explain", str(here.other), f"models.py:{line}", "--model", here.model, "--most", "1"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    conforms(found)
    solved = {place: op for place, op in found["ops"].items() if op["decided_by"]}
    ((place, op),) = solved.items()
    assert op["source"].endswith(f"models.py:{line}")
    (other,) = op["alternatives"]
    assert other["layout"] != op["layout"]
    # That plan can be had: without the choice, and it takes what explain says.
    assert other["step_time_s"] > 0
    assert main(call) == 0
    out = capsys.readouterr().out
    assert place in out
    assert "What decided: " in out


def test_explain_says_when_memory_decided(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    tight = here.folder / "tight.json"
    plan = json.loads(here.plan.read_text())
    fsdp = plan["baselines"]["fsdp"]["peak_memory_bytes"]
    assert fsdp < plan["peak_memory_bytes"]
    call = ["plan", here.model, "--mesh", "dp=2,tp=2", "--hardware", "h100", "--memory-budget", str(fsdp + 2048)]
    assert main([*call, "-o", str(tight)]) == 0
    made = json.loads(tight.read_text())
    moved = [
        key for key, line in made["parameters"].items() if line != plan["parameters"][key] and len(line["shape"]) > 1
    ]
    assert moved
    capsys.readouterr()
    assert main(["explain", str(tight), moved[0], "--model", here.model, "--most", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parameters"][moved[0]]
    assert found["decided_by"].startswith("the memory budget: without it")


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
    ran = started("--help")
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
        assert found["layers"] == {"model.layers.*": 2}
        assert found["inputs"]["input_ids"] == [2, 32]


# -- each mistake ------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("frob", "invalid choice: 'frob'"),
    ("plan", "required: MODEL"),
    ("plan MODEL", "pass --mesh dp=2,tp=2, or --from PLAN"),
    ("plan MODEL --from HERE/edited-badly.json", "cannot be RR -> RS(1) over axes of (2, 2) ranks"),
    ("explain HERE/edited.json up.weight", "was edited after it was solved"),
    ("check HERE/edited.json MODEL", "was edited after it was solved"),
    ("verify MODEL --plan HERE/edited.json", "was edited after it was solved"),
    ("plan MODEL --mesh dp=2,tp", "write name=ranks, as in dp=4,tp=2"),
    ("plan MODEL --mesh dp=2,dp=2", "stands twice"),
    ("plan MODEL --mesh dp=0", "is no axis"),
    ("plan MODEL --mesh dp=2 --hardware h100 --batch-axes ep", "ep"),
    ("plan MODEL --mesh dp=2 --batch-axes 2", "names no axes; write dp or dp,ep"),
    ("plan MODEL --mesh dp=2 --recompute some", "choose from"),
    ("plan MODEL --mesh a=1,b=1,c=1,d=1,e=1,f=1", "6 axes"),
    ("plan MODEL --mesh dp=2 --hardware h9", "unknown hardware 'h9'; known are a100-40gb"),
    ("plan MODEL --mesh dp=2 --strategy zero", "choose from"),
    ("plan MODEL --mesh dp=2 --batch none", "positive whole number"),
    ("plan MODEL --mesh dp=2 --memory-budget much", "is no size; write bytes, or 80GiB"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight", "write PATTERN=LAYOUT"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin up.weight=Q", "'Q' is no layout"),
    ("plan MODEL --mesh dp=2 --hardware h100 --pin nothing=R", "names no parameter"),
    ("plan llama3-8 --mesh dp=2", "did you mean llama3-8b"),
    ("plan nope --mesh dp=2", "A model is a preset"),
    ("plan HERE/nope.py:build --mesh dp=2", "no such file"),
    ("plan HERE/models.py --mesh dp=2", "name the function"),
    ("plan HERE/models.py:nope --mesh dp=2", "no function 'nope'; it has Tiny, build"),
    ("plan HERE/models.py:number --mesh dp=2", "returned a int; return a torch.nn.Module"),
    ("plan HERE/models.py:fails --mesh dp=2", "AttributeError: 'Tiny' object has no attribute 'nothing'"),
    ("plan HERE/models.py:no_inputs --mesh dp=2", "its forward takes ids, labels"),
    ("plan HERE/models.py:branches --mesh dp=2 --hardware h100", "models.py:"),
    ("plan HERE/models.py:nothing --mesh dp=2", "returned None; return a torch.nn.Module"),
    ("plan HERE/models.py:leaves --mesh dp=2", "SystemExit: 0"),
    ("plan HERE/models.py:wants --mesh dp=2", "models.py: TypeError: wants() missing 1 required"),
    ("plan HERE/models.py:too_long --mesh dp=2 --hardware h100", "the model's forward raised"),
    ("plan MODEL --mesh dp=2 --batch 8", "models.py:build returns its inputs; set them there"),
    ("search MODEL --gpus 2 --global-batch 8 --seq 8", "models.py:build returns its inputs; set them there"),
    ("plan MODEL --mesh dp=2 --layers 2", "models.py:build makes its own layers"),
    ("plan LLAMA3-8B --mesh dp=2", "did you mean llama3-8b"),
    ("plan HERE/none/config.json --mesh dp=2", "none/config.json: no such file"),
    ("plan HERE/heads --mesh dp=2", "not a multiple of the number of attention heads"),
    ("plan MODEL --mesh dp=2 --memory-budget .", "is no size"),
    ("plan MODEL --mesh dp=2 --param-dtype int8", "is none of bfloat16"),
    ("plan MODEL --from HERE/bytes.json", "bytes.json: not a text"),
    ("verify MODEL --mesh dp=2 --tolerance -1", "is no relative error"),
    ("plan HERE --mesh dp=2", "without a config.json"),
    ("plan HERE/plan.json --mesh dp=2", "no 'model_type'"),
    ("plan gpt3-175b --mesh dp=2 --seq 4096", "the model has 2048 positions"),
    ("plan MODEL --mesh dp=2 --hardware h100 -o HERE/none/plan.json", "none/plan.json: no folder"),
    ("diff HERE/plan.json HERE/none.json", "none.json: No such file"),
    ("diff HERE/plan.json HERE/models.py", "not JSON"),
    ("diff HERE/plan.json HERE/plan.json --max-regression lots", "is no share"),
    ("check HERE/plan.json nope", "no model 'nope'"),
    ("explain HERE/plan.json zzz", "nothing in the plan matches 'zzz'; its parameters are embed.weight"),
    ("explain HERE/plan.json up.weight --model HERE/models.py:wider", "name the model that it was made for"),
    ("verify MODEL", "pass --mesh"),
    ("verify MODEL --mesh dp=4 --plan HERE/plan.json", "the plan is for the mesh"),
    ("verify HERE/models.py:wider --plan HERE/plan.json", "the plan is for the graph"),
    ("search MODEL --gpus 12 --global-batch 12 --hardware h100", "12 GPUs fill no whole number of nodes"),
    ("search MODEL --global-batch 8", "required: --gpus"),
    ("search MODEL --gpus 8 --global-batch 1 --hardware h100 --html HERE/none/x.html", "none/x.html: no folder"),
    ("calibrate --seconds 0", "--seconds 0"),
    ("calibrate --from-trace HERE/step.json", "needs --plan PLAN"),
    ("calibrate --plan HERE/plan.json", "go with --from-trace"),
    ("diff HERE/plan.json", "give two plans, or one plan and --measured TRACE"),
    ("diff HERE/plan.json --measured HERE/plan.json", "no traceEvents"),
    ("plan MODEL --mesh dp=2 --html HERE", "a folder; name a file"),
    ("calibrate --seconds 1 -o HERE/none/hardware.json", "no folder"),
]


@pytest.mark.parametrize(("call", "told"), MISTAKES, ids=[call for call, _ in MISTAKES])
def test_a_mistake_is_one_line_on_standard_error(
    here: Here, call: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = call.replace("MODEL", here.model).replace("HERE", str(here.folder)).split()
    assert main(words) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("autopar")
    assert told in lines[0]


def test_what_a_users_function_prints_is_no_part_of_the_output(here: Here) -> None:
    ran = autopar("inspect", f"{here.folder}/models.py:talks", "--mesh", "dp=2", "--json")
    assert ran.code == 0
    assert ran.json["parameters"] > 0
    assert "made by hand" in ran.err


def test_a_class_that_transformers_lacks_is_told(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    file = here.folder / "own.json"
    file.write_text(json.dumps({"model_type": "llama", "architectures": ["MyLlama"], **sizes}), encoding="utf-8")
    assert main(["inspect", str(file), "--mesh", "dp=2", "--seq", "16"]) == 0
    assert "transformers has no MyLlama" in capsys.readouterr().out


def test_a_mistake_in_a_process_is_no_traceback(here: Here) -> None:
    ran = started("plan", f"{here.folder}/models.py:fails", "--mesh", "dp=2")
    assert ran.code == 2
    assert ran.out == ""
    line = next(i for i, text in enumerate(MODELS.splitlines(), 1) if ".nothing" in text)
    assert f"models.py:{line}: AttributeError" in ran.err
    assert "Traceback" not in ran.err
