"""Price one way to run, as a framework or a plan would: step time, tokens per second, memory, and what they are of.

Data-parallel ranks are what the others leave of the GPUs. Ranks lie as in Megatron-LM: tensor-parallel ones next to
each other, then context-parallel and data-parallel ones, stages farthest apart. What no flag says is as plans do it
under zero3, and as Megatron-LM does else. Needs no GPU and no weights. Exits 1 where it does not fit.

example:
  autopar price llama3-70b --gpus 512 --hardware h100 --global-batch 512 --seq 4096 --tp 8 --pp 4
  autopar price llama3-8b --gpus 64 --hardware h100 --global-batch 128 --seq 8192 --recompute full --measured 2.5
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

from autopar.cli.arguments import (
    add_batch_dim,
    add_fused_attention,
    add_hardware,
    add_json,
    add_memory,
    count,
    once,
    seconds,
)
from autopar.cli.compiling import sampled
from autopar.cli.terminal import clean_output, progress
from autopar.options import Options
from autopar.runs.pricing import price
from passes.runs.setup import Dispatcher, Setup, State, as_megatron
from passes.space.recompute import Mode

HELP = "price one way to run: ranks of each kind, what they shard, what is computed again"

FLAGS = {
    **{name: f"--{name}" for name in ("tp", "pp", "cp", "ep", "virtual", "state", "recompute", "dispatcher")},
    "dp_replicate": "--replicas",
    "batch_dims": "--batch-dim",
    "experts_beside=True": "--experts-beside",
    "balanced=True": "--balanced-stages",
    "ends_count=True": "--ends-count",
    "experts_cut=True": "--experts-cut",
    "whole_blocks=True": "--whole-layers",
    "reshard=False": "--keep-gathered",
    "sequence_parallel=False": "--no-sequence-parallel",
    "gathers_again=True": "--regather-activations",
    "tp_overlap=True": "--tp-collectives parts",
    "tp_waits=True": "--tp-collectives waited",
    "overlap=False": "--state-collectives waited",
    "gathers_waited=True": "--state-collectives gradients",
    "fp8=True": "--fp8",
}
"""For `with_flags`: what asks for these fields of a `Setup`."""

_BESIDE = ("beside", "parts", "waited")
_STATE = ("beside", "gradients", "waited")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `autopar price`."""
    parser.add_argument("model", metavar="MODEL", help="a preset, a config.json or its folder, or file.py:function")
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="devices in all")
    parser.add_argument("--global-batch", type=count, required=True, metavar="N", help="sequences per step, over all")
    parser.add_argument("--seq", type=count, metavar="N", help="sequence length (2048, or the model's most)")
    parser.add_argument("--micro-batch", type=count, default=1, metavar="N", help="sequences at a time on a rank (1)")
    parser.add_argument("--tp", type=count, default=1, metavar="N", help="tensor-parallel ranks (1)")
    parser.add_argument("--pp", type=count, default=1, metavar="N", help="pipeline stages (1)")
    parser.add_argument("--virtual", type=count, default=1, metavar="N", help="parts of the model on each stage (1)")
    parser.add_argument(
        "--balanced-stages", action="store_true",
        help="the last stage has fewer layers where its head would make it the slowest, as in the search (all have as "
        "many, where the stages divide them)",
    )  # fmt: skip
    parser.add_argument(
        "--ends-count", action="store_true",
        help="embedding and head count as a layer each when layers are spread over stages (Megatron-LM's "
        "--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split)",
    )  # fmt: skip
    parser.add_argument("--cp", type=count, default=1, metavar="N", help="context-parallel ranks (1)")
    parser.add_argument("--ep", type=count, default=1, metavar="N", help="ranks that share a layer's experts (1)")
    parser.add_argument(
        "--experts-beside", action="store_true",
        help="tokens go to their experts beside another micro-batch's compute (it waits for them)",
    )  # fmt: skip
    parser.add_argument(
        "--experts-cut", action="store_true",
        help="tensor-parallel ranks cut each expert among themselves (each has some whole, as with Megatron-LM's "
        "--expert-tensor-parallel-size 1)",
    )  # fmt: skip
    parser.add_argument(
        "--dispatcher", choices=get_args(Dispatcher), default="hybridep",
        help="what sends them: once to each rank that has some of their experts (hybridep, deepep), or once for each "
        "expert (alltoall); hybridep pads rows for fp8 products as it goes, the others by copies (hybridep)",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=count, default=1, metavar="N", help="copies of sharded state, as HSDP keeps (1)"
    )
    parser.add_argument(
        "--state", choices=get_args(State),
        help="what data-parallel ranks shard: nothing, the optimizer, gradients too, parameters too "
        "(zero3, with stages, context or expert parallelism zero1)",
    )  # fmt: skip
    parser.add_argument("--recompute", choices=get_args(Mode), default="pointwise", help="default: pointwise")
    parser.add_argument(
        "--whole-layers", action="store_true",
        help="layers are run again to their end, collectives too, as activation checkpointing does",
    )  # fmt: skip
    parser.add_argument(
        "--regather-activations", action="store_true",
        help="tensor-parallel ranks free gathered activations after forward and gather them again for backward (with "
        "stages they do)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-gathered", action="store_true", help="zero3 keeps gathered parameters from forward to backward"
    )
    parser.add_argument(
        "--sequence-parallel", action=argparse.BooleanOptionalAction, default=True,
        help="whether tensor-parallel ranks split the residual stream (they do)",
    )  # fmt: skip
    parser.add_argument(
        "--tp-collectives", choices=_BESIDE,
        help="beside weight gradients, in parts beside products, or waited for (parts with stages, else beside)",
    )  # fmt: skip
    parser.add_argument(
        "--state-collectives", choices=_STATE, default="beside",
        help="of gradients and of what was updated, without zero3 or with stages: beside compute, gradients alone, or "
        "all waited for, as Megatron-LM does without --overlap-grad-reduce (beside)",
    )  # fmt: skip
    parser.add_argument(
        "--gradients", choices=("bf16", "fp32"),
        help="what they are kept and reduced in (fp32; under zero3 kept as parameters are, and reduced so too)",
    )  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="products in fp8")
    parser.add_argument("--offload", action="store_true", help="the optimizer on the host")
    add_fused_attention(parser)
    add_batch_dim(parser)
    add_hardware(parser)
    add_memory(parser)
    parser.add_argument("--measured", type=seconds, metavar="SECONDS", help="what a step was seen to take, to compare")
    add_json(parser)


def run(given: argparse.Namespace) -> int:
    """Price and print."""
    setup = setup_of(given)
    options = Options(
        memory_budget=given.memory_budget, optimizer=given.optimizer or "adamw",
        batch_dims=once("--batch-dim", given.batch_dim) or None,
    )  # fmt: skip
    with clean_output(), progress() as tell:
        asked = sampled(given.model, given.seq, options, given.hardware)
        found = price(
            asked.named.model, setup, given.hardware, asked.given, sequence=asked.sequence, options=options,
            fused_attention=given.fused_attention, progress=tell,
        )  # fmt: skip
        found = replace(found, notes=(*asked.named.notes, *found.notes))
    print(found.to_json(given.measured) if given.json else found.text(given.model, given.measured))
    return 0 if found.fits else 1


def setup_of(given: argparse.Namespace) -> Setup:
    """What the arguments say, and for the rest what plans do under zero3, and Megatron-LM else.

    Raises:
        ValueError: ranks or a batch that do not divide; names the flags.
    """
    layers = given.tp * given.pp * given.cp
    if given.gpus % layers:
        raise ValueError(
            f"--gpus {given.gpus} is no multiple of --tp {given.tp} x --pp {given.pp} x --cp {given.cp} = {layers}"
        )
    data = given.gpus // layers
    if data % given.replicas:
        raise ValueError(f"--replicas {given.replicas} does not divide the {data} data-parallel ranks")
    if given.global_batch % (data * given.micro_batch):
        raise ValueError(
            f"--global-batch {given.global_batch} is no multiple of {data} data-parallel ranks x --micro-batch "
            f"{given.micro_batch} = {data * given.micro_batch}"
        )
    staged = given.pp > 1 or given.cp > 1 or given.ep > 1
    usual: State = ("zero1" if data * given.cp > 1 else "zero0") if staged else "zero3"
    setup = Setup(
        dp_replicate=given.replicas, dp_shard=data // given.replicas, tp=given.tp, pp=given.pp, cp=given.cp,
        ep=given.ep, experts_beside=given.experts_beside, dispatcher=given.dispatcher, virtual=given.virtual,
        balanced=given.balanced_stages, ends_count=given.ends_count, experts_cut=given.experts_cut,
        micro_batch=given.micro_batch, accumulate=given.global_batch // (data * given.micro_batch),
        recompute=given.recompute,
        whole_blocks=given.whole_layers, sequence_parallel=given.sequence_parallel, state=given.state or usual,
        reshard=not given.keep_gathered, gathers_again=given.regather_activations, fp8=given.fp8, offload=given.offload,
    )  # fmt: skip
    if not setup.is_played:
        setup = as_megatron(setup)
        setup = replace(setup, gathers_again=given.regather_activations or setup.gathers_again)
    if given.tp_collectives:
        parts, waited = given.tp_collectives == "parts", given.tp_collectives == "waited"
        setup = replace(setup, tp_overlap=parts, tp_waits=waited)
    beside = given.state_collectives
    setup = replace(setup, overlap=beside != "waited", gathers_waited=beside == "gradients")
    if given.gradients:
        setup = replace(setup, gradient_bytes=4 if given.gradients == "fp32" else 2)
    return setup
