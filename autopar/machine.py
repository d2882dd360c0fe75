"""What a mesh of devices is priced for where nobody says: the devices that it is made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from costmodel.hardware import Hardware
from costmodel.presets import hardware_names, preset_of


def priced_for(hardware: str | Hardware | None, mesh: DeviceMesh | Mapping[str, int]) -> str | Hardware | None:
    """`hardware`; of None the preset of the mesh's GPUs, or the CPU of a mesh of CPU ranks.

    None stays, for this machine, where a mesh is only named or stands for devices that are not here.

    Raises:
        ValueError: no preset is of these GPUs.
    """
    if hardware is not None or not isinstance(mesh, DeviceMesh):
        return hardware
    if mesh.device_type == "cpu":
        return "cpu"
    devices = torch.get_device_module(mesh.device_type)
    if not devices.is_available():
        return None
    model = devices.get_device_name()
    if preset := preset_of(model):
        return preset
    raise ValueError(
        f"hardware: no preset is of this mesh's {model}; measure it (`autopar calibrate -o gpu.json`) and pass "
        f"hardware='gpu.json', or name the nearest of {', '.join(hardware_names())}"
    )
