"""CPU time and memory of planning, stage by stage: `python benchmarks/planning.py [llama3-8b] [llama3-405b] ...`.

Prints, for each model, the seconds of each stage of `autopar.plan`, their ratio to a bare capture of the same graph
(`make_fx` over the training step on fake tensors, measured in the same process unless `--no-bare`), and the peak memory
of the process. `--depth` adds the same model at a quarter of its layers, and what planning costs by depth: CPU seconds
after capture at all layers over those at a quarter of them (the least of three runs). As a budget that binds at one
depth alone has more to be solved there, that is of plans with memory to spare at both depths, and of plans within 0.9
of what these take at each. `-o` writes the table too.

`--axes` prints something else: what `compile_plan` costs after capture, all candidates, paddings and schedules
included, on meshes of as many ranks with two, three and four axes, and its ratio to the mesh of two with as many
tensor-parallel ranks; and what it costs again within 0.8 of the memory that this plan takes.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from autopar.meshes import batch_axes_of
from autopar.planning import captured
from costmodel.hardware import Topology
from passes.capture.collector import settled
from passes.planner.pipeline import Manner, Request, compile_plan, local_program, on_mesh
from passes.program.program import Program


@dataclass(frozen=True)
class Job:
    """A model, its mesh and the batch of one data-parallel rank."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    mesh: tuple[tuple[str, int], ...]
    batch: int
    sequence: int


JOBS = {
    "llama3-8b": Job(4096, 14336, 32, 32, 8, (("dp", 8), ("tp", 8)), 2, 2048),
    "llama3-8b-hsdp": Job(4096, 14336, 32, 32, 8, (("dp_replicate", 2), ("dp_shard", 4), ("tp", 8)), 2, 2048),
    "llama3-70b": Job(8192, 28672, 80, 64, 8, (("dp", 64), ("tp", 8)), 1, 4096),
    "llama3-405b": Job(16384, 53248, 126, 128, 8, (("dp", 128), ("tp", 8)), 1, 8192),
}


def model_of(job: Job, layers: int) -> nn.Module:
    """The model on the meta device, in bf16."""
    config = LlamaConfig(
        hidden_size=job.hidden,
        intermediate_size=job.ffn,
        num_hidden_layers=layers,
        num_attention_heads=job.heads,
        num_key_value_heads=job.kv_heads,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


SPARE, BOUND = "after capture, with memory to spare", "after capture, within 0.9 of its memory"


def bare_capture(model: nn.Module, ids: torch.Tensor) -> None:
    """The training step as `make_fx` records it, with nothing of ours."""
    parameters = dict(model.named_parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: torch.empty(p.shape, dtype=p.dtype, requires_grad=True) for n, p in parameters.items()}
        fake |= {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers()}
        tokens = torch.empty(ids.shape, dtype=torch.long)

    def step(values: dict[str, torch.Tensor], ids: torch.Tensor) -> Any:
        loss = torch.func.functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss
        return loss, torch.autograd.grad(loss, [values[name] for name in parameters])

    from torch._export.utils import _compiling_state_context

    with mode, _compiling_state_context():
        make_fx(step)(fake, tokens)


def timed(found: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    """`work()`, its CPU seconds added to `found[stage]`."""
    start = time.process_time()
    result = work()
    found[stage] = found.get(stage, 0.0) + time.process_time() - start
    return result


def measure(job: Job, layers: int, *, bare: bool) -> dict[str, float]:
    """CPU seconds by stage."""
    found: dict[str, float] = {}
    model = model_of(job, layers)
    topology = on_mesh("h100", job.mesh)
    batch_axes = batch_axes_of(job.mesh, None)
    ways = math.prod(job.mesh[axis][1] for axis in batch_axes)
    ids = torch.empty(ways * job.batch, job.sequence, dtype=torch.long, device="meta")
    if bare:
        timed(found, "bare capture", lambda: bare_capture(model, ids))
    call = {"input_ids": ids, "labels": ids}
    program = timed(found, "capture", lambda: captured(model, (), call, batch_dims=[0, 0], batch_size=len(ids)))
    with settled():
        stages = Stages()
        plan = compile_plan(program, topology, batch_axes, Request(), manner=Manner(stages))
        found |= stages.ended()
    found[SPARE], spare_bytes = _within(1 << 50, program, topology, batch_axes)
    found[BOUND], _ = _within(int(0.9 * spare_bytes), program, topology, batch_axes)
    with settled():
        timed(found, "rewrite (at apply)", lambda: local_program(program, plan, topology, {}))
    found["largest gap"] = plan.bound.gap
    found["of it after capture"] = sum(stages.seconds.values())
    found["planning, all in"] = found["capture"] + found["of it after capture"]
    if bare:
        found["ratio to bare capture"] = found["planning, all in"] / found["bare capture"]
    return found


def _within(budget: int, program: Program, topology: Topology, batch_axes: tuple[int, ...]) -> tuple[float, int]:
    """CPU seconds of a plan within a budget of bytes, the least of three runs, and the bytes it takes."""
    found: dict[str, float] = {}
    least_s = math.inf
    for _ in range(3):
        with settled():
            plan = timed(found, "", lambda: compile_plan(program, topology, batch_axes, Request(budget_bytes=budget)))
        least_s = min(least_s, found.pop(""))
    return least_s, plan.peak_memory_bytes


class Stages:
    """CPU seconds of what a plan's progress tells of: called with the name of each stage as it begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.start_s = "", 0.0

    def __call__(self, stage: str) -> None:
        self.ended()
        self.name, self.start_s = stage.partition(",")[0], time.process_time()

    def ended(self) -> dict[str, float]:
        """All stages, the last of which ends now."""
        if self.name:
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.process_time() - self.start_s
        self.name = ""
        return self.seconds


SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "use_cache": False,
}
TWO, HSDP, TENSOR = "dp=4,tp=2 dp=2,tp=4", "dp_replicate=2,dp_shard=2,tp=2", "dp=2,tp=2,ep=2"
MORE = "dp=2,tp=8 dp=2,tp=2,ep=2,cp=2"
AXES: dict[str, tuple[Callable[[], nn.Module], int, int, str]] = {
    "LLaMA, 2 small layers": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), 2, 128, f"{TWO} {HSDP} {TENSOR} {MORE}"),
    "Mixtral, 2 small layers": (
        lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=8, **SMALL)), 2, 128, f"{TWO} {HSDP} {TENSOR}",
    ),
    "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config(use_cache=False)), 4, 1024, f"{TWO} {HSDP} {TENSOR}"),
    "LLaMA-3-8B": (
        lambda: model_of(JOBS["llama3-8b"], 32), 2, 2048,
        "dp=8,tp=8 dp=4,tp=16 dp_replicate=2,dp_shard=4,tp=8 dp=8,tp=2,ep=4",
    ),
}  # fmt: skip
"""Models, the batch of a data-parallel rank, the sequence, and meshes."""


def axes_table() -> list[list[str]]:
    """Rows: model, mesh, CPU seconds after capture, ratio to two axes with as many tensor-parallel ranks, gap, step;
    seconds, gap and step within 0.8 of the memory."""
    rows: list[list[str]] = []
    for name, (make, batch, sequence, meshes) in AXES.items():
        with torch.device("meta"):
            model = make()
        two: dict[int, float] = {}
        for text in meshes.split():
            mesh = tuple((axis, int(size)) for axis, size in (part.split("=") for part in text.split(",")))
            batch_axes = batch_axes_of(mesh, None)
            ways = math.prod(mesh[axis][1] for axis in batch_axes)
            ids = torch.empty(ways * batch, sequence, dtype=torch.long, device="meta")
            call = {"input_ids": ids, "labels": ids}
            program = captured(model, (), call, batch_dims=[0, 0], batch_size=len(ids))
            figures = ""
            request = Request()
            for within in (False, True):
                start = time.process_time()
                with settled():
                    plan = compile_plan(program, on_mesh("h100", mesh), batch_axes, request)
                seconds = time.process_time() - start
                tensor = math.prod(size for _, size in mesh) // ways
                if len(mesh) == 2 and not within:
                    two[tensor] = seconds
                ratio = "" if within else f"{seconds / two[tensor]:.2f}"
                figures += f" {seconds:.2f} {ratio} {plan.bound.gap:.1e} {1e3 * plan.step_time_s:.3f}"
                request = Request(budget_bytes=int(0.8 * plan.peak_memory_bytes))
            rows.append([name, text, *figures.split()])
            print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama3-8b"], help=", ".join(JOBS))
    parser.add_argument("--no-bare", action="store_true", help="leave out the bare capture")
    parser.add_argument("--depth", action="store_true", help="also at a quarter of the layers")
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file for the table")
    parser.add_argument("--axes", action="store_true", help="meshes of two and of three axes instead")
    options = parser.parse_args()
    if options.axes:
        headers = ["model", "mesh", "CPU seconds", "to two axes", "gap", "step ms"]
        headers += ["within 0.8: CPU seconds", "its gap", "its step ms"]
        print(tabulate(axes := axes_table(), headers=headers, disable_numparse=True))
        if options.output is not None:
            table = tabulate(axes, headers=headers, disable_numparse=True, tablefmt="github")
            title = "What planning costs on meshes of two, three and four axes"
            options.output.write_text(f"# {title}\n\nPrinted by `python benchmarks/planning.py --axes`.\n\n{table}\n")
        return
    columns: dict[str, dict[str, float]] = {}
    for name in options.models:
        if name not in JOBS:
            parser.error(f"unknown model {name!r}; known are {', '.join(JOBS)}")
        job = JOBS[name]
        if options.depth:
            columns[f"{name}/4"] = measure(job, job.layers // 4, bare=not options.no_bare)
        columns[name] = measure(job, job.layers, bare=not options.no_bare)
        if options.depth:
            deep, shallow = columns[name], columns[f"{name}/4"]
            for stage in (SPARE, BOUND):
                deep[f"{stage}, to a quarter of the layers"] = deep[stage] / shallow[stage]
    stages = list(dict.fromkeys(stage for column in columns.values() for stage in column))
    rows = [[stage, *(column.get(stage) for column in columns.values())] for stage in stages]
    print(tabulate(rows, headers=["CPU seconds", *columns], floatfmt=".3f"))
    peak = f"Peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB."
    print(peak)
    if options.output is not None:
        table = tabulate(rows, headers=["CPU seconds", *columns], floatfmt=".2f", tablefmt="github")
        flags = [flag for flag, given in (("--depth", options.depth), ("--no-bare", options.no_bare)) if given]
        command = f"python benchmarks/planning.py {' '.join([*options.models, *flags])}"
        options.output.write_text(f"# What planning costs\n\nPrinted by `{command}`. {peak}\n\n{table}\n")


if __name__ == "__main__":
    main()
