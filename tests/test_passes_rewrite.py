"""Planned and rewritten programs, every rank simulated, against the unmodified model on one device."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from parity import captured, errors, planned
from passes.program import Program
from small_models import MODELS, build

MESHES = {
    "dp4": ({"dp": 4}, (0,)),
    "dp2-tp2": ({"dp": 2, "tp": 2}, (0,)),
    "hsdp-tp": ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, (0, 1)),
    "tp2": ({"tp": 2}, ()),
}


@lru_cache
def program_of(name: str) -> Program:
    model, args, kwargs = build(name)
    return captured(model, kwargs, args)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_together_computes_what_one_device_does(name: str, strategy: str, mesh: str) -> None:
    model, args, kwargs = build(name)
    shape, batch_axes = MESHES[mesh]
    _, _, local = planned(program_of(name), shape, strategy, batch_axes)
    found = errors(model, local, kwargs, args)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


def test_compute_is_split_over_the_tensor_axis_under_megatron() -> None:
    """Each matrix product of a layer is half as large on each of two tensor-parallel ranks."""
    model, args, kwargs = build("llama")
    del model, args, kwargs
    program = program_of("llama")
    _, _, local = planned(program, {"tp": 2}, "megatron", ())

    def flops(graph: torch.fx.Graph) -> int:
        total = 0
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            (m, k), (_, n) = (source.meta["val"].shape for source in node.args)
            total += m * n * k
        return total

    assert flops(local.graph.graph) * 2 == flops(program.graph.graph)
