"""Why nothing fits and what would: conflicts made by hand, and every figure planned once more."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autopar import Options
from autopar import plan as plan_of
from costmodel.layout import parse_layout
from costmodel.presets import hardware
from passes.capture.capture import capture
from passes.errors import NoFeasiblePlanError
from passes.plan.plan import Plan
from passes.planner import infeasible
from passes.planner.pipeline import Manner, Request, compile_plan, local_program, on_mesh, prepare
from passes.program.program import Program

MESH = (("dp", 2), ("tp", 2))
ROWS, WIDTH = 64, 256
WEIGHTS = 2 * 4 * WIDTH * WIDTH * 4
"""Bytes of both blocks' parameters in fp32."""


class Blocks(nn.Module):
    """Two blocks of two products each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"up": nn.Linear(WIDTH, 2 * WIDTH, bias=False), "down": nn.Linear(2 * WIDTH, WIDTH, bias=False)}
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return {"loss": x.square().mean()}


@lru_cache
def program(rows: int = ROWS, length: int = 512) -> Program:
    with torch.device("meta"):
        model, x = Blocks(), torch.empty(rows, length, WIDTH)
    return prepare(capture(model, (), {"x": x}, batch_dims=[0], batch_size=rows))


def planned(request: Request, mesh: tuple[tuple[str, int], ...] = MESH, rows: int = ROWS) -> Plan:
    return compile_plan(program(rows), on_mesh("h100", mesh), (0,), request)


def refused(request: Request, smaller: bool = False, length: int = 512) -> NoFeasiblePlanError:
    with pytest.raises(NoFeasiblePlanError) as caught:
        compile_plan(
            program(length=length), on_mesh("h100", MESH), (0,), request,
            manner=Manner(smaller=(lambda divisor: program(ROWS // divisor)) if smaller else None),
        )  # fmt: skip
    return caught.value


@lru_cache
def peak(strategy: str, recompute: str) -> int:
    return planned(Request(strategy=strategy, recompute=recompute, budget_bytes=1 << 40)).peak_memory_bytes  # type: ignore[arg-type]


def test_a_budget_below_the_parameters_conflicts_alone() -> None:
    """On four ranks each keeps at least a quarter of the parameters, and twice that of optimizer states."""
    error = refused(Request(budget_bytes=WEIGHTS // 4))
    assert WEIGHTS // 4 == 512 * 1024
    assert error.conflict == ("the memory budget of 512.00 KiB",)
    assert "What conflicts" not in str(error)
    assert "\n" not in str(error)


def test_a_fixed_recompute_conflicts_with_the_budget() -> None:
    def least(strategy: str, recompute: str) -> int:
        """The peak where weight gradients run at once and activations are gathered again."""
        asked = Request(strategy=strategy, recompute=recompute, regather=True)  # type: ignore[arg-type]
        free = planned(asked).peak_memory_bytes
        try:
            return planned(replace(asked, budget_bytes=free - 1)).peak_memory_bytes
        except NoFeasiblePlanError:
            return free

    none, full = (min(least(s, mode) for s in ("fsdp", "megatron")) for mode in ("none", "full"))
    assert full < none
    budget = (min(none, least("auto", "none")) + full) // 2
    error = refused(Request(recompute="none", budget_bytes=budget))
    assert [name.split(" of ")[0] for name in error.conflict] == ["the memory budget", "recompute='none'"]
    (way,) = [way for way in error.ways if way.startswith("without recompute='none'")]
    assert planned(Request(budget_bytes=budget)).peak_memory_bytes <= budget
    assert "any one less would do" in str(error)
    assert re.search(r"MiB, [\d.]+ [mu]s per step", way)


def test_a_way_out_has_its_step_in_seconds_where_it_takes_some() -> None:
    schedule = SimpleNamespace(peak_memory_bytes=3 << 30, step_time_s=12.25)
    plan: Any = SimpleNamespace(schedule=schedule, recompute="full", strategy="fsdp")
    assert str(infeasible.Way("with sgd", plan)) == "with sgd: 3.00 GiB, 12.25 s per step (fsdp, recompute='full')"


@pytest.mark.parametrize(
    ("asked", "length", "stays", "name"),
    [  # where parameters are most of what there is, and where activations are
        (Request(strategy="fsdp", optimizer="sgd"), 8, {"reshard": False}, "reshard_after_forward=False"),
        (Request(strategy="megatron", recompute="none"), 512, {"regather": False}, "regather_activations=False"),
    ],
)
def test_what_has_to_stay_gathered_conflicts_too(
    asked: Request, length: int, stays: dict[str, bool], name: str
) -> None:
    def needed(request: Request) -> int:
        error = refused(replace(request, budget_bytes=WEIGHTS // 4), length=length)
        return int(re.search(r"memory_budget=(\d+)", error.ways[-1])[1])  # type: ignore[index]

    kept = needed(replace(asked, **stays))  # type: ignore[arg-type]
    assert needed(asked) < kept
    error = refused(replace(asked, budget_bytes=kept - 1, **stays), length=length)  # type: ignore[arg-type]
    assert name in error.conflict
    (way,) = [way for way in error.ways if way.startswith(f"without {name}: ")]
    assert asked.strategy in way.rpartition("(")[2]


def test_weight_gradients_run_at_once_where_what_they_read_would_not_fit() -> None:
    def under(budget: int) -> Plan:
        return planned(Request(strategy="megatron", recompute="full", budget_bytes=budget))

    free = under(1 << 40)
    tight = under(free.peak_memory_bytes - 1)
    assert free.postpone
    assert not tight.postpone
    assert Plan.from_json(tight.to_json()).postpone is False
    assert tight.peak_memory_bytes < free.peak_memory_bytes
    assert tight.step_time_s > free.step_time_s

    def sends(plan: Plan) -> list[str]:
        """The targets of products, and of collectives and waits, in the order of the emitted backward."""
        graph = local_program(program(), plan, on_mesh("h100", MESH), {}).graph.graph
        return [str(n.target) for n in graph.nodes if n.meta.get("phase") == "backward" and n.op == "call_function"]

    assert sorted(sends(free)) == sorted(sends(tight))
    assert sends(free) != sends(tight)


def test_a_strategy_conflicts_with_the_budget_and_a_pin_does_not() -> None:
    """ddp keeps every parameter and its two states on every rank; activations are next to nothing. A pin of
    some parameters to whole for compute is beside the point: they are still sharded at rest."""
    pins = {"blocks.*.up.weight": parse_layout("RR")}
    error = refused(Request(strategy="ddp", budget_bytes=3 * WEIGHTS - 1, pins=pins), length=1)
    assert [name.split(" of ")[0] for name in error.conflict] == ["the memory budget", "strategy='ddp'"]
    assert any(way.startswith("without strategy='ddp'") for way in error.ways)


def test_other_meshes_batches_and_ranks_are_planned() -> None:
    """What activations take shrinks with the batch and with the ranks; each figure is that of a plan made anew."""
    floor = min(peak(s, "full") for s in ("fsdp", "megatron", "auto"))
    error = refused(Request(budget_bytes=int(0.7 * floor)), smaller=True)
    assert len(error.conflict) == 1
    batch = next(way for way in error.ways if way.startswith("a batch per rank"))
    divisor = int(re.findall(r"(\d+) times smaller", batch)[0])
    request = Request(budget_bytes=int(0.7 * floor))
    made = planned(request, rows=ROWS // divisor)
    assert made.peak_memory_bytes <= 0.7 * floor
    with pytest.raises(NoFeasiblePlanError):
        compile_plan(program(2 * ROWS // divisor), on_mesh("h100", MESH), (0,), request, manner=Manner(diagnose=False))
    ranks = next(way for way in error.ways if way.startswith("the same global batch on"))
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)': (\d+)", ranks)}
    assert planned(request, tuple(sizes.items())).peak_memory_bytes <= 0.7 * floor
    assert error.ways[-1].startswith("memory_budget=")


def test_more_ranks_of_one_host_have_smaller_shares_of_it() -> None:
    """On 8 ranks and more as on 4: the state of all together, what the backward of one block reads of the global batch
    (its input and the wider result between), and on each rank a weight gathered whole are more than the host has."""
    state, block, weight = 4 * WEIGHTS, 3 * 4 * ROWS * 64 * WIDTH, WEIGHTS // 4
    memory = 5 * state // 2
    assert memory < state + block + 8 * weight
    machine = hardware("cpu")
    host = replace(machine, device=replace(machine.device, memory_bytes=memory, reserve_bytes=0))
    with pytest.raises(NoFeasiblePlanError) as caught:
        compile_plan(program(length=64), on_mesh(host, MESH), (0,), Request(strategy="fsdp"))
    assert not [way for way in caught.value.ways if "ranks" in way]


def test_the_user_is_told_of_a_smaller_batch() -> None:
    """Through the API, which captures the smaller batch."""
    with torch.device("meta"):
        model, x = Blocks(), torch.empty(ROWS // 2, 512, WIDTH)
    roomy = plan_of(model, dict(MESH), {"x": x}, hardware="h100", options=Options(recompute="full"))
    with pytest.raises(NoFeasiblePlanError, match=r"a batch per rank 2 times smaller: .* MiB"):
        plan_of(
            model, dict(MESH), {"x": x}, hardware="h100",
            options=replace(Options(), memory_budget=int(0.75 * roomy.peak_memory_bytes)),
        )  # fmt: skip


@pytest.mark.parametrize("looks", [1, 5, 7])
def test_what_was_not_looked_at_in_time_is_said(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is over after so many looks at it: the first sets the end, the next four are three strategies
    within the budget and ddp without one, and the sixth and seventh, without ddp, are ddp and fsdp, which fits."""
    ticks = count()
    clock = SimpleNamespace(process_time=lambda: 0.0 if next(ticks) < looks else 1e9)
    monkeypatch.setattr(infeasible, "time", clock)
    error = refused(Request(strategy="ddp", budget_bytes=3 * WEIGHTS - 1), smaller=True, length=1)
    text, _, missed = str(error).partition("Not looked at within 60 s of the processor: ")
    assert [name.split(" of ")[0] for name in error.conflict] == ["the memory budget", "strategy='ddp'"]
    assert missed.split("; ") == [
        *(["smaller sets of constraints that may conflict already"] if looks < 5 else []),
        *(["without strategy='ddp'"] if looks < 7 else []),
        "other shapes of the mesh",
        "a smaller batch",
        "more ranks.",
    ]
    assert ("any one less would do" in text) == (looks >= 5)
    assert [way.split(":")[0] for way in error.ways[:-1]] == (["without strategy='ddp'"] if looks == 7 else [])
