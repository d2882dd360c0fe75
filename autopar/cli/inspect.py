"""Capture a model's training step and print what it is made of, repeated layers folded.

Per op: how many there are in the step, shape, dims by name, FLOPs, bytes it reads and writes, and how many layouts the
mesh allows it; and the ops that no rule knows. Views and other ops that move nothing are left out unless --all.

example:
  autopar inspect llama3-8b --mesh dp=4,tp=2 --batch 1 --seq 4096
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from autopar import examples, meshes
from autopar.cli.arguments import add_json, add_mesh, add_model, named_model, once
from autopar.cli.compiling import captured
from autopar.cli.terminal import clean_output, fits, painted, progress, table_rows, wrapped
from autopar.options import Options
from costmodel.memory import gib
from passes.analysis.dims import Value
from passes.planner.pipeline import on_mesh
from passes.program.program import Program
from passes.rules.call import op_text
from passes.rules.work import work_of
from passes.space.space import Space, search_space
from passes.space.words import Words
from passes.tokens.token_blocks import by_blocks

HELP = "print the captured graph, repeated layers folded"


@dataclass(frozen=True)
class OpRow:
    """Alike ops of the step; FLOPs and bytes are of all of them, on one device with the whole batch."""

    phase: str
    module: str
    op: str
    count: int
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    flops: float
    bytes: float
    layouts: int
    source: str
    view: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar inspect`."""
    add_model(parser)
    add_mesh(parser)
    parser.add_argument("--phase", choices=("forward", "backward", "both"), default="forward", help="default: forward")
    parser.add_argument("--all", action="store_true", help="views too, and other ops that move nothing")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Capture and print."""
    with clean_output(), progress() as tell:
        named = named_model(given)
        axes = meshes.axes_of(given.mesh)
        call = examples.call_of(named.model, named.inputs)
        options = Options(batch_dims=once("--batch-dim", given.batch_dim) or None)
        program = captured(named.model, call, given.mesh, options, tell)
        tell("looking for layouts")
        batch_axes = meshes.batch_axes_of(axes, None)
        program = by_blocks(program, meshes.batch_ranks(axes, batch_axes))
        space = search_space(program, on_mesh("h100", axes), batch_axes)
        rows = op_rows(space)
        facts = graph_facts(program, space, rows)
    notes = [*named.notes, *program.notes]
    if given.json:
        lists = {"operations": [asdict(row) for row in rows], "notes": notes}
        print(json.dumps({"format": "autopar-graph", "version": 1, **facts, **lists}, indent=2))
        return 0
    _print(facts, rows, given)
    for note in notes:
        print(wrapped(f"- {note}", indent=2))
    return 0


def op_rows(space: Space) -> list[OpRow]:
    """One row per class of ops, in program order."""
    words = Words(space)
    rows = []
    for index, members in enumerate(space.folding.members):
        site = space.sites[index]
        if site.kind != "op" or site.call is None:
            continue
        node = members[0]
        results = [facts.shape if facts else () for facts in site.call.results]
        work = work_of(site.call, [facts.shape for facts in site.call.operands], results)
        rows.append(
            OpRow(
                phase=site.phase,
                module=words.pattern(node.meta.get("module", "")),
                op=op_text(site.call.target),
                count=site.count,
                shape=results[0] if results else (),
                dims=words.dims(Value(index, 0)) if results else (),
                flops=work.flops * site.count if work.kind != "unknown" else 0.0,
                bytes=work.bytes_moved * site.count,
                layouts=len(site.options),
                source=node.meta.get("source", ""),
                view=work.kind == "view",
            )
        )
    return rows


def graph_facts(program: Program, space: Space, rows: list[OpRow]) -> dict[str, Any]:
    """What the graph is as a whole."""
    parameters = [node.meta["val"] for node in program.placeholders_of("parameter")]
    return {
        "mesh": {axis.name: axis.size for axis in space.topology.axes},
        "fingerprint": program.fingerprint,
        "nodes": sum(row.count for row in rows),
        "distinct": len(rows),
        "layers": dict(space.folding.layers),
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(p.numel() * p.dtype.itemsize for p in parameters),
        "forward_flops": sum(row.flops for row in rows if row.phase == "forward"),
        "backward_flops": sum(row.flops for row in rows if row.phase == "backward"),
        "inputs": {
            given.name: list(node.meta["val"].shape)
            for node, given in program.placeholders.items()
            if given.kind == "input"
        },
        "without_rule": list(space.replicated),
    }


def _print(facts: dict[str, Any], rows: list[OpRow], given: argparse.Namespace) -> None:
    layers = ", ".join(f"{count} x {name}" for name, count in facts["layers"].items()) or "none"
    inputs = ", ".join(f"{name} {shape}" for name, shape in facts["inputs"].items())
    print(painted(wrapped(f"{given.model}: a step of the whole batch ({inputs})"), "bold"))
    print(f"  {facts['nodes']} ops, {facts['distinct']} distinct; repeated layers: {layers}")
    print(f"  {facts['parameters']:,} parameters, {gib(facts['parameter_bytes'])}")
    total = facts["forward_flops"], facts["backward_flops"]
    print(f"  {_flops(total[0])} forward, {_flops(total[1])} backward\n")
    shown = [row for row in rows if given.phase in (row.phase, "both") and (given.all or not row.view)]
    cells = [
        [
            row.op,
            str(row.count),
            str(list(row.shape)),
            ", ".join(row.dims),
            _scaled(row.flops).strip() if row.flops else "-",
            gib(row.bytes),
            str(row.layouts),
            PurePath(row.source).name,
        ]
        for row in shown
    ]
    headers = ["op", "count", "shape", "dims", "FLOPs", "bytes", "layouts", "line"]
    if not fits([headers, *cells], indent=2):  # lines are the first to go: `--json` has them
        headers, cells = headers[:-1], [row[:-1] for row in cells]
    head, bodies = table_rows(cells, headers, shrink=[3, 0, 2], right=[1, 4, 5, 6], indent=2)
    print(head)
    place = None
    for body, row in zip(bodies, shown, strict=True):
        if (row.phase, row.module) != place:
            place = row.phase, row.module
            print(painted((row.module or "(model)") + (", backward" if row.phase == "backward" else ""), "bold"))
        print(body)
    left = sum(row.view for row in rows if given.phase in (row.phase, "both"))
    if left and not given.all:
        kinds = f"{left} kinds of views are" if left > 1 else "1 kind of view is"
        print(f"\n  {kinds} left out; --all shows them.")
    if facts["without_rule"]:
        missing = ", ".join(map(op_text, facts["without_rule"]))
        print("\n" + wrapped(f"Without a rule, whole on every rank: {missing}", indent=2))
    else:
        print("\n  Every op has a rule.")


def _flops(flops: float) -> str:
    return f"{_scaled(flops)}FLOP"


def _scaled(number: float) -> str:
    """`8.39 M`."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f} "
