"""Plan a model on a mesh and print the sharding report: what was decided, time, memory, baselines, collectives.

Needs no GPU and no weights. Exits 1 where nothing fits in memory.

example:
  autopar plan llama3-8b --mesh dp=8,tp=8 --hardware h100 --batch 2 --seq 4096 -o plan.json --html report.html
"""

from __future__ import annotations

import argparse

from autopar.cli.arguments import add_json, add_mesh, add_model, add_planning, named_model, options_of
from autopar.cli.compiling import planned
from autopar.cli.terminal import clean_output, progress, width
from autopar.report import terminal_report

HELP = "plan a model on a mesh; print the sharding report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar plan`."""
    add_model(parser)
    add_mesh(parser)
    add_planning(parser)
    parser.add_argument("-o", "--output", metavar="PLAN", help="write the plan to this file (JSON)")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page that needs no network")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Plan and print."""
    with clean_output(), progress() as tell:
        named = named_model(given)
        made = planned(
            named.model, named.inputs, given.mesh, hardware=given.hardware, strategy=given.strategy,
            options=options_of(given), progress=tell,
        )  # fmt: skip
        if given.output:
            made.save(given.output)
        if given.html:
            tell("drawing the report")
            made.report(given.html)
    if given.json:
        print(made.to_json())
        return 0 if made.fits else 1
    print(terminal_report(made, width()), end="")
    for note in named.notes:
        print(f"  - {note}")
    if written := [path for path in (given.output, given.html) if path]:
        print("\n" + "\n".join(f"Written to {path}" for path in written))
    return 0 if made.fits else 1
