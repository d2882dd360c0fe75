"""Ejected scripts train on real gloo ranks to the losses of one device, and say what they leave out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.cli import main

STEPS = 3
MODELS = """
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
"""


def losses_of_the_script(script: Path, ranks: int) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    command += ["--steps", str(STEPS), "--dtype", "float32", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", done.stdout)]


def losses_of_one_device(script: Path, batch_ranks: int) -> list[float]:
    """The same training by hand: the script's model and batches, no mesh."""
    space: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    torch.manual_seed(0)
    model: nn.Module = space["build"]().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    found = []
    for step in range(STEPS):
        parts = [space["batch"](step, rank, "cpu") for rank in range(batch_ranks)]
        out = model(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        loss = out if isinstance(out, torch.Tensor) else out.loss
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


def test_what_cannot_be_said_is_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    script = tmp_path / "plan.py"
    call = ["plan", f"{tmp_path}/models.py:build", "--mesh", "tp=2", "--hardware", "h100", "--strategy", "megatron"]
    pins = ["--pin", "scale=S(0)"]
    assert main([*call, *pins, "--eject", str(script)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "scale is split over tp as S(0): no style splits a Model" in told
    text = script.read_text()
    assert '"up": ColwiseParallel(output_layouts=Replicate()),' in text  # qkv's heads are fixed: nothing is joined
    assert '"down": RowwiseParallel(input_layouts=Replicate()),' in text
    assert losses_of_the_script(script, 2) == pytest.approx(losses_of_one_device(script, 1), abs=2e-6)
