"""The captured graph, run on real tensors, against the unmodified model run eagerly."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional as F

from passes.capture.capture import capture
from passes.errors import CaptureError
from passes.program.program import Program

transformers = pytest.importorskip("transformers")


Results = dict[tuple[str, str], Tensor]


def run(program: Program, model: nn.Module, args: Any, kwargs: Any, tangent: Any = 1.0) -> Results:
    """What the graph gives on the model's own tensors: (kind, name) -> value."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    leaves = iter([x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
    values = []
    for given, node in zip(program.inputs, program.graph.graph.find_nodes(op="placeholder"), strict=True):
        val = node.meta["val"]
        if given.kind == "tangent":
            values.append(
                tangent[given.name] if isinstance(tangent, dict) else torch.full(val.shape, tangent, dtype=val.dtype)
            )
        else:
            values.append((next(leaves) if given.kind == "input" else state[given.name]).detach().clone())
        assert values[-1].shape == val.shape
        assert values[-1].dtype == val.dtype
    with torch.no_grad():
        results = program.graph(*values)
    return {(o.kind, o.name): value for o, value in zip(program.outputs, results, strict=True)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: Results, model: nn.Module, atol: float = 1e-6) -> None:
    wanted = gradients(model)
    assert {name for kind, name in found if kind == "gradient"} == set(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(
            found["gradient", name], grad, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def tokens(rows: int = 4, length: int = 12, vocab: int = 64) -> Tensor:
    return torch.randint(2, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_hugging_face_step_is_eagers(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, ids = build(), tokens()
    labels = ids.clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    program = capture(model, (), batch, batch_size=4)
    loss = model(**batch).loss
    (2.5 * loss).backward()
    found = run(program, model, (), batch, tangent=2.5)
    assert program.has_loss
    torch.testing.assert_close(found["output", "loss"], loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["output", "logits"], model(**batch).logits.detach(), rtol=1e-4, atol=1e-5)
    assert_same_gradients(found, model)
    with torch.device("meta"):
        on_meta = build()
    assert on_meta.state_dict().keys() == model.state_dict().keys()
    fake_batch = {k: v.to("meta") for k, v in batch.items()}
    assert capture(on_meta, (), fake_batch, batch_size=4).fingerprint == program.fingerprint


def test_tied_weights_are_one_input() -> None:
    model = gpt2()
    program = capture(model, (), {"input_ids": tokens(), "labels": tokens()})
    assert program.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert [i.name for i in program.inputs if i.kind == "parameter"] == [n for n, _ in model.named_parameters()]


class Encoder(nn.Module):
    """torch.nn's own Transformer, loss outside or inside."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, dropout, batch_first=True), 2)
        self.head = nn.Linear(32, 64)

    def forward(self, ids: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits = self.head(self.layers(self.embed(ids), mask=mask, is_causal=True)) * scale
        out = {"logits": logits, "length": ids.shape[1]}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return out


def test_positional_and_keyword_inputs_and_a_dict_output() -> None:
    torch.manual_seed(0)
    model, ids = Encoder(), tokens()
    program = capture(model, (ids,), {"labels": ids, "scale": 0.5}, batch_dims=(0, 0, None), batch_size=4)
    inputs = [(i.name, i.batch_dim) for i in program.inputs if i.kind == "input"]
    assert inputs == [("args.0", 0), ("labels", 0)]
    assert [(o.name, o.batch_dim) for o in program.outputs if o.kind == "output"] == [("logits", 0), ("loss", None)]
    assert 12 in program.out_constants.values()
    model(ids, labels=ids, scale=0.5)["loss"].backward()
    assert_same_gradients(run(program, model, (ids,), {"labels": ids, "scale": 0.5}), model)


def test_a_loss_outside_gives_a_tangent_per_output() -> None:
    torch.manual_seed(0)
    model, ids = Encoder(), tokens()
    program = capture(model, (ids,), batch_size=4)
    assert not program.has_loss
    assert [(i.name, i.batch_dim) for i in program.inputs if i.kind == "tangent"] == [("logits", 0)]
    logits = model(ids)["logits"]
    tangent = torch.randn(logits.shape)
    logits.backward(tangent)
    assert_same_gradients(run(program, model, (ids,), {}, {"logits": tangent}), model, atol=1e-5)


def test_all_tangents_differentiate_loss_and_logits_together() -> None:
    torch.manual_seed(0)
    model, ids = Encoder(), tokens()
    program = capture(model, (ids,), {"labels": ids}, tangents="all")
    assert not program.has_loss
    out = model(ids, labels=ids)
    tangent = {"logits": torch.randn(out["logits"].shape), "loss": torch.tensor(3.0)}
    (out["loss"] * 3 + (out["logits"] * tangent["logits"]).sum()).backward()
    assert_same_gradients(run(program, model, (ids,), {"labels": ids}, tangent), model, atol=1e-5)


@dataclasses.dataclass
class Outcome:
    loss: Tensor
    hidden: Tensor


class Odd(nn.Module):
    """Frozen, unused, tied and mutated state, in-place writes through views, and side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.a.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("untouched", torch.arange(6.0))
        self.calls = 0
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Outcome:
        self.calls += 1
        self.seen.append(x)
        h = self.norm(self.a(x) + self.untouched)
        h[:, 0] *= 2
        h[:, 1:3].add_(torch.tensor([[0.25, -3.0]]))
        return Outcome(loss=self.b(h).pow(2).mean(), hidden=h)


def test_frozen_unused_tied_and_mutated_state() -> None:
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(5, 6, requires_grad=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model, (x,), batch_dims=(0,), batch_size=5)
    assert model.calls == 0
    assert model.seen == []
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert model.b.weight is model.a.weight
    assert program.aliases == {"b.weight": "a.weight"}
    found = run(program, model, (x,), {})
    model(x).loss.backward()
    names = {name for kind, name in found if kind == "gradient"}
    assert names == {"a.weight", "b.bias", "norm.weight", "norm.bias", "args.0"}
    torch.testing.assert_close(found["gradient", "args.0"], x.grad)
    torch.testing.assert_close(found["gradient", "a.weight"], model.a.weight.grad, rtol=1e-4, atol=1e-6)
    changed = {name: value for (kind, name), value in found.items() if kind == "buffer"}
    assert changed.keys() == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for name, value in changed.items():
        torch.testing.assert_close(value, model.get_buffer(name))


class Remembering(nn.Module):
    """Keeps a count, a mean and its last loss in plain attributes, and the first row in a buffer that has none yet."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.steps, self.mean, self.last, self.in_place = 0, torch.zeros(4), None, in_place
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.steps += 1
        if self.first is None:
            self.first = y.detach()[0]
        if self.in_place:
            self.mean.lerp_(y.detach().mean(0), 0.1)
        else:
            self.mean = self.mean.lerp(y.detach().mean(0), 0.1)
        self.last = (y - self.mean).square().mean()
        return self.last / self.steps


def test_attributes_that_the_next_call_would_find_changed_are_named() -> None:
    model = Remembering(in_place=False)
    notes = capture(model, (torch.randn(2, 4),)).notes
    assert [note.split(":")[0] for note in notes] == ["attribute steps", "attribute mean", "attribute first"]
    assert (model.steps, model.mean.tolist(), model.last, model.first) == (0, [0.0] * 4, None, None)
    with pytest.raises(CaptureError, match=r"test_passes_capture.py:\d+: .* register it as a buffer"):
        capture(Remembering(in_place=True), (torch.randn(2, 4),))


class Routed(nn.Module):
    """Leaves a loss of its router where the training loop looks for it, what its output is made of, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)
        self.aux, self.losses, self.by_name, self.hidden, self.mean = 0.0, [torch.zeros(())], {"z": None}, None, None

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).softmax(-1)
        self.aux = chosen.square().mean()
        self.losses = [chosen.mean()]
        self.by_name["z"] = chosen.logsumexp(-1).mean()
        self.hidden, self.mean = self.linear(x), chosen.detach().mean()
        return self.hidden.square().mean()


def test_losses_that_the_forward_leaves_in_modules_are_named() -> None:
    model = nn.Sequential(Routed())
    program = capture(model, (torch.randn(2, 4),))
    assert program.left == ("0.aux", "0.losses", "0.by_name")
    (note,) = program.notes
    assert note.startswith("attribute 0.aux, 0.losses, 0.by_name: the forward leaves there")
    assert (model[0].aux, model[0].by_name, model[0].hidden) == (0.0, {"z": None}, None)
    assert capture(nn.Linear(4, 4), (torch.randn(2, 4),)).left == ()


class Replacing(nn.Module):
    """Puts another tensor in a buffer's place."""

    def __init__(self, held: Tensor, replace: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.replace = nn.Linear(4, 4), replace
        self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.held = self.replace(self.held, y.detach())
        return (y * self.held.sum()).square().mean()


@pytest.mark.parametrize(
    ("held", "replace", "told"),
    [
        (torch.zeros(4, dtype=torch.long), lambda held, y: held + 0.4, r"int64\[4\] .* float32\[4\].* as float32, or"),
        (torch.zeros(2, 4), lambda held, y: held[:1] + y.mean(0), r"float32\[2, 4\] .* float32\[1, 4\].* as large as"),
        (torch.zeros(2, 4), lambda held, y: held.sum(0) + 1, r"float32\[2, 4\] .* float32\[4\].* as large as it gets"),
        (torch.zeros(2, 4), lambda held, y: torch.cat([held, y]), r"float32\[2, 4\] .* float32\[5, 4\].* as large as"),
    ],
)
def test_a_buffer_that_becomes_another_shape_or_dtype_is_named(held: Tensor, replace: Any, told: str) -> None:
    with pytest.raises(CaptureError, match=rf"test_passes_capture.py:\d+: the buffer held is {told}"):
        capture(Replacing(held, replace), (torch.randn(3, 4),))


def test_what_is_advised_for_a_buffer_that_becomes_another_dtype_is_as_in_eager() -> None:
    x = torch.randn(3, 4)
    for held, replace in (
        (torch.zeros(4), lambda held, y: held + 0.4),
        (torch.zeros(4, dtype=torch.long), lambda held, y: held.copy_(held + 1.4)),
    ):
        model = Replacing(held, replace)
        step = run(capture(model, (x,)), model, (x,), {})
        model(x)
        assert torch.equal(step["buffer", "held"], model.held)


class Weighed(nn.Module):
    """Sets the weight of its layer by a hook, before the layer reads it; `looks`: after it read the old one."""

    def __init__(self, by: Callable[[nn.Module], nn.Module], looks: bool = False) -> None:
        super().__init__()
        self.linear, self.looks = by(nn.Linear(4, 4)), looks

    def forward(self, x: Tensor) -> Tensor:
        old = self.linear.weight.detach() if self.looks else 0
        return (self.linear(x) + old).square().mean()


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm:FutureWarning")
@pytest.mark.parametrize("by", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_an_attribute_that_is_written_before_it_is_read_is_not_named(by: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Weighed(by), torch.randn(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # the weight that the model holds is an old one
    program = capture(model, (x,))
    assert program.notes == ()
    torch.testing.assert_close(run(program, model, (x,), {})["output", ""], model(x).detach())
    model.looks = True
    (note,) = capture(model, (x,)).notes
    assert note.startswith("attribute linear.weight: the forward changes it")


class Skipping(nn.Module):
    """A layer that is left out by chance, as layer drop is written."""

    def __init__(self, chance: Callable[[], Any]) -> None:
        super().__init__()
        self.linear, self.chance = nn.Linear(4, 4), chance

    def forward(self, x: Tensor) -> Tensor:
        if self.chance() < 0.5:
            x = self.linear(x)
        return (self.linear(x) - x).square().mean()


def test_chance_that_no_op_draws_is_named() -> None:
    x = torch.randn(2, 4)
    (note,) = capture(Skipping(random.random), (x,)).notes
    assert note.startswith("the forward draws random numbers from Python's random: every step finds those of the first")
    (note,) = capture(Skipping(np.random.rand), (x,)).notes
    assert note.startswith("the forward draws random numbers from NumPy")
    assert not capture(Skipping(lambda: torch.rand(()) - 2), (x,)).notes
    with pytest.raises(CaptureError, match=r"test_passes_capture.py:\d+: .*random numbers"):
        capture(Skipping(lambda: torch.rand(())), (x,))


def test_a_registered_dataclass_rebuilds_the_output() -> None:
    program = capture(Odd(), (torch.randn(5, 6),))
    assert [o.name for o in program.outputs if o.kind == "output"] == ["loss", "hidden"]
    assert isinstance(pytree.tree_unflatten([1, 2], program.out_spec), Outcome)


def test_forward_only() -> None:
    model, ids = Encoder(), tokens()
    for program in (
        capture(model, (ids,), {"labels": ids}, backward=False),
        torch.no_grad()(capture)(model, (ids,), {"labels": ids}),
        capture(Encoder().requires_grad_(False), (ids,), {"labels": ids}),
    ):
        assert {o.kind for o in program.outputs} == {"output"}
        assert "tangent" not in {i.kind for i in program.inputs}
        assert all(n.meta["phase"] == "forward" for n in program.graph.graph.nodes if n.op != "output")
        assert not program.has_loss


def test_dropout_has_its_rate_and_one_mask_for_both_directions() -> None:
    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.3, self.training)

    x = torch.ones(100, 100, requires_grad=True)
    program = capture(Drop(), (x,))
    assert sum("rand" in str(n.target) for n in program.graph.graph.nodes) == 1
    found = run(program, Drop(), (x,), {})
    out = found["output", ""]
    assert abs((out == 0).float().mean() - 0.3) < 0.03
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 0.7))
    torch.testing.assert_close(found["gradient", "args.0"], out)
    assert not any("rand" in str(n.target) for n in capture(Drop().eval(), (x,)).graph.graph.nodes)


def test_checkpointing_runs_the_forward_again_with_the_same_dropout() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False).pow(2).sum()

    torch.manual_seed(0)
    model, x = Checkpointed().double(), torch.randn(4, 8, dtype=torch.float64)
    program = capture(model, (x,))
    again = [n for n in program.graph.graph.nodes if "tanh.default" in str(n.target)]
    assert [n.meta["phase"] for n in again] == ["forward", "backward"]

    def step(change: float) -> Results:
        with torch.no_grad():
            model.inner[0].bias[3] += change  # type: ignore[index, operator]
        torch.manual_seed(7)
        return run(program, model, (x,), {})

    slope = (step(1e-6)["output", ""] - step(-2e-6)["output", ""]) / 2e-6
    assert slope != 0
    torch.testing.assert_close(step(1e-6)["gradient", "inner.0.bias"][3], slope, rtol=1e-6, atol=1e-6)


class Attends(torch.autograd.Function):
    """Attention that is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            y = F.scaled_dot_product_attention(again, again, again)
        return torch.autograd.grad(y, again, gradients[0])[0]


def test_attention_without_dropout_draws_nothing_and_may_be_run_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return Attends.apply(self.linear(x)).square().mean()

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 4, 6, 8)
    found = run(capture(model, (x,)), model, (x,), {})
    model(x).backward()
    assert model.linear.weight.grad is not None
    torch.testing.assert_close(found["gradient", "linear.weight"], model.linear.weight.grad, rtol=1e-4, atol=1e-6)


class Reseeds(nn.Module):
    """Sets the random state before its draws, to the same seed for both where `again`."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        first = F.dropout(x, 0.5)
        if self.again:
            torch.manual_seed(0)
        return (first * F.dropout(x + 1, 0.5)).sum()


def test_numbers_that_are_drawn_twice_are_an_error_that_names_the_line() -> None:
    """Eager masks both alike; a checkpoint of the first would be run again with the second's mask."""
    x = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(CaptureError, match=r"test_passes_capture.py:\d+: the forward set the random state back"):
        capture(Reseeds(again=True), (x,))
    assert any("sets torch's random state" in note for note in capture(Reseeds(again=False), (x,)).notes)
    assert not capture(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), (x,)).notes


def test_a_nested_tensor_is_an_error_that_says_what_would_do() -> None:
    class Jagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.nested.nested_tensor_from_jagged(self.up(x).flatten(0, 1), offsets=torch.arange(0, 17, 8))
            return rows.values().sum()

    line = inspect.getsourcelines(Jagged.forward)[1] + 1
    with pytest.raises(CaptureError, match=rf"test_passes_capture.py:{line}: makes a nested tensor.* padded to one"):
        capture(Jagged(), (torch.randn(2, 8, 8),))


def test_a_sparse_gradient_is_an_error_that_names_the_line() -> None:
    with pytest.raises(CaptureError, match=r"torch.sparse_coo tensor; .* an embedding takes sparse=False"):
        capture(nn.Embedding(8, 4, sparse=True), (tokens(8),))


def test_random_state_is_not_consumed() -> None:
    model = Encoder(dropout=0.5)
    states = torch.get_rng_state(), random.getstate()
    capture(model, (tokens(),), {"labels": tokens()})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


class Branches(nn.Module):
    """Branches on a tensor: of the weights (`on="weight"`), the input or a constant."""

    def __init__(self, on: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        value = {"weight": self.weight, "input": x, "constant": torch.arange(3)}[self.on]
        if value.sum() > 0:
            return (x * self.weight).sum()
        return (x - self.weight).sum()


def test_a_branch_on_weights_is_an_error_that_names_the_line() -> None:
    lines, first = inspect.getsourcelines(Branches)
    line = first + next(i for i, text in enumerate(lines) if "value.sum() > 0" in text)
    helps = "torch.where.*for a log is better returned as a tensor"
    with pytest.raises(CaptureError, match=rf"test_passes_capture.py:{line}: .* the parameter weight.*{helps}"):
        capture(Branches("weight"), (torch.ones(3),))
    with pytest.raises(CaptureError, match=rf"test_passes_capture.py:{line}: .* input args.0.*values are not known"):
        capture(Branches("input"), (torch.ones(3, device="meta"),))


class Spread(nn.Module):
    """Predicts a mean and a variance; the loss of torch looks whether a variance is negative."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mean, self.spread, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.loss = nn.GaussianNLLLoss()

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean(x), F.softplus(self.spread(x)).clamp(min=1e-6)
        if self.how == "function":
            return F.gaussian_nll_loss(mean, x, variance)
        if self.how == "module":
            return self.loss(mean, x, variance)
        if self.how == "written out":
            return 0.5 * (variance.log() + (x - mean).square() / variance).mean()
        normal = torch.distributions.Normal(mean, variance.sqrt(), validate_args=self.how == "distribution")
        return -normal.log_prob(x).mean()


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("function", "torch.nn.functional.gaussian_nll_loss"),
        ("module", "torch.nn.functional.gaussian_nll_loss"),
        ("distribution", r"torch.distributions.distribution.(Distribution.__init__|_all_true_or_runtime_assert)"),
    ],
)
def test_a_function_of_torch_that_reads_a_value_is_named(how: str, name: str) -> None:
    told = rf"test_passes_capture.py:\d+: {name} itself reads .* the parameter (spread|mean).*write out in the model"
    with pytest.raises(CaptureError, match=told):
        capture(Spread(how), (torch.randn(3, 4),))


@pytest.mark.parametrize(("how", "as_torch"), [("written out", "function"), ("unchecked", "distribution")])
def test_what_is_advised_in_the_place_of_a_function_that_reads_is_captured(how: str, as_torch: str) -> None:
    torch.manual_seed(0)
    model, x = Spread(how), torch.randn(3, 4)
    found = run(capture(model, (x,)), model, (x,), {})["output", ""]
    model.how = as_torch
    torch.testing.assert_close(found, model(x).detach())


def test_a_package_beside_torch_whose_name_begins_alike_has_lines_of_its_own() -> None:
    file = Path(torch.__file__).parent.parent / "torchvision" / "models" / "one.py"
    scope: dict[str, Any] = {}
    exec(compile("def double(x):\n    return x * 2", file, "exec"), scope)

    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            doubled: Tensor = scope["double"](x)
            return doubled

    (node,) = capture(Doubles(), (torch.ones(3),)).graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten.mul.Tensor
    )
    assert node.meta["source"] == "torchvision/models/one.py:2"


def test_a_branch_on_inputs_is_fixed_with_a_note_and_one_on_constants_without() -> None:
    x = -torch.ones(3)
    program = capture(Branches("input"), (x,))
    assert len(program.notes) == 1
    assert "test_passes_capture.py" in program.notes[0]
    assert run(program, Branches("input"), (x,), {})["output", ""] == -6
    assert capture(Branches("constant"), (x,)).notes == ()


class ReadsRows(nn.Module):
    """Asks of every row whether its positions go up by one, as packed sequences are told."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(8, device=x.device).expand(x.shape[0], -1)
        if (rows.diff() != 1).any():
            raise ValueError("packed")
        return self.linear(x).sum()  # type: ignore[no-any-return]


def test_a_value_too_large_to_compute_is_named_with_its_size() -> None:
    """2^28 rows of 7 int64 are 14 GiB; the 2^28 x 8 positions before them take no memory, as they are one row."""
    captured = capture(ReadsRows(), (torch.empty(1 << 18, 8, device="meta"),))
    assert captured.inputs
    line = inspect.getsourcelines(ReadsRows.forward)[1] + 2
    with pytest.raises(
        CaptureError,
        match=rf"test_passes_capture.py:{line}: .*too large to compute on this host, \(268435456, 7\) int64",
    ):
        capture(ReadsRows(), (torch.empty(1 << 28, 8, device="meta"),))


def test_values_that_shapes_depend_on_come_from_the_example() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            rows = x[keep]
            return rows.pow(2).sum() + x.masked_select(keep[:, None]).sum() + len(keep.tolist())

    x = torch.randn(6, 3, requires_grad=True)
    keep = torch.tensor([True, False, True, True, False, False])
    program = capture(Masked(), (x, keep))
    loss = Masked()(x, keep)
    loss.backward()
    found = run(program, Masked(), (x, keep), {})
    torch.testing.assert_close(found["output", ""], loss.detach())
    torch.testing.assert_close(found["gradient", "args.0"], x.grad)
    assert any("nonzero" in note for note in program.notes)


def test_an_error_of_the_model_names_its_line() -> None:
    with pytest.raises(CaptureError, match=r"test_passes_capture.py:\d+: the model's forward raised RuntimeError"):
        capture(Odd(), (torch.randn(5, 7),))


def test_an_error_of_the_model_is_told_once() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.zeros(5, 5) == 0, 0).sum()

    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    of_torch = logging.getLogger("torch._subclasses.fake_tensor")
    of_torch.addHandler(handler)
    try:
        with pytest.raises(CaptureError, match="broadcast"):
            capture(Long(), (torch.randn(2, 7, requires_grad=True),))
    finally:
        of_torch.removeHandler(handler)
    assert logged == []


def test_what_makes_a_weight_is_at_the_line_that_asks_for_it() -> None:
    """torch's parametrizations run where an attribute is read, which capture looks at."""

    class Parametrized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.down = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x)).sum()

    program = capture(Parametrized(), (torch.randn(2, 8),))
    line = inspect.getsourcelines(Parametrized.forward)[1] + 1
    sources = {node.meta["source"] for node in program.graph.graph.nodes if node.op == "call_function"}
    assert {source.rpartition("/")[2] for source in sources} == {f"test_passes_capture.py:{line}"}


def test_every_node_says_where_it_came_from() -> None:
    program = capture(Encoder(), (tokens(),), {"labels": tokens()})
    nodes = [n for n in program.graph.graph.nodes if n.op == "call_function"]
    for node in nodes:
        assert node.meta.keys() >= {"val", "phase", "module", "source"}
        assert "test_passes_capture.py:" in node.meta["source"]
    products = [(n.meta["phase"], n.meta["module"]) for n in nodes if n.target is torch.ops.aten.mm.default]
    assert products.count(("forward", "layers.layers.1.linear2")) == 1
    assert products.count(("backward", "layers.layers.1.linear2")) == 2
    assert products.count(("backward", "head")) == 2


def test_constants_are_constructors_or_buffers_of_the_graph() -> None:
    class Constants(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([3.0, 1.0, 2.0]) + torch.tensor(4.0) + torch.tensor([2, 4, 6])

    x = torch.randn(2, 3)
    program = capture(Constants(), (x,))
    assert [n.target for n in program.graph.graph.find_nodes(op="get_attr")] == ["_tensor_constant0"]
    torch.testing.assert_close(run(program, Constants(), (x,), {})["output", ""], Constants()(x))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 2), (5,)])
def test_cross_entropy_is_exact(reduction: str, weighted: bool, shape: tuple[int, ...]) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.linspace(0.5, 2, 5) if weighted else None)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(x, target, self.weight, ignore_index=3, reduction=reduction)

    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, 5, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    program = capture(Loss(), (x, target))
    assert not any(word in str(n.target) for n in program.graph.graph.nodes for word in ("nll", "gather", "softmax"))
    for t in (target, torch.full_like(target, 3)):  # the second ignores every element: nan for a mean
        x.grad = None
        loss = Loss()(x, t)
        tangent = torch.randn(loss.shape)
        loss.backward(tangent)
        found = run(program, Loss(), (x, t), {}, {"": tangent})
        torch.testing.assert_close(found["output", ""], loss.detach(), equal_nan=True)
        torch.testing.assert_close(found["gradient", "args.0"], x.grad, equal_nan=True)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([1.4, 2.0, 0.0]), r"targets in torch.float32 are no classes; .*target.long\(\)"),
        (torch.tensor([True, False, True]), "targets in torch.bool are no classes"),
        (torch.tensor([[1], [2], [0]]), r"targets have shape \(3, 1\) where .*, \(3,\)"),
    ],
)
def test_targets_that_eager_refuses_are_refused_with_the_line(target: Tensor, message: str) -> None:
    """Fake tensors would take them: 1.4 is no class, so that row's loss would be 0 and nothing would look wrong."""

    class Classifier(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(x, target)

    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"target|expected scalar type Long"):
        Classifier()(x, target)
    with pytest.raises(CaptureError, match=rf"test_passes_capture.py:\d+: the model's forward raised .*: {message}"):
        capture(Classifier(), (x, target))


def test_a_cache_is_not_made() -> None:
    model = llama()
    program = capture(model, (), {"input_ids": tokens()})
    assert [o.name for o in program.outputs if o.kind == "output"] == ["logits"]
    assert any("use_cache" in note for note in program.notes)
    program = capture(model, (), {"input_ids": tokens(), "use_cache": True})
    assert any("returned as None" in note for note in program.notes)


def test_a_plain_module_means_its_own_by_use_cache() -> None:
    class Remembers(nn.Module):
        def forward(self, x: Tensor, use_cache: bool = True) -> Tensor:
            return x.exp() if use_cache else x

    x = torch.randn(4, 8, requires_grad=True)
    program = capture(Remembers(), (x,))
    torch.testing.assert_close(run(program, Remembers(), (x,), {})["output", ""], x.exp())


def test_causal_attention_needs_no_mask() -> None:
    program = capture(llama(), (), {"input_ids": tokens(), "labels": tokens()})
    attention = [n for n in program.graph.graph.nodes if "flash_attention_for_cpu.default" in str(n.target)]
    assert len(attention) == 2
    assert all(n.args[4] is True and "attn_mask" not in n.kwargs for n in attention)


class Positions(nn.Module):
    """Adds positions, which are kept in float32, to embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.register_buffer("positions", torch.ones(3, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids) + self.positions).sum()


def test_a_product_that_eager_refuses_is_refused_with_its_line() -> None:
    """In bfloat16 but for the buffer: fake tensors would multiply what torch does not."""
    model, ids = Positions(), torch.zeros(2, 3, dtype=torch.long)
    model.to(torch.bfloat16).positions = model.positions.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(ids)
    with pytest.raises(CaptureError, match=r"test_passes_capture.py:\d+: a product of float32 and bfloat16"):
        capture(model, (ids,))
    model.positions = model.positions.bfloat16()
    assert capture(model, (ids,)).has_loss


class InThreads(nn.Module):
    """Two branches, each in a thread of its own; `modules`: by modules, else by functions alone."""

    def __init__(self, modules: bool) -> None:
        super().__init__()
        self.one, self.two, self.by_modules = nn.Linear(4, 4), nn.Linear(4, 4), modules

    def forward(self, x: Tensor) -> Tensor:
        found: dict[int, Tensor] = {}

        def run(number: int, branch: nn.Linear) -> None:
            found[number] = branch(x) if self.by_modules else F.linear(x, branch.weight)

        for number, branch in enumerate((self.one, self.two)):
            thread = threading.Thread(target=run, args=(number, branch))
            thread.start()
            thread.join()
        return (found[0] * found[1]).sum()


@pytest.mark.parametrize("modules", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_part_that_runs_in_another_thread_is_refused_as_one(modules: bool) -> None:
    with pytest.raises(CaptureError, match="^one ran in another thread" if modules else "computed in another thread"):
        capture(InThreads(modules), (torch.randn(2, 4),))
