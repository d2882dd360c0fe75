"""A model of the transformers library: a preset of ours, or a config.json."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autopar.models.named_model import Named, Wanted, check_playable
from autopar.models.presets import presets
from costmodel.files import read_json
from passes.capture.default_inputs import default_inputs, position_limits
from passes.program.precision import default_dtype

_LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_encoder_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers",
)  # fmt: skip
"""What configs call the number of layers: of a model with two stacks, that of each."""
_NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def _transformers() -> ModuleType:
    """The library, told to download nothing and to be quiet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "presets and config.json files need the transformers library: pip install 'autopar[hf]'; or name a "
            "function that makes the model, file.py:function"
        ) from None
    transformers.logging.set_verbosity_error()
    module: ModuleType = transformers
    return module


def from_preset(name: str, wanted: Wanted) -> Named:
    """The preset's model."""
    preset = presets()[name]
    config = dict(preset.config)
    notes = []
    if wanted.on_cpu:
        config |= preset.tiny
        left = {k: v for k, v in config.items() if wanted.layers is None or k not in _LAYER_KEYS}
        notes.append(f"{name} is scaled down to play on a CPU: {_sizes(left)}")
    return _built(name, preset.architecture, preset.model_class, config, wanted, notes)


def from_config(path: Path, wanted: Wanted) -> Named:
    """The model of a config.json.

    Raises:
        ValueError: no config, or one that transformers makes no model of.
    """
    try:
        config = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no JSON ({error}); pass a Hugging Face config.json") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path}: no 'model_type' in it; pass a Hugging Face config.json")
    kind = config.pop("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: 'model_type' is {kind!r}; the name of an architecture is wanted, such as 'llama'")
    classes = config.pop("architectures", None) or [""]
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise ValueError(f"{path}: 'architectures' is {classes!r}; a list of names of classes is wanted")
    notes = []
    said = config.get("dtype", config.get("torch_dtype"))
    if not wanted.on_cpu and wanted.dtype in ("bfloat16", "float16") and wanted.dtype != said:
        notes.append(
            f"parameters are planned in {wanted.dtype}; the config {f'says {said}' if said else 'names no dtype'} "
            f"(plan's --param-dtype {wanted.dtype} keeps them in float32 and computes in {wanted.dtype})"
        )
    if classes[0] and not hasattr(_transformers(), classes[0]):
        notes.append(f"transformers has no {classes[0]} ('architectures'); its causal language model is used instead")
    return _built(str(path), kind, classes[0], _without_dtypes(config), wanted, notes)


def _without_dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and those of its parts, in no dtype of its own: it would go before the one that is wanted."""
    return {
        key: _without_dtypes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("dtype", "torch_dtype")
    }


def _built(name: str, kind: str, model_class: str, config: dict[str, Any], wanted: Wanted, notes: list[str]) -> Named:
    transformers = _transformers()
    if kind not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(transformers.CONFIG_MAPPING), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{name}: transformers {transformers.__version__} has no model type {kind!r}{hint}")
    whole = dict(config)
    if wanted.layers is not None:
        _set_layers(name, kind, config, wanted.layers)
    sequence = _sequence(name, config, wanted)
    config = {"use_cache": False, **dict.fromkeys(_NO_DROPOUT, 0.0)} | config if kind == "gpt2" else config
    if wanted.on_cpu:
        config |= {key: value for key, value in _ENDS.items() if _needs_end(config, key, kind)}
    try:
        made = transformers.CONFIG_MAPPING[kind](**config)
        build = getattr(transformers, model_class, None) or transformers.AutoModelForCausalLM.from_config
        model = _empty(build, made, wanted)
        if wanted.layers is not None:
            lost = _lost(model, _empty(build, transformers.CONFIG_MAPPING[kind](**whole), wanted))
            notes.append(f"{wanted.layers} layer{'s' if wanted.layers > 1 else ''} instead of the model's own{lost}")
    except Exception as error:  # whatever a config's values make of a library's code
        if "Unrecognized configuration class" in str(error):
            raise ValueError(
                f"{name}: a {kind!r} is no causal language model, and 'architectures' names no class of transformers; "
                "name one there, or make the model in a function, file.py:function"
            ) from None
        raise ValueError(f"{name}: transformers cannot build it: {type(error).__name__}: {error}") from None
    if wanted.on_cpu:
        check_playable(name, model)
        torch.manual_seed(wanted.seed)
        model = build(made).train()
    inputs = default_inputs(model, wanted.batch or 1, sequence)
    if wanted.sequence is not None and "pixel_values" in inputs:
        raise ValueError(
            f"{name}: --seq {wanted.sequence}, but a {type(model).__name__} reads {', '.join(inputs)} and no tokens; "
            "leave it out"
        )
    return Named(model, inputs, name, tuple(notes))


def _needs_end(config: Mapping[str, Any], key: str, kind: str) -> bool:
    """Whether the token that `key` names, or that its architecture has where nothing is said, may be no word."""
    token, words = config.get(key), config.get("vocab_size")
    if isinstance(token, int) and isinstance(words, int):
        return not 0 <= token < words
    return key in config or kind in _SMALL_VOCABULARY


_SMALL_VOCABULARY = ("llama", "gpt2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mixtral", "deepseek_v3")


def _empty(build: Any, config: Any, wanted: Wanted) -> nn.Module:
    with default_dtype(getattr(torch, wanted.dtype)), torch.device("meta"):
        model: nn.Module = build(config)
    return model.train()


def _set_layers(name: str, kind: str, config: dict[str, Any], layers: int) -> None:
    known = dict(config)
    with contextlib.suppress(Exception):  # a few kinds have no defaults
        known = {**_transformers().CONFIG_MAPPING[kind]().to_dict(), **config}
    keys = [key for key in _LAYER_KEYS if key in known]
    if "depths" in known:
        raise ValueError(
            f"{name}: --layers {layers}, but the config has a number for each stage, depths {known['depths']}; write "
            "others there"
        )
    if not keys:
        raise ValueError(f"{name}: --layers {layers}, but the config has none of {', '.join(_LAYER_KEYS)}")
    config |= dict.fromkeys(keys, layers)
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = (config["layer_types"] * layers)[:layers]


def _lost(model: nn.Module, whole: nn.Module) -> str:
    """What only layers have that were left out: `; no DeepseekV3MoE (first in model.layers.3.mlp)`, `; no
    full_attention`."""
    had, types = ([*dict.fromkeys(getattr(each.config, "layer_types", None) or ())] for each in (whole, model))
    known = {type(module) for module in model.modules()}
    first: dict[type, str] = {}
    seen = ""
    for name, module in whole.named_modules():
        if type(module) in known or (seen and name.startswith(seen)):
            continue
        first.setdefault(type(module), name)
        seen = f"{name}."
    modules = [f"{kind.__name__} (first in {name})" for kind, name in first.items()]
    return "".join(f"; no {one}" for one in (*modules, *(one for one in had if one not in types)))


def _sequence(name: str, config: dict[str, Any], wanted: Wanted) -> int:
    """The sequence length: what was asked for, if the model has positions for it."""
    key = next(iter(position_limits(config.get)), None)
    if wanted.sequence is None:
        longest = 16 if wanted.on_cpu else 2048
        return min(longest, config[key]) if key else longest
    if key and wanted.sequence > config[key]:
        raise ValueError(
            f"{name}: --seq {wanted.sequence}, but the model has {config[key]} positions ({key}); at most that"
        )
    return wanted.sequence


def _sizes(config: Mapping[str, Any]) -> str:
    words = {
        "hidden_size": "hidden", "n_embd": "hidden", "num_hidden_layers": "layers", "n_layer": "layers",
        "num_attention_heads": "heads", "n_head": "heads", "vocab_size": "vocabulary",
        "num_local_experts": "experts", "num_experts": "experts", "n_routed_experts": "experts",
    }  # fmt: skip
    return ", ".join(f"{word} {config[key]}" for key, word in words.items() if key in config)
