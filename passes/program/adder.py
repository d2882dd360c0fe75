"""Adds ops to a graph that is there already, with their fake values worked out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True, slots=True)
class Adder:
    """Calling it adds an op at the graph's insertion point; `meta` is the op's metadata beside `val`."""

    graph: fx.Graph
    meta: Mapping[str, Any]
    fake_mode: Any

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad():
            value = target(*fake_args, **fake_kwargs)
        node.meta = {**self.meta, "val": value}
        return node


@dataclass(frozen=True, slots=True)
class AdderBefore:
    """Adds ops right before `place`, with the metadata of another node."""

    place: fx.Node
    add: Adder

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.place.graph.inserting_before(self.place):
            return self.add(target, *args, **kwargs)


def adder_before(place: fx.Node, like: fx.Node | None = None) -> AdderBefore:
    """Adds ops right before `place`, with the metadata of `like` (default: `place`)."""
    like = like or place
    tensors = (node.meta.get("val") for node in [like, *like.all_input_nodes])
    fake_mode = next(value.fake_mode for value in tensors if isinstance(value, Tensor))  # type: ignore[attr-defined]
    return AdderBefore(place, Adder(place.graph, dict(like.meta), fake_mode))


def kept_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a new node takes over from the one it stands for."""
    kept = {key: value for key, value in meta.items() if key not in ("val", "tensor_meta")}
    return {"phase": "forward", "module": "", "source": ""} | kept
