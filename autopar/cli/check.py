"""Plan a model again as a kept plan was made, and fail where the new plan is worse: for continuous integration.

Mesh, hardware figures, strategy, options (--batch-dim and the like) and input shapes are the kept plan's. Exits 1 where
time, memory or bytes communicated grew by more than --max-regression, or nothing fits any more. Where the model's graph
is another than the plan's (other parameters, shapes or ops), for which `autopar.apply` refuses the plan, it says what
makes the plan again.

example:
  autopar check plans/llama3-8b.json llama3-8b --max-regression 5%
"""

from __future__ import annotations

import argparse
import json
import sys

from autopar import examples, planning
from autopar.cli.arguments import add_json, check_outputs, count, output, share, stored_dtype, writing
from autopar.cli.comparing import compare_plans, comparison_json, print_comparison
from autopar.cli.compiling import captured
from autopar.cli.terminal import clean_output, progress
from autopar.models.model_argument import load_model
from autopar.models.named_model import Wanted
from passes.plan.plan import Plan, check_solved
from passes.planner.pipeline import Manner
from passes.space.named import STRATEGIES

HELP = "plan again and fail where the plan got worse (for CI)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar check`."""
    parser.add_argument("plan", metavar="PLAN", help="the plan's file")
    parser.add_argument("model", metavar="MODEL", help="what it was made for")
    parser.add_argument("--layers", type=count, metavar="N", help="so many layers instead of the model's own")
    parser.add_argument("--strategy", choices=STRATEGIES, help="default: the plan's")
    parser.add_argument("--max-regression", type=share, default=0.05, metavar="SHARE", help="5%% or 0.05 (5%%)")
    parser.add_argument("--decisions", action="store_true", help="list every decision that differs")
    parser.add_argument("-o", "--output", type=output, metavar="PLAN", help="write the new plan to this file")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Plan again, compare and print."""
    check_outputs({"MODEL": given.model}, output=given.output)
    kept = Plan.load(given.plan)
    check_solved(kept)
    with clean_output(), progress() as tell:
        options = planning.options_of(kept)
        named = load_model(given.model, Wanted(layers=given.layers, dtype=stored_dtype(options)))
        call = examples.restored(kept.example)
        program = captured(named.model, call, kept.mesh, options, tell)
        made = planning.planned(
            program,
            kept.axes,
            batch_axes=[[name for name, _ in kept.axes].index(name) for name in kept.batch_axes],
            hardware=planning.topology_of(kept).hardware,
            strategy=given.strategy or planning.asked_of(kept),
            options=options,
            example=kept.example,
            manner=Manner(tell),
        )
        if given.output:
            with writing("output", given.output):
                made.save(given.output)
    found = compare_plans(kept, made)
    if given.json:
        print(json.dumps(comparison_json(found, given.max_regression), indent=2))
    else:
        print_comparison(found, given.max_regression, decisions=given.decisions)
    if made.fingerprint != kept.fingerprint:
        sys.stdout.flush()
        print(_of_another_graph(given, kept, made), file=sys.stderr)
    return 1 if found.worse(given.max_regression) or not made.fits else 0


def _of_another_graph(given: argparse.Namespace, kept: Plan, made: Plan) -> str:
    """That the kept plan can no longer be used, and what makes one that can."""
    layers = f" --layers {given.layers}" if given.layers else ""
    return (
        f"autopar check: {given.plan} is for the graph {kept.fingerprint[:12]} but {given.model} gives "
        f"{made.fingerprint[:12]}, so that autopar.apply refuses the plan; make it again: autopar plan {given.model}"
        f"{layers} --from {given.plan} -o {given.plan}"
    )
