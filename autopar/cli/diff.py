"""Print what changed from one plan to another: time, memory, bytes, placements, decisions.

Exits 1 where the second takes more time, memory or communication than the first by more than --max-regression.
With --measured, one plan beside a step as torch.profiler recorded it (export_chrome_trace), kind by kind.

example:
  autopar diff main.json branch.json --max-regression 2%
  autopar diff --measured trace.json plan.json
"""

from __future__ import annotations

import argparse
import json

from autopar.cli.arguments import add_json, share
from autopar.cli.comparing import compare_plans, comparison_json, measured_json, print_comparison, print_measured
from autopar.plans.corrections import compared
from autopar.plans.measured import measured
from passes.plan.plan import Plan

HELP = "print what changed between two plans, or how a measured step differs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar diff`."""
    parser.add_argument("before", metavar="PLAN", help="a plan's file")
    parser.add_argument("after", metavar="PLAN", nargs="?", help="another")
    parser.add_argument("--measured", metavar="TRACE", help="a torch.profiler trace, instead of a second plan")
    parser.add_argument("--max-regression", type=share, default=0.0, metavar="SHARE", help="5%% or 0.05 (0)")
    parser.add_argument("--decisions", action="store_true", help="list every decision that differs")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Compare and print."""
    if (given.after is None) == (given.measured is None):
        raise ValueError("give two plans, or one plan and --measured TRACE")
    plan = Plan.load(given.before)
    if given.measured:
        step = measured(given.measured)
        rows = compared(plan, step)
        if given.json:
            print(json.dumps(measured_json(rows, step), indent=2))
        else:
            print_measured(rows, step)
            print("\n`autopar calibrate --from-trace TRACE --plan PLAN -o FILE` corrects the hardware by it.")
        return 0
    found = compare_plans(plan, Plan.load(given.after))
    if given.json:
        print(json.dumps(comparison_json(found, given.max_regression), indent=2))
    else:
        print_comparison(found, given.max_regression, decisions=given.decisions)
    return 1 if found.worse(given.max_regression) else 0
