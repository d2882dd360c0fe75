"""Transformers as people write them by hand, each in another style; `MODELS` has their names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, HEADS, HEAD, FFN, SEQ = 32, 16, 4, 4, 32, 8


class Decoder(nn.Module):
    """Token ids through blocks to a cross-entropy over the vocabulary."""

    def __init__(self, block: Callable[[], nn.Module], layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def causal(n: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Einsum(nn.Module):
    """Attention as einsums over weights with dims of their own for heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HIDDEN, HEADS, HEAD) / 4) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, HEAD, HIDDEN) / 4)
        self.up, self.down = nn.Parameter(torch.randn(HIDDEN, FFN) / 4), nn.Parameter(torch.randn(FFN, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (torch.einsum("bsd,dhe->bhse", y, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(HEAD) + causal(x.shape[1])
        x = x + torch.einsum("bhqk,bhke,hed->bqd", scores.softmax(-1), v, self.o)
        return x + torch.einsum("bsf,fd->bsd", F.gelu(torch.einsum("bsd,df->bsf", x, self.up)), self.down)


class FusedChunk(nn.Module):
    """One matrix for queries, keys and values, and one for gate and up, cut by `chunk`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.gate_up, self.down = nn.Linear(HIDDEN, 2 * FFN), nn.Linear(FFN, HIDDEN)

    def heads(self, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        a = F.scaled_dot_product_attention(*self.heads(self.norm1(x)), is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class FusedUnbind(FusedChunk):
    """The same cut as a dim of three, by `unbind`, the way of timm's and nanoGPT's kin."""

    def heads(self, y: Tensor) -> tuple[Tensor, ...]:
        b, s, _ = y.shape
        q, k, v = self.qkv(y).view(b, s, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class ComplexRotary(FusedChunk):
    """Rotary positions as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(SEQ), 100.0 ** -torch.arange(0, 1, 2 / HEAD))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[2]]).flatten(-2).type_as(x)

    def heads(self, y: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().heads(y)
        return self.rotate(q), self.rotate(k), v


class ALiBi(FusedChunk):
    """Biases by distance, and grouped keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, 2 * 2 * HEAD, bias=False)
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        self.register_buffer("slopes", slopes.view(1, HEADS, 1, 1))

    def heads(self, y: Tensor) -> tuple[Tensor, ...]:
        b, s, _ = y.shape
        q = self.q(y).view(b, s, HEADS, HEAD).transpose(1, 2)
        k, v = self.kv(y).view(b, s, 2, 2, HEAD).unbind(2)
        k, v = (t.transpose(1, 2).repeat_interleave(HEADS // 2, 1) for t in (k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.heads(self.norm1(x))
        distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        scores = q @ k.transpose(-1, -2) * HEAD**-0.5 + self.slopes * distance
        scores = scores.masked_fill(distance > 0, torch.finfo(scores.dtype).min)
        x = x + self.o((F.softmax(scores, -1) @ v).transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).tensor_split(2, -1)
        return x + self.down(torch.sigmoid(gate) * gate * up)


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.attention(y, y, y, attn_mask=causal(x.shape[1]), need_weights=False)
        x = x + (y if self.batch_first else y.transpose(0, 1))
        return x + self.mlp(x)


class Functional(nn.Module):
    """`F.linear` on parameters in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(HIDDEN, HIDDEN) / 4) for _ in range(4)])
        self.mlp = nn.ParameterDict(
            {"up": nn.Parameter(torch.randn(FFN, HIDDEN) / 4), "down": nn.Parameter(torch.randn(HIDDEN, FFN) / 4)}
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (HIDDEN,)) * self.scale
        q, k, v = (F.linear(y, w).view(*y.shape[:2], HEADS, HEAD).transpose(1, 2) for w in self.weights[:3])
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=causal(y.shape[1]))
        x = x + F.linear(a.transpose(1, 2).reshape(x.shape), self.weights[3])
        return x + F.linear(F.relu(F.linear(x, self.mlp["up"])) ** 2, self.mlp["down"])


class _Swish(torch.autograd.Function):
    """x * sigmoid(beta x), with a backward by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, beta)
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, beta = ctx.saved_tensors
        s = torch.sigmoid(beta * x)
        inner = gradient * x * s * (1 - s)
        return gradient * s + inner * beta, (inner * x).sum()


class ByHand(FusedChunk):
    """A custom autograd function."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        a = F.scaled_dot_product_attention(*self.heads(self.norm1(x)), is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).split(FFN, -1)
        return x + self.down(_Swish.apply(gate, self.beta) * up)


@torch.library.custom_op("handwritten::norm", mutates_args=())
def custom_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Rows scaled to unit mean square, times a weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@custom_norm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("handwritten::norm_backward", mutates_args=())
def custom_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `custom_norm`."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    y = x * scale
    inner = gradient * weight
    gx = scale * (inner - y * (inner * y).mean(-1, keepdim=True))
    return gx, (gradient * y).flatten(0, -2).sum(0)


@custom_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


custom_norm.register_autograd(
    lambda ctx, gradient: torch.ops.handwritten.norm_backward(gradient.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class CustomOp(FusedChunk):
    """An op of `torch.library` that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.ops.handwritten.norm(x, self.scale))


class Recurrent(nn.Module):
    """A linear recurrence over positions, step by step, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.decay = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.inner(x), torch.sigmoid(self.gate(x))
        state, states = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(self.decay) * state + u[:, t]
            states.append(state)
        return x + self.out(torch.stack(states, 1) * g)


class Stacked(nn.Module):
    """Layers whose weights are stacked in one parameter, indexed in a loop; a learned position; logits tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(VOCAB, HIDDEN))
        self.positions = nn.Parameter(torch.randn(1, SEQ, HIDDEN) / 4)
        self.qkv = nn.Parameter(torch.randn(2, HIDDEN, 3, HEADS, HEAD) / 4)
        self.out = nn.Parameter(torch.randn(2, HEADS * HEAD, HIDDEN) / 4)
        self.mlp = nn.Parameter(torch.randn(2, 2, HIDDEN, HIDDEN) / 4)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed[ids] + self.positions[:, : ids.shape[1]]
        for qkv, out, mlp in zip(self.qkv, self.out, self.mlp, strict=True):
            y = F.layer_norm(x, (HIDDEN,))
            q, k, v = torch.tensordot(y, qkv, 1).movedim(2, 0).transpose(2, 3)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + a.transpose(1, 2).flatten(2) @ out
            x = x + torch.tanh(x @ mlp[0]) @ mlp[1]
        logits = x @ self.embed.T
        return {"loss": -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean()}


class Normalised(Decoder):
    """Tables whose rows are scaled to length one in each step, and logits scaled by a parameter, the way of nGPT.

    No module is called behind the last block.
    """

    def __init__(self) -> None:
        super().__init__(FusedChunk)
        self.scale = nn.Parameter(torch.ones(VOCAB))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = F.embedding(ids, F.normalize(self.embed.weight, dim=-1))
        for block in self.blocks:
            x = block(x)
        logits = self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.head.weight, dim=-1))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Images(nn.Module):
    """A convolutional stem, a class token, `nn.TransformerEncoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, HIDDEN, 2, 2),
            nn.GroupNorm(2, HIDDEN),
        )
        self.token = nn.Parameter(torch.zeros(1, 1, HIDDEN))
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.stem(pixels).flatten(2).mT
        x = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return {"loss": F.cross_entropy(self.head(x[:, 0]), labels, label_smoothing=0.1)}


class Translation(nn.Module):
    """`nn.Transformer` with padding masks, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN, padding_idx=0)
        self.body = nn.Transformer(HIDDEN, HEADS, 1, 1, FFN, dropout=0.0)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        x, y = (self.embed(t).transpose(0, 1) for t in (source, target))
        mask = nn.Transformer.generate_square_subsequent_mask(len(y))
        out = self.body(x, y, tgt_mask=mask, src_key_padding_mask=source == 0, tgt_is_causal=True)
        logits = self.head(out).permute(1, 2, 0)
        return {"loss": F.cross_entropy(logits, target, ignore_index=0)}


class Experts(nn.Module):
    """Top-2 experts in a loop over all of them, and an auxiliary loss of balance."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, HIDDEN, FFN) / 4),
            nn.Parameter(torch.randn(4, FFN, HIDDEN) / 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e in range(4):
            share = torch.where(chosen == e, weights, 0.0).sum(-1, keepdim=True)
            out = out + share * (F.relu(flat @ self.up[e]) @ self.down[e])
        return x + out.view_as(x)


class Dispatch(nn.Module):
    """Top-1 experts with a capacity, tokens sent by products with one-hot tensors; a batch norm over channels."""

    def __init__(self, capacity: int = 4) -> None:
        super().__init__()
        self.capacity = capacity
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, HIDDEN, FFN) / 4),
            nn.Parameter(torch.randn(4, FFN, HIDDEN) / 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        gate, chosen = self.router(y).softmax(-1).max(-1)
        expert = F.one_hot(chosen, 4).float()
        place = (expert.cumsum(1) * expert).sum(-1).long() - 1
        slot = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity) * (place < self.capacity)[..., None]
        sent = torch.einsum("ble,blc->blec", expert, slot.float())
        given = torch.einsum("blec,bld->becd", sent, y)
        out = torch.einsum("becf,efd->becd", torch.einsum("becd,edf->becf", given, self.up).relu(), self.down)
        return x + torch.einsum("blec,becd->bld", sent * gate[..., None, None], out)


def _tokens(random: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCAB, (4, SEQ), generator=random)
    return {"ids": ids, "labels": ids.roll(-1, 1)}


def _pixels(random: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixels": torch.randn(4, 3, 16, 16, generator=random), "labels": torch.randint(0, 3, (4,), generator=random)
    }  # fmt: skip


def _pairs(random: torch.Generator) -> dict[str, Tensor]:
    source = torch.randint(1, VOCAB, (4, SEQ), generator=random)
    source[1:, -2:] = 0
    return {"source": source, "target": torch.randint(1, VOCAB, (4, 6), generator=random)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], dict[str, Tensor]]]] = {
    "einsum": (lambda: Decoder(Einsum), _tokens),
    "fused chunk": (lambda: Decoder(FusedChunk, tied=True), _tokens),
    "fused unbind": (lambda: Decoder(FusedUnbind), _tokens),
    "complex rotary": (lambda: Decoder(ComplexRotary), _tokens),
    "alibi": (lambda: Decoder(ALiBi), _tokens),
    "nn.MultiheadAttention": (lambda: Decoder(TorchAttention), _tokens),
    "nn.MultiheadAttention, positions first": (lambda: Decoder(lambda: TorchAttention(False)), _tokens),
    "functional": (lambda: Decoder(Functional), _tokens),
    "autograd.Function": (lambda: Decoder(ByHand), _tokens),
    "torch.library": (lambda: Decoder(CustomOp), _tokens),
    "recurrent": (lambda: Decoder(Recurrent), _tokens),
    "stacked": (Stacked, _tokens),
    "normalised tables": (Normalised, _tokens),
    "conv stem, nn.TransformerEncoder": (Images, _pixels),
    "nn.Transformer": (Translation, _pairs),
    "experts in a loop": (lambda: Decoder(Experts), _tokens),
    "experts by one-hot products": (lambda: Decoder(Dispatch), _tokens),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in train mode and its inputs, always the same."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]
    return model(), inputs(torch.Generator().manual_seed(1))
