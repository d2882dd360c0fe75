"""Example inputs: from one data-parallel rank's to the global batch, and parts of one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from passes.program.fakes import FakeTensor

_MAX_TILED_ELEMENTS = 2**26


@dataclass(frozen=True)
class GlobalInputs:
    """What the model is fed with the batch of all data-parallel ranks put together."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: int
    batch_dims: tuple[int | None, ...]
    """For each pytree leaf of `(args, kwargs)`, the dim that the batch axes split; None: every rank has the same."""
    notes: tuple[str, ...] = ()
    """Of what was guessed and may be otherwise."""


def global_inputs(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    ways: int,
    batch_dims: Mapping[str, int | None] | None = None,
) -> GlobalInputs:
    """The inputs of `ways` ranks that each feed `(args, kwargs)`.

    The batch size is the length of dim 0 that most tensors share. A tensor has its batch in dim 0 where that is the
    batch size or a multiple of it (flattened image patches), unless its length there is that of another tensor's
    sequence and it is a vector or a square (positions, masks); in dim 1 where that is the batch size and dim 0 is not
    (stacked position ids; of a batch of one, where the dims behind dim 0 are all those of another tensor).
    `batch_dims` says it for leaves by name, such as `input_ids` or `args.0`. Values are repeated for each rank; the
    result of a fake or meta tensor, or a very large one, is a meta tensor.
    """
    leaves, spec, names = flatten_inputs(args, dict(kwargs))
    tensors = {n: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}
    given = _checked(batch_dims or {}, names, tensors)
    batch = _batch_size(tensors, given)
    if batch == 0:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"the batch has no samples (the inputs' shapes are {shapes}); give every rank at least one")
    whole = {tuple(t.shape) for t in tensors.values() if t.dim() and t.shape[0] == batch}
    guessed = {name: _guess(tensor, batch, whole) for name, tensor in tensors.items() if name not in given}
    dims = {**guessed, **given}
    places = [dims.get(name) for name in names]
    tiled = [leaf if dim is None else _tile(leaf, ways, dim) for leaf, dim in zip(leaves, places, strict=True)]
    new_args, new_kwargs = pytree.tree_unflatten(tiled, spec)
    several = {n: tensors[n].shape[d] // batch for n, d in guessed.items() if d is not None}
    notes = tuple(
        f"input {name!r} was taken for {rows} rows per sample; where all samples share it, say "
        f"Options(batch_dims={{{name!r}: None}})"
        for name, rows in several.items()
        if ways > 1 and rows > 1
    )
    return GlobalInputs(new_args, new_kwargs, batch * ways, tuple(places), notes)


def _checked(
    batch_dims: Mapping[str, int | None], names: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, int | None]:
    """`batch_dims`, counted from the first dim.

    Raises:
        ValueError: one names no input, or no dim of it.
    """
    if unknown := {name: dim for name, dim in batch_dims.items() if name not in names}:
        raise ValueError(f"batch_dims={unknown}: the inputs are {', '.join(names)}")
    found: dict[str, int | None] = {}
    for name, dim in batch_dims.items():
        if dim is not None and (name not in tensors or not -tensors[name].dim() <= dim < tensors[name].dim()):
            raise ValueError(f"batch_dims={{{name!r}: {dim}}}, but the input is {_describe(tensors.get(name))}")
        found[name] = dim if dim is None else dim % tensors[name].dim()
    return found


def smaller_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], divisor: int, batch_dims: Sequence[int | None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The first of `divisor` equal parts of a batch that lies in these dims of its leaves; None where it has none."""
    leaves, spec, _ = flatten_inputs(args, dict(kwargs))
    cut = []
    for leaf, dim in zip(leaves, batch_dims, strict=True):
        if dim is not None and leaf.shape[dim] % divisor:
            return None
        cut.append(leaf if dim is None else leaf.narrow(dim, 0, leaf.shape[dim] // divisor))
    new_args, new_kwargs = pytree.tree_unflatten(cut, spec)
    return new_args, new_kwargs


def part_of_batch(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    divisor: int,
    ranks: int,
    batch_dims: Mapping[str, int | None] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What one of `ranks` data-parallel ranks feeds where its batch is `divisor` times smaller; None where that cannot
    be. `batch_dims`: as for `global_inputs`."""
    return smaller_inputs(args, kwargs, divisor, global_inputs(args, kwargs, ranks, batch_dims).batch_dims)


def one_sample(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: Mapping[str, int | None] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first sample of what one data-parallel rank feeds. `batch_dims`: as for `global_inputs`."""
    whole = global_inputs(args, kwargs, 1, batch_dims)
    found = smaller_inputs(whole.args, whole.kwargs, whole.batch_size, whole.batch_dims)
    assert found is not None  # the batch divides itself
    return found


def flatten_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec, list[str]]:
    """Pytree leaves of `(args, kwargs)`, their spec, and a name for each: `args.0`, `input_ids`, `batch.mask`.

    Raises:
        ValueError: a leaf is an object that holds tensors, which no graph would see.
    """
    flatten_call(args, kwargs)  # dataclasses are known to pytree after it
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    names = []
    for (root, *path), _ in paths:
        parts = [path_name(path)] if root.idx else ["args", path_name(path)]  # type: ignore[attr-defined]
        names.append(".".join(parts))
    leaves = [leaf for _, leaf in paths]
    refuse_hidden_tensors(leaves, names)
    return leaves, spec, names


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """Pytree leaves of `(args, kwargs)` and their spec, dataclasses that hold tensors taken apart too."""
    while True:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        kinds = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and _holds_tensors(leaf)}
        if not kinds:
            return leaves, spec
        for kind in kinds:
            pytree.register_dataclass(kind)


def refuse_hidden_tensors(leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Raises ValueError for a leaf that is an object with tensors in it: a graph would keep the example's for ever."""
    for leaf, name in zip(leaves, names, strict=True):
        if not isinstance(leaf, Tensor) and _holds_tensors(leaf):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}, an object that holds tensors or is given some by the model's "
                "forward, which a captured step neither sees nor fills. Pass tensors, in tuples, lists, dicts or "
                "dataclasses; a model of transformers takes use_cache=False in the place of a key-value cache, its "
                "generate() too"
            )


_HOLD_NOTHING = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, Enum, FunctionType, MethodType,
    ModuleType,
)  # fmt: skip


def _holds_tensors(root: Any) -> bool:
    """Whether an object has tensors among its attributes, or in what these hold."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, (Tensor, np.ndarray, nn.Module)):
            return True
        if id(value) in seen or isinstance(value, _HOLD_NOTHING):
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple, set, frozenset)):
            stack.extend(value)
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        else:
            stack.extend(getattr(value, "__dict__", {}).values())
            slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
            stack.extend(getattr(value, name, None) for name in slots)
    return False


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as dotted text."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _batch_size(tensors: Mapping[str, Tensor], given: Mapping[str, int | None]) -> int:
    told = {tensors[n].shape[d] for n, d in given.items() if d is not None}
    free = {n: t for n, t in tensors.items() if n not in given and t.dim()}
    counts = Counter(t.shape[0] for t in free.values())
    if told:
        return min(told)
    if not tensors:
        raise ValueError("the call has no tensor; pass what the model's forward takes, a batch of it")
    if not counts:
        found = {n: _describe(t) for n, t in tensors.items()}
        raise ValueError(f"no input has a batch dim: {found}; give the model a tensor whose dim 0 is the batch")
    most = max(counts.values())
    best = sorted(size for size, count in counts.items() if count == most)
    if len(best) == 1 or (all(size % best[0] == 0 for size in best) and best[0] > 1):
        return best[0]
    shapes = {n: tuple(t.shape) for n, t in free.items()}
    raise ValueError(
        f"cannot tell the batch size from the inputs' shapes {shapes}: dim 0 is {' or '.join(map(str, best))}. "
        "Say where the batch is, for example batch_dims={" + f"{next(iter(free))!r}: 0" + "}"
    )


def _guess(tensor: Tensor, batch: int, shapes: set[tuple[int, ...]]) -> int | None:
    """`shapes`: of the tensors with as many rows as the batch."""
    if not tensor.dim() or not tensor.numel():
        return None
    rows = tensor.shape[0]
    if rows == batch:
        return 0
    if tensor.dim() > 2 and tensor.shape[1] == batch and (batch > 1 or tuple(tensor.shape[1:]) in shapes):
        return 1
    positions = any(rows in shape[1:] for shape in shapes) and (tensor.dim() == 1 or tensor.shape[0] == tensor.shape[1])
    return 0 if rows % batch == 0 and not positions and rows > batch else None


def _tile(tensor: Tensor, ways: int, dim: int) -> Tensor:
    unknown = isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
    if unknown or tensor.numel() * ways > _MAX_TILED_ELEMENTS:
        shape = [n * ways if d == dim else n for d, n in enumerate(tensor.shape)]
        out = torch.empty(shape, dtype=tensor.dtype, device="meta")
    else:
        out = torch.cat([tensor.detach()] * ways, dim)
    return out.requires_grad_() if tensor.requires_grad else out


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
