"""What is taken for linear, against what ops make of sums of values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from passes.lower.linear_ops import is_linear

Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LINEAR: dict[str, Op] = {
    "view": lambda x, w: x.view(2, 8),
    "transpose": lambda x, w: x.t(),
    "sum": lambda x, w: x.sum(0),
    "mean": lambda x, w: x.mean(1),
    "cat": lambda x, w: torch.cat([x, x]),
    "twice": lambda x, w: x + x,
    "scaled": lambda x, w: x * 0.5,
    "weighted": lambda x, w: w * x,
    "divided": lambda x, w: x / w,
    "picked": lambda x, w: x.index_select(0, w.argmax(1)),
    "padded": lambda x, w: torch.constant_pad_nd(x, [0, 2]),
    "cast": lambda x, w: x.double(),
    "negated": lambda x, w: -x,
}
OTHERS: dict[str, Op] = {
    "clamped": lambda x, w: x.clamp(-0.1, 0.1),
    "squared": lambda x, w: x * x,
    "shifted": lambda x, w: x + 1.0,
    "added to": lambda x, w: x + w,
    "joined": lambda x, w: torch.cat([x, w]),
    "below": lambda x, w: w / x,
    "padded with ones": lambda x, w: torch.constant_pad_nd(x, [0, 2], 1.0),
    "as integers": lambda x, w: (8 * x).long(),
    "where it goes": lambda x, w: w.index_select(0, x.argmax(1)),
}


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_an_op_of_a_sum_is_the_sum_of_the_ops(name: str) -> None:
    op = LINEAR.get(name) or OTHERS[name]
    torch.manual_seed(0)
    a, b, w = (torch.randn(4, 4) for _ in range(3))
    sums = torch.allclose((op(a, w) + op(b, w)).double(), op(a + b, w).double(), atol=1e-5)
    assert sums == (name in LINEAR)
    traced = make_fx(op)(a, w)
    x, weight = traced.graph.find_nodes(op="placeholder")
    fixed = {weight}
    for node in traced.graph.nodes:  # what is made of the fixed operand alone is fixed
        if node.op == "call_function" and set(node.all_input_nodes) <= fixed:
            fixed.add(node)
    ops = [node for node in traced.graph.nodes if node.op == "call_function" and node not in fixed]
    assert all(is_linear(node, fixed) for node in ops) == (name in LINEAR)
    assert x not in fixed
