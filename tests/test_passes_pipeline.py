"""From program to plan: what is chosen, what is refused."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_models import sized_llama
from torch import nn

import autopar
from costmodel.hardware import Hardware
from costmodel.layout import parse_layout
from costmodel.presets import hardware
from passes.capture.capture import capture
from passes.errors import NoFeasiblePlanError, PlanMismatchError
from passes.plan.plan import Plan
from passes.planner.pipeline import Manner, Request, compile_plan, local_program, on_mesh, prepare
from passes.planner.plan_notes import launch_note
from passes.price.price import price
from passes.program.program import Program
from passes.rewrite.ledger import ledger
from passes.solver.solve import solve
from passes.space.space import Pin, search_space

MESH = (("dp", 2), ("tp", 2))


program = lru_cache(small_models.program_of)


def plan(request: Request, on: str | Hardware = "h100") -> Plan:
    return compile_plan(program(), on_mesh(on, MESH), (0,), request)


def test_the_plan_chosen_is_never_behind_a_plan_made_by_hand() -> None:
    for name in ("h100", "a100-40gb", "cpu"):
        chosen = plan(Request(), name)
        assert set(chosen.baselines) == {"ddp", "fsdp", "megatron"}
        for strategy, baseline in chosen.baselines.items():
            assert chosen.step_time_s <= baseline.step_time_s * 1.002, strategy
            same = chosen.strategy == strategy and chosen.reshard  # baselines free gathered parameters
            assert chosen.step_time_s == pytest.approx(baseline.step_time_s) or not same


def test_the_manner_in_which_a_plan_is_looked_for_changes_nothing_of_it() -> None:
    told: list[str] = []
    manner = Manner(told.append, diagnose=False, keep_timeline=True)
    made = compile_plan(program(), on_mesh("h100", MESH), (0,), Request(), manner=manner)
    alone = plan(Request())
    assert made == alone
    assert told[0] == "analysing the graph"
    assert "solving megatron" in told
    assert made.timeline is not None
    assert alone.timeline is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
def test_a_named_strategy_is_what_is_planned(strategy: str) -> None:
    made = plan(Request(strategy=strategy))
    assert made.strategy == strategy
    assert made.bound.gap < 0.01


def test_a_plan_read_back_emits_the_same_program() -> None:
    made = plan(Request(strategy="megatron"))
    again = Plan.from_json(made.to_json())
    topology = on_mesh("h100", MESH)
    one, other = (ledger(local_program(program(), p, topology, {})) for p in (made, again))
    assert one == other
    assert sum(c.count for c in made.collectives) == len(one)


def test_a_tensor_axis_of_one_rank_changes_nothing() -> None:
    made = plan(Request())
    alone = compile_plan(program(), on_mesh("h100", (("dp", 2), ("ep", 1), ("tp", 2))), (0,), Request())
    assert (alone.strategy, alone.peak_memory_bytes) == (made.strategy, made.peak_memory_bytes)
    assert alone.step_time_s == pytest.approx(made.step_time_s, rel=1e-12)
    assert alone.bound.bound_s == pytest.approx(made.bound.bound_s, rel=1e-9)
    for name, placed in made.placements.items():
        assert alone.placements[name].at_rest.count("(") == placed.at_rest.count("("), name


@pytest.mark.parametrize("data", [False, True], ids=["tensor axes", "data axes"])
def test_axes_that_choose_together_are_one_axis(data: bool) -> None:
    """The least sum of costs there is that of the mesh with one axis of as many ranks; apart it is no more."""

    def least_s(*axes: tuple[str, int], joined: bool = False, share: float = 1.0) -> float:
        mesh = (*axes, ("tp", 2)) if data else (("dp", 2), *axes)
        space = search_space(program(), on_mesh("h100", mesh), range(len(axes) if data else 1), joined=joined)
        return solve(price(space).weighed(share), gap=1e-6).seconds

    for share in (1.0, 0.05):
        one, two = least_s(("one", 4), share=share), least_s(("a", 2), ("b", 2), joined=True, share=share)
        assert two == pytest.approx(one, rel=1e-6)
    assert least_s(("a", 2), ("b", 2)) <= least_s(("one", 4)) * (1 + 1e-5)


def test_a_plan_for_two_data_axes_is_not_behind_that_for_one() -> None:
    """What the least sum of costs stores less evenly is 1.8% slower here; the schedule is to see both."""
    model = sized_llama(256, 512, 2, 8, 4, 1024)
    ids = torch.empty(8, 128, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    one, two = (
        autopar.plan(model, mesh, inputs, hardware="h100")
        for mesh in ({"dp": 8, "tp": 2}, {"dp_replicate": 4, "dp_shard": 2, "tp": 2})
    )
    assert two.step_time_s <= one.step_time_s * 1.001
    assert two.bound.among.startswith(" where dp_replicate and dp_shard do the same")
    assert "do the same" not in one.bound.among


def test_memory_decides_between_plans() -> None:
    """A budget below what ddp needs leaves the plans that share states between ranks."""

    def on_line(**asked: Any) -> Plan:
        return compile_plan(program(), on_mesh("h100", (("dp", 4),)), (0,), Request(**asked))

    tight = on_line(strategy="ddp").peak_memory_bytes - 1
    with pytest.raises(NoFeasiblePlanError):
        on_line(strategy="ddp", budget_bytes=tight)
    chosen = on_line(budget_bytes=tight)
    assert chosen.peak_memory_bytes <= tight
    assert not chosen.baselines["ddp"].fits


def test_a_plan_that_leaves_the_allocator_little_room_says_so() -> None:
    """14% more than its tensors is more than the device has, or just not; a CPU's has none that reserves."""
    request = Request(strategy="fsdp")
    peak = plan(request).peak_memory_bytes

    def said(name: str, usable: int) -> list[str]:
        known = hardware(name)
        device = replace(known.device, memory_bytes=usable + known.device.reserve_bytes)
        made = plan(request, replace(known, device=device))
        assert made.peak_memory_bytes == peak or name == "cpu"
        return [note for note in made.notes if "leaves more room" in note]

    (note,) = said("h100", round(peak * 1.13))
    assert note.startswith("tensors take 88% of what the device has for them")
    assert said("h100", round(peak * 1.15)) == []
    four = 4 * plan(request, "cpu").peak_memory_bytes  # ranks share the host
    assert said("cpu", round(four * 1.01)) == []


def test_kernels_are_as_many_as_a_profiler_counted() -> None:
    """On an H100 rank 0 of tp=8 launched 326 in a step of four layers of LLaMA-3-8B (benchmarks/gpu/results.md), 78 of
    them fills by the benchmark and 12 of the optimizer. Half as many tokens make them as many and short enough to be
    told, and every further layer launches as many as another."""
    launched = []
    for layers in (4, 5, 16):
        model = sized_llama(4096, 14336, layers, 32, 8, 128256, tie_word_embeddings=False).to(torch.bfloat16)
        ids = torch.empty(1, 2048, dtype=torch.long, device="meta")
        step = prepare(capture(model, (), {"input_ids": ids, "labels": ids}))
        made = compile_plan(step, on_mesh("h100", (("tp", 8),)), (), Request(strategy="megatron"))
        (note,) = [note for note in made.notes if "launches some" in note]
        launched.append(int(note.split()[4].replace(",", "")))
    assert launched[0] == pytest.approx(326 - 78 - 12, rel=0.25)
    assert launched[2] - launched[0] == 12 * (launched[1] - launched[0])


def test_the_host_is_told_of_by_what_its_launches_took() -> None:
    """The step that waited for its host (tp=8) launched 326 kernels less the fills of a new optimizer's states, two for
    each of 39 parameters, which were not in it."""
    results = json.loads((Path(__file__).parents[1] / "benchmarks" / "gpu" / "results.json").read_text())
    (waited,) = (r for r in results["rank0"] if (r["mesh"], r["how"]) == ("dp=1,tp=8", "autopar"))
    each_s = waited["step_s"] / (waited["kernels"] - 2 * (4 * 9 + 3))
    assert launch_note(100, 100 * each_s * 1.01) is None
    note = launch_note(100, 100 * each_s * 0.99)
    assert note is not None
    assert note.endswith(f"({each_s * 1e6:.1f} us were seen)")


def test_long_kernels_and_cpus_wait_for_no_host() -> None:
    assert launch_note(1000, 0.081) is None
    assert "1,000 kernels, one every 20.0 us" in (launch_note(1000, 0.02) or "")
    assert not any("launches some" in note for note in plan(Request(), "cpu").notes)
    assert any("launches some" in note for note in plan(Request()).notes)


class Chunked(nn.Module):
    """A head over the tokens of a few samples at a time, or of all: the mean of the parts' features, squared."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.up, self.head = dim, nn.Linear(16, 32), nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).flatten(0, 1) if self.dim == 0 else self.up(x)
        return torch.stack([self.head(part).mean(-2).square().sum() for part in hidden.chunk(4, self.dim)]).mean()


def test_products_that_every_data_parallel_rank_computes_are_told() -> None:
    """A part of the flattened tokens is of some samples alone, one along the sequence of all."""
    notes = {}
    for dim in (0, 1):
        step = prepare(capture(Chunked(dim), (torch.randn(8, 512, 16),), {}, batch_dims=[0], batch_size=8))
        made = compile_plan(step, on_mesh("h100", (("dp", 2),)), (0,), Request(strategy="ddp"))
        notes[dim] = [note for note in made.notes if "whole on every rank of dp" in note]
    line = inspect.getsourcelines(Chunked.forward)[1] + 2
    (note,) = notes[0]
    assert f"{Path(__file__).name}:{line}: " in note
    assert notes[1] == []


def test_a_budget_beyond_the_device_is_told() -> None:
    """One byte more than an H100 has is; all that it has is not."""
    has = hardware("h100").device.memory_bytes
    for budget, told in ((has, 0), (has + 1, 1)):
        notes = plan(Request(strategy="fsdp", budget_bytes=budget)).notes
        assert sum("more than the 79.16 GiB that h100 has" in note for note in notes) == told


def test_where_memory_binds_the_plan_is_not_behind_any_way_to_save_it() -> None:
    """What is computed again and whether parameters are gathered again are two decisions: all pairs are asked for."""
    model = sized_llama(1024, 4096, 6, 8, 8, 1024).to(torch.bfloat16)
    ids = torch.empty(64, 256, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    step = prepare(capture(model, (), inputs, batch_dims=[0, 0], batch_size=64))

    def asked(strategy: str = "auto", **request: Any) -> Plan:
        return compile_plan(step, on_mesh("b200", (("dp", 16),)), (0,), Request(strategy=strategy, **request))

    modes: tuple[Any, ...] = ("auto", "selective", "full")  # with no budget, auto computes pointwise ops again
    pairs = [asked("fsdp", recompute=mode, reshard=freed) for mode in modes for freed in (True, False)]
    chosen = {budget: asked(budget_bytes=budget) for budget in {pair.peak_memory_bytes for pair in pairs}}
    for budget, plan in chosen.items():
        assert plan.peak_memory_bytes <= budget
        assert plan.step_time_s <= 1.001 * min(p.step_time_s for p in pairs if p.peak_memory_bytes <= budget)


def test_a_model_that_does_not_fit_is_told_by_how_much_and_what_would_do() -> None:
    with pytest.raises(NoFeasiblePlanError) as caught:
        plan(Request(budget_bytes=10_000))
    message = str(caught.value)
    assert "no plan fits in" in message
    assert "too much" in message
    assert "Largest tensor" in message
    assert "What would fit" in message


def test_an_unknown_strategy_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"zero3.*known are auto, ddp, fsdp, megatron"):
        plan(Request(strategy="zero3"))


def test_a_pin_is_obeyed() -> None:
    pins = {"model.layers.*.mlp.down_proj.weight": parse_layout("RS(0)")}
    made = compile_plan(program(), on_mesh("h100", MESH), (0,), Request(pins=pins))
    placed = made.placements["model.layers.1.mlp.down_proj.weight"]
    assert placed.at_rest.endswith("S(0)")
    local = local_program(program(), made, on_mesh("h100", MESH), pins)
    stored = {entry.name: entry.storage for entry in local.inputs}["model.layers.1.mlp.down_proj.weight"]
    assert [None if shard is None else shard.dim for shard in stored.shards] == [None, 0]


@pytest.mark.parametrize(
    ("name", "mesh", "request_", "said"),
    [
        ("gpt2", (("tp", 3),), Request(strategy="megatron"), "with the same dims padded"),
        ("llama", MESH, Request(strategy="megatron", recompute="full"), "with recompute 'full'"),
    ],
)
def test_a_bound_says_of_which_plans_it_holds(name: str, mesh: Any, request_: Request, said: str) -> None:
    """Plans of the strategy that cost less by their sums compute less again, or pad nothing."""
    topology, batch_axes = on_mesh("h100", mesh), tuple(a for a, (axis, _) in enumerate(mesh) if axis == "dp")
    bound = compile_plan(program(name), topology, batch_axes, request_).bound
    other = price(search_space(program(name), topology, batch_axes, strategy="megatron"))
    assert solve(other.problem).seconds < bound.bound_s
    assert said in bound.among


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.*", "transformer.wte.weight"])
def test_a_pin_may_give_any_name_of_a_tied_parameter(name: str) -> None:
    """GPT-2's table is its head; a pin by either name is a pin of both, and whole is not what is chosen without."""
    pinned = Request(strategy="megatron", pins={name: parse_layout("RR")})
    free, made = (
        compile_plan(program("gpt2"), on_mesh("h100", MESH), (0,), request)
        for request in (Request(strategy="megatron"), pinned)
    )
    assert free.placements["lm_head.weight"].in_compute == "RS(0)"
    assert made.placements["lm_head.weight"] == made.placements["transformer.wte.weight"]
    assert made.placements["lm_head.weight"].in_compute == "RR"
    assert made.parameters["transformer.wte.weight"].pinned


class _Halves(nn.Module):
    """Four layers, the first two frozen; one weight's name ends as another's does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for trained in (False, False, True, True):
            layer, inner = nn.Module(), nn.Module()
            layer.up, inner.up, layer.inner = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False), inner
            self.layers.append(layer.requires_grad_(trained))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.inner.up(layer.up(x).relu())  # type: ignore[union-attr, operator]
        return x.square().mean()


def test_a_line_of_a_plan_is_pinned_by_its_name_and_no_other() -> None:
    """As `plan --from` pins what a person edited: of lines whose names a pattern would confuse, the one alone."""

    def planned(**pins: str) -> Plan:
        options = autopar.Options(progress=False, pins=pins)
        x = torch.randn(4, 16)
        return autopar.plan(_Halves(), dict(MESH), (x,), hardware="h100", strategy="fsdp", options=options)

    free = planned()
    assert list(free.parameters) == [
        f"layers.*.{name}up.weight{half}" for half in ("", "#2") for name in ("", "inner.")
    ]
    for line in free.parameters:
        made = planned(**{line: "RR -> RR"})
        assert {key for key, placed in made.parameters.items() if placed.pinned} == {line}
        for key, placed in made.parameters.items():
            assert str(placed) == ("RR -> RR" if key == line else str(free.parameters[key])), (line, key)


def test_a_pin_of_frozen_layers_does_not_keep_the_model_from_being_evaluated() -> None:
    """Without gradients frozen layers and trained ones are alike, and lie where training has laid them."""

    def captured() -> Program:
        return prepare(capture(_Halves(), (torch.randn(8, 16),), {}, batch_dims=[0], batch_size=8))

    pins = {"layers.[01].*": Pin(parse_layout("RR")), "layers.*.up.weight#2": Pin(parse_layout("RR"))}
    mesh, training = on_mesh("h100", MESH), captured()
    request = Request(strategy="ddp", pins=pins)
    local = local_program(training, compile_plan(training, mesh, (0,), request), mesh, pins)
    with torch.no_grad():
        evaluation = captured().of_stored({x.name: x.storage for x in local.inputs if x.kind == "parameter"})
    made = compile_plan(evaluation, mesh, (0,), replace(request, stored=evaluation.stored))
    assert {name: str(placed) for name, placed in made.placements.items()} == {
        name: "RR -> RR" for name, _ in _Halves().named_parameters()
    }


class _Classes(nn.Module):
    """A token beside those of an image, and classes that ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(x + self.down(self.up(x).relu())).square().mean()


@pytest.mark.parametrize(("strategy", "sizes"), [("megatron", (2, 2)), ("megatron", (2, 3)), ("auto", (2, 2))])
def test_every_line_of_a_plan_can_be_kept(strategy: str, sizes: tuple[int, int]) -> None:
    """Padded dims, chunks of another dim than the first, what compute takes a part of, and a token of each sample."""
    program = prepare(capture(_Classes(), (torch.randn(12, 7, 16),), {}, batch_dims=[0], batch_size=12))
    mesh = on_mesh("h100", list(zip(("dp", "tp"), sizes, strict=True)))
    free = compile_plan(program, mesh, (0,), Request(strategy=strategy))
    for line, placed in free.parameters.items():
        pin = Pin(parse_layout(placed.in_compute), parse_layout(placed.at_rest))
        made = compile_plan(program, mesh, (0,), Request(strategy=strategy, pins={line: pin}))
        assert str(made.parameters[line]) == str(placed), line
        assert (made.strategy, made.parameters[line].pinned) == (free.strategy, True)


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 16, 64))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions
        return (x + self.down(self.up(x).relu())).square().mean()


def test_fsdp_leaves_a_parameter_of_one_row_whole_at_rest() -> None:
    """Chunks of dim 0 are none, and no other dim is split by it, be it padded for three ranks or not."""
    program = prepare(capture(_Positions(), (torch.zeros(8, 16, 64),), {}, batch_dims=[0], batch_size=8))
    for sizes in ((2, 3), (1, 4)):
        mesh = on_mesh("h100", list(zip(("dp", "tp"), sizes, strict=True)))
        made = compile_plan(program, mesh, (0,), Request(strategy="fsdp"))
        assert made.parameters["positions"].at_rest == "RR"
        assert made.parameters["up.weight"].at_rest == "S(0)S(0)"


class _Merged(nn.Module):
    """A weight made of three, scaled by a fourth."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"weight": (16, 16), "down": (4, 16), "up": (16, 4), "scale": (16, 1)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ ((self.weight + self.up @ self.down) * self.scale).t()).square().mean()


@lru_cache
def _merged() -> Program:
    return prepare(capture(_Merged(), (torch.randn(8, 16),), {}, batch_dims=[0], batch_size=8))


@pytest.mark.parametrize("names", [("weight", "up"), ("up", "weight"), ("weight", "scale"), ("scale", "weight")])
def test_pins_of_parameters_that_meet_are_all_obeyed_in_any_order(names: tuple[str, str]) -> None:
    """What is made of them is moved; no pin gives way to the one behind it."""
    layouts = {"weight": "RS(0)", "up": "RR", "scale": "RR"}
    pins = {name: parse_layout(layouts[name]) for name in names}
    made = compile_plan(_merged(), on_mesh("h100", MESH), (0,), Request(pins=pins))
    assert {name: made.placements[name].in_compute for name in names} == {name: layouts[name] for name in names}


def test_pins_that_no_op_can_obey_together_are_both_named() -> None:
    pins = {"up": parse_layout("RS(0)"), "down": parse_layout("RS(1)")}
    with pytest.raises(ValueError, match=r"pins 'up' and 'down': mm in the model reads both, and cannot.* as RS\(1\)"):
        compile_plan(_merged(), on_mesh("h100", MESH), (0,), Request(pins=pins))
    with pytest.raises(ValueError, match=r"pin '\*' names .*: mm in the model reads both, and cannot.* as RS\(0\)"):
        compile_plan(_merged(), on_mesh("h100", MESH), (0,), Request(pins={"*": parse_layout("RS(0)")}))


def test_what_pinned_parameters_make_as_a_partial_sum_is_summed_for_its_readers() -> None:
    """The low rank split over tp: each rank has a part of the sum over it."""
    layouts = {"up": "RS(1)", "down": "RS(0)"}
    pins = {name: parse_layout(layout) for name, layout in layouts.items()}
    made = compile_plan(_merged(), on_mesh("h100", MESH), (0,), Request(pins=pins))
    assert {name: made.placements[name].in_compute for name in layouts} == layouts
    assert made.decisions["forward mm"] == "RS(1), RS(0) -> RP"


class _Twice(nn.Module):
    """A weight times its own transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ (self.weight @ self.weight.t())).square().mean()


def test_a_pinned_parameter_that_an_op_reads_twice_is_moved_for_the_second() -> None:
    program = prepare(capture(_Twice(), (torch.randn(8, 16),), {}, batch_dims=[0], batch_size=8))
    made = compile_plan(program, on_mesh("h100", MESH), (0,), Request(pins={"weight": parse_layout("RS(0)")}))
    assert made.placements["weight"].in_compute == "RS(0)"
    assert made.decisions["forward mm"] == "RS(0), RR -> RS(0)"


@pytest.mark.parametrize(
    ("pattern", "layout", "message"),
    [
        ("model.layers.0.mlp.*", "RS(0)", "but not model.layers.1"),
        ("model.layer.*", "RS(0)", "names no parameter"),
        ("model.norm.weight", "R", "R has 1 placement, but the mesh has 2 axes"),
        ("model.norm.weight", "RS(1)", "cannot be RS(1)"),
    ],
)
def test_a_pin_that_cannot_be_is_refused(pattern: str, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        plan(Request(pins={pattern: parse_layout(layout)}))


def test_a_batch_that_the_batch_axes_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input_ids: dim 0 has 8 entries .* 16 ranks"):
        compile_plan(program(), on_mesh("h100", (("dp", 16),)), (0,), Request())


def test_a_plan_for_another_graph_or_mesh_is_refused() -> None:
    made = plan(Request(strategy="fsdp"))
    with pytest.raises(PlanMismatchError):
        local_program(program("gpt2"), made, on_mesh("h100", MESH), {})
    with pytest.raises(PlanMismatchError):
        local_program(program(), made, on_mesh("h100", (("dp", 4), ("tp", 1))), {})
    with pytest.raises(PlanMismatchError):
        local_program(program(), replace(made, fingerprint="0" * 64), on_mesh("h100", MESH), {})


def test_three_axes_share_states_only_where_asked() -> None:
    """HSDP: fsdp's states over dp_shard alone is what `auto` may choose; here memory allows every copy."""
    mesh = (("dp_replicate", 2), ("dp_shard", 2), ("tp", 2))
    made = compile_plan(program(), on_mesh("h100", mesh), (0, 1), Request(strategy="megatron"))
    weight = made.placements["model.layers.0.mlp.up_proj.weight"]
    assert weight.at_rest.count("S(0)") == 3 or "S" in weight.at_rest
    assert torch.Size(weight.shape) == torch.Size((64, 32))
