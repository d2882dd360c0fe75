"""Drawings of a timeline and of a frontier, as SVG that takes its colours and its font from the page it stands in.

Drawn by matplotlib, which is optional (`pip install 'autopar[report]'`): a page without it has tables and bars only.
Colours are placeholders that become the page's CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from costmodel.memory import Buffer
from passes.plan.frontier import FrontierPoint, frontier
from passes.play.clocks import Event
from passes.play.timeline import Timeline, layer_span, memory_over_time, merged, moments, top_names

matplotlib: Any
try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
except ImportError:  # an optional dependency
    matplotlib = None

WANTED = "the timeline and memory over time are drawn by matplotlib: pip install 'autopar[report]'"

_VARIABLES = ("fg", "dim", "line", "bg", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "rest")
_COLOR = {name: f"#0a0a{index:02x}" for index, name in enumerate(_VARIABLES, 1)}
_OF_KIND = {
    "matmul": "k0", "attention": "k6", "other": "k1", "optimizer": "rest",
    "all_gather": "k2", "reduce_scatter": "k3", "all_reduce": "k4", "all_to_all": "k5",
}  # fmt: skip
_STACK = ("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "rest")
_WIDTH, _ROW = 10.6, 0.42
_MOST_TENSORS = 8
_NEAR, _SEEN = 2.0, 0.005
"""A budget is drawn where it is less than so many times the peak, and a kind of memory that is such a share of it."""
_SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "autopar", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _COLOR["line"], "axes.labelcolor": _COLOR["dim"],
    "text.color": _COLOR["fg"], "xtick.color": _COLOR["dim"], "ytick.color": _COLOR["dim"], "legend.frameon": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.xmargin": 0.0,
}  # fmt: skip
_LONG = re.compile(r"-?\d+\.\d{3,}")
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def available() -> bool:
    """Whether there is something to draw with."""
    return matplotlib is not None


def step_drawing(timeline: Timeline, budget_bytes: int | None) -> str:
    """The whole step: what runs on each stream, and memory by kind below it on the same clock."""
    with matplotlib.rc_context(_SETTINGS):
        streams = timeline.streams
        height = 0.9 + _ROW * len(streams)
        figure = Figure((_WIDTH, height + 3.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(height, 2.4))
        end_ms = 1e3 * (timeline.end_s + timeline.optimizer_s)
        events = (*timeline.events, _update(timeline))
        _draw_streams(above, streams, events, end_ms / 1500)
        backward = [event.start_s for event in timeline.events if event.phase == "backward"]
        if backward:
            for axes in (above, below):
                axes.axvline(1e3 * min(backward), color=_COLOR["dim"], linewidth=0.8, linestyle=":")
            above.text(1e3 * min(backward), len(streams) - 0.45, " backward", color=_COLOR["dim"], va="bottom")
            above.text(0, len(streams) - 0.45, " forward", color=_COLOR["dim"], va="bottom")
        at_s = [*moments(timeline), timeline.end_s + timeline.optimizer_s]
        series = memory_over_time(timeline, at_s)
        peak_bytes = max(map(sum, zip(*series.values(), strict=True)), default=0)
        unit, bytes_each = _memory_unit(peak_bytes)
        _stack(below, at_s, _worth_naming(series, peak_bytes), bytes_each)
        if budget_bytes is not None and budget_bytes < _NEAR * peak_bytes:
            below.axhline(budget_bytes / bytes_each, color=_COLOR["fg"], linewidth=1.5)
            below.text(0, budget_bytes / bytes_each, " budget", va="bottom")
            below.set_ylim(0, 1.12 * max(budget_bytes, peak_bytes) / bytes_each)
        below.set_ylabel(f"{unit} in memory")
        below.set_xlabel("ms")
        below.set_xlim(0, end_ms)
        return _svg(figure, "step", "What runs on each stream of one rank, and memory by kind, over one micro-batch")


def layer_drawing(timeline: Timeline, phase: str) -> str:
    """One layer in the middle of a phase, op by op; "" where no layer repeats."""
    span = layer_span(timeline, phase)
    if span is None:
        return ""
    layer, start_s, end_s = span
    with matplotlib.rc_context(_SETTINGS):
        streams = timeline.streams
        figure = Figure((_WIDTH, 0.9 + 0.55 * len(streams)), layout="constrained")
        axes = figure.subplots()
        inside = [event for event in timeline.events if event.end_s > start_s and event.start_s < end_s]
        scale = 1e6 if end_s - start_s < 0.002 else 1e3
        _draw_streams(axes, streams, inside, 0.0, scale)
        for event in inside:
            middle = (max(event.start_s, start_s) + min(event.end_s, end_s)) / 2
            room = (min(event.end_s, end_s) - max(event.start_s, start_s)) / (end_s - start_s)
            text = event.kind if event.stream != "compute" else event.name.rpartition(": ")[2]
            where = event.module.rpartition(".")[2]
            text = f"{where}\n{text}" if where and not where.isdigit() else text
            if room > 0.0085 * max(map(len, text.split("\n"))):
                row = len(streams) - 1 - streams.index(event.stream)
                axes.text(middle * scale, row, text, ha="center", va="center", fontsize=7, color=_COLOR["bg"])
        axes.set_xlim(start_s * scale, end_s * scale)
        axes.set_xlabel("us" if scale == 1e6 else "ms")
        return _svg(figure, f"layer-{phase}", f"{layer} in {phase}, op by op on each stream")


def tensors_drawing(timeline: Timeline) -> str:
    """Memory of the tensors that take the most of it, over the step."""
    names = top_names(timeline, _MOST_TENSORS)
    at_s = [*moments(timeline), timeline.end_s + timeline.optimizer_s]

    def name_of(buffer: Buffer) -> str:
        return f"{buffer.name} ({buffer.kind})" if buffer.name in names else ""

    series = {name: sizes for name, sizes in memory_over_time(timeline, at_s, name_of).items() if name}
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure((_WIDTH, 2.2 + 0.17 * len(series)), layout="constrained")
        axes = figure.subplots()
        largest = dict(list(series.items())[:_MOST_TENSORS])
        unit, bytes_each = _memory_unit(max(map(sum, zip(*largest.values(), strict=True)), default=0))
        _stack(axes, at_s, largest, bytes_each, below=True)
        axes.set_ylabel(unit)
        axes.set_xlabel("ms")
        return _svg(figure, "tensors", "Memory of the largest tensors over one micro-batch")


def frontier_drawing(points: Sequence[FrontierPoint], budget_bytes: int | None) -> str:
    """Step time against memory of the plans that a search found; the line joins those that none beats in both."""
    most_bytes, most_s = max(p.memory_bytes for p in points), max(p.step_time_s for p in points)
    memory_unit, bytes_each = _memory_unit(most_bytes)
    time_unit, per_s = ("ms", 1e3) if most_s >= 1e-3 else ("us", 1e6)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure((_WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.margins(0.06, 0.12)
        best = frontier(points)
        axes.plot([p.memory_bytes / bytes_each for p in best], [per_s * p.step_time_s for p in best],
                  color=_COLOR["k0"], linewidth=1.2, drawstyle="steps-post")  # fmt: skip
        labelled: list[float] = []
        for point in sorted(points, key=lambda p: not p.chosen):
            color = _COLOR["k2"] if not point.fits else _COLOR["k0"] if point in best else _COLOR["rest"]
            x, y = point.memory_bytes / bytes_each, per_s * point.step_time_s
            marker, size = ("D", 8) if point.chosen else ("o", 5)
            fill = "none" if point.priced_only else color
            axes.plot(x, y, marker=marker, markersize=size, color=color, markerfacecolor=fill, linestyle="none")
            crowded = any(abs(y - other) < 0.06 * per_s * most_s for other in labelled)
            if point.chosen or (point in best and not crowded):
                axes.annotate(f" {point.label}", (x, y), xytext=(3, 4), textcoords="offset points", fontsize=8)
                labelled.append(y)
        if budget_bytes is not None and budget_bytes < 3 * most_bytes:
            axes.axvline(budget_bytes / bytes_each, color=_COLOR["fg"], linewidth=1.5)
            axes.text(budget_bytes / bytes_each, 1.0, " budget", va="top", transform=axes.get_xaxis_transform())
        axes.set_xlabel(f"{memory_unit} per rank")
        axes.set_ylabel(f"{time_unit} per step")
        return _svg(figure, "frontier", "Step time against memory per rank of the plans that the search found")


# -- pieces ------------------------------------------------------------------------------------------------------------


def _update(timeline: Timeline) -> Event:
    end_s = timeline.end_s
    return Event("compute", end_s, end_s + timeline.optimizer_s, "optimizer's update", "optimizer", "backward")


def _draw_streams(
    axes: Any, streams: Sequence[str], events: Sequence[Event], closer_ms: float, scale: float = 1e3
) -> None:
    """A row per stream, first on top; events of one kind with gaps shorter than `closer_ms` are drawn as one."""
    drawn = {}
    for row, stream in enumerate(reversed(streams)):
        for kind in dict.fromkeys(event.kind for event in events if event.stream == stream):
            color = _COLOR[_OF_KIND.get(kind, "k7")]
            alike = [event for event in events if event.stream == stream and event.kind == kind]
            boxes = [(start * scale, end * scale) for start, end in merged(alike, closer_ms / 1e3)]
            edge = {"edgecolor": _COLOR["bg"], "linewidth": 0.6} if not closer_ms else {"linewidth": 0}
            axes.add_patch(PathPatch(_boxes(boxes, row - 0.36, row + 0.36), facecolor=color, **edge))
            drawn[kind] = color
    axes.set_yticks(range(len(streams)), list(reversed(streams)))
    axes.set_ylim(-0.6, len(streams) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.autoscale_view(scaley=False)
    handles = [PathPatch(_boxes([(0, 1)], 0, 1), facecolor=color, linewidth=0) for color in drawn.values()]
    axes.legend(handles, list(drawn), loc="lower left", bbox_to_anchor=(0.0, 1.12), ncols=8, borderpad=0, fontsize=8)


def _boxes(spans: Sequence[tuple[float, float]], low: float, high: float) -> Any:
    """One path of many rectangles: far smaller in a file than a shape each."""
    corners, codes = [], []
    for start, end in spans:
        corners += [(start, low), (start, high), (end, high), (end, low), (start, low)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(corners, codes)


def _memory_unit(most_bytes: float) -> tuple[str, int]:
    """A unit for an axis that goes up to so many bytes, and what it is."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((unit for unit in units if most_bytes >= unit[1]), units[-1])


def _worth_naming(series: dict[str, list[int]], peak_bytes: int) -> dict[str, list[int]]:
    """Kinds of memory that can be seen beside the peak; all others as one."""
    seen = {kind: sizes for kind, sizes in series.items() if max(sizes, default=0) >= _SEEN * peak_bytes}
    others = [sizes for kind, sizes in series.items() if kind not in seen]
    return seen | {"others": [sum(sizes) for sizes in zip(*others, strict=True)]} if others else seen


def _stack(
    axes: Any, at_s: Sequence[float], series: dict[str, list[int]], bytes_each: int, *, below: bool = False
) -> None:
    """Series of bytes on one another, with a legend above or `below` (which leaves out what begins with `_`)."""
    times = [1e3 * at for at in at_s]
    amounts = [[size / bytes_each for size in sizes] for sizes in series.values()]
    fills = [_COLOR[_STACK[index % len(_STACK)]] for index in range(len(series))]
    axes.stackplot(
        times, *amounts, labels=[name.lstrip("_") for name in series], colors=fills, linewidth=0, step="post"
    )
    axes.set_ylim(bottom=0)
    where = (
        {"loc": "upper left", "bbox_to_anchor": (0.0, -0.18)}
        if below
        else {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
    )
    axes.legend(ncols=2 if below else 8, borderpad=0, fontsize=8, **where)


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an `<svg>` for a page: no fixed size, colours by variable, ids that no other drawing has."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(text.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("metadata", "}style")):
                parent.remove(child)
    variables = {color: f"var(--{variable})" for variable, color in _COLOR.items()}
    pattern = re.compile("|".join(variables))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        if _LINK in element.attrib:
            element.attrib["href"] = element.attrib.pop(_LINK).replace("#", f"#{name}-")
        for key, value in element.attrib.items():
            if "url(#" in value:
                value = value.replace("url(#", f"url(#{name}-")
            value = pattern.sub(lambda found: variables[found[0]], value)
            element.attrib[key] = _LONG.sub(lambda found: f"{float(found[0]):.2f}", value) if key == "d" else value
        if element.tag == "text":
            style = element.attrib.get("style", "")
            size = re.search(r"font(?:-size)?: ([\d.]+)px", style)
            element.attrib["style"] = (
                re.sub(r"font(-family)?: [^;]*;?", "", style) + f"; font-size: {size[1] if size else 9}px"
            )
    width, height = (root.attrib.pop(side).removesuffix("pt") for side in ("width", "height"))
    root.attrib |= {"class": "plot", "role": "img", "aria-label": title, "viewBox": f"0 0 {width} {height}"}
    root.attrib.pop("version", None)
    return ElementTree.tostring(root, encoding="unicode")
