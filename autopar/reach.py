"""Up to how many GPUs sharding the state alone is enough, at one global batch.

The more GPUs, the fewer samples each has to hide its gathers behind; with less than one sample each it cannot use them
at all. What a verdict says of the GPUs asked for is checked here on twice, four times as many, or half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from passes.candidate import Profiler, estimate, lower_bound
from passes.setup import Setup

Times = tuple[float | None, float | None]
"""Seconds of the fastest step that fits with sharded state alone, and with anything else that splits the model."""

_HALVINGS = 4
"""So often fewer GPUs are tried."""
_PLAYED = 2
"""So many plans with sharded state are played on each number of GPUs: those that may be fastest."""


@dataclass(frozen=True)
class Reach:
    """`gpus`: the most, by doubling or halving those asked for, on which sharded state alone is enough, and the `times`
    there; `beyond`: the first where it is not, if that is known; None where the batch has no samples for more."""

    gpus: int
    times: Times | None
    beyond: int | None
    times_beyond: Times | None


def reach_up(gpus: int, batch: int, times: Callable[[int], Times], enough: float) -> Reach:
    """From `gpus`, where it is enough, to twice as many and on, as far as the batch goes; by bisection."""
    counts = _doubled(gpus, batch)
    known: dict[int, Times] = {}
    low, high = -1, len(counts)
    while low + 1 < high:
        middle = high - 1 if high == len(counts) else (low + high) // 2  # the last first: often all of them are
        known[counts[middle]] = times(counts[middle])
        low, high = (middle, high) if is_enough(known[counts[middle]], enough) else (low, middle)
    most = counts[low] if low >= 0 else gpus
    beyond = counts[high] if high < len(counts) else None
    return Reach(most, known.get(most), beyond, known.get(beyond) if beyond else None)


def reach_down(gpus: int, batch: int, node: int, times: Callable[[int], Times], enough: float) -> Reach | None:
    """From `gpus`, where it is not enough, to half as many and on; None where it is not there either."""
    count, beyond, past = gpus, gpus, None
    for _ in range(_HALVINGS):
        if count % 2 or (count // 2 > node and count // 2 % node):
            return None
        count //= 2
        if batch % count:
            continue
        here = times(count)
        if here[0] is None:
            return None
        if is_enough(here, enough):
            return Reach(count, here, beyond, past)
        beyond, past = count, here
    return None


def is_enough(times: Times, enough: float) -> bool:
    """Whether sharded state fits, and is slower than the fastest other way by at most `enough` of it."""
    state_s, other_s = times
    return state_s is not None and (other_s is None or state_s <= other_s * (1 + enough))


def _doubled(gpus: int, batch: int) -> Sequence[int]:
    counts = []
    while batch % (2 * gpus) == 0:
        gpus *= 2
        counts.append(gpus)
    return counts


# -- pricing on other numbers of GPUs ----------------------------------------------------------------------------------


def times_of(states: Iterable[Setup], others: Iterable[Setup], profiler: Profiler, budget: int) -> Times:
    """Of plans that shard the state alone, and of other setups, on one number of GPUs."""
    bounded = sorted((lower_bound(setup, profiler), i, setup) for i, setup in enumerate(states))
    state_s = math.inf
    for _, _, setup in [each for each in bounded if each[0][1] <= budget][:_PLAYED]:
        if (found := estimate(setup, profiler)).peak_bytes <= budget:
            state_s = min(state_s, found.step_s)
    found_others = [estimate(setup, profiler) for setup in others]
    other_s = min((each.step_s for each in found_others if each.peak_bytes <= budget), default=math.inf)
    return state_s if state_s < math.inf else None, other_s if other_s < math.inf else None


def on(gpus: int, batch: int, setups: Iterable[Setup]) -> Iterator[Setup]:
    """The setups with so many data-parallel ranks that they take `gpus`, where these divide the batch."""
    for setup in setups:
        data, rest = divmod(gpus, setup.tp * setup.pp * setup.cp)
        if rest or not data or setup.dp_replicate > 1 or batch % (data * setup.micro_batch):
            continue
        yield replace(setup, dp_shard=data, accumulate=batch // (data * setup.micro_batch))
