"""Formulas against arithmetic done by hand, published values, and the prices they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from costmodel import symbolic as sym
from costmodel.collectives import collective_s
from costmodel.hardware import topology
from costmodel.presets import hardware

GPT3 = {"b": 1, "s": 2048, "h": 12288, "a": 96, "L": 96, "V": 51200, "t": 8, "p": 8, "v": 3, "m": 16, "d": 4}
GPT22B = {"b": 4, "s": 2048, "h": 6144, "a": 64, "L": 48, "V": 51200, "t": 8, "p": 1, "v": 1}
FORMS = {form.name: form for form in sym.closed_forms()}


def value(name: str, **more: float) -> float:
    return sym.number(FORMS[name].expression, {**GPT3, **more})


def test_tensor_parallel_volume() -> None:
    """1 x 2048 x 12288 = 25,165,824 elements, 8 times, 7/8 of it: 176,160,768."""
    assert value("tp_per_layer") == 8 * 25_165_824 * 7 / 8 == 176_160_768


def test_sequence_parallelism_moves_as_much() -> None:
    assert sym.sympy.simplify(FORMS["tp_sp_per_layer"].expression - FORMS["tp_per_layer"].expression) == 0
    assert value("tp_sp_per_layer_gathered_again") - value("tp_sp_per_layer") == 25_165_824 * 7 / 8


def test_data_parallel_volumes() -> None:
    assert FORMS["ddp"].expression == 2 * sym.Psi
    assert FORMS["fsdp"].expression.subs(sym.m, 1) == 3 * sym.Psi
    assert sym.number(sym.fsdp_elements(), {"Psi": 10, "m": 4}) == 90
    assert sym.fsdp_elements(per_micro_batch=False) == 2 * sym.Psi


def test_pipeline() -> None:
    assert value("pipeline_boundary") == 25_165_824
    assert value("pipeline_boundary_scatter_gather") == 25_165_824 / 8
    assert value("pipeline_boundary_interleaved") == 25_165_824 * 3
    assert value("pipeline_bubble") == 7 / 16
    assert value("pipeline_bubble_interleaved") == 7 / 48


def test_mixture_of_experts() -> None:
    """2 x 2048 x 2 x 4096 elements, dispatched and combined; 7/8 leave a rank of 8."""
    case = {"b": 2, "s": 2048, "h": 4096, "k": 2, "e": 8}
    assert sym.number(FORMS["moe_all_to_all"].expression, case) == 2 * 2 * 2048 * 2 * 4096
    assert sym.number(FORMS["moe_sent"].expression, case) == 2 * 2 * 2048 * 2 * 4096 * 7 / 8


def test_state_bytes() -> None:
    assert value("state_per_parameter") == 18
    assert value("state_per_parameter_distributed") == 6 + 12 / 4


def test_activations_of_gpt3_and_of_22b() -> None:
    """GPT-3, b = 1: s·b·h = 25,165,824 and 5·a·s/h = 80, so 114 bytes each on one device.

    The totals are those of arXiv 2205.05198 Fig 1: GPT 22B, 48 layers over t = 8: 59.25 GiB with TP alone, 9.5625 GiB
    with SP and selective recompute.
    """
    assert value("activations") == 25_165_824 * 114
    assert value("activations_tp") == 25_165_824 * (10 + 3 + 10)
    assert value("activations_tp_sp") == 25_165_824 * 114 / 8
    assert value("activations_selective") == 25_165_824 * 34 / 8
    assert value("activations_full") == 25_165_824 * 2
    assert 48 * sym.number(FORMS["activations_tp"].expression, GPT22B) == 59.25 * 2**30
    assert 48 * sym.number(FORMS["activations_selective"].expression, GPT22B) == 9.5625 * 2**30


def test_first_pipeline_stage() -> None:
    """96 layers' worth; interleaved by 3 over 8 stages, 1 + 7/24 times as much (Fig 1: 12.3515625 GiB selective)."""
    assert value("first_stage") == 96 * 25_165_824 * 114 / 8
    assert value("first_stage_interleaved") == pytest.approx(96 * 25_165_824 * 114 / 8 * (1 + 7 / 24))
    selective = sym.first_stage_activation_bytes(sym.activation_bytes_per_layer("selective"), interleaved=True)
    assert sym.number(selective, GPT3) == pytest.approx(12.3515625 * 2**30)


def test_logits() -> None:
    """Llama 3's 128,256 words, 8192 tokens, one rank: 4.2 GB."""
    assert sym.number(FORMS["logits"].expression, {"s": 8192, "b": 1, "V": 128_256, "t": 1}) == 4_202_692_608


def test_flops_of_gpt3() -> None:
    """Term by term: 24·h² per token and layer in products, 4·s·h in attention, 2·h·V in logits; three times forward."""
    tokens, layers, hidden, words, seq = 1536 * 2048, 96, 12288, 51200, 2048
    forward = tokens * (layers * (24 * hidden**2 + 4 * seq * hidden) + 2 * hidden * words)
    assert value("model_flops", B=1536) == pytest.approx(3 * forward)
    again = tokens * layers * (24 * hidden**2 + 4 * seq * hidden)
    assert value("hardware_flops", B=1536) == pytest.approx(3 * forward + again)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e9])
def test_ring_formulas_are_the_prices(kind: str, ranks: int, size: float) -> None:
    """Without in-switch reduction the numeric price is the formula."""
    machine = hardware("h100")
    machine = replace(machine, intra_node=replace(machine.intra_node, multicast_bytes_per_s=0))
    formula = sym.ring_all_reduce_s() if kind == "all_reduce" else sym.ring_s()
    link, rate = machine.intra_node, machine.device.memory_bytes_per_s
    figures = {"alpha": link.latency_s, "pi": link.pipeline_s, "gamma": link.base_s, "beta": link.bytes_per_s}
    seconds = sym.number(formula, {**figures, "mu": rate, "S": size, "n": ranks})
    assert seconds == pytest.approx(collective_s(kind, size, (0,), topology(machine, {"x": ranks})))


def test_a_large_price_tends_to_its_bandwidth_term() -> None:
    seconds = sym.number(sym.ring_elements("all_gather", sym.S, sym.n) / sym.beta, {"S": 1e12, "n": 8, "beta": 372e9})
    assert collective_s("all_gather", 1e12, (0,), topology(hardware("h100"), {"x": 8})) == pytest.approx(
        seconds, rel=0.05
    )


def test_every_form_has_a_source_and_its_symbols_are_known() -> None:
    known = {symbol for name in dir(sym) for symbol in [getattr(sym, name)] if isinstance(symbol, sym.sympy.Symbol)}
    assert len(FORMS) == 24
    for form in FORMS.values():
        assert form.source
        assert form.expression.free_symbols <= known


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no value for h, t"):
        sym.number(FORMS["tp_per_layer"].expression, {"b": 1, "s": 1})
    with pytest.raises(ValueError, match="unknown mode 'some'"):
        sym.activation_bytes_per_layer("some")
    with pytest.raises(ValueError, match="unknown collective"):
        sym.ring_elements("gossip", sym.S, sym.n)
