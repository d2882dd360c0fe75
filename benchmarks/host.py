"""What a step costs the host: the processor's time of one rank for a model whose arithmetic is next to nothing.

LLaMA, hidden 64, 8 tokens. Where kernels are this short, what is left is what Python and C++ do to launch them: on a
GPU, the time below which no step can go. One process trains each program in turn, one step each; times are those of the
processor (`time.thread_time`), as other processes may want the machine too, the least of many steps, by phase.

    one rank       plain `torch.compile` of the model, and autopar
    two ranks      `torch.compile` of DistributedDataParallel, and autopar under "ddp", "fsdp" and "megatron"

    python benchmarks/host.py                       # writes benchmarks/host_results.md
    python benchmarks/host.py --layers 4 --steps 20 --ranks 1 --profile autopar
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import multiprocessing
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand import sharded
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")
WARM = 4
ALONE, AGAINST = "torch.compile", "DDP, compiled"
OURS = {1: ("autopar",), 2: ("FSDP2, compiled", "autopar ddp", "autopar fsdp", "autopar megatron")}


def new_model(layers: int) -> nn.Module:
    """The same weights every time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def program(how: str, layers: int, batch: dict[str, torch.Tensor], ranks: int) -> nn.Module:
    """The model as `how` runs it."""
    import autopar

    model = new_model(layers)
    if how == ALONE:
        return torch.compile(model)  # type: ignore[return-value]
    if how == "FSDP2, compiled":
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
        return sharded(model, model.model.layers, mesh, compiled=True)  # type: ignore[union-attr, arg-type]
    if how == AGAINST:
        return torch.compile(nn.parallel.DistributedDataParallel(model))  # type: ignore[return-value]
    _, _, strategy = how.partition(" ")
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp" if strategy == "megatron" else "dp",))
    plan = autopar.plan(
        model, mesh, batch, strategy=strategy or "auto", hardware="cpu", options=autopar.Options(progress=False)
    )
    return autopar.apply(model, plan, mesh)


def step(model: nn.Module, optim: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> Iterator[None]:
    """One step, phase by phase."""
    loss = model(**batch).loss
    yield
    loss.backward()
    yield
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    yield
    optim.step()
    yield
    optim.zero_grad()
    yield


def measured(rank: int, ranks: int, store: str, hows: tuple[str, ...], layers: int, steps: int, queue: Any) -> None:
    """Puts one rank's least seconds per phase of each program into `queue`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    batch = inputs()
    runs: dict[str, Callable[[], Iterator[None]]] = {}
    for how in hows:
        model = program(how, layers, batch, ranks)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        runs[how] = lambda model=model, optim=optim: step(model, optim, batch)  # type: ignore[misc]
    times: dict[str, list[list[float]]] = {how: [] for how in hows}
    gc.disable()  # a collection that falls into one program's step is none of its work
    for _ in range(steps + WARM):
        for how, run in runs.items():
            dist.barrier()
            clock = [time.thread_time()]
            clock += [time.thread_time() for _ in run()]
            times[how].append([end - start for start, end in pairwise(clock)])
        gc.collect(0)
    if rank == 0:
        queue.put({how: (_least(each[WARM:]), _median(each[WARM:])) for how, each in times.items()})
    dist.barrier()
    dist.destroy_process_group()


def inputs() -> dict[str, torch.Tensor]:
    """Eight tokens."""
    ids = torch.arange(8).unsqueeze(0)
    return {"input_ids": ids, "labels": ids}


def _least(steps: list[list[float]]) -> list[float]:
    """Of each phase, and of whole steps."""
    return [min(phase) for phase in zip(*steps, strict=True)] + [min(map(sum, steps))]


def _median(steps: list[list[float]]) -> float:
    """Of whole steps."""
    return sorted(map(sum, steps))[len(steps) // 2]


def on_ranks(ranks: int, hows: tuple[str, ...], layers: int, steps: int) -> dict[str, tuple[list[float], float]]:
    """What rank 0 of `ranks` measured."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        work = (ranks, f"{folder}/store", hows, layers, steps, queue)
        processes = [context.Process(target=measured, args=(rank, *work), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        found: dict[str, tuple[list[float], float]] = queue.get()
        for process in processes:
            process.join()
    return found


def profiled(how: str, layers: int, steps: int) -> None:
    """Prints which functions the steps of one program on one rank spend their time in."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        batch = inputs()
        model = program(how, layers, batch, 1)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for _ in range(WARM):
            list(step(model, optim, batch))
        with cProfile.Profile() as profile:
            for _ in range(steps):
                list(step(model, optim, batch))
        pstats.Stats(profile).sort_stats("cumulative").print_stats(75)
        dist.destroy_process_group()


def table(found: dict[str, tuple[list[float], float]]) -> str:
    """A line per program; the first is what the others are compared with."""
    base = next(iter(found.values()))
    rows = [
        (how, *(f"{second * 1e3:.2f}" for second in least), f"{least[-1] / base[0][-1]:.2f}",
         f"{median / base[1]:.2f}")
        for how, (least, median) in found.items()
    ]  # fmt: skip
    head = ("program", *(f"{phase} ms" for phase in PHASES), "least step ms", "to the first", "medians to the first")
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def main() -> None:
    """One rank and two, for each depth asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--ranks", type=int, nargs="+", choices=tuple(OURS), default=tuple(OURS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--profile", choices=(ALONE, "autopar"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("host_results.md"))
    arguments = parser.parse_args()
    if arguments.profile:
        profiled(arguments.profile, arguments.layers[0], arguments.steps)
        return
    command = f"python benchmarks/host.py --steps {arguments.steps} --layers {' '.join(map(str, arguments.layers))}"
    text = [
        f"# What a step costs the host\n\n`{command}`, torch {torch.__version__}; processor time of rank 0's training\n"
        "thread. What is measured and how: benchmarks/host.py.\n"
    ]
    for ranks in arguments.ranks:
        for layers in arguments.layers:
            hows = ((ALONE, AGAINST)[ranks - 1], *OURS[ranks])
            lines = table(on_ranks(ranks, hows, layers, arguments.steps))
            text.append(f"## {ranks} rank{'s' * (ranks > 1)}, {layers} layers\n\n{lines}\n")
            print(text[-1], flush=True)
    arguments.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
