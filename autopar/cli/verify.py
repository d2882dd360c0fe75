"""Check on this CPU that a plan computes what the model does on one device, and print the certificate.

Every rank is played in this process, on random weights. Compared with the unmodified model given the whole batch:
outputs, every gradient, the parameters after a step of AdamW. Where they part, the first node that differs is named.
A preset is scaled down; a config.json is taken as it is (see --layers), and so is the model that a --plan was made for,
with the plan's inputs and dtypes. Exits 1 where the check fails.

example:
  autopar verify llama3-8b --mesh dp=2,tp=2 --strategy megatron
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from autopar import examples, planning
from autopar.cli.arguments import (
    add_json,
    add_mesh,
    add_model,
    add_planning,
    named_model,
    options_of,
    planning_asked,
    tolerance,
)
from autopar.cli.terminal import clean_output, painted, progress
from autopar.models.named_model import Named, check_playable
from autopar.parity.certificate import Tolerances, parity_text
from autopar.parity.verify import verify
from passes.plan.plan import Plan
from passes.plan.tables import terminal_width

HELP = "check on a CPU that a plan computes what one device does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar verify`."""
    add_model(parser)
    add_mesh(parser, required=False)
    add_planning(parser)
    parser.add_argument("--plan", metavar="PLAN", help="check this plan's file instead of making one")
    parser.add_argument("--loss-tolerance", type=tolerance, metavar="X", help="relative error allowed in a loss (1e-5)")
    parser.add_argument("--tolerance", type=tolerance, metavar="X", help="and in any other tensor, of its norm (1e-4)")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Verify and print."""
    with clean_output(), progress() as tell:
        plan = Plan.load(given.plan) if given.plan else None
        if plan is not None and (asked := planning_asked(given)):
            raise ValueError(
                f"{', '.join(asked)}: {given.plan} has that decided; leave it out, or leave out --plan to make one so"
            )
        mesh = given.mesh or (plan.mesh if plan is not None else None)
        if mesh is None:
            raise ValueError("no mesh; pass --mesh dp=2,tp=2, or --plan PLAN, which has one")
        named = named_model(given, on_cpu=True) if plan is None else _as_planned(given, plan)
        found = verify(
            named.model, mesh, named.inputs, plan=plan, strategy=given.strategy or "auto", options=options_of(given),
            hardware=given.hardware, tolerances=Tolerances(given.loss_tolerance, given.tolerance), progress=tell,
        )  # fmt: skip
    found = replace(found, notes=(*named.notes, *found.notes))
    if given.json:
        print(found.to_json())
    else:
        head, _, rest = parity_text(found, terminal_width()).partition("\n")
        print(painted(head, "green" if found.ok else "red"))
        print(rest, end="")
    return 0 if found.ok else 1


def _as_planned(given: argparse.Namespace, plan: Plan) -> Named:
    """The model and inputs that a plan was made for: of the model's own size, in the dtype that its options store."""
    named = named_model(given, options=planning.options_of(plan), kept=plan)
    check_playable(given.model, named.model, "check a plan for a")
    own = examples.described(examples.call_of(named.model, named.inputs))
    if given.batch or given.seq or own == plan.example:
        return named
    args, kwargs = examples.restored(plan.example)
    if own == examples.described((args, kwargs)):  # the plan's have values where its graph follows from them
        return named
    return replace(named, inputs=kwargs or args)
