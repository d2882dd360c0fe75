"""A call's inputs: what one data-parallel rank feeds, the global batch made of it, and their description in a plan."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from passes.errors import PlanMismatchError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments, the latter sorted by name."""

TILED_BYTES = 1 << 28
"""Global batches up to this size are made with their values, which a model's Python code may look at."""


def call_of(model: nn.Module, example_inputs: Any) -> Call:
    """The call that `example_inputs` stands for: a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: none are given and the model does not tell, or they are neither.
    """
    if example_inputs is None:
        example_inputs = _told_by(model)
    if isinstance(example_inputs, torch.Tensor):
        raise ValueError("example_inputs is a tensor; pass a tuple (ids,) or a mapping {'input_ids': ids}")
    if isinstance(example_inputs, Mapping):
        return (), dict(sorted(example_inputs.items()))
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise ValueError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tuple of positional or a mapping of keyword "
        "arguments"
    )


def _told_by(model: nn.Module) -> Any:
    """Inputs from what a Hugging Face model says of itself: its dummy inputs, and labels where it takes them."""
    dummy = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping) or not all(isinstance(value, torch.Tensor) for value in dummy.values()):
        raise ValueError(
            f"{type(model).__name__} does not tell what it takes; pass example_inputs, what one data-parallel rank "
            "feeds it: a tuple of positional or a mapping of keyword arguments"
        )
    inputs = dict(dummy)
    names = getattr(type(model).forward, "__code__", None)
    takes_labels = names is not None and "labels" in names.co_varnames
    head = type(model).__name__.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration"))
    if takes_labels and head and "labels" not in inputs and "input_ids" in inputs:
        inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    return inputs


def leaf_names(call: Call) -> list[str]:
    """A path per leaf of the call: `input_ids`, `args.0`, `batch.mask`."""
    names = []
    for path, _ in pytree.tree_flatten_with_path(call)[0]:
        steps = [str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step)))) for step in path]
        names.append(".".join(["args", *steps[1:]] if steps[0] == "0" else steps[1:]))
    return names


def batch_dims_of(call: Call, chosen: Mapping[str, int | None] | None = None) -> list[int | None]:
    """Per leaf, the dim that the batch axes split: 0 for tensors as long there as most are, or what `chosen` says.

    Raises:
        ValueError: `chosen` names an input that is not there, or a dim that it does not have.
    """
    names, leaves = leaf_names(call), pytree.tree_leaves(call)
    chosen = dict(chosen or {})
    if unknown := chosen.keys() - set(names):
        raise ValueError(f"batch_dims names {sorted(unknown)}, but the inputs are {names}")
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    usual = collections.Counter(sizes).most_common(1)[0][0] if sizes else None
    result: list[int | None] = []
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            result.append(None)
        elif name in chosen:
            dim = chosen[name]
            if dim is not None and not -leaf.ndim <= dim < leaf.ndim:
                raise ValueError(f"batch_dims: {name} has {leaf.ndim} dims, no dim {dim}")
            result.append(dim if dim is None else dim % leaf.ndim)
        else:
            result.append(0 if leaf.ndim and leaf.shape[0] == usual else None)
    return result


def global_call(call: Call, dims: Sequence[int | None], ways: int) -> tuple[Call, int | None]:
    """The global batch of `ways` ranks that feed the like of `call`, on the CPU, and its size along the batch dims.

    Real values are repeated; large, fake or meta tensors become meta tensors.
    """
    leaves, spec = pytree.tree_flatten(call)
    total = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor)) * ways
    result = []
    size = None
    for leaf, dim in zip(leaves, dims, strict=True):
        if not isinstance(leaf, torch.Tensor):
            result.append(leaf)
            continue
        shape = list(leaf.shape)
        if dim is not None:
            shape[dim] *= ways
            size = shape[dim]
        if leaf.is_meta or isinstance(leaf, torch._subclasses.FakeTensor) or total > TILED_BYTES:
            value = torch.empty(shape, dtype=leaf.dtype, device="meta")
        else:
            plain = leaf.detach().cpu()
            value = plain if dim is None else torch.cat([plain] * ways, dim)
        result.append(value.requires_grad_(leaf.requires_grad))
    return pytree.tree_unflatten(result, spec), size


def described(call: Call) -> str:
    """JSON of a call: tensors by shape and dtype, plain constants by value, anything else by its repr."""

    def encode(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return {type(value).__name__: [encode(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": {key: encode(item) for key, item in value.items()}}
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": [list(value.shape), dtype, value.requires_grad]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        return {"opaque": repr(value)}

    return json.dumps(encode(call), separators=(",", ":"))


def restored(text: str) -> Call:
    """The call that `described` wrote, with meta tensors.

    Raises:
        PlanMismatchError: it held an object that a file cannot hold.
    """

    def decode(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "tensor":
            shape, dtype, requires_grad = content
            made = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            return made.requires_grad_(requires_grad)
        if kind == "opaque":
            raise PlanMismatchError(
                f"the plan was made for inputs with {content}, which a plan cannot hold; call parallelize with "
                "example_inputs instead, or plan with tensors and plain constants alone"
            )
        if kind == "dict":
            return {key: decode(item) for key, item in content.items()}
        if kind in ("tuple", "list"):
            items = [decode(item) for item in content]
            return tuple(items) if kind == "tuple" else items
        return content

    args, kwargs = decode(json.loads(text))
    return args, kwargs
