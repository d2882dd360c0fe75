"""What a plan runs on: a device, the wires between devices, and how a mesh lies on them.

    Hardware   one device model, the link inside a node, the link between nodes
    Axis       one mesh axis: how many of its ranks share a node, how many nodes it spans
    Topology   a mesh laid over hardware; every price is asked of one

The last mesh axis is innermost: its ranks are neighbours (`{"dp": 4, "tp": 8}` puts each `tp` group in one node of 8).
Presets are in `presets.py`; `hardware_file.py` reads and writes the measured figures of one machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from statistics import NormalDist

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "double": "float64",
    "fp64": "float64",
    "fp8": "float8",
}


@lru_cache(maxsize=256)
def dtype_name(dtype: str) -> str:
    """The name that `Device.peak_flops_per_s` uses: `torch.bfloat16`, `bf16` -> `bfloat16`; fp8 kinds -> `float8`."""
    name = dtype.removeprefix("torch.").lower()
    if name.startswith(("float8", "e4m3", "e5m2")):
        return "float8"
    return _DTYPES.get(name, name)


@dataclass(frozen=True)
class Link:
    """What one rank sees on one kind of wire, per direction.

    A collective of `steps` dependent hops that carries `wire_bytes` through the rank's port takes
    `base_s + steps * hop_s + wire_bytes / bytes_per_s`, where a hop costs `latency_s` for small messages and up to
    `pipeline_s` more once full chunks are passed on (see `collectives`).
    """

    name: str
    bytes_per_s: float
    """Rate that large messages reach: a ring's bus bandwidth, below the datasheet's wire rate."""
    latency_s: float
    """One hop of a small message."""
    pipeline_s: float = 0.0
    """What a hop costs more when it passes full chunks: the time to fill the pipeline."""
    base_s: float = 0.0
    """Start and end of a collective on this link, whatever its size and ranks."""
    multicast_bytes_per_s: float = 0.0
    """Port rate of all-reduce done in the switch (NVLS); 0 where there is none."""
    wide_bytes_per_s: float = 0.0
    """Rate per rank of a ring through all ranks of many nodes (`collectives.WIDE_NODES`); 0 where it is the same."""
    peer_bytes_per_s: float = 0.0
    """Rate to each other rank of a node whose ranks are wired in pairs (XGMI); 0 where a switch gives any all."""
    sms: float = 0
    """Streaming multiprocessors, or cores of a CPU, that a running collective takes from a rank's compute: between
    nodes, per rank of the group in a node, each of which brings a network card."""
    measured: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Collective -> (base_s, hop_s, bytes_per_s) as calibrated, where a library's algorithms are none of ours (gloo).

    Used for groups that lie wholly on this link: `base_s + hops * hop_s + ring bytes / bytes_per_s`.
    """

    def __hash__(self) -> int:
        return hash((self.name, self.bytes_per_s, self.latency_s))

    def rate_of(self, ranks: int) -> float:
        """Rate of a ring of `ranks` on this link: wired in pairs, they have the wires among themselves alone."""
        return min(self.bytes_per_s, (ranks - 1) * self.peer_bytes_per_s or self.bytes_per_s)


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine's CPU.

    `peak_flops_per_s` is the dense datasheet peak by dtype name; `float32` is without TF32 (torch's default), `tf32`
    with it. Efficiencies are what the best large kernel reaches of the peak; `compute` takes off what shape costs.
    """

    name: str
    peak_flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: int
    reserve_bytes: int
    """Context, communication buffers, workspaces and fragmentation: not for tensors."""
    sm_count: int
    """Units that thread blocks spread over: SMs, or CPU cores."""
    tile_m: int
    tile_n: int
    """Output tile of one unit in the best matrix-product kernel."""
    matmul_efficiency: float
    """What the best matrix product reaches of the peak, in a short run."""
    memory_efficiency: float
    attention_efficiency: float
    attention_backward_efficiency: float
    kernel_launch_s: float
    """Paid by every kernel, sharded or not."""
    update_s: float = 0.0
    """Paid for every parameter when gradients are clipped and applied, whatever its size: ops dispatched one by one."""
    sustained: float = 1.0
    """Share of the best product's rate that products keep through a training step: clocks under the power cap, a
    library's choice of kernel, transposed operands."""
    speed_spread: float = 0.0
    """Standard deviation of the speed of devices of this kind, relative to their mean: clocks under the power cap."""
    fp8_matmul_efficiency: float = 0.0
    """`matmul_efficiency` of fp8 products; 0 where it is the same."""
    cache_bytes: int = 0
    """Of what an op moves, so much stays in cache between ops; 0 where that is not counted."""
    cache_bytes_per_s: float = 0.0
    step_error: float = 0.08
    """By how much predicted steps are off on average: 6.6% over 171 published runs without pipelines and 8.2% over 59
    with them (benchmarks/published_results.md), more where no run set any of these figures."""

    def __hash__(self) -> int:
        return hash((self.name, self.memory_bytes_per_s, self.matmul_efficiency))

    @property
    def is_cpu(self) -> bool:
        """Whether it is a machine's CPU, or a rank's share of one."""
        return self.name == "cpu"

    @property
    def half(self) -> str:
        """The dtype of 16 bits whose products are fastest: bfloat16, but where it has no units for these (V100)."""
        peaks = self.peak_flops_per_s
        return "float16" if peaks.get("float16", 0.0) > peaks.get("bfloat16", 0.0) and not self.is_cpu else "bfloat16"

    @property
    def usable_bytes(self) -> int:
        """Memory that tensors may take."""
        return self.memory_bytes - self.reserve_bytes


@dataclass(frozen=True)
class Hardware:
    """A kind of machine: its device, its two kinds of link, and how many ranks share a node."""

    name: str
    device: Device
    intra_node: Link
    inter_node: Link
    ranks_per_node: int
    pcie_bytes_per_s: float
    """Between device and host memory, per direction: what offloading pays."""
    source: str
    shared_host: bool = False
    """Device and intra-node rates are of the whole machine, and all its ranks share them (a CPU)."""
    host_bytes_per_s: float = 200e9
    """What the CPUs of a node stream together in an optimizer's update. 8 channels of DDR4-3200 are 205 GB/s a socket,
    and Adam's many streams reach about half of the two sockets' peak."""
    hosts_per_node: int = 1
    """Hosts whose CPUs these are, each with as many of a node's ranks: of a rack several."""

    def __hash__(self) -> int:
        return hash((self.name, self.device, self.ranks_per_node))

    @property
    def label(self) -> str:
        """The device, and what else the hardware is called: `h100`, `h100 as in my-cluster`."""
        return self.device.name if self.name == self.device.name else f"{self.device.name} as in {self.name}"


@dataclass(frozen=True)
class Axis:
    """One mesh axis on the machine: `size` ranks, `stride` apart, `in_node` of which share a node."""

    name: str
    size: int
    stride: int
    in_node: int

    @property
    def nodes(self) -> int:
        """Nodes that one group of the axis spans."""
        return self.size // self.in_node

    @property
    def crosses_nodes(self) -> bool:
        return self.nodes > 1


@dataclass(frozen=True)
class Topology:
    """A mesh laid over hardware; axes in mesh order, the last one innermost."""

    hardware: Hardware
    """As one of these ranks has it: its share of a host, at the pace of the slowest."""
    axes: tuple[Axis, ...]
    given: Hardware
    """As it was given, for any ranks."""

    def __hash__(self) -> int:
        return hash((self.hardware, self.axes))

    @property
    def device(self) -> Device:
        """What one rank computes on."""
        return self.hardware.device

    @property
    def ranks(self) -> int:
        return prod(axis.size for axis in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    def resized(self, sizes: Sequence[int]) -> Topology:
        """The mesh with axes of other sizes over the same machine: other ranks have other shares of a host."""
        return topology(self.given, tuple((axis.name, size) for axis, size in zip(self.axes, sizes, strict=True)))

    def axis(self, name: str) -> int:
        """Index of the axis called `name`.

        Raises:
            ValueError: there is none.
        """
        names = [axis.name for axis in self.axes]
        if name not in names:
            raise ValueError(f"no mesh axis {name!r}; the mesh has {', '.join(names)}")
        return names.index(name)

    def describe(self) -> tuple[str, ...]:
        """One line for the machine and one per axis, saying what lies inside a node and what crosses nodes."""
        machine = self.hardware
        in_node = prod(axis.in_node for axis in self.axes)
        told = f"{in_node} rank{'s' if in_node > 1 else ''}"
        if in_node == min(machine.ranks_per_node, self.ranks):
            told += " per node"
        else:  # axes do not fill nodes evenly: what is priced is fewer ranks in each of more nodes
            told = f"priced as {told} in each of {self.ranks // in_node} nodes of {machine.ranks_per_node}"
        lines = [f"{self.ranks} x {machine.label}, {told}"]
        for axis in self.axes:
            if not axis.crosses_nodes:
                where = f"inside a node ({machine.intra_node.name})"
            elif axis.in_node == 1:
                where = f"crosses nodes, one rank in each of {axis.nodes} ({machine.inter_node.name})"
            else:
                where = (
                    f"crosses nodes, {axis.in_node} ranks in each of {axis.nodes} "
                    f"({machine.intra_node.name} inside, {machine.inter_node.name} between)"
                )
            lines.append(f"{axis.name}: {axis.size} ranks, {where}" if axis.size > 1 else f"{axis.name}: 1 rank")
        return tuple(lines)


def topology(hardware: Hardware, mesh: Mapping[str, int] | Sequence[tuple[str, int]], ranks: int = 0) -> Topology:
    """`mesh` (axis name -> ranks, outermost first) laid over `hardware`.

    On hardware whose ranks share one host (`shared_host`) each rank gets an equal share of compute and memory.
    Elsewhere all ranks wait for each other, so each computes at the pace of the slowest; `ranks`: of the whole run,
    where the mesh is a part of it.

    Raises:
        ValueError: no axis, an axis named twice, or a size that is no positive whole number.
    """
    pairs = list(mesh.items()) if isinstance(mesh, Mapping) else list(mesh)
    if not pairs:
        raise ValueError("the mesh has no axis; give at least one, such as {'dp': 8}")
    names = [name for name, _ in pairs]
    for name, size in pairs:
        if names.count(name) > 1:
            raise ValueError(f"mesh axis {name!r} is named {names.count(name)} times; give each axis its own name")
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"mesh axis {name!r} has size {size!r}; a positive whole number of ranks is needed")
    axes: list[Axis] = []
    stride = 1
    for name, size in reversed(pairs):
        axes.append(Axis(name, size, stride, _in_node(size, stride, hardware.ranks_per_node)))
        stride *= size
    if hardware.shared_host:
        of_a_rank = _share(hardware, min(stride, hardware.ranks_per_node))
    else:
        of_a_rank = _slowest(hardware, max(stride, ranks))
    return Topology(of_a_rank, tuple(reversed(axes)), hardware)


def _in_node(size: int, stride: int, ranks_per_node: int) -> int:
    """Ranks of a group that share a node; where node and group do not divide, the largest count that all nodes hold."""
    room = max(1, ranks_per_node // stride)
    return max(count for count in range(1, min(size, room) + 1) if size % count == 0)


def _share(hardware: Hardware, ranks: int) -> Hardware:
    """`hardware` as one of `ranks` ranks on one host sees it."""
    device, link = hardware.device, hardware.intra_node
    return replace(
        hardware,
        shared_host=False,
        device=replace(
            device,
            peak_flops_per_s={dtype: flops / ranks for dtype, flops in device.peak_flops_per_s.items()},
            memory_bytes_per_s=device.memory_bytes_per_s / ranks,
            memory_bytes=device.memory_bytes // ranks,
            reserve_bytes=device.reserve_bytes // ranks,
            kernel_launch_s=device.kernel_launch_s * max(1.0, ranks / device.sm_count),
            update_s=device.update_s * max(1.0, ranks / device.sm_count),
            sm_count=max(1, device.sm_count // ranks),
            cache_bytes=device.cache_bytes // ranks,
            cache_bytes_per_s=device.cache_bytes_per_s / ranks,
        ),
        intra_node=replace(
            link,
            bytes_per_s=link.bytes_per_s / ranks,
            peer_bytes_per_s=link.peer_bytes_per_s / ranks,
            measured={kind: (base, hop, rate / ranks) for kind, (base, hop, rate) in link.measured.items()},
        ),
    )


def _slowest(hardware: Hardware, ranks: int) -> Hardware:
    """`hardware` whose device computes at the pace of the slowest of `ranks`: the expected one of so many normal draws
    (Blom's approximation). Memory has a clock of its own."""
    device = hardware.device
    deviations = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    pace = 1.0 - device.speed_spread * deviations
    if pace == 1.0:
        return hardware
    slowest = replace(
        device,
        speed_spread=0.0,
        sustained=device.sustained * pace,
        attention_efficiency=device.attention_efficiency * pace,
        attention_backward_efficiency=device.attention_backward_efficiency * pace,
    )
    return replace(hardware, device=slowest)
