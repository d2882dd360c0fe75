"""Tiny, randomly initialised models of every architecture in `transformers`, with inputs; nothing is downloaded.

    model, inputs = build("llama")
    model(**inputs).loss.backward()

Names: `llama` is the causal LM; other tasks carry a suffix: `bert@mlm`, `t5@s2s`, `vit@vision`, `wav2vec2@audio`,
`llava@mm` (text tokens alone) and `llava@mmi` (image and text tokens). `zoo.csv` beside this file lists those that
`zoo.py` runs; `build` takes any other as well.

How a tiny config is made: every config class is a dataclass, so its fields and their defaults are looked at: exact
names of fields (SIZES), patterns of names (PATTERNS), per-layer lists shortened so that every *kind* of layer stays,
nested configs, and what single model types need beyond that (OVERRIDES).
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import CONFIG_MAPPING, PreTrainedConfig  # noqa: E402
from transformers.models.auto import modeling_auto as MA  # noqa: E402

BATCH, SEQ, VOCAB, HIDDEN, HEADS, KV, HEAD_DIM, INTER = 8, 32, 256, 64, 4, 2, 16, 128
LAYERS, MAX_POS, EXPERTS, TOPK, IMG, PATCH = 2, 128, 4, 2, 32, 8
LABELS = 2

TASKS = {  # suffix -> mapping of model_type -> class name
    "": MA.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "mlm": MA.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "s2s": MA.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "vision": MA.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": {
        **MA.MODEL_FOR_CTC_MAPPING_NAMES,
        "audio-spectrogram-transformer": "ASTForAudioClassification",
        "whisper": "WhisperForConditionalGeneration",
        "speech_to_text": "Speech2TextForConditionalGeneration",
        "moonshine": "MoonshineForConditionalGeneration",
    },
    "mmi": {
        "clip": "CLIPModel",
        "siglip": "SiglipModel",
        "chinese_clip": "ChineseCLIPModel",
        "altclip": "AltCLIPModel",
        "blip": "BlipForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration",
        "vipllava": "VipLlavaForConditionalGeneration",
        "paligemma": "PaliGemmaForConditionalGeneration",
        "gemma3": "Gemma3ForConditionalGeneration",
        "idefics3": "Idefics3ForConditionalGeneration",
        "mistral3": "Mistral3ForConditionalGeneration",
        "internvl": "InternVLForConditionalGeneration",
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "git": "GitForCausalLM",
        "vilt": "ViltForMaskedLM",
        "blip-2": "Blip2ForConditionalGeneration",
    },
    "mm": MA.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# ----------------------------------------------------------------------------------------------- the filler
_H = [
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "dim",
    "emb_dim",
    "embedding_dim",
    "word_embed_proj_dim",
    "hidden_dim",
    "embedding_size",
    "input_embedding_size",
    "output_embedding_size",
    "attention_hidden_size",
    "lru_width",
    "projection_dim",
    "out_hidden_size",
    "encoder_hidden_size",
    "hidden_size_per_layer_input",
    "ple_embed_dim",
    "text_hidden_size",
    "output_dim",
    "cross_attention_hidden_size",
    "audio_hidden_size",
    "vision_hidden_size",
    "hidden_size_out",
    "output_hidden_size",
    "adapter_hidden_size",
    "proj_dim",
    "out_dim",
    "vision_embed_dim",
]
_I = [
    "intermediate_size",
    "ffn_dim",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "dff",
    "dim_ff",
    "d_ff",
    "d_inner",
    "ffn_hidden_size",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "n_inner",
    "mlp_dim",
    "feed_forward_size",
    "ff_dim",
    "hidden_dim_ffn",
]
_E = [
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "shared_experts_intermediate_size",
    "expert_ffn_hidden_size",
]
_L = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "depth",
    "decoder_num_layers",
    "num_layers_per_stack",
]
_A = [
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
    "swa_num_attention_heads",
    "decoder_num_heads",
    "linear_num_heads",
    "encoder_num_attention_heads",
    "decoder_num_attention_heads",
]
_K = [
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "num_query_groups",
    "encoder_num_key_value_heads",
    "decoder_num_key_value_heads",
]
_X = ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"]
_T = ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"]
_P = [
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "model_max_length",
    "context_length",
    "seq_length",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_target_positions",
    "max_sequence_length",
    "max_2d_position_embeddings",
]
_V = [
    "vocab_size",
    "decoder_vocab_size",
    "src_vocab_size",
    "tgt_vocab_size",
    "vocab_size_per_layer_input",
    "unpadded_vocab_size",
    "encoder_vocab_size",
    "t2u_vocab_size",
]
SIZES = {
    **dict.fromkeys(_H, HIDDEN),
    **dict.fromkeys(_I, INTER),
    **dict.fromkeys(_E, HIDDEN),
    **dict.fromkeys(_L, LAYERS),
    **dict.fromkeys(_A, HEADS),
    **dict.fromkeys(_K, KV),
    **dict.fromkeys(_X, EXPERTS),
    **dict.fromkeys(_T, TOPK),
    **dict.fromkeys(_P, MAX_POS),
    **dict.fromkeys(_V, VOCAB),
    "head_dim": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "d_kv": HEAD_DIM,
    "d_head": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "attention_head_size": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "attention_head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
    "zero_expert_num": 2,
    "rotary_dim": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "local_attention": 16,
    "local_attention_window_len": 16,
    "attention_chunk_size": 16,
    "attention_window_size": 8,
    "window_size": 8,
    "keep_window_size": 64,
    # SSM / linear attention
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "expand": 2,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "n_mamba_heads": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_d_ssm": 128,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "block_size": 16,
    "adapter_rank": 8,
    # vision
    "image_size": IMG,
    "patch_size": PATCH,
    "img_size": IMG,
    "num_labels": LABELS,
    "decoder_hidden_size": HIDDEN,
    "projector_hidden_size": HIDDEN,
    "window_attention_size": 4,
    "spatial_merge_size": 2,
    # misc
    "type_vocab_size": 2,
    "num_kv_shared_layers": 0,
    "max_source_positions": 64,
    "hc_lowrank": 16,
    "d_rel": 8,
    "rel_extent": 64,
    "laurel_rank": 8,
    "gated_norm_rank": 8,
    "router_hidden_size": 32,
    "floor_scale": 64,
    "ngram_vocab_size_base": 256,
    "num_nextn_predict_layers": 0,
    "hidden_size_global": HIDDEN,
    "adapter_in_dim": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "adapter_input_size": HIDDEN,
    "original_max_position_embeddings": MAX_POS,
    "mtp_num_hidden_layers": 0,
}
PATTERNS = [  # (regex on the field name, only if the default is this type, value or f(default))
    (r".*drop(out|_?path)?(_rate|_prob|_p|p)?$|.*dropout.*|.*_drop$|.*layer_?drop.*|.*_pdrop$", (int, float), 0.0),
    (r"mask_(time|feature)_prob|router_jitter_noise|input_jitter_noise", (int, float), 0.0),
    (r"apply_spec_augment", bool, False),
    (r"pad_token_id|pad_index|pad_token", int, 0),
    (r"bos_token_id|bos_index|sos_token_id|decoder_start_token_id|cls_token_id", int, 1),
    (r"(eos|sep|forced_eos|forced_bos|eod|im_end|end)_token_id|eos_index", (int, list, tuple), 2),
    (r"(unk|mask)_(token_id|index)", int, 3),
]
ID_NAME = re.compile(r".*(token_id|token_index|_token)$")


def _get(obj, name, default=None):
    """getattr that survives config attributes which raise (per-layer configs)."""
    try:
        return getattr(obj, name, default)
    except Exception:
        return default


def _default(f):
    if f.default is not dataclasses.MISSING:
        return f.default
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return None


def _new_id(state):
    """Distinct special-token ids counted down from the top of the tiny vocabulary (inputs use 4..199)."""
    state["next"] -= 1
    return state["next"]


def tiny_kwargs(cls, kv=KV, ids=None, path=""):
    """kwargs for `cls` that make it tiny; generic, by field name and default value."""
    ids = ids or {"next": VOCAB}
    try:
        ref = cls()
    except Exception:
        ref = None
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    kw = {}
    kind = _pick_layers(ref, fields)
    mla = "qk_rope_head_dim" in fields
    for name, f in fields.items():
        raw, val = _default(f), _get(ref, name, _default(f)) if ref is not None else _default(f)
        if name in ("use_cache",):
            kw[name] = False
            continue
        if isinstance(val, PreTrainedConfig):
            kw[name] = tiny_config(type(val), kv=kv, ids=ids, path=f"{path}{name}.")
            continue
        if name in kind:
            kw[name] = kind[name]
            continue
        if name in SIZES and not isinstance(val, (list, tuple, dict, str, bool)):
            if val is None and name not in ("head_dim",):
                continue  # optional and off by default: leave off
            v = SIZES[name]
            if name in _K:
                if raw is None and val is None:
                    continue
                v = HEADS if mla else kv
            if name in _L and "_n" in kind:
                v = kind["_n"]
            if name == "head_dim" and mla and ref is not None:
                v = 8 if val == ref.qk_rope_head_dim else 16
            if (
                name
                in (
                    "n_shared_experts",
                    "num_shared_experts",
                    "shared_intermediate_size",
                    "moe_num_shared_experts",
                    "zero_expert_num",
                    "first_k_dense_replace",
                )
                and val == 0
            ):
                continue
            if name in ("n_group", "topk_group", "num_expert_group") and val == 1:
                continue
            if name == "original_max_position_embeddings":
                v = MAX_POS
            kw[name] = v
            continue
        for rx, typ, v in PATTERNS:
            if re.fullmatch(rx, name) and isinstance(val, typ) and not (isinstance(val, bool) and typ is not bool):
                kw[name] = type(val)(v) if isinstance(v, float) else v
                break
        else:
            if ID_NAME.match(name) and isinstance(val, int) and not isinstance(val, bool):
                kw[name] = _new_id(ids)
            elif isinstance(val, dict) and "mrope_section" in val:
                kw[name] = {**val, "mrope_section": [4, 2, 2] if "qwen3" in cls.model_type else [2, 3, 3]}
    kw.update(_special(cls, kw, fields))
    return kw


def _pick_layers(ref, fields):
    """Shorten per-layer lists but keep one layer of every distinct kind (at most 4 layers)."""
    if ref is None:
        return {}
    depth = next((_get(ref, k) for k in _L if isinstance(_get(ref, k), int) and k in fields), None)
    if not depth or depth < 2:
        return {}
    lists = {
        k: list(_get(ref, k)) for k in fields if isinstance(_get(ref, k), (list, tuple)) and len(_get(ref, k)) == depth
    }
    if not lists:
        return {}
    cat = [v for k, v in lists.items() if all(isinstance(x, str) for x in v)] or list(lists.values())
    seen, idx = set(), []
    for i in range(depth):
        key = tuple(str(v[i]) for v in cat)
        if key not in seen and len(idx) < 4:
            seen.add(key), idx.append(i)
    while len(idx) < LAYERS:
        idx.append(next(i for i in range(depth) if i not in idx))
    idx.sort()
    out = {k: type(getattr(ref, k))(v[i] for i in idx) for k, v in lists.items()}
    out["_n"] = len(idx)
    return out


_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_MROPE_HALF = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SWIN = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
_VOCABMAP = {"vocabulary_map": {"<image>": 250, **{f"IMGIMG{c}Z": 200 + i for i, c in enumerate("ABCDEFGH")}}}
OVERRIDES = {  # model_type -> {field: value}; a value may be a callable of the kwargs so far
    "cvt": {"drop_path_rate": [0.0, 0.0, 0.0]},
    # causal LMs
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "nemotron": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {
        "axial_pos_shape": (4, 8),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "is_decoder": False,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "blt": {"encoder_hash_byte_group_vocab": 256},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "step3p5": {"sliding_window": 8},
    "glm5_next_text": {"index_kpool": 8},
    "qwen2_5_vl_vision": {"window_size": 32},
    "mobilevitv2": {"patch_size": 2},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "gemma3": {"mm_tokens_per_image": 4},
    "blip-2": {"image_token_index": 250, "num_query_tokens": 8},
    "led": {"attention_window": [8, 8]},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    # multimodal
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "qwen2_5_omni_text"), _MROPE),
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "glm4v_moe_text", "glm46v_text"), _MROPE_HALF),
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    },
    "emu3": _VOCABMAP,
    "chameleon": _VOCABMAP,
    # vision / audio
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "siglip2_vision_model": {"num_patches": 16},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "wav2vec2-conformer": {"vocab_size": VOCAB},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 64},
    "moonshine": {"pad_token_id": 0},
    "whisper": {"num_mel_bins": 16},
}


def _special(cls, kw, fields):
    o = OVERRIDES.get(cls.model_type, {})
    return {k: (v(kw) if callable(v) else v) for k, v in o.items()}


def tiny_config(cls, kv=KV, ids=None, path=""):
    kw = tiny_kwargs(cls, kv=kv, ids=ids, path=path)
    kw = {k.lstrip("!"): v for k, v in kw.items() if v is not DROP}
    return cls(**kw)


DROP = object()


# ------------------------------------------------------------------------------------------------- public API
def _split(name):
    mt, _, task = name.partition("@")
    return mt, task


def list_architectures():
    """The names in `zoo.csv`."""
    with (Path(__file__).parent / "zoo.csv").open() as file:
        return [row["name"] for row in csv.DictReader(file)]


def model_class(name):
    mt, task = _split(name)
    cls = TASKS[task][mt]
    return getattr(transformers, cls if isinstance(cls, str) else cls[0])


def make_config(name, kv=KV):
    mt, task = _split(name)
    cls = CONFIG_MAPPING[mt]
    cfg = tiny_config(cls, kv=kv)
    want = model_class(name).config_class
    if want is not None and not isinstance(cfg, want):  # e.g. a composite config for a text-only class
        sub = next((v for v in vars(cfg).values() if isinstance(v, want)), None)
        cfg = sub if sub is not None else tiny_config(want, kv=kv)
    if task in ("",) and hasattr(cfg, "is_decoder") and not cfg.is_encoder_decoder:
        cfg.is_decoder = True
    for c in _all_configs(cfg):
        if hasattr(c, "use_cache"):
            c.use_cache = False
    if task == "vision":
        cfg.num_labels = LABELS
    if cfg.is_encoder_decoder and _get(cfg, "decoder_start_token_id") is None:
        cfg.decoder_start_token_id = 1
    if task in ("s2s", "mm") and _get(cfg, "pad_token_id") is None:
        cfg.pad_token_id = 0
    return cfg


def _all_configs(cfg):
    yield cfg
    for v in list(vars(cfg).values()):
        if isinstance(v, PreTrainedConfig):
            yield from _all_configs(v)


def build_model(name, kv=KV, seed=0):
    torch.manual_seed(seed)
    cfg = make_config(name, kv)
    cls = model_class(name)
    model = cls._from_config(cfg, dtype=torch.float32) if hasattr(cls, "_from_config") else cls(cfg)
    return model.train()


def make_inputs(name, model, seed=1):
    g = torch.Generator().manual_seed(seed)
    _mt, task = _split(name)
    cfg = model.config

    def ids(b=BATCH, s=SEQ):
        return torch.randint(4, 200, (b, s), generator=g)

    def rnd(*s):
        return torch.randn(*s, generator=g)

    if name in INPUTS:
        return INPUTS[name](model, cfg, ids, rnd)
    if task == "vision":
        size = getattr(cfg, "image_size", None) or getattr(getattr(cfg, "vision_config", None), "image_size", IMG)
        size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        return {
            "pixel_values": rnd(BATCH, getattr(cfg, "num_channels", 3), *size),
            "labels": torch.randint(0, LABELS, (BATCH,), generator=g),
        }
    if task == "audio":
        if getattr(cfg, "input_feat_per_channel", None) or (hasattr(cfg, "num_mel_bins") and cfg.is_encoder_decoder):
            n = getattr(cfg, "num_mel_bins", 80)
            return {"input_features": rnd(BATCH, n, 2 * cfg.max_source_positions), "labels": ids()}
        return {"input_values": rnd(BATCH, 4000), "labels": ids(s=4)}
    x = ids()
    return {"input_ids": x, "labels": x.clone()}


def _image_text(model, cfg, ids, rnd, n_img=1, **extra):
    x = ids()
    tok = next(t for t in (_get(cfg, "image_token_id"), _get(cfg, "image_token_index")) if isinstance(t, int))
    vc = cfg.vision_config
    img, patch = _get(vc, "image_size", IMG), _get(vc, "patch_size", PATCH)
    img = img[0] if isinstance(img, (list, tuple)) else img
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    x[:, 2 : 2 + extra.pop("tokens", (img // patch) ** 2)] = tok
    labels = x.clone()
    labels[x == tok] = -100
    return {"input_ids": x, "pixel_values": rnd(BATCH, 3, img, img), "labels": labels, **extra}


def _contrastive(model, cfg, ids, rnd):
    x = ids()
    x[:, -1] = 2
    return {"input_ids": x, "pixel_values": rnd(BATCH, 3, IMG, IMG), "return_loss": True}


def _pixels_text(model, cfg, ids, rnd):
    x = ids()
    return {"input_ids": x, "pixel_values": rnd(BATCH, 3, IMG, IMG), "labels": x.clone()}


def _qwen_vl(model, cfg, ids, rnd):
    vc = cfg.vision_config
    m, p, t = vc.spatial_merge_size, vc.patch_size, vc.temporal_patch_size
    g = 2 * m  # a g x g grid of patches -> 4 merged tokens per image
    x = ids()
    x[:, 1] = cfg.vision_start_token_id
    x[:, 2:6] = cfg.image_token_id
    labels = x.clone()
    labels[:, 1:6] = -100
    out = {
        "input_ids": x,
        "pixel_values": rnd(BATCH * g * g, 3 * t * p * p),
        "image_grid_thw": torch.tensor([[1, g, g]] * BATCH),
        "labels": labels,
    }
    out["mm_token_type_ids"] = (x == cfg.image_token_id).int()
    return out


def _codebooks(model, cfg, ids, rnd):
    d = _get(cfg, "decoder", cfg)
    x = ids(BATCH * d.num_codebooks)
    return {"input_ids": x, "labels": x.reshape(BATCH, d.num_codebooks, SEQ).transpose(1, 2).contiguous()}


def _features(frames=None):
    def f(model, cfg, ids, rnd):
        ec = _get(cfg, "encoder_config") or cfg
        n = _get(ec, "num_mel_bins") or _get(cfg, "feature_projection_input_dim") or _get(ec, "input_dim") or 80
        t = frames or 64
        return {
            "input_features": rnd(BATCH, t, n),
            "attention_mask": torch.ones(BATCH, t, dtype=torch.long),
            "labels": ids(s=4),
        }

    return f


INPUTS = {  # name -> f(model, config, ids, rnd) for models that need more than tokens
    "clip@mmi": _contrastive,
    "siglip@mmi": _contrastive,
    "chinese_clip@mmi": _contrastive,
    "altclip@mmi": _contrastive,
    "blip@mmi": _pixels_text,
    "git@mmi": _pixels_text,
    "vilt@mmi": _pixels_text,
    "llava@mmi": _image_text,
    "vipllava@mmi": _image_text,
    "paligemma@mmi": _image_text,
    "gemma3@mmi": lambda m, c, i, r: {
        **_image_text(m, c, i, r, tokens=c.mm_tokens_per_image),
        "token_type_ids": torch.zeros(BATCH, SEQ, dtype=torch.long),
    },
    "blip-2@mmi": lambda m, c, i, r: _image_text(m, c, i, r, tokens=c.num_query_tokens),
    "qwen2_vl@mmi": _qwen_vl,
    "qwen2_5_vl@mmi": _qwen_vl,
    "qwen3_vl@mmi": _qwen_vl,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "audio-spectrogram-transformer@audio": lambda m, c, i, r: {
        "input_values": r(BATCH, c.max_length, c.num_mel_bins),
        "labels": torch.zeros(BATCH, dtype=torch.long),
    },
    "speech_to_text@audio": lambda m, c, i, r: {
        "input_features": r(BATCH, 64, c.input_feat_per_channel * c.input_channels),
        "labels": i(),
    },
    "wav2vec2-bert@audio": _features(),
    "parakeet_ctc@audio": _features(),
    "lasr_ctc@audio": _features(),
    "granite_speech5_ctc@audio": _features(),
    "siglip2@vision": lambda m, c, i, r: {
        "pixel_values": r(BATCH, 16, 3 * c.vision_config.patch_size**2),
        "labels": torch.zeros(BATCH, dtype=torch.long),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    },
    "imagegpt@vision": lambda m, c, i, r: {"input_ids": i(), "labels": torch.zeros(BATCH, dtype=torch.long)},
}


def build(name, seed=0):
    """-> (model in train mode, inputs dict) such that model(**inputs).loss works. Tries GQA first, then MHA."""
    err = None
    for kv in (KV, HEADS):
        try:
            model = build_model(name, kv, seed)
            inputs = make_inputs(name, model)
            with torch.no_grad():
                model(**inputs)
            model._zoo_kv = kv
            return model, inputs
        except Exception as e:
            err = err or e
    raise err


def loss_of(out):
    return out.loss if getattr(out, "loss", None) is not None else out["loss"]
