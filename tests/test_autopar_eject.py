"""Ejected scripts train on real gloo ranks to the losses of one device, and say what they leave out."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

import autopar
from autopar import examples
from autopar.cli import main
from autopar.plans.styles import styles_of

STEPS = 3
MODELS = """
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 4, 8).permute(2, 0, 3, 1, 4)  # four heads, whatever a rank has
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.scale = nn.Embedding(64, 32), nn.Parameter(torch.ones(32))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x * self.scale).flatten(0, 1), labels.flatten())


def build():
    ids = torch.randint(0, 64, (2, 8))
    return Model(), {"input_ids": ids, "labels": ids}


class Between(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.gain = kind, nn.Parameter(torch.ones(1)) if kind == "gain" else 1.0
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.up(x).relu() * self.gain
        if self.kind == "normalized":
            h = F.normalize(h, dim=-1)
        if self.kind == "inferred":  # a part has half a sequence of whole rows, as it seems
            h = h.view(len(h), -1, 32).flip(1).view(len(h), x.shape[1], -1)
        if self.kind == "input":
            h = h * x.mean(-1, keepdim=True)
        return x + self.down(h)


KINDS = ("plain", "normalized", "gain", "input", "inferred")


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleDict({kind: Between(kind) for kind in KINDS})

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks.values():
            x = block(x)
        return {"loss": (x**2).mean(), "last": x.detach()}


def between():
    return Stack(), {"x": torch.randn(4, 6, 16)}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return (x[..., :4] ** 2).mean()


def encoder():
    return Encoder(), {"x": torch.randn(4, 6, 16)}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Between("plain") for _ in range(2)) for _ in range(2))

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return (x**2).mean()


def nested():
    return Nested(), (torch.randn(4, 6, 16),)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 3)

    def forward(self, tokens, views, kinds):
        given = self.embed(tokens).mean(1) + views["left"][0] + views["left"][1].to(torch.float32)
        return F.cross_entropy(self.head(given), kinds)


def classifier():
    views = {"left": [torch.randn(4, 16), torch.randn(4, 16, dtype=torch.bfloat16)]}
    return Classifier(), {"tokens": torch.randint(0, 64, (4, 6)), "views": views, "kinds": torch.tensor([0, 2, 1, 0])}


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.f = kind, nn.Linear(16, 4)

    def forward(self, x):
        y = self.f(x)
        two = y.square().mean(), y.abs().mean()
        kinds = {"values": y, "beside": (two[0], y), "two": {"first": two[0], "second": two[1]}}
        return kinds[self.kind]


def odd():
    stack = Stack()
    stack.blocks = nn.ModuleDict({kind: Between("plain") for kind in ('say "x"', "0-1", 3 * chr(34) + "b")})
    return stack, {"x": torch.randn(4, 6, 16)}


class Mixed(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.base, self.up = nn.Linear(16, 16, dtype=torch.bfloat16).requires_grad_(not frozen), nn.Linear(16, 16)

    def forward(self, x):
        return (self.up(x) + self.base(x.to(self.base.weight.dtype)).float()).square().mean()


def mixed():
    return Mixed(False), {"x": torch.randn(4, 16)}


def frozen():
    return Mixed(True), {"x": torch.randn(4, 16)}


@dataclass
class Sizes:
    hidden: int


class Besides(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(64, sizes.hidden), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, source, device, rank):
        x = (self.embed(source) * device["a b"] + device["a_b"]).clamp(max=rank)
        x = x + self.down(self.up(x).relu()) * self.up.weight.t().square().mean()
        logits = F.linear(x, self.embed.weight)  # what it calls, it reads as well
        return [{"losses": [F.cross_entropy(logits.flatten(0, 1), source.flatten())], "logits": logits}, None]


def besides():
    from beside import HIDDEN

    device = {"a b": torch.randn(2, 8, 16), "a_b": torch.randn(2, 8, 16)}
    return Besides(Sizes(HIDDEN)), {"source": torch.randint(0, 64, (2, 8)), "device": device, "rank": math.inf}


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return F.dropout(self.down(F.dropout(self.up(x).relu()))).square().mean()


def dropping():
    return Dropping(), {"x": torch.randn(4, 6, 16)}


class Together(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x, y):
        return F.cross_entropy(self.left(x) @ self.right(y).T, torch.arange(len(x)))


def together():
    x, y = torch.randn(2, 4, 16, dtype=torch.bfloat16)
    return Together().bfloat16(), {"x": x, "y": y}


def values():
    return Returns("values"), {"x": torch.randn(4, 16)}


def beside():
    return Returns("beside"), {"x": torch.randn(4, 16)}


def two():
    return Returns("two"), {"x": torch.randn(4, 16)}
"""


def run_script(rank: int, ranks: int, script: str) -> str:
    """What a rank of the script prints."""
    out = io.StringIO()
    sys.argv = [script, "--steps", str(STEPS), "--dtype", "float32", "--device", "cpu"]
    os.environ.pop("PYTHONPATH", None)
    with contextlib.redirect_stdout(out):
        runpy.run_path(script, run_name="__main__")
    return out.getvalue()


def losses_of_the_script(script: Path, ranks: int) -> list[float]:
    printed = run_ranks(run_script, ranks, str(script))
    assert printed[1:] == [""] * (ranks - 1)
    return [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", printed[0])]


def losses_of_one_device(
    script: Path, batch_ranks: int, micro_batches: int = 1, compute: torch.dtype | None = None
) -> list[float]:
    """The same training by hand: the script's model and batches, no mesh; computed with copies of the parameters and
    inputs in `compute`."""
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    torch.manual_seed(0)
    model: nn.Module = space["build"]().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    found = []
    for step in range(STEPS):
        each = range(micro_batches * step, micro_batches * (step + 1))
        parts = [space["batch"](index, rank, "cpu") for index in each for rank in range(batch_ranks)]
        if compute is not None:
            low = {name: p.to(compute) for name, p in model.named_parameters()}
            given = [{name: x.to(compute) if x.is_floating_point() else x for name, x in p.items()} for p in parts]
            out = torch.stack([torch.func.functional_call(model, low, kwargs=part) for part in given]).float().mean()
        elif isinstance(parts[0], tuple):
            out = model(*map(torch.cat, zip(*parts, strict=True)))
        else:
            out = model(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        loss = out if isinstance(out, torch.Tensor) else out["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_a_llama_is_ejected_as_people_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=128, max_position_embeddings=32, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    script = tmp_path / "plan.py"
    call = ["plan", str(tmp_path), "--mesh", "dp=2,tp=2", "--hardware", "h100", "--strategy", "megatron"]
    assert main([*call, "--batch", "2", "--seq", "16", "--eject", str(script)]) == 0
    text = script.read_text()
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert f'"{module}": ColwiseParallel(),' in text
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        assert f'"{module}": RowwiseParallel(),' in text
    assert "autopar" not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL)  # plain PyTorch
    told = capsys.readouterr().out
    assert "lm_head: what it gives stays split in the plan; the script gathers it" in told
    one = losses_of_one_device(script, 2)
    assert losses_of_the_script(script, 4) == pytest.approx(one, abs=2e-6)
    assert one[0] != pytest.approx(one[1], abs=1e-4)  # it is training


def ejected(tmp_path: Path, function: str, mesh: str, *more: str) -> Path:
    """The script for a function of MODELS."""
    (tmp_path / "models.py").write_text(MODELS)
    script = tmp_path / "plan.py"
    call = ["plan", f"{tmp_path}/models.py:{function}", "--mesh", mesh, "--hardware", "h100", *more]
    assert main([*call, "--eject", str(script)]) == 0
    return script


def test_what_cannot_be_said_is_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ejected(tmp_path, "build", "tp=2", "--strategy", "megatron", "--pin", "scale=S(0)")
    told = told_in(capsys)
    assert "scale is split over tp as S(0): no style splits a Model" in told
    text = script.read_text()
    assert '"up": ColwiseParallel(output_layouts=Replicate()),' in text  # qkv's heads are fixed: nothing is joined
    assert '"down": RowwiseParallel(input_layouts=Replicate()),' in text
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)


def test_norms_between_products_add_up_their_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Qwen3Config

    Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, max_position_embeddings=32, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    script = tmp_path / "plan.py"
    call = ["plan", str(tmp_path), "--mesh", "tp=2", "--hardware", "h100", "--strategy", "megatron"]
    assert main([*call, "--batch", "2", "--seq", "16", "--eject", str(script)]) == 0
    assert '"self_attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),' in script.read_text()
    assert "model.embed_tokens.weight is split over tp: tied weights would part" in told_in(capsys)
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)


def test_products_are_joined_only_where_a_part_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pins = ["--pin", "blocks.*.up.weight=S(0)", "--pin", "blocks.*.down.weight=S(1)"]
    script = ejected(tmp_path, "between", "tp=2", *pins)
    text, told = script.read_text(), told_in(capsys)
    assert '"blocks.plain.up": ColwiseParallel(),' in text
    for kind in ("normalized", "gain", "input", "inferred"):
        assert f'"blocks.{kind}.up": ColwiseParallel(output_layouts=Replicate()),' in text
    assert "blocks.inferred: takes a rank's own part for something else" in told
    assert "blocks.gain: blocks.gain would get a gradient of a rank's own part alone" in told
    assert "blocks.input: mul reads a part together with a whole result that has a gradient" in told
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)


def test_what_is_read_without_a_call_stays_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ejected(tmp_path, "encoder", "tp=2", "--strategy", "megatron")
    assert "layers.*.self_attn.out_proj is split over tp: it is read without being called" in told_in(capsys)
    assert '"linear1": ColwiseParallel(),' in script.read_text()
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)


def test_layers_that_run_again_write_to_no_cache(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, architectures=["T5ForConditionalGeneration"],
    ).save_pretrained(tmp_path)  # fmt: skip
    script = tmp_path / "plan.py"
    call = ["plan", str(tmp_path), "--mesh", "dp=2", "--hardware", "h100", "--strategy", "fsdp", "--recompute", "full"]
    assert main([*call, "--batch", "2", "--seq", "16", "--eject", str(script)]) == 0
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 2), abs=5e-6)


def test_micro_batches_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--strategy", "megatron", "--accumulate", "2", "--recompute", "full"]
    script = ejected(tmp_path, "build", "dp=2,tp=2", *asked)
    assert "backward computes" not in (told := told_in(capsys).partition("What the script does not say")[2])
    assert "the script's checkpoints run them again" in told
    text = script.read_text()
    assert "layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)" in text
    assert "per step of 2 micro-batches" in text
    assert losses_of_the_script(script, 4) == pytest.approx(losses_of_one_device(script, 2, 2), abs=2e-6)


def test_a_model_larger_than_the_budget_is_said_to_be_built_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight layers of 32.5 KiB under a budget that holds parts of them alone."""
    source = """
        import torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(8))

            def forward(self, x):
                for layer in self.layers:
                    x = x + layer(x)
                return {"loss": x.square().mean()}

        def build():
            return Model(), {"x": torch.randn(1, 64)}
    """
    (tmp_path / "models.py").write_text(textwrap.dedent(source))
    call = ["plan", f"{tmp_path}/models.py:build", "--mesh", "dp=16", "--hardware", "h100", "--strategy", "fsdp"]
    for budget, is_said in (("250KiB", True), ("300KiB", False)):
        assert main([*call, "--memory-budget", budget, "--eject", str(tmp_path / "plan.py")]) == 0
        said = "every rank of the script builds the whole model first, 260.00 KiB on its device" in told_in(capsys)
        assert said == is_said


def test_mixed_precision_in_layers_and_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ejected(tmp_path, "build", "dp=2", "--strategy", "fsdp", "--param-dtype", "bf16", "--reduce-dtype", "fp32")
    assert "mixed precision" not in told_in(capsys).partition("What the script does not say")[2]
    text = script.read_text()
    assert "POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)" in text
    trained = losses_of_the_script(script, 2)
    assert trained[0] == losses_of_one_device(script, 2, compute=torch.bfloat16)[0]
    assert trained == pytest.approx(losses_of_one_device(script, 2), abs=0.04)
    assert all(64 * loss == round(64 * loss) for loss in trained)  # of bfloat16, as what gives them computes in it


def test_precision_and_what_backward_computes_again_are_listed_where_not_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--strategy", "megatron", "--param-dtype", "bf16", "--recompute", "selective", "--optimizer", "lion"]
    script = ejected(tmp_path, "build", "tp=2", *asked)
    told = told_in(capsys).partition("What the script does not say")[2]
    assert "mixed precision is fully_shard's, and no axis shards state" in told
    assert "(recompute 'selective') again in the plan, nothing in the script" in told
    assert "with the optimizer 'lion'; the script uses torch.optim.AdamW" in told
    assert "MixedPrecisionPolicy" not in script.read_text()


def test_layers_in_nested_containers(tmp_path: Path) -> None:
    script = ejected(tmp_path, "nested", "dp=2", "--strategy", "fsdp")
    loop = 'for layer in [layer for part in model.get_submodule("stages").children() for layer in part.children()]:'
    assert loop in script.read_text()
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 2), abs=2e-6)


def dtypes_in_the_script(rank: int, ranks: int, script: str) -> dict[str, torch.dtype]:
    """What the script lays out, in the dtype that it has by default."""
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(Path(script).read_text(), script, "exec"), space)
    parallel, found = space["parallel"], {}

    def seen(model: nn.Module, mesh: Any) -> nn.Module:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        found.update({name: tensor.dtype for name, tensor in tensors})
        return parallel(model, mesh)

    space["parallel"] = seen
    sys.argv = [script, "--steps", "1", "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        space["main"]()
    return found


def test_rotary_frequencies_are_not_cast_with_the_parameters(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    script = tmp_path / "plan.py"
    call = ["plan", str(tmp_path), "--mesh", "dp=1", "--hardware", "h100", "--strategy", "fsdp"]
    assert main([*call, "--batch", "2", "--seq", "16", "--eject", str(script)]) == 0
    found = run_ranks(dtypes_in_the_script, 1, str(script))[0]
    assert found.pop("model.rotary_emb.inv_freq") == torch.float32
    assert found.pop("model.rotary_emb.original_inv_freq") == torch.float32
    assert set(found.values()) == {torch.bfloat16}


def test_labels_are_classes_and_inputs_may_be_nested(tmp_path: Path) -> None:
    script = ejected(tmp_path, "classifier", "dp=2", "--strategy", "fsdp", "-o", str(tmp_path / "plan.json"))
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    made = space["batch"](0, 0, "cpu")
    left, right = made["views"]["left"]
    assert (left.shape, left.dtype, right.shape, right.dtype) == ((4, 16), torch.float32, (4, 16), torch.bfloat16)
    assert set(made["kinds"].tolist()) <= {0, 1, 2}
    again = tmp_path / "again.py"
    call = ["plan", f"{tmp_path}/models.py:classifier", "--from", str(tmp_path / "plan.json"), "--eject", str(again)]
    assert main(call) == 0
    body = "def batch(step"
    assert again.read_text().partition(body)[2] == script.read_text().partition(body)[2]
    trained = losses_of_the_script(script, 2)
    torch.manual_seed(0)
    model = space["build"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(STEPS):
        loss = sum(model(**space["batch"](step, rank, "cpu")) for rank in (0, 1)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert trained[step] == pytest.approx(loss.item(), abs=2e-6)


@pytest.mark.parametrize("kind", ["values", "beside", "two"])
def test_a_model_that_names_no_loss_is_trained_on_its_scalars_or_a_mean(tmp_path: Path, kind: str) -> None:
    script = ejected(tmp_path, kind, "dp=1", "--strategy", "fsdp")
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    torch.manual_seed(0)
    y = space["build"]().f(space["batch"](0, 0, "cpu")["x"])
    wanted = {"values": y.mean(), "beside": y.square().mean(), "two": y.square().mean() + y.abs().mean()}[kind]
    assert losses_of_the_script(script, 1)[0] == pytest.approx(wanted.item(), abs=2e-6)


def test_names_of_modules_may_be_any_text(tmp_path: Path) -> None:
    script = ejected(tmp_path, "odd", "tp=2", "--strategy", "megatron")
    for name in (r'"blocks.say \"x\".up"', '"blocks.0-1.up"', r'"blocks.\"\"\"b.up"'):
        assert f"{name}: ColwiseParallel(" in script.read_text()
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)


def test_a_function_s_model_keeps_its_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ejected(tmp_path, "frozen", "dp=1", "--strategy", "fsdp")
    assert "fully_shard takes one" not in told_in(capsys)
    found = run_ranks(dtypes_in_the_script, 1, str(script))[0]
    assert found == dict.fromkeys(("base.weight", "base.bias"), torch.bfloat16) | dict.fromkeys(
        ("up.weight", "up.bias"), torch.float32
    )
    script = ejected(tmp_path, "mixed", "dp=1", "--strategy", "fsdp")
    assert "trained parameters are bfloat16 and float32; fully_shard takes one: --dtype casts all" in told_in(capsys)
    assert losses_of_the_script(script, 1) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)


def test_inputs_and_modules_may_be_called_and_read_anyhow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside.py").write_text("HIDDEN = 16")
    pins = ["--pin", "embed.weight=S(1)", "--pin", "up.weight=S(0)", "--pin", "down.weight=S(1)"]
    script = ejected(tmp_path, "besides", "tp=2", *pins)
    told = told_in(capsys)
    for name in ("embed", "up"):
        assert f"{name} is split over tp: it is called, and read besides, so it stays whole there" in told
    assert '"down": RowwiseParallel(input_layouts=Replicate()),' in script.read_text()
    trained = losses_of_the_script(script, 2)
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    torch.manual_seed(0)
    model = space["build"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(STEPS):
        (loss,) = model(**space["batch"](step, 0, "cpu"))[0]["losses"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert trained[step] == pytest.approx(loss.item(), abs=2e-6)


def test_inputs_are_cast_with_the_model_and_samples_that_meet_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ejected(tmp_path, "together", "dp=2", "--strategy", "fsdp")
    assert "the script's ranks have their own samples there, which is another loss" in told_in(capsys)
    made = losses_of_the_script(script, 2)  # --dtype float32 of a model in bfloat16
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    torch.manual_seed(0)
    model = space["build"]().float()
    parts = [space["batch"](0, rank, "cpu", torch.float32) for rank in (0, 1)]
    assert made[0] == pytest.approx(sum(model(**part).item() for part in parts) / 2, abs=2e-6)
    assert {x.dtype for x in space["batch"](0, 0, "cpu").values()} == {torch.bfloat16}


def test_ranks_that_share_a_batch_drop_out_the_same(tmp_path: Path) -> None:
    script = ejected(tmp_path, "dropping", "dp=2,tp=2", "--strategy", "megatron")
    first, second, third, fourth = run_ranks(noise_of_the_script, 4, str(script))
    assert first == second
    assert third == fourth
    assert first != third


def noise_of_the_script(rank: int, ranks: int, script: str) -> float:
    """A number drawn on this rank after the script has run."""
    run_script(rank, ranks, script)
    return torch.rand(()).item()


def test_an_inner_part_of_a_dim_is_that_dim() -> None:
    stack = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    call = examples.call_of(stack, (torch.randn(4, 6, 16),))
    plan = autopar.plan(stack, {"tp": 2}, call[1], hardware="h100", options=autopar.Options(pins={"0.weight": "S(0)"}))
    inner = {line: replace(p, in_compute="S(0.1)") if line == "0.weight" else p for line, p in plan.parameters.items()}
    styles = styles_of(replace(plan, parameters=inner), stack, call, "tp", [])
    assert styles["0"] == "ColwiseParallel(output_layouts=Replicate())"


def told_in(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())
