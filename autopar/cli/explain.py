"""Print why a plan has what it has: placements, the decisions around them, the collectives they cost.

PATTERN is a parameter's name, a pattern (`*.q_proj.weight`), a part of a name, an op's place, a kind of collective
(`all_to_all`), or a source line (`modeling_llama.py:243`). With --model, everything is solved again with the choice
ruled out: for a parameter each layout that differs on one mesh axis, for an op the best plan that lays it out
otherwise; and a sentence says what decided. Mesh, options (--batch-dim and the like) and input shapes are the plan's.

example:
  autopar explain plan.json '*.gate_proj.weight' --model llama3-8b
  autopar explain plan.json modeling_llama.py:164 --model llama3-8b
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from autopar import examples, planning
from autopar.cli.arguments import add_json, count, stored_dtype
from autopar.cli.compiling import captured
from autopar.cli.terminal import clean_output, painted, progress, table, table_rows, wrapped
from autopar.models.model_argument import load_model
from autopar.models.named_model import Wanted
from autopar.plans.deciding import Alternative, Decision, Question, leading, ops_decided, parameter_decided
from autopar.plans.looking_up import Found, look_up
from costmodel.layout import Shard, parse_layout
from costmodel.memory import gib
from passes.plan.plan import Placements, Plan, check_solved
from passes.plan.report_text import seconds_text
from passes.planner.decisions import Place
from passes.planner.pipeline import Progress
from passes.play.schedule import Collective

HELP = "print why parameters and ops lie as they do, and what else would cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar explain`."""
    parser.add_argument("plan", metavar="PLAN", help="a plan's file")
    parser.add_argument("pattern", metavar="PATTERN", help="a name, a pattern, or a part of either or of a source line")
    parser.add_argument("--model", metavar="MODEL", help="what the plan is for: solve the runners-up")
    parser.add_argument("--layers", type=count, metavar="N", help="so many layers instead of the model's own")
    parser.add_argument("--most", type=count, default=3, metavar="N", help="solve runners-up of so many ops (3)")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Look up, solve and print."""
    if given.layers and not given.model:
        raise ValueError(f"--layers {given.layers} goes with --model MODEL, of which they are")
    plan = Plan.load(given.plan)
    check_solved(plan)
    decisions: dict[str, Decision] = {}
    if given.model:
        with clean_output(), progress() as tell:
            question = _question(given, plan, tell)
            found = look_up(plan, given.pattern, question.places())
            decisions = _decided(question, found.parameters, _worth(found.ops)[: given.most], tell)
    else:
        found = look_up(plan, given.pattern)
    if given.json:
        print(json.dumps(_as_json(plan, found, decisions), indent=2))
        return 0
    for key, one in found.parameters.items():
        _print_parameter(plan, one, decisions.get(f"parameter {key}"))
    _print_ops(plan, found.ops, decisions)
    _print_collectives(found.collectives)
    left = len(_worth(found.ops)) - given.most
    if given.model and left > 0:
        print(f"\n{left} more ops match; --most {len(_worth(found.ops))} solves their runners-up too.")
    if not given.model:
        print("\nWith --model MODEL the runners-up are solved and priced, and every source line is known.")
    return 0


def _question(given: argparse.Namespace, plan: Plan, tell: Progress) -> Question:
    options = planning.options_of(plan)
    named = load_model(given.model, Wanted(layers=given.layers, dtype=stored_dtype(options)))
    program = captured(named.model, examples.restored(plan.example), plan.mesh, options, tell)
    if program.fingerprint != plan.fingerprint:
        raise ValueError(
            f"{given.plan} is for the graph {plan.fingerprint[:12]} but {given.model} gives "
            f"{program.fingerprint[:12]}; name the model that it was made for"
        )
    return Question(plan, program, options)


def _decided(
    question: Question, placed: Mapping[str, Placements], ops: Sequence[Place], tell: Progress
) -> dict[str, Decision]:
    found = [parameter_decided(question, key, one, tell) for key, one in placed.items()]
    found += ops_decided(question, ops, tell)
    return {decision.place: decision for decision in found}


def _worth(ops: Sequence[Place]) -> list[Place]:
    """The ops that do something and had a choice."""
    return [op for op in ops if op.moves and op.layouts > 1]


# -- printing ----------------------------------------------------------------------------------------------------------


def _print_parameter(plan: Plan, one: Placements, decision: Decision | None) -> None:
    axes = ", ".join(f"{name}={size}" for name, size in plan.axes)
    print(painted(one.names, "bold"))
    together = f" for all {one.count} together" if one.count > 1 else ""
    print(f"  [{', '.join(one.dims)}] of shape {list(one.shape)}, {gib(one.bytes)} per rank{together}")
    print(f"  at rest {one.at_rest}, in compute {one.in_compute} (a placement per axis: {axes})")
    print(wrapped(_what_it_means(plan, one), indent=2))
    if one.pinned:
        print("  pinned by a person")
    if decision is not None and decision.alternatives:
        _print_alternatives(plan, one.in_compute, decision, "in compute")
    print()


def _what_it_means(plan: Plan, one: Placements) -> str:
    """The two layouts in words, an axis at a time."""
    rest, compute = parse_layout(leading(one.at_rest)), parse_layout(leading(one.in_compute))
    parts = []
    for (axis, _), stored, read in zip(plan.axes, rest, compute, strict=True):
        if isinstance(read, Shard):
            parts.append(f"over {axis} it is split along {one.dims[read.dim]} in compute too")
        elif isinstance(stored, Shard):
            kept = "once for forward and backward" if not plan.reshard else "before each use"
            parts.append(f"over {axis} it is stored in parts and gathered {kept}")
        else:
            parts.append(f"over {axis} every rank has all of it")
    return "; ".join(parts)


def _print_alternatives(plan: Plan, chosen: str, decision: Decision, what: str) -> None:
    rows = [["this plan: " + chosen, seconds_text(plan.step_time_s), "", gib(plan.peak_memory_bytes), ""]]
    rows += [_row(plan, other) for other in decision.alternatives]
    print(table(rows, [what, "step", "", "memory", ""], shrink=[4, 0], right=[1, 2, 3], indent=2))
    print(wrapped(f"What decided: {decision.decided_by}.", indent=2))


def _row(plan: Plan, other: Alternative) -> list[str]:
    if other.why_not:
        return [other.layout, "-", "", "-", other.why_not]
    slower = f"{other.step_time_s / plan.step_time_s - 1:+.1%}" if plan.step_time_s else ""
    return [other.layout, seconds_text(other.step_time_s), slower, gib(other.peak_memory_bytes), ""]


def _print_ops(plan: Plan, ops: Sequence[Place], decisions: Mapping[str, Decision]) -> None:
    solved = [op for op in ops if op.key in decisions]
    for op in solved:
        print(painted(op.key, "bold") + (f"  ({op.source})" if op.source else ""))
        decision = decisions[op.key]
        if decision.alternatives:
            _print_alternatives(plan, decision.chosen, decision, "operands -> results")
        else:
            print(f"  {decision.chosen}: {decision.decided_by}")
        print()
    rest = [op for op in ops if op.key not in decisions and op.key in plan.decisions]
    if shown := [op for op in rest if op.moves]:
        print(painted("Ops: operands -> results, a placement per mesh axis, on logical dims", "bold"))
        print(table([[op.key, plan.decisions[op.key]] for op in shown], ["place", "layout"], shrink=[1, 0]))
        if views := len(rest) - len(shown):
            print(f"and {views} view{'s' if views > 1 else ''}")
        print()


def _print_collectives(issued: Sequence[Collective]) -> None:
    if not issued:
        print("No collective moves it.")
        return
    print(painted("Collectives", "bold"))
    rows = [
        [c.kind, c.group, c.phase, c.module or "(model)", str(c.count), gib(c.bytes * c.count), seconds_text(c.seconds),
         seconds_text(c.exposed_s)]
        for c in issued
    ]  # fmt: skip
    headers = ["collective", "axes", "phase", "of", "count", "bytes", "time", "exposed"]
    head, bodies = table_rows(rows, headers, shrink=[3, 1], last=[0], right=[4, 5, 6, 7])
    print(head)
    for body, c in zip(bodies, issued, strict=True):
        print(body)
        print(wrapped(f"{c.reason}{f'  ({c.source})' if c.source else ''}", indent=4))


def _as_json(plan: Plan, found: Found, decisions: Mapping[str, Decision]) -> dict[str, Any]:
    def alternatives(place: str) -> list[dict[str, Any]]:
        return [
            {"layout": o.layout, "step_time_s": None if o.why_not else o.step_time_s,
             "peak_memory_bytes": None if o.why_not else o.peak_memory_bytes, "why_not": o.why_not}
            for o in (decisions[place].alternatives if place in decisions else ())
        ]  # fmt: skip

    def decided_by(place: str) -> str | None:
        return decisions[place].decided_by if place in decisions else None

    return {
        "format": "autopar-explain",
        "version": 1,
        "step_time_s": plan.step_time_s,
        "parameters": {
            key: {
                "names": one.names, "shape": list(one.shape), "dims": list(one.dims), "at_rest": one.at_rest,
                "in_compute": one.in_compute, "bytes": one.bytes, "pinned": one.pinned,
                "alternatives": alternatives(f"parameter {key}"), "decided_by": decided_by(f"parameter {key}"),
            }
            for key, one in found.parameters.items()
        },
        "ops": {
            op.key: {
                "layout": plan.decisions[op.key], "source": op.source, "alternatives": alternatives(op.key),
                "decided_by": decided_by(op.key),
            }
            for op in found.ops if op.key in plan.decisions
        },
        "collectives": [
            {"kind": c.kind, "axes": list(c.axes), "phase": c.phase, "count": c.count, "bytes": c.bytes,
             "seconds": c.seconds, "exposed_s": c.exposed_s, "reason": c.reason, "source": c.source,
             "module": c.module, "value": c.value}
            for c in found.collectives
        ],
    }  # fmt: skip
