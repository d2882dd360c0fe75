"""Whether compile time grows with depth: a Hugging Face LLaMA of 4 to 32 layers on four gloo ranks, under `fsdp`.

First step: `plan`, `apply` and one training step, from an empty compile cache. Warm: the same in new processes,
with the plan saved and Inductor's cache kept. Step: the median of the steps after two to warm up.

    python benchmarks/depth.py                       # writes benchmarks/depth.md and .json
    python benchmarks/depth.py --layers 4 16
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from step_time import RANKS, measured
from tabulate import tabulate


def measured_depth(layers: int, strategy: str, steps: int) -> dict[str, Any]:
    """A cold start and a warm one of one depth."""
    with tempfile.TemporaryDirectory() as folder:
        # What the ranks' processes read; this process compiles nothing.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        cold, warm = (
            measured("llama", f"autopar {strategy}", steps, layers, saved=Path(folder) / "plan.json") for _ in range(2)
        )
    return {"layers": layers, "cold": cold, "warm": warm}


def main() -> None:
    """Every depth asked for, and the ratio of each to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=(4, 8, 16, 32))
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    results = []
    for layers in arguments.layers:
        results.append(measured_depth(layers, arguments.strategy, arguments.steps))
        print(json.dumps(results[-1]), flush=True)
    base = results[0]["cold"]["first_s"]
    rows = [
        (r["layers"], f"{r['cold']['first_s']:.1f}", f"{r['cold']['first_s'] / base:.2f}",
         f"{r['warm']['first_s']:.1f}", f"{r['cold']['step_s'] * 1e3:.0f}",
         f"{r['cold']['step_s'] / r['layers'] * 1e3:.1f}")
        for r in results
    ]  # fmt: skip
    head = ("layers", "first step s", "to the first row", "warm first step s", "step ms", "step ms per layer")
    text = (
        f"# First step by depth\n\n`python benchmarks/depth.py --strategy {arguments.strategy} --layers "
        f"{' '.join(map(str, arguments.layers))}`, torch {torch.__version__}, {RANKS} gloo ranks on {os.cpu_count()} "
        f"cores (load {os.getloadavg()[2]:.0f} in the last 15 minutes).\n\n"
        f"{tabulate(rows, head, tablefmt='github', disable_numparse=True)}\n"
    )
    arguments.out.write_text(text)
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
