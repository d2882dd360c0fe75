"""A model with fewer of its repeated layers: what costs are worked out on, where layers only repeat.

    layers        A A A A ... A      (or A B A B ..., or D D M M ... M)
    prefixes      3 and 4            depths that are captured instead (6 and 8; 5 and 6)
    weights       how to combine them: cost(all) = sum(weight * cost(prefix))

A cost that is linear in how many layers of each kind there are, or in how often they follow each other (seconds of a
schedule, bytes at a moment), follows exactly from as many prefixes as there are unknowns. Layers are of one kind where
their modules, the shapes and dtypes of what they hold, what of it is frozen, and their plain attributes (but for their
index) are alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from autopar.modules.tree import copied
from passes.analysis.layers import layer_pattern_of

_LEAST = 3
"""Layers in the shallowest prefix (of each kind, where kinds are counted): the first and the last are not like those
between them."""
_LEAST_MIXED = 5
"""Of several kinds: a peak in the last two layers is told from one between them (`passes.runs.depth`)."""


@dataclass(frozen=True)
class Prefix:
    """The model with so many of its layers; `weight` is its share in the cost of the whole, `outside` in the cost of
    what no layer is part of."""

    model: nn.Module
    layers: int
    weight: float
    outside: float


@dataclass(frozen=True)
class Shallow:
    """Prefixes of a model with `layers` repeated layers (0: none, or too few to cut: the model is the only one)."""

    prefixes: tuple[Prefix, ...]
    layers: int
    stack: str = ""
    """Name of the list that holds the layers."""


def shallow(model: nn.Module) -> Shallow:
    """`model` (parameters on the meta device) as the cheapest set of prefixes that tells its costs."""
    whole = Shallow((Prefix(model, 0, 1.0, 1.0),), 0)
    found = _stack(model)
    if found is None:
        return whole
    name, layers = found
    kinds = _kinds(layers)
    chosen = _depths(kinds)
    if chosen is None:
        return whole
    depths, weights, outside = chosen
    prefixes = tuple(
        Prefix(_cut(model, name, depth), depth, weight, share)
        for depth, weight, share in zip(depths, weights, outside, strict=True)
    )
    return Shallow(prefixes, len(layers), name)


def _stack(model: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """The list of repeated layers with most parameters, where it is the only one."""
    stacks = []
    for pattern, count in layer_pattern_of([name for name, _ in model.named_parameters()]).layers.items():
        name = pattern.removesuffix(".*")
        if "*" in name:
            continue
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList) and len(module) == count:
            stacks.append((name, list(module)))
    return stacks[0] if len(stacks) == 1 else None


def _kinds(layers: Sequence[nn.Module]) -> list[int]:
    """A number per layer, equal for layers that are alike."""
    told = [_attributes(layer) for layer in layers]
    indices = {
        place
        for place, value in told[0].items()
        if type(value) is int and all(each.get(place) == value + index for index, each in enumerate(told))
    }
    numbers: dict[object, int] = {}
    kept = [repr(sorted((k, repr(v)) for k, v in each.items() if k not in indices)) for each in told]
    return [numbers.setdefault(signature, len(numbers)) for signature in kept]


def _attributes(layer: nn.Module) -> dict[str, Any]:
    """Plain attributes and classes of a layer's modules, and what their parameters and buffers are, by place."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"{name}:"] = type(module)
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if _is_plain(value)}
        held = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        found |= {f"{name}.{key}": (tuple(t.shape), t.dtype, t.requires_grad) for key, t in held}
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):  # an attention's window, a convolution's stride
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _depths(kinds: Sequence[int]) -> tuple[list[int], list[float], list[float]] | None:
    """Prefixes that tell the costs of all, with the weights of the whole and of nothing; None: the whole is cheaper.

    What a layer costs depends on the one before it, so neighbours are counted where few prefixes span them: each ends
    as the whole does. Kinds alone are counted where layers follow each other in too many ways for that.
    """
    return _spanning(kinds, *_neighbours(kinds)) or _spanning(kinds, *_alone(kinds))


def _neighbours(kinds: Sequence[int]) -> tuple[list[list[float]], list[int]]:
    """Per depth, how often each two kinds follow each other; the depths to choose from."""
    pairs = list(itertools.pairwise(kinds))
    among = sorted(set(pairs))
    counts = [[float(pairs[: max(0, depth - 1)].count(pair)) for pair in among] for depth in range(len(kinds) + 1)]
    least = [min(_LEAST - 1 if one == other else 1, pairs.count((one, other))) for one, other in among]
    shallowest = _LEAST if len(set(kinds)) == 1 else _LEAST_MIXED
    usable = [
        depth
        for depth in range(shallowest, len(kinds))
        if kinds[depth - 1] == kinds[-1] and all(have >= want for have, want in zip(counts[depth], least, strict=True))
    ]
    return counts, usable


def _alone(kinds: Sequence[int]) -> tuple[list[list[float]], list[int]]:
    """Per depth, how many layers of each kind there are; the depths to choose from."""
    counts = [_of_each(kinds, depth) for depth in range(len(kinds) + 1)]
    least = [min(_LEAST, count) for count in counts[-1]]
    usable = [
        depth
        for depth in range(1, len(kinds))
        if all(have >= want for have, want in zip(counts[depth], least, strict=True))
    ]
    return counts, usable


def _of_each(kinds: Sequence[int], depth: int) -> list[float]:
    """Layers of each kind among the first `depth`."""
    return [float(kinds[:depth].count(kind)) for kind in sorted(set(kinds))]


def _spanning(
    kinds: Sequence[int], counts: Sequence[Sequence[float]], usable: Sequence[int]
) -> tuple[list[int], list[float], list[float]] | None:
    """The shallowest of the `usable` depths whose `counts` span those of the whole, and the two weights."""
    rows = [[1.0, *count] for count in counts]
    depths: list[int] = []
    for depth in usable:
        if np.linalg.matrix_rank(np.array([rows[d] for d in (*depths, depth)])) > len(depths):
            depths.append(depth)
        weights = _weights([rows[d] for d in depths], rows[-1])
        if weights is not None:
            break
    else:
        return None
    if sum(depths) > len(kinds):
        return None
    # Nothing of what repeats: layers of a kind that every prefix has in full stay.
    held = [_of_each(kinds, depth) for depth in depths]
    nothing = [0.0 if len(set(each)) > 1 else each[0] for each in zip(*held, strict=True)]
    outside = _weights([[1.0, *count] for count in held], [1.0, *nothing])
    return (depths, weights, outside) if outside is not None else None


def _weights(rows: list[list[float]], wanted: list[float]) -> list[float] | None:
    matrix = np.array(rows).T
    found, *_ = np.linalg.lstsq(matrix, np.array(wanted), rcond=None)
    return [float(x) for x in found] if np.allclose(matrix @ found, wanted, atol=1e-6) else None


def _cut(model: nn.Module, stack: str, depth: int) -> nn.Module:
    """A copy of `model` that shares its tensors, with the first `depth` layers of `stack`."""
    new = copied(model, lambda _, old: old, lambda _, old: old)
    path, _, last = stack.rpartition(".")
    parent = new.get_submodule(path)
    layers = parent.get_submodule(last)
    assert isinstance(layers, nn.ModuleList)
    parent._modules[last] = nn.ModuleList(list(layers)[:depth])
    return new
