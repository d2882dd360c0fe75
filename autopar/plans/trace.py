"""The predicted step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Streams are threads, an op or a collective is a slice with its module and source line, memory by kind is a counter.
"""

from __future__ import annotations

import json
from typing import Any

from passes.plan.plan import Plan
from passes.play.timeline import Timeline, memory_over_time, moments

_PREDICTED = 1
_MOST_SAMPLES = 2000


def trace_json(plan: Plan) -> str:
    """The trace of one micro-batch and the optimizer's update, in Chrome's trace event format.

    Raises:
        ValueError: the plan has no timeline, as one read from a file has none.
    """
    if plan.timeline is None:
        raise ValueError(
            "a plan read from a file has no timeline; make it again with `autopar plan MODEL --from PLAN --trace FILE`"
        )
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": trace_events(plan, plan.timeline)})


def trace_events(plan: Plan, timeline: Timeline) -> list[dict[str, Any]]:
    """The slices, the counter, and the names of the streams."""
    process = f"predicted: {plan.strategy} on " + ", ".join(f"{name}={size}" for name, size in plan.axes)
    if plan.accumulate > 1:
        process += f", one of {plan.accumulate} micro-batches"
    found = [_named("process_name", 0, process)]
    threads = {stream: number for number, stream in enumerate(timeline.streams, 1)}
    for stream, number in threads.items():
        found.append(_named("thread_name", number, stream if stream == "compute" else f"communication: {stream}"))
        found.append({**_named("thread_sort_index", number, ""), "args": {"sort_index": number}})
    for event in timeline.events:
        told = {"phase": event.phase, "module": event.module, "source": event.source}
        if event.bytes:
            told["bytes"] = str(event.bytes)
        found.append(
            _slice(
                event.name,
                event.kind,
                threads[event.stream],
                event.start_s,
                event.end_s,
                {k: v for k, v in told.items() if v},
            )
        )
    update = timeline.end_s, timeline.end_s + timeline.optimizer_s
    found.append(_slice("optimizer's update", "optimizer", threads["compute"], *update, {}))
    at_s = moments(timeline, _MOST_SAMPLES)
    series = memory_over_time(timeline, at_s)
    for index, moment in enumerate(at_s):
        sizes = {kind: sizes[index] for kind, sizes in series.items()}
        found.append({"ph": "C", "pid": _PREDICTED, "name": "memory, bytes", "ts": moment * 1e6, "args": sizes})
    return found


def _slice(name: str, kind: str, thread: int, start_s: float, end_s: float, told: dict[str, str]) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": _PREDICTED,
        "tid": thread,
        "name": name,
        "cat": kind,
        "ts": start_s * 1e6,
        "dur": (end_s - start_s) * 1e6,
        "args": told,
    }


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PREDICTED, "tid": thread, "name": what, "args": {"name": name}}
