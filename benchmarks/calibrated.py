"""A plan for this CPU against what it measures: `python benchmarks/calibrated.py`.

Calibrates this machine with four gloo ranks (or takes a file of `autopar calibrate --ranks 4`), plans the demo's model
on the demo's meshes with it, and times the demo's own training step on real ranks. Prints predicted and measured
seconds, the error, and how fast the machine is now: the products and sums that were timed to calibrate are timed again
before and after the steps, as a machine shared with others may be a third slower a minute later, which no plan knows.
A loaded machine slows calibration and training unequally: see the load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh

import autopar
from costmodel.calibrate import save_calibration
from costmodel.time_ops import measure_matmuls, measure_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import demo
from source_text import global_batch, source_text

MESHES = (({"dp": 2, "tp": 2}, "megatron"), ({"fsdp": 4}, "fsdp"), ({"dp": 4}, "ddp"))
"""Meshes and strategies: those of the demo, and plain data parallelism."""


def time_rank(index: int, hardware: str, steps: int, out: Path, *, compile: bool) -> None:
    """What each rank does: plan with the calibrated figures, apply, train, and rank 0 writes both times."""
    shape, strategy = MESHES[index]
    dist.init_process_group("gloo")
    setup = demo.Setup(compile=compile)
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    axis = next(iter(shape))
    parts, mine = mesh[axis].size(), mesh.get_local_rank(axis)
    ids = global_batch(source_text(), 0, setup.rows, setup.length).chunk(parts)[mine]
    model = setup.model()
    example = {"input_ids": ids, "labels": ids}
    options = autopar.Options(compile=compile)
    plan = autopar.plan(model, mesh, example, hardware=hardware, strategy=strategy, options=options)
    module = autopar.apply(model, plan, mesh)
    optim = demo.optimizer(module)
    for _ in range(2):
        demo.train_step(module, optim, ids)
    speeds = [slower_by(hardware)]
    seconds = []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        demo.train_step(module, optim, ids)
        seconds.append(time.perf_counter() - start)
    speeds.append(slower_by(hardware))
    if dist.get_rank() == 0:
        found = {
            "slower": statistics.mean(speeds),
            "predicted": plan.step_time_s,
            "measured": statistics.median(seconds),
            "fastest": min(seconds),
        }
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def slower_by(hardware: str) -> float:
    """How many times as long products and sums take as when the machine was calibrated; all ranks ask at once."""
    known = json.loads(Path(hardware).read_text(encoding="utf-8"))["samples"]
    dist.barrier()
    products = measure_matmuls(torch.device("cpu"), [torch.float32], 2.0)
    sums = measure_memory(torch.device("cpu"), 1.0)
    dist.barrier()
    before = {tuple(each[k] for k in ("dtype", "m", "n", "k")): each["seconds"] for each in known["matmuls"]}
    before |= {each["bytes_moved"]: each["seconds"] for each in known["memory"]}
    now = {(each.dtype, each.m, each.n, each.k): each.seconds for each in products}
    return statistics.geometric_mean(
        seconds / before[what] for what, seconds in (*now.items(), *((s.bytes_moved, s.seconds) for s in sums))
    )


def start_ranks(arguments: list[str]) -> None:
    """This file once per rank, one thread each, under torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={demo.RANKS}"),
        *(str(Path(__file__).resolve()), *arguments),
    ]
    single = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **single}, stdout=subprocess.DEVNULL)


def main() -> None:
    """Calibrate, time, print; or be one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", metavar="FILE", help="a calibrated file (default: calibrate now)")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long to calibrate (30)")
    parser.add_argument("--steps", type=int, default=20, help="steps to time (20)")
    parser.add_argument("--no-compile", action="store_true", help="run the planned graphs uncompiled")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        torch.set_num_threads(1)
        time_rank(given.rank, given.hardware, given.steps, given.out, compile=not given.no_compile)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        hardware = given.hardware or str(Path(folder) / "hardware.json")
        if not given.hardware:
            print(f"calibrating for about {given.seconds:g} s", file=sys.stderr)
            save_calibration(hardware, device="cpu", ranks=demo.RANKS, budget_s=given.seconds)
        for index, (shape, strategy) in enumerate(MESHES):
            out = Path(folder) / f"{index}.json"
            title = " x ".join(f"{name}={size}" for name, size in shape.items()) + f", {strategy}"
            print(f"timing {title}", file=sys.stderr)
            arguments = [f"--rank={index}", f"--hardware={hardware}", f"--steps={given.steps}", f"--out={out}"]
            start_ranks([*arguments, *(["--no-compile"] if given.no_compile else [])])
            found = json.loads(out.read_text(encoding="utf-8"))
            error = found["predicted"] / found["measured"] - 1
            times = [f"{found[name] * 1e3:.1f} ms" for name in ("predicted", "measured", "fastest")]
            rows.append([title, *times, f"{error:+.0%}", f"{found['slower'] - 1:+.0%}"])
    headers = ["mesh, strategy", "predicted", "measured (median)", "fastest step", "error of the median",
               "ops' times since calibrated"]  # fmt: skip
    print(tabulate(rows, headers=headers, tablefmt="github"))
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores; load {load:.1f} before, {os.getloadavg()[0]:.1f} at the end (of this run: {demo.RANKS})")


if __name__ == "__main__":
    main()
