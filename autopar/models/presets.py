"""Well-known models by name: dimensions and their sources, built without weights.

`presets.json` has the data; models are built by `transformers` (an optional dependency) on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model's dimensions. `config` is what its transformers config class takes."""

    name: str
    title: str
    architecture: str
    """transformers' model type."""
    model_class: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    """What a small model of the same architecture has instead."""
    source: str


@lru_cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    data = json.loads(resources.files("autopar.models").joinpath("presets.json").read_text(encoding="utf-8"))
    kinds = data["architectures"]
    return {
        name: Preset(
            name,
            entry["title"],
            entry["architecture"],
            kinds[entry["architecture"]]["class"],
            entry["config"],
            kinds[entry["architecture"]]["tiny"],
            entry["source"],
        )
        for name, entry in data["presets"].items()
    }
