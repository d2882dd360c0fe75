"""A small Hugging Face LLaMA trained on four CPU ranks, beside the same training on one device.

    one device              the unmodified model, eager, given the whole batch
    dp=2 x tp=2             the same steps on four gloo ranks, by a plan that autopar made: tensor and sequence
                            parallelism on tp, state sharded over dp; saves a checkpoint
    fsdp=4                  loads it in a new job on another mesh, with another plan, and goes on

Bytes of the standard library's own sources are the text. Ends with exit code 1 where a loss is off by more than
`TOLERANCE`. `python examples/demo.py` starts everything; `--quick` does a few steps of a tiny model.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from source_text import VOCABULARY, global_batch, source_text
from tabulate import tabulate
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import autopar

TOLERANCE = 1e-5
"""Largest relative difference of a loss from one device's; what is left is the order in which fp32 sums are taken."""
RANKS = 4


@dataclass(frozen=True)
class Setup:
    """What is trained, and for how long; the same for every run of the demo."""

    hidden: int = 256
    layers: int = 2
    rows: int = 16
    length: int = 128
    steps: int = 60
    saved_at: int = 36
    compile: bool = True

    def model(self) -> nn.Module:
        """The unmodified model, with the same weights every time."""
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=self.hidden,
                intermediate_size=8 * self.hidden // 3,
                num_hidden_layers=self.layers,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=self.length,
            )
        )

    @property
    def tokens(self) -> int:
        """Per step, over all ranks."""
        return self.rows * self.length


@dataclass(frozen=True)
class Phase:
    """One job of four ranks."""

    mesh: dict[str, int]
    strategy: str
    first: int
    last: int

    @property
    def title(self) -> str:
        """`dp=2 x tp=2, auto`."""
        return " x ".join(f"{name}={size}" for name, size in self.mesh.items()) + f", {self.strategy}"


@dataclass(frozen=True)
class Curve:
    """Losses by step, and how long the steps took; the first of a run, which may compile, is not in the time."""

    losses: dict[int, float]
    seconds: float
    timed_steps: int
    prepared_s: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Curve:
        """What a run wrote."""
        data = json.loads(path.read_text())
        return cls(**{**data, "losses": {int(step): loss for step, loss in data["losses"].items()}})

    def save(self, path: Path) -> None:
        """For the other runs to read."""
        path.write_text(json.dumps(asdict(self)))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The same for every run."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model: nn.Module, optim: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """One step, as anybody writes it: the code is the same for the plain model and the parallel one."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    optim.zero_grad()
    return float(loss.detach())


# --- one device -------------------------------------------------------------------------------------------------------


def run_one_device(setup: Setup, out: Path) -> Curve:
    """The curve that all others are held against; on one thread, as each of the ranks has."""
    torch.set_num_threads(1)
    model, text = setup.model(), source_text()
    optim = optimizer(model)
    size = sum(p.numel() for p in model.parameters())
    say(f"\nOne device: LLaMA with {size / 1e6:.1f} M parameters, {setup.tokens:,} bytes of source text a step, eager")
    losses: dict[int, float] = {}
    progress = Progress(range(setup.steps), "one device", setup)
    start = time.perf_counter()
    for step in progress:
        losses[step] = train_step(model, optim, global_batch(text, step, setup.rows, setup.length))
        if step == 0:
            start = time.perf_counter()
        progress.show(step, losses[step])
    curve = Curve(losses, time.perf_counter() - start, setup.steps - 1)
    curve.save(out / "one_device.json")
    return curve


# --- four ranks -------------------------------------------------------------------------------------------------------


def run_rank(setup: Setup, phase: Phase, out: Path) -> None:
    """What each of the four processes does: plan, apply, load if there is something, train, save."""
    dist.init_process_group("gloo")
    # DTensor's norm over two mesh axes is two reductions, which it warns of on every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh = init_device_mesh("cpu", tuple(phase.mesh.values()), mesh_dim_names=tuple(phase.mesh))
    axis = next(iter(phase.mesh))  # splits the batch
    parts, mine = mesh[axis].size(), mesh.get_local_rank(axis)
    rank0 = dist.get_rank() == 0
    text = source_text()

    def batch(step: int) -> torch.Tensor:
        return global_batch(text, step, setup.rows, setup.length).chunk(parts)[mine]

    before = time.perf_counter()
    model = setup.model()
    example = {"input_ids": batch(0), "labels": batch(0)}
    options = autopar.Options(compile=setup.compile)
    plan = autopar.plan(model, mesh, example, strategy=phase.strategy, options=options)
    if rank0:
        say(f"planned in {time.perf_counter() - before:.1f} s\n\n{plan}\n")
    before = time.perf_counter()
    model = autopar.apply(model, plan, mesh)
    optim = optimizer(model)
    prepared_s = time.perf_counter() - before
    if rank0:
        say(f"ready to train after {prepared_s:.1f} s more{', compiled by Inductor' if setup.compile else ''}")

    checkpoint = out / "checkpoint"
    if phase.first:
        state, optim_state = get_state_dict(model, optim)
        dcp.load({"model": state, "optim": optim_state}, checkpoint_id=str(checkpoint))
        set_state_dict(model, optim, model_state_dict=state, optim_state_dict=optim_state)
        if rank0:
            say(f"loaded the checkpoint of step {phase.first}")

    reference = Curve.load(out / "one_device.json").losses
    losses: dict[int, float] = {}
    progress = Progress(range(phase.first, phase.last), phase.title, setup, quiet=not rank0)
    start = time.perf_counter()
    for step in progress:
        losses[step] = train_step(model, optim, batch(step))
        if step == phase.first:
            start = time.perf_counter()
        progress.show(step, losses[step], reference[step])
    seconds = time.perf_counter() - start

    if phase.last == setup.saved_at:
        state, optim_state = get_state_dict(model, optim)
        dcp.save({"model": state, "optim": optim_state}, checkpoint_id=str(checkpoint))
        if rank0:
            say(f"saved a checkpoint of step {phase.last}")
    if rank0:
        Curve(losses, seconds, len(losses) - 1, prepared_s).save(out / f"from_{phase.first}.json")
    dist.destroy_process_group()


def start_ranks(phase: Phase, arguments: list[str]) -> None:
    """Four processes that run this file's `run_rank`, under torchrun."""
    say(f"\nFour ranks, {phase.title}: steps {phase.first} to {phase.last}")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
        *(str(Path(__file__).resolve()), *arguments, f"--from-step={phase.first}"),
    ]
    # One thread each, for compiling too, or four ranks on few cores stand in each other's way.
    single = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **single})


# --- what one sees ----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line of the demo's own output."""
    print(text, flush=True)


class Progress:
    """A bar on a terminal, a line every few steps elsewhere."""

    def __init__(self, steps: range, title: str, setup: Setup, quiet: bool = False) -> None:
        self.steps, self.setup, self.quiet = steps, setup, quiet
        self.every = max(1, len(steps) // 4)
        bar = sys.stderr.isatty() and not quiet
        self.bar = tqdm(steps, desc=title, unit="step", disable=not bar, dynamic_ncols=True, leave=True)
        self.lines = not bar and not quiet

    def __iter__(self) -> Iterable[int]:
        return iter(self.bar)

    def show(self, step: int, loss: float, reference: float | None = None) -> None:
        """The step's loss, and how far it is from one device's."""
        beside = "" if reference is None else f"one device {reference:.5f}, off by {relative(loss, reference):.1e}"
        if self.lines:
            if (step - self.steps.start) % self.every == 0 or step == self.steps.stop - 1:
                say(f"  step {step:3d}   loss {loss:.5f}   {beside}".rstrip())
        else:
            self.bar.set_postfix_str(f"loss {loss:.4f} {beside}")


def relative(found: float, wanted: float) -> float:
    """Relative difference."""
    return abs(found - wanted) / abs(wanted)


def summary(setup: Setup, phases: list[Phase], out: Path) -> bool:
    """Prints every run beside the one-device run; whether all losses are within the tolerance."""
    one = Curve.load(out / "one_device.json")
    curves = [(phase, Curve.load(out / f"from_{phase.first}.json")) for phase in phases]
    rows = []
    for phase, curve in curves:
        steps = sorted({*range(phase.first, phase.last, max(1, setup.steps // 10)), phase.last - 1})
        for step in steps:
            off = relative(curve.losses[step], one.losses[step])
            rows.append((step, phase.title, f"{one.losses[step]:.6f}", f"{curve.losses[step]:.6f}", f"{off:.1e}"))
    say(
        "\n"
        + tabulate(rows, ("step", "mesh", "one device", "four ranks", "relative difference"), disable_numparse=True)
    )
    speeds = [("one device", one), *((phase.title, curve) for phase, curve in curves)]
    speed_rows = [
        (title, f"{setup.tokens * c.timed_steps / c.seconds:,.0f}" if c.timed_steps else "-", f"{c.prepared_s:.1f}")
        for title, c in speeds
    ]
    say("\n" + tabulate(speed_rows, ("run", "tokens/s", "apply and compile, s"), colalign=("left", "right", "right")))
    off_by = {s: relative(loss, one.losses[s]) for _, curve in curves for s, loss in curve.losses.items()}
    step, worst = max(off_by.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    good = worst <= TOLERANCE
    say(
        f"\nLargest relative difference of a loss: {worst:.1e} (step {step}); tolerance {TOLERANCE:.0e}: "
        f"{'the same training' if good else 'NOT the same training'}"
    )
    return good


# --- start ------------------------------------------------------------------------------------------------------------


def main() -> int:
    """The whole demo, or one rank of one of its jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps, not compiled")
    parser.add_argument("--no-compile", action="store_true", help="run the planned graphs uncompiled")
    parser.add_argument(
        "--strategy", default="megatron", help="of the dp x tp mesh: megatron (default), auto, ddp, fsdp"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="for the checkpoint and the curves")
    parser.add_argument("--from-step", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setup = Setup(compile=not arguments.no_compile)
    if arguments.quick:
        setup = Setup(hidden=64, layers=2, rows=8, length=32, steps=8, saved_at=4, compile=False)
    phases = [
        Phase({"dp": 2, "tp": 2}, arguments.strategy, 0, setup.saved_at),
        Phase({"fsdp": 4}, "fsdp", setup.saved_at, setup.steps),
    ]
    if arguments.from_step is not None:
        run_rank(setup, next(phase for phase in phases if phase.first == arguments.from_step), arguments.out)
        return 0
    begun = time.perf_counter()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    try:
        run_one_device(setup, arguments.out)
        for phase in phases:
            start_ranks(phase, sys.argv[1:])
    except subprocess.CalledProcessError as error:
        say(f"\nA rank failed; its error is above (exit code {error.returncode}).")
        return 1
    good = summary(setup, phases, arguments.out)
    say(f"Done in {time.perf_counter() - begun:.0f} s.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
