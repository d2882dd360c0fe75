"""A measured step: a torch.profiler trace, added up by the kinds that the cost model prices.

    a GPU's trace   kernels on all streams; collectives by their NCCL kernels
    a CPU's trace   ops of the training thread, each without what it calls; collectives on the backend's own threads

Steps are `ProfilerStep#N` marks (`profiler.step()`); a trace without them is one step. All seconds are of one step.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from costmodel.files import read_json

COMPUTE = ("matmul", "attention", "other")
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
KINDS = (*COMPUTE, *COLLECTIVES, "optimizer")

_MATMUL_OP = re.compile(
    r"^aten::(mm|addmm|bmm|baddbmm|mv|addmv|_grouped_mm|_scaled_mm|mkldnn_\w*linear\w*)$|^mkldnn::_linear_pointwise$|"
    r"^autopar::(add)?mm$|extern_kernels"
)
_MATMUL_KERNEL = re.compile(r"gemm|cutlass|nvjet|xmma|cublas|_mm_|triton_tem", re.IGNORECASE)
_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|sdpa|_efficient_attention", re.IGNORECASE)
_COLLECTIVE = re.compile(
    r"(?P<all_gather>all_?gather|broadcast)|(?P<reduce_scatter>reduce_?scatter)|(?P<all_reduce>all_?reduce)|"
    r"(?P<all_to_all>all_?to_?all|send_?recv)",
    re.IGNORECASE,
)
_ISSUES = re.compile(r"^(_c10d_functional::(?!wait)|c10d::)")


@dataclass(frozen=True)
class Measured:
    """Seconds of one step by kind; `steps` is how many the trace has, 1 where it does not mark them.

    `gloo`: whether gloo moved things, which is asked for a reduce-scatter as an all-to-all, for a gather as broadcasts
    (`passes.lower.gloo`).
    """

    step_time_s: float
    seconds: Mapping[str, float]
    steps: int
    marked: bool
    gloo: bool = False


@dataclass(frozen=True)
class Slice:
    """Something that ran, in seconds of the trace's clock."""

    name: str
    category: str
    thread: Any
    start_s: float
    end_s: float


def read_trace(path: str | Path) -> list[Slice]:
    """The slices of a trace that torch.profiler exported (JSON, or that gzipped).

    Raises:
        ValueError: not such a trace.
        OSError: the file cannot be read.
    """
    raw = Path(path).read_bytes()
    try:
        content = read_json(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not JSON ({error}); pass what torch.profiler's export_chrome_trace wrote") from None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise ValueError(f"{path}: no traceEvents in it; pass what torch.profiler's export_chrome_trace wrote")
    try:
        found = [_slice(event) for event in events if event.get("ph") == "X" and "dur" in event]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: an event that torch.profiler does not write; pass a trace of its own") from None
    if not any(each.category in ("cpu_op", "kernel") for each in found):
        raise ValueError(
            f"{path}: a trace without ops or kernels; record a step with torch.profiler and export it (under "
            "profile(schedule=...) in on_trace_ready: torch forgets the steps afterwards)"
        )
    return found


def _slice(event: Mapping[str, Any]) -> Slice:
    start_us, duration_us = float(event["ts"]), float(event["dur"])
    if not (math.isfinite(start_us) and 0 <= duration_us < math.inf):
        raise ValueError(f"from {start_us} for {duration_us} us")
    category, thread = str(event.get("cat", "")).lower(), (event.get("pid"), event.get("tid"))
    return Slice(str(event.get("name", "")), category, thread, start_us * 1e-6, (start_us + duration_us) * 1e-6)


def measured(path: str | Path) -> Measured:
    """Seconds of one step by kind, read from a trace.

    Raises:
        ValueError: as `read_trace`.
    """
    slices = read_trace(path)
    marks = [s for s in slices if s.name.startswith("ProfilerStep") and s.category == "user_annotation"]
    work = [s for s in slices if s.category in ("cpu_op", "kernel", "user_annotation", "gpu_user_annotation")]
    # A GPU runs what the host asked for a while before: of its kernels, the marks on the GPU tell.
    spans = [s for s in slices if s.name.startswith("ProfilerStep") and s.category == "gpu_user_annotation"] or marks
    if marks:
        start, end, steps = min(s.start_s for s in spans), max(s.end_s for s in spans), len(marks)
        step_s = median(s.end_s - s.start_s for s in marks)
    else:
        ops = [s for s in slices if s.category in ("cpu_op", "kernel")]
        start, end, steps = min(s.start_s for s in ops), max(s.end_s for s in ops), 1
        step_s = end - start
    inside = [s for s in work if s.start_s < end and s.end_s > start]
    kernels = [s for s in inside if s.category == "kernel"]
    total = _of_kernels(inside, kernels) if kernels else _of_ops(inside)
    gloo = any(s.name.startswith("gloo:") for s in inside)
    return Measured(step_s, {kind: total.get(kind, 0.0) / steps for kind in KINDS}, steps, bool(marks), gloo)


def _of_kernels(inside: Sequence[Slice], kernels: Sequence[Slice]) -> dict[str, float]:
    updates = [s for s in inside if s.category == "gpu_user_annotation" and s.name.startswith("Optimizer.step")]
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        kind = _collective(kernel.name) if "nccl" in kernel.name.lower() else ""
        if not kind:
            kind = "optimizer" if _within(kernel, updates) else _compute_kind(kernel.name, _MATMUL_KERNEL)
        found[kind] += kernel.end_s - kernel.start_s
    return found


def _of_ops(inside: Sequence[Slice]) -> dict[str, float]:
    marks = [s for s in inside if s.category == "user_annotation"]
    ops = [s for s in inside if s.category == "cpu_op"]
    updates = [s for s in marks if s.name.startswith("Optimizer.step")]
    found: dict[str, float] = defaultdict(float)
    found["optimizer"] = sum(s.end_s - s.start_s for s in updates)
    for ran, asked in _collectives_of(marks, ops):
        found[_collective(asked.name) or "other"] += ran.end_s - ran.start_s
    thread = _main_thread(marks, ops)
    for op, alone_s in _alone([s for s in ops if s.thread == thread]):
        if "c10d" not in op.name and not _within(op, updates):
            found[_compute_kind(op.name, _MATMUL_OP)] += alone_s
    return found


def _main_thread(marks: Sequence[Slice], ops: Sequence[Slice]) -> Any:
    """The one that trains: where steps are marked, else where ops take longest."""
    for mark in marks:
        if mark.name.startswith(("ProfilerStep", "Optimizer.step")):
            return mark.thread
    seconds: dict[Any, float] = defaultdict(float)
    for op in ops:
        seconds[op.thread] += op.end_s - op.start_s
    return max(seconds, key=lambda thread: seconds[thread])


def _collectives_of(marks: Sequence[Slice], ops: Sequence[Slice]) -> Iterable[tuple[Slice, Slice]]:
    """Each collective that a backend ran, with what was asked for: some backends run one as another (gloo's
    reduce-scatter is an all-reduce)."""
    ran = sorted((s for s in marks if re.match(r"(gloo|mpi|ucc):", s.name)), key=lambda s: s.start_s)
    issued = sorted((s for s in ops if _ISSUES.match(s.name) and _collective(s.name)), key=lambda s: s.start_s)
    outermost = [
        s for s in issued if not any(o.start_s <= s.start_s and s.end_s <= o.end_s for o in issued if o is not s)
    ]
    return zip(ran, outermost if len(outermost) == len(ran) else ran, strict=True)


def _alone(ops: Iterable[Slice]) -> list[tuple[Slice, float]]:
    """Ops of one thread with the seconds that none of the ops they call takes; collectives' callees go with them."""
    found: list[tuple[Slice, float]] = []
    stack: list[list[Any]] = []

    def close(until_s: float) -> None:
        while stack and stack[-1][0].end_s <= until_s:
            op, inner_s = stack.pop()
            found.append((op, max(0.0, op.end_s - op.start_s - inner_s)))

    for op in sorted(ops, key=lambda s: (s.start_s, -s.end_s)):
        close(op.start_s)
        if any("c10d" in outer.name for outer, _ in stack):
            continue
        if stack:
            stack[-1][1] += op.end_s - op.start_s
        stack.append([op, 0.0])
    close(float("inf"))
    return found


def _within(each: Slice, windows: Sequence[Slice]) -> bool:
    return any(window.start_s <= each.start_s < window.end_s for window in windows)


def _collective(name: str) -> str:
    match = _COLLECTIVE.search(name)
    return (match.lastgroup or "") if match else ""


def _compute_kind(name: str, matmul: re.Pattern[str]) -> str:
    if _ATTENTION.search(name):
        return "attention"
    return "matmul" if matmul.search(name) else "other"
