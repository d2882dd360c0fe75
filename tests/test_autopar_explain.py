"""What `explain` finds in a plan: by real names, by kind, by line; and what it says decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from schemas import conforms

from autopar.cli import main
from passes.plan import Plan


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


def test_a_plan_solved_again_keeps_the_strategy_it_was_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["plan", str(folder), "--from", str(folder / "plan.json"), "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).strategy == "megatron"


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
