"""Masks that compiled code gathers or adds up, on two ranks, against what one process makes of the whole mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import fx

from passes.lower.booleans import as_bytes
from passes.lower.lower import compiled
from passes.program.local import WAIT

aten = torch.ops.aten
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
SCATTER = torch.ops._c10d_functional.reduce_scatter_tensor.default
ROWS, LENGTH = 2, 5


def graph_of(mask: torch.Tensor, values: torch.Tensor, collective: Any = GATHER) -> fx.GraphModule:
    """Gathers a rank's rows of a mask and of values, or adds all ranks' up and keeps half, and puts 1, 2, ... where the
    mask is true."""
    graph = fx.Graph()
    group = dist.group.WORLD.group_name

    def call(target: Any, *args: Any, value: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    given = []
    for name, value in (("mask", mask), ("values", values)):
        given.append(graph.placeholder(name))
        given[-1].meta["val"] = value
    rows, how = (2 * ROWS, (2, group)) if collective is GATHER else (ROWS, ("sum", 2, group))
    whole = [torch.empty(rows, LENGTH, dtype=x.dtype) for x in (mask, values)]
    items = [call(collective, x, *how, value=value) for x, value in zip(given, whole, strict=True)]
    chosen, base = (call(WAIT, x, value=value) for x, value in zip(items, whole, strict=True))
    numbers = call(aten.arange.default, rows * LENGTH, value=torch.empty(rows * LENGTH))
    numbers.kwargs = {"dtype": torch.float32, "device": torch.device("cpu")}
    graph.output((call(aten.masked_scatter.default, base, chosen, numbers, value=whole[1]),))
    return fx.GraphModule({}, graph)


def _scattered(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    mask, values = torch.rand(2 * ROWS, LENGTH) > 0.5, torch.randn(2 * ROWS, LENGTH)
    wanted = values.masked_scatter(mask, torch.arange(mask.numel(), dtype=torch.float32))
    mine = [x.chunk(ranks)[rank].contiguous() for x in (mask, values)]
    gm = graph_of(mine[0], mine[1])
    as_bytes(gm)
    (found,) = compiled(gm)(mine)
    torch.testing.assert_close(found, wanted)
    places = torch.arange(LENGTH) % ranks == rank  # a rank's term: what it looked up, zero elsewhere
    terms = [mask & places, values * places]
    gm = graph_of(terms[0], terms[1], SCATTER)
    as_bytes(gm)
    (found,) = compiled(gm)(terms)
    chosen, base = (x.chunk(ranks)[rank] for x in (mask, values))
    torch.testing.assert_close(found, base.masked_scatter(chosen, torch.arange(chosen.numel(), dtype=torch.float32)))


def test_a_mask_that_compiled_code_gathers_or_adds_up_is_a_mask() -> None:
    run_ranks(_scattered, 2)
