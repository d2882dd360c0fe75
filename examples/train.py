"""The shortest training script: an unmodified Hugging Face model on as many ranks as torchrun starts.

torchrun --nproc-per-node=4 examples/train.py --steps 20

With --profile FOLDER, rank 0 records the last steps, for `autopar diff --measured FOLDER/trace.json FOLDER/plan.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from source_text import VOCABULARY, global_batch, source_text
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

import autopar


def main() -> None:
    """Train and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="rows per data-parallel rank and step")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="record the last steps, and keep the plan")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    ranks = dist.get_world_size()
    tp = 2 if ranks % 2 == 0 else 1
    mesh = init_device_mesh(device, (ranks // tp, tp), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    text, length = source_text(), 128
    example = torch.zeros(arguments.rows, length, dtype=torch.long)
    inputs = {"input_ids": example, "labels": example}
    plan = autopar.plan(model, mesh, inputs, options=autopar.Options(compile=not arguments.no_compile))
    model = autopar.apply(model, plan, mesh)  # autopar.parallelize(model, mesh, inputs) does both
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    profiler = recording(arguments.steps, arguments.profile) if arguments.profile and dist.get_rank() == 0 else None
    for step in range(arguments.steps):
        whole = global_batch(text, step, arguments.rows * (ranks // tp), length)
        ids = whole.chunk(ranks // tp)[mesh.get_local_rank("dp")].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)
        if profiler is not None:
            profiler.step()
    if profiler is not None:
        profiler.stop()
        plan.save(arguments.profile / "plan.json")
    dist.destroy_process_group()


def recording(steps: int, folder: Path) -> torch.profiler.profile:
    """A profiler that has started; the last steps, three at most, go to a trace in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    last = max(1, min(3, steps - 1))
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=steps - last, active=last, repeat=1),
        on_trace_ready=lambda it: it.export_chrome_trace(str(folder / "trace.json")),
    )
    profiler.start()
    return profiler


if __name__ == "__main__":
    main()
