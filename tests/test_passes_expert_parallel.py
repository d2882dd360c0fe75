"""What expert parallelism is priced from, against a Mixtral's dimensions by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from small_models import sized_llama, tokens
from transformers import MixtralConfig, MixtralForCausalLM

import autopar
from autopar.runs.profiling import Captures, Profiler
from costmodel.collectives import collective_s, taken_shares
from costmodel.compute import matmul, op_s
from costmodel.hardware import topology
from costmodel.memory import OPTIMIZERS
from costmodel.presets import hardware
from costmodel.token_exchange import token_exchange_s
from passes.runs.candidate import estimate
from passes.runs.estimate import Estimate
from passes.runs.expert_parallel import with_fewer_experts
from passes.runs.setup import Setup

S, H, F, E, K, LAYERS = 1024, 512, 1024, 8, 2, 8
EXPERTS = LAYERS * E * 3 * H * F
"""Elements of all experts' matrices: gate, up and down."""


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        hidden_size=H, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=4096, num_local_experts=E, num_experts_per_tok=K, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return MixtralForCausalLM(config).to(torch.bfloat16)


@lru_cache
def profiler() -> Profiler:
    return Profiler(Captures(mixtral(), tokens(S)), hardware("h100"), OPTIMIZERS["adamw-master"])


def priced(**changed: object) -> Estimate:
    setup = Setup(dp_shard=16, state="zero1", gradient_bytes=4, adds_in_products=True, accumulate=4)
    return estimate(replace(setup, **changed), profiler())  # type: ignore[arg-type]


def test_what_a_layer_has_of_experts() -> None:
    found = profiler().profile(Setup(dp_shard=16, state="zero1"), replica=True)
    assert profiler().experts == E
    assert found.layer("experts") == pytest.approx(EXPERTS / LAYERS)
    assert found.layer("routed") == pytest.approx(S * K * H * 2)
    assert found.layer("routed tokens") == pytest.approx(S * H * 2)


@pytest.mark.parametrize("weight", [False, True])
def test_fewer_experts_have_as_many_rows(weight: bool) -> None:
    """Of 8 experts with 256 rows, half: the product of 4 experts with 512 rows."""
    m, n, k = (64, 96, 256) if weight else (256, 96, 64)
    whole = matmul(m, n, k, batch=8)
    half = matmul(m, n, 512, batch=4) if weight else matmul(512, n, k, batch=4)
    made = with_fewer_experts(whole, 2, 2, weight=weight)
    assert made == half
    assert made.flops == whole.flops


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_what_a_rank_keeps_of_experts(parts: int) -> None:
    """2 bytes of a parameter and 4 of its gradient less; of the states (12 bytes over 16 ranks) the same share."""
    alone, together = priced(), priced(ep=parts)
    spared = EXPERTS * (1 - 1 / parts)
    assert alone.bytes["parameters"] - together.bytes["parameters"] == pytest.approx(2 * spared)
    assert alone.bytes["gradients"] - together.bytes["gradients"] == pytest.approx(4 * spared)
    assert together.bytes["optimizer"] == alone.bytes["optimizer"]


def test_a_rank_updates_the_experts_that_it_has() -> None:
    """Where nothing is sharded; of gradients that are, it adds up a 16th of all, whoever has the experts."""
    rest = profiler().profile(Setup(dp_shard=16, state="zero1"), replica=True).whole["elements"] - EXPERTS
    alone, together = (priced(state="zero0", ep=ep).seconds["optimizer"] for ep in (1, 4))
    assert together / alone == pytest.approx((rest + EXPERTS / 4) / (rest + EXPERTS))

    def added_s(ep: int) -> float:
        beside = priced(state="zero2", ep=ep, adds_in_products=False)
        return beside.seconds["compute"] - priced(state="zero2", ep=ep).seconds["compute"]

    assert added_s(4) == pytest.approx(added_s(1))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_layers_own_gradients_are_of_the_experts_that_a_rank_has(parts: int) -> None:
    """2 bytes of each parameter of a layer, until they are added to those before; nothing where products add them."""
    layer = EXPERTS / LAYERS + 4 * H * H + E * H + 2 * H
    staged = {"pp": 2, "dp_shard": 8}  # of the first stage, which has no logits
    in_products, beside = priced(**staged), priced(**staged, adds_in_products=False)
    assert beside.bytes["working"] - in_products.bytes["working"] == pytest.approx(2 * layer)
    spared = EXPERTS / LAYERS * (1 - 1 / parts)
    together = priced(**staged, adds_in_products=False, ep=parts)
    assert beside.bytes["working"] - together.bytes["working"] == pytest.approx(2 * spared)
    assert priced(**staged, ep=parts).bytes["working"] == in_products.bytes["working"]


def test_each_micro_batch_sends_tokens_four_times() -> None:
    """To experts and back, forward and backward; in each of 8 layers and 4 micro-batches."""
    mesh = topology(hardware("h100"), {"dp": 2, "ep": 8})
    once_s = token_exchange_s(S * H * 2, K, (1,), mesh)
    assert priced(ep=8).seconds["experts"] == pytest.approx(4 * LAYERS * 4 * once_s)
    again = priced(ep=8, recompute="full", whole_blocks=True)
    assert again.seconds["experts"] == pytest.approx(6 * LAYERS * 4 * once_s)


def test_tokens_may_be_sent_beside_another_micro_batch() -> None:
    """Of 4 micro-batches 3 quarters, as the first forward and the last backward have nothing beside them; that takes
    26% of its time from compute, and is no more than there is compute."""
    waited, beside = priced(ep=8), priced(ep=8, experts_beside=True)
    sent_s, compute_s = waited.seconds["experts"], waited.seconds["compute"]
    hidden_s = 3 / 4 * min(sent_s, compute_s)
    assert sent_s - beside.seconds["experts"] == pytest.approx(hidden_s, rel=0.05)
    assert beside.hidden_s - waited.hidden_s == pytest.approx(hidden_s, rel=0.05)
    slowed_s = beside.seconds["slowed"] - waited.seconds["slowed"]
    assert slowed_s == pytest.approx(0.26 * hidden_s, rel=0.05)
    assert waited.step_s - beside.step_s == pytest.approx(hidden_s - slowed_s, rel=0.05)
    assert sum(beside.seconds.values()) == pytest.approx(beside.step_s)


def test_of_interleaved_stages_the_forwards_before_the_first_backward_wait_for_their_tokens() -> None:
    """With 2 stages of 4 chunks 7 of 16, of 4 micro-batches; so do those of the bubble. A layer more is kept."""
    staged = {"pp": 2, "virtual": 4, "dp_shard": 8, "ep": 8}
    waited, beside = priced(**staged), priced(**staged, experts_beside=True)
    sent_s = waited.seconds["experts"]
    assert beside.seconds["experts"] == pytest.approx(7 / 16 * sent_s)
    assert beside.seconds["bubble"] == pytest.approx(waited.seconds["bubble"])
    assert waited.step_s - beside.step_s == pytest.approx((1 - 0.26) * 9 / 16 * sent_s)
    chunks = 2 * (2 - 1) + (4 - 1) * 2 + 1  # in flight on the first stage, of one layer each
    assert waited.bytes["activations"] / chunks == pytest.approx(beside.bytes["activations"] / (chunks + 1))


def test_products_of_fewer_experts_are_faster() -> None:
    """By the products themselves: forward of gate and up (one), of down, and for each two backward, on one rank."""
    device = hardware("h100").device

    def products_s(experts: int, rows: int) -> float:
        forward = (rows, 2 * F, H), (rows, H, F)
        by_rows = (rows, H, 2 * F), (rows, F, H)
        by_matrix = (H, 2 * F, rows), (F, H, rows)
        return sum(op_s(matmul(*shape, batch=experts), device) for shape in (*forward, *by_rows, *by_matrix))

    spared_s = products_s(E, S * K // E) - products_s(E // 4, 4 * S * K // E)
    alone, together = priced(), priced(ep=4)
    assert spared_s > 0
    assert alone.seconds["compute"] - together.seconds["compute"] == pytest.approx(4 * LAYERS * spared_s, rel=0.02)


def test_fewer_ranks_share_an_expert() -> None:
    """Gradients go in 4 bytes and parameters come in 2: of all else over 16 ranks, of an eighth of the experts over the
    2 that have the same."""
    mesh = topology(hardware("h100"), {"dp": 2, "ep": 8})
    rest = profiler().profile(Setup(dp_shard=16, state="zero1"), replica=True).whole["elements"] - EXPERTS
    sent_s = 0.0
    for size, axes in ((rest, (0, 1)), (EXPERTS / 8, (0,))):
        sent_s += collective_s("reduce_scatter", 4 * size, axes, mesh) + collective_s(
            "all_gather", 2 * size, axes, mesh
        )
    together = priced(ep=8)
    assert together.seconds["exposed state"] + together.hidden_s == pytest.approx(sent_s)


def test_sharded_experts_are_gathered_by_those_that_have_the_same() -> None:
    """Under ZeRO-3: of 8 experts' parts on 16 ranks two have the same, and gather an 8th of all from each other; the
    rest goes through all 16. Gathered for each half of each of 4 micro-batches, reduced in each. At once are there two
    layers, of experts what a rank has, and a head or an embedding."""
    mesh = topology(hardware("h100"), {"alike": 2, "ep": 8})
    found = profiler().profile(Setup(dp_shard=16, state="zero1"), replica=True)
    elements = found.whole["elements"]
    sent_s = 0.0
    for size, axes in ((elements - EXPERTS, (0, 1)), (EXPERTS / 8, (0,))):
        sent_s += 2 * collective_s("all_gather", 2 * size, axes, mesh)
        sent_s += collective_s("reduce_scatter", 4 * size, axes, mesh)
    together = priced(ep=8, state="zero3")
    assert together.seconds["exposed state"] + together.hidden_s == pytest.approx(4 * sent_s)
    layer = (elements - found.outside["elements"] - EXPERTS * 7 / 8) / LAYERS
    at_once = found.outside["elements"] + 2 * layer
    assert together.bytes["parameters"] == pytest.approx(2 * (elements / 16 + at_once))
    assert together.bytes["gradients"] == pytest.approx(4 * elements / 16)
    assert together.step_s > priced(ep=8, state="zero1").step_s


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (Setup(dp_shard=8, ep=16), "ep=16: not a part of the 8 ranks"),
        (Setup(dp_shard=8, ep=16, state="zero1"), "ep=16: not a part of the 8 ranks"),
        (Setup(dp_shard=8, tp=4, ep=2, state="zero1"), "ep=2: not a part of the 32 ranks .* that holds all 4"),
        (Setup(dp_shard=9, ep=3, state="zero1"), "ep=3: priced are powers of two that divide"),
        (Setup(dp_shard=16, ep=16, state="zero1"), "ep=16: priced are powers of two that divide"),
    ],
)
def test_what_is_not_priced_is_refused(setup: Setup, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        estimate(setup, profiler())


def test_the_search_prices_it_where_there_are_experts() -> None:
    options = autopar.Options(recompute="none")
    found = autopar.search(mixtral(), 16, "h100", 64, sequence=S, options=options, top=2)
    sizes = {c.setup.ep for c in (*found.candidates, *found.too_large)}
    assert sizes > {1}
    assert all(E % c.setup.ep == 0 and 16 % c.setup.ep == 0 for c in found.candidates)
    assert all(("expert parallelism" in c.priced_only) == (c.setup.ep > 1) for c in found.candidates)
    assert found.best.setup.ep == 1
    fastest = min((c for c in found.candidates if c.setup.ep > 1 and not c.setup.fp8), key=lambda c: c.step_time_s)
    said = next(line for line in found.verdict.text if line.startswith("Expert parallelism"))
    assert f"ep {fastest.setup.ep}," in said
    assert "  ep  " in found.text()
    assert any(c.setup.experts_beside for c in found.candidates)
    assert ", beside" in found.text()
    assert "--overlap-moe-expert-parallel-comm" in found.text()


def test_the_search_sends_tokens_beside_a_micro_batch_where_megatron_does() -> None:
    """Not where there is one, stages are not interleaved, or layers are run again."""
    sent = Setup(dp_shard=8, ep=8, accumulate=2, state="zero1")
    staged = replace(sent, pp=2)
    assert sent.may_send_beside
    assert replace(staged, virtual=2).may_send_beside
    assert not any(
        each.may_send_beside
        for each in (replace(sent, ep=1), replace(sent, accumulate=1), replace(sent, recompute="full"), staged)
    )


def test_no_search_prices_it_without() -> None:
    model = sized_llama(256, 512, 4, 8, 8).to(torch.bfloat16)
    found = autopar.search(model, 8, "h100", 16, sequence=256, options=autopar.Options(recompute="full"), top=1)
    assert {c.setup.ep for c in found.candidates} == {1}
    assert not any("Expert" in line for line in found.verdict.text)


def test_whole_experts_have_nothing_among_tensor_parallel_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two such ranks that cut experts gather rows (S K of H), send products of gate and up (S K of 2 F, of which each
    has half) and gather what these make (S K of F), once in forward, 2 bytes each, and as much in backward; ranks that
    have experts whole, of rows that come from each one's part of the sequence, send none of it."""
    setup = Setup(dp_shard=8, tp=2, ep=2, state="zero1", accumulate=4)
    found = profiler().profile(setup, replica=True)
    mesh = topology(hardware("h100"), {"dp": 8, "tp": 2})
    rows = 2 * S * K
    forward_s = sum(
        collective_s(kind, size, (1,), mesh)
        for kind, size in (("all_gather", rows * H), ("all_to_all", rows * F), ("all_gather", rows * F))
    )
    exposed_s, hidden_s = (
        {phase: found.layer(f"among experts.{kind}.{phase}") for phase in ("forward", "backward")}
        for kind in ("exposed", "hidden")
    )
    for phase in ("forward", "backward"):  # and what packing an all-to-all takes
        assert forward_s < exposed_s[phase] + hidden_s[phase] < 1.4 * forward_s
    assert found.layer("among experts.gathered") == pytest.approx(rows * H + rows * F)

    whole = estimate(setup, profiler())
    monkeypatch.setattr("passes.runs.candidate_replicated.has_whole_experts", lambda setup: False)
    cut = estimate(setup, profiler())
    slowed_s = taken_shares((1,), mesh)[0] * sum(hidden_s.values())
    spared_s = setup.accumulate * LAYERS * (sum(exposed_s.values()) + slowed_s)
    assert cut.step_s - whole.step_s == pytest.approx(spared_s, rel=1e-3)
