"""Plans in a repository: edited lines, what changed, and a check that fails."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from commands import Here, autopar, edit

from autopar.cli import main
from autopar.cli.comparing import compare_plans
from passes.padding.pad import Pad
from passes.plan.plan import Plan


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


def test_diff_is_of_whole_steps(here: Here) -> None:
    plan = Plan.load(here.other)
    (group,) = {each.group for each in plan.collectives}
    found = compare_plans(plan, replace(plan, accumulate=4))
    figures = {figure.name: figure for figure in found.figures}
    moved = sum(each.bytes * each.count for each in plan.collectives)
    assert (figures["bytes communicated"].before, figures["bytes communicated"].after) == (moved, 4 * moved)
    assert {figure.name for figure in found.worse(0.0)} == {"bytes communicated"}  # the other two are the file's own
    grown = [name for name, figure in figures.items() if figure.after == pytest.approx(4 * figure.before) != 0.0]
    kinds = {f"{each.kind} {each.group} {each.phase} bytes" for each in plan.collectives}
    assert set(grown) == {"bytes communicated", "compute", f"exposed {group}", *kinds}
    assert figures["optimizer"].change == 0


def test_check_plans_again_and_fails_on_a_plan_that_got_worse(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(here.plan), here.model]) == 0
    assert "The same layouts" in capsys.readouterr().out
    better = json.loads(here.plan.read_text())
    better["step_time_s"] /= 2
    kept = here.folder / "better.json"
    kept.write_text(json.dumps(better), encoding="utf-8")
    ran = autopar("check", kept, here.model, "--json")
    assert ran.code == 1
    assert ran.json["worse"] == ["step"]
    assert main(["check", str(kept), here.model, "--max-regression", "150%"]) == 0


def test_diff_with_a_plan_of_another_model_counts_the_names_that_both_have(here: Here) -> None:
    plan = Plan.load(here.plan)
    first, *others = plan.parameters
    kept = len(plan.placements)
    gone = len(replace(plan, parameters={first: plan.parameters[first]}).placements)
    fewer = replace(plan, parameters={key: plan.parameters[key] for key in others})
    (change,) = compare_plans(plan, fewer).made_for
    assert (change.name, change.before) == ("parameters", f"{kept}")
    assert change.after == f"{kept - gone}, of which {kept - gone} by the same name"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("recompute", "full", ("recompute", "pointwise", "full")),
        ("reshard", False, ("reshard_after_forward", "True", "False")),
        ("regather", True, ("regather_activations", "False", "True")),
        ("accumulate", 2, ("accumulate", "1", "2")),
        ("batch_axes", ("dp", "tp"), ("batch_axes", "dp", "dp,tp")),
        ("options", {"optimizer": "sgd"}, ("optimizer", "adamw", "sgd")),
        ("padded", (Pad("mm", 0, 0, 257, 260),), ("padded dims", "none", "257 as 260")),
    ],
)
def test_diff_tells_what_is_no_layout(here: Here, field: str, value: Any, told: tuple[str, str, str]) -> None:
    plan = Plan.load(here.plan)
    (change,) = compare_plans(plan, replace(plan, **{field: value})).made_for
    assert (change.name, change.before, change.after) == told


def test_diff_counts_a_tied_parameter_once(here: Here) -> None:
    tied = replace(Plan.load(here.plan), aliases={"shared.weight": "embed.weight"})
    others = {key: placed for key, placed in tied.parameters.items() if key != "embed.weight"}
    (change,) = compare_plans(tied, replace(tied, parameters=others)).made_for
    assert change.before == "7"  # an embedding without a bias, and three linears with one
    assert change.after == "6, of which 6 by the same name"


def test_diff_tells_parameters_of_another_shape(here: Here) -> None:
    plan = Plan.load(here.plan)
    wider = replace(plan.parameters["up.weight"], shape=(256, 32)), replace(plan.parameters["up.bias"], shape=(256,))
    other = replace(plan, parameters={**plan.parameters, "up.weight": wider[0], "up.bias": wider[1]})
    (change,) = compare_plans(plan, other).made_for
    assert change.name == "shapes"
    assert {change.before, change.after} in (
        {"up.weight [64, 32]", "[256, 32] and 1 more"}, {"up.bias [64]", "[256] and 1 more"},
    )  # fmt: skip
    assert compare_plans(plan, plan).made_for == ()


READS = """
import torch
from torch import nn


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, mask):
        y = self.up(x)
        return y.square().mean() if mask.all() else (y * mask.unsqueeze(-1)).square().mean()


def build():
    return Reads(), {"x": torch.randn(4, 8), "mask": torch.tensor([True, True, False, True])}
"""


def test_a_plan_whose_graph_follows_from_values_of_the_inputs_is_read_again(here: Here) -> None:
    file, kept = here.folder / "reads.py", here.folder / "reads.json"
    file.write_text(READS, encoding="utf-8")
    model = f"{file}:build"
    assert main(["plan", model, "--mesh", "dp=2", "--hardware", "h100", "-o", str(kept)]) == 0
    assert json.loads(kept.read_text())["parameters"].keys() == {"up.weight", "up.bias"}
    assert main(["check", str(kept), model]) == 0
    assert main(["plan", model, "--from", str(kept)]) == 0
    assert main(["explain", str(kept), "up.weight", "--model", model]) == 0
    verified = autopar("verify", model, "--plan", kept, "--json").json
    assert verified["ok"]
    assert not any("drawn at random" in note for note in verified["notes"])


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


def test_check_of_a_model_that_grew_says_the_graph_changed(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(here.plan), here.model.replace("build", "wider")]) == 1
    out = capsys.readouterr().out
    assert "graph: " in out
    assert "WORSE: peak memory" in out


NARROW = """
from models import nn, build as build_wide


def build():
    model, inputs = build_wide()
    model.up, model.down = nn.Linear(32, 32), nn.Linear(32, 32)
    return model, inputs
"""


def test_check_tells_of_a_plan_that_the_model_cannot_use_though_nothing_got_worse(
    here: Here, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half the FFN all takes less, and the plan is for parameters that are not there."""
    monkeypatch.syspath_prepend(str(here.folder))
    file, kept = here.folder / "narrow.py", here.folder / "kept.json"
    file.write_text(NARROW, encoding="utf-8")
    kept.write_text(here.plan.read_text())
    assert main(["check", str(kept), f"{file}:build", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["worse"] == []
    (told,) = [line for line in err.splitlines() if line.startswith("autopar check")]
    advice = f"make it again: autopar plan {file}:build --from {kept} -o {kept}"
    assert told.endswith(advice)
    assert main(advice.split()[4:]) == 0
    capfd.readouterr()
    assert main(["check", str(kept), f"{file}:build"]) == 0
    assert "autopar check" not in capfd.readouterr().err
