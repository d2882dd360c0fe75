"""Presets against their published parameter counts, and their small models against the real architecture's parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autopar.models.model_argument import load_model
from autopar.models.named_model import Wanted
from autopar.models.presets import presets

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "deepseek-v3": 671_026_404_352,
}
"""As the released checkpoints have them (DeepSeek-V3 without its 58 x 256 router biases, which are buffers; Gemma 3's
language model alone)."""


def gpt_parameters(hidden: int, layers: int, vocabulary: int, positions: int) -> int:
    """12 h^2 + 13 h per layer, embeddings and the last norm: arXiv 2104.04473, equation 2, its norm counted."""
    return layers * (12 * hidden**2 + 13 * hidden) + (vocabulary + positions) * hidden + 2 * hidden


COUNTED = {
    "gpt3-175b": gpt_parameters(12288, 96, 50257, 2048),
    "megatron-530b": gpt_parameters(20480, 105, 51200, 2048),
    "megatron-1t": gpt_parameters(25600, 128, 51200, 2048),
}


def test_every_preset_is_counted() -> None:
    assert set(PUBLISHED | COUNTED) == set(presets())
    assert all(preset.source and preset.title for preset in presets().values())


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    model = load_model(name).model
    assert sum(p.numel() for p in model.parameters()) == (PUBLISHED | COUNTED)[name]
    assert {str(p.device) for p in model.parameters()} == {"meta"}
    # Some versions of transformers keep routers in fp32.
    low = {str(p.dtype) for n, p in model.named_parameters() if ".mlp.gate." not in n}
    assert low == {"torch.bfloat16"}
    assert model.training


@pytest.mark.parametrize("name", presets())
def test_the_small_model_is_of_the_same_class_and_has_the_same_parts(name: str) -> None:
    def parts(argument: Wanted) -> set[str]:
        names = (n for n, _ in load_model(name, argument).model.named_parameters())
        return {".".join(p for p in n.split(".") if not p.isdigit()) for n in names}

    small = load_model(name, Wanted(on_cpu=True, batch=2))
    assert type(small.model) is type(load_model(name).model)
    assert parts(Wanted(on_cpu=True)) == parts(Wanted())
    assert small.inputs["input_ids"].shape == (2, 16)
    assert "scaled down" in small.notes[0]
    assert sum(p.numel() for p in small.model.parameters()) < 10**6
    assert small.model(**small.inputs).loss.item() == small.model(**small.inputs).loss.item()  # nothing random


def test_both_stacks_of_an_encoder_and_decoder_are_as_deep_as_asked_for_and_keep_their_tokens(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 6, "num_heads": 4}
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 128, **sizes}
    file = tmp_path / "t5.json"
    file.write_text(json.dumps({**config, "decoder_start_token_id": 0, "pad_token_id": 0}), encoding="utf-8")
    named = load_model(str(file), Wanted(layers=2, on_cpu=True))
    assert (len(named.model.encoder.block), len(named.model.decoder.block)) == (2, 2)
    assert named.model(**named.inputs).loss.isfinite()


@pytest.mark.parametrize(
    "said", [{"encoder_layers": 4, "decoder_layers": 6, "num_hidden_layers": 4}, {"encoder_layers": 4}, {}]
)
def test_both_stacks_are_cut_however_the_config_counts_them(said: dict[str, int], tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128, **said}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], **sizes, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_model(str(tmp_path), Wanted(layers=2)).model.model
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (2, 2)


def test_stages_with_numbers_of_their_own_are_not_cut(tmp_path: Path) -> None:
    config = {"model_type": "swin", "architectures": ["SwinForImageClassification"], "num_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": [2, 2, 6, 2]}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"--layers 2, but the config has a number for each stage, depths \[2, 2, 6, 2"
    ):
        load_model(str(tmp_path), Wanted(layers=2))


def test_batch_sequence_and_layers_are_as_asked_for() -> None:
    named = load_model("llama3-8b", Wanted(batch=3, sequence=512, layers=2))
    assert named.inputs["input_ids"].shape == (3, 512)
    assert len(named.model.model.layers) == 2
    assert named.notes == ("2 layers instead of the model's own",)


@pytest.mark.parametrize(
    ("name", "layers", "lost"),
    [
        ("deepseek-v3", 3, ["DeepseekV3MoE (first in model.layers.3.mlp)"]),
        ("deepseek-v3", 4, []),
        ("gemma3-12b", 5, ["full_attention"]),
        ("gemma3-12b", 6, []),
    ],
)
def test_kinds_of_layers_that_were_left_out_are_told(name: str, layers: int, lost: list[str]) -> None:
    """DeepSeek-V3 has three dense layers first (arXiv 2412.19437), Gemma 3 every sixth global (arXiv 2503.19786)."""
    told = "".join(f"; no {each}" for each in lost)
    assert load_model(name, Wanted(layers=layers)).notes == (f"{layers} layers instead of the model's own{told}",)


def test_relative_positions_have_no_end(tmp_path: Path) -> None:
    """T5's `n_positions` says what it was trained with: its module has no parameter of that size."""
    file = tmp_path / "config.json"
    small = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    t5 = {"model_type": "t5", "n_positions": 512, "relative_attention_num_buckets": 32, **small}
    file.write_text(json.dumps({**t5, "architectures": ["T5ForConditionalGeneration"]}), encoding="utf-8")
    named = load_model(str(file), Wanted(sequence=1024))
    assert {tensor.shape[1] for tensor in named.inputs.values() if tensor.dim() == 2} == {1024}
    assert not any(512 in parameter.shape for parameter in named.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_config_is_built_in_the_dtype_that_is_wanted_whatever_it_says(tmp_path: Path, kind: str) -> None:
    """`from_config`, of a model without a class and of the parts of one, goes by a config's own dtype."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", **sizes, "vocab_size": 64, "torch_dtype": "float32"}
    seen = {"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 16, "dtype": "float16"}
    both = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(text if kind == "llama" else {**both, "vision_config": seen}))
    named = load_model(str(tmp_path / "config.json"), Wanted(dtype="bfloat16"))
    assert {parameter.dtype for parameter in named.model.parameters()} == {torch.bfloat16}
