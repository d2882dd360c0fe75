"""autopar beside what people write by hand: the same Hugging Face model, batches and optimizer, gloo ranks of one CPU.

    ddp, ddp compiled            DistributedDataParallel
    fsdp2, fsdp2 compiled        fully_shard on every layer and the whole; each layer compiled
    fsdp2+tp                     parallelize_module on (dp, tp), then fully_shard; LLaMA only (Conv1D is no Linear)
    autopar ddp|fsdp|megatron    on (4,), (4,) and (2, 2)
    autopar auto                 on the mesh that autopar.search chooses
    ... kept                     gathered parameters stay from forward to backward (reshard_after_forward=False)

Each contender has processes of its own and trains the same steps, all with torch's fused AdamW. Machines get slower
and faster within minutes, so those that are compared take turns, `TURN` steps each, while the others wait. The first
step of a turn is not timed: it finds the caches full of what others left there. They are two lots, as all would not
fit into memory; compiled DDP, the fastest by hand, is in both.

Reported are the median step, the first step of all with all that is planned and compiled before it, the last loss,
which must be equal, and memory of the largest rank: the most bytes of tensors in a step, by what the allocator tells
torch's profiler in one step more, and the growth of the process from the bare model to the highest point of the steps
after the first turn, which has the code of torch's compiler in it, some 50 MiB, and what the C library keeps.

    python benchmarks/step_time.py                                     # writes benchmarks/step_time.md and .json
    python benchmarks/step_time.py --hardware FILE   # plans by the figures of `autopar calibrate --ranks 4 -o FILE`
    python benchmarks/step_time.py --mkl             # autopar's products by MKL on any CPU, as all products by hand are
    python benchmarks/step_time.py --model llama --steps 5 --only fsdp2 "autopar fsdp"
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand import sharded
from held_bytes import resident, tensor_bytes
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

from costmodel.products import is_for_onednn

MODELS = ("llama", "gpt2")
HAND_MADE = ("ddp", "ddp compiled", "fsdp2", "fsdp2 compiled", "fsdp2 compiled kept", "fsdp2+tp")
OURS = ("autopar ddp", "autopar fsdp", "autopar fsdp kept", "autopar megatron", "autopar auto")
SAME = {
    "autopar ddp": HAND_MADE[:2], "autopar fsdp": HAND_MADE[2:4], "autopar fsdp kept": HAND_MADE[4:5],
    "autopar megatron": HAND_MADE[5:],
}  # fmt: skip
LOTS = (
    ("ddp", "ddp compiled", "fsdp2 compiled kept", "autopar ddp", "autopar fsdp kept", "autopar auto"),
    ("ddp compiled", "fsdp2", "fsdp2 compiled", "fsdp2+tp", "autopar fsdp", "autopar megatron"),
)
"""Those that take turns."""
RANKS, ROWS, LENGTH, TURN = 4, 2, 128, 5


def new_model(name: str, layers: int = 4) -> nn.Module:
    """The same weights every time; no dropout, so that losses can be compared."""
    import transformers

    torch.manual_seed(0)
    if name == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=2048, n_embd=256, n_layer=layers, n_head=8, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The repeated layers."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h  # type: ignore[return-value, union-attr]


def batch(step: int, row_rank: int, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """What the data-parallel rank `row_rank` feeds in a step: walks whose steps are small."""
    generator = torch.Generator().manual_seed(step)
    walk = torch.randint(0, 8, (ROWS * RANKS, LENGTH), generator=generator).cumsum(1) % 2048
    mine = walk[row_rank * rows : (row_rank + 1) * rows].contiguous()
    return {"input_ids": mine, "labels": mine}


def by_hand(how: str, model: nn.Module) -> tuple[nn.Module, DeviceMesh]:
    """`model` as people distribute it."""
    from torch.nn.parallel import DistributedDataParallel

    shape = (2, 2) if how == "fsdp2+tp" else (RANKS,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    if how.startswith("ddp"):
        wrapped: nn.Module = DistributedDataParallel(model)
        return (torch.compile(wrapped) if how == "ddp compiled" else wrapped), mesh  # type: ignore[return-value]
    return sharded(model, layers_of(model), mesh, compiled="compiled" in how, reshard="kept" not in how), mesh


@dataclass(frozen=True)
class Setting:
    """What autopar is told beside the strategy: figures of `autopar calibrate`, the mesh for `auto`, and whether MKL is
    to run its products where oneDNN is faster."""

    hardware: str | None = None
    auto: Mapping[str, int] = field(default_factory=lambda: {"dp": 2, "tp": 2})
    mkl: bool = False


def searched(name: str, layers: int, hardware: str | None) -> dict[str, int]:
    """The mesh that a search finds best for the model and the global batch of all ranks."""
    import autopar

    found = autopar.search(
        new_model(name, layers), RANKS, hardware, global_batch=ROWS * RANKS, example_inputs=batch(0, 0, 1)
    )
    best = next(each for each in found.candidates if each.setup.accumulate == 1 and not each.setup.priced_only)
    return dict(best.mesh)


def planned(how: str, model: nn.Module, setting: Setting, saved: Path | None = None) -> tuple[nn.Module, DeviceMesh]:
    """`model` as autopar distributes it; by the plan in the file `saved` where there is one, else it is saved there."""
    import autopar

    sizes = {"dp": RANKS}
    if how.endswith("megatron"):
        sizes = {"dp": 2, "tp": 2}
    elif how.endswith("auto"):
        sizes = dict(setting.auto)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    rows = ROWS * RANKS // next(iter(sizes.values()))
    if saved is not None and saved.exists():
        plan = autopar.Plan.load(saved)
    else:
        options = autopar.Options(reshard_after_forward=False if how.endswith("kept") else None)
        plan = autopar.plan(
            model, mesh, batch(0, 0, rows), strategy=how.split()[1], options=options, hardware=setting.hardware
        )
        if saved is not None and dist.get_rank() == 0:
            plan.save(saved)
    return autopar.apply(model, plan, mesh), mesh


def turns_of(steps: int) -> int:
    """How many turns bring `steps` timed ones: the first turn warms up, and so does the first step of the others."""
    return 1 + math.ceil(steps / (TURN - 1))


def most_taken(step: Callable[[], object]) -> int:
    """The most bytes of tensors made in `step` that are alive at one time, as the allocator tells torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        told.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    taken = sorted((each["ts"], each["args"]["Bytes"]) for each in events if each["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in taken), initial=0))


def trained(
    rank: int,
    store: str,
    name: str,
    how: str,
    steps: int,
    layers: int,
    setting: Setting,
    saved: Path | None,
    queue: Any,
    turns: Any,
) -> None:
    """One rank of one contender; it waits for each of its turns, and rank 0 says when one is over."""
    torch.set_num_threads(1)
    if setting.mkl and how.startswith("autopar"):
        torch.backends.mkldnn.enabled = False
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        model = new_model(name, layers)
        before = resident("VmRSS")
        dist.barrier()
        turns.acquire()
        start = time.perf_counter()
        model, mesh = planned(how, model, setting, saved) if how.startswith("autopar") else by_hand(how, model)
        ways, row_rank = mesh.shape[0], mesh.get_coordinate()[0]  # type: ignore[index]
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        seconds, loss = [], torch.zeros(())

        def train(step: int) -> torch.Tensor:
            loss: torch.Tensor = model(**batch(step, row_rank, ROWS * RANKS // ways)).loss
            loss.backward()
            optim.step()
            optim.zero_grad()
            return loss.detach()

        for step in range(turns_of(steps) * TURN):
            if step and step % TURN == 0:
                turns.acquire()
            if step == TURN:
                Path("/proc/self/clear_refs").write_text("5")  # forget the highest point so far
            if step:
                start = time.perf_counter()
            loss = train(step)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
            if rank == 0 and (step + 1) % TURN == 0:
                queue.put((rank, None, None))
        grown = resident("VmHWM") - before
        whole = loss.clone()
        dist.all_reduce(whole)
        timed = sorted(took for step, took in enumerate(seconds) if step >= TURN and step % TURN)
        states = (value for state in optim.state.values() for value in state.values())
        at_rest = tensor_bytes(*model.parameters(), *model.buffers(), *states)
        if how.startswith("ddp"):  # its buckets stay, as many bytes as gradients
            at_rest += tensor_bytes(*model.parameters())
        result = {
            "first_s": seconds[0], "step_s": timed[len(timed) // 2], "fastest_s": timed[0],
            "loss": float(whole) / RANKS, "grown_bytes": grown,
            "tensor_bytes": at_rest + most_taken(lambda: train(0)),
        }  # fmt: skip
        queue.put((rank, result, None))
        turns.acquire()  # to leave takes the processor from others, whose last turn it is
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
        raise


class Contender:
    """The processes of one program."""

    def __init__(self, name: str, how: str, steps: int, layers: int, setting: Setting, saved: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.how, self.error = name, how, ""
        self.found: dict[int, dict[str, Any]] = {}
        self.queue, self.turns = context.Queue(), context.Semaphore(0)
        self.folder = tempfile.TemporaryDirectory()
        work = (f"{self.folder.name}/store", name, how, steps, layers, setting, saved, self.queue, self.turns)
        self.processes = [context.Process(target=trained, args=(rank, *work), daemon=True) for rank in range(RANKS)]
        for process in self.processes:
            process.start()

    def turn(self) -> None:
        """Has all ranks train the steps of a turn, the first with what comes before it."""
        if not self.error:
            for _ in self.processes:
                self.turns.release()
            while self.next() and not self.error:  # another rank may be done before the first says that the turn is
                pass

    def next(self) -> bool:
        """Hears what a rank says next, and keeps what it took: whether that was said. An error ends all ranks."""
        said = None
        while said is None:
            try:
                said = self.queue.get(timeout=5)
            except queue.Empty:
                if not any(process.is_alive() for process in self.processes):
                    said = 0, None, "all ranks have ended, and not all have said what they took"
        rank, result, error = said
        if error:
            self.error = error.strip().splitlines()[-1]
            for process in self.processes:
                process.kill()
        if result is not None:
            self.found[rank] = result
        return result is not None

    def result(self) -> dict[str, Any]:
        """What it took, after the last step: seconds of rank 0, memory of the largest rank."""
        while not self.error and len(self.found) < RANKS:
            self.next()
        for _ in self.processes:
            self.turns.release()
        for process in self.processes:
            process.join()
        self.folder.cleanup()
        if self.error:
            return {"model": self.name, "how": self.how, "error": self.error}
        most = {what: max(result[what] for result in self.found.values()) for what in ("grown_bytes", "tensor_bytes")}
        return {"model": self.name, "how": self.how, **self.found[0], **most}


def measured(
    name: str, how: str, steps: int, layers: int = 4, setting: Setting = Setting(), saved: Path | None = None
) -> dict[str, Any]:
    """What a contender took by itself."""
    (found,) = in_turns(name, [how], steps, layers, setting, saved)
    return found


def in_turns(
    name: str, hows: Sequence[str], steps: int, layers: int, setting: Setting, saved: Path | None = None
) -> list[dict[str, Any]]:
    """What contenders took that step in turns, with their ratios to those by hand among them."""
    contenders = [Contender(name, how, steps, layers, setting, saved) for how in hows]
    for _ in range(turns_of(steps)):
        for contender in contenders:
            contender.turn()
    found = [contender.result() for contender in contenders]
    took_s = {each["how"]: each["step_s"] for each in found if "error" not in each}
    for each in found:
        for ratio, others in (("to_hand", HAND_MADE), ("to_same", SAME.get(each["how"], ()))):
            peers = [took_s[how] for how in others if how in took_s]
            if peers and each["how"] in took_s:
                each[ratio] = took_s[each["how"]] / min(peers)
    return found


def as_markdown(results: list[dict[str, Any]], command: str, mkl: bool) -> str:
    """The tables that people read."""
    whole = torch.ones(RANKS * LENGTH, 256)
    library = "MKL as all others'" if mkl or not is_for_onednn(whole, whole.t()) else "oneDNN, all others' by MKL"
    text = [
        f"# Step time beside hand-written programs\n\n`{command}`, torch {torch.__version__}, {RANKS} gloo ranks on "
        f"{os.cpu_count()} cores (load {os.getloadavg()[2]:.0f} in the last 15 minutes).\nPrograms took turns in two "
        f"lots, so ratios compare, and milliseconds only within a lot. autopar's products in fp32 ran by {library}.\n"
    ]
    for name in dict.fromkeys(result["model"] for result in results):
        rows = [result for result in results if result["model"] == name]
        table = []
        for row in rows:
            if "error" in row:
                table.append((row["how"], row["error"][:80], *[""] * 7))
                continue
            to_hand, to_peers = (f"{row[ratio]:.2f}" if ratio in row else "" for ratio in ("to_hand", "to_same"))
            table.append(
                (row["how"], f"{row['step_s'] * 1e3:.0f}", f"{row['fastest_s'] * 1e3:.0f}", to_hand, to_peers,
                 f"{row['first_s']:.1f}", f"{row['tensor_bytes'] / 2**20:.1f}",
                 f"{row['grown_bytes'] / 2**20:.0f}", f"{row['loss']:.5f}")
            )  # fmt: skip
        head = ("program", "median step ms", "fastest ms", "to the best by hand", "to the same by hand", "first step s",
                "tensors at most MiB", "process grown MiB", "last loss")  # fmt: skip
        text.append(f"## {name}\n\n{tabulate(table, head, tablefmt='github', disable_numparse=True)}\n")
    return "\n".join(text)


def main() -> None:
    """All contenders, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", choices=(*HAND_MADE, *OURS), default=(*HAND_MADE, *OURS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hardware", help="a file of `autopar calibrate --ranks 4 -o FILE`")
    parser.add_argument("--mkl", action="store_true", help="autopar's products by MKL, where it would take oneDNN")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    results = []
    for name in arguments.model:
        mesh = searched(name, arguments.layers, arguments.hardware) if "autopar auto" in arguments.only else {}
        setting = Setting(arguments.hardware, mesh, arguments.mkl)
        if mesh:
            print(f"{name}: auto on {mesh}", flush=True)
        found: dict[str, dict[str, Any]] = {}
        for lot in LOTS:
            hows = [how for how in lot if how in arguments.only and (name, how) != ("gpt2", "fsdp2+tp")]
            for each in in_turns(name, hows, arguments.steps, arguments.layers, setting):
                print(json.dumps(each), flush=True)
                found.setdefault(each["how"], each)
        results += [found[how] for how in (*HAND_MADE, *OURS) if how in found]
    command = f"python benchmarks/step_time.py --steps {arguments.steps} --layers {arguments.layers}"
    if arguments.hardware:
        command += f" --hardware {Path(arguments.hardware).name}"
    if arguments.mkl:
        command += " --mkl"
    arguments.out.write_text(as_markdown(results, command, arguments.mkl))
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
