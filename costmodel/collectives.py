"""Seconds that a collective takes, by ranks, bytes and the wires under it.

One group of `n` ranks lies on `N` nodes with `g = n / N` ranks in each. Bytes are always those of the *full* tensor
`S` on one rank: the gathered result, the input that is reduced, the whole buffer of an all-to-all.

    ring all-gather, reduce-scatter   (n - 1) / n * S through each port
    ring all-reduce                   2 (n - 1) / n * S
    in-switch all-reduce (NVLS)       (1 + 1 / n) * S: a rank reads its reduced part and all others' (one node)
    tree all-reduce                   S across 2 nodes, 2 S across more; logarithmic latency
    all-to-all                        (n - 1) / n * S, of which (n - g) / n * S leaves the node

    time = base + hops * (latency + pipeline * fill) + wire bytes / rate + own part / copy rate

A ring that crosses nodes runs at the rate of the `g` network cards its ranks own, or of the link inside the node if
that is less; through all ranks of `WIDE_NODES` and more, each of whose many hops may be the slowest, at what was seen
of it in training. `fill` grows from 0 to 1 as the part that a hop passes on grows past `CHUNK_BYTES`: small parts
travel in low-latency packets, large ones wait for a whole chunk. The own part (`S / n`) is copied from input to output
by the device, at a third of its memory rate; that is what makes 2 ranks slower per byte than 8. Where a node's ranks
are wired in pairs (`Link.peer_bytes_per_s`), a group of them has its own wires alone: rings run over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil, log2, prod
from typing import NamedTuple

from costmodel.hardware import Link, Topology

CHUNK_BYTES = 1.25e6
"""Part of a rank at which half the pipeline is filled: collectives_busbw.csv, H200 all-reduce of 10 MB, 8 ranks."""

WIDE_NODES = 16
"""Nodes from which on a ring through all ranks of each runs at `Link.wide_bytes_per_s`: the fewest that it was seen on
(arXiv 2304.11277). Rings of one rank per node keep their rate in Megatron-LM's published runs on 24 to 96 nodes."""

COPY_PASSES = 3.0
"""Passes over memory when a rank copies its own part: collectives_busbw.csv, H100, 2 to 8 ranks: 1.0 to 1.1 TB/s."""


class Group(NamedTuple):
    """The ranks of one collective: `in_node` in each of `nodes` nodes."""

    ranks: int
    in_node: int
    nodes: int


def group(axes: Sequence[int], topology: Topology) -> Group:
    """The group that the mesh axes `axes` (indices) form together."""
    chosen = [topology.axes[axis] for axis in set(axes)]
    ranks = prod(axis.size for axis in chosen)
    in_node = prod(axis.in_node for axis in chosen)
    return Group(ranks, in_node, ranks // in_node)


@lru_cache(maxsize=1 << 18)
def collective_s(kind: str, bytes_: float, axes: tuple[int, ...], topology: Topology) -> float:
    """Seconds of one collective over the group that the mesh axes `axes` form.

    `kind` is one of `COLLECTIVES`; `bytes_` is the size of the full (gathered or unreduced) tensor on one rank.
    A group of one rank is free.

    Raises:
        ValueError: an unknown kind, or negative bytes.
    """
    if bytes_ < 0:
        raise ValueError(f"{kind}: {bytes_} bytes; a size cannot be negative")
    price = _PRICES.get(kind)
    if price is None:
        raise ValueError(f"unknown collective {kind!r}; known are {', '.join(COLLECTIVES)}")
    members = group(axes, topology)
    if members.ranks == 1:
        return 0.0
    if figures := _measured(kind, members, topology):
        base_s, hop_s, bytes_per_s = figures
        return base_s + ring_hops(kind, members.ranks) * hop_s + wire_bytes(kind, bytes_, members.ranks) / bytes_per_s
    return price(float(bytes_), members, topology)


def _measured(kind: str, members: Group, topology: Topology) -> tuple[float, float, float] | None:
    """Calibrated figures of the one link that the group lies on, if there are any."""
    if members.nodes == 1:
        return topology.hardware.intra_node.measured.get(kind)
    return topology.hardware.inter_node.measured.get(kind) if members.in_node == 1 else None


def _fill(part_bytes: float) -> float:
    return part_bytes / (part_bytes + CHUNK_BYTES)


def _hops_s(intra_hops: int, inter_hops: int, part_bytes: float, topology: Topology) -> float:
    """Latency of a path of dependent hops that each pass `part_bytes` on."""
    fill = _fill(part_bytes)
    intra, inter = topology.hardware.intra_node, topology.hardware.inter_node
    return intra_hops * (intra.latency_s + intra.pipeline_s * fill) + inter_hops * (
        inter.latency_s + inter.pipeline_s * fill
    )


def _port_bytes_per_s(members: Group, topology: Topology) -> float:
    """Rate of a ring through the group: its slowest link, where a node's ranks pool their network cards."""
    intra, inter = topology.hardware.intra_node, topology.hardware.inter_node
    inside = intra.rate_of(members.in_node)
    if members.nodes == 1:
        return inside
    whole_nodes = members.in_node == topology.hardware.ranks_per_node
    wide = inter.wide_bytes_per_s and members.nodes >= WIDE_NODES and whole_nodes
    network = members.in_node * (min(inter.bytes_per_s, inter.wide_bytes_per_s) if wide else inter.bytes_per_s)
    return network if members.in_node == 1 else min(inside, network)


def _slow_link(members: Group, topology: Topology) -> Link:
    return topology.hardware.inter_node if members.nodes > 1 else topology.hardware.intra_node


def _copy_s(part_bytes: float, topology: Topology) -> float:
    return COPY_PASSES * part_bytes / topology.device.memory_bytes_per_s


def _ring_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """One pass around the ring: an all-gather or a reduce-scatter."""
    part = full_bytes / members.ranks
    inter_hops = members.nodes - 1
    return (
        _slow_link(members, topology).base_s
        + _hops_s(members.ranks - 1 - inter_hops, inter_hops, part, topology)
        + (members.ranks - 1) * part / _port_bytes_per_s(members, topology)
        + _copy_s(part, topology)
    )


def _ring_all_reduce_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """Two passes around the ring, started once; the own part is copied once."""
    part = full_bytes / members.ranks
    base = _slow_link(members, topology).base_s
    return 2 * _ring_s(full_bytes, members, topology) - base - _copy_s(part, topology)


def _switch_all_reduce_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """All-reduce in the switch of one node: each port carries the payload once and the rank's part once more."""
    link = topology.hardware.intra_node
    part = full_bytes / members.ranks
    wire = full_bytes + part
    hops = 2 * (members.ranks - 1)
    return link.base_s + _hops_s(hops, 0, part, topology) + wire / link.multicast_bytes_per_s


def _tree_all_reduce_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """Chains inside the nodes, two binary trees across them, up and down.

    Each node's cards take in `S` where there are 2 nodes (half a payload up, half down) and `2 S` where there are more.
    """
    intra, inter = topology.hardware.intra_node, topology.hardware.inter_node
    depth = ceil(log2(members.nodes))
    hops = _hops_s(2 * (members.in_node - 1), 2 * depth, full_bytes / members.ranks, topology)
    network_s = (1 if members.nodes == 2 else 2) * full_bytes / (members.in_node * inter.bytes_per_s)
    node_s = 0.0
    if members.in_node > 1:
        switch = intra.multicast_bytes_per_s
        ring = 2 * (members.in_node - 1) / members.in_node * full_bytes / intra.rate_of(members.in_node)
        node_s = min(ring, (1 + 1 / members.in_node) * full_bytes / switch) if switch else ring
    return inter.base_s + hops + max(network_s, node_s)


def _all_reduce_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """The fastest algorithm, as the libraries choose by size."""
    best = _ring_all_reduce_s(full_bytes, members, topology)
    if members.nodes > 1:
        best = min(best, _tree_all_reduce_s(full_bytes, members, topology))
    elif members.ranks > 2 and topology.hardware.intra_node.multicast_bytes_per_s:
        best = min(best, _switch_all_reduce_s(full_bytes, members, topology))
    return best


def _all_to_all_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """Pairwise sends, all in flight at once: inside the node and across nodes side by side."""
    intra, inter = topology.hardware.intra_node, topology.hardware.inter_node
    part = full_bytes / members.ranks
    inside_s = (members.in_node - 1) * part / intra.rate_of(members.in_node)
    across_s = (members.ranks - members.in_node) * part / inter.bytes_per_s
    peers_out = members.ranks - members.in_node
    latency = members.in_node * intra.latency_s + (inter.latency_s + peers_out * intra.latency_s if peers_out else 0.0)
    pipeline = _fill(part) * (inter.pipeline_s if peers_out else members.in_node * intra.pipeline_s)
    base = _slow_link(members, topology).base_s
    return base + latency + pipeline + max(inside_s, across_s) + _copy_s(part, topology)


def _broadcast_s(full_bytes: float, members: Group, topology: Topology) -> float:
    """Chunks flow down a chain, so the payload passes each port once."""
    inter_hops = members.nodes - 1
    return (
        _slow_link(members, topology).base_s
        + _hops_s(members.ranks - 1 - inter_hops, inter_hops, full_bytes / members.ranks, topology)
        + full_bytes / _port_bytes_per_s(members, topology)
    )


def _send_recv_s(full_bytes: float, members: Group, topology: Topology) -> float:
    link = _slow_link(members, topology)
    return link.base_s + link.latency_s + link.pipeline_s * _fill(full_bytes) + full_bytes / link.rate_of(2)


_PRICES: dict[str, Callable[[float, Group, Topology], float]] = {
    "all_gather": _ring_s,
    "reduce_scatter": _ring_s,
    "all_reduce": _all_reduce_s,
    "all_to_all": _all_to_all_s,
    "broadcast": _broadcast_s,
    "send_recv": _send_recv_s,
}
KINDS = tuple(_PRICES)


LEAST_TAKEN = 0.26
"""Of its time, what a collective on GPUs costs compute beside it, at least.

PyTorch FSDP's runs of GPT-175B on 128 to 512 A100s (arXiv 2304.11277, section 5.4): 173 and 186 TFLOP/s at one and two
samples per GPU are steps of 17.0 and 31.6 s, so 2.4 s do not shrink with the batch, of 9.2 s that are sent. The SMs
that channels run on are less, 15% to 22%; clocks, caches and what lies between launches come on top."""

MOST_CHANNELS = 32
"""NCCL's `MAXCHANNELS`: each keeps an SM busy, and a rack's GPUs have as many as a node's (NVIDIA/nccl issue 1429)."""


def taken_shares(axes: Sequence[int], topology: Topology) -> tuple[float, float]:
    """Of SMs and of the memory rate, what a running collective over these axes takes from compute beside it.

    What arrives at a rank's port is written, and read to be sent on; never less than `LEAST_TAKEN`. Of a CPU, whose
    cores do both, the same of either.
    """
    members, device = group(axes, topology), topology.device
    link = _slow_link(members, topology)
    sms = link.sms if members.nodes == 1 else min(MOST_CHANNELS, link.sms * members.in_node)
    if not sms:
        return 0.0, 0.0
    if device.is_cpu:
        return (min(0.9, sms / device.sm_count),) * 2
    memory = 2 * _port_bytes_per_s(members, topology) / (device.memory_bytes_per_s * device.memory_efficiency)
    return max(LEAST_TAKEN, min(1.0, sms / device.sm_count)), max(LEAST_TAKEN, min(1.0, memory))


COLLECTIVES = tuple(_PRICES)
"""Kinds that `collective_s` prices."""


def ring_hops(kind: str, ranks: int) -> int:
    """Dependent steps of the ring (or pairwise) form of `kind`."""
    if kind == "send_recv":
        return 1
    return 2 * (ranks - 1) if kind == "all_reduce" else ranks - 1


def wire_bytes(kind: str, bytes_: float, ranks: int) -> float:
    """Bytes that one rank sends in the ring (or pairwise) form of `kind`; the volume that reports and tests count."""
    if kind not in _PRICES:
        raise ValueError(f"unknown collective {kind!r}; known are {', '.join(COLLECTIVES)}")
    if ranks == 1:
        return 0.0
    if kind == "all_reduce":
        return 2 * (ranks - 1) / ranks * bytes_
    if kind in ("broadcast", "send_recv"):
        return float(bytes_)
    return (ranks - 1) / ranks * bytes_
