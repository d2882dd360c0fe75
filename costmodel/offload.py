"""What it costs to keep optimizer states in host memory and to update there (ZeRO-Offload, arXiv 2101.06840).

Gradients go to the host, the CPU updates the states there, an fp32 copy of low-precision parameters among them, and
parameters come back. Bytes per parameter of a rank's own part: gradient down, parameter up over PCIe; on the host,
gradient, parameter and states are read, and all but the gradient written.
"""

from __future__ import annotations

from costmodel.hardware import Hardware


def host_update_s(
    parameters: float, ranks: int, hardware: Hardware, *, item_bytes: float = 2.0, state_bytes: float = 12.0
) -> float:
    """Seconds of an update of `parameters` elements on each of `ranks` ranks, those of a host at once.

    Transfers overlap the CPU's work (buckets flow through), so the longer of the two counts, and one way of the other.
    """
    pcie_s = parameters * item_bytes / hardware.pcie_bytes_per_s
    moved = parameters * (item_bytes + 2 * (item_bytes + state_bytes))
    hosts = hardware.hosts_per_node
    on_a_host = min(ranks, max(1, hardware.ranks_per_node // hosts))
    cpu_s = moved * on_a_host * hosts / hardware.host_bytes_per_s
    return max(cpu_s, pcie_s) + pcie_s
