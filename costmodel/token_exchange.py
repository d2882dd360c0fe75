"""Seconds to send tokens to the ranks that have their experts, or to bring back what those made of them.

`n` ranks on `N` nodes, `g = n / N` in each; a token has `k` experts, as likely on one rank as on another. It crosses
the network once for each other node that has one of its experts, and goes on from there inside the node, once to each
rank; what comes back is summed on the way in the same places.
                                                                  DeepSeek-V3, arXiv 2412.19437, section 3.2.2
    other nodes of a token   (N - 1) (1 - (1 - 1 / N)^k)
    ranks of a token         n (1 - (1 - 1 / n)^k), of which (g - 1) / g over the node's link

With k = 1 this is an all-to-all.
"""

from __future__ import annotations

import math

from costmodel.collectives import group
from costmodel.hardware import Topology


def token_exchange_s(token_bytes: float, experts: float, axes: tuple[int, ...], topology: Topology) -> float:
    """One way. `token_bytes`: of a rank's own tokens, each counted once; `experts`: how many a token has.

    The network and the link inside nodes work side by side, so the slower one counts.
    """
    members = group(axes, topology)
    if members.ranks == 1:
        return 0.0
    intra, inter = topology.hardware.intra_node, topology.hardware.inter_node
    nodes = (members.nodes - 1) * _has_one(members.nodes, experts)
    ranks = members.ranks * _has_one(members.ranks, experts)
    inside_s = token_bytes * ranks * (members.in_node - 1) / members.in_node / intra.rate_of(members.in_node)
    across_s = token_bytes * nodes / inter.bytes_per_s
    starts_s = intra.base_s + members.in_node * intra.latency_s
    if members.nodes > 1:
        starts_s += inter.base_s + inter.latency_s
    return starts_s + max(inside_s, across_s)


def _has_one(places: int, experts: float) -> float:
    """How likely one of so many places has at least one of a token's experts."""
    return 1.0 - math.pow(1.0 - 1.0 / places, experts)
