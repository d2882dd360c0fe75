"""What users' models do beside layers: masks of all kinds, checkpointing, own ops, own outputs, buffers that change.

Each is captured, planned and played on four simulated ranks, against the unmodified model on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import captured, errors, planned
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from passes.capture.capture import capture
from passes.errors import CaptureError

Example = tuple[nn.Module, dict[str, Any]]
MESH = {"dp": 2, "tp": 2}
BATCH, LENGTH, VOCABULARY = 4, 16, 96


def _ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH))


def _padding() -> Tensor:
    """Padding at the end of two rows and at the start of another."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[:2, -4:] = 0
    mask[3, :5] = 0
    return mask


def _decoder(kind: str, attention: str = "sdpa", **config: Any) -> nn.Module:
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "attn_implementation": attention,
    }
    made = getattr(transformers, f"{kind}Config")(**sizes, **config)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(made)
    return model


def _labelled(**more: Any) -> dict[str, Any]:
    ids = _ids()
    return {"input_ids": ids, "labels": ids, **more}


def padded(attention: str) -> Example:
    return _decoder("Llama", attention), _labelled(attention_mask=_padding())


def packed(attention: str) -> Example:
    """Two documents in a row, told by positions that start again."""
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None].repeat(BATCH, 1)
    return _decoder("Llama", attention), _labelled(position_ids=positions, use_cache=False)


def window(attention: str) -> Example:
    return _decoder("Mistral", attention, sliding_window=4), _labelled(attention_mask=_padding())


def alibi() -> Example:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, hidden_dropout=0.0)
    return BloomForCausalLM(config), _labelled(attention_mask=_padding())


def checkpointed() -> Example:
    model = _decoder("Llama")
    model.gradient_checkpointing_enable()
    return model, _labelled()


class EncoderDecoder(nn.Module):
    """`nn.Transformer` with a causal mask and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.body = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> dict[str, Tensor]:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.body(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return {"loss": F.cross_entropy(self.head(out).flatten(0, 1), target.flatten())}


def torch_transformer() -> Example:
    return EncoderDecoder(), {"source": _ids(), "target": _ids()[:, :8].clone(), "padding": _padding() == 0}


class Attending(nn.Module):
    """`nn.MultiheadAttention` with both kinds of masks, a bias of keys and values, and its weights in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor, padding: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        causal = torch.ones(LENGTH, LENGTH).tril() == 0
        out, weights = self.attention(x, x, x, key_padding_mask=padding, attn_mask=causal)
        loss = F.cross_entropy(self.head(out).flatten(0, 1), ids.flatten())
        return {"loss": loss + weights.square().sum(-1).mean()}


def multihead() -> Example:
    return Attending(), {"ids": _ids(), "padding": F.pad(_padding()[:, 1:] == 0, (1, 0))}


@torch.library.custom_op("autopar_tests::twisted", mutates_args=())
def twisted(x: Tensor, by: float) -> Tensor:
    """A user's own op, with an autograd formula."""
    return x * torch.sigmoid(by * x)


@twisted.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("autopar_tests::twisted_backward", mutates_args=())
def twisted_backward(grad: Tensor, x: Tensor, by: float) -> Tensor:
    gate = torch.sigmoid(by * x)
    return grad * (gate + by * x * gate * (1 - gate))


@twisted_backward.register_fake
def _(grad: Tensor, x: Tensor, by: float) -> Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.by = inputs[1]


twisted.register_autograd(
    lambda ctx, grad: (twisted_backward(grad, *ctx.saved_tensors, ctx.by), None), setup_context=_keep
)


@torch.library.custom_op("autopar_tests::ranked", mutates_args=())
def ranked(x: Tensor) -> Tensor:
    """An op without an autograd formula, for what needs none: each row's place by its first entry, over all rows."""
    return x[..., 0].flatten().argsort().argsort().view(x.shape[:-1]).to(x.dtype)


@ranked.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


@torch.library.custom_op("autopar_tests::shapeless", mutates_args=())
def shapeless(x: Tensor) -> Tensor:
    """An op that does not tell its result's shape."""
    return x.clone()


class Counting(torch.autograd.Function):
    """The identity, whose backward reads numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * len(grad.flatten().tolist())


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is three times as large."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class OwnOps(nn.Module):
    """A user's own ops and function between two layers."""

    def __init__(self, told: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.told = nn.Linear(16, 64), nn.Linear(64, 16), told

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = twisted(self.up(x), 1.5) if self.told else shapeless(self.up(x))
        place = ranked(x.detach())
        return {"loss": (Scaled.apply(self.down(y)) * place[..., None]).square().mean(), "y": y}


def own_ops() -> Example:
    return OwnOps(), {"x": torch.randn(BATCH, 8, 16)}


class Running(nn.Module):
    """Batch statistics over the global batch, a counter, and a buffer that is put in another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.second(self.norm(self.first(x)).relu())
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.seen += x.shape[0]
        return {"loss": (y - self.mean).square().mean(), "y": y}


def running() -> Example:
    return Running(), {"x": torch.randn(8, 16)}


EXAMPLES: dict[str, Callable[[], Example]] = {
    "padded, eager": lambda: padded("eager"),
    "packed, sdpa": lambda: packed("sdpa"),
    "packed, eager": lambda: packed("eager"),
    "window, sdpa": lambda: window("sdpa"),
    "alibi": alibi,
    "checkpointed": checkpointed,
    "nn.Transformer": torch_transformer,
    "nn.MultiheadAttention": multihead,
    "own ops": own_ops,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_on_four_ranks_is_one_on_one_device(name: str) -> None:
    torch.manual_seed(0)
    model, kwargs = EXAMPLES[name]()
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    program = captured(model, kwargs)
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, before[key]), key
    _, _, local = planned(program, MESH, "auto")
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


def test_checkpointing_of_the_model_is_kept() -> None:
    """What the model wants computed again for backward is: its products stand in backward once more."""

    def products(checkpointing: bool) -> int:
        torch.manual_seed(0)
        model = _decoder("Llama")
        if checkpointing:
            model.gradient_checkpointing_enable()
        nodes = captured(model, _labelled()).graph.graph.nodes
        return sum(node.target is torch.ops.aten.mm.default and node.meta["phase"] == "backward" for node in nodes)

    # Of q, k, v, o, gate, up and down; the last one's result is read by no gradient.
    assert products(True) == products(False) + 6


def test_buffers_that_change_on_a_mesh() -> None:
    torch.manual_seed(0)
    model, kwargs = running()
    parity = autopar.verify(model, MESH, kwargs)
    assert parity.ok, parity
    changed = {tensor.name for tensor in parity.tensors if tensor.kind == "buffer"}
    assert changed == {"mean", "seen", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


class Clamped(nn.Module):
    """Each layer clamps its weight, then reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.weight.data.clamp_(-0.1, 0.1)
            x = x + layer(x).tanh()
        return x.square().mean()


def test_parameters_that_change_on_a_mesh() -> None:
    torch.manual_seed(0)
    model = Clamped()
    parity = autopar.verify(model, MESH, {"x": torch.randn(8, 16)}, strategy="megatron")
    assert parity.ok, parity
    assert {t.name for t in parity.tensors if t.kind == "buffer"} == {f"layers.{i}.weight" for i in range(3)}
    assert model.layers[0].weight.abs().max() > 0.1


def test_packed_sequences_as_the_model_takes_them() -> None:
    """transformers keeps documents apart only without a cache; a step is what eager's is, and says so."""
    torch.manual_seed(0)
    model, kwargs = packed("sdpa")
    del kwargs["use_cache"]
    program = captured(model, kwargs)
    found = errors(model, planned(program, MESH, "auto")[2], kwargs)
    assert max(found.output, found.gradient) < 1e-4, found
    assert any("use_cache=False" in note for note in program.notes)
    apart = model(**kwargs, use_cache=False).loss
    assert abs(apart - model(**kwargs).loss) > 1e-4  # it does make a difference


def test_flex_attention_is_refused_by_name() -> None:
    model = _decoder("Llama", "flex_attention")
    for training in (True, False):
        with (
            torch.set_grad_enabled(training),
            pytest.raises(CaptureError, match=r"flex_attention.*FlexAttention is not supported.*with a mask$"),
        ):
            capture(model, (), _labelled())


def test_an_op_that_does_not_tell_its_shape_is_named() -> None:
    with pytest.raises(CaptureError, match=r"test_model_features.py:\d+.*shapeless"):
        capture(OwnOps(told=False), (), {"x": torch.randn(BATCH, 8, 16)})


def test_a_backward_that_reads_numbers_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": Counting.apply(self.layer(x)).sum()}

    with pytest.raises(CaptureError, match=r"test_model_features.py:\d+.*(backward of loss|tangent)"):
        capture(Net(), (), {"x": torch.randn(BATCH, 8, 16)})


@dataclass
class Out:
    """A user's own output."""

    score: Tensor
    parts: list[Tensor]
    about: str = "own"


class Returning(nn.Module):
    """Returns what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(16, 16), kind

    def forward(self, x: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        y = self.layer(x)
        match self.kind:
            case "tensor":
                return y
            case "tuple":
                return y, None, (y.square().mean(), 3)
            case "dict":
                return {"y": y, "more": {"loss": y.square().mean()}}
            case "dataclass":
                return Out(y.square().mean(), [y, 2 * y])
            case _:
                return CausalLMOutput(loss=y.square().mean(), logits=y)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass", "model output"])
def test_outputs_of_any_kind(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Returning(kind), torch.randn(8, 16)
    parity = autopar.verify(model, MESH, (x,))
    assert parity.ok, parity
    program = capture(model, (x,), batch_dims=[0], batch_size=8)
    leaves = torch.utils._pytree.tree_leaves(model(x))
    assert program.out_spec.num_leaves == len(leaves)
    assert sum(one.kind == "output" for one in program.outputs) == sum(isinstance(one, Tensor) for one in leaves)


class Hides(nn.Module):
    """Returns what no graph can look into."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> object:
        y = self.linear(x).square().mean()
        match self.kind:
            case "SimpleNamespace":
                return SimpleNamespace(loss=y)
            case "set":
                return {y}
            case _:
                return {"0": y, 0: 2 * y}


@pytest.mark.parametrize("kind", ["SimpleNamespace", "set", "two of the model's outputs are called '0'"])
def test_outputs_that_would_be_lost_are_refused(kind: str) -> None:
    with pytest.raises(CaptureError, match=f"{kind}(, in which no tensor is found: return tensors|; give)"):
        capture(Hides(kind), (torch.randn(8, 16),))


class SharedGradient(nn.Module):
    """A class token and its position, whose gradients are one sum: the one is read to make the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = (self.token + self.position.unsqueeze(0)).expand(x.shape[0], -1, -1)
        return self.linear(torch.cat([first, x], 1)).square().mean()


def test_a_gradient_that_another_is_made_from() -> None:
    model, inputs = SharedGradient(), {"x": torch.randn(4, 6, 8)}
    program = captured(model, inputs)
    for strategy in ("megatron", "fsdp", "ddp"):
        _, _, local = planned(program, MESH, strategy)
        found = errors(model, local, inputs)
        assert found.output < 1e-5, (strategy, found)
        assert found.gradient < 1e-4, (strategy, found)


class Latent(nn.Module):
    """Causal attention whose values have a smaller head size (8) than queries and keys (12), and a given scale."""

    def __init__(self) -> None:
        super().__init__()
        sizes = 48, 48, 32
        self.query, self.key, self.value = (nn.Linear(32, size, bias=False) for size in sizes)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
        return self.out(out.transpose(1, 2).flatten(2)).square().mean()


def test_values_of_a_smaller_head_size_are_attended_to_by_one_op() -> None:
    """No scores in the graph, and a step is eager's, which writes them out."""
    torch.manual_seed(0)
    model, kwargs = Latent(), {"x": torch.randn(4, 8, 32)}
    program = captured(model, kwargs)
    targets = [node.target for node in program.graph.graph.nodes]
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in targets
    assert torch.ops.aten.bmm.default not in targets
    _, _, local = planned(program, MESH, "auto")
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


class Decaying(nn.Module):
    """A weight per head and distance, made a matrix by cutting a row that is repeated: RWKV-5's parallel form."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.decay = nn.Parameter(torch.rand(4, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        rows = F.pad(self.decay, (0, LENGTH)).repeat(1, LENGTH)[:, :-LENGTH]
        weights = rows.view(4, LENGTH, 2 * LENGTH - 1)[:, :, LENGTH - 1 :]
        scores = query @ key.transpose(-1, -2) * weights
        mixed = (scores @ value).transpose(1, 2).flatten(2)
        return self.out(F.group_norm(mixed.flatten(0, 1), 4).view_as(mixed)).square().mean()


def test_a_gradient_without_a_batch_takes_the_whole_sequence_of_the_batch_axis() -> None:
    """Under `megatron`, 8 ranks split it along the sequence, of which two are left for 4."""
    torch.manual_seed(0)
    model, kwargs = Decaying(), {"x": torch.randn(16, LENGTH, 32)}
    _, _, local = planned(captured(model, kwargs), {"dp": 8, "tp": 4}, "megatron")
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found
