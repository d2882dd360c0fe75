"""Rank the ways to spread training over GPUs by predicted step time, with memory, and say what is enough.

Needs no GPU, no weights and no process group. Exits 1 where nothing fits in memory.

--html plans the fastest that plans can do and draws its report, with all that was priced by time and memory.

example:
  autopar search llama3-70b --gpus 512 --hardware h100 --global-batch 512 --seq 4096
  autopar search examples/model.py:build --gpus 8 --hardware h100 --global-batch 16 --html report.html
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from torch import nn

from autopar import examples
from autopar.cli.arguments import (
    add_batch_dim,
    add_fused_attention,
    add_hardware,
    add_json,
    add_memory,
    add_recompute,
    check_outputs,
    count,
    once,
    output,
    writing,
)
from autopar.cli.compiling import planned, sampled
from autopar.cli.terminal import clean_output, progress
from autopar.options import Options
from autopar.runs.search import search
from autopar.runs.search_result import SearchResult
from passes.capture.inputs import global_inputs
from passes.planner.pipeline import Progress

HELP = "rank mesh shapes by predicted step time and memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar search`."""
    parser.add_argument("model", metavar="MODEL", help="a preset, a config.json or its folder, or file.py:function")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="devices in all")
    parser.add_argument("--global-batch", type=count, required=True, metavar="N", help="sequences per step, over all")
    parser.add_argument("--seq", type=count, metavar="N", help="sequence length (2048, or the model's most)")
    add_fused_attention(parser)
    add_batch_dim(parser)
    add_hardware(parser)
    add_memory(parser)
    add_recompute(parser)
    parser.add_argument("--top", type=count, default=10, metavar="N", help="so many rows (10)")
    parser.add_argument(
        "--html", type=output, metavar="FILE", help="write the best plan's report, with what the search found"
    )
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Search and print."""
    check_outputs({"MODEL": given.model, "--hardware": given.hardware}, html=given.html)
    options = Options(
        memory_budget=given.memory_budget, optimizer=given.optimizer or "adamw", recompute=given.recompute or "auto",
        batch_dims=once("--batch-dim", given.batch_dim) or None,
    )  # fmt: skip
    with clean_output(), progress() as tell:
        asked = sampled(given.model, given.seq, options, given.hardware)
        found = search(
            asked.named.model, given.gpus, given.hardware, given.global_batch, asked.given, sequence=asked.sequence,
            options=options, top=given.top, fused_attention=given.fused_attention, progress=tell,
        )  # fmt: skip
        found = replace(found, notes=(*asked.named.notes, *found.notes))
        planned = any(not candidate.priced_only for candidate in found.candidates)
        if given.html and planned:
            _report(given, asked.named.model, asked.sample, found, tell)
    if given.json:
        print(found.to_json())
    else:
        print(found.text(given.model, given.top))
        if given.html:
            none = "What fits is priced alone, none of it a plan," if found.candidates else "No plan fits,"
            print(f"\nWritten to {given.html}" if planned else f"\n{none} so {given.html} was not written")
    return 0 if found.candidates else 1


def _report(
    given: argparse.Namespace, model: nn.Module, sample: examples.Call, found: SearchResult, tell: Progress
) -> None:
    """The best, planned on its mesh with its micro-batch, beside all that was found."""
    options = found.options()
    batch = global_inputs(*sample, found.best.setup.micro_batch, options.batch_dims)
    plan = planned(
        model, (batch.args, dict(batch.kwargs)), found.best.mesh, hardware=given.hardware, strategy="auto",
        options=options, progress=tell, keep_timeline=True,
    )  # fmt: skip
    tell("drawing the report")
    with writing("html", given.html):
        plan.report(given.html, found.frontier(plan))
