"""Small mixtures of experts as `transformers` builds them: `build_moe(name) -> (model, global batch)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH, SEQUENCE, VOCABULARY = 8, 16, 96
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def mixtral() -> nn.Module:
    """Four experts, two per token, and the router's auxiliary loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **_COMMON, intermediate_size=48, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
        )
    )


def qwen3_moe() -> nn.Module:
    """Eight experts; the weights of a token's two are made to add up to one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_COMMON, moe_intermediate_size=16, head_dim=8, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    )
    return Qwen3MoeForCausalLM(config)


def deepseek_v3() -> nn.Module:
    """Groups of experts, a shared expert, latent attention; the first layer dense."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **_COMMON | {"num_key_value_heads": 4},
        intermediate_size=64,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


MOE = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}


def build_moe(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and its global batch, the same in every process."""
    torch.manual_seed(seed)
    model = MOE[name]()
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    return model, {"input_ids": ids, "labels": ids}
