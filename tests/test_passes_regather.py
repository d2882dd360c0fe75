"""Activations gathered again for backward: the numbers, what is sent and kept, and when a plan does it."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import pytest
import torch
from parity import captured, errors
from torch import nn

import autopar
from costmodel import symbolic as sym
from costmodel.hardware import Topology, topology
from costmodel.presets import hardware
from passes.errors import NoFeasiblePlanError
from passes.lower.lower import lower
from passes.plan.plan import Plan
from passes.planner.pipeline import Manner, Request, compile_plan, local_program
from passes.program.program import Program
from passes.rewrite.ledger import ledger
from passes.space.recompute import Mode

LAYERS, BATCH, LENGTH, HIDDEN = 6, 4, 1024, 1024


def _llama(layers: int, hidden: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=512, use_cache=False,
        )
    )  # fmt: skip


@lru_cache
def _program() -> Program:
    """A step in bf16 of four samples."""
    with torch.device("meta"):
        model = _llama(LAYERS, HIDDEN).to(torch.bfloat16)
        ids = torch.empty(BATCH, LENGTH, dtype=torch.long)
    return captured(model, {"input_ids": ids, "labels": ids})


def _mesh(**axes: int) -> Topology:
    return topology(hardware("h100"), axes)


def _plan(**asked: object) -> Plan:
    request = Request(**{"strategy": "megatron"} | asked)  # type: ignore[arg-type]
    return compile_plan(_program(), _mesh(tp=4), [], request, manner=Manner(diagnose=False))


def _sent(plan: Plan) -> dict[tuple[str, str], int]:
    """Per layer, collectives of the residual stream and its gradient: how many of each kind and phase."""
    found = Counter[tuple[str, str]]()
    for each in plan.collectives:
        if each.role == "activation" and each.bytes == 2 * BATCH * LENGTH * HIDDEN:
            found[each.kind, each.phase] += each.count
    return {what: count // LAYERS for what, count in found.items()}  # fewer than `LAYERS` are around the layers


@pytest.mark.parametrize(("mode", "share"), [("none", 3 / 4), ("pointwise", 1)])
def test_what_is_sent_and_kept_is_what_sequence_parallelism_sends_and_keeps(mode: Mode, share: float) -> None:
    """Per layer Megatron's two gathers and two sums in each phase, and the two gathers once more. A quarter of what was
    gathered stays, or nothing where backward makes the norm's result again."""
    kept, again = (_plan(recompute=mode, regather=regather) for regather in (False, True))
    both = ("all_gather", "reduce_scatter")
    assert _sent(kept) == {(kind, phase): 2 for kind in both for phase in ("forward", "backward")}
    assert _sent(again) == _sent(kept) | {("all_gather", "backward"): 4}
    sizes = {"b": BATCH, "s": LENGTH, "h": HIDDEN, "t": 4}
    form = sym.number(sym.tp_sp_elements_per_layer(gathered_again=2), sizes)
    elements = BATCH * LENGTH * HIDDEN
    assert sum(n * float(sym.ring_elements(kind, elements, 4)) for (kind, _), n in _sent(again).items()) == form
    spared = kept.peak_memory_bytes - again.peak_memory_bytes
    assert spared == pytest.approx(LAYERS * 2 * 2 * elements * share, rel=0.1)
    assert kept.step_time_s < again.step_time_s < 1.1 * kept.step_time_s


def test_the_plans_file_keeps_it() -> None:
    plan = _plan(regather=True)
    assert Plan.from_json(plan.to_json()).regather
    assert not _plan(regather=False).regather
    assert "regather_activations=True" in str(plan)


@pytest.mark.parametrize(
    ("strategy", "asked", "changes"),
    [
        ("ddp", {"reshard": True}, False),
        ("ddp", {"reshard": False}, False),
        ("ddp", {"regather": True}, False),
        ("fsdp", {"reshard": True}, True),
        ("fsdp", {"reshard": False}, True),
        ("fsdp", {"regather": True}, False),
        ("fsdp", {}, True),
        ("megatron", {"regather": True}, True),
    ],
)
def test_what_was_asked_of_gathers_that_a_plan_has_not_is_told(
    strategy: str, asked: dict[str, bool], changes: bool
) -> None:
    """DDP gathers nothing, FSDP parameters alone, tensor parallelism activations."""
    mesh = _mesh(tp=4) if strategy == "megatron" else _mesh(dp=4)
    batch_axes = [] if strategy == "megatron" else [0]
    plan = compile_plan(_program(), mesh, batch_axes, Request(strategy=strategy, **asked))  # type: ignore[arg-type]
    assert any("changes nothing" in note for note in plan.notes) == (not changes)


@pytest.mark.parametrize("mode", ["none", "pointwise", "selective", "widening", "full"])
def test_the_numbers_stay(mode: Mode) -> None:
    torch.manual_seed(0)
    model = _llama(2, 32)
    ids = torch.randint(0, 512, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    program, mesh = captured(model, batch), _mesh(dp=2, tp=2)
    phases = []
    for regather in (False, True):
        plan = compile_plan(program, mesh, [0], Request(strategy="megatron", recompute=mode, regather=regather))
        local = local_program(program, plan, mesh, {})
        found = errors(model, local, batch)
        assert found.output < 1e-5
        assert found.gradient < 1e-5
        phases.append([c.phase for c in ledger(local) if c.kind == "all_gather" and c.group == "tp"])
    assert phases[1].count("backward") >= phases[0].count("backward") + 2 * 2
    assert phases[1].count("forward") == phases[0].count("forward")


def test_the_compiled_halves_hand_on_the_parts_alone() -> None:
    torch.manual_seed(0)
    model = _llama(2, 32)
    ids = torch.randint(0, 512, (4, 8))
    program, mesh = captured(model, {"input_ids": ids, "labels": ids}), _mesh(tp=2)
    whole = {}
    for regather in (False, True):
        plan = compile_plan(program, mesh, [], Request(strategy="megatron", regather=regather))
        saved = lower(local_program(program, plan, mesh, {}), compile=False).halves.saved
        whole[regather] = [n for n in saved if n.meta["val"].numel() == 4 * 8 * 32 and "wait" in n.name]
    assert len(whole[False]) >= 2 * 2
    assert not whole[True]


def test_a_plan_does_it_where_memory_asks_for_it() -> None:
    """Within each budget, neither a plan with it nor one without is faster: to compute more again is, until that does
    not do."""
    kept, again = _plan(regather=False), _plan(regather=True)
    assert not _plan().regather
    for budget in ((kept.peak_memory_bytes + again.peak_memory_bytes) // 2, int(0.71 * kept.peak_memory_bytes)):
        tight = _plan(budget_bytes=budget)
        assert tight.peak_memory_bytes <= budget
        other = _plan(budget_bytes=budget, regather=True)
        assert other.regather
        assert tight.step_time_s <= other.step_time_s * (1 + 1e-3)
        assert tight.regather == (tight.step_time_s >= other.step_time_s * (1 - 1e-3))
    assert tight.regather
    with pytest.raises(NoFeasiblePlanError):
        _plan(budget_bytes=budget, regather=False)


def test_what_is_computed_again_behind_what_is_sent_costs_nothing() -> None:
    """A step that waits for what its tensor axis sends computes layers again meanwhile: where memory asks for less, the
    plan is the fastest of those that are told what to compute again, though they cost more in sum."""
    kept = _plan()
    told = [_plan(recompute=mode) for mode in ("pointwise", "selective", "widening", "full")]
    for budget in (plan.peak_memory_bytes for plan in told[2:]):
        assert budget < kept.peak_memory_bytes
        fitting = [plan.step_time_s for plan in told if plan.peak_memory_bytes <= budget]
        assert _plan(budget_bytes=budget).step_time_s <= min(fitting) * (1 + 1e-3)


def test_state_alone_gathers_no_activations() -> None:
    """The option says nothing where no axis splits tensors."""
    plans = [compile_plan(_program(), _mesh(dp=4), [0], Request(strategy="fsdp", regather=r)) for r in (False, True)]
    assert plans[0].step_time_s == plans[1].step_time_s
    assert plans[0].peak_memory_bytes == plans[1].peak_memory_bytes


def test_what_is_no_answer_is_named() -> None:
    with pytest.raises(ValueError, match=r"Options\(regather_activations='yes'\): True or False, or None"):
        autopar.plan(
            _llama(1, 32), {"tp": 2}, {"input_ids": torch.zeros(2, 8, dtype=torch.long)}, hardware="h100",
            options=autopar.Options(regather_activations="yes"),  # type: ignore[arg-type]
        )  # fmt: skip
