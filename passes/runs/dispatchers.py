"""What moves tokens to their experts, and what a rank copies for it.

    hybridep   once to each rank that has some of its experts; there it becomes a row for each, padded in the same pass
    deepep     the same; rows are padded for fp8 products by a copy of their own, and what was padded is taken out again
    alltoall   once for each expert; rows arrive by sender, and are sorted by expert and back where a rank has several;
               padded as with deepep

Megatron-LM's names (`--moe-token-dispatcher-type`, `--moe-flex-dispatcher-backend`), and what its code does
(`megatron/core/transformer/moe/token_dispatcher.py`, `experts.py`). Its own test times one layer's experts on 8 H100
(`moe_perf/baseline.json`, 32 experts of which a token has 8): forward and backward 14.2 ms with hybridep, 14.7 with
deepep, 17.6 with alltoall, in fp8 12.8, 14.6 and 17.7.
"""

from __future__ import annotations

from dataclasses import replace

from costmodel.compute import op_s, pointwise
from costmodel.hardware import Topology
from costmodel.token_exchange import copies_of
from passes.runs.setup import Setup


def copied_s(setup: Setup, token_bytes: float, experts: float, local_experts: int, mesh: Topology) -> float:
    """Seconds that a rank copies rows each time it sends tokens to their experts or has them back, beyond putting its
    own into their experts' order, which one rank alone does too. `token_bytes`: of its own tokens, each counted once;
    `experts`: that a token has; `local_experts`: that the rank has.
    """
    each = setup.dispatcher == "alltoall"
    rows = experts * token_bytes
    kernels = (each and local_experts > 1) + (setup.fp8 and setup.dispatcher != "hybridep")
    moved = 2 * rows * kernels
    if not each:  # read or written where the rank's own tokens alone would be
        moved += max(0.0, copies_of(setup.ep, experts) - 1) * token_bytes
    return op_s(replace(pointwise(moved, 0.0), launches=kernels), mesh.device)
