"""A step on one device, which ranks are held against: by the unmodified model, and by the captured graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from autopar.parity.varied import Batch
from passes.capture.autocast import autocast_as
from passes.capture.differentiated import named_leaves
from passes.parity.bisect import difference, run_program
from passes.parity.double import doubled
from passes.parity.simulate import StepValues
from passes.program.precision import Precision
from passes.program.program import Program


@dataclass(frozen=True)
class Values:
    """Full tensors for everything a program takes; `placeholders` has them in its order."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: list[Tensor]
    tangents: list[Tensor]
    placeholders: list[Tensor]

    @staticmethod
    def of(program: Program, model: nn.Module, batch: Batch, seed: int) -> Values:
        """Parameters and buffers as they are now, copied; tangents are 1 for a loss, else random."""
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        random = torch.Generator().manual_seed(seed)
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        tangents, placeholders = [], []
        inputs = iter(batch.tensors)
        for node, given in program.placeholders.items():
            fake = node.meta["val"]
            if given.kind in ("parameter", "buffer"):
                value = tensors[given.name].detach().clone()
                computed = value.to(fake.dtype)
                (parameters if given.kind == "parameter" else buffers)[given.name] = value
            elif given.kind == "input":
                value = next(inputs).detach()
            elif given.kind == "tangent":
                shape = tuple(int(n) for n in fake.shape)
                value = torch.ones(shape) if not shape else torch.randn(shape, generator=random) / math.prod(shape)
                value = value.to(fake.dtype)
                tangents.append(value)
            else:
                value = torch.tensor([seed, 0], dtype=torch.int64)
            placeholders.append(computed if given.kind == "parameter" else value)
        return Values(parameters, buffers, batch.tensors, tangents, placeholders)

    def doubled(self) -> Values:
        """The same in float64."""
        return Values(**{field.name: doubled(getattr(self, field.name)) for field in fields(self)})


def on_one_device(program: Program, values: Values) -> StepValues:
    """The step of the captured graph, on one device."""
    found = StepValues({}, {}, {})
    kinds = {"output": found.outputs, "buffer": found.buffers, "gradient": found.gradients}
    for described, value in zip(program.outputs, run_program(program, values.placeholders), strict=True):
        kinds[described.kind][described.name] = value
    return found


def eager(
    model: nn.Module, batch: Batch, program: Program, tangents: list[Tensor], precision: Precision | None = None
) -> StepValues:
    """The unmodified model's step on the whole batch, on a model of our own: its buffers change as in training.

    Under `precision`, what is cast is cast by autograd's own ops around the model.

    Outputs and gradients have the names that `program` gives them.
    """
    tensors = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    model.zero_grad()
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (batch.args, batch.kwargs)
    )
    expected = {out.name for out in program.outputs if out.kind == "buffer"}
    before = held_buffers(model, expected)
    differentiated = [given.name for given in program.inputs if given.kind == "tangent"]

    def step() -> dict[str, Tensor]:
        with warnings.catch_warnings(), torch.set_grad_enabled(bool(differentiated)):
            warnings.simplefilter("ignore")
            named, _ = named_leaves(_forward(model, args, kwargs, precision))
            outputs = {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}
        if differentiated:
            with autocast_as(None):
                torch.autograd.backward([outputs[name] for name in differentiated], tangents)
        return outputs

    outputs = step() if precision is None else _cast_for(model, precision, step)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    given = dict(zip((x.name for x in program.inputs if x.kind == "input"), leaves, strict=True))
    gradients = {name: tensor.grad.detach() for name, tensor in (tensors | given).items() if tensor.grad is not None}
    known = {given.name for given in program.inputs if given.kind == "buffer"}
    buffers = {
        name: table[key].detach().clone()
        for name, (table, key, _, old) in before.items()
        if name in expected or (name in known and difference(table[key], old) > 0)
    }
    restore(before)
    first = {name for name, _ in model.named_parameters()} | set(given)
    return StepValues(
        {name: value.detach() for name, value in outputs.items()},
        buffers,
        {name: value for name, value in gradients.items() if name in first},
    )


def _forward(model: nn.Module, args: Any, kwargs: Any, precision: Precision | None) -> Any:
    """What the model returns; under `precision`, on cast inputs."""
    if precision is None:
        return model(*args, **kwargs)
    args, kwargs = pytree.tree_map(precision.cast_input, (args, kwargs))
    return pytree.tree_map(precision.cast_output, model(*args, **kwargs))


class _Around(nn.Module):
    """A module around a model, whose forward is a whole step of it."""

    def __init__(self, model: nn.Module, step: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self) -> dict[str, Tensor]:
        return self.step()


def _cast_for(model: nn.Module, precision: Precision, step: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A step with the model's parameters cast, in backward too: a checkpoint reads them again there."""
    named = dict(model.named_parameters())
    dtypes = {name: precision.dtypes_of(parameter) for name, parameter in named.items()}
    with torch.enable_grad():
        cast = {f"model.{name}": p.to(of.computed) for name, p in named.items() if (of := dtypes[name]) is not None}
    return torch.func.functional_call(_Around(model, step), cast, (), tie_weights=True)  # type: ignore[no-any-return]


Held = dict[str, tuple[dict[str, Any], str, Tensor, Tensor]]
"""Name -> where a tensor hangs (table and key), the tensor, and its values."""


def held_buffers(model: nn.Module, written: Collection[str] = ()) -> Held:
    """A model's buffers as they are: a forward may write to one or put another there.

    written: names of parameters to have among them.
    """
    found: Held = {}
    for prefix, module in model.named_modules():
        tables: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
        for table in tables:
            for key, tensor in table.items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is not None and (table is module._buffers or name in written):
                    found[name] = table, key, tensor, tensor.detach().clone()
    return found


def restore(before: Held) -> None:
    """Put the tensors back where they were, with the values they had."""
    for table, key, tensor, old in before.values():
        table[key] = tensor
        tensor.data.copy_(old)
