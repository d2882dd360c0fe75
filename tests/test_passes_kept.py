"""Parameters that stay gathered from forward to backward: the numbers, what is gathered, and when a plan does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import captured, errors
from small_models import sized_llama
from stacks import Stack
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
)

from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.errors import NoFeasiblePlanError
from passes.lower.lower import lower
from passes.plan.plan import Plan
from passes.planner import fitting
from passes.planner.pipeline import Manner, Request, compile_plan, local_program
from passes.play.schedule import Schedule, play
from passes.rewrite.ledger import ledger
from passes.space.space import Space

IDS = {"ids": torch.randint(0, 16, (16, 6), generator=torch.Generator().manual_seed(0))}
ONE_NODE = topology(hardware("a100-80gb"), {"dp": 8})


def _stack() -> Stack:
    torch.manual_seed(0)
    return Stack(4)


def test_kept_parameters_are_gathered_once_and_the_numbers_stay() -> None:
    where = topology(hardware("h100"), {"dp": 4})
    model = _stack()
    program = captured(model, IDS)
    bytes_of = {}
    for reshard in (True, False):
        plan = compile_plan(program, where, [0], Request(strategy="fsdp", reshard=reshard))
        assert plan.reshard is reshard
        local = local_program(program, plan, where, {})
        found = errors(model, local, IDS)
        assert found.output < 1e-6
        assert found.gradient < 1e-5
        for phase in ("forward", "backward"):
            bytes_of[reshard, phase] = sum(
                c.full_bytes for c in ledger(local) if c.kind == "all_gather" and c.phase == phase
            )
        assert Plan.from_json(plan.to_json()).reshard is reshard
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert bytes_of[False, "forward"] == bytes_of[True, "forward"] == parameters
    assert bytes_of[False, "backward"] == 0 < bytes_of[True, "backward"]


def test_the_compiled_halves_hand_gathered_parameters_on() -> None:
    where = topology(hardware("h100"), {"dp": 4})
    program = captured(_stack(), IDS)
    plan = compile_plan(program, where, [0], Request(strategy="fsdp", reshard=False))
    halves = lower(local_program(program, plan, where, {}), compile=False).halves
    kept = [node for node in halves.saved if "wait" in node.name]
    assert sum(node.meta["val"].numel() for node in kept) >= sum(
        p.numel() for name, p in _stack().named_parameters() if name.endswith("down.weight")
    )
    assert halves.backward is not None
    gathers = [n for n in halves.backward.graph.nodes if "all_gather" in str(n.target)]
    assert not gathers


class Wide(nn.Module):
    """Layers of many parameters for few tokens: whole optimizer states on every rank would take long to update."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = x + layer(x).relu()
        return {"loss": x.square().mean()}


def test_auto_keeps_them_where_that_is_faster_and_fits() -> None:
    with torch.device("meta"):
        program = captured(Wide(), {"x": torch.empty(64, 8, 2048)})

    def _plan(request: Request) -> Plan:
        return compile_plan(program, ONE_NODE, [0], request)

    played = {r: _plan(Request(strategy="fsdp", reshard=r)) for r in (True, False)}
    assert played[False].step_time_s < 0.95 * played[True].step_time_s
    assert played[False].peak_memory_bytes > played[True].peak_memory_bytes
    free = _plan(Request())
    assert not free.reshard
    assert free.step_time_s <= played[False].step_time_s
    assert _plan(Request(reshard=True)).reshard
    tight = _plan(Request(budget_bytes=played[True].peak_memory_bytes))
    assert tight.peak_memory_bytes <= played[True].peak_memory_bytes
    assert tight.step_time_s <= played[True].step_time_s


def test_auto_keeps_them_where_no_layout_for_freed_ones_gains_by_it() -> None:
    """Experts are split over the tensor axis where each is gathered twice, and gathered whole where they are once."""
    config = MixtralConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
        num_local_experts=8, vocab_size=32000, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
        ids = torch.empty(4, 1024, dtype=torch.long)
    program = captured(model, {"input_ids": ids, "labels": ids})
    where = topology(hardware("h100"), {"dp": 2, "tp": 4})
    free, kept = (compile_plan(program, where, [0], Request(recompute="none", reshard=r)) for r in (None, False))
    assert not free.reshard
    assert free.step_time_s <= kept.step_time_s * (1 + 1e-3)


def test_auto_keeps_them_where_gathers_are_hidden_but_take_cores_from_compute() -> None:
    """No gather of the freed ones is waited for in backward, and each slows down what runs beside it."""
    cpu = hardware("cpu")
    busy = replace(cpu, intra_node=replace(cpu.intra_node, sms=cpu.device.sm_count / 2))
    with torch.device("meta"):
        program = captured(Wide(), {"x": torch.empty(64, 8, 2048)})
    seconds = {
        (machine.intra_node.sms, r): compile_plan(
            program, topology(machine, {"dp": 4}), [0], Request(strategy=strategy, reshard=r)
        ).step_time_s
        for machine in (cpu, busy)
        for strategy, r in (("fsdp", True), ("fsdp", False), ("auto", None))
    }
    assert seconds[0, True] == seconds[0, False]
    taken = busy.intra_node.sms
    assert seconds[taken, None] <= seconds[taken, False] < 0.95 * seconds[taken, True]


def test_what_fits_no_better_with_products_at_once_is_not_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP's backward sends gathers and gradients alone, and no product waits for those."""
    played: list[tuple[str, str, tuple[int, ...]]] = []

    def counted(space: Space, assignment: Sequence[int], **how: Any) -> Schedule:
        played.append((space.strategy, space.recomputed.mode, tuple(assignment)))
        return play(space, assignment, **how)

    monkeypatch.setattr(fitting, "play", counted)
    request = Request(strategy="fsdp", budget_bytes=1)
    with pytest.raises(NoFeasiblePlanError):
        compile_plan(
            captured(_stack(), IDS), topology(hardware("h100"), {"dp": 4}), [0], request, manner=Manner(diagnose=False)
        )
    of_fsdp = [each for each in played if each[0] == "fsdp"]
    assert of_fsdp
    assert len(of_fsdp) == len(set(of_fsdp))


def test_activations_gathered_again_make_room_for_kept_parameters() -> None:
    """Within a budget where both fit together, the plan is not behind what does both, as it is told to."""
    model = sized_llama(2048, 8192, 3, 16, 16, 4096).to(torch.bfloat16)
    ids = torch.empty(8, 2048, dtype=torch.long, device="meta")
    program = captured(model, {"input_ids": ids, "labels": ids})
    where = topology(hardware("h100"), {"dp": 4, "tp": 4})
    free = compile_plan(program, where, [0], Request())
    both = compile_plan(program, where, [0], Request(reshard=False, regather=True))
    budget = int(0.98 * free.peak_memory_bytes)
    assert both.peak_memory_bytes < budget < free.peak_memory_bytes
    within = compile_plan(program, where, [0], Request(budget_bytes=budget))
    assert within.peak_memory_bytes <= budget
    assert within.step_time_s <= both.step_time_s * (1 + 1e-3)


LLAMA = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8,
    vocab_size=32000, use_cache=False,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=2048, n_layer=4, n_head=16, vocab_size=50304, use_cache=False)


@pytest.mark.parametrize(("config", "mesh", "batch", "stay"), [(LLAMA, (4, 2), 4, True), (GPT2, (8, 8), 16, False)])
def test_auto_is_as_fast_as_with_parameters_that_are_asked_to_stay(
    config: PreTrainedConfig, mesh: tuple[int, int], batch: int, stay: bool
) -> None:
    """Gathered once, other layouts pay than where they are gathered twice: for LLaMA `auto` has them stay, for GPT-2
    those where they are freed are faster."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        ids = torch.empty(batch, 1024, dtype=torch.long)
    program = captured(model, {"input_ids": ids, "labels": ids})
    where = topology(hardware("h100"), dict(zip(("dp", "tp"), mesh, strict=True)))
    free, kept = (compile_plan(program, where, [0], Request(reshard=reshard)) for reshard in (None, False))
    assert free.reshard is not stay
    assert free.step_time_s <= kept.step_time_s * (1 + fitting.TIE)
