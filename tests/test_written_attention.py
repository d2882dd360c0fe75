"""Attention that a model writes out, as frameworks' kernels take it: `--fused-attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import autopar
from costmodel.compute import attention as attention_work
from costmodel.presets import hardware
from passes.analysis.analysis import analyse
from passes.capture.capture import capture
from passes.capture.written_attention import WrittenAttention
from passes.padding.pad import pad
from passes.padding.uneven import uneven_dims
from passes.planner.pipeline import prepare
from passes.prepare.masks import masks_as_shares
from passes.rules.call import call_of
from passes.rules.work import work_of
from passes.runs.candidate_replicated import _context
from passes.runs.depth import Profile
from passes.runs.setup import Setup

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

B, H, G, S, D = 2, 4, 2, 24, 8


class _Followed(TorchFunctionMode):
    """Runs real tensors through what capture uses."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = WrittenAttention()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.attention.call(func, args, kwargs or {}, func)


def _causal() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def _added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    scores = scores + torch.where(_causal(), 0.0, -1e30)[None, None]
    return torch.matmul(nn.functional.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype), v)


def _filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    scores = scores.masked_fill(_causal() == 0, float("-inf"))
    return scores.softmax(-1) @ v


def _chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    scores = torch.where(_causal(), scores, torch.full([], -1e30, dtype=q.dtype))
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def _joined_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads joined to the batch, distances added by the product, as BLOOM does."""
    distances = torch.arange(S, dtype=q.dtype).expand(B * H, 1, S) * 0.01
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.baddbmm(distances, q, k.transpose(1, 2), beta=1.0, alpha=D**-0.5).view(B, H, S, S)
    scores = scores.masked_fill(~_causal(), -1e30)
    return torch.bmm(scores.softmax(dim=-1).view(B * H, S, S), v).view(B, H, S, D)


def _by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # batch, sequence, heads, entries
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def _in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3))
    scores *= D**-0.5
    scores.masked_fill_(~_causal(), -1e30)
    return torch.matmul(scores.softmax(-1), v)


WRITTEN = [_added_mask, _filled, _chosen, _joined_heads, _by_letters, _in_place]


@pytest.mark.parametrize("written", WRITTEN, ids=lambda f: f.__name__.strip("_"))
def test_what_is_put_in_its_place_computes_the_same(written: Callable[..., Tensor]) -> None:
    """Where there are no sinks, caps or dropout: values and gradients are those of the written-out code."""
    torch.manual_seed(0)
    given = [torch.randn(B, H, S, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    wanted = written(*given)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), given)
    with _Followed() as followed:
        found = written(*given)
    assert followed.attention.count == 1
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found.square().sum(), given), wanted_grads, strict=True):
        torch.testing.assert_close(one, other)


def _repeated(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.repeat_interleave(x, H // G, dim=1)
    return x[:, :, None].expand(B, G, H // G, S, D).reshape(B, H, S, D)


@pytest.mark.parametrize("interleaved", [False, True])
def test_repeated_keys_are_taken_as_few_as_they_are(interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, S, D, dtype=torch.float64) for heads in (H, G, G))
    seen: list[int] = []
    real = nn.functional.scaled_dot_product_attention

    def kernel(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        seen.append(key.shape[1])
        return real(query, key, value, **kwargs)

    wanted = _added_mask(q, _repeated(k, interleaved), _repeated(v, interleaved))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", kernel)
    with _Followed() as followed:
        found = _added_mask(q, _repeated(k, interleaved), _repeated(v, interleaved))
    assert followed.attention.count == 1
    assert seen == [G]
    torch.testing.assert_close(found, wanted)


class _OfScores(nn.Module):
    """Attention whose scores something is done to, between a projection and a sum."""

    def __init__(self, do: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.do = nn.Linear(H * D, 3 * H * D), do
        self.bias = nn.Parameter(torch.zeros(H, S, S))
        self.scale = nn.Parameter(torch.ones(H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        weights = self.do(self, torch.matmul(q, k.transpose(2, 3)))
        return torch.matmul(weights, v).square().sum()


def _kernels(do: Callable[[Any, Tensor], Tensor]) -> int:
    program = capture(_OfScores(do), (torch.zeros(1, S, H * D),), fused_attention=True)
    return len(program.graph.graph.find_nodes(op="call_function", target=FORWARD))


def test_what_no_kernel_does_stays_as_it_is_written() -> None:
    assert _kernels(lambda m, s: s.softmax(-1)) == 1
    assert _kernels(lambda m, s: nn.functional.dropout(torch.tanh(s / 50.0).mul(50.0).softmax(-1), 0.1)) == 1
    assert _kernels(lambda m, s: (s + m.bias).softmax(-1)) == 0  # learned
    assert _kernels(lambda m, s: (s * m.scale).softmax(-1)) == 0
    assert _kernels(lambda m, s: s.softmax(-2)) == 0  # not over keys
    assert _kernels(lambda m, s: s.relu()) == 0
    assert _kernels(lambda m, s: s.softmax(-1).softmax(-1)) == 0
    assert _kernels(lambda m, s: s.softmax(-1) * m.scale) == 0


OF_TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "use_cache": False,
}  # fmt: skip


def _oss() -> nn.Module:
    config = GptOssConfig(
        **OF_TINY, head_dim=16, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=128,
        attn_implementation="eager",
    )  # fmt: skip
    return GptOssForCausalLM(config).to(torch.bfloat16)


def _gemma() -> nn.Module:
    config = Gemma2Config(**OF_TINY, head_dim=16, intermediate_size=64, sliding_window=128, attn_implementation="eager")
    return Gemma2ForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("make", [_oss, _gemma])
def test_windows_leave_out_blocks(make: Callable[[], nn.Module]) -> None:
    """2048 tokens are 16 blocks of 128: of the 256 pairs a window of 128 sees 16 + 15, and each of 16 rows takes 3 more
    to start; the causal layer sees 16 * 17 / 2."""
    with torch.device("meta"):
        model = make().train()
    ids = torch.zeros(1, 2048, dtype=torch.long)
    program = masks_as_shares(capture(model, (), {"input_ids": ids, "labels": ids}, fused_attention=True))
    graph = program.graph.graph
    for target, products in ((FORWARD, 2), (BACKWARD, 5)):
        nodes = graph.find_nodes(op="call_function", target=target)
        flops = []
        for node in nodes:
            call = call_of(node)
            assert call.get("attn_mask") is None
            work = work_of(call, [f.shape for f in call.operands], [f.shape if f else () for f in call.results])
            flops.append(work.flops)
            assert call.facts("key").shape[1] == 4  # as few as there are
        whole = 2.0 * products * 8 * 2048 * 2048 * 16
        assert sorted(flops) == pytest.approx([whole * (31 + 3 * 16) / 256, whole * 136 / 256])
    softmaxes = graph.find_nodes(op="call_function", target=aten._softmax.default)
    assert all(node.meta["val"].shape[-1] < 2048 for node in softmaxes)  # the router's


def test_padded_heads_have_the_window_too() -> None:
    """Six heads on four ranks are padded to eight: a third more work, and no more blocks than the window sees."""
    config = MistralConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=96, sliding_window=128, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = MistralForCausalLM(config), torch.empty(4, 2048, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids}
    captured = capture(model, (), inputs, batch_dims=[0, 0], batch_size=4, fused_attention=True)
    analysis = analyse(prepare(masks_as_shares(captured)))
    padded = pad(analysis, uneven_dims(analysis, (1, 4), (0,), "megatron")).program
    for target in (FORWARD, BACKWARD):
        (real, larger) = (
            call_of(*program.graph.graph.find_nodes(op="call_function", target=target))
            for program in (analysis.program, padded)
        )
        flops = [
            work_of(call, [f.shape for f in call.operands], [f.shape if f else () for f in call.results]).flops
            for call in (real, larger)
        ]
        assert larger.facts("query").shape[1] == 8
        assert flops[1] == pytest.approx(flops[0] * 8 / 6)


def test_a_window_is_never_more_than_what_is_causal() -> None:
    """And takes its blocks and its rows' starts, in keys of 128."""

    def flops(seen: float | None) -> float:
        return attention_work(1, 1, 8192, 8192, 64, causal=True, seen=seen).flops

    assert flops(65 / 128) == flops(None)
    assert flops(2 / 64) / flops(None) == pytest.approx((2 + 3) / 64 / (65 / 128))


def _llama(attention: str) -> nn.Module:
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=16,
            num_key_value_heads=4, vocab_size=512, max_position_embeddings=2048, use_cache=False,
            attn_implementation=attention,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(torch.bfloat16)


def test_eager_is_priced_as_the_kernel_where_that_is_asked_for() -> None:
    setup = Setup(dp_shard=4, cp=2, state="zero1", gradient_bytes=4)
    with pytest.raises(ValueError, match="no attention kernel was found"):
        autopar.price(_llama("eager"), setup, "h100", sequence=2048)
    fused = autopar.price(_llama("eager"), setup, "h100", sequence=2048, fused_attention=True)
    kernel = autopar.price(_llama("sdpa"), setup, "h100", sequence=2048)
    assert fused.step_time_s == pytest.approx(kernel.step_time_s, rel=1e-6)
    assert fused.peak_memory_bytes == pytest.approx(kernel.peak_memory_bytes, rel=1e-6)
    assert fused.model_flops == pytest.approx(kernel.model_flops)
    assert fused.fused_attention
    assert not kernel.fused_attention
    assert any("--fused-attention" in note and "plans" in note for note in fused.notes)


def test_parts_of_a_sequence_meet_no_further_keys_within_a_window() -> None:
    """Of two layers one sees a window: 4 parts have 3 times the other's attention on top."""
    seconds = {"compute.forward.attention": 5.0, "compute.backward.attention": 10.0}
    found = Profile(2, seconds | {"windowed.forward": 1.0, "windowed.backward": 2.0, "keys": 2.0}, {})
    _, more_s = _context(Setup(dp_shard=2, cp=4, state="zero1"), found, hardware("h100"))
    assert more_s == pytest.approx(3 * (5 + 10 - 1 - 2) / 2)
