"""Seconds to send tokens to the ranks that have their experts, or to bring back what those made of them.

`n` ranks on `N` nodes, `g = n / N` in each; a token has `k` experts, as likely on one rank as on another. Sent once, it
crosses the network once for each other node that has one of its experts, and goes on from there inside the node, once
to each rank; what comes back is summed on the way in the same places.
                                                                  DeepSeek-V3, arXiv 2412.19437, section 3.2.2
    other nodes of a token   (N - 1) (1 - (1 - 1 / N)^k)
    ranks of a token         n (1 - (1 - 1 / n)^k), of which (g - 1) / g over the node's link

Sent for each expert, it goes `k` times to a rank: an all-to-all of rows. With k = 1 both are the same.
"""

from __future__ import annotations

import math

from costmodel.collectives import group
from costmodel.hardware import Topology


def token_exchange_s(
    token_bytes: float, experts: float, axes: tuple[int, ...], topology: Topology, *, each: bool = False
) -> float:
    """One way. `token_bytes`: of a rank's own tokens, each counted once; `experts`: how many a token has; `each`: it is
    sent for each of them.

    The network and the link inside nodes work side by side, so the slower one counts.
    """
    members = group(axes, topology)
    if members.ranks == 1:
        return 0.0
    intra, inter = topology.hardware.intra_node, topology.hardware.inter_node
    # Rows that go to another node arrive at their rank by the network; sent once, a token goes on inside the node.
    inside = copies_of(members.ranks, experts, each=each) * (members.in_node - 1) / members.in_node
    if each:
        nodes = experts * (members.nodes - 1) / members.nodes
        inside /= members.nodes
    else:
        nodes = (members.nodes - 1) * _has_one(members.nodes, experts)
    inside_s = token_bytes * inside / intra.rate_of(members.in_node)
    across_s = token_bytes * nodes / inter.bytes_per_s
    starts_s = intra.base_s + members.in_node * intra.latency_s
    if members.nodes > 1:
        starts_s += inter.base_s + inter.latency_s
    return starts_s + max(inside_s, across_s)


def copies_of(ranks: int, experts: float, *, each: bool = False) -> float:
    """As how many rows a token arrives at all of so many ranks."""
    return experts if each else ranks * _has_one(ranks, experts)


def _has_one(places: int, experts: float) -> float:
    """How likely one of so many places has at least one of a token's experts."""
    return 1.0 - math.pow(1.0 - 1.0 / places, experts)
