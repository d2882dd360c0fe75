"""What expert parallelism is priced from, against a Mixtral's dimensions by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from small_models import sized_llama, tokens
from transformers import MixtralConfig, MixtralForCausalLM

import autopar
from autopar.runs.pricing import launches_notes
from autopar.runs.profiling import Captures, Profiler
from costmodel.collectives import collective_s, taken_shares
from costmodel.compute import matmul, op_s, pointwise
from costmodel.hardware import topology
from costmodel.memory import OPTIMIZERS
from costmodel.presets import hardware
from costmodel.token_exchange import token_exchange_s
from passes.runs.candidate import estimate
from passes.runs.dispatchers import copied_s
from passes.runs.estimate import Estimate
from passes.runs.expert_parallel import with_fewer_experts
from passes.runs.setup import Setup

S, H, F, E, K, LAYERS = 1024, 512, 1024, 8, 2, 8
EXPERTS = LAYERS * E * 3 * H * F
"""Elements of all experts' matrices: gate, up and down."""
LAUNCH_S = hardware("h100").device.kernel_launch_s


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


def test_an_all_to_all_sends_a_row_for_each_expert_and_sorts_what_arrives() -> None:
    """Two experts on a rank (ep 4): rows go out in their experts' order, arrive by sender, and are read and written
    once more each way; of one (ep 8) they are in order."""
    rate = 3.35e12 * 0.87
    for ep, sorted_ in ((4, 1), (8, 0)):
        mesh = topology(hardware("h100"), {"dp": 16 // ep, "ep": ep})
        once_s = token_exchange_s(S * H * 2, K, (1,), mesh, each=True)
        each, once = priced(ep=ep, dispatcher="alltoall"), priced(ep=ep)
        assert each.seconds["experts"] == pytest.approx(4 * LAYERS * 4 * once_s)
        arrived = ep * (1 - (1 - 1 / ep) ** K)
        copied = 2 * K * sorted_ - (arrived - 1)
        taken_s = 4 * LAYERS * 4 * (copied * S * H * 2 / rate + sorted_ * LAUNCH_S)
        assert each.seconds["compute"] - once.seconds["compute"] == pytest.approx(taken_s, rel=0.02)


def test_rows_are_padded_for_fp8_by_copies_of_their_own() -> None:
    """Read and written each way, but by HybridEP, which pads as it goes."""
    hybrid, deep = (priced(ep=8, fp8=True, dispatcher=each) for each in ("hybridep", "deepep"))
    padded_s = 4 * LAYERS * 4 * (2 * K * S * H * 2 / (3.35e12 * 0.87) + LAUNCH_S)
    assert deep.seconds["compute"] - hybrid.seconds["compute"] == pytest.approx(padded_s, rel=0.02)
    assert deep.seconds["experts"] == hybrid.seconds["experts"]
    assert priced(ep=8, dispatcher="deepep").step_s == priced(ep=8).step_s


MEASURED = {
    ("mixtral", "alltoall", "bfloat16"): (4.327, 7.684), ("mixtral", "alltoall", "float8"): (3.788, 6.618),
    ("mixtral", "deepep", "bfloat16"): (4.636, 7.854), ("mixtral", "deepep", "float8"): (4.101, 6.827),
    ("mixtral", "hybridep", "bfloat16"): (4.343, 7.741), ("mixtral", "hybridep", "float8"): (3.701, 6.572),
    ("deepseek", "alltoall", "bfloat16"): (7.119, 10.483), ("deepseek", "alltoall", "float8"): (7.609, 10.126),
    ("deepseek", "deepep", "bfloat16"): (5.682, 9.055), ("deepseek", "deepep", "float8"): (6.035, 8.602),
    ("deepseek", "hybridep", "bfloat16"): (5.391, 8.795), ("deepseek", "hybridep", "float8"): (5.143, 7.687),
}  # fmt: skip
"""Milliseconds forward and backward of a layer's experts alone on 8 H100, 4096 tokens a rank: Megatron-LM's own test
(`moe_perf/baseline.json` @d98e8a64)."""


@lru_cache
def layer_ms(model: str, dispatcher: str, dtype: str) -> tuple[float, float]:
    """The same, of what prices are made of: products at the clocks of a short run, rows sent and copied, the
    activation, in fp8 casts."""
    hidden, ffn, experts, k, shared = {"mixtral": (4096, 14336, 8, 2, 0), "deepseek": (7168, 2048, 32, 8, 2048)}[model]
    given = hardware("h100")
    device = replace(given.device, sustained=1.0, speed_spread=0.0)
    mesh = topology(replace(given, device=device), {"ep": 8})
    fp8, rows = dtype == "float8", 4096 * k
    own = experts // 8

    def product_s(m: int, n: int, inner: int, batch: int = 1) -> float:
        return op_s(matmul(m, n, inner, batch=batch, dtype=dtype, item_bytes=1 if fp8 else 2), device)

    def moved_s(elements: float) -> float:
        return op_s(pointwise(2 * elements, 0), device)

    forward = backward = 0.0
    for width, m, batch in ((ffn, rows // own, own), *([(shared, 4096, 1)] if shared else [])):
        forward += product_s(m, 2 * width, hidden, batch) + product_s(m, hidden, width, batch)
        backward += product_s(m, hidden, 2 * width, batch) + product_s(m, width, hidden, batch)
        backward += product_s(hidden, 2 * width, m, batch) + product_s(width, hidden, m, batch)
        forward, backward = forward + moved_s(batch * m * 3 * width), backward + moved_s(batch * m * 5 * width)
    tokens = 4096 * hidden
    setup = Setup(dp_shard=8, ep=8, fp8=fp8, dispatcher=dispatcher)  # type: ignore[arg-type]
    each = dispatcher == "alltoall"
    sent_s = token_exchange_s(2 * tokens, k, (0,), mesh, each=each) + copied_s(setup, 2 * tokens, k, own, mesh)
    ways_s = 2 * (sent_s + moved_s(tokens + k * tokens))
    if fp8:  # 2 bytes read, two times 1 written
        forward += 2 * moved_s(rows * (hidden + ffn) + own * 3 * hidden * ffn)
        backward += 2 * moved_s(rows * (hidden + 2 * ffn))
    return 1e3 * (forward + ways_s), 1e3 * (backward + ways_s)


@pytest.mark.parametrize(("model", "dispatcher", "dtype"), MEASURED)
def test_a_layers_experts_take_what_megatrons_own_test_measures(model: str, dispatcher: str, dtype: str) -> None:
    for found, measured in zip(layer_ms(model, dispatcher, dtype), MEASURED[model, dispatcher, dtype], strict=True):
        assert found == pytest.approx(measured, rel=0.26)


def test_and_do_so_on_average() -> None:
    """11%, and no figure of these set a price. Of DeepSeek's 8 experts a token finds 4 ranks' alone, which is not told
    here."""
    errors = [sum(layer_ms(*key)) / sum(measured) - 1 for key, measured in MEASURED.items()]
    assert sum(map(abs, errors)) / len(errors) < 0.12


def test_tensor_parallel_ranks_that_cut_experts_gather_rows_and_add_up() -> None:
    """What the replica's do, which those with whole experts do not: waited for, and the rest's 26% of compute."""
    cut, whole = (priced(dp_shard=8, tp=2, ep=8, experts_cut=each) for each in (True, False))
    found = profiler().profile(Setup(dp_shard=8, tp=2, state="zero1"), replica=True)
    waited_s, hidden_s = (found.layer_total(f"among experts.{kind}.") for kind in ("exposed", "hidden"))
    assert waited_s > 0
    more_s = 4 * LAYERS * (waited_s + 0.26 * hidden_s)
    assert cut.step_s - whole.step_s == pytest.approx(more_s, rel=0.02)


def test_layers_shorter_than_their_launches_are_told() -> None:
    """8 of them in each of 4 micro-batches, as many as that on half the stages."""
    short = priced(ep=8)
    layer_ms_ = 1e3 * (short.seconds["compute"] + short.seconds["experts"] + short.seconds["slowed"]) / (4 * LAYERS)
    (note,) = launches_notes(short, LAYERS)
    assert f"a layer takes the GPU {layer_ms_:.1f} ms" in note
    assert "priced 33% too fast on average; larger" in note
    longer = replace(short, seconds={name: 40 * seconds for name, seconds in short.seconds.items()})
    assert launches_notes(longer, LAYERS) == launches_notes(priced(), LAYERS) == []


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
    """By the products themselves: forward of gate and up (one), of down, and for each two backward, on one rank; less
    what it reads of others' tokens, of which it finds 4 (1 - (3 / 4)^2) times as many as it has."""
    device = hardware("h100").device

    def products_s(experts: int, rows: int) -> float:
        forward = (rows, 2 * F, H), (rows, H, F)
        by_rows = (rows, H, 2 * F), (rows, F, H)
        by_matrix = (H, 2 * F, rows), (F, H, rows)
        return sum(op_s(matmul(*shape, batch=experts), device) for shape in (*forward, *by_rows, *by_matrix))

    spared_s = products_s(E, S * K // E) - products_s(E // 4, 4 * S * K // E)
    alone, together = priced(), priced(ep=4)
    assert spared_s > 0
    read_s = 4 * (4 * (1 - (3 / 4) ** K) - 1) * S * H * 2 / (device.memory_bytes_per_s * device.memory_efficiency)
    won_s = alone.seconds["compute"] - together.seconds["compute"]
    assert won_s == pytest.approx(4 * LAYERS * (spared_s - read_s), rel=0.03)


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
    found = autopar.search(mixtral(), 8, "h100", 16, sequence=S, options=options, top=2)
    sizes = {c.setup.ep for c in (*found.candidates, *found.too_large)}
    assert sizes > {1}
    assert all(E % c.setup.ep == 0 and 8 % c.setup.ep == 0 for c in found.candidates)
    assert all(("expert parallelism" in c.priced_only) == (c.setup.ep > 1) for c in found.candidates)
    assert found.best.setup.ep == 1
    fastest = min((c for c in found.candidates if c.setup.ep > 1 and not c.setup.fp8), key=lambda c: c.step_time_s)
    said = next(line for line in found.verdict.text if line.startswith("Expert parallelism"))
    assert f"ep {fastest.setup.ep}," in said
    assert "  ep  " in found.text()
    assert any(c.setup.experts_beside for c in found.candidates)
    sharded = [c for c in found.candidates if c.setup.ep > 1 and c.setup.state == "zero3"]
    assert sharded
    alone = autopar.price(mixtral(), sharded[0].setup, "h100", sequence=S, options=options)
    assert alone.step_time_s == pytest.approx(sharded[0].step_time_s)
    assert not any(c.setup.offload and c.setup.ep > 1 for c in found.candidates)  # of plans alone
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
    found = autopar.search(model, 4, "h100", 4, sequence=256, options=autopar.Options(recompute="full"), top=1)
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
