"""What is priced where nobody says: the devices of the mesh, or a word that others stand in for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from small_models import llama
from torch.distributed.device_mesh import DeviceMesh

import autopar
from autopar.machine import priced_for
from costmodel import presets


def gpus(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """This machine has them, as torch and the driver say."""
    module = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: model)
    monkeypatch.setattr(torch, "get_device_module", lambda device_type: module)
    monkeypatch.setattr(presets, "_gpu_model", lambda: model)


def mesh_of(device_type: str) -> Any:
    return Mock(spec=DeviceMesh, device_type=device_type)


@pytest.mark.parametrize(
    ("device_type", "model", "priced"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"), ("cuda", "AMD Instinct MI300X VF", "mi300x"),
        ("cpu", "NVIDIA H100 80GB HBM3", "cpu"), ("cpu", "NVIDIA GeForce GTX 1080", "cpu"),
    ],
)  # fmt: skip
def test_a_mesh_is_priced_for_its_devices(
    device_type: str, model: str, priced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, model)
    assert priced_for(None, mesh_of(device_type)) == priced
    assert priced_for("b200", mesh_of(device_type)) == "b200"


def test_gpus_of_no_preset_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, "NVIDIA GeForce GTX 1080")
    with pytest.raises(ValueError, match=r"NVIDIA GeForce GTX 1080; measure it \(`autopar calibrate .* or name .*h100"):
        priced_for(None, mesh_of("cuda"))


def test_what_stands_in_for_this_machines_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, inputs = llama()

    def notes(hardware: str | None) -> str:
        options = autopar.Options(progress=False)
        made = autopar.plan(model, {"dp": 2}, inputs, strategy="fsdp", hardware=hardware, options=options)
        found = autopar.price(model, autopar.Setup(), hardware, sequence=16)
        ranked = autopar.search(model, 2, hardware, 2, sequence=16)
        told = ["priced for this machine's CPU" in " ".join(each.notes) for each in (made, found, ranked)]
        assert len(set(told)) == 1
        return " ".join(made.notes)

    assert "CPU" not in notes(None)
    gpus(monkeypatch, "NVIDIA GeForce GTX 1080")
    assert "no preset is of its NVIDIA GeForce GTX 1080: `autopar calibrate` measures it" in notes(None)
    assert "CPU" not in notes("cpu")
