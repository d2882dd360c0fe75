"""autopar on one CUDA GPU: training beside eager, and one rank's share of a plan for eight.

    train   a small LLaMA on a one-GPU mesh through autopar (NCCL, Inductor) beside the same model in eager mode, from
            the same weights on the same batches, in fp32 and bf16: losses, seconds per step, peak memory
    rank0   rank 0 of a plan for eight GPUs, LLaMA-3-8B's layers, with a fake process group that moves no bytes:
            seconds, peak memory and kernels of what this rank computes, beside the same layout by hand, eager and
            compiled, and beside what the plan predicts, kind by kind and product by product

Each measurement has a process of its own, and results are written after each: a run that is ended keeps what it has.
Without a CUDA device there is nothing to measure and the exit code is 0; `--device cpu --small` goes through the same
steps with a tiny model.

    python benchmarks/gpu/run.py                       # writes benchmarks/gpu/results.md and results.json
    python benchmarks/gpu/run.py --only rank0          # one half; the other stays as it is in results.json
    python benchmarks/gpu/run.py --device cpu --small --out out/gpu
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import SMALL, TRAINED, batch, median, new_model, peak_bytes, peak_reset, trained
from rank0 import HOWS, measure_rank0, rank0_tables
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import autopar

MOST_S = 300
"""A measurement that takes longer hangs."""


def measure_train(device: str, small: bool, how: str, dtype: str) -> dict[str, Any]:
    """`how` is eager, torch.compile (with CUDA graphs) or autopar."""
    config = SMALL if small else TRAINED
    rows, length, steps = (2, 16, 4) if small else (8, 1024, 20)
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", init_method=f"file://{store.name}.store", rank=0, world_size=1
        )
        model: nn.Module = new_model(config, device, getattr(torch, dtype))
        prepared_s = 0.0
        if how == "autopar":
            mesh = init_device_mesh(device, (1,), mesh_dim_names=("dp",))
            example = batch(config, rows, length, 0, device)
            options = autopar.Options(compile=not small)
            start = time.perf_counter()
            model = autopar.parallelize(model, mesh, example, options=options)
            prepared_s = time.perf_counter() - start
        elif how.startswith("torch.compile"):
            model.compile(mode="reduce-overhead" if how.endswith("CUDA graphs") else None)
        peak_reset(device)
        losses, seconds = trained(model, config, rows, length, steps, device)
        peak = peak_bytes(device)
        dist.destroy_process_group()
    return {
        "how": how, "dtype": dtype, "losses": losses, "step_s": median(seconds[steps // 2 :]),
        "prepared_s": prepared_s + (seconds[0] if how.startswith("torch.compile") else 0.0), "peak_bytes": peak,
        "tokens": rows * length,
    }  # fmt: skip


# --- results ----------------------------------------------------------------------------------------------------------


def as_markdown(results: dict[str, Any]) -> str:
    """What was measured, as people read it."""
    rows = []
    eager = {r["dtype"]: r for r in results["train"] if r["how"] == "eager"}
    for r in results["train"]:
        worst = max(abs(a - b) / abs(b) for a, b in zip(r["losses"], eager[r["dtype"]]["losses"], strict=True))
        rows.append(
            (r["dtype"], r["how"], f"{r['losses'][0]:.5f}", f"{r['losses'][-1]:.5f}", f"{worst:.1e}",
             f"{r['step_s'] * 1e3:.1f}", f"{r['tokens'] / r['step_s']:,.0f}", f"{r['peak_bytes'] / 2**30:.2f}",
             f"{r['prepared_s']:.0f}")
        )  # fmt: skip
    train = tabulate(
        rows, ("dtype", "how", "first loss", "last loss", "largest relative difference to eager", "ms per step",
               "tokens/s", "peak GiB", "seconds before the first step"), tablefmt="github", disable_numparse=True,
    )  # fmt: skip
    return (
        f"# Measured on {results['device']}\n\ntorch {results['torch']}, by `{results['command']}`.\n\n"
        f"## Training on a one-GPU mesh\n\n{results['train_model']}\n\n{train}\n\n"
        f"## Rank 0 of a plan for eight\n\n{results['rank0_model']} Collectives are fake: they take next to no time, "
        f"and what a reduction gives is whatever memory held, so the step is what the rank computes, not its numbers. "
        f"{results.get('note', '')}\n\n{rank0_tables(results['rank0'])}\n"
    )


def _exists(how: str, strategy: str, mesh_text: str) -> bool:
    """Whether people write that layout: `auto` is nobody's."""
    del mesh_text
    return how == "autopar" or strategy != "auto"


def measured(arguments: argparse.Namespace, *part: str) -> dict[str, Any] | None:
    """One part in a process of its own; None where it failed, whose error is on the screen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--device", arguments.device, "--result", str(path)]
        if arguments.small:
            command.append("--small")
        print("measuring", *part, flush=True)
        environment = {**os.environ, "WORLD_SIZE": "1", "RANK": "0"}
        try:
            subprocess.run([*command, "--part", *part], check=False, env=environment, timeout=MOST_S)
        except subprocess.TimeoutExpired:
            print(f"ended after {MOST_S} s")
        return json.loads(path.read_text()) if path.exists() else None


def parts(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """What is to be measured."""
    hows = ("eager", "torch.compile", "torch.compile, CUDA graphs", "autopar")
    dtypes = ("float32", "bfloat16")
    plans = [("fsdp", "dp=8"), ("megatron", "dp=2,tp=4"), ("megatron", "dp=1,tp=8"), ("auto", "dp=2,tp=4")]
    programs = HOWS
    if arguments.small:  # nothing small is compiled
        hows, dtypes, plans, programs = hows[::3], dtypes[:1], plans[:2], HOWS[::2]
    train = [("train", how, dtype) for dtype in dtypes for how in hows]
    rank0 = [("rank0", how, *plan) for plan in plans for how in programs if _exists(how, *plan)]
    return [part for part in (*train, *rank0) if arguments.only in (None, part[0])]


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and on what is measured."""
    return {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "command": "python benchmarks/gpu/run.py" + (" --device cpu" if arguments.device == "cpu" else "")
        + (" --small" if arguments.small else ""),
        "train_model": "Tiny LLaMA." if arguments.small else
        "LLaMA, 8 layers, hidden 1024, vocabulary 32,000; 8 rows of 1,024 tokens; AdamW, clipping at 1.",
        "rank0_model": "Tiny LLaMA." if arguments.small else
        "LLaMA-3-8B's dimensions with 4 of its 32 layers, bf16; 1 row of 4,096 tokens per data-parallel rank; AdamW.",
    }  # fmt: skip


def kept(arguments: argparse.Namespace, here: dict[str, Any]) -> dict[str, Any]:
    """The half that is not measured, as it was last.

    Raises:
        SystemExit: it was measured elsewhere or otherwise; names both.
    """
    path = arguments.out / "results.json"
    if not arguments.only or not path.exists():
        return {}
    last = json.loads(path.read_text())
    for what in ("device", "torch", "command"):
        if last[what] != here[what]:
            sys.exit(f"{path} is of {what} {last[what]}, this is {here[what]}: --out another folder, or no --only")
    other = {"train": "rank0", "rank0": "train"}[arguments.only]
    return {other: last[other], **({"note": last["note"]} if other == "rank0" and "note" in last else {})}


def write(results: dict[str, Any], out: Path) -> None:
    """Losses are held against eager's: without it a dtype has nothing to say."""
    with_eager = {r["dtype"] for r in results["train"] if r["how"] == "eager"}
    results = {**results, "train": [r for r in results["train"] if r["dtype"] in with_eager]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(as_markdown(results))


def main() -> int:
    """Every part, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, uncompiled: a check of this script")
    parser.add_argument("--only", choices=("train", "rank0"), help="measure this half; keep the other's last results")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder of the results")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (--device cpu --small checks this script)")
        return 0
    if arguments.part:
        function = {"train": measure_train, "rank0": measure_rank0}[arguments.part[0]]
        result = function(arguments.device, arguments.small, *arguments.part[1:])
        arguments.result.write_text(json.dumps(result))
        return 0

    here = described(arguments)
    results = {**here, "train": [], "rank0": [], **kept(arguments, here)}
    failed = 0
    for part in parts(arguments):
        found = measured(arguments, *part)
        failed += found is None
        results[part[0]] += [found] if found is not None else []
        write(results, arguments.out)
    print((arguments.out / "results.md").read_text())
    if failed:
        print(f"{failed} measurements failed; their errors are above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
