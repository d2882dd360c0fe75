"""The terminal report: what it says, in which order, and that it fits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import lru_cache

import pytest
from parity import captured, planned
from small_models import build

from passes.plan.plan import Baseline, Bound, Plan
from passes.plan.report_text import plan_text, seconds_text
from passes.plan.tables import cut
from passes.planner.make_plan import make_plan
from passes.play.schedule import Role, play


@lru_cache
def made(strategy: str = "megatron", name: str = "llama", accumulate: int = 1) -> Plan:
    model, args, kwargs = build(name)
    space, assignment, _ = planned(captured(model, kwargs, args), {"dp": 2, "tp": 2}, strategy)
    schedule = play(space, assignment, accumulate=accumulate)
    baselines = {
        "ddp": Baseline(2 * schedule.step_time_s, 3 << 30, False, "1.0 GiB over the budget, at the update"),
        "fsdp": Baseline(math.inf, 0, False, "no layout is left"),
    }
    bound = Bound(1.0, 1.0, "of summed costs")
    return make_plan(space, assignment, schedule, bound=bound, baselines=baselines, budget_bytes=2 << 30)


def section(text: str, title: str) -> str:
    """Lines of the section whose title starts with `title`."""
    parts = text.split("\n-- ")
    return next(part for part in parts if part.startswith(title))


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("strategy", ["ddp", "megatron"])
def test_no_line_is_wider_than_the_terminal(strategy: str, width: int) -> None:
    text = plan_text(made(strategy), width)
    assert max(map(len, text.splitlines())) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_long_names_of_axes_leave_the_width() -> None:
    plan = made()
    names = ("dp_replicate", "dp_shard")
    long = replace(plan, collectives=tuple(replace(each, axes=names) for each in plan.collectives))
    assert max(map(len, plan_text(long, 80).splitlines())) <= 80


def test_there_is_no_row_or_table_of_nothing() -> None:
    plan = made()
    none = replace(plan, parameters={}, breakdown=replace(plan.breakdown, contention_s=1e-20))
    text = plan_text(none, 100)
    assert "The model has no parameters." in text
    assert "at rest -> compute" not in text
    assert "compute slowed" not in text


def test_the_decision_comes_first_and_doubts_last() -> None:
    text = plan_text(made(), 100)
    titles = [
        "Plan 'megatron'",
        "What was decided",
        "Time per step",
        "Memory per rank",
        "Beside the plans",
        "Collectives: ",
        "What was replicated",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert text.startswith("Plan 'megatron' on dp=2 x tp=2 (4 x h100, 4 ranks per node), batch over dp\n")
    chosen = plan_text(replace(made(), options={"strategy": "auto"}), 140)
    assert chosen.startswith("Plan 'megatron', chosen by 'auto', on dp=2 x tp=2 (4 x h100")


def test_parameters_are_folded_over_layers_with_their_dims() -> None:
    rows = section(plan_text(made(), 140), "What was decided").splitlines()
    (gate,) = [row.split() for row in rows if "gate_proj" in row]
    assert gate[:3] == ["model.layers.0-1.mlp.gate_proj", "[ffn,", "hidden]"]
    assert gate[3:6] == ["S(0)S(0)", "->", "RS(0)"]
    narrow = [row.strip() for row in section(plan_text(made(), 100), "What was decided").splitlines()]
    assert "model.layers.0-1" in narrow  # a line of its own, where whole names do not fit
    assert any(row.startswith(".mlp.gate_proj  ") for row in narrow)


def test_axes_are_described_in_words() -> None:
    text = section(plan_text(made(), 100), "What was decided")
    assert "dp (2) matrix products split along batch; other ops split along batch" in text
    assert "all parameters split at rest and gathered for compute" in text
    assert "tp (2) matrix products split along" in text
    replicated = section(plan_text(made("ddp"), 100), "What was decided")
    assert "parameters on every rank" in replicated


def test_an_axis_of_one_rank_splits_nothing() -> None:
    model, args, kwargs = build("llama")
    space, assignment, _ = planned(captured(model, kwargs, args), {"dp": 1, "tp": 2}, "auto")
    plan = make_plan(
        space, assignment, play(space, assignment), bound=Bound(1.0, 1.0, ""), baselines={}, budget_bytes=2 << 30
    )
    text = plan_text(plan, 100)
    assert "  dp: 1 rank\n" in text
    assert "  dp (1) one rank: nothing is split\n" in text


def test_baselines_stand_beside_the_plan() -> None:
    lines = section(plan_text(made(), 100), "Beside").splitlines()
    ddp = next(line for line in lines if line.startswith("  ddp"))
    assert "2.00x" in ddp
    assert "3.00 GiB" in ddp
    assert ddp.endswith("no: 1.0 GiB over the budget")
    fsdp = next(line for line in lines if line.startswith("  fsdp"))
    assert fsdp.split() == ["fsdp", "-", "-", "-", "no:", "no", "layout", "is", "left"]


def test_collectives_have_counts_a_reason_and_a_source_line() -> None:
    plan = made()
    text = section(plan_text(plan, 100), "Collectives")
    assert text.startswith(f"Collectives: {sum(each.count for each in plan.collectives)} per step")
    assert "weights model.layers.*" in text
    assert "gradients model.layers.*" in text
    assert "models/llama/modeling_llama.py:" in text
    none = section(plan_text(replace(plan, collectives=()), 100), "Collectives")
    assert none.startswith("Collectives: none")


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("h.*.up.weight, h.*.down.weight", "weights h.*"),
        ("h.*.up.weight, norm.weight, h.*.down.weight, head.weight", "weights h.* and 2 more"),
        ("norm.weight, h.*.up.weight, h.*.down.weight", "weights norm and 2 more"),
        ("gradient of encoder.*.up.weight, gradient of decoder.*.up.weight", "gradients encoder.* and 1 more"),
    ],
)
def test_a_collective_is_labelled_with_how_many_others_are_with_it(value: str, label: str) -> None:
    plan = made()
    role: Role = "gradient" if value.startswith("gradient") else "parameter"
    one = replace(plan.collectives[0], role=role, value=value)
    text = section(plan_text(replace(plan, collectives=(one,)), 140), "Collectives")
    assert re.search(rf"  {re.escape(label)}  ", text), text


def test_a_plan_that_does_not_fit_says_so() -> None:
    assert "DOES NOT FIT" not in plan_text(made(), 100)
    assert "DOES NOT FIT" in plan_text(replace(made(), memory_budget_bytes=1), 100)


def test_notes_and_the_bound_are_shown() -> None:
    text = plan_text(replace(made(), notes=("no rule for odd: it runs whole on every rank",)), 100)
    assert "  - no rule for odd: it runs whole on every rank" in text
    words = " ".join(text.split())
    assert "the sum of all costs, 1.00 s with no overlap counted, is the lowest there is under 'megatron'" in words
    assert "Not proved: that no layout is faster with overlap; of summed costs." in words
    gap = " ".join(plan_text(replace(made(), bound=Bound(1.0, 0.98)), 100).split())
    assert "is within 2.00% of the lowest there is" in gap


def test_micro_batches_are_named() -> None:
    text = plan_text(made("fsdp", accumulate=4), 100)
    assert "per step of 4 micro-batches" in text
    assert "-- Time per step of 4 micro-batches" in text


@pytest.mark.parametrize("accumulate", [1, 4])
def test_shares_of_the_steps_time_add_up(accumulate: int) -> None:
    lines = section(plan_text(made("fsdp", accumulate=accumulate), 140), "Time per step").splitlines()[3:]
    shares = [re.search(r" (<?\d+)%", line) for line in lines]
    assert len(shares) >= 3
    assert sum(float(found[1].lstrip("<")) for found in shares if found) == pytest.approx(100, abs=3)


def test_names_are_never_cut_in_the_parameters() -> None:
    plan = made()
    long = "encoder.block.0.layer.0.SelfAttention.with_a_very_long_name.relative_attention_bias"
    (key, placed), *_ = plan.parameters.items()
    text = plan_text(replace(plan, parameters={key: replace(placed, names=long)}), 80)
    lines = section(text, "What was decided").splitlines()
    assert long in "".join(re.split(r" {2,}", line.strip())[0] for line in lines)


def test_tied_parameters_are_named() -> None:
    assert "lm_head.weight is tied to transformer.wte.weight" in plan_text(made("fsdp", "gpt2"), 100)


def test_print_gives_the_report() -> None:
    assert str(made()).startswith("Plan 'megatron' on dp=2 x tp=2")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (12.34, "12.3 s"), (0.5, "500 ms"), (1.234e-3, "1.23 ms"), (0.9999, "1.00 s"), (4e-7, "0.40 us")],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_long_names_lose_their_middle() -> None:
    assert cut("model.layers.0.mlp", 40) == "model.layers.0.mlp"
    assert cut("abcdefghij", 7) == "ab~ghij"
