"""The tensors that a step reads: parameters, buffers and the user's inputs, and what stands for each while tracing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.capture.tracing import Tracer, unwrapped, wrapped
from passes.program.precision import Precision
from passes.program.program import Input, InputKind


@dataclass(eq=False)
class Slot:
    """A tensor that the step reads: where it lives in the model, and what stands for it while tracing."""

    input: Input
    tensor: Tensor
    holders: tuple[tuple[dict[str, Any], str], ...] = ()
    aliases: tuple[str, ...] = ()
    differentiate: bool = False

    def place(self, tracer: Tracer, backward: bool) -> None:
        like = self.tensor
        if self.input.dtypes is not None:
            like = torch.empty_strided(like.shape, like.stride(), dtype=self.input.dtypes.computed, device="meta")
        self.fake = tracer.placeholder(self.input.name, like)
        self.differentiate = backward and self.input.requires_grad
        node = tracer.node_of(self.fake)
        if self.input.kind == "parameter":
            tracer.values.set_unknown(node, f"the parameter {self.input.name}")
        elif type(self.tensor) in (Tensor, nn.Buffer) and self.tensor.device.type != "meta":
            tracer.values.set(node, self.tensor.detach().cpu(), is_input=self.input.kind == "input")
        else:
            tracer.values.set_unknown(
                node, f"the {self.input.kind} {self.input.name}, whose values are not known (it is meta or fake)"
            )

    def wrap(self) -> None:
        self.view = wrapped(self.fake, self.differentiate)
        if self.input.kind == "parameter":
            # `nn.ParameterList` and others make a new parameter of a tensor that is none.
            self.view._is_param = True

    def swap_in(self) -> None:
        for holder, key in self.holders:
            holder[key] = self.view

    def changed(self) -> Tensor | None:
        """The new value of a buffer, or of a parameter as it is stored, where the forward wrote one."""
        if self.input.kind == "parameter":
            kept = self.input.dtypes is None or self.input.dtypes.stored == self.input.dtypes.computed
            return self.view if kept and unwrapped(self.view) is not self.fake else None
        if self.input.kind != "buffer":
            return None
        holder, key = self.holders[0]
        now = holder.get(key)
        if isinstance(now, Tensor) and unwrapped(now) is not self.fake:
            return now
        return None


def slots_of(model: nn.Module, precision: Precision) -> list[Slot]:
    """The model's parameters, then its buffers; tied ones once."""
    found: dict[int, tuple[InputKind, Tensor, list[str], list[tuple[dict[str, Any], str]]]] = {}
    kinds: tuple[InputKind, InputKind] = ("parameter", "buffer")
    for kind in kinds:
        for prefix, module in model.named_modules():
            holder: dict[str, Any] = module._parameters if kind == "parameter" else module._buffers
            for key, tensor in holder.items():
                if tensor is None:
                    continue
                entry = found.setdefault(id(tensor), (kind, tensor, [], []))
                entry[2].append(f"{prefix}.{key}" if prefix else key)
                entry[3].append((holder, key))
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, tensor in (module._parameters if kind == "parameter" else module._buffers).items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is not None and name not in found[id(tensor)][2]:
                    found[id(tensor)][2].append(name)
    slots = []
    for kind, tensor, names, holders in found.values():
        is_parameter = kind == "parameter"
        dtypes = precision.dtypes_of(tensor) if is_parameter else None
        what = Input(kind, names[0], is_parameter and tensor.requires_grad, dtypes=dtypes)
        slots.append(Slot(what, tensor, tuple(holders), tuple(names[1:])))
    return slots


def user_slot(path: str, leaf: Any, batch_dim: int | None, held: Sequence[Slot]) -> Slot | None:
    """The slot of one leaf of the user's inputs, named apart from what the model holds; None for what is no tensor."""
    if not isinstance(leaf, Tensor):
        return None
    wants = leaf.requires_grad and torch.is_grad_enabled()
    if any(path in (slot.input.name, *slot.aliases) for slot in held):
        return Slot(Input("input", f"{path} (input)", wants, batch_dim, passed_as=path), leaf)
    return Slot(Input("input", path, wants, batch_dim), leaf)
