"""Models that no table was made for: all ranks simulated, against eager; and how much of the products tp splits."""

from __future__ import annotations

import handwritten
import pytest
import torch
from parity import captured, errors, planned


@pytest.mark.parametrize("name", handwritten.MODELS)
def test_a_step_is_eager_s(name: str) -> None:
    model, inputs = handwritten.build(name)
    program = captured(model, inputs)
    for strategy in ("megatron", "fsdp", "auto"):
        _, _, local = planned(program, {"dp": 2, "tp": 2}, strategy)
        found = errors(model, local, inputs)
        assert found.output < 1e-5, (strategy, found)
        assert found.gradient < 1e-4, (strategy, found)
        if strategy == "megatron":
            whole, mine = (
                sum(
                    n.args[0].meta["val"].numel() * n.args[1].meta["val"].shape[-1]
                    for n in graph.graph.nodes
                    if n.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
                )
                for graph in (program.graph, local.graph)
            )
            assert 4 * mine <= 1.1 * whole, f"a rank of four does {mine / whole:.0%} of the products"
