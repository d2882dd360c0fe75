"""Collectives of complex tensors on two ranks, as steps run them, against arithmetic on what both send."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, fx

from passes.lower.complex_pairs import as_pairs
from passes.lower.gloo import for_gloo
from passes.lower.lower import compiled
from passes.program.local import TOGETHER, WAIT

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
ROWS, WIDTH = 4, 3
GATHER, SCATTER, REDUCE = (
    c10d.all_gather_into_tensor.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_reduce.default,
)


def sent(rank: int) -> tuple[Tensor, Tensor]:
    """A rank's numbers and, beside them, reals."""
    random = torch.Generator().manual_seed(rank)
    numbers = torch.randn(ROWS, WIDTH, dtype=torch.complex64, generator=random)
    return numbers, torch.randn(ROWS, 1, generator=random)


class Step:
    """A graph of a rank that conjugates its numbers, sends them in every way and doubles what arrives."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.given = [self._placeholder(name, value) for name, value in zip("zx", sent(0), strict=True)]
        group, (numbers, reals) = dist.group.WORLD.group_name, sent(0)
        conjugate = self.call(aten._conj.default, self.given[0], value=numbers.conj())
        results = [
            self._arrived(self.call(GATHER, conjugate, 2, group, value=torch.cat([numbers] * 2))),
            self._arrived(self.call(SCATTER, conjugate, "sum", 2, group, value=numbers[:2].clone())),
            self._arrived(self.call(REDUCE, conjugate, "avg", group, value=numbers)),
            self._arrived(self.call(c10d.all_to_all_single.default, conjugate, [2, 2], [2, 2], group, value=numbers)),
        ]
        both = self.call(TOGETHER[REDUCE], [conjugate, self.given[1]], "sum", group, value=[numbers, reals])
        for i, value in enumerate((numbers, reals)):
            results.append(self._arrived(self.call(operator.getitem, both, i, value=value)))
        self.graph.output(tuple(results))

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, value: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = value
        return node

    def _arrived(self, node: fx.Node) -> fx.Node:
        value = node.meta["val"]
        return self.call(aten.add.Tensor, *[self.call(WAIT, node, value=value)] * 2, value=value)


def _sends(rank: int, ranks: int, how: str) -> None:
    gm = fx.GraphModule({}, Step().graph)
    as_pairs(gm)
    if how != "interpreted":
        for_gloo(gm)
    values = list(sent(rank))
    found = compiled(gm)(values) if how == "compiled" else fx.Interpreter(gm).run(*values)
    (z0, x0), (z1, x1) = ((z.conj().resolve_conj(), x) for z, x in map(sent, range(ranks)))
    mine = slice(2 * rank, 2 * rank + 2)
    wanted = [torch.cat([z0, z1]), (z0 + z1)[mine], (z0 + z1) / 2, torch.cat([z0[mine], z1[mine]]), z0 + z1, x0 + x1]
    for result, whole in zip(found, wanted, strict=True):
        torch.testing.assert_close(result, 2 * whole)


@pytest.mark.parametrize("how", ["interpreted", "as gloo runs them", "compiled"])
def test_complex_numbers_are_sent(how: str) -> None:
    run_ranks(_sends, 2, how)
