"""Model FLOPs: what a step's products and attention take, however it is laid out and whatever is computed again."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from passes.analysis.dims import is_getitem
from passes.program.program import Program
from passes.rules.call import call_of
from passes.rules.work import work_of

_SHARES = {"matmul": 1.0, "attention": 1.0, "attention_backward": 4 / 5}
"""Of five products in attention's backward one is its forward's again."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a step by op; `dtype`: that of most of them."""

    flops: float
    dtype: str


def model_flops(program: Program) -> ModelFlops:
    """FLOPs of forward and backward on the whole batch; causal attention counts the half that kernels compute."""
    flops: defaultdict[str, float] = defaultdict(float)
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or is_getitem(node):
            continue
        call = call_of(node)
        shapes = [facts.shape for facts in call.operands], [facts.shape if facts else () for facts in call.results]
        work = work_of(call, *shapes)
        flops[work.dtype] += work.flops * _SHARES.get(work.kind, 0.0)
    most = max(flops, key=lambda dtype: flops[dtype], default="float32")
    return ModelFlops(sum(flops.values()), most)
