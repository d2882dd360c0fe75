"""The names of dims, against what the models' own configurations say each parameter's dims are."""

from __future__ import annotations

import pytest
import torch
from moe_models import MOE, build_moe
from parity import captured
from small_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.space.space import search_space
from passes.space.words import Words, fold_names, unfold_names
from passes.tokens.routing import route_by_blocks

ATTENTION = "model.layers.*.self_attn"
EXPERTS = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "lm_head.weight": ("vocab", "hidden"),
    "model.layers.*.mlp.experts.gate_up_proj": ("experts", "ffn", "hidden"),
    "model.layers.*.mlp.experts.down_proj": ("experts", "hidden", "ffn"),
}
NAMES = {
    # gate and up together are as wide as the vocabulary here (2 x 48): a name must not follow from the size alone
    "mixtral": EXPERTS | {"model.layers.*.mlp.gate.weight": ("experts", "hidden")},
    "deepseek_v3": EXPERTS
    | {
        "model.layers.*.mlp.gate.weight": ("groups*experts", "hidden"),
        f"{ATTENTION}.q_a_proj.weight": ("latent", "hidden"),
        f"{ATTENTION}.q_b_proj.weight": ("heads*head_size", "latent"),
        f"{ATTENTION}.o_proj.weight": ("hidden", "heads*head_size"),
        "model.layers.*.mlp.up_proj.weight": ("ffn", "hidden"),
        "model.layers.*.mlp.shared_experts.up_proj.weight": ("ffn", "hidden"),
    },
    "t5": {
        "shared.weight": ("vocab", "hidden"),
        "encoder.block.*.layer.*.SelfAttention.q.weight": ("heads*head_size", "hidden"),
        "encoder.block.*.layer.*.DenseReluDense.wi.weight": ("ffn", "hidden"),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_dims_are_called_what_they_are(name: str) -> None:
    model, kwargs = build_moe(name) if name in MOE else build(name)[::2]
    program = route_by_blocks(captured(model, kwargs), 2)
    space = search_space(program, topology(hardware("h100"), {"dp": 2, "tp": 2}), (0,), strategy="auto")
    words = Words(space)
    found = {
        words.pattern(site.given.name): words.tensor_dims(index)
        for index, site in enumerate(space.sites)
        if site.parameter is not None and site.kind != "returned"
    }
    assert {parameter: found[parameter] for parameter in NAMES[name]} == NAMES[name]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.w", "a.1.w", "a.2.w", "a.10.w"], "a.0-2,10.w"),
        (["a.0.b.0.w", "a.0.b.1.w", "a.3.b.0.w", "a.3.b.1.w"], "a.0,3.b.0-1.w"),
        (["a.00.w", "a.01.w"], "a.00.w, a.01.w"),  # keys of a ModuleDict
        (["a.01.w"], "a.01.w"),
        (["a.0-1.w"], r"a.0\-1.w"),
        (["a.0-1.w", "a.1-2.w"], r"a.0\-1.w, a.1\-2.w"),
        (["a.x, y.0.w", "a.x, y.1.w"], r"a.x\, y.0-1.w"),
        (["a.x-y.w"], "a.x-y.w"),
    ],
)
def test_names_of_layers_come_back_as_they_were(names: list[str], folded: str) -> None:
    assert fold_names(names) == folded
    assert unfold_names(folded) == names


class Rotated(nn.Module):
    """Attention with grouped keys, whose heads are turned as complex numbers, as Meta's LLaMA and torchtitan do it."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = nn.Linear(32, 48), nn.Linear(32, 24), nn.Linear(32, 24)
        self.wo = nn.Linear(48, 32)
        self.turns = nn.Buffer(torch.polar(torch.ones(8, 6), torch.rand(8, 6)))

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[:, None]).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (w(x).unflatten(-1, (-1, 12)) for w in (self.wq, self.wk, self.wv))
        query, key = self.turned(query), self.turned(key)
        key, value = (t[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2, 3) for t in (key, value))
        heads = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), is_causal=True)
        return self.wo(heads.transpose(1, 2).flatten(2)).square().mean()


def test_pairs_that_rotary_positions_turn_are_of_a_head() -> None:
    given, mesh = {"x": torch.randn(4, 8, 32)}, {"dp": 2, "tp": 2}
    plan = autopar.plan(Rotated(), mesh, given, strategy="megatron", hardware="h100")
    rows = {name: of.dims[0] for name, of in plan.parameters.items() if name in ("wq.weight", "wk.weight", "wv.weight")}
    assert rows == dict.fromkeys(["wk.weight", "wv.weight"], "kv_heads*head_size") | {"wq.weight": "heads*head_size"}
