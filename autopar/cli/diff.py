"""Print what changed from one plan to another: time, memory, bytes, placements, decisions.

Exits 1 where the second takes more time, memory or communication than the first by more than --max-regression.

example:
  autopar diff main.json branch.json --max-regression 2%
"""

from __future__ import annotations

import argparse
import json

from autopar.cli.arguments import add_json, share
from autopar.cli.comparing import compare_plans, comparison_json, print_comparison
from passes.plan import Plan

HELP = "print what changed between two plans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar diff`."""
    parser.add_argument("before", metavar="PLAN", help="a plan's file")
    parser.add_argument("after", metavar="PLAN", help="another")
    parser.add_argument("--max-regression", type=share, default=0.0, metavar="SHARE", help="5%% or 0.05 (0)")
    parser.add_argument("--decisions", action="store_true", help="list every decision that differs")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Compare and print."""
    found = compare_plans(Plan.load(given.before), Plan.load(given.after))
    if given.json:
        print(json.dumps(comparison_json(found, given.max_regression), indent=2))
    else:
        print_comparison(found, given.max_regression, decisions=given.decisions)
    return 1 if found.worse(given.max_regression) else 0
