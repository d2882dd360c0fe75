"""Weight gradients beside what tensor parallelism sends: the order of the emitted graph, and of what Inductor makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parity import captured, planned
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from passes.lower.lower import compiled
from passes.play.schedule import play
from passes.program.local import COLLECTIVES, WAIT, LocalProgram

aten = torch.ops.aten


def megatron() -> tuple[LocalProgram, float, float]:
    """A rank's program for two layers on dp=2 x tp=4, and the seconds of tp's collectives in all and waited for."""
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8, vocab_size=8192, hidden_size=2048,
        intermediate_size=5632,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(8, 1024, dtype=torch.long)
    space, assignment, local = planned(
        captured(model, {"input_ids": ids, "labels": ids}), {"dp": 2, "tp": 4}, "megatron"
    )
    sent = [c for c in play(space, assignment).collectives if c.group == "tp" and c.phase == "backward"]
    return local, sum(c.seconds for c in sent), sum(c.exposed_s for c in sent)


def products_beside(graph: fx.Graph, layer: str) -> dict[str, int]:
    """Products between a collective of a layer's activations in backward and the wait for it, by who sends."""
    nodes = list(graph.nodes)
    found = {}
    for start, node in enumerate(nodes):
        if node.target not in COLLECTIVES or node.args[-1] != "tp" or node.meta["phase"] != "backward":
            continue
        waits = [i for i, other in enumerate(nodes) if other.target is WAIT and node in other.all_input_nodes]
        if waits and node.meta["module"].startswith(layer):
            between = nodes[start : waits[0]]
            found[node.meta["module"].removeprefix(layer)] = sum(n.target is aten.mm.default for n in between)
    return found


def test_weight_gradients_of_a_layer_run_beside_what_it_sends() -> None:
    """By hand: the scatter behind gate and up hides two of the three products of the FFN, the gather before the output
    projection the third, and the scatter behind q, k and v all four of the attention."""
    local, sent_s, exposed_s = megatron()
    beside = products_beside(local.graph.graph, "model.layers.1")
    assert beside[".mlp.gate_proj"] == 2
    assert beside[".self_attn.o_proj"] == 1
    assert beside[".self_attn.q_proj"] == 4
    assert exposed_s < 0.6 * sent_s


def test_inductor_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code it writes waits for a scatter behind the product that runs beside it, and not before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sent = torch.ops._c10d_functional.reduce_scatter_tensor(dy @ w, "sum", 2, name)
        gradient = x @ dy
        return torch.ops._c10d_functional.wait_tensor(sent) * read, gradient

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        made = make_fx(step, tracing_mode="fake")(*(torch.zeros(n, 8) for n in (8, 8, 8, 4)))
        compiled(made)
    finally:
        dist.destroy_process_group()
    (written,) = [text for file in tmp_path.rglob("*.py") if "reduce_scatter" in (text := file.read_text())]
    body = written[written.index("def call") :]
    order = sorted((body.index(word), word) for word in ("reduce_scatter_tensor.default", "wait_tensor.default"))
    (sent, _), (waited, _) = order
    assert body.count("extern_kernels.mm", 0, sent) == 1
    assert body.count("extern_kernels.mm", sent, waited) == 1
