"""The solver against brute force on small random problems."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from passes.errors import NoFeasiblePlanError
from passes.solver import linear
from passes.solver import solve as solving
from passes.solver.descent import Descent
from passes.solver.messages import Messages
from passes.solver.problem import Flow, Hold, Problem, Reader
from passes.solver.relaxation import Relaxation
from passes.solver.solve import solve


def random_problem(seed: int) -> Problem:
    rng, more = random.Random(seed), random.Random(-1 - seed)
    variables = rng.randint(2, 6)
    counts = [rng.randint(1, 4) for _ in range(variables)]
    seconds = tuple(tuple(rng.choice([0.0, rng.random()]) for _ in range(n)) for n in counts)
    sizes = tuple(tuple(float(rng.randint(0, 9)) for _ in range(n)) for n in counts)
    flows, holds = [], []
    for producer in range(variables - 1):
        readers = tuple(
            Reader(v, tuple(rng.randrange(3) for _ in range(counts[v])))
            for v in rng.choices(range(producer + 1, variables), k=rng.randint(1, 3))
        )
        cost = tuple(
            tuple(0.0 if rng.random() < 0.3 else math.inf if rng.random() < 0.1 else rng.random() for _ in range(3))
            for _ in range(2)
        )
        states = tuple(rng.randrange(2) for _ in range(counts[producer]))
        flows.append(Flow(producer, states, readers, cost, rng.randint(1, 5)))
        given = Reader(producer, tuple(rng.randrange(-1, 3) for _ in range(counts[producer])))
        free = rng.choice([None, given, Reader(readers[0].variable, readers[0].states)])
        sizes_of = tuple(float(rng.randint(0, 5)) for _ in range(3))
        hold = Hold(readers, sizes_of, rng.randint(1, 3), free)
        if more.random() < 0.3:
            rows = tuple(tuple(float(more.randint(0, 5)) for _ in range(3)) for _ in range(2))
            hold = replace(hold, given=Reader(producer, states), rows=rows)
        holds.append(hold)
    budget = rng.choice([math.inf, float(rng.randint(5, 60))])
    return Problem(seconds, sizes, tuple(flows), tuple(holds), budget)


def price(problem: Problem, picks: tuple[int, ...]) -> tuple[float, float]:
    """Cost of `picks`, written without `evaluate`."""
    seconds, size = 0.0, 0.0
    for v, i in enumerate(picks):
        seconds += problem.option_s[v][i]
        size += problem.option_bytes[v][i]
    for flow in problem.flows:
        row = flow.cost_s[flow.states[picks[flow.producer]]]
        for q in range(len(row)):
            if any(r.states[picks[r.variable]] == q for r in flow.readers):
                seconds += flow.count * row[q]
    for hold in problem.holds:
        for q, each in enumerate(hold.state_bytes):
            if hold.rows:
                each = hold.rows[hold.given.states[picks[hold.given.variable]]][q]
            free = not hold.rows and hold.given is not None and hold.given.states[picks[hold.given.variable]] == q
            if not free and any(r.states[picks[r.variable]] == q for r in hold.readers):
                size += hold.count * each
    return seconds, size


@pytest.mark.parametrize(("seed", "few"), [*((s, math.inf) for s in range(300)), *((s, 0.0) for s in range(150))])
def test_solve_finds_the_cheapest_picks(seed: int, few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By linear programs, and as large problems are solved: by messages, and branch and bound within a budget."""
    monkeypatch.setattr(solving, "_FEW", few)
    problem = random_problem(seed)
    all_picks = product(*(range(len(costs)) for costs in problem.option_s))
    fitting = [
        s for s, b in (price(problem, picks) for picks in all_picks) if b <= problem.budget_bytes and s < math.inf
    ]
    if not fitting:
        with pytest.raises(NoFeasiblePlanError):
            solve(problem, gap=0.0)
        return
    found = solve(problem, gap=0.0)
    seconds, size = price(problem, found.picks)
    assert size <= problem.budget_bytes
    assert found.bound_s <= min(fitting) + 1e-9 <= seconds + 2e-9
    assert seconds == pytest.approx(min(fitting), abs=1e-9)
    assert (found.seconds, found.bytes) == pytest.approx((seconds, size))
    assert found.bound_s <= seconds + 1e-9
    assert found.gap <= 1e-6


@pytest.mark.parametrize("seed", range(40))
def test_no_picks_cost_less_than_the_bound_and_the_excess_of_their_options(seed: int) -> None:
    """In three cases: bytes cost nothing much, something, and more with half of a variable's options ruled out."""
    problem = random_problem(seed)
    halved = max(range(len(problem.option_s)), key=lambda v: len(problem.option_s[v]))
    allowed = np.arange(len(problem.option_s[halved])) % 2 == 0
    messages = Messages(problem, prices := [1e-6, 0.1, 0.1])
    messages.load([(messages.state(k), prices[k], {halved: allowed} if k == 2 else {}) for k in range(3)])
    messages.reprice(np.array([1e-6, 0.1, 0.3]))
    every = [(picks, *price(problem, picks)) for picks in product(*(range(len(of)) for of in problem.option_s))]
    for _ in range(2):
        bounds = messages.bound_s
        messages.improve()
        excesses = messages.excess_s()
        for case, price_of_byte in enumerate([1e-6, 0.1, 0.3]):
            cost = {picks: s + price_of_byte * b for picks, s, b in every if case < 2 or allowed[picks[halved]]}
            bound = messages.bound_s[case]
            assert bounds[case] <= bound <= min(cost.values()) + 1e-9
            for variable in range(len(problem.option_s)):
                for option, least in enumerate(excesses[variable][case]):
                    rest = min((s for picks, s in cost.items() if picks[variable] == option), default=math.inf)
                    assert bound + least <= rest + 1e-9


def budgeted_problem(seed: int) -> tuple[Problem, list[float]]:
    """A random problem with a budget, and the seconds of all picks that fit."""
    problem = random_problem(seed)
    budget = problem.budget_bytes if math.isfinite(problem.budget_bytes) else 12.0
    problem = replace(problem, budget_bytes=budget)
    every = (price(problem, picks) for picks in product(*(range(len(of)) for of in problem.option_s)))
    return problem, [seconds for seconds, size in every if size <= budget and math.isfinite(seconds)]


@pytest.mark.parametrize(("seed", "few"), [(seed, few) for seed in range(60) for few in (0.0, math.inf)])
def test_stopped_early_a_solution_fits_and_its_bound_is_one(
    seed: int, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "_FEW", few)
    problem, fitting = budgeted_problem(seed)
    if not fitting:
        with pytest.raises(NoFeasiblePlanError):
            solve(problem, gap=0.05, time_limit_s=0.0)
        return
    found = solve(problem, gap=0.05, time_limit_s=0.0)
    seconds, size = price(problem, found.picks)
    assert size <= problem.budget_bytes
    assert found.bound_s <= min(fitting) + 1e-9 <= seconds + 2e-9


def test_what_is_left_to_highs_counts_in_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of problems that are left to HiGHS at once and taken with a large gap, no bound is above the best there is."""
    monkeypatch.setattr(linear, "_HALVED", 0)
    left = 0
    for seed in range(300):
        problem = replace(random_problem(seed), budget_bytes=math.inf)
        costs = (price(problem, picks)[0] for picks in product(*(range(len(of)) for of in problem.option_s)))
        if math.isfinite(least := min(costs)):
            picks, bound_s = linear.cheapest(problem, gap=0.5, time_limit_s=5.0)
            assert bound_s <= least * (1 + 1e-6) + 1e-9, seed
            left += price(problem, picks)[0] > least * 1.001
    assert left


def test_the_time_of_linear_programs_is_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that gives them no time to run, what is proved is the same."""
    rng = random.Random(0)
    seconds = tuple(tuple(rng.random() for _ in range(6)) for _ in range(60))
    sizes = tuple(tuple(rng.random() for _ in range(6)) for _ in range(60))
    problem = Problem(seconds, sizes, (), (), 12.0)
    clock = iter([0.0] * 10**6)
    monkeypatch.setattr(linear.time, "process_time", lambda: next(clock))
    proved = solve(problem, gap=1e-9, time_limit_s=1e-9)
    assert proved.gap <= 1e-9
    clock = iter(float(second) for second in range(10**6))
    stopped = solve(problem, gap=1e-9, time_limit_s=1.0)
    assert stopped.gap > 1e-9
    assert stopped.bound_s <= proved.seconds <= stopped.seconds


def test_many_ops_with_few_ways_between_them_need_no_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long chain, whose cheapest picks dynamic programming finds: messages would visit every link again and again."""
    rng = np.random.default_rng(0)
    own, change = rng.random((320, 10)), rng.random((10, 10))
    states = tuple(range(10))
    cost_s = tuple(map(tuple, change.tolist()))
    flows = tuple(Flow(v, states, (Reader(v + 1, states),), cost_s) for v in range(len(own) - 1))
    problem = Problem(tuple(map(tuple, own.tolist())), ((0.0,) * 10,) * len(own), flows)
    least = own[0]
    for each in own[1:]:
        least = (least[:, None] + change).min(axis=0) + each
    monkeypatch.setattr(solving, "Messages", None)
    found = solve(problem)
    assert found.seconds == pytest.approx(least.min())
    assert found.gap <= 1e-9


@pytest.mark.parametrize(("seed", "limit_s"), [(0, 60.0), (1, 60.0), (2, 60.0), (3, 1e-3)])
def test_where_everything_depends_on_everything_highs_branches(
    seed: int, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of 12 variables want to differ, which two options each do not allow: half of each costs nothing."""
    rng = random.Random(seed)
    flows = []
    for one in range(12):
        for other in range(one + 1, 12):
            cost = rng.random()
            flows.append(Flow(one, (0, 1), (Reader(other, (0, 1)),), ((cost, 0.0), (0.0, cost))))
    problem = Problem(((0.0, 0.0),) * 12, ((0.0, 0.0),) * 12, tuple(flows))
    asked: list[float] = []
    plan = Relaxation.plan
    monkeypatch.setattr(Relaxation, "plan", lambda *given: asked.append(given[1]) or plan(*given))
    found = solve(problem, time_limit_s=limit_s)
    least = min(price(problem, picks)[0] for picks in product((0, 1), repeat=12))
    assert found.bound_s <= least * (1 + 1e-9)
    assert found.seconds == pytest.approx(price(problem, found.picks)[0])
    if limit_s == 60.0:
        assert asked == [linear._HALVED_GAP]
        assert found.seconds <= least * (1 + 1.01 * linear._HALVED_GAP)
        assert found.gap <= linear._HALVED_GAP


def test_messages_solve_a_chain_in_one_pass() -> None:
    """Two states, changing costs 1; the ends want different states, the middle does not care."""
    change = ((0.0, 1.0), (1.0, 0.0))
    flows = tuple(Flow(v, (0, 1), (Reader(v + 1, (0, 1)),), change) for v in range(5))
    problem = Problem(((0.0, 9.0), *[(0.5, 0.5)] * 4, (9.0, 0.0)), ((0.0, 0.0),) * 6, flows)
    messages = Messages(problem)
    messages.improve()
    assert messages.bound_s[0] == pytest.approx(3.0)
    assert price(problem, messages.picks()[0])[0] == pytest.approx(3.0)


def with_more_between(problem: Problem, seed: int) -> Problem:
    """Further tensors from the same ops to one of their readers, in the same states, with other costs."""
    rng = random.Random(seed)
    more = []
    for flow in problem.flows:
        cost = tuple(tuple(rng.choice([0.0, rng.random()]) for _ in row) for row in flow.cost_s)
        more += [replace(flow, readers=flow.readers[-1:], cost_s=cost, count=n) for n in (1, 2)]
    return replace(problem, flows=(*problem.flows, *more))


@pytest.mark.parametrize(("seed", "few"), [(seed, few) for seed in range(80) for few in (0.0, math.inf)])
def test_tensors_that_go_the_same_way_are_each_paid_for(seed: int, few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "_FEW", few)
    problem = with_more_between(random_problem(seed), seed)
    all_picks = product(*(range(len(costs)) for costs in problem.option_s))
    fitting = [s for s, b in (price(problem, picks) for picks in all_picks) if b <= problem.budget_bytes]
    if not any(map(math.isfinite, fitting)):
        with pytest.raises(NoFeasiblePlanError):
            solve(problem, gap=0.0)
        return
    found = solve(problem, gap=0.0)
    assert price(problem, found.picks) == pytest.approx((found.seconds, found.bytes))
    assert found.seconds == pytest.approx(min(fitting), abs=1e-9)
    assert found.bound_s <= min(fitting) + 1e-9


EQUAL, UNEQUAL = ((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))


@pytest.mark.parametrize("kept", [False, True])
def test_what_goes_between_the_same_two_ops_is_bounded_together(kept: bool) -> None:
    """Of two tensors one costs 1 where the states are equal, the other where they are not: each plan costs 1. A mix of
    both states has either for nothing, but not both. The second may be what is kept: 4 bytes, of which one is there."""
    reader = Reader(1, (0, 1))
    flows = [Flow(0, (0, 1), (reader,), EQUAL)]
    if not kept:
        flows.append(Flow(0, (0, 1), (reader,), UNEQUAL))
    holds = (Hold((reader,), (0.0, 0.0), given=Reader(0, (0, 1)), rows=((0.0, 4.0), (4.0, 0.0))),) if kept else ()
    budget = 1.0 if kept else math.inf
    problem = Problem(((0.0, 0.0),) * 2, ((0.0, 0.0),) * 2, tuple(flows), holds, budget)
    mix = Relaxation(problem).among([np.ones(2, dtype=bool)] * 2)
    assert mix is not None
    assert mix.seconds == pytest.approx(0.75 if kept else 1.0)
    messages = Messages(problem, [0.25] if kept else [0.0])
    messages.improve()
    assert messages.bound_s[0] == pytest.approx(1.0)


@pytest.mark.parametrize(("seed", "few"), [(seed, few) for seed in range(60) for few in (0.0, math.inf)])
def test_where_nothing_is_cheaper_than_what_is_known_that_is_told(
    seed: int, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solving, "_FEW", few)
    problem, fitting = budgeted_problem(seed)
    if not fitting:
        with pytest.raises(NoFeasiblePlanError):
            solve(problem, gap=0.0, below_s=1.0)
        return
    least = min(fitting)
    assert solve(problem, gap=0.0, below_s=1.01 * least + 1e-6).seconds == pytest.approx(least, abs=1e-9)
    if least > 1e-3:
        with pytest.raises(NoFeasiblePlanError, match="costs less than"):
            solve(problem, gap=0.0, below_s=0.99 * least)


@pytest.mark.parametrize("seed", range(80))
def test_within_other_bytes_a_problem_starts_where_it_ended(seed: int) -> None:
    """Fewer and fewer bytes, and then more again."""
    problem, _ = budgeted_problem(seed)
    near = linear.Near()
    for factor in (1.5, 1.0, 0.8, 0.6, 0.9, 2.0):
        within = replace(problem, budget_bytes=factor * problem.budget_bytes)
        every = (price(within, picks) for picks in product(*(range(len(of)) for of in within.option_s)))
        fitting = [seconds for seconds, size in every if size <= within.budget_bytes and math.isfinite(seconds)]
        if not fitting:
            with pytest.raises(NoFeasiblePlanError):
                solve(within, gap=0.0, near=near)
            continue
        found = solve(within, gap=0.0, near=near)
        assert found.seconds == pytest.approx(min(fitting), abs=1e-9)
        assert price(within, found.picks)[1] <= within.budget_bytes


@pytest.mark.parametrize(("seed", "few"), [(seed, few) for seed in range(40) for few in (0.0, math.inf)])
def test_what_is_known_is_not_lost(seed: int, few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without time, the picks given are what is found, unless it is cheaper; picks that do not fit are not."""
    monkeypatch.setattr(solving, "_FEW", few)
    problem, fitting = budgeted_problem(seed)
    every = list(product(*(range(len(of)) for of in problem.option_s)))
    if not fitting:
        return
    best = min(every, key=lambda p: price(problem, p)[0] if price(problem, p)[1] <= problem.budget_bytes else math.inf)
    over = [picks for picks in every if price(problem, picks)[1] > problem.budget_bytes]
    found = solve(problem, gap=0.0, time_limit_s=0.0, known=[best, *over[:1]])
    assert found.seconds == pytest.approx(min(fitting), abs=1e-9)
    assert price(problem, found.picks)[1] <= problem.budget_bytes


def test_what_an_option_adds_is_counted_again_once_something_beside_it_moves() -> None:
    """Of picks that steps led to: what each variable is held to add, option by option, is how the price of the whole
    plan differs with that option."""
    looked_at = 0
    for seed in range(40):
        problem, _ = budgeted_problem(seed)
        descent = Descent(problem)
        rng = random.Random(seed)
        picks = descent.within_budget([rng.randrange(len(costs)) for costs in problem.option_s], 0.3)
        for variable, known in enumerate(descent._known):
            if known is None or variable == len(picks):
                continue
            every = [price(problem, (*picks[:variable], i, *picks[variable + 1 :])) for i in range(len(known[0]))]
            for option in (i for i, (seconds, _) in enumerate(every) if math.isfinite(seconds)):
                seconds, size = (np.array(of)[option] - np.array(of)[picks[variable]] for of in known)
                assert size == pytest.approx(every[option][1] - every[picks[variable]][1])
                if math.isfinite(every[picks[variable]][0]):
                    assert seconds == pytest.approx(every[option][0] - every[picks[variable]][0])
                looked_at += 1
    assert looked_at > 100
