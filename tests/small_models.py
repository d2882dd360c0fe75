"""Small models of the kinds users bring, each with a global batch: `build(name) -> (model, args, kwargs)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity import captured
from torch import nn
from torch.nn import functional as F

from passes.program.program import Program

BATCH, SEQUENCE, VOCABULARY = 8, 16, 96
Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _ids(length: int = SEQUENCE) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length))


def llama(layers: int = 2) -> Example:
    """Grouped-query attention, rotary positions, SwiGLU; the loss inside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    ids = _ids()
    return LlamaForCausalLM(config), (), {"input_ids": ids, "labels": ids}


def sized_llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None, vocabulary: int = 512, **more: Any
) -> nn.Module:
    """A LLaMA of these sizes on the meta device, without values; `more`: further fields of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, "use_cache": False, **more}))


def gpt2() -> Example:
    """Tied embeddings, biases, LayerNorm, a fused QKV; a vocabulary that 4 ranks do not divide."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY + 2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = _ids()
    return GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids}


def t5() -> Example:
    """Encoder and decoder, relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config), (), {"input_ids": _ids(), "labels": _ids(8)}


class PlainTransformer(nn.Module):
    """`torch.nn` only; logits out, so that the user computes the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(ids)))


class HandWritten(nn.Module):
    """Positional and keyword inputs, a dict with a loss and logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.positions = nn.Parameter(torch.randn(SEQUENCE, 32))
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.frozen = nn.Linear(32, 32)
        self.frozen.requires_grad_(False)

    def forward(
        self, ids: torch.Tensor, targets: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None
    ) -> dict[str, Any]:
        x = self.embed(ids) + self.positions
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.view(batch, length, 4, width // 4).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * scale
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.gelu(self.up(x))) + self.frozen(x)
        logits = x @ self.embed.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        return {"logits": logits, "loss": loss, "about": "hand-written"}


def plain() -> Example:
    """`PlainTransformer`."""
    return PlainTransformer(), (_ids(),), {}


def hand() -> Example:
    """`HandWritten`."""
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[:, -3:] = 0
    return HandWritten(), (_ids(), _ids()), {"scale": 0.5, "mask": mask}


MODELS: dict[str, Callable[[], Example]] = {"llama": llama, "gpt2": gpt2, "t5": t5, "plain": plain, "hand": hand}


def build(name: str, seed: int = 0) -> Example:
    """The model and its global batch, the same in every process."""
    torch.manual_seed(seed)
    return MODELS[name]()


def program_of(name: str = "llama") -> Program:
    """The step of a model on its global batch, ready to be planned."""
    model, args, kwargs = build(name)
    return captured(model, kwargs, args)


def tokens(sequence: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """What a decoder is fed, as `Captures` asks for it: one sample cut in so many parts, without values."""

    def fed(parts: int) -> dict[str, torch.Tensor]:
        ids = torch.empty(1, sequence // parts, dtype=torch.long, device="meta")
        return {"input_ids": ids, "labels": ids}

    return fed
