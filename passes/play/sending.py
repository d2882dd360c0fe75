"""Collectives of activations start as soon as what they send is there, and are waited for where it is read.

The graph then overlaps what `issue.issue_points` prices as overlapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from passes.program.local import COLLECTIVES
from passes.space.words import Words


def send_early(words: Words, moves: Iterable[Sequence[fx.Node]]) -> None:
    """Starts collectives of activations as soon as their operand is made, within its layer; they keep their order.

    `moves`: what brings one activation from layout to layout, in the order of the graph, before whatever reads it. An
    operand that was kept from forward is there all along: it is sent where its reader's module begins.
    """

    def layer(node: fx.Node) -> tuple[str, str]:
        return node.meta["phase"], words.instance(node.meta["module"])

    for nodes in moves:
        sending = next((i for i, node in enumerate(nodes) if node.target in COLLECTIVES), None)
        if sending is None:
            continue
        part = nodes[: sending + 1]
        operands = {operand for node in part for operand in node.all_input_nodes} - set(part)
        kept = all(operand.meta["phase"] != part[0].meta["phase"] for operand in operands)
        end = part[0].prev
        while end.op == "call_function" and end not in operands and layer(end) == layer(part[0]):
            if end.target in COLLECTIVES or (kept and end.meta["module"] != part[0].meta["module"]):
                break
            end = end.prev
        for node in part:
            end.append(node)
            end = node
