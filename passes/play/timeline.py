"""A step as it was played on one rank: what ran when on each stream, and what was in memory.

Kept beside a plan that was just made, for drawings and traces; a plan's file does not have it.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.memory import Buffer
from passes.play.clocks import Event
from passes.play.schedule import Schedule

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")


@dataclass(frozen=True)
class Timeline:
    """One micro-batch and the update after the last; seconds from its start."""

    events: tuple[Event, ...]
    buffers: tuple[Buffer, ...]
    end_s: float
    """Of the micro-batch."""
    optimizer_s: float
    granularity_bytes: int = 1
    """What the allocator rounds to."""

    @property
    def streams(self) -> tuple[str, ...]:
        """`compute` and the mesh axes that communicate, compute first."""
        names = dict.fromkeys(event.stream for event in self.events)
        return ("compute", *(name for name in names if name != "compute"))


def timeline_of(schedule: Schedule, granularity_bytes: int) -> Timeline:
    """The timeline of a step that was played with `events=True`."""
    events = sorted(schedule.events, key=lambda event: (event.start_s, event.stream))
    return Timeline(
        tuple(events), schedule.memory.buffers, schedule.micro_batch_s, schedule.optimizer_s, granularity_bytes
    )


def merged(events: Iterable[Event], closer_s: float) -> list[tuple[float, float]]:
    """(start, end) of the events with gaps shorter than `closer_s` closed, in order."""
    found: list[list[float]] = []
    for event in events:
        if found and event.start_s <= found[-1][1] + closer_s:
            found[-1][1] = max(found[-1][1], event.end_s)
        else:
            found.append([event.start_s, event.end_s])
    return [(start, end) for start, end in found]


def layer_of(module: str) -> str:
    """The innermost numbered module that `module` is first in: `model.layers.3`; "" where there is none."""
    match = _LAYER.match(module)
    return match[0] if match else ""


def layer_span(timeline: Timeline, phase: str) -> tuple[str, float, float] | None:
    """A layer in the middle of a phase, and when its ops run; None where no layer repeats."""
    spans: dict[str, list[float]] = {}
    for event in timeline.events:
        if event.stream == "compute" and event.phase == phase and (layer := layer_of(event.module)):
            span = spans.setdefault(layer, [event.start_s, event.end_s])
            span[1] = event.end_s
    if len(spans) < 2:
        return None
    layer, (start, end) = list(spans.items())[len(spans) // 2]
    return layer, start, end


# -- memory ------------------------------------------------------------------------------------------------------------


def moments(timeline: Timeline, most: int = 400) -> list[float]:
    """Births of tensors at which memory peaks locally: the highest of each of `most` equal stretches of the step."""
    total = _alive(timeline, lambda buffer: "")[0]
    births = sorted({buffer.birth for buffer in timeline.buffers})
    alive = total[""](births)
    best: dict[int, tuple[float, float]] = {}
    scale = most / timeline.end_s if timeline.end_s else 0.0
    for moment, size in zip(births, alive, strict=True):
        place = int(moment * scale)
        if place not in best or size > best[place][1]:
            best[place] = (moment, size)
    return [moment for moment, _ in (best[place] for place in sorted(best))]


def memory_over_time(
    timeline: Timeline, at_s: Sequence[float], by: Callable[[Buffer], str] = lambda buffer: buffer.kind
) -> dict[str, list[int]]:
    """Bytes alive at the moments `at_s`, per kind of tensor (or whatever `by` names), the largest first."""
    series, peak = _alive(timeline, by)
    order = sorted(series, key=lambda name: -peak[name])
    return {name: [int(size) for size in series[name](at_s)] for name in order}


def top_names(timeline: Timeline, most: int) -> list[str]:
    """Names of the tensors (alike ones of repeated layers together) that take the most bytes at some moment."""
    _, peak = _alive(timeline, lambda buffer: buffer.name)
    return sorted(peak, key=lambda name: -peak[name])[:most]


def _alive(
    timeline: Timeline, by: Callable[[Buffer], str]
) -> tuple[dict[str, Callable[[Sequence[float]], np.ndarray]], dict[str, float]]:
    """Per group, a function from moments to bytes alive then (births and deaths included), and the group's peak."""
    births: dict[str, list[tuple[float, int]]] = defaultdict(list)
    deaths: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for buffer in timeline.buffers:
        size = buffer.taken(timeline.granularity_bytes)
        births[by(buffer)].append((buffer.birth, size))
        if buffer.death is not None:
            deaths[by(buffer)].append((buffer.death, size))
    found = {name: _series(births[name], deaths[name]) for name in births}
    peaks = {name: float(max(found[name](sorted({at for at, _ in births[name]})), default=0.0)) for name in births}
    return found, peaks


def _series(
    births: list[tuple[float, int]], deaths: list[tuple[float, int]]
) -> Callable[[Sequence[float]], np.ndarray]:
    births, deaths = sorted(births), sorted(deaths)
    come, gone = (np.concatenate(([0], np.cumsum([size for _, size in part]))) for part in (births, deaths))
    born, died = [at for at, _ in births], [at for at, _ in deaths]

    def at(times: Sequence[float]) -> np.ndarray:
        came = [bisect.bisect_right(born, time) for time in times]
        left = [bisect.bisect_left(died, time) for time in times]
        sizes: np.ndarray = come[came] - gone[left]
        return sizes

    return at
