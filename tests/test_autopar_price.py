"""One way to run, priced: against the search, published runs, arithmetic by hand, and what users get wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from schemas import conforms
from shared_captures import captured_once
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import autopar
from autopar import Setup
from autopar.cli.main import main, parser
from autopar.cli.price import setup_of
from costmodel.presets import hardware
from passes.runs.setup import State, as_megatron
from passes.space.recompute import Mode

HIDDEN, LAYERS, HEADS, FFN, VOCAB, LENGTH = 256, 8, 4, 512, 1000, 512


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCAB, max_position_embeddings=8192, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip


def small(layers: int = LAYERS) -> nn.Module:
    told = config()
    told.num_hidden_layers = layers
    with torch.device("meta"):
        return LlamaForCausalLM(told).to(torch.bfloat16)


def wide() -> nn.Module:
    """Parameters enough for what is sent of them to take more than its latency."""
    told = config()
    told.hidden_size, told.intermediate_size = 2048, 4096
    told.num_attention_heads = told.num_key_value_heads = 16
    with torch.device("meta"):
        return LlamaForCausalLM(told).to(torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def captures_of_all() -> Iterator[None]:
    with captured_once():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("price")
    config().save_pretrained(path)
    return path


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main(["price", *map(str, words), "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    conforms(found)
    return found


def flags(setup: Setup) -> list[object]:
    """What asks for a setup."""
    return [
        "--gpus", setup.ranks, "--global-batch", setup.global_batch, "--micro-batch", setup.micro_batch,
        "--tp", setup.tp, "--pp", setup.pp, "--virtual", setup.virtual, "--cp", setup.cp,
        "--replicas", setup.dp_replicate, "--state", setup.state, "--recompute", setup.recompute,
        *["--whole-layers"] * setup.whole_blocks, *["--keep-gathered"] * (not setup.reshard),
        *["--fp8"] * setup.fp8, *["--offload"] * setup.offload, *["--balanced-stages"] * setup.balanced,
    ]  # fmt: skip


def test_each_candidate_of_a_search_has_a_price_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same setup, step and bytes, asked for by flags."""
    options = autopar.Options(recompute="full")
    found = autopar.search(small(), 4, "h100", 8, sequence=LENGTH, options=options, top=2)
    tried: set[tuple[object, ...]] = set()
    for candidate in found.candidates:
        setup = candidate.setup
        kind = setup.priced_only, setup.dp_replicate > 1, setup.reshard, setup.virtual > 1
        if setup.solved or (setup.gathers_again and setup.state == "zero3") or kind in tried:
            continue  # no flag asks for what plans find by themselves
        alone = told(capsys, folder, "--hardware", "h100", "--seq", LENGTH, *flags(setup))
        assert alone["setup"] == asdict(setup)
        assert alone["step_time_s"] == pytest.approx(candidate.step_time_s, rel=1e-6)
        assert alone["peak_memory_bytes"] == pytest.approx(candidate.peak_memory_bytes, abs=1)
        tried.add(kind)
    assert len(tried) >= 6
    assert {"pipeline", "ZeRO-1", "offload"} <= {what for c in found.candidates for what in c.priced_only}


def test_flops_are_those_counted_by_hand() -> None:
    """Of forward two per weight and token and, of causal attention, half of its two products; of backward twice that.
    What is computed again, how many GPUs there are, and what they share makes no difference."""
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN) + VOCAB * HIDDEN
    length = 4096
    attention = LAYERS * 2 * 2 * length * length * HIDDEN / 2
    by_hand = 3 * (2 * weights * length + attention)
    for setup in (
        Setup(),
        Setup(dp_shard=2, tp=4, micro_batch=2, accumulate=3, recompute="full", whole_blocks=True),
        as_megatron(Setup(dp_shard=2, tp=2, pp=2, accumulate=4, state="zero1")),
    ):
        found = autopar.price(small(), setup, "h100", sequence=length)
        # kernels compute the blocks that the diagonal cuts whole
        assert found.model_flops / setup.global_batch == pytest.approx(by_hand, rel=0.03)
        assert found.model_flops / setup.global_batch >= by_hand
        peak = 989e12
        share = found.model_flops / (found.step_time_s * setup.ranks * peak)
        assert found.utilisation == pytest.approx(share)
        assert found.units_per_s == pytest.approx(setup.global_batch * length / found.step_time_s / setup.ranks)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sharded_gradients_may_be_reduced_in_fp32(accumulate: int) -> None:
    """By hand: of each parameter two bytes more by NVLink 4 for each micro-batch, but for a rank's own eighth; of its
    450 GB/s collectives reach three quarters or more."""

    def sent_s(gradient_bytes: int) -> float:
        setup = Setup(dp_shard=8, accumulate=accumulate, gradient_bytes=gradient_bytes)
        found = autopar.price(wide(), setup, "h100", sequence=LENGTH)
        return found.seconds["exposed state"] + found.hidden_s

    elements = sum(p.numel() for p in wide().parameters())
    least_s = accumulate * 2 * elements * 7 / 8 / 450e9
    assert least_s < sent_s(4) - sent_s(2) < least_s / 0.75


def test_sharded_gradients_of_each_micro_batch_are_reduced() -> None:
    """By hand: ZeRO-2 has shares of gradients alone, so each of 6 micro-batches' are reduced, and updated parameters
    gathered once; in bf16 all are of as many bytes. ZeRO-1 reduces the sum, so 2 in all. Keeping what ZeRO-3 gathers
    (its parameters stay for the ranks' parts of a sequence) is ZeRO-2 in what is sent."""

    def sent_s(setup: Setup) -> float:
        found = autopar.price(wide(), setup, "h100", sequence=LENGTH)
        return found.seconds["exposed state"] + found.hidden_s

    one = Setup(dp_shard=8, accumulate=6, state="zero1")
    assert sent_s(replace(one, state="zero2")) == pytest.approx(7 / 2 * sent_s(one), rel=1e-6)
    parts = replace(one, dp_shard=4, cp=2)
    kept = replace(parts, state="zero3", reshard=False)
    assert sent_s(kept) == pytest.approx(7 / 2 * sent_s(parts), rel=1e-6)
    staged = replace(one, dp_shard=4, pp=2)
    assert sent_s(replace(staged, state="zero2")) == pytest.approx(sent_s(staged), rel=1e-6)


@pytest.mark.parametrize("state", ["zero1", "zero3"])
def test_collectives_that_are_waited_for_hide_nothing(state: State) -> None:
    """A step takes longer by what ran beside weight gradients, less what that took from them (26% of its time at most),
    whichever way state is sharded."""

    def steps(*, waits: bool) -> autopar.Price:
        return autopar.price(wide(), Setup(tp=8, state=state, tp_waits=waits), "h100", sequence=4096)

    hidden, waited = steps(waits=False), steps(waits=True)
    more_s = waited.step_time_s - hidden.step_time_s
    sent = 8 * 2 * 4096 * 2048 * 2 * 7 / 8 / 450e9  # of backward alone: 2 a layer, in bf16, by NVLink 4
    assert 0.3 * sent < more_s < 2 * sent
    if state == "zero3":
        exposed_s = waited.seconds["exposed activations"] - hidden.seconds["exposed activations"]
        assert exposed_s - more_s == pytest.approx(hidden.seconds["slowed"] - waited.seconds["slowed"])
        assert 0.73 * exposed_s < more_s < exposed_s


@pytest.mark.parametrize(
    ("optimizer", "bytes_each", "frozen"),
    [
        ("adamw", 2 + 2 * (2 + 12), False),
        ("none", 2 + 2 * 2, False),
        ("momentum", 2 + 2 * (2 + 4), False),
        ("adamw", 2 + 2 * (2 + 12), True),
    ],
)
def test_an_update_on_the_host_moves_what_the_optimizer_keeps(optimizer: str, bytes_each: int, frozen: bool) -> None:
    """By hand: gradient, parameter and states are read, the latter two written, at 200 GB/s a node, which fewer ranks
    have to themselves; one way over PCIe beside that, the other before it."""
    options = autopar.Options(optimizer=optimizer)
    model = wide()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or "q_proj" in name)
    eight, two = Setup(dp_shard=8, offload=True), Setup(dp_shard=2, offload=True)
    for setup in (eight, two, replace(eight, state="zero1"), replace(two, state="zero1")):
        found = autopar.price(model, setup, "h100", sequence=LENGTH, options=options)
        elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        by_hand = elements * bytes_each / 200e9 + elements / setup.ranks * 2 / 55.4e9
        assert found.seconds["optimizer"] == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_update_on_the_host_takes_no_memory_of_the_rank(recompute: Mode) -> None:
    """By hand: where most is alive as the optimizer updates, that is parameters and gradients in bf16, three fp32
    numbers each, and the roots of one of them. On the host there are but the first two, and less than their bytes again
    in backward: a layer's gathered parameters."""
    elements = sum(p.numel() for p in wide().parameters()) / 2

    def taken(setup: Setup) -> float:
        return sum(autopar.price(wide(), setup, "h100", sequence=16).bytes.values())

    setup = Setup(dp_shard=2, recompute=recompute)
    assert taken(setup) == pytest.approx((2 + 2 + 12 + 4) * elements, rel=0.01)
    assert (2 + 2) * elements < taken(replace(setup, offload=True)) < 2 * (2 + 2) * elements


@pytest.mark.parametrize(("state", "staged"), [("zero0", False), ("zero1", True), ("zero2", False)])
def test_frozen_parameters_send_and_add_nothing(state: State, staged: bool) -> None:
    """One matrix of each layer is trained: around rings of 8 or 4 ranks that takes its bytes over the wire, twice, for
    gradients and for parameters or in an all-reduce, and their latencies. A further micro-batch reads it, and reads and
    writes the sum."""
    model = wide()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    setup = Setup(dp_shard=8 // (1 + staged), pp=1 + staged, accumulate=2, state=state, overlap=False)
    h100 = hardware("h100")
    found = autopar.price(model, setup, h100, sequence=LENGTH)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / setup.pp
    sent = 3 if setup.reduces_each else 2  # reductions of each micro-batch
    wire_s = sent * 2 * trained * (1 - 1 / setup.dp_shard) / h100.intra_node.bytes_per_s
    assert found.seconds["exposed state"] == pytest.approx(wire_s, abs=60e-6 * sent)
    in_products = autopar.price(model, replace(setup, adds_in_products=True), h100, sequence=LENGTH)
    kept = trained / setup.dp_shard if setup.reduces_each else trained
    memory = h100.device.memory_bytes_per_s * h100.device.memory_efficiency
    added_s = found.seconds["compute"] - in_products.seconds["compute"]
    assert added_s == pytest.approx(3 * 2 * kept / memory, rel=0.05, abs=5e-6)


def test_what_a_framework_sends_after_the_step_is_waited_for() -> None:
    """By hand: gradients in four bytes and parameters in two go around a ring of 8 ranks, at its wires' rate or up to a
    tenth less. What compute waits for is none of it but a layer's part, the parameters, or all."""
    setup = Setup(dp_shard=8, state="zero1", accumulate=2, gradient_bytes=4)
    h100 = hardware("h100")
    beside, gathers_waited, waited = (
        autopar.price(wide(), each, h100, sequence=LENGTH)
        for each in (setup, replace(setup, gathers_waited=True), replace(setup, overlap=False))
    )
    trip_s = sum(p.numel() for p in wide().parameters()) * (7 / 8) / h100.intra_node.bytes_per_s
    exposed_s = [found.seconds["exposed state"] for found in (beside, gathers_waited, waited)]
    assert exposed_s[2] == pytest.approx((4 + 2) * trip_s, rel=0.1)
    assert exposed_s[0] + trip_s < exposed_s[1] < exposed_s[2] - 2 * trip_s
    for found, exposed in zip((beside, gathers_waited, waited), exposed_s, strict=True):
        assert exposed + found.hidden_s == pytest.approx(exposed_s[2])
        assert found.step_time_s == pytest.approx(sum(found.seconds.values()))
    for found, told in ((gathers_waited, "what was updated"), (waited, "what of state is sent")):
        assert f"compute waits for {told}" in " ".join(found.text("wide", None).split())


@pytest.mark.parametrize(
    ("word", "overlap", "gathers_waited"),
    [("beside", True, False), ("gradients", True, True), ("waited", False, False)],
)
def test_a_flag_says_what_of_state_is_waited_for(word: str, overlap: bool, gathers_waited: bool) -> None:
    words = ["price", "MODEL", "--gpus", "8", "--global-batch", "8", "--state", "zero1", "--state-collectives", word]
    setup = setup_of(parser().parse_args(words))
    assert (setup.overlap, setup.gathers_waited) == (overlap, gathers_waited)


def test_experts_that_compute_every_token_are_told() -> None:
    """transformers' Llama 4 multiplies each token by all experts; Qwen3 MoE, of as many, by those it is routed to."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 128, "intermediate_size": 64, "num_experts_per_tok": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.device("meta"):
        llama4 = Llama4ForCausalLM(Llama4TextConfig(num_local_experts=8, intermediate_size_mlp=64, **sizes))
        qwen3 = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=8, moe_intermediate_size=64, **sizes))
    setup = Setup(dp_shard=8, state="zero1")
    priced, routed = (autopar.price(model, setup, "h100", sequence=32) for model in (llama4, qwen3))
    told = "the model's config has 8 with 1 for a token, but its code puts every token through all of them"
    assert any(told in note for note in priced.notes)
    assert not any("experts" in note for note in routed.notes)
    products = 2 * 3 * 2 * 32 * 3 * 64 * 64  # of two layers' experts, three times a forward, a sequence of 32 tokens
    assert priced.model_flops - routed.model_flops >= 8 * 7 * products
    with pytest.raises(ValueError, match=r"^ep=2, but no routed experts were found: the model's config has 8 with 1"):
        autopar.price(llama4, replace(setup, ep=2), "h100", sequence=32)


@pytest.mark.parametrize("state", ["zero1", "zero3"])
def test_activations_gathered_again_without_tensor_parallel_ranks_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], state: State
) -> None:
    words = ["--gpus", "8", "--global-batch", "8", "--seq", "512", "--hardware", "h100", "--state", state]
    assert main(["price", str(folder), *words, "--regather-activations"]) == 2
    assert "--regather-activations, but --tp 1" in capsys.readouterr().err


def test_experts_stay_on_a_rank_where_no_flag_says_what_is_sharded() -> None:
    words = ["price", "MODEL", "--gpus", "8", "--global-batch", "8", "--ep", "2"]
    assert setup_of(parser().parse_args(words)).state == "zero1"
    assert setup_of(parser().parse_args(words[:-2])).state == "zero3"


def test_fp8_is_a_share_of_its_own_peak() -> None:
    found = autopar.price(small(), Setup(fp8=True), "h100", sequence=LENGTH)
    assert found.peak_flops_per_s == 1979e12
    assert "fp8" in found.setup.priced_only


@pytest.mark.parametrize(("attention", "dropout", "told_of"), [
    ("sdpa", 0.0, ""), ("eager", 0.0, "no attention kernel was found"), ("sdpa", 0.1, "attention with dropout"),
])  # fmt: skip
def test_attention_that_no_kernel_computes_is_named(attention: str, dropout: float, told_of: str) -> None:
    made = GPT2Config(
        n_embd=512, n_layer=2, n_head=8, n_positions=1024, vocab_size=500, attn_pdrop=dropout, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_implementation=attention,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT2LMHeadModel(made).to(torch.bfloat16)
    found = autopar.price(model, Setup(dp_shard=8), "h100")
    notes = [note for note in found.notes if "attention" in note]
    assert [told_of in note for note in notes] == [True] * bool(told_of)
    searched = autopar.search(model, 2, "h100", 2, options=autopar.Options(recompute="none"), top=1)
    assert [note for note in searched.notes if "attention" in note and "no plan" not in note] == notes


@pytest.mark.parametrize(("gpu", "said"), [("gh200", "nodes, which have 1 GPU each"), ("h100", "")])
def test_tensor_parallelism_over_the_network_is_named(gpu: str, said: str) -> None:
    found = autopar.price(small(), Setup(tp=4), gpu, sequence=LENGTH)
    assert [said in note for note in found.notes if "crosses nodes" in note] == [True] * bool(said)


PUBLISHED = [
    # DGX Cloud benchmarking recipes, NeMo 25.02: Llama 3.1 8B, bf16, 8192 tokens, 8 H100
    ("llama3-8b --gpus 8 --hardware h100 --global-batch 128 --seq 8192 --cp 2 --gradients bf16", 12.27),
    # the same on 64
    ("llama3-8b --gpus 64 --hardware h100 --global-batch 1024 --seq 8192 --cp 2 --gradients bf16", 12.33),
    # Megatron-Bridge's performance summary, NeMo 26.06: Llama 3.1 405B, fp8, 326 tokens/s/GPU; 126 layers on 8 stages
    ("llama3-405b --gpus 1024 --hardware h100 --global-batch 1536 --seq 8192 --tp 8 --pp 8 --cp 2 --virtual 8 --fp8 "
     "--gradients bf16", 37.69),
]  # fmt: skip


@pytest.mark.parametrize(("words", "measured_s"), PUBLISHED)
def test_published_runs(words: str, measured_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, *words.split())["step_time_s"] == pytest.approx(measured_s, rel=0.08)


def test_a_pipelines_bubble_is_that_of_the_formula() -> None:
    """(p - 1) / m of what passes, and a v-th of that in v parts."""

    def bubble(virtual: int) -> float:
        setup = as_megatron(Setup(pp=4, virtual=virtual, accumulate=16, state="zero0"))
        return autopar.price(small(16), setup, "h100", sequence=4096).seconds["bubble"]

    assert bubble(2) == pytest.approx(bubble(1) / 2, rel=0.15)


def test_stages_are_even_unless_asked_to_be_balanced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of Megatron-LM's stages of 4 layers each the one with a head of 256k words takes 183 ms a micro-batch and the
    others 70; without a layer beside that head 111 (sail-sg/VocabularyParallelism, artifact/exp_one_host.csv)."""
    made = GPT2Config(
        n_embd=3072, n_layer=32, n_head=24, n_positions=4096, vocab_size=256000, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dtype="bfloat16", architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    words = f"{tmp_path} --gpus 8 --hardware a100-80gb --global-batch 128 --seq 4096 --pp 8".split()
    even, balanced = told(capsys, *words), told(capsys, *words, "--balanced-stages")
    assert even["seconds"]["compute"] / 128 == pytest.approx(0.183, rel=0.15)
    assert balanced["seconds"]["compute"] / even["seconds"]["compute"] == pytest.approx(111 / 183, rel=0.15)
    (note,) = [note for note in even["notes"] if "--balanced-stages" in note]
    assert f"{balanced['step_time_s']:.2f} s" in note
    assert not any("--balanced-stages" in note for note in balanced["notes"])


def test_a_tied_embedding_lies_on_both_ends_of_a_pipeline() -> None:
    """As much as an embedding and a head of their own, and their gradients are added up over the wire."""
    words, layer = 256000, 4 * HIDDEN**2 + 3 * HIDDEN * FFN + 2 * HIDDEN
    setup = Setup(pp=2, accumulate=4, state="zero0", gradient_bytes=4)
    prices = {}
    for tied in (False, True):
        made = config()
        made.vocab_size, made.tie_word_embeddings = words, tied
        with torch.device("meta"):
            model = LlamaForCausalLM(made).to(torch.bfloat16)
        prices[tied] = autopar.price(model, setup, "h100", sequence=LENGTH)
        stage = LAYERS // 2 * layer + words * HIDDEN + HIDDEN // 2
        assert prices[tied].bytes["parameters"] == pytest.approx(2 * stage)
        assert prices[tied].bytes["gradients"] == pytest.approx(4 * stage)
    wire = hardware("h100").intra_node.bytes_per_s
    assert prices[False].seconds["exposed state"] == 0.0
    assert prices[True].seconds["exposed state"] == pytest.approx(4 * words * HIDDEN / wire, rel=0.25)


def test_a_stage_gathers_what_it_has_outside_of_its_layers() -> None:
    """ZeRO-3 on 2 stages x 2: of half of the layers and the embedding or the head a half, and gathered two layers and
    that embedding or head."""
    made = config()
    made.vocab_size = 32000
    with torch.device("meta"):
        model = LlamaForCausalLM(made).to(torch.bfloat16)
    words, layer = 32000 * HIDDEN, 4 * HIDDEN**2 + 3 * HIDDEN * FFN + 2 * HIDDEN
    for stages in (2, 4):
        setup = Setup(dp_shard=2, pp=stages, accumulate=8, state="zero3")
        found = autopar.price(model, setup, "h100", sequence=LENGTH).bytes["parameters"]
        stage = LAYERS // stages * layer + words
        assert found == pytest.approx(2 * (stage / 2 + min(stage, words + 2 * layer)), rel=0.001)


def test_what_was_measured_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["price", str(folder), "--gpus", "1", "--hardware", "h100", "--global-batch", "1", "--seq", "512"]
    step_s = told(capsys, *ask[1:])["step_time_s"]
    assert main([*ask, "--measured", str(step_s / 1.25)]) == 0
    assert "predicted 25.0% too slow" in capsys.readouterr().out
    assert main([*ask, "--measured", str(step_s * 2)]) == 0
    assert "predicted 50.0% too fast" in capsys.readouterr().out
    found = told(capsys, *ask[1:], "--measured", step_s / 1.25)
    assert found["measured_s"] == pytest.approx(step_s / 1.25)
    assert found["error"] == pytest.approx(0.25)


def test_what_does_not_fit_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--gpus 1 --hardware h100 --global-batch 1 --seq 512 --memory-budget 1MiB"
    assert main(["price", str(folder), *words.split()]) == 1
    assert "of 1.00 MiB per GPU: DOES NOT FIT, " in capsys.readouterr().out
    large = small(80)
    found = autopar.price(large, Setup(micro_batch=512), "h100", sequence=LENGTH)
    assert not found.fits
    assert not any("should it run out of memory" in note for note in found.notes)  # it will


def test_parts_add_up_and_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part that takes a thousandth stands there with what it is."""
    words = "--gpus 16 --hardware h100 --global-batch 16 --seq 512 --tp 2 --pp 2 --virtual 2 --state zero1 --fp8"
    found = told(capsys, folder, *words.split())
    assert sum(found["seconds"].values()) == pytest.approx(found["step_time_s"], rel=1e-6)
    assert sum(found["bytes"].values()) == pytest.approx(found["peak_memory_bytes"], abs=2)
    assert main(["price", str(folder), *words.split()]) == 0
    out = capsys.readouterr().out
    times, _, _ = out.partition("of the memory")
    for name, seconds in found["seconds"].items():
        line = [each for each in times.splitlines() if each.startswith(f"  {name} ")]
        assert bool(line) == (seconds >= 0.001 * found["step_time_s"]), name
        assert all(len(each.split()) > len(name.split()) + 4 for each in line)
    out = " ".join(out.split())  # however wide the terminal is
    assert "2 stages of 2 parts in turn x 4 data-parallel x 2 tensor-parallel; optimizer sharded (ZeRO-1)" in out
    assert "no plan does these yet: pipeline, ZeRO-1, fp8, overlapped tensor parallelism" in out


def test_nothing_is_said_of_stages_and_tensor_parallel_ranks_that_are_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    words = ["--gpus", "4", "--hardware", "h100", "--global-batch", "4", "--seq", "16"]
    text = {}
    for tp in ("1", "2"):
        assert main(["price", str(folder), *words, "--tp", tp]) == 0
        out = capsys.readouterr().out
        assert "exposed activations" in out
        text[tp] = out
    assert "stages" not in text["1"]
    assert "tensor parallelism" not in text["1"]
    assert "tensor parallelism's collectives that compute waits for" in text["2"]


def test_without_tokens_samples_are_counted() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    found = autopar.price(model.to("meta"), Setup(dp_shard=2), "h100", (torch.zeros(1, 64),))
    assert found.sequence is None
    assert "samples/s/GPU" in str(found)
    assert found.units_per_s == pytest.approx(2 / found.step_time_s / 2)


MISTAKES: list[tuple[Setup, str]] = [
    (Setup(tp=0), "tp=0: at least 1"),
    (Setup(micro_batch=-1), "micro_batch=-1: at least 1"),
    (Setup(state="zero4"), "state='zero4': one of zero0, zero1, zero2, zero3"),  # type: ignore[arg-type]
    (Setup(recompute="some"), "recompute='some': one of none"),  # type: ignore[arg-type]
    (Setup(gradient_bytes=3), "gradient_bytes=3: 2 or 4"),
    (Setup(dp_shard=12), "12 GPUs fill no whole number of nodes of 8; use 8 or 16"),
    (Setup(dp_replicate=2, dp_shard=2, state="zero1"), "count all data-parallel ranks in dp_shard"),
    (Setup(virtual=2), "virtual=2, but pp=1; there are no stages"),
    (Setup(pp=16), "pp=16, but the model has 8 repeated layers; at most that"),
    (Setup(pp=2, virtual=3), "a stage's 4 of 8 layers are not cut evenly into that many parts"),
    (Setup(cp=8, dp_shard=1), "cp=8 does not divide a sequence of 500"),
    (Setup(ep=2, dp_shard=4), "ep=2, but the model has no routed experts"),
    (Setup(ep=2, dp_shard=4, state="zero1"), "ep=2, but the model has no routed experts"),
    (Setup(ep=3, dp_shard=4, state="zero1"), "ep=3: not a part of the 4 ranks with the same layers"),
    (Setup(ep=2, dp_shard=2, tp=4, state="zero1"), "split them; priced are multiples of 4 that divide 8"),
    (Setup(whole_blocks=True), "whole_blocks=True, but recompute='pointwise'; layers are run again to their end"),
    (Setup(reshard=False, dp_shard=4, state="zero1"), "reshard=False, but state='zero1'; gathered parameters are"),
    (Setup(sequence_parallel=False), "sequence_parallel=False, but tp=1; there are no tensor-parallel ranks"),
    (Setup(tp_overlap=True), "tp_overlap=True, but tp=1"),
    (Setup(tp_waits=True), "tp_waits=True, but tp=1"),
    (Setup(tp=2, tp_waits=True, tp_overlap=True), "tp_overlap=True, but tp_waits=True"),
    (Setup(micro_batch=1.5), "micro_batch=1.5: a whole number"),  # type: ignore[arg-type]
    (Setup(dp_shard=True), "dp_shard=True: a whole number"),
    (Setup(dp_shard=8, gather_bytes_per_s=-1e9), "gather_bytes_per_s=-1000000000.0: bytes per second, or 0"),
    (Setup(dp_shard=8, gather_bytes_per_s=math.nan), "gather_bytes_per_s=nan: bytes per second, or 0"),
    (Setup(dp_shard=8, state="zero1", gather_bytes_per_s=1e9), "gather_bytes_per_s=1e+09, but gathers are waited for"),
    (Setup(dp_shard=8, state="zero1", gathers_late=True), "gathers_late=True, but gathers are waited for so under"),
    (Setup(dp_shard=2, pp=2, gathers_late=True), "gathers_late=True, but gathers are waited for so under"),
    (Setup(dp_replicate=2, gathers_late=True), "gathers_late=True, but dp_shard=1; there is nothing to gather"),
    (Setup(dp_shard=2, reshard=False, gathers_late=True), "gathers_late=True, but reshard=False"),
    (Setup(dp_shard=2, gather_bytes_per_s=1e9, gathers_late=True), "gathers_late=True, but gather_bytes_per_s has"),
    (Setup(dp_shard=8, gathers_waited=True), "gathers_waited=True, but state='zero3'; what was updated is gathered"),
    (Setup(dp_shard=8, state="zero0", gathers_waited=True), "gathers_waited=True, but state='zero0'"),
    (
        Setup(dp_shard=8, state="zero1", gathers_waited=True, overlap=False),
        "gathers_waited=True, but overlap=False; all is waited for",
    ),
    (Setup(dp_shard=8, overlap=False), "overlap=False, but state='zero3'; without stages, context or expert par"),
    (Setup(dp_shard=8, adds_in_products=True), "adds_in_products=True, but state='zero3'"),
    (Setup(dp_shard=8, experts_beside=True), "experts_beside=True, but ep=1; no tokens are sent"),
    (Setup(dp_shard=8, ep=2, state="zero1", experts_beside=True), "experts_beside=True, but accumulate=1"),
    (
        Setup(dp_shard=4, pp=2, ep=2, accumulate=2, state="zero1", experts_beside=True),
        "experts_beside=True, but virtual=1; a forward and a backward",
    ),
    (Setup(dp_shard=8, balanced=True), "balanced=True, but pp=1; there are no stages"),
    (Setup(dp_shard=8, ends_count=True), "ends_count=True, but pp=1; there are no stages"),
    (Setup(pp=2, balanced=True, ends_count=True), "ends_count=True, but balanced=True; one says how"),
    (Setup(pp=4, ends_count=True), "an embedding and a head are not spread evenly over 4 stages"),
    (Setup(dp_shard=2, tp=2, experts_cut=True), "experts_cut=True, but ep=1; tensor-parallel ranks cut experts"),
    (Setup(dp_shard=8, ep=2, state="zero1", experts_cut=True), "experts_cut=True, but tp=1; there are no tensor-pa"),
    (Setup(dp_shard=8, dispatcher="deepep"), "dispatcher='deepep', but ep=1; no tokens are sent"),
    (Setup(dp_shard=8, dispatcher="nccl"), "dispatcher='nccl': one of hybridep, deepep, alltoall"),  # type: ignore[arg-type]
    (Setup(dp_shard=8, in_block="none"), "in_block='none', but no layers are run again to their end"),
    (Setup(dp_shard=8, solved=True), "solved=True, but tp=1; there are no tensor-parallel ranks"),
]


@pytest.mark.parametrize(("setup", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_what_cannot_be_is_named(setup: Setup, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        autopar.price(small(), setup, "h100", sequence=500)


def test_a_setup_is_one() -> None:
    with pytest.raises(ValueError, match=r"setup is a dict; pass autopar\.Setup"):
        autopar.price(small(), {"tp": 8}, "h100")  # type: ignore[arg-type]


def test_what_a_cpu_is_not_priced_for_is_named() -> None:
    with pytest.raises(ValueError, match=r"pipeline on .*: ranks share one host there"):
        autopar.price(small(), Setup(pp=2), "cpu", sequence=LENGTH)


def test_a_model_whose_layers_do_not_repeat_has_no_stages() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 1)).to("meta")
    with pytest.raises(ValueError, match="pp=2, but no repeated layers were found"):
        autopar.price(model, Setup(pp=2), "h100", (torch.zeros(1, 64),))
    with pytest.raises(ValueError, match="cp=2: a sequence can be cut where inputs come from the model's config"):
        autopar.price(model, Setup(cp=2), "h100", (torch.zeros(1, 64),))


@pytest.mark.parametrize(
    ("setup", "name"),
    [
        (Setup(state="zero1", cp=4), "cp=4"),
        (Setup(recompute="full", whole_blocks=True), "whole_blocks=True"),
        (Setup(state="zero1", dp_shard=2, recompute="full", whole_blocks=True), "whole_blocks=True"),
        (Setup(state="zero1", tp=2, tp_waits=True), "tp_waits=True"),
    ],
)
def test_what_is_priced_by_layer_needs_layers(setup: Setup, name: str) -> None:
    """Four are too few to tell what one takes."""
    with pytest.raises(ValueError, match=f"^{name}, but no repeated layers were found, or too few to cut"):
        autopar.price(small(4), setup, "h100", sequence=LENGTH)


@pytest.mark.parametrize("words", ["--cp 2", "--whole-layers --recompute full"])
def test_what_is_priced_by_layer_is_named_by_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    made = config()
    made.num_hidden_layers = 3
    made.save_pretrained(tmp_path)
    on = "--gpus 2 --global-batch 2 --seq 64 --hardware h100"
    assert main(["price", str(tmp_path), *on.split(), *words.split()]) == 2
    flag = words.removesuffix(" --recompute full")
    assert f"autopar price: {flag}, but no repeated layers" in capsys.readouterr().err


def test_experts_of_layers_that_are_not_told_apart_stay_on_each_rank() -> None:
    made = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=128, sliding_window=None, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(made).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^ep=2, but no repeated layers were found"):
        autopar.price(model, Setup(state="zero1", dp_shard=2, ep=2), "h100", sequence=128)
    options = autopar.Options(recompute="full")
    found = autopar.search(model, 2, "h100", 2, sequence=128, options=options, top=1)
    assert {candidate.setup.ep for candidate in found.candidates} == {1}
    assert any(note.endswith("captured whole, no pipeline and no expert parallelism priced") for note in found.notes)


def test_attention_that_is_written_out_is_not_priced_over_parts_of_a_sequence() -> None:
    made = config()
    made._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(made).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^cp=2, but no attention kernel was found .*; cp=1 is priced"):
        autopar.price(model, Setup(state="zero1", cp=2), "h100", sequence=LENGTH)


def test_casts_of_few_layers_are_of_all_operands() -> None:
    """By hand: three products of each weight, of rows, weight and result two each, read in 2 bytes and for one of two
    products written in 2 more, at 87% of 3.35 TB/s."""
    shapes = 4 * [*4 * [(HIDDEN, HIDDEN)], *3 * [(HIDDEN, FFN)]] + [(HIDDEN, VOCAB)]
    operands = sum(2 * (LENGTH * (rows + columns) + rows * columns) for rows, columns in shapes)
    found = autopar.price(small(4), Setup(fp8=True), "h100", sequence=LENGTH)
    assert found.seconds["casts"] == pytest.approx(2 * operands / (0.87 * 3.35e12), rel=0.01)


def test_fp8_where_there_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="has no fp8 matrix products; leave it out"):
        autopar.price(small(), Setup(fp8=True), "a100-80gb", sequence=LENGTH)


@pytest.mark.parametrize(("hardware", "error"), [("h100", "8%"), ("gb300", "15%"), ("mi300x", "15%")])
def test_the_error_that_is_told_is_that_of_the_part(hardware: str, error: str) -> None:
    found = autopar.price(small(), Setup(), hardware, sequence=LENGTH)
    assert f"predictions of such steps are off by {error} on average" in found.notes


def test_options_of_plans_that_have_no_price_are_told() -> None:
    found = autopar.price(
        small(), Setup(), "h100", sequence=LENGTH, options=autopar.Options(pins={"*.q_proj.weight": "R"})
    )
    assert "not priced: pins" in found.notes
    assert math.isfinite(found.step_time_s)


def test_learned_positions_bound_the_sequence() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=4, n_head=2, n_positions=128, vocab_size=100))
    with pytest.raises(ValueError, match="sequence is 256, but the model has 128 positions"):
        autopar.price(model, Setup(), "h100", sequence=256)


def test_a_gpu_without_bf16_units_is_priced_in_float16(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """V100's tensor cores do 125 TFLOP/s in float16 alone. A model that computes in bfloat16 is told."""
    call = ["price", str(folder), "--gpus", "8", "--hardware", "v100-sxm2-32gb", "--global-batch", "8", "--seq", "512"]
    assert main([*call, "--json"]) == 0
    mine = json.loads(capsys.readouterr().out)
    setup = Setup(dp_shard=8)
    given, half = (
        autopar.price(small().to(dtype), setup, "v100-sxm2-32gb", sequence=512)
        for dtype in (torch.bfloat16, torch.float16)
    )
    assert mine["step_time_s"] == pytest.approx(half.step_time_s)
    assert half.step_time_s < given.step_time_s
    assert any("priced in float16, the fastest 16 bits of v100" in note for note in mine["notes"])
    said = "does 14 TFLOP/s at most, and of float16 125"
    assert any(said in note for note in given.notes)
    assert not any(said in note for note in (*half.notes, *mine["notes"]))
    assert not any("TFLOP/s at most" in note for note in autopar.price(small(), setup, "h100", sequence=512).notes)
