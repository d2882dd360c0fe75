"""Fused projections cut in equal parts: the numbers of one device, and a tensor axis that splits each part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity import captured, errors, planned
from torch import Tensor, nn

import autopar
from passes.prepare.chunks import split_chunks

aten = torch.ops.aten
transformers = pytest.importorskip("transformers")
WIDE = 24


class Cut(nn.Module):
    """Attention without positions on a fused projection, and a gated layer on another."""

    def __init__(self, cut: Callable[[Tensor, int], tuple[Tensor, ...]], bias: bool) -> None:
        super().__init__()
        self.cut = cut
        self.qkv, self.out = nn.Linear(WIDE, 3 * WIDE, bias=bias), nn.Linear(WIDE, WIDE)
        self.gate_up, self.down = nn.Linear(WIDE, 4 * WIDE, bias=bias), nn.Linear(2 * WIDE, WIDE)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        query, key, value = (part.unflatten(-1, (6, -1)).transpose(1, 2) for part in self.cut(self.qkv(x), 3))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.cut(self.gate_up(x), 2)
        return {"loss": self.down(gate.sigmoid() * up).square().mean()}


def _indexed(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    width = x.shape[-1] // parts
    return tuple(x[..., i * width : (i + 1) * width] for i in range(parts))


CUTS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "chunk": lambda x, parts: x.chunk(parts, -1),
    "split": lambda x, parts: x.split(x.shape[-1] // parts, dim=2),
    "index": _indexed,
}


def _gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=2, n_head=16, **off))


def _phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(num_hidden_layers=2, pad_token_id=0, use_cache=False))


@pytest.mark.parametrize("build", [_gpt2, _phi3])
def test_a_tensor_axis_sends_what_megatron_sends(build: Callable[[], nn.Module]) -> None:
    """Per layer, activations are gathered twice and added up twice in each phase; no more of them change hands."""
    with torch.device("meta"):
        model = build()
    ids = torch.empty(16, 1024, dtype=torch.long, device="meta")
    batch, mesh = {"input_ids": ids, "labels": ids}, {"dp": 2, "tp": 4}
    plan = autopar.plan(model.bfloat16(), mesh, batch, hardware="h100", strategy="megatron")
    hidden = 8 * 1024 * model.config.hidden_size * 2
    sent = [each for each in plan.collectives if each.axes == ("tp",) and each.bytes >= hidden]
    assert sum(each.count for each in sent) == 2 * 2 * 4 + 4, sent  # and around the layers
    assert {each.kind for each in sent} == {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_numbers_are_those_of_one_device(cut: str, bias: bool) -> None:
    torch.manual_seed(0)
    model, kwargs = Cut(CUTS[cut], bias), {"x": torch.randn(4, 8, WIDE)}
    program = captured(model, kwargs)
    cuts = [
        node for node in program.graph.graph.nodes if node.target in (aten.slice.Tensor, aten.slice_backward.default)
    ]
    assert not cuts
    for strategy in ("megatron", "auto"):
        *_, local = planned(program, {"dp": 2, "tp": 2}, strategy)
        found = errors(model, local, kwargs)
        assert found.output < 1e-5, found
        assert found.gradient < 1e-4, found


@pytest.mark.parametrize("ranks", [3, 4, 5])
def test_axes_that_do_not_divide_the_parts(ranks: int) -> None:
    torch.manual_seed(0)
    model, kwargs = Cut(CUTS["chunk"], True), {"x": torch.randn(4, 8, WIDE)}
    for strategy in ("megatron", "auto"):
        *_, local = planned(captured(model, kwargs), {"tp": ranks}, strategy, batch_axes=())
        found = errors(model, local, kwargs)
        assert found.output < 1e-5, found
        assert found.gradient < 1e-4, found


def test_what_is_no_product_or_not_all_of_it_stays() -> None:
    """The halves of rotary positions are cut of a head, whose dims come from elsewhere."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDE, WIDE)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.up(x).unflatten(-1, (3, 8))
            one, two = heads.chunk(2, -1)
            part = self.up(x)[..., :8]
            loss: Tensor = torch.cat([-two, one], -1).square().mean() + part.mean()
            return loss

    program = captured(Halves(), {"x": torch.randn(4, 8, WIDE)})
    assert split_chunks(program) is program


def test_the_columns_of_a_part_are_called_what_they_are() -> None:
    with torch.device("meta"):
        model = _phi3()
    ids = torch.empty(16, 1024, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": ids}
    plan = autopar.plan(model, {"dp": 2, "tp": 4}, batch, hardware="h100", strategy="megatron")
    dims = {name: placed.dims for name, placed in plan.parameters.items()}
    assert dims["model.layers.*.mlp.gate_up_proj.weight"] == ("parts*ffn", "hidden")
    assert dims["model.layers.*.mlp.down_proj.weight"] == ("hidden", "ffn")
