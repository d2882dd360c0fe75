"""A training run's setup: ranks per kind of parallelism, and how a step runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from passes.space.recompute import Mode

State = Literal["zero0", "zero1", "zero2", "zero3"]
Dispatcher = Literal["hybridep", "deepep", "alltoall"]
"""What sends tokens to their experts (`passes/runs/dispatchers.py`)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Ranks per kind of parallelism, and how a step runs. `state`: what the data-parallel ranks shard: nothing, the
    optimizer (zero1), gradients too (zero2), parameters too (zero3, FSDP)."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    """Ranks that have some of the routed experts each, of those that have the same layers: tensor-parallel ranks first,
    then context-parallel ones, then those that see other samples. Tokens are sent to them."""
    experts_beside: bool = False
    """Whether tokens go to their experts beside another micro-batch's compute, the forward of one beside the backward
    of another, as by DeepSeek-V3's DualPipe (arXiv 2412.19437, section 3.2.1) and Megatron-LM's
    `--overlap-moe-expert-parallel-comm`; else compute waits."""
    dispatcher: Dispatcher = "hybridep"
    """What sends them: once to each rank that has some of their experts ("hybridep", "deepep"), or once for each expert
    ("alltoall", the default of Megatron-LM and torchtitan)."""
    experts_cut: bool = False
    """Whether tensor-parallel ranks cut each expert among themselves, as Megatron-LM does unless told
    `--expert-tensor-parallel-size 1`; else each has some experts whole, and its part of the sequence for others."""
    virtual: int = 1
    balanced: bool = False
    """Whether the last stage of a pipeline has fewer layers where its head would make it the slowest, as nanotron and
    torchtitan do, and Megatron-LM by its options."""
    ends_count: bool = False
    """Whether embedding and head count as a layer each when layers are spread over stages, so that the first stage and
    the last have one less: Megatron-LM's `--account-for-embedding-in-pipeline-split` and
    `--account-for-loss-in-pipeline-split`."""
    micro_batch: int = 1
    accumulate: int = 1
    recompute: Mode = "pointwise"
    whole_blocks: bool = False
    """With full recompute: layers are run again to their end, collectives too, as activation checkpointing does. Plans
    run again only what backward reads."""
    in_block: Mode = "pointwise"
    """With whole blocks: what is computed again within the one that backward is in."""
    sequence_parallel: bool = True
    """Whether tensor-parallel ranks may split the residual stream (along the sequence), as arXiv 2205.05198 does."""
    state: State = "zero3"
    reshard: bool = True
    """Whether zero3 frees gathered parameters after forward and gathers them again for backward."""
    fp8: bool = False
    offload: bool = False
    solved: bool = False
    """Whether tensor-parallel ranks do what the solver finds, as plans under `auto` may; else what Megatron-LM does."""
    tp_overlap: bool = False
    """Tensor parallelism's collectives run in parts beside the products they feed (`_hidden_by_parts`)."""
    tp_waits: bool = False
    """Where a framework's tensor parallelism waits for each collective: weight gradients do not run beside it."""
    gathers_again: bool = False
    """Whether a rank keeps its part alone of what tensor parallelism gathers for products, and gathers it once more for
    backward, as Megatron-LM does (arXiv 2205.05198, section 4.2.2): played where plans do (`Recomputation.regather`),
    else behind backward's products."""
    gather_bytes_per_s: float = 0.0
    """Where a framework's zero3 stops compute for each gather and each reduction: the rate at which it gathers. 0: they
    run beside compute, as fast as the wires are."""
    gathers_late: bool = False
    """Where zero3 gathers a layer's parameters for backward only once the layer above is through (PyTorch FSDP's
    `BACKWARD_POST`): nothing is left to hide that behind."""
    gradient_bytes: int = 2
    """What gradients are kept and reduced in; where a schedule is played (`is_played`) they are kept as parameters are,
    and reduced in no less than those have."""
    adds_in_products: bool = False
    """Where a framework's products of weight gradients add to the sum over micro-batches themselves, as Megatron-LM's
    do since late 2021. Elsewhere it is an op beside them."""
    overlap: bool = True
    """Where a replica's state is sent once a step: whether beside compute, gradients behind the last backward and what
    was updated behind the next forward. Megatron-LM does so where it is told to (`--overlap-grad-reduce`,
    `--overlap-param-gather`), DeepSpeed's pipelines never; else compute waits for both."""
    gathers_waited: bool = False
    """Where zero1 or zero2 gathers what was updated before the next forward begins, and gradients alone are reduced
    beside compute: Megatron-LM without `--overlap-param-gather`, nanotron, DeepSpeed."""

    @property
    def runs_whole(self) -> bool:
        """Whether layers are run again to their end."""
        return self.whole_blocks and self.recompute == "full"

    @property
    def is_played(self) -> bool:
        """Whether its price is a plan's schedule itself: all state sharded, all layers and experts on every rank."""
        return self.pp == self.cp == self.ep == 1 and self.state == "zero3"

    @property
    def may_send_beside(self) -> bool:
        """Whether `experts_beside` is a way that Megatron-LM has: stages are interleaved, and no layer is run again."""
        paired = self.accumulate > 1 and (self.pp == 1 or self.virtual > 1)
        return self.ep > 1 and paired and self.recompute != "full"

    @property
    def reduces_each(self) -> bool:
        """Whether gradients of each micro-batch are reduced, so that a rank keeps its share of their sum alone. Stages
        keep whole sums and reduce them once, but where parameters are freed and gathered for each anyway."""
        freed = self.state == "zero3" and self.reshard
        return freed or (self.state in ("zero2", "zero3") and 1 in (self.pp, self.accumulate))

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp

    @property
    def expert_parts(self) -> int:
        """Of the experts that tensor parallelism leaves a rank, the inverse of the share that it has."""
        return max(1, self.ep // self.tp)

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def global_batch(self) -> int:
        return self.data_ranks * self.micro_batch * self.accumulate

    @property
    def priced_only(self) -> tuple[str, ...]:
        """What of it no plan does yet."""
        found = []
        if self.pp > 1:
            found.append("pipeline")
        if self.cp > 1:
            found.append("context parallelism")
        if self.ep > 1:
            found.append("expert parallelism")
        if self.state in ("zero1", "zero2"):
            found.append(f"ZeRO-{self.state[-1]}")
        if self.fp8:
            found.append("fp8")
        if self.offload:
            found.append("offload")
        if self.tp_overlap:
            found.append("overlapped tensor parallelism")
        if self.tp_waits:
            found.append("tensor parallelism that waits")
        return tuple(found)


def as_megatron(setup: Setup) -> Setup:
    """The setup as Megatron-LM runs it.

    Gradients are kept in fp32 and added up within the products that make them. Of what sequence parallelism gathers, a
    rank keeps its own part for backward and gathers again. In pipelines, tensor-parallel ranks send in parts beside
    products, as the published ones do (benchmarks/data).
    """
    return replace(
        setup, gradient_bytes=4, adds_in_products=True, gathers_again=setup.tp > 1 and setup.sequence_parallel,
        tp_overlap=setup.pp > 1 and setup.tp > 1,
    )  # fmt: skip
