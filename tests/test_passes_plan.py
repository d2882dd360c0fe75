"""Plans say what the rewritten program does, survive their file, map back, and are refused where they don't fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import small_models
from hypothesis import given
from hypothesis import strategies as st
from parity import planned

from passes.errors import PlanMismatchError
from passes.plan.plan import Baseline, Bound, Plan
from passes.planner.decisions import assignment_of
from passes.planner.make_plan import baseline, make_plan
from passes.play.schedule import play
from passes.program.local import LocalProgram
from passes.space.space import Space, search_space
from passes.space.words import fold_names, unfold_names

program_of = lru_cache(small_models.program_of)


@lru_cache
def made(name: str = "llama", strategy: str = "megatron") -> tuple[Plan, Space, tuple[int, ...], LocalProgram]:
    space, assignment, local = planned(program_of(name), {"dp": 2, "tp": 2}, strategy)
    schedule = play(space, assignment)
    plan = make_plan(
        space,
        assignment,
        schedule,
        bound=Bound(schedule.step_time_s, schedule.step_time_s * 0.99, "as solved"),
        baselines={"ddp": baseline(schedule, 1 << 20), "fsdp": Baseline(math.inf, 0, False, "no layout")},
        budget_bytes=1 << 30,
        notes=("a note",),
        options={"accumulate": 1, "pins": {"a.*": "RS(0)"}},
        example="input_ids: int64[4, 16]",
    )
    return plan, space, assignment, local


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_placements_are_those_of_the_local_program(name: str, strategy: str) -> None:
    plan, _, _, local = made(name, strategy)
    stored = {entry.name: entry.storage for entry in local.inputs if entry.kind == "parameter"}
    tied = {"lm_head.weight": "transformer.wte.weight"} if name == "gpt2" else {}
    assert plan.placements.keys() == stored.keys() | tied.keys()
    for full_name, storage in stored.items():
        placed = plan.placements[full_name]
        shards = [None if shard is None else shard.dim for shard in storage.shards]
        at_rest = [0 if axis in storage.state_axes else dim for axis, dim in enumerate(shards)]
        assert placed.at_rest == "".join("R" if dim is None else f"S({dim})" for dim in at_rest), full_name
        assert placed.shape == storage.shape
    for other, first in tied.items():
        assert plan.placements[other] == plan.placements[first]


def test_a_plan_tells_mesh_time_and_memory() -> None:
    plan, space, assignment, _ = made()
    schedule = play(space, assignment)
    assert plan.mesh == {"dp": 2, "tp": 2}
    assert plan.batch_axes == ("dp",)
    assert plan.hardware == "h100"
    assert plan.strategy == "megatron"
    assert plan.fingerprint == space.program.fingerprint
    assert plan.step_time_s == schedule.step_time_s
    assert plan.peak_memory_bytes == sum(plan.breakdown.memory_bytes.values())
    assert plan.bound.gap == pytest.approx(0.01)
    assert plan.fits
    assert not replace(plan, memory_budget_bytes=1).fits
    assert plan.baselines["ddp"].fits == (schedule.peak_memory_bytes <= 1 << 20)


def test_folded_collectives_are_the_schedules() -> None:
    plan, space, assignment, _ = made()
    one_by_one = play(space, assignment).collectives
    assert len(plan.collectives) < len(one_by_one)
    assert sum(each.count for each in plan.collectives) == len(one_by_one)
    assert sum(each.count * each.bytes for each in plan.collectives) == sum(each.bytes for each in one_by_one)
    for field in ("seconds", "exposed_s", "hidden_s"):
        folded = sum(getattr(each, field) for each in plan.collectives)
        assert folded == pytest.approx(sum(getattr(each, field) for each in one_by_one))


def test_dims_have_the_names_people_use() -> None:
    parameters = made()[0].parameters
    assert parameters["model.layers.*.mlp.gate_proj.weight"].dims == ("ffn", "hidden")
    assert parameters["model.layers.*.self_attn.q_proj.weight"].dims == ("heads*head_size", "hidden")
    assert parameters["model.embed_tokens.weight"].dims == ("vocab", "hidden")
    assert parameters["lm_head.weight"].dims == ("vocab", "hidden")
    roles = made()[0].roles
    assert roles["dp"].products == {"batch": pytest.approx(1.0)}
    assert {"ffn", "heads", "vocab"} <= roles["tp"].products.keys()
    assert roles["dp"].stored == 1.0


def test_layers_are_folded_and_counted() -> None:
    placed = made()[0].parameters["model.layers.*.mlp.up_proj.weight"]
    assert placed.names == "model.layers.0-1.mlp.up_proj.weight"
    assert placed.count == 2
    assert placed.bytes == 2 * 64 * 32 * 4 // 4  # two layers of a 64 x 32 matrix of floats, over 2 x 2 ranks


# -- its file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
def test_a_plan_survives_its_file(strategy: str, tmp_path: Path) -> None:
    plan = made("gpt2", strategy)[0]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_the_file_is_strict_json_with_a_line_per_decision() -> None:
    text = made()[0].to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(text, parse_constant=refuse)
    assert data["format"] == "autopar-plan"
    lines = text.splitlines()
    for key, value in data["decisions"].items():
        assert f"    {json.dumps(key)}: {json.dumps(value)}" in [line.rstrip(",") for line in lines]


def edited(change: str, value: object) -> str:
    data = json.loads(made()[0].to_json())
    if value is None:
        del data[change]
    else:
        data[change] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"here: not JSON \(.*line 1 column 2"),
        ("[]", "here: not a plan: found format 'list'"),
        ('{"format": "other"}', "found format 'other', expected 'autopar-plan'"),
        ('{"format": "autopar-plan", "version": 99}', "version 99, but this autopar reads version 1"),
    ],
)
def test_a_text_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text, "here")


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("step_time_s", None, "the field 'step_time_s' is missing"),
        ("step_time_s", "fast", "step_time_s: found 'fast', expected int or float"),
        ("axes", [["dp"]], r"axes\[0\]: found 1 entries, expected 2"),
        ("axes", [["dp", 2], ["dp", 2]], "here: axes: 'dp' stands 2 times; give each axis its own name"),
        ("roles", {}, "here: roles: found none of the axis 'dp'; each axis has one"),
        ("speed", 3, "unknown field 'speed'"),
        ("bound", {"seconds": 1.0}, "bound: the field 'bound_s' is missing"),
    ],
)
def test_a_wrong_field_is_named(change: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(edited(change, value), "here")


# -- back to options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decisions_map_back(name: str, strategy: str) -> None:
    plan, space, assignment, _ = made(name, strategy)
    again = search_space(program_of(name), space.topology, (0,), strategy=strategy)
    assert assignment_of(Plan.from_json(plan.to_json()), again) == tuple(assignment)


def test_a_plan_for_another_graph_is_refused() -> None:
    plan, space, _, _ = made()
    with pytest.raises(PlanMismatchError, match=r"for the graph feed but this model .* make a plan"):
        assignment_of(replace(plan, fingerprint="feed"), space)


def test_a_plan_for_another_mesh_is_refused() -> None:
    plan, space, _, _ = made()
    with pytest.raises(PlanMismatchError, match=r"mesh \{'dp': 4\} but was given the mesh \{'dp': 2, 'tp': 2\}"):
        assignment_of(replace(plan, axes=(("dp", 4),)), space)


def test_a_plan_for_other_batch_axes_is_refused() -> None:
    plan, space, _, _ = made()
    with pytest.raises(PlanMismatchError, match="batch_axes"):
        assignment_of(replace(plan, batch_axes=()), space)


def test_the_first_decision_that_does_not_fit_is_named() -> None:
    plan, space, _, _ = made()
    key = "parameter model.layers.*.mlp.up_proj.weight"
    assert plan.decisions[key] == "S(0)S(0) -> RS(0)"
    wrong = replace(plan, decisions={**plan.decisions, key: "S(7)R -> RR"})
    with pytest.raises(PlanMismatchError, match=r"up_proj.weight' as 'S\(7\)R -> RR', which is none of its"):
        assignment_of(wrong, space)
    fewer = {name: text for name, text in plan.decisions.items() if name != key}
    with pytest.raises(PlanMismatchError, match=r"decides nothing about 'parameter model.layers.\*.mlp.up_proj"):
        assignment_of(replace(plan, decisions=fewer), space)
    with pytest.raises(PlanMismatchError, match="'parameter nobody', which is no place"):
        assignment_of(replace(plan, decisions={**plan.decisions, "parameter nobody": "RR -> RR"}), space)


def test_an_edited_decision_is_followed() -> None:
    plan, space, assignment, _ = made()
    key = "parameter model.layers.*.mlp.up_proj.weight"
    changed = assignment_of(replace(plan, decisions={**plan.decisions, key: "S(0)R -> RR"}), space)
    differ = [i for i, (a, b) in enumerate(zip(assignment, changed, strict=True)) if a != b]
    assert [space.sites[i].name for i in differ] == ["model.layers.0.mlp.up_proj.weight"]


# -- names -------------------------------------------------------------------------------------------------------------


@given(
    st.sets(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from(["l.{}.w", "l.{}", "{}.w", "a.3.l.{}.b.1.w"])
)
def test_folded_names_unfold(indices: set[int], shape: str) -> None:
    names = [shape.format(index) for index in sorted(indices)]
    assert unfold_names(fold_names(names)) == names


def test_names_are_folded_over_runs() -> None:
    assert fold_names(["l.0.w", "l.1.w", "l.2.w", "l.5.w"]) == "l.0-2,5.w"
    assert fold_names(["l.0.a.1.w", "l.1.a.2.w"]) == "l.0.a.1.w, l.1.a.2.w"
    both = [f"l.{i}.a.{j}.w" for i in range(3) for j in range(2)]
    assert fold_names(both) == "l.0-2.a.0-1.w"
    assert unfold_names("l.0-2.a.0-1.w") == both
