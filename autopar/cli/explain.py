"""Print why parameters lie as they do: placements, the decisions around them, the collectives they cost.

PATTERN is a parameter's name, a pattern (`*.q_proj.weight`), or a part of a name, an op's place or a source line.
With --model, the parameters' layout is changed one mesh axis at a time and everything else solved again: what the
runners-up would cost.

example:
  autopar explain plan.json '*.gate_proj.weight' --model llama3-8b
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from autopar import examples, planning
from autopar.cli.arguments import add_json, count, stored_dtype
from autopar.cli.compiling import captured
from autopar.cli.terminal import clean_output, painted, progress, table
from autopar.model_argument import Wanted, load_model
from costmodel.layout import Layout, Placement, Replicate, Shard, layout_text, parse_layout
from costmodel.memory import gib
from passes.errors import NoFeasiblePlanError
from passes.plan import Placements, Plan, check_solved
from passes.report_text import seconds_text
from passes.schedule import Collective

HELP = "print why parameters lie as they do, and what else would cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar explain`."""
    parser.add_argument("plan", metavar="PLAN", help="a plan's file")
    parser.add_argument("pattern", metavar="PATTERN", help="a name, a pattern, or a part of either or of a source line")
    parser.add_argument("--model", metavar="MODEL", help="what the plan is for: price the runners-up")
    parser.add_argument("--layers", type=count, metavar="N", help="so many layers instead of the model's own")
    add_json(parser)


@dataclass(frozen=True)
class Alternative:
    """Another layout of some parameters in compute, with all else solved anew; infinite where nothing fits."""

    layout: str
    step_time_s: float
    peak_memory_bytes: int
    why_not: str = ""


def run(given: argparse.Namespace) -> int:
    """Look up, price and print."""
    plan = Plan.load(given.plan)
    check_solved(plan)
    placed = {key: p for key, p in plan.parameters.items() if _matches(given.pattern, key, p.names)}
    places = {key: text for key, text in plan.decisions.items() if _matches(given.pattern, key)}
    issued = [
        c for c in plan.collectives if _matches(given.pattern, c.value, c.module, c.source) or _touches(c, placed)
    ]
    if not placed and not places and not issued:
        names = ", ".join(plan.parameters)
        raise ValueError(f"{given.plan}: nothing in the plan matches {given.pattern!r}; its parameters are {names}")
    others: dict[str, list[Alternative]] = {}
    if given.model:
        with clean_output(), progress() as tell:
            others = alternatives(plan, placed, given, tell)
    if given.json:
        print(json.dumps(_as_json(plan, placed, places, issued, others), indent=2))
        return 0
    for key, one in placed.items():
        _print_parameter(plan, key, one, others.get(key))
    if places:
        print(painted("Decisions: operands -> results, a placement per mesh axis, on logical dims", "bold"))
        print(table([[key, text] for key, text in places.items()], ["place", "layout"]) + "\n")
    _print_collectives(issued)
    if placed and not given.model:
        print("\nWith --model MODEL the runners-up are solved and priced.")
    return 0


def _matches(pattern: str, *texts: str) -> bool:
    return any(pattern in text or fnmatchcase(text, pattern) for text in texts)


def _touches(collective: Collective, placed: Mapping[str, Placements]) -> bool:
    return any(collective.value == key for key in placed)


# -- runners-up --------------------------------------------------------------------------------------------------------


def alternatives(
    plan: Plan, placed: Mapping[str, Placements], given: argparse.Namespace, tell: Callable[[str], None]
) -> dict[str, list[Alternative]]:
    """Per parameter pattern, its other layouts that differ on one mesh axis, cheapest first."""
    options = planning.options_of(plan)
    named = load_model(given.model, Wanted(layers=given.layers, dtype=stored_dtype(options)))
    program = captured(named.model, examples.restored(plan.example), plan.mesh, options, tell)
    if program.fingerprint != plan.fingerprint:
        raise ValueError(
            f"{given.plan} is for the graph {plan.fingerprint[:12]} but {given.model} gives "
            f"{program.fingerprint[:12]}; name the model that it was made for"
        )
    found: dict[str, list[Alternative]] = {}
    for key, one in placed.items():
        for layout in _neighbours(parse_layout(_leading(one.in_compute)), len(one.shape)):
            text = layout_text(layout)
            tell(f"{key} as {text}")
            pins = {**options.pins, key: text}
            try:
                made = planning.planned(
                    program,
                    plan.axes,
                    batch_axes=[[name for name, _ in plan.axes].index(name) for name in plan.batch_axes],
                    hardware=planning.topology_of(plan).hardware,
                    strategy="auto",
                    options=replace(options, pins=pins),
                    example=plan.example,
                )
            except (NoFeasiblePlanError, ValueError) as error:
                found.setdefault(key, []).append(Alternative(text, float("inf"), 0, str(error)))
                continue
            found.setdefault(key, []).append(Alternative(text, made.step_time_s, made.peak_memory_bytes))
        found[key].sort(key=lambda other: other.step_time_s)
    return found


def _leading(layout: str) -> str:
    """A layout in whole dims: `S(0.1)`, a split of an inner part of dim 0, as `S(0)`."""
    return re.sub(r"S\((\d+)\.\d+\)", r"S(\1)", layout)


def _neighbours(layout: Layout, dims: int) -> list[Layout]:
    """Layouts that differ from this one on one axis."""
    choices: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(dims))]
    return [
        (*layout[:axis], other, *layout[axis + 1 :])
        for axis in range(len(layout))
        for other in choices
        if other != layout[axis]
    ]


# -- printing ----------------------------------------------------------------------------------------------------------


def _print_parameter(plan: Plan, key: str, one: Placements, others: list[Alternative] | None) -> None:
    axes = ", ".join(f"{name}={size}" for name, size in plan.axes)
    print(painted(one.names, "bold"))
    print(f"  [{', '.join(one.dims)}] of shape {list(one.shape)}, {gib(one.bytes)} per rank")
    print(f"  at rest {one.at_rest}, in compute {one.in_compute} (a placement per axis: {axes})")
    if key in plan.options.get("pins", {}):
        print("  pinned by the options")
    if others is not None:
        rows = [["this plan: " + one.in_compute, seconds_text(plan.step_time_s), "", gib(plan.peak_memory_bytes), ""]]
        rows += [_row(plan, other) for other in others]
        print(table(rows, ["in compute", "step", "", "memory", ""], shrink=4, right=[1, 2, 3], indent=2))
    print()


def _row(plan: Plan, other: Alternative) -> list[str]:
    if other.why_not:
        return [other.layout, "-", "", "-", other.why_not]
    slower = f"{other.step_time_s / plan.step_time_s - 1:+.1%}" if plan.step_time_s else ""
    return [other.layout, seconds_text(other.step_time_s), slower, gib(other.peak_memory_bytes), ""]


def _print_collectives(issued: list[Collective]) -> None:
    if not issued:
        print("No collectives.")
        return
    print(painted("Collectives", "bold"))
    rows = [
        [c.kind, c.group, c.phase, c.module or "(model)", str(c.count), gib(c.bytes * c.count), seconds_text(c.seconds),
         seconds_text(c.exposed_s)]
        for c in issued
    ]  # fmt: skip
    headers = ["collective", "axes", "phase", "of", "count", "bytes", "time", "exposed"]
    lines = table(rows, headers, shrink=3, right=[4, 5, 6, 7]).splitlines()
    print("\n".join(lines[:2]))
    for line, c in zip(lines[2:], issued, strict=True):
        print(f"{line}\n    {c.reason}{f'  ({c.source})' if c.source else ''}")


def _as_json(
    plan: Plan, placed: Mapping[str, Placements], places: Mapping[str, str], issued: list[Collective],
    others: Mapping[str, list[Alternative]],
) -> dict[str, Any]:  # fmt: skip
    return {
        "format": "autopar-explain",
        "version": 1,
        "step_time_s": plan.step_time_s,
        "parameters": {
            key: {
                "names": one.names, "shape": list(one.shape), "dims": list(one.dims), "at_rest": one.at_rest,
                "in_compute": one.in_compute, "bytes": one.bytes,
                "alternatives": [
                    {"layout": o.layout, "step_time_s": None if o.why_not else o.step_time_s,
                     "peak_memory_bytes": None if o.why_not else o.peak_memory_bytes, "why_not": o.why_not}
                    for o in others.get(key, [])
                ],
            }
            for key, one in placed.items()
        },
        "decisions": dict(places),
        "collectives": [
            {"kind": c.kind, "axes": list(c.axes), "phase": c.phase, "count": c.count, "bytes": c.bytes,
             "seconds": c.seconds, "exposed_s": c.exposed_s, "reason": c.reason, "source": c.source,
             "module": c.module, "value": c.value}
            for c in issued
        ],
    }  # fmt: skip
