"""Predicted against measured step times of published training runs: `python benchmarks/published.py`.

Each row of `data/published.csv` is priced as the search prices a setup: the model captured, the mesh planned by the
named strategy, the step played; pipelines, context parallelism and ZeRO-1/2 by the formulas of `passes/runs/`. Prints
errors by source with rank correlations, the fitted parameters, and every row.

Rows that cannot be priced are named on stderr, all of them, and the others priced; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import fx, nn
from tqdm import tqdm
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from autopar.runs.pricing import layer_seconds
from autopar.runs.profiling import Captures, Profiler
from costmodel.hardware import Hardware
from costmodel.memory import OPTIMIZERS
from costmodel.presets import fitted, hardware, hardware_names, with_attention
from passes.analysis.analysis import Analysis
from passes.errors import AutoparError
from passes.program.precision import Precision
from passes.program.routed_ops import ROUTED_MM
from passes.rules.call import Call
from passes.rules.matmul import PRODUCTS
from passes.rules.work import GATHERS, is_view_op
from passes.runs.candidate import estimate
from passes.runs.estimate import Estimate
from passes.runs.setup import Setup
from passes.space.recompute import Mode, Recomputation, is_cheap_op, recomputation

aten = torch.ops.aten

DATA = Path(__file__).parent / "data" / "published.csv"
HELD_OUT = DATA.with_name("held_out.csv")
"""Runs that no parameter or rule was set by; the data's notes say what was seen of them before."""
AT_SCALE = DATA.with_name("at_scale.csv")
"""Sharded state alone on hundreds of GPUs: runs that were looked up for what a network and overlap give there."""
EXPERTS = DATA.with_name("experts.csv")
"""Mixtures of experts under expert parallelism: no parameter was set by them."""


_WAITED_BYTES_PER_S = 10.2e9 / (0.48 - 0.06)
"""What DeepSpeed's ZeRO-3 of early 2021 gathered at, whatever the wires: 5.1e9 fp16 parameters inside one node of
A100s, in a forward of 0.48 s that takes 0.06 s under ZeRO-2 (DeepSpeed issue 1174). Each parameter went alone and was
copied once more, and compute waited for it (its pull request 1188)."""


_OPTIONAL = {
    **dict.fromkeys(("tp", "pp", "virtual", "cp"), "1"),
    **dict.fromkeys(("tp_overlap", "balanced", "experts_beside", "ends", "experts_cut"), "no"),
    "dispatcher": "hybridep",
    "state_overlap": "yes",
    **dict.fromkeys(("ep", "replicas", "node_gbps", "node_gpus", "gathers", "peak_gib", "peak_of", "assumed"), ""),
    **dict.fromkeys(("head", "experts", "experts_per_token", "window", "added"), ""),
}  # fmt: skip
"""Columns that may be absent or empty, with what that means."""
_COUNTS = (
    "hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "seq", "global_batch", "micro_batch", "gpus", "dp", "tp",
    "pp", "virtual", "cp", "ep", "replicas", "node_gpus", "head", "experts", "experts_per_token", "window",
)  # fmt: skip
_ROUTED = ("qwen3_moe", "gpt_oss")
"""Families with routed experts."""
_OF_HIDDEN = ("llama", "gpt")
"""Families whose heads have hidden / heads entries."""
_WINDOWED = ("gpt_oss", "gemma2")
"""Families whose every second layer attends within a window, and that write their attention out."""
_AMOUNTS = ("measured", "node_gbps", "peak_gib")
_WORDS = {
    "family": ("llama", "gpt", "qwen3", "gemma2", *_ROUTED),
    "tied": ("yes", "no"),
    "precision": ("bf16", "fp16", "fp8"),
    "state": ("zero0", "zero1", "zero2", "zero3", "zero0+offload", "zero1+offload", "zero2+offload", "zero3+offload"),
    "stored": ("bf16", "fp32"),
    "gradients": ("bf16", "fp32"),
    "balanced": ("yes", "no"),
    "experts_beside": ("yes", "no"),
    "ends": ("yes", "no"),
    "experts_cut": ("yes", "no"),
    "dispatcher": ("hybridep", "deepep", "alltoall"),
    "gathers": ("", "waited", "late"),
    "sequence_parallel": ("yes", "no"),
    "recompute": ("none", "full", "attention", "selective"),
    "compiled": ("yes", "no", "loss", "blocks", "layers"),
    "tp_overlap": ("yes", "no", "waited"),
    "state_overlap": ("yes", "gradients", "no"),
    "added": ("", "apart"),
    "attention": ("fa1", "fa2", "cudnn", "aiter", "aiter16", "unfused"),
    "unit": ("s/step", "tokens/s/GPU", "hardware TFLOP/s/GPU", "model TFLOP/s/GPU", "causal TFLOP/s/GPU",
             "model FLOPs/peak"),
    "peak_of": ("", "allocated", "reserved"),
}  # fmt: skip
_COLUMNS = dict.fromkeys(("source", "model", "hardware", *_COUNTS, *_AMOUNTS, *_WORDS, *_OPTIONAL))


@dataclass(frozen=True)
class Fault:
    """Why a row is not priced: where, what was found, and what would do."""

    file: Path
    line: int
    column: str
    found: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, column {self.column}: found {self.found!r}; {self.instead}"


class RefusedError(ValueError):
    """A row with faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Run:
    """A published run: its line in the file.

    Raises:
        RefusedError: what the columns say cannot be, or has no price.
    """

    line: dict[str, str]
    file: Path = DATA
    at: int = 0
    """Number of the line."""

    def __post_init__(self) -> None:
        told = {name: (value or "").strip() for name, value in self.line.items()}
        told = {name: value for name, value in told.items() if value or name not in _OPTIONAL}
        object.__setattr__(self, "line", {**dict.fromkeys(_COLUMNS, ""), **_OPTIONAL, **told})
        if faults := [Fault(self.file, self.at, *found) for found in _wrong(self) or _contradictions(self)]:
            raise RefusedError(faults)

    def number(self, name: str) -> int:
        return int(float(self.line[name]))

    def number_or_one(self, name: str) -> int:
        return int(float(self.line[name] or 1))

    def told(self, name: str) -> str:
        """What a column says that may be empty."""
        return self.line[name]

    @property
    def machine(self) -> Hardware:
        """The preset; with the run's own nodes and network between them, where its source gives others."""
        found = hardware(self.line["hardware"])
        if cards := self.told("node_gpus"):
            found = replace(found, ranks_per_node=int(float(cards)))
        if self.line["attention"] != "unfused":
            found = with_attention(found, self.line["attention"])
        told = self.told("node_gbps")
        return _with_network(found, float(told)) if told else found

    @property
    def half(self) -> str:
        """The dtype of 16 bits that was computed in; `bf16` in other columns stands for it."""
        return "float16" if self.line["precision"] == "fp16" else "bfloat16"

    @property
    def half_dtype(self) -> torch.dtype:
        """The same, as torch has it."""
        return cast(torch.dtype, getattr(torch, self.half))

    @property
    def setup(self) -> Setup:
        """As the run was."""
        number = self.number
        state = self.line["state"].partition("+")[0]
        data, replicas = number("dp"), self.number_or_one("replicas")
        return Setup(
            dp_replicate=replicas, dp_shard=data // replicas,
            tp=number("tp"), pp=number("pp"), cp=number("cp"), ep=self.number_or_one("ep"), virtual=number("virtual"),
            micro_batch=number("micro_batch"), accumulate=number("global_batch") // (data * number("micro_batch")),
            recompute=self.recompute, whole_blocks=True,
            in_block="none" if self.line["compiled"] == "no" else "pointwise",
            sequence_parallel=self.line["sequence_parallel"] == "yes", tp_overlap=self.line["tp_overlap"] == "yes",
            tp_waits=self.line["tp_overlap"] == "waited", gathers_again=self.gathers_again,
            state=cast(Any, state), fp8=self.line["precision"] == "fp8", offload="offload" in self.line["state"],
            gather_bytes_per_s=_WAITED_BYTES_PER_S if self.line["gathers"] == "waited" else 0.0,
            gathers_late=self.line["gathers"] == "late", balanced=self.line["balanced"] == "yes",
            experts_beside=self.line["experts_beside"] == "yes", ends_count=self.line["ends"] == "yes",
            dispatcher=cast(Any, self.line["dispatcher"]), experts_cut=self.line["experts_cut"] == "yes",
            overlap=self.line["state_overlap"] != "no", gathers_waited=self.line["state_overlap"] == "gradients",
            gradient_bytes=4 if self.line["gradients"] == "fp32" else 2, adds_in_products=self.adds_in_products,
        )  # fmt: skip

    @property
    def gathers_again(self) -> bool:
        """Whether it kept a rank's part of what sequence parallelism gathers, as Megatron-LM's layers do."""
        megatron = self.line["state"] != "zero3" and self.line["compiled"] == "layers"
        return megatron and self.line["sequence_parallel"] == "yes" and self.number("tp") > 1

    @property
    def adds_in_products(self) -> bool:
        """Whether weight gradients' products add to the sum over micro-batches: in Megatron-LM's layers since the end
        of 2021, a version that does not wait for its collectives either, unless told not to
        (`--no-gradient-accumulation-fusion`) or another framework's that adds them up in kernels of their own."""
        fused = self.line["compiled"] == "layers" and self.line["added"] != "apart"
        return fused and self.line["tp_overlap"] != "waited"

    @property
    def recompute(self) -> Mode:
        """What backward computed again: of an eager run nothing that is not asked for."""
        told = self.line["recompute"]
        if told == "attention":
            return "selective"
        if told == "full":
            return "full"
        return "pointwise" if self.line["compiled"] != "no" or told == "selective" else "none"

    @property
    def measured_s(self) -> float:
        """Seconds of a step."""
        value, unit = float(self.line["measured"]), self.line["unit"]
        number = self.number
        batch, sequence, gpus = number("global_batch"), number("seq"), number("gpus")
        if unit == "s/step":
            return value
        if unit == "tokens/s/GPU":
            return batch * sequence / value / gpus
        forward = _forward_flops(self) * batch
        if unit == "hardware TFLOP/s/GPU":
            return 4 * forward / (value * 1e12) / gpus
        if unit == "model TFLOP/s/GPU":
            return 3 * forward / (value * 1e12) / gpus
        if unit == "causal TFLOP/s/GPU":
            return 3 * _forward_flops(self, causal=True) * batch / (value * 1e12) / gpus
        assert unit == "model FLOPs/peak", unit
        peak = hardware(self.line["hardware"]).device.peak_flops_per_s[self.half]
        return 3 * forward / (value * peak) / gpus

    @property
    def source(self) -> str:
        """Where it is from, in short."""
        text = self.line["source"].removeprefix("NVIDIA-NeMo/").removeprefix("mosaicml/").removeprefix("NVIDIA/")
        return " ".join(text.split()[:2]).rstrip(",") if text.startswith("arXiv") else text.split()[0]

    @property
    def fitted(self) -> bool:
        """Whether a parameter was fitted to it."""
        mine = self.line["model"] == "MPT-30b" and self.line["hardware"] == "h100"
        return mine and self.line["gpus"] == "32"

    @property
    def pipelined(self) -> bool:
        return self.number("pp") > 1 or self.number("cp") > 1


def _wrong(run: Run) -> list[tuple[str, str, str]]:
    """Columns that say nothing a price can be made of, what they say, and what would do."""
    line = run.line
    found = [
        (name, line[name], f"known are {', '.join(filter(None, known))}")
        for name, known in _WORDS.items()
        if line[name] not in known
    ]
    own = {"experts", "experts_per_token"} if line["family"] in _ROUTED else set()
    own |= {"window"} if line["family"] in _WINDOWED else set()
    own |= {"head"} if line["family"] in set(_WORDS["family"]) - set(_OF_HIDDEN) else set()
    needed = {"source", "model", *_COUNTS, *_AMOUNTS} - set(_OPTIONAL) | own
    for name in _COLUMNS:
        value = line[name]
        if name in needed and not value:
            found.append((name, value, "it has to be told"))
        elif value and name in _COUNTS and not (_amount(value) >= 1 and _amount(value).is_integer()):
            found.append((name, value, "a whole number from 1 on would do"))
        elif value and name in _AMOUNTS and not _amount(value) > 0:
            found.append((name, value, "a number above 0 would do"))
    try:
        if not line["hardware"]:
            raise ValueError(f"known are {', '.join(hardware_names())}")
        hardware(line["hardware"])
    except (ValueError, OSError) as error:
        found.append(("hardware", line["hardware"], str(error)))
    return found


def _amount(text: str) -> float:
    """The number that `text` is, or -1."""
    try:
        found = float(text)
    except ValueError:
        return -1.0
    return found if math.isfinite(found) else -1.0


def _contradictions(run: Run) -> list[tuple[str, str, str]]:
    """Columns that do not fit the others or have no price, what they say, and what would do."""
    n, line, found = run.number, run.line, []

    def refuse(name: str, instead: str) -> None:
        found.append((name, line[name], instead))

    tp, pp, data, replicas = n("tp"), n("pp"), n("dp"), run.number_or_one("replicas")
    sharded = line["state"].startswith("zero3")
    if (ranks := data * tp * pp * n("cp")) != n("gpus"):
        refuse("gpus", f"dp x tp x pp x cp is {ranks}")
    if n("global_batch") % (data * n("micro_batch")):
        refuse("global_batch", f"a multiple of dp x micro_batch = {data * n('micro_batch')} would do")
    if data % replicas or (replicas > 1 and not sharded):
        refuse("replicas", f"copies of zero3 that share the {data} data-parallel ranks evenly would do")
    if sharded and line["tp_overlap"] == "waited":
        refuse("tp_overlap", "with zero3 'no' or 'yes' would do: waiting is priced of a replica alone")
    if line["state_overlap"] != "yes" and sharded and not run.pipelined:
        refuse("state_overlap", "'yes' would do under zero3 without stages and context parallelism")
    if line["state_overlap"] == "gradients" and line["state"].partition("+")[0] not in ("zero1", "zero2"):
        refuse("state_overlap", "'yes' or 'no' would do where nothing is gathered once a step")
    if n("heads") % tp:
        refuse("tp", f"a divisor of {n('heads')} heads would do")
    if n("heads") % n("kv_heads"):
        refuse("kv_heads", f"a divisor of {n('heads')} heads would do")
    if not line["head"] and n("hidden") % n("heads"):
        refuse("heads", f"a divisor of hidden = {n('hidden')} would do")
    if n("seq") % n("cp"):
        refuse("cp", f"a divisor of seq = {n('seq')} would do")
    if pp > n("layers"):
        refuse("pp", f"as many stages as the {n('layers')} layers or fewer would do")
    elif pp == 1 and n("virtual") > 1:
        refuse("virtual", "1 would do on one stage")
    elif (layers := -(-n("layers") // pp)) % n("virtual"):
        refuse("virtual", f"chunks that divide the {layers} layers of a stage would do")
    if line["family"] in _ROUTED and n("ffn") % n("experts_per_token"):
        refuse("experts_per_token", f"a divisor of ffn = {n('ffn')} would do")
    for name in ("ep", "experts", "experts_per_token"):
        if line["family"] not in _ROUTED and line[name] not in ("", "1"):
            refuse(name, "nothing would do where there are no experts")
    if line["family"] in _OF_HIDDEN and line["head"]:
        refuse("head", "nothing would do: it is hidden / heads there")
    if line["family"] not in _WINDOWED and line["window"]:
        refuse("window", f"nothing would do but of {', '.join(_WINDOWED)}")
    if line["added"] == "apart" and line["compiled"] != "layers":
        refuse("added", "nothing would do: they are added in products where 'layers' are fused by hand alone")
    if line["experts_beside"] == "yes" and line["ep"] in ("", "1"):
        refuse("experts_beside", "'no' would do where no tokens are sent")
    if line["dispatcher"] != "hybridep" and line["ep"] in ("", "1"):
        refuse("dispatcher", "nothing would do where no tokens are sent")
    if line["experts_cut"] == "yes" and (line["ep"] in ("", "1") or tp == 1):
        refuse("experts_cut", "'no' would do where no tensor-parallel ranks share experts")
    if line["ends"] == "yes" and (pp == 1 or (n("layers") + 2) % pp):
        refuse("ends", f"'no' would do, or stages that divide {n('layers') + 2} layers, embedding and head included")
    if bool(line["peak_gib"]) != bool(line["peak_of"]):
        refuse("peak_of", "with a peak_gib 'allocated' or 'reserved' would do, without one nothing")
    machine = hardware(line["hardware"])
    if line["precision"] == "fp8" and "float8" not in machine.device.peak_flops_per_s:
        refuse("precision", f"on {machine.device.name} bf16 would do")
    peaks, fast = machine.device.peak_flops_per_s, machine.device.half
    if not machine.device.is_cpu and peaks.get(run.half, 0.0) < peaks[fast]:
        refuse("precision", f"on {machine.device.name} {'fp16' if fast == 'float16' else 'bf16'} would do")
    if line["attention"] != "unfused":
        try:
            with_attention(machine, line["attention"])
        except ValueError as error:
            refuse("attention", str(error))
    if line["node_gbps"] and machine.device.name not in _NODE_GBPS:
        refuse("node_gbps", f"of the presets' networks known are those of {', '.join(_NODE_GBPS)}")
    return found


def _forward_flops(run: Run, *, causal: bool = False) -> float:
    """Of one sequence: 2 per multiply-add of the products, attention in full or its causal half."""
    n = run.number
    hidden, head = n("hidden"), int(run.line["head"] or n("hidden") // n("heads"))
    width = n("heads") * head
    products = hidden * (2 * width + 2 * n("kv_heads") * head)
    products += (2 if run.line["family"] == "gpt" else 3) * hidden * n("ffn")
    attention = 2 * n("seq") * width * (0.5 if causal else 1.0)
    return 2.0 * n("seq") * (n("layers") * (products + attention) + hidden * n("vocab"))


_NODE_GBPS = {
    "a100-40gb": 1600, "a100-80gb": 1600, "h100": 3200, "h200": 3200, "b200": 3200, "h100-500w": 3200, "b200-efa": 3200,
    "gb200": 25600, "h800": 3200, "a800": 1600, "h100-efa": 3200, "b300": 6400, "gb300": 51200, "mi300x": 3200,
    "mi325x": 3200, "mi350x": 3200, "mi355x": 3200,
}  # fmt: skip
"""What the presets have between nodes, as their sources say: a card a GPU."""


def _with_network(machine: Hardware, node_gbps: float) -> Hardware:
    """`machine` with that many gigabits per second into a node instead of the preset's."""
    share = node_gbps / (_NODE_GBPS[machine.device.name] / 8 * machine.ranks_per_node)
    link = machine.inter_node
    slower = replace(
        link, name=f"{node_gbps:g} Gb/s a node", bytes_per_s=share * link.bytes_per_s,
        wide_bytes_per_s=share * link.wide_bytes_per_s,
    )  # fmt: skip
    return replace(machine, inter_node=slower)


def runs(path: Path = DATA) -> list[Run]:
    """Every row of the file; of the project's own also those of the three beside it.

    Raises:
        RefusedError: rows that cannot be priced.
    """
    found, faults = read(path)
    if faults:
        raise RefusedError(faults)
    return found


def read(path: Path) -> tuple[list[Run], list[Fault]]:
    """Every row of the file that can be priced, and what is wrong with the others; of the project's own also those of
    the three beside it."""
    found: list[Run] = []
    faults: list[Fault] = []
    for each in (DATA, HELD_OUT, AT_SCALE, EXPERTS) if path == DATA else (path,):
        with each.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            names = [name.strip() for name in rows.fieldnames or ()]
            if wrong := _header_faults(each, names):
                faults += wrong
                continue
            rows.fieldnames = names
            for line in rows:
                if None in line:
                    more = ",".join(cast(Any, line)[None])
                    faults.append(Fault(each, rows.line_num, names[-1], more, "it is the last column: quote commas"))
                    continue
                try:
                    found.append(Run(line, each, rows.line_num))
                except RefusedError as error:
                    faults += error.faults
    return found, faults


def _header_faults(path: Path, names: Sequence[str]) -> list[Fault]:
    """Columns that are missing, unknown or there twice."""
    missing = [name for name in _COLUMNS if name not in names and name not in _OPTIONAL]
    found = [Fault(path, 1, name, "", "a column of this name is needed") for name in missing]
    known = f"known are {', '.join(_COLUMNS)}"
    found += [Fault(path, 1, name, name, known) for name in dict.fromkeys(names) if name not in _COLUMNS]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    return found + [Fault(path, 1, name, name, "one column of this name would do") for name in twice]


def model_of(run: Run) -> nn.Module:
    """The run's model on the meta device, in the dtype that its parameters are stored in."""
    number, family = run.number, run.line["family"]
    common: dict[str, Any] = {
        "tie_word_embeddings": run.line["tied"] == "yes", "use_cache": False, "vocab_size": number("vocab"),
        "attn_implementation": "eager" if run.line["attention"] == "unfused" else "sdpa",
    }  # fmt: skip
    if family == "gpt" and number("tp") == 1 and number("kv_heads") == number("heads"):
        config: Any = GPT2Config(
            n_embd=number("hidden"), n_inner=number("ffn"), n_layer=number("layers"), n_head=number("heads"),
            n_positions=number("seq"), activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            **common,
        )  # fmt: skip
        build: Any = GPT2LMHeadModel
    else:
        common |= {
            "hidden_size": number("hidden"), "num_hidden_layers": number("layers"),
            "num_attention_heads": number("heads"), "num_key_value_heads": number("kv_heads"),
            "max_position_embeddings": number("seq"), "intermediate_size": number("ffn"),
        }  # fmt: skip
        config_of, build = _FAMILIES[family]
        config = config_of(**common | _own_of(run))
    with torch.device("meta"):
        made: nn.Module = build(config).to(torch.float32 if run.line["stored"] == "fp32" else run.half_dtype)
    return made.train()


def _own_of(run: Run) -> dict[str, Any]:
    """What a family's configuration has besides, or otherwise."""
    number, family = run.number, run.line["family"]
    if family == "llama":
        return {}
    if family == "gpt":
        return {"sliding_window": None}
    own: dict[str, Any] = {"head_dim": number("head")}
    if family in ("qwen3_moe", "gpt_oss"):
        ffn = number("ffn") // number("experts_per_token")
        own |= {"num_experts_per_tok": number("experts_per_token")}
        own |= (
            {"num_experts": number("experts"), "moe_intermediate_size": ffn}
            if family == "qwen3_moe"
            else {"num_local_experts": number("experts"), "intermediate_size": ffn}
        )
    if family in ("gpt_oss", "gemma2"):  # they write out sinks and soft caps
        own |= {"sliding_window": number("window"), "attn_implementation": "eager"}
    if family == "gpt_oss":
        own["max_position_embeddings"] = max(4096, number("seq"))
    if family == "gemma2":
        own["query_pre_attn_scalar"] = number("head")
    return own


_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gpt": (Starcoder2Config, Starcoder2ForCausalLM),  # a projection each for queries, keys and values
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
}


_MODEL = ("family", "hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "tied", "seq", "stored", "gradients")
_EXPERTS = ("head", "experts", "experts_per_token", "window")


def _key(run: Run) -> tuple[str, ...]:
    """What runs of one captured model have in common."""
    told = *(run.line[name] for name in _MODEL), *(run.told(name) for name in _EXPERTS)
    return *told, run.half, str(run.line["attention"] == "unfused"), str(run.number("tp") > 1)


class Prices:
    """Prices of one model's runs, which share captures, analyses and schedules."""

    def __init__(self, run: Run) -> None:
        def inputs(parts: int) -> dict[str, torch.Tensor]:
            ids = torch.empty(1, run.number("seq") // parts, dtype=torch.long, device="meta")
            return {"input_ids": ids, "labels": ids}

        reduced = torch.float32 if run.line["gradients"] == "fp32" else run.half_dtype
        fp32 = run.line["stored"] == "fp32"
        precision = Precision(run.half_dtype, reduced) if fp32 else None
        fused = run.line["family"] in _WINDOWED and run.line["attention"] != "unfused"
        self.captures = Captures(model_of(run), inputs, precision=precision, fused_attention=fused)
        self.optimizer = OPTIMIZERS["adamw" if fp32 else "adamw-master"]
        self.profilers: dict[tuple[str, ...], Profiler] = {}

    def of(self, run: Run) -> Estimate:
        """The run as the product prices it."""
        names = ("hardware", "attention", "compiled", "recompute", "node_gbps", "node_gpus")
        key = tuple(run.told(name) for name in names)
        if key not in self.profilers:
            self.profilers[key] = Profiler(
                self.captures, run.machine, self.optimizer, fused=_fused(run),
                in_place=True if run.line["compiled"] == "layers" else None,  # Megatron-LM's loss, op by op in place
                recomputation=_recomputation(run),
            )  # fmt: skip
        return estimate(run.setup, self.profilers[key])


def _fused(run: Run) -> bool | Callable[[fx.Node], bool]:
    """What ran as fused kernels: all of a compiled step; what follows the layers, where only the loss is compiled; the
    layers, where the loss is not (Megatron-LM's own kernels, or each block compiled); of the loss's own ops those that
    the captured graph has in parts, or does for all words."""
    compiled = run.line["compiled"]
    if compiled == "yes":
        return True
    if compiled == "loss":
        return _is_outside_layers
    if compiled == "layers":
        return _is_in_layers_or_by_index
    return _is_in_layers_or_one_op if compiled == "blocks" else _is_part_of_one_op


def _is_in_layers(node: fx.Node) -> bool:
    return "." in str(node.meta.get("module", ""))


def _is_outside_layers(node: fx.Node) -> bool:
    return not _is_in_layers(node)


def _is_part_of_one_op(node: fx.Node) -> bool:
    """What torch runs as part of another op of the loss. Its own ops are casts, log_softmax, the gradient with one
    entry per row, and log_softmax's backward: what the last node of each reads and writes, 36 bytes a logit in bf16."""
    if _is_in_layers(node) or node.target == aten._to_copy.default:
        return False
    if node.meta.get("phase") == "backward":
        return node.target not in (aten.where.self, aten.sub.Tensor)
    return node.target != aten.sub.Tensor or any(user.target == aten.exp.default for user in _in_forward(node))


def _in_forward(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.meta.get("phase") != "backward"]


def _is_in_layers_or_by_index(node: fx.Node) -> bool:
    """The layers, and of the loss what Megatron-LM does for a target's word alone, where the captured graph goes
    through all words (`megatron/core/tensor_parallel/cross_entropy.py`): its own passes over the logits are two casts,
    the maximum, less it, exp, the sum, a division, and in backward a product, 52 bytes a logit."""
    if _is_in_layers(node):
        return True
    if node.meta.get("phase") == "backward":
        return node.target not in (aten._to_copy.default, aten.mul.Tensor)
    picked = node.target == aten.sum.dim_IntList and node.all_input_nodes[0].target == aten.where.self
    return picked or node.target in (aten.eq.Tensor, aten.where.self)


def _is_in_layers_or_one_op(node: fx.Node) -> bool:
    return _is_in_layers(node) or _is_part_of_one_op(node)


def _recomputation(run: Run) -> Callable[[Analysis, Mode], Recomputation]:
    """What a recompute mode means there: where a part of the step is compiled or checkpointed, that part alone."""
    compiled, told = run.line["compiled"], run.line["recompute"]
    if compiled == "yes" and told != "selective":
        return recomputation

    def of(analysis: Analysis, mode: Mode) -> Recomputation:
        if mode == "full" or (mode == "selective" and told == "attention"):
            return recomputation(analysis, mode)
        also: set[int] = set()
        if mode == "pointwise":
            also |= _cheap(analysis, _is_outside_layers if compiled == "loss" else _is_in_layers)
        if compiled == "layers":
            also -= _read_by_products(analysis)
        if compiled == "yes":
            also |= _cheap(analysis, lambda node: True)
        if told == "selective":
            also |= set(_every_other_product(analysis)) | _rows_looked_up(analysis)
        return recomputation(analysis, "none", frozenset(also))

    return of


def _forward(analysis: Analysis) -> list[tuple[int, Call]]:
    """Sites of forward ops with their calls."""
    places = enumerate(analysis.places)
    return [(i, place.call) for i, place in places if place.phase == "forward" and place.kind == "op" and place.call]


def _cheap(analysis: Analysis, where: Callable[[fx.Node], bool]) -> set[int]:
    """Forward sites there that compiled code computes again within the kernels that read them."""
    members = analysis.folding.members
    return {i for i, call in _forward(analysis) if is_cheap_op(call.target) and where(members[i][0])}


def _read_by_products(analysis: Analysis) -> set[int]:
    """Sites whose results matrix products read, views between: a product keeps its operands, where kernels are fused
    by hand, and a kernel what it reads."""
    places = analysis.places
    edges = [(wire.value.op, port.site) for wire in analysis.wires for port in wire.ports]
    found: set[int] = set()
    while True:
        more = {
            op
            for op, reader in edges
            if (call := places[reader].call) is not None
            and (call.target in PRODUCTS or (reader in found and is_view_op(call.target)))
        }
        if more == found:
            return found
        found = more


def _every_other_product(analysis: Analysis) -> list[int]:
    """torchtitan's selective recompute: of the layers' matrix products every second result is kept, of grouped ones,
    which are none of the ops that it keeps, none."""
    products = [(i, call.target) for i, call in _forward(analysis) if call.target in PRODUCTS]
    products = [(i, target) for i, target in products if analysis.places[i].count > 1]
    plain = [i for i, target in products if target is not ROUTED_MM]
    return [*plain[1::2], *(i for i, target in products if target is ROUTED_MM)]


def _rows_looked_up(analysis: Analysis) -> set[int]:
    """Of the layers, rows in the order of their experts: that is no product either."""
    return {i for i, call in _forward(analysis) if call.target in GATHERS and analysis.places[i].count > 1}


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's rank correlation (tau-a) of predicted and measured."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for i, a in enumerate(pairs) for b in pairs[:i]]
    return sum((s > 0) - (s < 0) for s in signs) / max(1, len(signs))


@dataclass(frozen=True)
class Result:
    """A run and its price."""

    run: Run
    estimate: Estimate

    @property
    def error(self) -> float:
        """Predicted over measured step time, less 1."""
        return self.estimate.step_s / self.run.measured_s - 1.0

    @property
    def memory_error(self) -> float:
        """Predicted over measured peak, less 1."""
        return self.estimate.peak_bytes / 2**30 / float(self.run.line["peak_gib"]) - 1.0

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second and GPU, predicted and measured."""
        number = self.run.number
        tokens = number("global_batch") * number("seq") / number("gpus")
        return tokens / self.estimate.step_s, tokens / self.run.measured_s

    @property
    def steps(self) -> tuple[float, float]:
        """Seconds per step, predicted and measured."""
        return self.estimate.step_s, self.run.measured_s


def results(chosen: Sequence[Run], jobs: int) -> Iterator[Result | Fault]:
    """Each run priced, those of one model in one process, or why it has no price."""
    groups = [list(group) for _, group in groupby(sorted(chosen, key=_key), key=_key)]
    with (
        tqdm(total=len(chosen), disable=not sys.stderr.isatty()) as bar,
        ProcessPoolExecutor(jobs, mp_context=get_context("forkserver")) as pool,
    ):
        for done in pool.map(_priced, groups):
            bar.update(len(done))
            yield from done


def _priced(group: Sequence[Run]) -> list[Result | Fault]:
    torch.set_num_threads(1)
    try:
        prices = Prices(group[0])
    except (ValueError, AutoparError) as error:
        return [_not_priced(run, error) for run in group]
    found: list[Result | Fault] = []
    for run in group:
        try:
            found.append(Result(run, prices.of(run)))
        except (ValueError, AutoparError) as error:
            found.append(_not_priced(run, error))
    return found


def _not_priced(run: Run, error: Exception) -> Fault:
    axes = ", ".join(f"{name} {run.line[name] or 1}" for name in ("dp", "tp", "pp", "cp", "ep", "virtual", "state"))
    return Fault(run.file, run.at, "model", f"{run.line['model']}: {axes}", str(error))


def errors_text(groups: dict[str, list[Result]]) -> str:
    """A line per group."""
    rows = []
    for name, group in groups.items():
        errors = [r.error for r in group]
        rows.append([
            name, len(group), f"{statistics.mean(map(abs, errors)):.1%}", f"{statistics.median(map(abs, errors)):.1%}",
            f"{statistics.mean(errors):+.1%}", f"{max(errors, key=abs):+.1%}",
            f"{kendall([r.steps for r in group]):.2f}", f"{kendall([r.rates for r in group]):.2f}",
        ])  # fmt: skip
    headers = ["rows", "n", "mean error", "median", "bias", "worst", "Kendall, step time", "Kendall, tokens/s/GPU"]
    return tabulate(rows, headers=headers, tablefmt="github")


def grouped(found: Sequence[Result]) -> dict[str, list[Result]]:
    """All rows by what they need, then by source, then by whether a parameter was fitted to the source."""
    groups: dict[str, list[Result]] = {}

    def put(name: str, chosen: Sequence[Result]) -> None:
        if chosen:
            groups[name] = list(chosen)

    put("without pipeline or context parallelism", [r for r in found if not r.run.pipelined])
    put("with pipeline or context parallelism", [r for r in found if r.run.pipelined])
    for name in dict.fromkeys(r.run.source for r in found):
        mine = [r for r in found if r.run.source == name]
        for several, text in ((False, ""), (True, ", pp or cp")):
            put(name + text, [r for r in mine if r.run.pipelined == several])
    shared = [(r, layer_seconds(r.estimate, int(r.run.number("layers")))) for r in found if r.estimate.setup.ep > 1]
    put("experts shared, a layer under 7 ms", [r for r, layer_s in shared if layer_s < 7e-3])
    put("experts shared, a layer of 7 to 13 ms", [r for r, layer_s in shared if 7e-3 <= layer_s < 13e-3])
    put("experts shared, a layer of 13 ms or more", [r for r, layer_s in shared if layer_s >= 13e-3])
    put("fitted on: MPT-30b, H100", [r for r in found if r.run.fitted])
    put("not fitted on, without pp or cp", [r for r in found if not r.run.fitted and not r.run.pipelined])
    return groups


def row_text(result: Result) -> list[str]:
    """A run's line in the table."""
    run, price = result.run, result.estimate
    line, setup = run.line, run.setup
    parts = sorted(price.seconds.items(), key=lambda item: -item[1])
    told = [f"{name} {value / price.step_s:.0%}" for name, value in parts if value >= 0.05 * price.step_s]
    axes = f"{line['dp']} x {line['tp']} x {line['pp']} x {line['cp']}"
    axes += f", ep {setup.ep}" if setup.ep > 1 else ""
    return [
        run.source, line["model"], line["hardware"], line["precision"], line["seq"], line["gpus"], axes, line["state"],
        f"{setup.micro_batch} x {setup.accumulate}", line["recompute"], f"{run.measured_s:.3f}",
        f"{price.step_s:.3f}", f"{result.error:+.1%}", f"{line['peak_gib']} {line['peak_of']}".strip(),
        f"{price.peak_bytes / 2**30:.1f}",
        ", ".join(told), line["assumed"],
    ]  # fmt: skip


HEADERS = ["source", "model", "GPU", "precision", "seq", "GPUs", "dp x tp x pp x cp", "state", "micro-batch",
           "recompute", "measured s", "predicted s", "error", "measured GiB", "predicted GiB", "predicted parts",
           "assumed"]  # fmt: skip


_PEAKS = {
    "allocated": "tensors, as the prediction counts",
    "reserved": "what torch's allocator holds: tensors, and blocks it cut and cannot use; a bound from above",
}


def memory_text(found: Sequence[Result]) -> str:
    """Errors of the peak where it was measured, by what was measured."""
    rows = []
    for kind, told in _PEAKS.items():
        errors = [r.memory_error for r in found if r.run.line["peak_of"] == kind]
        if errors:
            rows.append([
                kind, len(errors), f"{statistics.mean(map(abs, errors)):.1%}",
                f"{statistics.median(map(abs, errors)):.1%}", f"{statistics.mean(errors):+.1%}",
                f"{max(errors, key=abs):+.1%}", told,
            ])  # fmt: skip
    headers = ["peak memory", "n", "mean error", "median", "bias", "worst", "what was measured"]
    return tabulate(rows, headers=headers, tablefmt="github") if rows else ""


def waited_text(found: Sequence[Result]) -> str:
    """Runs of a ZeRO-3 that stopped for its gathers, and what the same setup takes a plan of ours."""
    waited = [r for r in found if r.run.line["gathers"] == "waited"]
    rows = [
        [r.run.line["model"], r.run.line["gpus"], f"{r.run.measured_s:.1f}", f"{r.estimate.step_s:.1f}",
         f"{r.estimate.step_s - r.estimate.seconds['exposed state']:.1f}"]
        for r in waited
    ]  # fmt: skip
    headers = ["ZeRO-3 of 2021", "GPUs", "measured s", "predicted s, gathers waited for", "of it without them"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True) if rows else ""


def report(found: Sequence[Result]) -> str:
    """Errors, then every row."""
    fitted_text = "\n".join(f"- {name}: {text}" for name, text in fitted().items())
    others = {
        HELD_OUT: "Held out: no parameter was set by them",
        AT_SCALE: "Sharded state alone on hundreds of GPUs",
        EXPERTS: "Expert parallelism: no parameter was set by them",
    }
    known = [r for r in found if r.run.file not in others]
    parts = [
        "# Published training runs: predicted and measured",
        "Written by `python benchmarks/published.py -o benchmarks/published_results.md`.",
        *([errors_text(grouped(known)), memory_text(known), waited_text(known)] if known else []),
    ]
    for path, title in others.items():
        if mine := [r for r in found if r.run.file == path]:
            parts += [f"## {title}", errors_text(grouped(mine)), memory_text(mine), rows_text(mine)]
    return "\n\n".join([*parts, "## Fitted parameters", fitted_text, "## Rows", rows_text(known)]) + "\n"


def rows_text(found: Sequence[Result]) -> str:
    """Every run's line."""
    return tabulate([row_text(r) for r in found], headers=HEADERS, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Price, print, write; 1 where rows were refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="another file of these columns (data/README.md)")
    parser.add_argument("--source", default="", help="only rows whose source or model contains this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth of them")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--fitted", action="store_true", help="print the fitted parameters and nothing else")
    parser.add_argument("-o", "--output", type=Path, help="write the result as Markdown")
    given = parser.parse_args()
    if given.fitted:
        print("\n".join(f"{name}: {text}" for name, text in fitted().items()))
        return 0
    try:
        rows, faults = read(given.data)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        parser.error(f"{given.data}: {error}")
    chosen = [run for run in rows if given.source in run.line["source"] + run.line["model"]]
    found: list[Result] = []
    for each in results(chosen[:: given.every], given.jobs):
        if isinstance(each, Result):
            found.append(each)
        else:
            faults.append(each)
    if found:
        text = report(found)
        if given.output:
            given.output.write_text(text, encoding="utf-8")
        print(text)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        refused = len({(fault.file, fault.line) for fault in faults})
        print(f"{refused} rows refused, {len(found)} priced", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
