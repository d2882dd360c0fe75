"""What a plan runs on: a device, the wires between devices, and how a mesh lies on them.

    Hardware   one device model, the link inside a node, the link between nodes
    Axis       one mesh axis: how many of its ranks share a node, how many nodes it spans
    Topology   a mesh laid over hardware; every price is asked of one

The last mesh axis is innermost: its ranks are neighbours (`{"dp": 4, "tp": 8}` puts each `tp` group in one node of 8).
Presets and their sources are in `data/hardware.json`; a calibrated file holds one machine's measured figures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources
from math import prod
from pathlib import Path
from statistics import NormalDist
from typing import Any

FILE_FORMAT = "autopar-hardware"
FILE_VERSION = 2

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
    sms: float = 0
    """Streaming multiprocessors, or cores of a CPU, that a running collective takes from a rank's compute: between
    nodes, per rank of the group in a node, each of which brings a network card."""
    measured: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Collective -> (base_s, hop_s, bytes_per_s) as calibrated, where a library's algorithms are none of ours (gloo).

    Used for groups that lie wholly on this link: `base_s + hops * hop_s + ring bytes / bytes_per_s`.
    """

    def __hash__(self) -> int:
        return hash((self.name, self.bytes_per_s, self.latency_s))


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

    def __hash__(self) -> int:
        return hash((self.name, self.memory_bytes_per_s, self.matmul_efficiency))

    @property
    def is_cpu(self) -> bool:
        """Whether it is a machine's CPU, or a rank's share of one."""
        return self.name == "cpu"

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

    def __hash__(self) -> int:
        return hash((self.name, self.device, self.ranks_per_node))


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
        lines = [f"{self.ranks} x {machine.device.name}, {min(machine.ranks_per_node, self.ranks)} ranks per node"]
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


def hardware_names() -> tuple[str, ...]:
    """Names that `hardware` knows."""
    return (*_data()["presets"], "cpu")


def hardware(name: str | os.PathLike[str] | Hardware | None = None) -> Hardware:
    """A preset by name, a file that `save_hardware` wrote by path, or (`None`) the machine we are on.

    Raises:
        ValueError: no such preset and no such file, or a file that is none of ours.
    """
    if isinstance(name, Hardware):
        return name
    if name is None:
        return hardware(_gpu_preset(_gpu_model()) or "cpu")
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"hardware is a {type(name).__name__}; pass a name, a file's path or None for this machine")
    text = os.fspath(name)
    if text.lower() in hardware_names():
        return _preset(text.lower())
    if text.endswith(".json") or Path(text).exists():
        return load_hardware(text)
    raise ValueError(
        f"unknown hardware {text!r}; known are {', '.join(hardware_names())}, or the path of a file that "
        "`autopar calibrate` wrote"
    )


def with_attention(hardware: Hardware, kernels: str) -> Hardware:
    """`hardware` whose attention runs in other kernels than its preset's: "fa2" or "cudnn".

    Raises:
        ValueError: no figures for these kernels on this device.
    """
    table: dict[str, dict[str, list[Any]]] = _data()["attention_kernels"]
    known = table.get(hardware.device.name, {})
    if kernels not in known:
        raise ValueError(
            f"no figures for attention kernels {kernels!r} on {hardware.device.name}; known are "
            f"{', '.join(known) or 'none'}"
        )
    (forward, backward), _ = known[kernels]
    device = replace(hardware.device, attention_efficiency=forward, attention_backward_efficiency=backward)
    return replace(hardware, device=device)


def preset_of(device_name: str) -> str | None:
    """Preset for what `torch.cuda.get_device_name()` says, or `None`."""
    return _gpu_preset(device_name)


def sources(name: str) -> dict[str, tuple[Any, str]]:
    """Every figure of the preset `name` -> (value, where it is from), for reports."""
    entry = _entry(name)
    texts = _data()["sources"]
    found: dict[str, tuple[Any, str]] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(node, list) and len(node) == 2 and node[1] in texts:
            found[prefix] = (node[0], texts[node[1]])

    visit("", entry)
    return found


def fitted() -> dict[str, str]:
    """Parameters fitted to runs rather than read off a datasheet -> value and runs; for reports and benchmarks."""
    return dict(_data()["fitted"])


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    text = resources.files("costmodel").joinpath("data/hardware.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _entry(name: str) -> dict[str, Any]:
    """A preset's entry, with what it takes over from its base."""
    data = _data()
    if name == "cpu":
        entry: dict[str, Any] = data["cpu_core"]
        return entry
    entry = data["presets"][name]
    if "base" not in entry:
        return dict(entry)
    base = _entry(entry["base"])
    device = {**base["device"], **entry.get("device", {})}
    return {**base, **entry, "device": device, "cuda_names": entry.get("cuda_names", [])}


def _values(section: Mapping[str, Any]) -> dict[str, Any]:
    """`section` without the sources: `[value, source] -> value`."""
    return {key: value[0] if isinstance(value, list) else value for key, value in section.items()}


@lru_cache(maxsize=32)
def _preset(name: str) -> Hardware:
    entry = _entry(name)
    if name == "cpu":
        return _generic_cpu(entry)
    return Hardware(
        name=name,
        device=Device(name=name, **_values(entry["device"])),
        intra_node=Link(**_values(entry["intra_node"])),
        inter_node=Link(**_values(entry["inter_node"])),
        ranks_per_node=entry["ranks_per_node"][0],
        pcie_bytes_per_s=entry["pcie_bytes_per_s"][0],
        source="preset; see costmodel/data/hardware.json",
    )


def _generic_cpu(entry: Mapping[str, Any]) -> Hardware:
    """This machine's CPU by core count and memory; rates are rough until it is calibrated."""
    core = _values({key: value for key, value in entry.items() if key != "link"})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    link = Link(**_values(entry["link"]))
    peak = {dtype: flops * cores for dtype, flops in core.pop("peak_flops_per_s").items()}
    rate = core.pop("memory_bytes_per_s") * cores
    device = Device(
        name="cpu",
        peak_flops_per_s=peak,
        memory_bytes_per_s=rate,
        memory_bytes=memory_bytes,
        reserve_bytes=memory_bytes // 8,
        sm_count=cores,
        tile_m=16,
        tile_n=16,
        **core,
    )
    return Hardware(
        name="cpu",
        device=device,
        intra_node=replace(link, bytes_per_s=link.bytes_per_s * cores),
        inter_node=link,
        ranks_per_node=1 << 20,
        pcie_bytes_per_s=rate,
        source="generic figures per core; `autopar calibrate` measures them",
        shared_host=True,
    )


@lru_cache(maxsize=1)
def _gpu_model() -> str:
    """Model of the first NVIDIA GPU the driver reports, or ''."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else ""


def _gpu_preset(model: str) -> str | None:
    """The preset whose device names occur in `model`."""
    for name, entry in _data()["presets"].items():
        if any(known.lower() in model.lower() for known in entry.get("cuda_names", ())):
            return str(name)
    return None


def save_hardware(hardware: Hardware, path: str | os.PathLike[str], samples: Mapping[str, Any] | None = None) -> None:
    """Write `hardware` as versioned JSON; `samples` are the measurements behind it, kept for the reader."""
    content = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "hardware": asdict(hardware),
        "samples": dict(samples or {}),
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def load_hardware(path: str | os.PathLike[str]) -> Hardware:
    """The hardware of a file that `save_hardware` wrote.

    Raises:
        ValueError: no such file, not JSON, another format or version, or a figure that is missing or makes no sense.
    """
    where = os.fspath(path)
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"hardware file {where!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"hardware file {where!r} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
        raise ValueError(f"{where!r} is not a hardware file; `autopar calibrate -o FILE` writes one")
    if content.get("version") != FILE_VERSION:
        raise ValueError(
            f"hardware file {where!r} has version {content.get('version')!r}; this autopar reads version "
            f"{FILE_VERSION}: calibrate again"
        )
    return hardware_of(content.get("hardware"), where)


def hardware_of(body: Any, where: str) -> Hardware:
    """The hardware that `dataclasses.asdict` made `body` of; `where` it stands, for errors.

    Raises:
        ValueError: a figure that is missing or makes no sense.
    """
    parts = dict(_typed(body, Hardware, f"{where}: hardware"))
    device = parts["device"] = Device(**_typed(parts["device"], Device, f"{where}: hardware.device"))
    if device.reserve_bytes >= device.memory_bytes:
        raise ValueError(
            f"{where}: hardware.device.reserve_bytes: found {device.reserve_bytes}, expected less than memory_bytes, "
            f"{device.memory_bytes}"
        )
    for link in ("intra_node", "inter_node"):
        if isinstance(parts[link], dict):  # files that were written before there was this figure
            parts[link] = {"wide_bytes_per_s": 0.0, **parts[link]}
        body = dict(_typed(parts[link], Link, f"{where}: hardware.{link}"))
        body["measured"] = {kind: tuple(figures) for kind, figures in body["measured"].items()}
        parts[link] = Link(**body)
    return Hardware(**parts)


_MAY_BE_ZERO = {
    "latency_s",
    "pipeline_s",
    "base_s",
    "multicast_bytes_per_s",
    "wide_bytes_per_s",
    "sms",
    "reserve_bytes",
    "kernel_launch_s",
    "update_s",
    "cache_bytes",
    "cache_bytes_per_s",
    "fp8_matmul_efficiency",
    "speed_spread",
}
_MOST = dict.fromkeys(
    (
        "matmul_efficiency",
        "fp8_matmul_efficiency",
        "memory_efficiency",
        "attention_efficiency",
        "attention_backward_efficiency",
        "sustained",
    ),
    1.0,
) | {"speed_spread": 0.1}
"""Shares of a peak; and a spread by which the slowest of a million devices, five deviations off, has half the pace."""


def _typed(body: Any, cls: type, where: str) -> dict[str, Any]:
    """`body` with exactly the fields of `cls`, numbers in range."""
    if not isinstance(body, dict):
        raise ValueError(f"{where}: found {type(body).__name__}, expected an object")
    known = {entry.name: str(entry.type) for entry in fields(cls)}
    missing = sorted(set(known) - set(body))
    extra = sorted(set(body) - set(known))
    if missing or extra:
        raise ValueError(f"{where}: missing {missing or 'nothing'}, unknown {extra or 'nothing'}")
    for key, value in body.items():
        if known[key] in ("int", "float"):
            _check_number(value, f"{where}.{key}", zero=key in _MAY_BE_ZERO)
            if value > _MOST.get(key, float("inf")):
                raise ValueError(f"{where}.{key}: found {value!r}, expected a share of at most {_MOST[key]:g}")
            if known[key] == "int" and value != int(value):
                raise ValueError(f"{where}.{key}: found {value!r}, expected a whole number")
        elif key == "measured":
            _check_measured(value, f"{where}.{key}")
        elif known[key].startswith("Mapping"):
            if not isinstance(value, dict) or not value:
                raise ValueError(f"{where}.{key}: found {value!r}, expected dtype names and their rates")
            for dtype, rate in value.items():
                _check_number(rate, f"{where}.{key}.{dtype}", zero=False)
        elif known[key] == "str" and not isinstance(value, str):
            raise ValueError(f"{where}.{key}: found {value!r}, expected text")
        elif known[key] == "bool" and not isinstance(value, bool):
            raise ValueError(f"{where}.{key}: found {value!r}, expected true or false")
    return body


def _check_measured(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {value!r}, expected collectives and their figures")
    for kind, figures in value.items():
        if not isinstance(figures, (list, tuple)) or len(figures) != 3:
            raise ValueError(f"{where}.{kind}: found {figures!r}, expected [base_s, hop_s, bytes_per_s]")
        for index, figure in enumerate(figures):
            _check_number(figure, f"{where}.{kind}[{index}]", zero=index < 2)


def _check_number(value: Any, where: str, *, zero: bool) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not (value > 0 or (zero and value == 0)) or value == float("inf"):
        raise ValueError(f"{where}: found {value!r}, expected a {'non-negative' if zero else 'positive'} number")
