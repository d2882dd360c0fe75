"""Plan a model on a mesh and print the sharding report: what was decided, time, memory, baselines, collectives.

Needs no GPU and no weights. Exits 1 where nothing fits in memory.

--from solves a kept plan again: mesh, hardware, strategy, options and inputs are the plan's where nothing else is
said, --batch and --seq each by itself. Lines of its `parameters` that a person edited, or marked "pinned": true, are
kept; everything else is decided anew.

example:
  autopar plan llama3-8b --mesh dp=8,tp=8 --hardware h100 --batch 2 --seq 4096 -o plan.json --html report.html
  autopar plan llama3-8b --from plan.json -o plan.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from autopar import examples, planning
from autopar.cli.arguments import (
    add_json,
    add_mesh,
    add_model,
    add_planning,
    check_outputs,
    named_model,
    options_of,
    output,
    writing,
)
from autopar.cli.compiling import planned
from autopar.cli.terminal import clean_output, painted, progress, wrapped
from autopar.examples import Call
from autopar.options import Options
from autopar.plans.eject import eject
from autopar.plans.trace import trace_json
from costmodel.files import write_whole
from passes.plan.plan import Plan
from passes.plan.report_text import plan_text
from passes.plan.tables import terminal_width
from passes.planner.pipeline import Progress

HELP = "plan a model on a mesh; print the sharding report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar plan`."""
    add_model(parser)
    add_mesh(parser, required=False)
    add_planning(parser)
    parser.add_argument("--from", dest="kept", metavar="PLAN", help="solve this plan again with its pinned lines kept")
    parser.add_argument("-o", "--output", type=output, metavar="PLAN", help="write the plan to this file (JSON)")
    parser.add_argument(
        "--html", type=output, metavar="FILE", help="write the report as one page that needs no network"
    )
    parser.add_argument(
        "--trace", type=output, metavar="FILE", help="write the predicted step as a trace for ui.perfetto.dev"
    )
    parser.add_argument(
        "--eject", type=output, metavar="FILE", help="write the plan as a parallelize_module + fully_shard script"
    )
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Plan and print."""
    written = {"html": given.html, "trace": given.trace, "eject": given.eject}
    check_outputs({"MODEL": given.model, "--hardware": given.hardware}, output=given.output, **written)
    check_outputs({"--from": given.kept}, **written)
    with clean_output(), progress() as tell:
        made, model, call = _made(given, tell)
        _write(made, given, tell)
        ejected = eject(made, model, call(), given.model, given.eject) if given.eject else None
        if ejected is not None:
            with writing("eject", given.eject):
                write_whole(given.eject, ejected.script)
    if given.json:
        print(made.to_json())
        return 0 if made.fits else 1
    print(plan_text(made, terminal_width()), end="")
    if ejected is not None and ejected.notes:
        print("\n" + painted("What the script does not say", "bold"))
        for note in ejected.notes:
            print(wrapped(f"- {note}", indent=2))
    if files := [path for path in (given.output, *written.values()) if path]:
        print("\n" + "\n".join(f"Written to {path}" for path in files))
    return 0 if made.fits else 1


def _made(given: argparse.Namespace, tell: Progress) -> tuple[Plan, nn.Module, Callable[[], Call]]:
    """The plan, with the model and what makes the call that it is for, with values where the model comes with some."""
    kept = Plan.load(given.kept) if given.kept else None
    mesh = given.mesh or (kept.mesh if kept is not None else None)
    if mesh is None:
        raise ValueError("no mesh; pass --mesh dp=2,tp=2, or --from PLAN, which has one")
    options = options_of(given, _options(kept))
    named = named_model(given, options=options, kept=kept)
    same = kept is not None and not given.batch and not given.seq
    own = partial(examples.call_of, named.model, named.inputs)
    call = examples.restored(kept.example) if kept and same else own()
    made = planned(
        named.model,
        call,
        mesh,
        hardware=planning.hardware_in(kept) if kept is not None and given.hardware is None else given.hardware,
        strategy=given.strategy or (planning.asked_of(kept) if kept is not None else "auto"),
        options=options,
        progress=tell,
        keep_timeline=bool(given.html or given.trace),
    )
    other: tuple[str, ...] = ()
    if kept is not None and made.fingerprint != kept.fingerprint:
        other = (f"{given.kept} was made for another graph, {kept.fingerprint[:12]}: what it fixed was kept",)
    noted = replace(made, notes=(*named.notes, *other, *made.notes))
    return noted, named.model, lambda: examples.valued(call, own())


def _write(made: Plan, given: argparse.Namespace, tell: Progress) -> None:
    """The plan, its page and its trace, where they were asked for."""
    if given.output:
        with writing("output", given.output):
            made.save(given.output)
    if given.html:
        tell("drawing the report")
        with writing("html", given.html):
            made.report(given.html)
    if given.trace:
        with writing("trace", given.trace):
            write_whole(given.trace, trace_json(made))


def _options(kept: Plan | None) -> Options | None:
    """The options of a kept plan, its pins those that its file's lines ask for."""
    return None if kept is None else replace(planning.options_of(kept), pins=planning.pins_in(kept))
