"""Padded programs: the same numbers as the model, op for op, on one device and on every rank of a mesh."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from parity import captured, eager, errors, relative
from random_plans import every_option, random_plan
from torch import nn
from torch.nn import functional as F
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

import autopar
from costmodel.hardware import topology
from costmodel.layout import Replicate, Shard
from costmodel.presets import hardware
from passes.analysis.analysis import Analysis, analyse
from passes.analysis.strategies import stored_options
from passes.padding.pad import Pad, pad
from passes.padding.repeat import is_worth_repeating, repeat_keys
from passes.padding.uneven import uneven_dims
from passes.parity.bisect import run_program
from passes.parity.simulate import simulate_step
from passes.plan.plan import Plan
from passes.planner import proposals
from passes.planner.fitting import Candidate
from passes.planner.pipeline import Request, compile_plan, local_program, on_mesh
from passes.play.blocks import NotPeriodicError
from passes.program.local import LocalProgram, Storage
from passes.program.program import Program
from passes.program.uniform import UNIFORM, uniform_values
from passes.rewrite.ledger import ledger

aten = torch.ops.aten


def test_a_padded_dim_without_a_word_is_told_by_its_parameter() -> None:
    """GPT-J leaves its heads without a name; from transformers 5.24 on its attention is one op, which names them."""
    config = GPTJConfig(
        n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=60, n_positions=24, use_cache=False,
    )  # fmt: skip
    model = GPTJForCausalLM(config)
    ids = torch.zeros(1, 24, dtype=torch.long)
    plan = autopar.plan(model, {"tp": 3}, {"input_ids": ids, "labels": ids}, strategy="megatron", hardware="cpu")
    named = Version(transformers.__version__) >= Version("5.24")
    told = "heads" if named else "a dim of transformer.h.0.attn.k_proj.weight"
    assert any(note.startswith(f"{told} 4 padded to 6") for note in plan.notes)


class Small(nn.Module):
    """A decoder layer with grouped attention, gated FFN, learned positions, a tied or own head, and a loss inside."""

    def __init__(
        self, sizes: Mapping[str, int], *, causal: bool = True, fused: bool = True, tied: bool = False
    ) -> None:
        super().__init__()
        self.sizes, self.causal, self.fused = dict(sizes), causal, fused
        heads, kv_heads, ffn, vocab, length = (sizes[n] for n in ("heads", "kv_heads", "ffn", "vocab", "length"))
        self.embed = nn.Embedding(vocab, 12)
        self.positions = nn.Embedding(length, 12)
        self.norm = nn.LayerNorm(12)
        self.query, self.value = nn.Linear(12, 4 * heads), nn.Linear(12, 4 * kv_heads)
        self.key = nn.Linear(12, 4 * kv_heads, bias=False)  # the gradient of a bias is zero but for rounding
        self.out = nn.Linear(4 * heads, 12)
        self.gate, self.up, self.down = nn.Linear(12, ffn), nn.Linear(12, ffn, bias=False), nn.Linear(ffn, 12)
        self.head = nn.Linear(12, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, length = ids.shape
        x = self.embed(ids) + self.positions(torch.arange(length))
        n = self.norm(x)
        q, k, v = (p(n).view(batch, length, -1, 4).transpose(1, 2) for p in (self.query, self.key, self.value))
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) / 2
            if self.causal:
                scores = scores.masked_fill(torch.ones(length, length).tril() == 0, float("-inf"))
            a = scores.softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, -1))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


MESHES = [{"tp": 2}, {"tp": 3}, {"tp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "tp": 3}, {"a": 2, "b": 3}]
SIZES = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "ffn": st.integers(5, 26),
        "vocab": st.integers(7, 33),
        "length": st.integers(2, 9),
    }
)


def drawn(sizes: dict[str, int], **kinds: bool) -> tuple[Small, dict[str, torch.Tensor]]:
    """The model and a global batch of 4, with a label in eight left out."""
    torch.manual_seed(sum(sizes.values()))
    model = Small({**sizes, "heads": sizes["kv_heads"] * sizes["group"]}, **kinds)
    ids, labels = (torch.randint(0, sizes["vocab"], (4, sizes["length"])) for _ in range(2))
    labels[torch.rand(labels.shape) < 0.125] = -100
    labels[0, 0] = 1
    return model, {"ids": ids, "labels": labels}


def batch_axes_of(mesh: Mapping[str, int]) -> tuple[int, ...]:
    return (0,) if "dp" in mesh else ()


def values_of(program: Program, model: nn.Module, kwargs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(kwargs)
    return [tensors[x.name].detach() if x.name in tensors else torch.ones(()) for x in program.inputs]


def same_on_one_device(model: nn.Module, program: Program, kwargs: Mapping[str, torch.Tensor]) -> None:
    outputs, _, gradients = eager(model, (), kwargs)
    for out, value in zip(program.outputs, run_program(program, values_of(program, model, kwargs)), strict=True):
        wanted = outputs[out.name] if out.kind == "output" else gradients[out.name]
        assert value.shape == wanted.shape, out
        assert relative(value, wanted) < 1e-5, out


ONCE = (Phase.explicit, Phase.generate)
"""Failures are small as they are; making them smaller takes minutes."""


@pytest.mark.timeout(300)
@settings(max_examples=6, deadline=None, derandomize=True, phases=ONCE, suppress_health_check=list(HealthCheck))
@given(SIZES, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(MESHES), st.integers(0, 99))
def test_any_layout_of_a_padded_program_gives_the_models_numbers(
    sizes: dict[str, int], causal: bool, fused: bool, tied: bool, mesh: dict[str, int], seed: int
) -> None:
    """Each rank's program under a plan drawn at random, all ranks simulated."""
    model, kwargs = drawn(sizes, causal=causal, fused=fused, tied=tied)
    program = captured(model, kwargs)
    analysis = analyse(program)
    pads = uneven_dims(analysis, tuple(mesh.values()), batch_axes_of(mesh))
    padded = pad(analysis, pads)
    same_on_one_device(model, padded.program, kwargs)
    _, local = random_plan(every_option(padded.program, mesh, batch_axes_of(mesh)), seed)
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, (pads, found)
    assert found.gradient < 1e-4, (pads, found)


@pytest.mark.timeout(300)
@settings(max_examples=3, deadline=None, derandomize=True, phases=ONCE, suppress_health_check=list(HealthCheck))
@given(SIZES, st.sampled_from(["megatron", "fsdp", "ddp", "auto"]), st.sampled_from(MESHES), st.booleans())
def test_plans_for_odd_sizes_give_the_models_numbers(
    sizes: dict[str, int], strategy: str, mesh: dict[str, int], fused: bool
) -> None:
    model, kwargs = drawn(sizes, fused=fused)
    program = captured(model, kwargs)
    plan, local = planned(program, mesh, strategy)
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, (plan.padded, found)
    assert found.gradient < 1e-4, (plan.padded, found)


def planned(program: Program, mesh: Mapping[str, int], strategy: str, name: str = "cpu") -> tuple[Plan, LocalProgram]:
    topology_ = on_mesh(name, tuple(mesh.items()))
    plan = compile_plan(program, topology_, batch_axes_of(mesh), Request(strategy))
    again = Plan.from_json(plan.to_json())
    assert again.padded == plan.padded
    return plan, local_program(program, again, topology_, {})


class Narrow(torch.nn.Module):
    """What lies between two products is three wide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, 64)
        self.narrow, self.wide = torch.nn.Linear(64, 3), torch.nn.Linear(3, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.wide(self.narrow(self.table(ids)).relu()).sum()


def test_a_dim_padded_to_twice_its_size_is_twice_the_work() -> None:
    plan, _ = planned(captured(Narrow(), {"ids": torch.randint(0, 64, (2, 16))}), {"tp": 6}, "megatron", "h100")
    assert "a dim of narrow.weight 3 padded to 6 over tp, 100% more work" in plan.notes


def test_one_position_leaves_the_other_dims_padded() -> None:
    """A step of decoding: what counts its one position has no dim to be padded."""
    model, kwargs = drawn({"kv_heads": 2, "group": 3, "ffn": 10, "vocab": 13, "length": 1})
    plan, local = planned(captured(model, kwargs), {"tp": 4}, "megatron")
    assert {(each.size, each.padded) for each in plan.padded} >= {(10, 12), (13, 16)}
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


# -- which dims, and how they are stored -------------------------------------------------------------------------------
ODD = {"kv_heads": 2, "group": 3, "ffn": 10, "vocab": 13, "length": 7}


@cache
def odd() -> tuple[Small, dict[str, torch.Tensor], Analysis]:
    model, kwargs = drawn(ODD)
    return model, kwargs, analyse(captured(model, kwargs))


def test_uneven_dims_are_vocabulary_ffn_sequence_and_the_cheaper_of_the_heads() -> None:
    pads = uneven_dims(odd()[2], (4,), ())
    assert sorted((each.size, each.padded) for each in pads if "labels" not in each.node) == [
        (3, 4),
        (7, 8),
        (10, 12),
        (13, 16),  # the table's rows
        (13, 16),  # and the head's
    ]
    assert uneven_dims(odd()[2], (4,), (0,)) == ()
    alone = uneven_dims(odd()[2], (2, 2), (), alone=True)  # the group's 3 stays: 2 ranks divide the 2 key-value heads
    assert sorted((each.size, each.padded) for each in alone if "labels" not in each.node) == [
        (7, 8),
        (13, 14),  # torch.chunk cuts 13 rows for two into 7 and 6: of 14 half, of 16 not
        (13, 14),
    ]
    for strategy in ("ddp", "fsdp"):
        assert [(each.node, each.size) for each in uneven_dims(odd()[2], (4,), (), strategy)] == [("ids", 7)]
    five = uneven_dims(odd()[2], (5,), ())  # neither the hidden 12 nor the head size 4, which would cost least
    assert {(each.size, each.padded) for each in five} == {(3, 5), (7, 10), (13, 15)}
    eight = uneven_dims(odd()[2], (8,), ())  # 3 heads of a group would be more than twice as many
    assert {(each.size, each.padded) for each in eight} == {(7, 8), (10, 16), (13, 16)}


def test_a_pad_that_names_no_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="names no dim"):
        pad(odd()[2], [Pad("embed_weight", 0, 1, 13, 16)])
    with pytest.raises(ValueError, match="the dim has size 13"):
        pad(odd()[2], [Pad("embed_weight", 0, 0, 12, 16)])


def test_nothing_is_padded_where_everything_divides() -> None:
    model, kwargs = drawn({"kv_heads": 2, "group": 4, "ffn": 8, "vocab": 16, "length": 8})
    analysis = analyse(captured(model, kwargs))
    assert uneven_dims(analysis, (2, 2), ()) == ()
    assert not is_worth_repeating(analysis.program, 4)


def test_masks_stand_where_padding_would_enter_a_sum_and_nowhere_else() -> None:
    """By hand: -inf before the classes' maximum; zeros before the loss's two sums and in the logits' gradient."""
    analysis = odd()[2]
    graph = pad(analysis, uneven_dims(analysis, (4,), ())).program.graph.graph
    masks = list(graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar))
    counted = [n for n in masks if not isinstance(n.args[2], int) or n.args[2] == 0]
    assert [n.args[2] for n in counted].count(-math.inf) == 1
    assert all(n.meta["val"].numel() <= 4 * 8 or n.meta["val"].shape[-1] == 16 for n in counted)


def test_uneven_storage_is_what_torch_chunk_cuts() -> None:
    """257 rows over 4: 65, 65, 65, 62; state over dp is then cut along the other dim."""
    options = stored_options(((260,), (8,)), (2, 4), (257, 8))
    split = [o for o in options if o.layout[1] == Shard(0)]
    assert {(o.storage.state_axes, o.storage.state_dim, o.padding) for o in split} == {((), 0, ()), ((0,), 1, ())}
    assert all(o.storage.padded_shape((2, 4))[0] == 65 for o in split)
    whole = next(o for o in options if o.layout == (Replicate(), Replicate()) and not o.storage.state_axes)
    assert whole.padding == (3, 0)
    # 15 rows padded to 18 for axes of 2 and 3: halves of the padded are 9 and 6, torch.chunk's are 8 and 7.
    assert not [o for o in stored_options(((18,), (8,)), (2, 3), (15, 8)) if o.layout == (Shard(0), Replicate())]
    assert Storage((257, 8), (None, None), (), 0).uneven_dims((2, 4)) == ()


# -- models ------------------------------------------------------------------------------------------------------------
def flops(graph: torch.fx.GraphModule) -> float:
    """Multiplications in matrix products with a 2-D weight."""
    shapes = [
        (n.args[0].meta["val"].shape, n.args[1].meta["val"].shape)
        for n in graph.graph.find_nodes(op="call_function", target=aten.mm.default)
    ]
    return float(sum(a[0] * a[1] * b[1] for a, b in shapes))


def test_megatron_splits_every_product_of_a_llama_that_nothing_divides() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=130, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        head_dim=8, vocab_size=257,
    )  # fmt: skip
    ids = torch.randint(0, 257, (2, 15))
    model, kwargs = LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
    program = captured(model, kwargs)
    plan, local = planned(program, {"tp": 4}, "megatron", "h100")
    assert any(each.size == 257 and each.padded == 260 for each in plan.padded)
    assert any("vocab 257 padded to 260 over tp, 1.2% more work" in note for note in plan.notes)
    products = lambda g: len(g.graph.find_nodes(op="call_function", target=aten.mm.default))  # noqa: E731
    assert products(local.graph) == products(program.graph)
    assert flops(local.graph) < 1.1 * flops(program.graph) / 4
    found = errors(model, local, kwargs)
    assert found.output < 1e-5
    assert found.gradient < 1e-4


def test_more_ranks_than_kv_heads_split_the_queries_heads() -> None:
    """8 heads in 2 groups on 8 ranks: one query head each, keys and values repeated."""
    model, kwargs = drawn({"kv_heads": 2, "group": 4, "ffn": 64, "vocab": 64, "length": 8})
    program = captured(model, kwargs)
    assert is_worth_repeating(program, 8)
    assert not is_worth_repeating(program, 4)  # heads of a group are split
    same_on_one_device(model, repeat_keys(program), kwargs)
    analysis = analyse(repeat_keys(program))
    space = every_option(analysis.program, {"tp": 8}, ())
    site = next(s for s in space.sites if s.kind == "op" and "flash_attention_for_cpu.default" in s.name)
    assert any(o.operands[0] == (Shard(1),) and o.operands[1] == (Shard(1),) for o in site.options)
    plan, local = planned(program, {"tp": 8}, "megatron", "h100")
    assert errors(model, local, kwargs).gradient < 1e-4
    assert plan.repeated_keys


def test_what_is_padded_of_a_layers_parameters_is_the_layers_work() -> None:
    """Heads are part of a weight's dim, so weights are padded in the graph: alike in every layer, however many."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids, sites, padded = torch.zeros(2, 8, dtype=torch.int64), [], []
    for layers in (2, 3):
        config = LlamaConfig(
            hidden_size=24, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=6,
            num_key_value_heads=3, head_dim=4, vocab_size=64,
        )  # fmt: skip
        analysis = analyse(captured(LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}))
        made = pad(analysis, uneven_dims(analysis, (4,), ())).program
        every = made.graph.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
        modules = [node.meta["module"] for node in every if node.meta["module"]]
        padded.append([sum(f".layers.{layer}." in module for module in modules) for layer in range(layers)])
        assert len(modules) == sum(padded[-1])
        sites.append(len(analyse(made).places))
    assert sites[0] == sites[1]
    assert padded == [[8] * 2, [8] * 3]  # of four projections, in forward and in backward


class Scaled(nn.Module):
    """Layers of three heads, as one dim of their weights and of a table that scales them, which is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"q": nn.Linear(8, 24, bias=False), "o": nn.Linear(24, 8, bias=False)}
        self.layers: Any = nn.ModuleList(nn.ModuleDict(copy.deepcopy(parts)) for _ in range(2))
        for layer in self.layers:
            layer.register_buffer("scale", torch.rand(24) + 0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            h = (layer["q"](x) * layer.scale).unflatten(-1, (3, 8)).transpose(1, 2)
            x = x + layer["o"](((h @ h.mT).softmax(-1) @ h).transpose(1, 2).flatten(2))
        return {"loss": x.square().mean()}


def test_a_layers_table_is_padded_in_each_phase_as_the_layers_work() -> None:
    torch.manual_seed(0)
    model, kwargs = Scaled(), {"x": torch.randn(4, 4, 8)}
    analysis = analyse(captured(model, kwargs))
    padded = pad(analysis, uneven_dims(analysis, (4,), ())).program
    same_on_one_device(model, padded, kwargs)
    found = []
    for node in padded.graph.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default):
        source = node
        while source.op != "placeholder":
            source = source.args[0]
        if "scale" in source.name:
            found.append((source.name, node.meta["module"], node.meta["phase"]))
    layers = [(f"layers_{n}_scale", f"layers.{n}", phase) for n in (0, 1) for phase in ("backward", "forward")]
    assert sorted(found) == layers


def gpt2() -> Program:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
        ids = torch.zeros(8, 128, dtype=torch.long)
    return captured(model, {"input_ids": ids, "labels": ids})


def test_padded_dims_that_there_is_no_time_to_leave_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where layers would differ without one, it stays padded."""
    program, late = gpt2(), "no time to plan without that"
    plan, _ = planned(program, {"tp": 5}, "auto", "h100")
    assert plan.padded
    assert not any(late in note for note in plan.notes)
    monkeypatch.setattr(proposals, "_LEFT_OUT_S", -1.0)
    hurried, _ = planned(program, {"tp": 5}, "auto", "h100")
    assert sum("padded to" in note and late in note for note in hurried.notes) == len(hurried.padded) > 0
    assert hurried.step_time_s >= plan.step_time_s
    monkeypatch.setattr(proposals, "_LEFT_OUT_S", 100.0)
    solved = proposals.Search._solved

    def differing(self: proposals.Search, *args: Any) -> list[Candidate]:
        if args[3:4] not in ((), (None,)):  # some of the shares alone: a dim is left out
            raise NotPeriodicError("layers differ")
        return solved(self, *args)

    monkeypatch.setattr(proposals.Search, "_solved", differing)
    left, _ = planned(program, {"tp": 5}, "auto", "h100")
    assert (left.padded, left.step_time_s) == (hurried.padded, hurried.step_time_s)


def test_gpt2s_vocabulary_is_split_eight_ways_and_logits_stay() -> None:
    program = gpt2()
    plan, local = planned(program, {"tp": 8}, "megatron", "h100")
    assert any("vocab 50257 padded to 50264 over tp, 0.014% more work" in note for note in plan.notes)
    table = next(x.storage for x in local.inputs if x.name == "transformer.wte.weight")
    assert table.padded_shape((8,)) == (6283, 768)
    graph = local.graph.graph
    embedding = next(iter(graph.find_nodes(op="call_function", target=aten.embedding.default)))
    assert embedding.args[0].meta["val"].shape == (6283, 768)
    heads = [n for n in graph.find_nodes(op="call_function", target=aten.mm.default) if n.meta["val"].shape[1] == 6283]
    assert heads
    logits = 8 * 128 * 6283 * 4
    assert all(issued.full_bytes < logits for issued in ledger(local))
    assert next(x.storage for x in local.outputs if x.name == "logits").shape == (8, 128, 50257)


def test_dropout_draws_the_same_numbers_padded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y = F.dropout(F.relu(self.up(x)), 0.5)
            return {"loss": F.dropout(self.down(y), 0.5).square().mean()}

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5, 8)
    program = captured(model, {"x": x})
    analysis = analyse(program)
    pads = uneven_dims(analysis, (4,), ())
    assert {each.size for each in pads} == {5, 10}
    seed = torch.tensor([7, 0])
    values = [
        seed if i.kind == "seed" else v
        for i, v in zip(program.inputs, values_of(program, model, {"x": x}), strict=True)
    ]
    padded = pad(analysis, pads).program
    wanted = run_program(program, values)
    for a, b in zip(wanted, run_program(padded, values), strict=True):
        assert relative(b, a) < 1e-6
    _, local = random_plan(every_option(padded, {"tp": 4}, ()), 3, share_whole=0.0)
    found = simulate_step(local, dict(model.named_parameters()), {}, [x], seed=(7, 0))
    assert relative(found.outputs["loss"], wanted[0]) < 1e-5
    assert topology(hardware("cpu"), {"tp": 4}).sizes == (4,)


class Flat(nn.Module):
    """Its tokens are one dim, of which the sequence is the inner part."""

    dropout = staticmethod(F.dropout)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.dropout(self.up(self.embed(x).flatten(0, 1)).sigmoid(), 0.5)
        return {"loss": self.down(y).view(*x.shape, 8).cumsum(1).square().mean(), "y": y}


class Grouped(nn.Module):
    """Attention of two groups with three heads each, as one dim of six."""

    dropout = staticmethod(F.dropout)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q = nn.Embedding(16, 24), nn.Linear(24, 24)
        self.kv, self.o = nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h, (b, s) = self.embed(x), x.shape
        q = self.q(h).view(b, s, 6, 4).transpose(1, 2)
        k = self.kv(h).view(b, s, 2, 4).transpose(1, 2).repeat_interleave(3, 1)
        y = self.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5)
        return {"loss": self.o((y @ k).transpose(1, 2).reshape(b, s, 24)).square().mean(), "y": y}


@pytest.mark.parametrize(("kind", "length"), [(Flat, 5), (Grouped, 8)])
def test_dropout_of_a_dim_padded_in_its_inner_part_draws_by_real_indices(kind: type[nn.Module], length: int) -> None:
    """The oracle is eager, given the mask that the generator has for the tensor without padding."""
    torch.manual_seed(0)
    model, x = kind(), torch.randint(0, 16, (4, length))
    analysis = analyse(captured(model, {"x": x}))
    padded = pad(analysis, uneven_dims(analysis, (4,), (), "megatron" if kind is Grouped else "auto")).program
    (draw,) = padded.graph.graph.find_nodes(op="call_function", target=UNIFORM)
    assert draw.args[2] != draw.args[3]
    kept = uniform_values(torch.tensor([7, 0]), 0, model(x)["y"].shape) < 0.5
    parameters = dict(model.named_parameters())
    programs = [random_plan(every_option(padded, {"tp": 4}, ()), seed, share_whole=0.0)[1] for seed in range(3)]
    model.dropout = lambda y, p: y * kept / p
    wanted = model(x)
    for local in programs:
        found = simulate_step(local, parameters, {}, [x], seed=(7, 0)).outputs
        assert torch.equal(found["y"] != 0, kept)
        assert relative(found["loss"], wanted["loss"].detach()) < 1e-5


class ScaledByPosition(nn.Module):
    """Two attentions, their queries scaled by a logarithm of the position: of an added position, it is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = 1 + torch.log(1 + torch.floor(torch.arange(x.shape[1]) / 4))
        for layer in self.layers:
            q, k, v = layer(x).unsqueeze(1).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q * scale[:, None], k, v, is_causal=True).squeeze(1)
        return {"loss": x.square().mean()}


def test_an_added_key_that_is_no_number_is_not_looked_at() -> None:
    torch.manual_seed(0)
    model, kwargs = ScaledByPosition(), {"x": torch.randn(4, 33, 8)}
    analysis = analyse(captured(model, kwargs))
    pads = uneven_dims(analysis, (2,), ())
    assert [(each.size, each.padded) for each in pads] == [(33, 34)]
    same_on_one_device(model, pad(analysis, pads).program, kwargs)


class PairsOfASlice(nn.Module):
    """Rotary positions as complex numbers on the last columns of a product, the way of DeepSeek-V2's shared key."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 20), nn.Linear(16, 8)
        self.turns = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        latent, key = self.down(x).split([16, 4], -1)
        turned = torch.view_as_complex(key.unflatten(-1, (2, 2))) * torch.view_as_complex(self.turns)
        return {"loss": self.up(latent).square().mean() + torch.view_as_real(turned).square().mean()}


def test_ranks_read_complex_numbers_in_rows_of_odd_length() -> None:
    torch.manual_seed(0)
    model, kwargs = PairsOfASlice(), {"x": torch.randn(4, 6, 8)}
    plan, local = planned(captured(model, kwargs), {"tp": 3}, "megatron")
    assert (20, 21) in [(each.size, each.padded) for each in plan.padded]
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


def test_scores_masked_twice_by_the_least_float_are_numbers_in_added_rows() -> None:
    """GPT-Neo adds the least float to scores that are the least float: the sum is -inf, a row of it nan."""
    config = GPTNeoConfig(
        hidden_size=24, num_layers=1, num_heads=3, attention_types=[[["global"], 1]], vocab_size=54,
        intermediate_size=36, max_position_embeddings=32, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(0, 54, (4, 9))
    inputs = {"input_ids": ids, "labels": ids}
    certificate = autopar.verify(GPTNeoForCausalLM(config), {"tp": 2}, inputs, strategy="megatron")
    assert certificate.ok, str(certificate)


def same_with_tokens_padded(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and its call, which give the same on one device where their nine tokens are padded for two ranks."""
    torch.manual_seed(0)
    model, kwargs = make(), {"x": torch.randn(4, 9, 8)}
    analysis = analyse(captured(model, kwargs))
    pads = [each for each in uneven_dims(analysis, (2,), ()) if each.size == 9]
    assert pads
    same_on_one_device(model, pad(analysis, pads).program, kwargs)
    return model, kwargs


class Gated(nn.Module):
    """Attention whose rows a gate closes by the least float times a number that the graph does not tell: next to none
    in real rows, a half in added ones."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.shift = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores, gate = q @ k.transpose(-1, -2), torch.sigmoid((x + self.shift).abs().sum(-1) * -1000)
        for _ in range(3):
            scores = scores + gate[:, None, :, None] * torch.finfo(x.dtype).min
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return {"loss": self.out(mixed).square().mean()}


def test_rows_that_a_gate_closes_three_times_by_the_least_float_are_numbers() -> None:
    same_with_tokens_padded(Gated)


class Far(nn.Module):
    """Attention whose queries at no position are the least float: their scores are no numbers."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(8, 24), nn.Linear(8, 8), causal

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        nowhere = torch.arange(x.shape[1]) < 0
        q = q.masked_fill(nowhere[:, None], torch.finfo(x.dtype).min)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return {"loss": self.out(mixed.transpose(1, 2).flatten(2)).square().mean()}


@pytest.mark.parametrize("causal", [False, True])
def test_added_queries_that_are_the_least_float_leave_gradients_numbers(causal: bool) -> None:
    same_with_tokens_padded(lambda: Far(causal))


class Matched(nn.Module):
    """Tokens of two views that are to match those at their own position, which a comparison of positions tells."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = torch.tanh(self.one(x) @ self.two(x).mT)
        places = torch.arange(x.shape[1])
        own = places[:, None] == places
        return {"loss": torch.where(own, scores, 0).sum((1, 2)).mean() + (~own * scores).square().mean()}


def test_added_positions_that_are_compared_with_one_another_match_none() -> None:
    model, kwargs = same_with_tokens_padded(Matched)
    certificate = autopar.verify(model, {"tp": 2}, kwargs, strategy="fsdp")
    assert certificate.ok, str(certificate)


class Placed(nn.Module):
    """Positions as features, in powers, and scores that fall off with the square of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.width = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        places = torch.arange(x.shape[1])
        at = places / x.shape[1]
        x = F.layer_norm(x + self.places(torch.stack([at, at * at, at**3], -1)), (8,))
        scores = self.one(x) @ x.mT - ((places[:, None] - places) / self.width) ** 2
        return {"loss": self.two(scores.softmax(-1) @ x).square().mean()}


def test_powers_of_added_positions_are_numbers() -> None:
    same_with_tokens_padded(Placed)


class CutTwice(nn.Module):
    """Six columns that one op reads as two by three and another as three by two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.one(x)
        twice = h.unflatten(-1, (2, 3)).softmax(-1).flatten(-2) * h.unflatten(-1, (3, 2)).cumsum(-1).flatten(-2)
        return {"loss": (self.two(twice) + h).square().mean()}


def test_a_dim_is_padded_for_one_of_two_ops_that_cut_it_otherwise() -> None:
    torch.manual_seed(0)
    model, kwargs = CutTwice(), {"x": torch.randn(4, 5, 6)}
    analysis = analyse(captured(model, kwargs))
    for part, size in enumerate((2, 3)):
        made = pad(analysis, [Pad("one_weight", 0, part, size, size + 1)])
        same_on_one_device(model, made.program, kwargs)


class Spectra(nn.Module):
    """Eigenvalues and singular values of a matrix of each token, divided by its trace."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16, bias=False), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        each = self.one(x).unflatten(-1, (4, 4))
        each = each @ each.mT
        each = each / each.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        values = torch.cat([torch.linalg.eigvalsh(each), torch.linalg.svdvals(each)], -1)
        return {"loss": self.two(values).square().mean()}


def test_added_matrices_have_eigenvalues() -> None:
    same_with_tokens_padded(Spectra)
