"""Peak memory of training steps on real ranks beside what their plans predict: `python benchmarks/memory.py`.

Each case starts gloo ranks on this machine, trains a few steps of an unmodified model with AdamW, and compares the
plan's `peak_memory_bytes` with what the kernel saw. Prints a table and writes it to `benchmarks/memory_results.md`;
`--only llama fsdp` measures some cases anew.

How it is measured: tensors of 64 KiB and more are given pages of their own and give them back at once (glibc's
`MALLOC_MMAP_THRESHOLD_`), so a process's resident set follows its tensors. Before a step, with no gradients, what is
alive is known to the byte: parameters, buffers and optimizer states. The kernel's high-water mark during the step, less
the resident set before it, comes on top. That counts everything: gloo's copies, kernels' scratch memory, padding. What
it cannot see is memory that is asked for and never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from held_bytes import resident, tensor_bytes
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import autopar

RESULTS = Path(__file__).with_name("memory_results.md")
VOCABULARY, ROWS, LENGTH = 4096, 4, 512


@dataclass(frozen=True)
class Case:
    """A model, how it is laid out, and whether it runs compiled."""

    model: str
    strategy: str
    mesh: tuple[tuple[str, int], ...]
    compile: bool
    recompute: str = "auto"
    regather: bool | None = None
    """Whether activations that tensor parallelism gathers are gathered again for backward; None: as the plan finds."""

    @property
    def ranks(self) -> int:
        """Processes it takes."""
        count = 1
        for _, size in self.mesh:
            count *= size
        return count


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank (the one that takes the most), and what the plan says."""

    strategy: str
    recompute: str
    predicted: int
    peak: int
    at_rest: int
    moment: str
    by_kind: dict[str, int]


def model_of(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model whose step takes hundreds of MB, and a rank's inputs."""
    import transformers as hf

    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    shape = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    if name == "llama":
        config: Any = hf.LlamaConfig(**shape, intermediate_size=704, num_key_value_heads=4, use_cache=False)
        return hf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
    if name == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        config = hf.GPT2Config(n_embd=256, n_layer=4, n_head=8, vocab_size=VOCABULARY, n_positions=LENGTH, **off)
        return hf.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}
    if name == "t5":
        config = hf.T5Config(
            d_model=256, d_kv=32, d_ff=704, num_layers=3, num_heads=8, vocab_size=VOCABULARY, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, use_cache=False,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids[:, : LENGTH // 2].contiguous()}
    if name == "mixtral":
        config = hf.MixtralConfig(
            **shape, intermediate_size=704, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2,
            use_cache=False,
        )  # fmt: skip
        return hf.MixtralForCausalLM(config), {"input_ids": ids, "labels": ids}
    if name == "gemma3":  # norms on branches, windows in all layers but every third
        config = hf.Gemma3TextConfig(
            **{**shape, "num_hidden_layers": 6}, intermediate_size=704, num_key_value_heads=4, head_dim=32,
            sliding_window=128, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            use_cache=False,
        )  # fmt: skip
        return hf.Gemma3ForCausalLM(config), {"input_ids": ids, "labels": ids}
    raise ValueError(f"unknown model {name!r}; known are llama, gpt2, t5, mixtral, gemma3")


# --- one rank ---------------------------------------------------------------------------------------------------------


def rank_main(case: Case, folder: Path) -> None:
    """Train on this rank and write what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", tuple(s for _, s in case.mesh), mesh_dim_names=tuple(n for n, _ in case.mesh))
    model, inputs = model_of(case.model)
    options = autopar.Options(
        compile=case.compile, recompute=case.recompute, regather_activations=case.regather,  # type: ignore[arg-type]
    )  # fmt: skip
    plan = autopar.plan(model, mesh, inputs, strategy=case.strategy, options=options)
    parallel = autopar.apply(model, plan, mesh)
    del model
    optim = torch.optim.AdamW(parallel.parameters(), lr=1e-4)

    def step() -> None:
        parallel(**inputs).loss.backward()
        optim.step()
        optim.zero_grad()

    for _ in range(2):
        step()
    states = [value for state in optim.state.values() for value in state.values()]
    at_rest = tensor_bytes(*parallel.parameters(), *parallel.buffers(), *states, *inputs.values())
    peaks = []
    for _ in range(2):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step()
        peaks.append(at_rest + resident("VmHWM") - before)
    found = Measured(
        plan.strategy, plan.recompute, plan.peak_memory_bytes, max(peaks), at_rest, plan.breakdown.peak_moment,
        dict(plan.breakdown.memory_bytes),
    )  # fmt: skip
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


# --- all cases --------------------------------------------------------------------------------------------------------


def run(case: Case) -> Measured:
    """The rank that takes the most."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        ranks = []
        for rank in range(case.ranks):
            env = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
            }  # fmt: skip
            call = [sys.executable, __file__, "--rank", json.dumps(asdict(case)), "--folder", name]
            ranks.append(subprocess.Popen(call, env=env))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"{case}: ranks ended with {codes}")
        found = [Measured(**json.loads(path.read_text())) for path in Path(name).glob("*.json")]
    return max(found, key=lambda each: each.peak)


def cases() -> list[Case]:
    """Models under strategies, uncompiled and compiled; each way to recompute, and activations gathered again for
    backward, on one of them."""
    dp, tp, both = (("dp", 2),), (("tp", 2),), (("dp", 2), ("tp", 2))
    meshes = {"ddp": dp, "fsdp": dp, "megatron": tp, "auto": both}
    every = [
        Case(model, strategy, mesh, compile)
        for model in ("llama", "gpt2", "t5", "mixtral", "gemma3")
        for compile in (False, True)
        for strategy, mesh in meshes.items()
    ]
    every += [Case("llama", "fsdp", dp, False, mode) for mode in ("none", "selective", "widening", "full")]
    again = (("auto", True), ("full", None), ("full", True))
    return every + [
        Case("llama", "megatron", tp, compile, mode, regather) for compile in (False, True) for mode, regather in again
    ]


def row(case: Case, found: Measured) -> list[str]:
    """A line of the table."""
    mesh = " x ".join(f"{name}={size}" for name, size in case.mesh)
    chosen = case.strategy if case.strategy == found.strategy else f"{case.strategy} ({found.strategy})"
    error = found.predicted / found.peak - 1
    return [
        case.model, chosen, mesh, "compiled" if case.compile else "uncompiled",
        f"{found.recompute}{', gathered again' if case.regather else ''}",
        f"{found.peak / 2**20:.0f}", f"{found.predicted / 2**20:.0f}", f"{error:+.1%}", found.moment,
    ]  # fmt: skip


HEADERS = ["model", "strategy", "mesh", "runs", "recompute", "measured MiB", "predicted MiB", "error", "peak at"]


def written(rows: list[list[str]]) -> str:
    """The results as Markdown; rows of earlier runs that were not measured anew stay."""
    found = {}
    if RESULTS.exists():
        lines = [line for line in RESULTS.read_text().splitlines() if line.startswith("| ")][1:]
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[tuple(cells[:5])] = cells
    found |= {tuple(cells[:5]): cells for cells in rows}
    errors = [abs(float(cells[7].rstrip("%"))) for cells in found.values()]
    about = "Printed by `python benchmarks/memory.py`; how it is measured is in that file's head."
    summary = f"Largest error {max(errors):.1f}%, mean {sum(errors) / len(errors):.1f}%, of {len(errors)} cases."
    table = tabulate([found[key] for key in sorted(found)], HEADERS, tablefmt="github", disable_numparse=True)
    return f"# Peak memory of a rank, measured and predicted\n\n{about} {summary}\n\n{table}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[], help="words that a case must have: llama fsdp compiled recompute=auto"
    )
    parser.add_argument("--kinds", action="store_true", help="print what the prediction is made of, too")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        given = json.loads(options.rank)
        rank_main(Case(**{**given, "mesh": tuple(map(tuple, given["mesh"]))}), options.folder)
        return
    for case in cases():
        words = {case.model, case.strategy, "compiled" if case.compile else "uncompiled", f"recompute={case.recompute}",
                 f"regather={case.regather}"}  # fmt: skip
        if not set(options.only) <= words:
            continue
        start = time.monotonic()
        found = run(case)
        cells = row(case, found)
        print(f"{' '.join(cells)}  [{time.monotonic() - start:.0f} s]", flush=True)
        if options.kinds:
            kinds = ", ".join(f"{kind} {size / 2**20:.0f}" for kind, size in found.by_kind.items())
            print(f"    at rest {found.at_rest / 2**20:.0f}; predicted: {kinds}", flush=True)
        RESULTS.write_text(written([cells]))
    print(f"\n{RESULTS.read_text()}")


if __name__ == "__main__":
    main()
