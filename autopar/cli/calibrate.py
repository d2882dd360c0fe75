"""Measure this machine and print what it does: rates of compute, memory and collectives, and how well they explain it.

With -o the figures go to a file that --hardware takes. Ranks of several processes are started with --ranks.
With --from-trace nothing is measured: the figures that a plan was priced with are corrected by a torch.profiler trace
of its step, kind by kind.

example:
  autopar calibrate --ranks 4 -o hardware.json
  autopar calibrate --from-trace trace.json --plan plan.json -o hardware.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

from autopar import planning
from autopar.cli.arguments import add_json, check_outputs, count, known_hardware, output, writing
from autopar.cli.comparing import print_measured
from autopar.cli.terminal import clean_output, painted, progress, table, wrapped
from autopar.plans.corrections import compared, corrected
from autopar.plans.measured import measured
from costmodel.calibrate import save_calibration
from costmodel.files import write_whole
from costmodel.hardware import Hardware
from costmodel.hardware_file import save_hardware
from costmodel.memory import gib
from costmodel.presets import hardware
from passes.plan.plan import Plan
from passes.plan.report_text import seconds_text

HELP = "measure this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar calibrate`."""
    parser.add_argument("-o", "--output", type=output, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--ranks", type=count, metavar="N", help="processes that measure together (1)")
    parser.add_argument("--seconds", type=float, metavar="S", help="about how long to measure (10)")
    parser.add_argument("--from-trace", metavar="TRACE", help="correct figures by this torch.profiler trace instead")
    parser.add_argument("--plan", metavar="PLAN", help="with --from-trace: the plan whose step was recorded")
    parser.add_argument(
        "--hardware",
        type=known_hardware,
        metavar="NAME",
        help="with --from-trace: what to correct (default: the plan's)",
    )
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Measure, write and print."""
    if given.from_trace:
        return _from_trace(given)
    if given.plan or given.hardware:
        raise ValueError("--plan and --hardware go with --from-trace TRACE")
    budget_s = 10.0 if given.seconds is None else given.seconds
    if not 0 < budget_s < math.inf:
        raise ValueError(f"--seconds {budget_s:g}: measuring takes some time; 10 is usual")
    with clean_output(), progress() as tell, tempfile.TemporaryDirectory() as folder:
        tell(f"measuring for about {budget_s:g} s")
        path = Path(folder) / "hardware.json"
        found, errors = save_calibration(path, device=given.device, ranks=given.ranks or 1, budget_s=budget_s)
        if given.output:
            with writing("output", given.output):
                write_whole(given.output, path.read_text(encoding="utf-8"))
    off = {kind: median(map(abs, values)) for kind, values in errors.items()}
    if given.json:
        print(_json(found, off))
        return 0
    _print(found, off)
    print(_written(given.output))
    return 0


def _from_trace(given: argparse.Namespace) -> int:
    """Correct a plan's hardware by a trace of its step."""
    if not given.plan:
        raise ValueError("--from-trace needs --plan PLAN, the plan whose step was recorded")
    measuring = {"--device": given.device, "--ranks": given.ranks, "--seconds": given.seconds}
    if asked := [flag for flag, value in measuring.items() if value is not None]:
        raise ValueError(f"{', '.join(asked)}: with --from-trace nothing is measured; leave it out")
    check_outputs({"--from-trace": given.from_trace, "--plan": given.plan}, output=given.output)
    plan = Plan.load(given.plan)
    base = hardware(given.hardware) if given.hardware else planning.hardware_in(plan)
    step = measured(given.from_trace)
    rows = compared(plan, step)
    found = corrected(base, rows, f"a trace of {step.steps} steps")
    if given.output:
        with writing("output", given.output):
            save_hardware(found, given.output)
    if given.json:
        print(_json(found, {row.kind: abs(row.ratio - 1) for row in rows if math.isfinite(row.ratio)}))
        return 0
    print_measured(rows, step)
    print(_written(given.output))
    return 0


def _json(found: Hardware, off: Mapping[str, float]) -> str:
    figures = {"format": "autopar-calibration", "version": 1, "hardware": asdict(found), "error": off}
    return json.dumps(figures, indent=2)


def _written(output: str | None) -> str:
    if output:
        return f"\nWritten to {output}; use it with --hardware {output}."
    return "\nNot written; -o FILE keeps it for --hardware."


_POOR = 0.5


def _print(found: Hardware, off: dict[str, float]) -> None:
    device = found.device
    rows = [
        [f"matrix products, {name}", f"{flops * device.matmul_efficiency / 1e9:,.1f} GFLOP/s"]
        for name, flops in device.peak_flops_per_s.items()
    ]
    rows += [
        ["memory", f"{device.memory_bytes_per_s * device.memory_efficiency / 1e9:,.1f} GB/s"],
        ["memory size", gib(device.memory_bytes)],
        ["an op's launch", seconds_text(device.kernel_launch_s)],
        ["an update, per parameter", seconds_text(device.update_s)],
        [
            "link inside a node",
            f"{found.intra_node.bytes_per_s / 1e9:,.2f} GB/s, {seconds_text(found.intra_node.latency_s)}",
        ],
    ]
    if not found.shared_host:
        rows.append(["ranks per node", str(found.ranks_per_node)])
    print(painted(found.name, "bold"))
    print(table(rows, ["", "measured"], shrink=[1]))
    print()
    print(
        table(
            [[kind, f"{error:.0%}"] for kind, error in off.items()], ["the model against it", "median error"], right=[1]
        )
    )
    if poor := [kind for kind, error in off.items() if error > _POOR]:
        print(wrapped(f"\nThe figures explain {', '.join(poor)} badly: measure again where nothing else runs."))
