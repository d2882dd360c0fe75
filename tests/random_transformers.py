"""Transformers drawn at random: every part of one that models differ in, in small sizes.

sketches() -> Sketch -> build(sketch) -> (model, keyword inputs of the global batch)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PAD = 0


@dataclass(frozen=True)
class Sketch:
    """What a random model is made of, and the size of its global batch."""

    seed: int = 0
    batch: int = 4
    length: int = 8
    layers: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    ffn: int = 48
    vocabulary: int = 40
    activation: str = "silu_gated"
    norm: str = "rms"
    norm_first: bool = True
    bias: bool = False
    tied: bool = False
    fused_qkv: bool = False
    attention: str = "sdpa"
    positions: str = "rotary"
    mask: str = "causal"
    mixture: str = "none"
    dropout: float = 0.0
    frozen: str = "none"
    shared_layers: bool = False
    checkpointed: bool = False
    counts_steps: bool = False
    head: str = "tokens"
    loss: str = "inside"


def sketches() -> st.SearchStrategy[Sketch]:
    """Any sketch."""
    return st.builds(
        Sketch,
        seed=st.integers(0, 2**16),
        batch=st.sampled_from([4, 8]),
        length=st.sampled_from([4, 6, 8, 12]),
        layers=st.sampled_from([1, 1, 2]),
        heads=st.sampled_from([2, 4, 6]),
        kv_heads=st.sampled_from([1, 2]),
        head_size=st.sampled_from([4, 8]),
        ffn=st.sampled_from([24, 36, 48]),
        vocabulary=st.sampled_from([24, 30, 40]),
        activation=st.sampled_from(["silu_gated", "gelu", "gelu_tanh", "relu_squared", "tanh_fused_gate"]),
        norm=st.sampled_from(["rms", "layer", "layer_plain", "rms_by_hand"]),
        norm_first=st.booleans(),
        bias=st.booleans(),
        tied=st.booleans(),
        fused_qkv=st.booleans(),
        attention=st.sampled_from(["sdpa", "eager", "softcap"]),
        positions=st.sampled_from(["rotary", "learned", "sinusoidal", "alibi", "relative", "none"]),
        mask=st.sampled_from(["causal", "causal_tensor", "padding", "window", "packed", "none"]),
        mixture=st.sampled_from(["none", "none", "soft", "routed", "switch"]),
        dropout=st.sampled_from([0.0, 0.0, 0.0, 0.3]),
        frozen=st.sampled_from(["none", "none", "embedding", "attention", "all_but_norms"]),
        shared_layers=st.booleans(),
        checkpointed=st.booleans(),
        counts_steps=st.booleans(),
        head=st.sampled_from(["tokens", "tokens", "first_token", "mean", "smoothed"]),
        loss=st.sampled_from(["inside", "inside", "outside", "summed"]),
    )


class _RmsByHand(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _norm(sketch: Sketch, width: int) -> nn.Module:
    match sketch.norm:
        case "rms":
            return nn.RMSNorm(width, eps=1e-6)
        case "layer":
            return nn.LayerNorm(width)
        case "layer_plain":
            return nn.LayerNorm(width, elementwise_affine=False)
        case _:
            return _RmsByHand(width)


class _Attention(nn.Module):
    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.sketch = sketch
        width, size = sketch.heads * sketch.head_size, sketch.head_size
        self.parts = [sketch.heads * size, sketch.kv_heads * size, sketch.kv_heads * size]
        if sketch.fused_qkv:
            self.qkv = nn.Linear(width, sum(self.parts), bias=sketch.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, n, bias=sketch.bias) for n in self.parts)
        self.out = nn.Linear(width, width, bias=sketch.bias)
        if sketch.positions == "relative":
            self.relative = nn.Embedding(2 * sketch.length, sketch.heads)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        sketch = self.sketch
        batch, length, width = x.shape
        parts = self.qkv(x).split(self.parts, -1) if sketch.fused_qkv else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(batch, length, -1, sketch.head_size).transpose(1, 2) for part in parts)
        if sketch.positions == "rotary":
            q, k = _rotated(q), _rotated(k)
        groups = sketch.heads // sketch.kv_heads
        bias = _attention_bias(self, sketch, length)
        if sketch.attention == "sdpa" and bias is None and (mask is None or not causal):
            out = F.scaled_dot_product_attention(
                q, k, v, mask, sketch.dropout if self.training else 0.0, causal and mask is None, enable_gqa=groups > 1
            )
        else:
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) / math.sqrt(sketch.head_size)
            if sketch.attention == "softcap":
                scores = 5 * torch.tanh(scores / 5)
            if bias is not None:
                scores = scores + bias
            if causal:
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -1e9)
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e9)
            out = F.dropout(scores.softmax(-1), sketch.dropout, self.training) @ v
        return self.out(out.transpose(1, 2).reshape(batch, length, width))


def _rotated(x: Tensor) -> Tensor:
    length, size = x.shape[-2], x.shape[-1]
    angles = torch.arange(length)[:, None] / 100 ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def _attention_bias(module: _Attention, sketch: Sketch, length: int) -> Tensor | None:
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    if sketch.positions == "alibi":
        slopes = 2.0 ** -(torch.arange(1, sketch.heads + 1) * 8 / sketch.heads)
        return -slopes[:, None, None] * distance.abs()
    if sketch.positions == "relative":
        return module.relative(distance + sketch.length).permute(2, 0, 1)
    return None


class _Dense(nn.Module):
    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.kind = sketch.activation
        width, wide = sketch.heads * sketch.head_size, sketch.ffn
        twice = 2 if self.kind == "tanh_fused_gate" else 1
        self.up = nn.Linear(width, twice * wide, bias=sketch.bias)
        self.down = nn.Linear(wide, width, bias=sketch.bias)
        if self.kind == "silu_gated":
            self.gate = nn.Linear(width, wide, bias=sketch.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        match self.kind:
            case "silu_gated":
                up = F.silu(self.gate(x)) * up
            case "tanh_fused_gate":
                gate, up = up.chunk(2, -1)
                up = torch.tanh(gate) * up
            case "relu_squared":
                up = F.relu(up).square()
            case kind:
                up = F.gelu(up, approximate="tanh" if kind == "gelu_tanh" else "none")
        return self.down(up)


class _Mixture(nn.Module):
    """Experts: all of them for each token, or the best two (one, for `switch`) by sorted rows and grouped products."""

    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.kind, self.experts = sketch.mixture, 4
        self.top = 1 if self.kind == "switch" else 2
        width = sketch.heads * sketch.head_size
        self.router = nn.Linear(width, self.experts, bias=False)
        self.up = nn.Parameter(torch.randn(self.experts, width, sketch.ffn) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(self.experts, sketch.ffn, width) / math.sqrt(sketch.ffn))

    def forward(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        if self.kind == "soft":
            wide = F.silu(torch.einsum("bsh,ehf->bsef", x, self.up))
            return torch.einsum("bsef,efh,bse->bsh", wide, self.down, chances)
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = chances.reshape(-1, self.experts).topk(self.top, -1)
        ordered, places = chosen.flatten().sort()
        rows = flat[places // self.top]
        counts = torch.histc(ordered.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = counts.cumsum(0).to(torch.int32)
        wide = F.silu(torch.ops.transformers.grouped_mm_fallback(rows, self.up, ends))
        made = torch.ops.transformers.grouped_mm_fallback(wide, self.down, ends) * weights.flatten()[places, None]
        if self.kind == "switch":
            return torch.zeros_like(flat).index_add(0, places, made).view_as(x)
        back = torch.empty_like(places)
        back[places] = torch.arange(places.shape[0])
        return made[back].view(-1, self.top, x.shape[-1]).sum(1).view_as(x)


class _Layer(nn.Module):
    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.first, self.dropout = sketch.norm_first, sketch.dropout
        width = sketch.heads * sketch.head_size
        self.attention = _Attention(sketch)
        self.feed_forward = _Dense(sketch) if sketch.mixture == "none" else _Mixture(sketch)
        self.norm1, self.norm2 = _norm(sketch, width), _norm(sketch, width)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        def dropped(y: Tensor) -> Tensor:
            return F.dropout(y, self.dropout, self.training)

        if self.first:
            x = x + dropped(self.attention(self.norm1(x), mask, causal))
            return x + dropped(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + dropped(self.attention(x, mask, causal)))
        return self.norm2(x + dropped(self.feed_forward(x)))


class RandomTransformer(nn.Module):
    """A model as `sketch` says. Takes `ids` and `labels`, or `ids` alone where the loss is the user's."""

    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.sketch = sketch
        width = sketch.heads * sketch.head_size
        self.embed = nn.Embedding(sketch.vocabulary, width)
        if sketch.positions == "learned":
            self.positions = nn.Parameter(0.1 * torch.randn(sketch.length, width))
        elif sketch.positions == "sinusoidal":
            angles = torch.arange(sketch.length)[:, None] / 50 ** (torch.arange(width) / width)
            self.register_buffer("positions", torch.sin(angles), persistent=False)
        if sketch.shared_layers:
            self.layers = nn.ModuleList([_Layer(sketch)] * sketch.layers)
        else:
            self.layers = nn.ModuleList(_Layer(sketch) for _ in range(sketch.layers))
        self.norm = _norm(sketch, width)
        self.unembed = nn.Linear(width, sketch.vocabulary, bias=sketch.bias)
        if sketch.tied:
            self.unembed.weight = self.embed.weight
        if sketch.counts_steps:
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("average", torch.zeros(width))
        frozen = {"none": [], "embedding": [self.embed], "attention": [x.attention for x in self.layers]}
        for module in frozen.get(sketch.frozen, []):
            module.requires_grad_(False)
        if sketch.frozen == "all_but_norms" and any("norm" in name for name, _ in self.named_parameters()):
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("norm" in name)

    def _mask(self, ids: Tensor) -> tuple[Tensor | None, bool]:
        """(True where attention is allowed, whether attention is causal beside it)."""
        length = ids.shape[1]
        lower = torch.ones(length, length, dtype=torch.bool).tril()
        match self.sketch.mask:
            case "none":
                return None, False
            case "causal":
                return None, True
            case "causal_tensor":
                return lower[None, None], False
            case "window":
                return (lower & ~lower.tril(-3))[None, None], False
            case "padding":
                return (ids != PAD)[:, None, None, :] & lower | torch.eye(length, dtype=torch.bool), False
            case _:
                document = (ids == PAD).cumsum(-1)
                return (document[:, None, :, None] == document[:, None, None, :]) & lower, False

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        sketch = self.sketch
        x = self.embed(ids)
        if sketch.positions in ("learned", "sinusoidal"):
            x = x + self.positions[: ids.shape[1]]
        mask, causal = self._mask(ids)
        for layer in self.layers:
            if sketch.checkpointed and self.training:
                x = checkpoint(layer, x, mask, causal, use_reentrant=False)
            else:
                x = layer(x, mask, causal)
        if sketch.counts_steps:
            self.steps += 1
            self.average.lerp_(x.detach().mean((0, 1)), 0.1)
        x = self.norm(x)
        if sketch.head in ("first_token", "mean"):
            x = x[:, 0] if sketch.head == "first_token" else x.mean(1)
        logits = self.unembed(x)
        if labels is None:
            return logits
        if sketch.head in ("first_token", "mean"):
            loss = F.cross_entropy(logits, labels[:, 0])
        else:
            flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            smoothing = 0.1 if sketch.head == "smoothed" else 0.0
            reduction = "sum" if sketch.loss == "summed" else "mean"
            loss = F.cross_entropy(*flat, ignore_index=PAD, label_smoothing=smoothing, reduction=reduction)
        return {"loss": loss, "logits": logits}


def build(sketch: Sketch) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and its global batch."""
    import transformers.integrations.moe  # noqa: F401  registers the products of routed experts

    torch.manual_seed(sketch.seed)
    model = RandomTransformer(sketch)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms that are not all alike
            nn.init.normal_(parameter, mean=float(parameter.data.mean()), std=0.1)
    ids = torch.randint(0, sketch.vocabulary, (sketch.batch, sketch.length))
    labels = torch.randint(1, sketch.vocabulary, (sketch.batch, sketch.length))
    labels[0, :2] = PAD
    return model, {"ids": ids} if sketch.loss == "outside" else {"ids": ids, "labels": labels}
