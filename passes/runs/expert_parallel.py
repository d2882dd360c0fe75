"""What of a rank's step routed experts are: what expert parallelism is priced from.

The ranks of a group have some of the experts each. Tokens are sent to the ranks that have their experts and back, as
many to one rank as to another where the router balances them. So a rank multiplies as many rows as before, those of
fewer experts, with fewer matrices to read and to keep (GShard, arXiv 2006.16668, section 3.2).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from costmodel.compute import Work, op_s
from passes.analysis.moves import Run
from passes.analysis.strategies import Option, StoredOption
from passes.play.schedule import Schedule
from passes.play.tracks import Tracks
from passes.price.per_rank import local_work
from passes.program.routed_ops import ROUTED_MM, ROUTED_MM_WEIGHT, TAKE_ROWS
from passes.space.space import Space
from passes.space.words import Words

_LOOKED_UP = {torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default, TAKE_ROWS}


def expert_numbers(
    space: Space, assignment: Sequence[int], laid: Tracks, schedule: Schedule, gathered: Mapping[str, float]
) -> dict[str, float]:
    """Of one micro-batch on one rank, by name; nothing where no experts are routed. `gathered`: by the
    module that reads them, bytes of activations that forward gathers and backward reads.

    experts         elements of their parameters, as computed with; `trained experts`: of those that have gradients
    routed          bytes of rows that experts read, a token's as often as it has experts
    routed tokens   bytes of them with each token counted once
    experts.PARTS   seconds of their products with 1 / PARTS of this rank's experts and as many rows: powers of two
    among experts.exposed.PHASE, among experts.hidden.PHASE
                    of the seconds of activations' collectives (`depth.sample`) those that experts have among
                    tensor-parallel ranks, which their products are cut over
    among experts.gathered
                    of the bytes of activations that forward gathers, those that experts read
    """
    found: dict[str, float] = defaultdict(float)
    matrices: set[int] = set()
    modules: set[str] = set()
    firsts: dict[str, tuple[fx.Node, int]] = {}
    """Layer -> its first product in forward, and the slot of the rows that it reads."""
    words = Words(space)
    for index, item in enumerate(laid.items):
        if not isinstance(item, Run) or item.node.target not in (ROUTED_MM, ROUTED_MM_WEIGHT):
            continue
        modules.add(item.node.meta.get("module", ""))
        for parts, seconds in _seconds(space, item.site, item.option):
            found[f"experts.{parts}"] += seconds
        if item.phase == "forward" and not item.again:
            layer = words.layer(item.node.meta.get("module", ""))
            firsts.setdefault(layer, (item.node, laid.reads[index][0]))
            matrices |= set(_parameters(space, item.node.args[1]))
    for product, slot in firsts.values():
        read = laid.slots[slot].bytes
        found["routed"] += read
        found["routed tokens"] += read / _experts_of_a_token(product)
    sizes = space.topology.sizes
    for index in matrices:
        site, option = space.sites[index], space.sites[index].options[assignment[index]]
        assert isinstance(option, StoredOption)
        elements = math.prod(option.storage.computed_shape(sizes)) * site.count
        found["experts"] += elements
        found["trained experts"] += elements * (site.given is not None and site.given.requires_grad)
    for each in schedule.collectives:
        if each.role == "activation" and each.module in modules:
            found[f"among experts.exposed.{each.phase}"] += each.exposed_s
            found[f"among experts.hidden.{each.phase}"] += each.hidden_s
    if modules:
        found["among experts.gathered"] = sum(gathered.get(module, 0.0) for module in modules)
    return dict(found)


def _parameters(space: Space, node: object) -> Iterator[int]:
    """Sites of the parameters that a value is made of."""
    assert isinstance(node, fx.Node)
    if node.op == "placeholder":
        index = space.analysis.flow.value[node].op
        if space.sites[index].parameter is not None:
            yield index
        return
    for operand in node.all_input_nodes:
        yield from _parameters(space, operand)


def _experts_of_a_token(product: fx.Node) -> float:
    """Of the rows that a product reads, how many are one token's: by where they were looked up."""
    node = product.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in _LOOKED_UP:
            looked_up = node.args[0]
            assert isinstance(looked_up, fx.Node)
            return max(1.0, float(node.meta["val"].shape[0] / looked_up.meta["val"].shape[0]))
        node = node.args[0]
    return 1.0


def _seconds(space: Space, index: int, option: Option) -> Iterator[tuple[int, float]]:
    """Of a product: with all of this rank's experts, half of them, and so on."""
    site = space.sites[index]
    assert site.call is not None
    work, _ = local_work(site, option, space.topology.sizes)
    item_bytes = site.call.operands[0].dtype.itemsize
    weight = site.call.target is ROUTED_MM_WEIGHT
    parts = 1
    while work.batch % parts == 0:
        yield parts, op_s(with_fewer_experts(work, parts, item_bytes, weight=weight), space.topology.device)
        parts *= 2


def with_fewer_experts(work: Work, parts: int, item_bytes: int, *, weight: bool) -> Work:
    """A routed product with 1 / `parts` of the experts, each with that many times the rows.

    weight: it is the gradient of the matrices, written per expert and summed over rows; else matrices are read.
    """
    if weight:
        spared = work.batch * work.m * work.n * item_bytes * (1 - 1 / parts)
        return replace(work, batch=work.batch // parts, k=work.k * parts, bytes_written=work.bytes_written - spared)
    spared = work.batch * work.k * work.n * item_bytes * (1 - 1 / parts)
    return replace(work, batch=work.batch // parts, m=work.m * parts, bytes_read=work.bytes_read - spared)
