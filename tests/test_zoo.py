"""A few architectures of `transformers` on simulated ranks; `benchmarks/zoo.py` runs all of them on real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parity import captured, errors, planned

from passes.analysis.analysis import analyse
from passes.padding.pad import padded_atom
from passes.padding.uneven import uneven_dims

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import zoo
import zoo_models

SAMPLE = (
    "gpt_neox",  # dense, fused queries, keys and values
    "qwen3_moe",  # routed experts
    "mamba2",  # state space
    "bert@mlm",  # encoder
    "t5@s2s",  # encoder and decoder
    "vit@vision",  # images
    "wav2vec2@audio",  # convolutions over sound, a connectionist loss
    "llava@mmi",  # images and text
)
STRATEGIES = ("megatron", "auto")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_step_is_eager_s(name: str) -> None:
    model, inputs = zoo_models.build(name)
    program = captured(model, inputs)
    for strategy in STRATEGIES:
        _, _, local = planned(program, {"dp": 2, "tp": 2}, strategy)
        found = errors(model, local, inputs)
        assert found.output < zoo.LOSS_LIMIT, (strategy, found)
        assert found.gradient < zoo.GRADIENT_LIMIT, (strategy, found)


def test_a_batch_that_stands_in_an_ffns_width_too_is_not_padded() -> None:
    """Funnel pools its sequence until 8 rows of 16 samples are as many as its FFN is wide: 128, of which 16 are the
    batch's dim then. Padded for three tensor ranks, ranks had rows of other ranks' samples."""
    model, inputs = zoo_models.build("funnel@mlm")
    inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
    analysis = analyse(captured(model, inputs))
    atoms = [padded_atom(analysis, each) for each in uneven_dims(analysis, (2, 3), (0,))]
    assert atoms
    assert not any(id(atom) in analysis.batch_atoms for atom in atoms)


def test_every_listed_architecture_is_known() -> None:
    names = zoo_models.list_architectures()
    assert len(names) == len(set(names)) == 248
    assert all(zoo_models.model_class(name) for name in names)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = {
        ("llama", "auto"): zoo.Row("llama", "dense", "auto", True, True, True, True, 1e-7, 2e-6, "x", 1.0, "", "", 3.0),
        ("t5@s2s", "fsdp"): zoo.Row("t5@s2s", "encdec", "fsdp", error="CaptureError: model.py:3: a, b | c"),
    }
    zoo.write(tmp_path / "rows.csv", rows)
    again = zoo.read(tmp_path / "rows.csv")
    assert again.keys() == rows.keys()
    assert again["llama", "auto"] == rows["llama", "auto"]
    assert again["t5@s2s", "fsdp"].error == rows["t5@s2s", "fsdp"].error
    assert not again["t5@s2s", "fsdp"].right
    text = zoo.summary(rows, 248)
    assert "2 of 248" in text
    assert "model.py:3" in text


def test_a_gradient_that_is_missing_or_nan_is_wrong() -> None:
    wanted = {"a": torch.ones(3), "b": torch.ones(3)}
    assert zoo._worst({"a": torch.ones(3), "b": torch.ones(3)}, wanted)[0] == 0
    assert zoo._worst({"a": torch.ones(3)}, wanted) == (float("inf"), "b")
    error, name = zoo._worst({"a": torch.full((3,), float("nan")), "b": torch.ones(3)}, wanted)
    assert error != error
    assert name == "a"
