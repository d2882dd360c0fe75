"""A call's inputs as one data-parallel rank feeds them, and their description in a plan."""

from __future__ import annotations

import base64
import functools
import inspect
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from costmodel.files import read_json
from passes.capture.autocast import autocast_as, autocast_dtype
from passes.capture.default_inputs import default_inputs
from passes.capture.inputs import flatten_inputs, part_of_batch
from passes.errors import PlanMismatchError
from passes.planner.infeasible import Smaller
from passes.program.bytes_of import bytes_of
from passes.program.program import Program

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments, the latter sorted by name."""


def call_of(model: nn.Module, example_inputs: Any) -> Call:
    """The call that `example_inputs` stands for: a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: none are given and the model does not tell, or they are neither.
    """
    if example_inputs is None:
        example_inputs = default_inputs(model)
    if isinstance(example_inputs, torch.Tensor):
        raise ValueError("example_inputs is a tensor; pass a tuple (ids,) or a mapping {'input_ids': ids}")
    if isinstance(example_inputs, Mapping):
        return (), dict(sorted(example_inputs.items()))
    if isinstance(example_inputs, (tuple, list)):
        return by_name(type(model).forward, tuple(example_inputs), {})
    raise ValueError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tuple of positional or a mapping of keyword "
        "arguments"
    )


def by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The call with positional arguments as keywords, if `forward` (a method) names them all, so that both forms of a
    call run one graph. A call that `forward` would refuse stays as it is."""
    names = _positional(forward)
    named = dict(zip(names, args, strict=False))
    if len(args) > len(names) or named.keys() & kwargs.keys():
        return args, dict(sorted(kwargs.items()))
    return (), dict(sorted({**named, **kwargs}.items()))


@functools.cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that may be given either way; none where some may be given by position alone."""
    _, *parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def on_cpu(call: Call) -> Call:
    """The call with its real tensors on the CPU, where models are captured."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_meta or leaf.device.type == "cpu":
            return leaf
        return leaf.detach().cpu().requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map(moved, call)
    return args, kwargs


def smaller(
    call: Call, ranks: int, batch_dims: Mapping[str, int | None] | None, capture: Callable[[Call], Program]
) -> Smaller:
    """Captures the step of `ranks` data-parallel ranks that each feed a part of `call`, some times smaller."""

    def program(divisor: int) -> Program | None:
        cut = part_of_batch(*on_cpu(call), divisor, ranks, batch_dims)
        return None if cut is None else capture(cut)

    return program


def described(call: Call, read: Collection[str] = ()) -> str:
    """JSON of a call: tensors by shape and dtype, plain constants by value, other containers by their class and what is
    in them, anything else by its repr.

    The inputs named in `read`, whose values decide what the graph is, are kept with their values. It says too what the
    call was made under, where that is `torch.autocast` or `torch.no_grad`.
    """
    leaves, _, names = flatten_inputs(*call)
    kept = {id(leaf) for leaf, name in zip(leaves, names, strict=True) if name in read and not leaf.is_meta}

    def encode(value: Any) -> Any:
        if type(value) in (tuple, list):
            return {type(value).__name__: [encode(item) for item in value]}
        if type(value) is dict:
            return {"dict": {key: encode(item) for key, item in value.items()}}
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            facts = [list(value.shape), dtype, value.requires_grad]
            return {"tensor": [*facts, _packed(value)] if id(value) in kept else facts}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        parts = pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
        if parts and parts[0] is not value:
            return {"made of": [kind, [encode(part) for part in parts]]}
        return {"opaque": re.sub(" at 0x[0-9a-f]+", "", repr(value))}  # the same on all ranks

    dtype, encoded = autocast_dtype(), encode(call)
    if dtype is not None or not torch.is_grad_enabled():
        under = {"autocast": dtype and str(dtype).removeprefix("torch."), "grad": torch.is_grad_enabled()}
        encoded = {"under": under, "call": encoded}
    return json.dumps(encoded, separators=(",", ":"))


@contextmanager
def as_described(text: str) -> Iterator[None]:
    """Inside, `torch.autocast` and gradients are on or off as where the call was described."""
    under = json.loads(text).get("under", {"autocast": None, "grad": True})
    dtype = getattr(torch, under["autocast"]) if under["autocast"] else None
    with autocast_as(dtype), torch.set_grad_enabled(under["grad"]):
        yield


def valued(call: Call, other: Call) -> Call:
    """`call` with the values that `other` has, for tensors of `call` that have none; in the same shape and dtype."""
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(call), pytree.tree_flatten(other)
    if spec != other_spec:
        return call

    def alike(leaf: Any, found: Any) -> bool:
        both = isinstance(leaf, torch.Tensor) and isinstance(found, torch.Tensor)
        return both and leaf.is_meta and (leaf.shape, leaf.dtype) == (found.shape, found.dtype)

    args, kwargs = pytree.tree_unflatten(
        [found if alike(leaf, found) else leaf for leaf, found in zip(leaves, others, strict=True)], spec
    )
    return args, kwargs


def _packed(tensor: torch.Tensor) -> str:
    return base64.b64encode(zlib.compress(bytes_of(tensor.cpu()).numpy().tobytes())).decode()


def _unpacked(text: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    raw = zlib.decompress(base64.b64decode(text))
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def restored(text: str) -> Call:
    """The call that `described` wrote; tensors without values are meta tensors.

    Raises:
        PlanMismatchError: it held an object that a file cannot hold, or is no text that `described` made.
    """

    def decode(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "tensor":
            shape, dtype, requires_grad, *values = content
            of = getattr(torch, dtype)
            made = _unpacked(values[0], shape, of) if values else torch.empty(shape, dtype=of, device="meta")
            return made.requires_grad_(requires_grad)
        if kind in ("opaque", "made of"):
            raise PlanMismatchError(
                f"the plan was made for inputs with {content if kind == 'opaque' else f'a {content[0]}'}, which a plan "
                "cannot hold; call parallelize with example_inputs instead, or plan with tensors and plain constants "
                "alone, in tuples, lists and dicts"
            )
        if kind == "dict":
            return {key: decode(item) for key, item in content.items()}
        if kind in ("tuple", "list"):
            items = [decode(item) for item in content]
            return tuple(items) if kind == "tuple" else items
        return content

    try:
        whole = read_json(text)
    except ValueError as error:
        raise PlanMismatchError(f"the plan's inputs ('example') are no JSON: {error}; make the plan again") from None
    try:
        args, kwargs = decode(whole.get("call", whole))
    except (AttributeError, RuntimeError, TypeError, ValueError, zlib.error) as error:
        raise PlanMismatchError(
            f"the plan's inputs ('example') are none that a plan is written with: {error}; make the plan again"
        ) from None
    return args, kwargs
