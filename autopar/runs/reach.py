"""Up to how many GPUs sharding the state alone is enough, at one global batch.

The more GPUs, the fewer samples each has to hide its gathers behind; with less than one sample each it cannot use them
at all. What a verdict says of the GPUs asked for is checked here on twice, four times as many, or half.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.runs.leads import is_enough
from autopar.runs.waiting import Waiting
from passes.runs.candidate import Either, is_settled, lower_bound, ways_of
from passes.runs.estimate import Profiler
from passes.runs.setup import Setup


@dataclass(frozen=True)
class Times:
    """The fastest step that fits with sharded state alone, and with each other kind of way that splits the model."""

    state_s: float | None = None
    others_s: tuple[float, ...] = ()

    @property
    def enough(self) -> bool:
        """Whether sharded state fits and is chosen."""
        return is_enough(self.state_s, self.others_s)


_HALVINGS = 4
"""So often fewer GPUs are tried."""
_PLAYED = 2
"""So many plans with state sharded over as many ranks are played on each number of GPUs at most: those that may be
fastest."""


@dataclass(frozen=True)
class Reach:
    """`gpus`: the most, by doubling or halving those asked for, on which sharded state alone is enough, and the `times`
    there; `beyond`: the first where it is not, if that is known; None where the batch has no samples for more."""

    gpus: int
    times: Times | None
    beyond: int | None
    times_beyond: Times | None


def reach_up(gpus: int, batch: int, times: Callable[[int], Times]) -> Reach:
    """How far sharding the state alone stays enough with more GPUs than `gpus`, where it is enough.

    Twice as many are looked at, and so on as far as the batch can be divided; which of these is found by bisection.
    """
    counts = _doubled(gpus, batch)
    known: dict[int, Times] = {}
    low, high = -1, len(counts)
    while low + 1 < high:
        middle = high - 1 if high == len(counts) else (low + high) // 2  # the last first: often all of them are
        known[counts[middle]] = times(counts[middle])
        low, high = (middle, high) if known[counts[middle]].enough else (low, middle)
    most = counts[low] if low >= 0 else gpus
    beyond = counts[high] if high < len(counts) else None
    return Reach(most, known.get(most), beyond, known.get(beyond) if beyond else None)


def reach_down(gpus: int, batch: int, node: int, times: Callable[[int], Times]) -> Reach | None:
    """How far sharding the state alone is enough with fewer GPUs than `gpus`, where it is not enough; by halving.

    None where it is enough nowhere, or where none of the other ways that were tried fits on so few GPUs: only those
    that are fastest on `gpus` were, and others may fit.
    """
    count, beyond, past = gpus, gpus, None
    for _ in range(_HALVINGS):
        if count % 2 or (count // 2 > node and count // 2 % node):
            return None
        count //= 2
        if batch % count:
            continue
        here = times(count)
        if here.state_s is None or (not here.others_s and count > 1):
            return None
        if here.enough:
            return Reach(count, here, beyond, past)
        beyond, past = count, here
    return None


def _doubled(gpus: int, batch: int) -> Sequence[int]:
    counts = []
    while batch % (2 * gpus) == 0:
        gpus *= 2
        counts.append(gpus)
    return counts


# -- pricing on other numbers of GPUs ----------------------------------------------------------------------------------


def times_of(
    states: Iterable[Setup], others: Iterable[Setup], profiler: Profiler, budget: int, *, either: Either
) -> Times:
    """Of plans that shard the state alone, and of other setups, on one number of GPUs."""
    waiting = Waiting(states, lambda setup: lower_bound(setup, profiler), budget)
    likely: dict[int, int] = defaultdict(int)
    state_s = math.inf
    for least_s, setup in waiting:
        if least_s >= state_s:
            break
        if likely[setup.dp_shard] < _PLAYED:
            likely[setup.dp_shard] += 1
            ways = list(ways_of(setup, profiler, budget, either))
            state_s = min([state_s, *(each.step_s for each in ways if each.peak_bytes <= budget)])
            if not is_settled(ways, profiler, budget, either):
                waiting.ask_for_more(setup)
    others = list(others)
    plain = _steps_s((each for each in others if each.pp == 1), profiler, budget, either)
    staged = _steps_s((each for each in others if each.pp > 1), profiler, budget, either)
    fastest = tuple(min(steps_s) for steps_s in (plain, staged) if steps_s)
    return Times(None if math.isinf(state_s) else state_s, fastest)


def _steps_s(setups: Iterable[Setup], profiler: Profiler, budget: int, either: Either) -> list[float]:
    """Step times of those that fit, but for plans that cannot be the fastest."""
    found: list[float] = []
    for setup in setups:
        if found and setup.is_played and lower_bound(setup, profiler)[0] >= min(found):
            continue
        found += [each.step_s for each in ways_of(setup, profiler, budget, either) if each.peak_bytes <= budget]
    return found


def on(gpus: int, batch: int, setups: Iterable[Setup]) -> Iterator[Setup]:
    """The setups scaled to `gpus` devices by their number of data-parallel ranks, where that is whole and divides the
    batch.

    Replicas of the state stay as large as they are where the ranks allow it, and micro-batches where a rank has enough
    samples.
    """
    for setup in setups:
        data, rest = divmod(gpus, setup.tp * setup.pp * setup.cp)
        if rest or not data or batch % data or (data * setup.cp * setup.tp) % setup.ep:
            continue
        shard = setup.dp_shard if setup.dp_replicate > 1 and data % setup.dp_shard == 0 else data
        micro = math.gcd(setup.micro_batch, batch // data)
        accumulate = batch // (data * micro)
        yield replace(setup, dp_replicate=data // shard, dp_shard=shard, micro_batch=micro, accumulate=accumulate)
