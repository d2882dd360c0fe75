"""Rank the ways to spread training over GPUs by predicted step time, with memory, and say what is enough.

Needs no GPU, no weights and no process group. Exits 1 where nothing fits in memory.

example:
  autopar search llama3-70b --gpus 512 --hardware h100 --global-batch 512 --seq 4096
"""

from __future__ import annotations

import argparse

from autopar.cli.arguments import add_json, count, size
from autopar.cli.terminal import clean_output, progress
from autopar.model_argument import Wanted, load_model
from autopar.options import Options
from autopar.search import search
from costmodel.hardware import hardware_names

HELP = "rank mesh shapes by predicted step time and memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar search`."""
    parser.add_argument("model", metavar="MODEL", help="a preset, a config.json or its folder, or file.py:function")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="devices in all")
    parser.add_argument("--global-batch", type=count, required=True, metavar="N", help="sequences per step, over all")
    parser.add_argument("--seq", type=count, metavar="N", help="sequence length (2048, or the model's most)")
    parser.add_argument(
        "--hardware", metavar="NAME",
        help=f"{', '.join(hardware_names())}, or a file that calibrate wrote (default: this machine)",
    )  # fmt: skip
    parser.add_argument("--memory-budget", type=size, metavar="SIZE", help="per device: 80GiB (what the device has)")
    parser.add_argument("--optimizer", choices=("adamw", "sgd", "momentum", "none"), default="adamw")
    parser.add_argument("--recompute", choices=("auto", "none", "selective", "full"), default="auto")
    parser.add_argument("--top", type=count, default=10, metavar="N", help="so many rows (10)")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Search and print."""
    options = Options(memory_budget=given.memory_budget, optimizer=given.optimizer, recompute=given.recompute)
    with clean_output(), progress() as tell:
        named = load_model(given.model, Wanted(1, given.seq))
        own = named.inputs if ":" in given.model else None
        length = None if own is not None else int(next(iter(named.inputs.values())).shape[1])
        found = search(
            named.model, given.gpus, given.hardware, given.global_batch, own, sequence=length, options=options,
            top=given.top, progress=tell,
        )  # fmt: skip
    if given.json:
        print(found.to_json())
    else:
        print(found.text(given.model, given.top))
    return 0 if any(not candidate.priced_only for candidate in found.candidates) else 1
