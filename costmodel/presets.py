"""Hardware by name: presets, with the source of each figure, and the machine we are on.

Figures and their sources are in `data/hardware.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from costmodel.hardware import Device, Hardware, Link
from costmodel.hardware_file import load_hardware
from costmodel.host_memory import host_memory_bytes


def hardware_names() -> tuple[str, ...]:
    """Names that `hardware` knows."""
    return (*_data()["presets"], "cpu")


def hardware(name: str | os.PathLike[str] | Hardware | None = None) -> Hardware:
    """A preset by name, a file (`hardware_file.py`) by path, or (`None`) the machine we are on.

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
    if text.lower() not in hardware_names() and (text.endswith(".json") or Path(text).exists()):
        return load_hardware(text, _named)
    return _named(text, ", or the path of a file that `autopar calibrate` wrote or that changes a preset")


def _named(name: str, or_else: str = "") -> Hardware:
    """The preset called `name`; `or_else`: what else would do, told where there is none."""
    if name.lower() not in hardware_names():
        raise ValueError(f"unknown hardware {name!r}; known are {', '.join(hardware_names())}{or_else}")
    return _preset(name.lower())


def with_attention(hardware: Hardware, kernels: str) -> Hardware:
    """`hardware` whose attention runs in other kernels than its preset's: "fa2", "cudnn" or "aiter".

    Raises:
        ValueError: no figures for these kernels on this device.
    """
    data = _data()
    name, like = hardware.device.name, hardware.device.name
    while like not in data["attention_kernels"] and "base" in data["presets"].get(like, {}):
        like = data["presets"][like]["base"]
    known: dict[str, list[Any]] = data["attention_kernels"].get(like, {})
    if kernels not in known:
        raise ValueError(
            f"no figures for attention kernels {kernels!r} on {name}; known are {', '.join(known) or 'none'}"
        )
    (forward, backward), _ = known[kernels]
    device = replace(hardware.device, attention_efficiency=forward, attention_backward_efficiency=backward)
    return replace(hardware, device=device)


def stand_in_notes(name: object) -> list[str]:
    """What is said of `hardware(name)` where it is this machine's CPU, as its GPU is of no preset."""
    model = _gpu_model() if name is None else ""
    if not model or _gpu_preset(model):
        return []
    return [f"priced for this machine's CPU, as no preset is of its {model}: `autopar calibrate` measures it"]


def slow_dtype_notes(device: Device, dtype: str) -> list[str]:
    """What is said of a model whose products run in a dtype of 16 bits that `device` has no units for."""
    if device.is_cpu or dtype not in ("bfloat16", "float16") or dtype == device.half:
        return []
    slow, fast = (device.peak_flops_per_s.get(each, 0.0) / 1e12 for each in (dtype, device.half))
    if slow >= fast:
        return []
    return [
        f"products are priced in {dtype}, of which {device.name} does {slow:g} TFLOP/s at most, and of {device.half} "
        f"{fast:g}: train in {device.half} there"
    ]


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
        host_bytes_per_s=entry.get("host_bytes_per_s", [Hardware.host_bytes_per_s])[0],
        hosts_per_node=entry.get("hosts_per_node", [Hardware.hosts_per_node])[0],
    )


def _generic_cpu(entry: Mapping[str, Any]) -> Hardware:
    """This machine's CPU by core count and memory; rates are rough until it is calibrated."""
    core = _values({key: value for key, value in entry.items() if key != "link"})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = host_memory_bytes()
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
    """Model of the first GPU that NVIDIA's or AMD's driver reports, or ''."""
    for file in sorted(Path("/sys/class/drm").glob("card*/device/product_name")):  # AMD's server parts
        if model := file.read_text(errors="replace").strip():
            return model
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
    """The preset whose device names occur in `model`; of several (B200, GB200) the one with the longest.

    A name ends where it ends there: L40S is no L4. A laptop's GPU is another than the card of its name.
    """
    found = [
        (len(known), str(name))
        for name, entry in _data()["presets"].items()
        for known in entry.get("cuda_names", ())
        if re.search(re.escape(known) + r"(?!\w| laptop)", model, re.IGNORECASE)
    ]
    return max(found)[1] if found else None
