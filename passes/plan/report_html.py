"""A plan as one HTML file that needs no network and no script: any browser shows it, light or dark.

The template draws bars, the tree and the mesh, matplotlib what runs over time (`plots`); here the plan becomes what
they draw. Numbers read as they do in the terminal's report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import escape

from costmodel.memory import gib
from passes.plan import plots
from passes.plan.formulas import link_figures, published_formulas, ring_formulas
from passes.plan.frontier import FrontierPoint
from passes.plan.mesh_drawing import MeshDrawing, mesh_drawing
from passes.plan.report_text import (
    MEMORY_KINDS,
    bound_text,
    kept_texts,
    percent_text,
    role_text,
    seconds_text,
    title_text,
)

if TYPE_CHECKING:
    from passes.plan.plan import Placements, Plan

_LEDGER_ROWS = 25
_OPEN_LEAVES = 24
"""A tree with at most so many kinds of parameters is shown open."""
_NO_TIMELINE = (
    "The step's timeline and memory over time are drawn where the plan was just made: autopar plan MODEL --from PLAN "
    "--html FILE"
)
_COLORS = ("k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "rest")
"""Classes in the template's style."""
_AXIS_COLORS = _COLORS[2:-1]


@dataclass(frozen=True)
class Piece:
    """A piece of a stacked bar: where it starts and how wide it is, as shares of the bar's scale."""

    name: str
    amount: float
    start: float
    width: float
    color: str
    note: str = ""


@dataclass(frozen=True)
class BaselineRow:
    """A row of the baselines: shares are of the slowest plan's time, and of the largest memory or budget."""

    name: str
    step_time_s: float
    times: float
    """This plan's step takes 1."""
    time_share: float
    memory_bytes: int
    memory_share: float
    fits: bool
    reason: str
    known: bool


@dataclass(frozen=True)
class Drawing:
    """A layout drawn on the mesh, once per page."""

    number: int
    mesh: MeshDrawing


@dataclass(frozen=True)
class Plots:
    """What matplotlib drew of the plan's timeline."""

    step: str
    layers: tuple[tuple[str, str], ...]
    """(phase, drawing)."""
    tensors: str


@dataclass(frozen=True)
class Branch:
    """A module in the tree of parameters; `name` has the dots of modules that hold nothing else."""

    name: str
    branches: tuple[Branch, ...]
    leaves: tuple[tuple[str, str, Placements], ...]
    """The parameter's own name, its whole pattern, how it lies."""
    bytes: int
    count: int


def plan_html(plan: Plan, frontier: Sequence[FrontierPoint] = ()) -> str:
    """The report on `plan` as a whole HTML document; `frontier` is what a search found, this plan among it."""
    parts = plan.breakdown
    time, hidden, scale_s = time_bars(plan)
    room = max(plan.peak_memory_bytes, plan.memory_budget_bytes or 0)
    kinds = [
        (kind, size, _COLORS[i % len(_COLORS)], MEMORY_KINDS.get(kind, ""))
        for i, (kind, size) in enumerate(parts.memory_bytes.items())
    ]
    return _template().render(
        plan=plan,
        title=title_text(plan),
        bound=bound_text(plan),
        kept=kept_texts(plan),
        roles=[(name, size, role_text(plan.roles[name], size)) for name, size in plan.axes],
        time=time,
        hidden=hidden,
        scale_s=scale_s,
        compute_kinds=[(kind, s) for kind, s in parts.compute_by_kind.items() if s],
        memory=stacked(kinds, room),
        budget_share=None if plan.memory_budget_bytes is None else _share(plan.memory_budget_bytes, room),
        baselines=baseline_rows(plan),
        tree=parameter_tree(plan),
        open_depth=9 if len(plan.parameters) <= _OPEN_LEAVES else 1,
        ledger_rows=_LEDGER_ROWS,
        options=[(key, json.dumps(value)) for key, value in plan.options.items()],
        plots=_plots(plan),
        no_plots=_NO_TIMELINE if plots.available() else plots.WANTED,
        drawings=(drawings := mesh_drawings(plan)),
        more=sorted({drawing.mesh.more for drawing in drawings.values() if drawing.mesh.more}),
        frontier=frontier,
        frontier_plot=plots.frontier_drawing(frontier, plan.memory_budget_bytes)
        if frontier and plots.available()
        else "",
        ring=ring_formulas(),
        published=published_formulas(),
        links=link_figures(plan.options["hardware_figures"]) if "hardware_figures" in plan.options else (),
    )


def frame_html(plan: Plan) -> str:
    """The report in a frame of its own, for a notebook: neither page's style reaches the other."""
    title = title_text(plan)
    style = "width:100%;height:640px;border:1px solid #8888"
    return f'<iframe title="{escape(title)}" sandbox style="{style}" srcdoc="{escape(plan_html(plan))}"></iframe>'


@lru_cache(maxsize=1)
def _template() -> Template:
    env = Environment(
        loader=PackageLoader("passes.plan", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = {"seconds": seconds_text, "gib": gib, "percent": percent_text}
    env.filters.update(texts)
    env.globals.update(texts)
    return env.get_template("report.html.j2")


def _plots(plan: Plan) -> Plots | None:
    """Drawings of the plan's timeline, where it has one and there is something to draw with."""
    timeline = plan.timeline
    if timeline is None or not timeline.events or not plots.available():
        return None
    layers = [(phase, plots.layer_drawing(timeline, phase)) for phase in ("forward", "backward")]
    return Plots(
        plots.step_drawing(timeline, plan.memory_budget_bytes),
        tuple((phase, drawing) for phase, drawing in layers if drawing),
        plots.tensors_drawing(timeline),
    )


def mesh_drawings(plan: Plan) -> dict[tuple[str, str], Drawing]:
    """(layout, layout in compute) of every parameter, at rest and in compute -> its picture."""
    if not plan.axes:
        return {}
    wanted: dict[tuple[str, str], Drawing] = {}
    for placed in plan.parameters.values():
        for layout in (placed.at_rest, placed.in_compute):
            key = layout, placed.in_compute
            if key not in wanted:
                wanted[key] = Drawing(len(wanted), mesh_drawing(layout, plan.axes, placed.in_compute))
    return wanted


# -- what the template draws -------------------------------------------------------------------------------------------


def stacked(parts: Iterable[tuple[str, float, str, str]], scale: float) -> tuple[Piece, ...]:
    """(name, amount, color, note) one after another on a bar as long as `scale`."""
    pieces, start = [], 0.0
    for name, amount, color, note in parts:
        width = _share(amount, scale)
        pieces.append(Piece(name, amount, start, width, color, note))
        start += width
    return tuple(pieces)


def time_bars(plan: Plan) -> tuple[tuple[Piece, ...], tuple[Piece, ...], float]:
    """The step's seconds, the seconds of communication hidden behind its compute, and the scale of both bars."""
    parts, times = plan.breakdown, plan.accumulate
    groups = dict.fromkeys([*parts.exposed_s, *parts.hidden_s])
    colors = {group: _AXIS_COLORS[i % len(_AXIS_COLORS)] for i, group in enumerate(groups)}
    rows = [("compute", parts.compute_s * times, "k0", "")]
    if parts.slows:
        rows.append(("compute slowed", parts.contention_s * times, "k1", "by collectives that run beside it"))
    rows += [(f"exposed {group}", s * times, colors[group], "") for group, s in parts.exposed_s.items()]
    rows.append(("optimizer", parts.optimizer_s, "rest", "once per step" if times > 1 else ""))
    concealed = [(f"hidden {group}", s * times, colors[group], "") for group, s in parts.hidden_s.items()]
    scale_s = max(sum(row[1] for row in rows), sum(row[1] for row in concealed))
    return stacked(rows, scale_s), stacked(concealed, scale_s), scale_s


def baseline_rows(plan: Plan) -> tuple[BaselineRow, ...]:
    """This plan and its baselines."""
    all_plans = [(f"this plan ({plan.strategy})", plan.step_time_s, plan.peak_memory_bytes, plan.fits, "")]
    for name, other in plan.baselines.items():
        all_plans.append((name, other.step_time_s, other.peak_memory_bytes, other.fits, other.reason))
    slowest = max(seconds for _, seconds, _, _, _ in all_plans if math.isfinite(seconds))
    largest = max([plan.memory_budget_bytes or 0, *(size for _, _, size, _, _ in all_plans)])
    return tuple(
        BaselineRow(
            name=name,
            step_time_s=seconds,
            times=seconds / plan.step_time_s if plan.step_time_s else 1.0,
            time_share=_share(seconds, slowest),
            memory_bytes=size,
            memory_share=_share(size, largest),
            fits=fits,
            reason=reason,
            known=math.isfinite(seconds),
        )
        for name, seconds, size, fits, reason in all_plans
    )


@dataclass
class _Module:
    modules: dict[str, _Module] = field(default_factory=dict)
    leaves: list[tuple[str, str, Placements]] = field(default_factory=list)


def parameter_tree(plan: Plan) -> Branch:
    """The parameters by module, alike layers as one."""
    root = _Module()
    for pattern, placed in plan.parameters.items():
        *path, name = pattern.split(".")
        module = root
        for part in path:
            module = module.modules.setdefault(part, _Module())
        module.leaves.append((name, pattern, placed))
    return _branch("", root)


def _branch(name: str, module: _Module) -> Branch:
    while len(module.modules) == 1 and not module.leaves:
        ((part, module),) = module.modules.items()
        name = f"{name}.{part}" if name else part
    branches = tuple(_branch(part, inner) for part, inner in module.modules.items())
    return Branch(
        name=name,
        branches=branches,
        leaves=tuple(module.leaves),
        bytes=sum(b.bytes for b in branches) + sum(placed.bytes for _, _, placed in module.leaves),
        count=sum(b.count for b in branches) + sum(placed.count for _, _, placed in module.leaves),
    )


def _share(amount: float, whole: float) -> float:
    return min(1.0, amount / whole) if whole > 0 and math.isfinite(amount) else 0.0
