"""What `explain` finds in a plan: by real names, by kind, by line; and what it says decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import MODELS, Here, autopar
from schemas import conforms

from autopar.cli import main
from passes.plan.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of three layers, and its plan as `megatron` on 2 x 2."""
    from transformers import LlamaConfig

    found = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, tie_word_embeddings=True,
    ).save_pretrained(found)  # fmt: skip
    on = ("--mesh", "dp=2,tp=2", "--hardware", "h100", "--strategy", "megatron")
    assert main(["plan", str(found), *on, "-o", str(found / "plan.json"), "--json"]) == 0
    return found


def explained(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> Any:
    """What `explain --json` prints."""
    capsys.readouterr()
    assert main(["explain", str(folder / "plan.json"), *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    conforms(found)
    return found


def test_every_parameter_that_is_stored_in_parts_has_the_collectives_that_gather_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = Plan.load(folder / "plan.json").parameters
    gathered = [key for key, placed in parameters.items() if placed.at_rest != placed.in_compute]
    assert len(gathered) > 5
    for key in gathered:
        issued = explained(capsys, folder, key)["collectives"]
        gathers = [c for c in issued if c["kind"] == "all_gather" and "dp" in c["axes"]]
        assert any(f"gather {key} for compute" in c["reason"] for c in gathers), key
        assert any(f"gradient of {key}" in c["reason"] for c in issued if c["phase"] == "backward"), key


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "layers.2.mlp.up_proj"])
def test_a_layers_own_name_means_all_alike_layers(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    found = explained(capsys, folder, name)
    assert list(found["parameters"]) == ["model.layers.*.mlp.up_proj.weight"]
    assert found["collectives"]


def test_bytes_are_said_to_be_of_all_alike_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Plan.load(folder / "plan.json").parameters["model.layers.*.mlp.up_proj.weight"]
    assert one.count > 1
    for name, told in (
        ("mlp.up_proj.weight", f" per rank for all {one.count} together\n"),
        ("embed_tokens", " per rank\n"),
    ):
        assert main(["explain", str(folder / "plan.json"), name]) == 0
        assert told in capsys.readouterr().out


def test_a_tied_name_means_the_parameter_it_is_tied_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(explained(capsys, folder, "lm_head.weight")["parameters"]) == ["model.embed_tokens.weight"]


def test_a_kind_of_collective_is_a_pattern(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, folder, "all-gather")
    ledger = json.loads((folder / "plan.json").read_text())["collectives"]
    assert found["collectives"]
    assert len(found["collectives"]) == sum(c["kind"] == "all_gather" for c in ledger)


def test_the_strategy_decides_where_auto_would_do_otherwise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "model.layers.*.mlp.up_proj.weight"
    found = explained(capsys, folder, key, "--model", str(folder))
    one = found["parameters"][key]
    assert one["alternatives"][0]["step_time_s"] < found["step_time_s"]
    assert one["decided_by"].startswith("the strategy: 'megatron' was asked for, 'auto' has")
    assert {a["layout"]: a["why_not"] for a in one["alternatives"]}["S(0)S(0)"] == "dp splits the batch"


def test_the_strategy_decides_how_a_parameter_lies_at_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under `ddp` whole on every rank, where `auto` shards it: in compute it can be nothing else."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1024, max_position_embeddings=8192,
    ).save_pretrained(tmp_path)  # fmt: skip
    on = ("--mesh", "dp=8", "--hardware", "h100", "--strategy", "ddp")
    assert main(["plan", str(tmp_path), *on, "-o", str(tmp_path / "plan.json"), "--json"]) == 0
    key = "model.layers.*.mlp.up_proj.weight"
    one = explained(capsys, tmp_path, key, "--model", str(tmp_path))["parameters"][key]
    (other,) = (a for a in one["alternatives"] if not a["why_not"])
    assert other["layout"] != "R -> R"
    assert other["layout"].endswith(" -> R")
    assert one["decided_by"].startswith("the strategy: 'ddp' was asked for, 'auto' has S(")


def test_a_plan_solved_again_keeps_the_strategy_it_was_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["plan", str(folder), "--from", str(folder / "plan.json"), "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).strategy == "megatron"


def test_a_plan_solved_again_with_another_batch_keeps_its_length_and_the_other_way_round(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = folder / "2x32.json"
    assert (
        main(
            [
                "plan",
                str(folder),
                "--mesh",
                "dp=2",
                "--hardware",
                "h100",
                "--batch",
                "2",
                "--seq",
                "32",
                "-o",
                str(kept),
            ]
        )
        == 0
    )
    for asked, shape in (("--batch=4", [4, 32]), ("--seq=16", [2, 16])):
        capsys.readouterr()
        assert main(["plan", str(folder), "--from", str(kept), asked, "--json"]) == 0
        example = json.loads(Plan.from_json(capsys.readouterr().out).example)
        _, named = example["tuple"]
        assert named["dict"]["input_ids"]["tensor"][0] == shape


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("modeling_llama.py:1", "the lines of it that communicate are "),
        ("up_porj", "the nearest parameters are model.layers.*.mlp.up_proj.weight"),
        ("all_to_all", "its collectives are all_gather, all_reduce, reduce_scatter"),
        (" ", "an empty pattern"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    folder: Path, capsys: pytest.CaptureFixture[str], pattern: str, told: str
) -> None:
    capsys.readouterr()
    assert main(["explain", str(folder / "plan.json"), pattern]) == 2
    assert told in capsys.readouterr().err


# -- the runners-up of a small model -----------------------------------------------------------------------------------


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
    on = ["--mesh", "dp=2,tp=2", "--hardware", "h100", "--recompute", "none"]  # one way, so that it is found fast
    call = ["plan", here.model, *on, "--memory-budget", str(fsdp + 8192)]
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
