"""Solutions that fit: which ways to save memory are looked at and for how long, and that the chosen one is proved."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from small_models import build

from passes.capture.capture import capture
from passes.padding.paddings import PaddingsOf
from passes.planner import fitting, pipeline, proposals
from passes.planner.fitting import Candidate, Enough, Posed, Request, best, looked_at_longer
from passes.planner.pipeline import compile_plan, on_mesh, prepare
from passes.planner.proposals import Search
from passes.price.price import price
from passes.solver.solve import solve

MESH = on_mesh("h100", (("dp", 2), ("tp", 2)))
FOUR = on_mesh("h100", (("dp", 1), ("tp", 4)))


program = lru_cache(small_models.program_of)


@lru_cache
def peak() -> int:
    """Bytes of the plan that no budget binds."""
    return compile_plan(program(), MESH, (0,), Request()).peak_memory_bytes


@lru_cache
def gpt2_peak() -> int:
    """The same of GPT-2 on four tensor-parallel ranks."""
    return compile_plan(program("gpt2"), FOUR, (0,), Request()).peak_memory_bytes


def search(share: float, **how: Any) -> Search:
    """Within a share of what the plan without a budget takes; one proposal of each kind, no activations gathered
    again."""
    paddings = PaddingsOf(program(), MESH.sizes, (0,))
    return Search(paddings, MESH, (0,), Request(regather=False), int(share * peak()), most=1, **how)


@lru_cache
def binding(share: float) -> list[Candidate]:
    """Candidates that were solved within fewer bytes, and fit."""
    found = search(share).candidates("auto")
    budget = share * peak()
    fit = [c for c in found if c.schedule.peak_memory_bytes <= budget and math.isfinite(c.origin.limit_bytes)]
    assert fit
    return fit


def test_what_was_not_proved_is_looked_at_longer() -> None:
    """Of a candidate whose proof is thrown away: the gap that is told then holds against the solver asked for nothing
    less than the optimum."""
    chosen = binding(0.7)[0]
    origin = chosen.origin
    unproved = replace(chosen, origin=replace(origin, solution=replace(origin.solution, bound_s=0.0)))
    assert not unproved.origin.solution.is_proved
    found = looked_at_longer(unproved, Request(), 0.7 * peak())
    solution = found[-1].origin.solution
    assert found[-1].assignment == chosen.assignment
    assert solution.is_proved
    assert solution.gap < 0.01
    costs = price(replace(chosen.space, recomputed=origin.recomputed))
    best = solve(costs.weighed(origin.share, origin.limit_bytes), gap=0.0, time_limit_s=60.0)
    assert solution.bound_s <= best.seconds * (1 + 1e-9)
    assert best.seconds <= solution.seconds * (1 + 1e-9)


def test_a_bound_within_a_budget_says_so() -> None:
    chosen = binding(0.7)[0]
    bound = pipeline._bound(chosen, 1)
    costs = price(replace(chosen.space, recomputed=chosen.origin.recomputed))
    assert solve(costs.weighed(chosen.origin.share)).seconds < bound.bound_s
    assert "KiB as the solver adds bytes up" in bound.among


def test_a_cheaper_solution_that_fits_comes_first() -> None:
    """One that is solved within fewer bytes than it may take is behind what these allow."""
    tight, loose = binding(0.6)[0], binding(0.8)
    (like,) = [c for c in loose if (c.origin.share, c.recompute) == (tight.origin.share, tight.recompute)][:1] or [None]
    assert like is not None
    assert tight.origin.solution.seconds > like.origin.solution.seconds
    limit = like.origin.limit_bytes
    worse = replace(tight.origin, limit_bytes=limit, solution=replace(tight.origin.solution, bound_s=0.0))
    found = looked_at_longer(replace(tight, origin=worse), Request(), 0.8 * peak())
    assert len(found) == 2
    assert found[0].schedule.peak_memory_bytes <= 0.8 * peak()
    assert found[0].origin.solution.seconds < found[1].origin.solution.seconds
    assert found[0].origin.solution.is_proved
    assert found[1].assignment == tight.assignment


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_plan_within_a_budget_is_proved_however_little_time_each_of_many_has(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bound is known of what was solved first, as the solver was stopped; that of the chosen one is."""

    def stopped(problem: Any, gap: float = 0.0, **how: Any) -> Any:
        if gap == fitting.PROVED_GAP:
            return solve(problem, gap=gap, **how)
        return replace(solve(problem, **how), bound_s=0.0)

    monkeypatch.setattr(fitting, "solve", stopped)
    within = Request(strategy=strategy, budget_bytes=int(0.7 * peak()), regather=False)
    plan = compile_plan(program(), MESH, (0,), within)
    assert plan.peak_memory_bytes <= 0.7 * peak()
    assert plan.bound.gap < 0.01
    assert not any("not looked at" in note for note in plan.notes)


def test_after_its_time_a_search_stops_where_something_fits() -> None:
    """And says what it left out: all but what it looked at first, whose numbers are those of a search with time."""
    fast = compile_plan(program(), MESH, (0,), Request(strategy="fsdp", budget_bytes=int(0.7 * peak()))).step_time_s
    patient, hurried = search(0.7, fastest_s=fast), search(0.7, fastest_s=fast, budgeted_s=0.0)
    every, some = patient.candidates("auto"), hurried.candidates("auto")
    assert not patient.missed
    assert set(hurried.missed) <= {f"recompute {mode!r}" for mode in ("selective", "widening", "full")}
    assert "recompute 'full'" in hurried.missed
    assert {c.recompute for c in some} == {"pointwise"} < {c.recompute for c in every}
    assert {c.assignment for c in some} <= {c.assignment for c in every}


def test_further_solutions_that_there_was_no_time_for_are_named_too() -> None:
    free, bound = (replace(search(share, budgeted_s=0.0, fastest_s=1.0), most=3) for share in (1.0, 0.7))
    free.candidates("auto")
    bound.candidates("auto")
    assert not free.missed
    assert bound.missed[0] == "further solutions with recompute 'pointwise'"


def test_without_anything_that_fits_it_goes_on_unless_it_gives_up() -> None:
    on, up = search(0.2, budgeted_s=0.0), search(0.2, budgeted_s=0.0, gives_up=True)
    every, first = on.candidates("auto"), up.candidates("auto")
    assert all(c.schedule.peak_memory_bytes > on.budget for c in every)
    assert not on.missed
    assert {c.recompute for c in every} > {c.recompute for c in first} == {"pointwise"}
    assert "recompute 'full'" in up.missed


def test_a_plan_names_what_there_was_no_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    within = Request(budget_bytes=int(0.7 * peak()), regather=False)
    told = "not looked at after 0 s of the processor: "
    monkeypatch.setattr(pipeline, "Search", partial(Search, budgeted_s=0.0))
    (note,) = (note for note in compile_plan(program(), MESH, (0,), within).notes if told in note)
    left_out = note.partition(told)[2].split(", ")
    assert "recompute 'full'" in left_out
    assert len(left_out) == len(set(left_out))


def test_nothing_is_looked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that computes nothing again that the one before does not is the same problem, and so are dims that are
    left as they are once another choice of them is left out. GPT-2's vocabulary is uneven over four ranks."""
    asked: Counter[Any] = Counter()

    def counted(posed: Posed, share: float, enough: Enough) -> Candidate | None:
        recomputed = posed.space.recomputed
        asked[posed.joined, posed.padding.pads, recomputed.held, recomputed.again, recomputed.regather, share] += 1
        return fitting.fitting(posed, share, enough)

    budget = int(0.8 * gpt2_peak())
    monkeypatch.setattr(proposals, "fitting", counted)
    paddings = PaddingsOf(program("gpt2"), FOUR.sizes, (0,))
    Search(paddings, FOUR, (0,), Request(), budget, most=1).candidates("auto")
    assert len({pads for _, pads, *_ in asked}) > 1
    assert set(asked.values()) == {1}


@pytest.mark.parametrize(
    ("counted", "peaks", "slope"),
    [((100.0, 60.0), (200, 160), 1.0), ((100.0, 60.0), (200, 180), 0.5), ((100.0, 60.0), (200, 199), 0.3),
     ((100.0, 60.0), (200, 100), 1.0), ((60.0, 60.0), (200, 180), 1.0)],
)  # fmt: skip
def test_how_much_less_the_solver_may_count_for_a_lower_peak(
    counted: tuple[float, float], peaks: tuple[int, int], slope: float
) -> None:
    before, last = (
        SimpleNamespace(
            origin=SimpleNamespace(solution=SimpleNamespace(bytes=size)),
            schedule=SimpleNamespace(peak_memory_bytes=peak_bytes),
        )
        for size, peak_bytes in zip(counted, peaks, strict=True)
    )
    assert fitting._slope(before, last) == pytest.approx(slope)  # type: ignore[arg-type]
    assert fitting._slope(None, last) == 1.0  # type: ignore[arg-type]


def test_with_uneven_dims_what_backward_computes_again_is_chosen_with_and_without_padding() -> None:
    """`auto` may compute again what `widening` does, so it is no slower than what was asked for that, which pads no
    dim. It was 1.07 times as slow where padded dims fit while less is computed again."""
    model, _, inputs = build("gpt2")
    twice = {name: torch.cat([each, each]) for name, each in inputs.items()}
    mesh = on_mesh("h100", (("dp", 2), ("tp", 3)))
    paddings = PaddingsOf(prepare(capture(model, (), twice, batch_dims=[0, 0], batch_size=16)), mesh.sizes, (0,))

    def fastest(budget: float, **asked: Any) -> Candidate:
        request = Request(regather=False, **asked)
        chosen = best(Search(paddings, mesh, (0,), request, budget, most=1).candidates("auto"), budget)
        assert chosen is not None
        return chosen

    budget = 0.8 * fastest(math.inf).schedule.peak_memory_bytes
    asked = fastest(budget, recompute="widening")
    assert not asked.padding.pads
    assert fastest(budget).schedule.step_time_s <= asked.schedule.step_time_s * 1.008


def test_kept_parameters_are_solved_for_as_the_fastest_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of solutions with parameters freed, which keep them as played: as the fastest of those computes again, and the
    chosen one where it is such. They may be too large, which those solved with parameters kept need not be. Where none
    of them is as fast as the chosen one, once, as that computes again."""
    found = next(iter(binding(0.7)))

    def candidate(seconds: float, recompute: str, *, kept: bool) -> Candidate:
        recomputed = replace(found.space.recomputed, mode=recompute, reshard=not kept, regather=False)  # type: ignore[arg-type]
        space, schedule = replace(found.space, recomputed=recomputed), replace(found.schedule, step_time_s=seconds)
        return replace(found, strategy="auto", space=space, schedule=schedule)

    chosen = candidate(3.0, "full", kept=False)
    stays = candidate(3.0, "full", kept=True)
    too_large = [candidate(2.0, "widening", kept=True), candidate(1.0, "pointwise", kept=True)]
    slower = candidate(4.0, "selective", kept=True)
    asked: list[tuple[bool | None, float, object]] = []
    counted: list[object] = []

    def solved(
        self: Search, name: str, paddings: object, pads: object, shares: object, ways: object
    ) -> list[Candidate]:
        asked.append((self.request.reshard, self.fastest_s, ways))
        counted.append(shares)
        return too_large[:1]

    monkeypatch.setattr(Search, "_solved", solved)
    assert search(0.7).keeping(chosen, [chosen, slower]) == too_large[:1]
    assert search(0.7).keeping(chosen, [chosen, *too_large, slower]) == too_large[:1]
    search(0.7).keeping(stays, [stays, *too_large, slower])
    of_chosen, of_fastest = ("full", False), ("pointwise", False)
    assert asked == [(False, 3.0, ways) for ways in ([of_chosen], [of_fastest], [of_fastest, of_chosen])]
    assert counted == [(1.0,), None, None]
