"""Setups in turn, against all of them bounded and sorted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.runs.waiting import TooLarge, Waiting
from passes.runs.setup import Setup
from passes.space.recompute import Mode

MODES: tuple[Mode, ...] = ("pointwise", "widening", "full")
SETUPS = [Setup(micro_batch=micro, recompute=mode) for micro in (1, 2, 4) for mode in MODES]


def bound(setup: Setup) -> tuple[float, float]:
    """The more is computed again, the longer it takes and the less memory; larger micro-batches are faster, larger."""
    more = MODES.index(setup.recompute)
    return 10.0 + more - setup.micro_batch, 8.0 * setup.micro_batch / 2**more


@pytest.mark.parametrize("budget", [1.0, 4.0, 8.0, 16.0, 100.0])
def test_the_first_of_each_that_may_fit_come_in_turn(budget: float) -> None:
    asked: list[Setup] = []

    def noted(setup: Setup) -> tuple[float, float]:
        asked.append(setup)
        return bound(setup)

    waiting = Waiting(SETUPS, noted, budget)
    came = list(waiting)
    firsts = [
        next(s for s in SETUPS if s.micro_batch == micro and bound(s)[1] <= budget)
        for micro in (1, 2, 4)
        if any(s.micro_batch == micro and bound(s)[1] <= budget for s in SETUPS)
    ]
    assert came == sorted(((bound(s)[0], s) for s in firsts), key=lambda each: each[0])
    large = {s for s in SETUPS if bound(s)[1] > budget}
    smaller = {s: [t for t in large if t.recompute == s.recompute and t.micro_batch < s.micro_batch] for s in large}
    assert {s for _, _, s in waiting.too_large} == {s for s in large if not smaller[s]}
    assert set(asked) == {s for _, s in came} | {s for _, _, s in waiting.too_large}


def test_what_computes_more_comes_where_it_is_asked_for() -> None:
    """In its turn: behind what was there before and takes less."""
    waiting = Waiting(SETUPS, bound, 100.0)
    came = []
    for seconds, setup in waiting:
        came.append((seconds, setup.micro_batch, setup.recompute))
        if setup.micro_batch == 4:
            waiting.ask_for_more(replace(setup, recompute="full"))
    assert came == [
        (6.0, 4, "pointwise"), (7.0, 4, "widening"), (8.0, 2, "pointwise"), (8.0, 4, "full"), (9.0, 1, "pointwise"),
    ]  # fmt: skip


@pytest.mark.parametrize("order", [(1, 2, 4), (4, 1, 2)])
def test_larger_micro_batches_than_one_that_does_not_fit_do_not_either(order: tuple[int, ...]) -> None:
    """Of setups that are alike but for that, in whichever order they are met."""
    full, none = (Setup(micro_batch=2, recompute=mode) for mode in ("full", "none"))
    larger = TooLarge()
    for micro in order:
        if micro != 1:
            larger.note(replace(full, micro_batch=micro, accumulate=8 // micro))
    covered = [larger.covers(replace(full, micro_batch=micro, accumulate=8 // micro)) for micro in (1, 2, 4, 8)]
    assert covered == [False, False, True, True]
    assert not any(larger.covers(replace(other, micro_batch=8)) for other in (none, replace(full, tp=2)))
