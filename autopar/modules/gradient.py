"""Gradients as DTensors on which a step's ops take no longer than on plain tensors.

`clip_grad_norm_` and fused or foreach optimizers call one op on the list of all gradients, others a few ops on each.
DTensor's dispatch of such an op takes Python per tensor, longer than a small model's kernels. Where the tensors (of
lists, those at each place) lie the same way over the ranks, the op is that of the local parts: nothing is left to
propagate. Anything else goes DTensor's own way, and gives DTensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import _pytree as pytree
from torch.utils._foreach_utils import _foreach_supported_types

aten = torch.ops.aten
_NORM = aten._foreach_norm.Scalar
_TOTAL = aten.linalg_vector_norm.default
_OF_NORMS = (
    _TOTAL, aten.add.Tensor, aten.mul.Tensor, aten.reciprocal.default, aten.clamp.default
)  # fmt: skip
"""What makes one factor of the norms."""
_UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_.default
_NEW = DTensor.__new__


class Gradient(DTensor):
    """A DTensor that a step made; its pickles, copies and results of other ops are DTensors."""

    __slots__: list[str] = []

    @staticmethod
    def of(part: torch.Tensor, spec: DTensorSpec) -> Gradient:
        """The gradient whose local part is `part`."""
        return _NEW(Gradient, part, spec, requires_grad=False)  # type: ignore[return-value]

    def plain(self) -> DTensor:
        """The same as a DTensor."""
        made: DTensor = _plain(self)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is aten.detach.default:  # what autograd keeps of a gradient that arrives
            return _NEW(Gradient, args[0]._local_tensor, args[0]._spec, requires_grad=False)
        kwargs = kwargs or {}
        if func is _NORM:
            made = _norms(*args, **kwargs)
        elif func is aten.stack.default:
            made = _stacked(*args, **kwargs)
        elif func is _UNSCALE:
            made = _unscale(*args)
        elif func in _OF_NORMS:
            made = _whole(func, args, kwargs)
        elif _is_pointwise(func):
            made = _pointwise(func, args, kwargs)
        else:
            made = _elementwise(func, args, kwargs) if _is_elementwise(func) else NotImplemented
        if made is not NotImplemented:
            return made
        made = func(*pytree.tree_map(_plain, args), **pytree.tree_map(_plain, kwargs))
        return args[0] if isinstance(args[0], Gradient) and func._schema.name.endswith("_") else made

    @staticmethod
    def __tensor_unflatten__(inner_tensors: Any, flatten_spec: Any, outer_size: Any, outer_stride: Any) -> Gradient:
        made: Any = DTensor.__tensor_unflatten__(inner_tensors, flatten_spec, outer_size, outer_stride)
        return Gradient.of(made._local_tensor, made._spec)

    def _stable_hash_for_caching(self) -> str:
        """What a compiled optimizer is found by, which is none of one for other DTensors."""
        return f"{super()._stable_hash_for_caching()} {Gradient.__qualname__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        # Not DTensor's own, which fails where the local part lies inside another tensor (gradients that came together).
        if id(self) not in memo:
            memo[id(self)] = self.plain().detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]


_foreach_supported_types.append(Gradient)  # as DTensor's module does; `clip_grad_norm_` looks a type up there


def _plain(value: Any) -> Any:
    """A gradient as a DTensor; anything else as it is."""
    if not isinstance(value, Gradient):
        return value
    return _NEW(DTensor, value._local_tensor, value._spec, requires_grad=value.requires_grad)


@cache
def _is_elementwise(func: Any) -> bool:
    """Whether an op on lists writes to its first list, element by element."""
    name = func._schema.name.removeprefix("aten::")
    listed = name.startswith(("_foreach_", "_fused_ad", "_fused_sgd")) and name.endswith("_")
    return listed and str(func._schema.arguments[0].type) == "List[Tensor]"


@cache
def _broadcasts(func: Any) -> bool:
    """Whether such an op takes further lists of smaller tensors; fused optimizers do not."""
    found: bool = func._schema.name.startswith("aten::_foreach_")
    return found


@cache
def _is_pointwise(func: Any) -> bool:
    """Whether an op writes to its first tensor, element by element: what a loop over parameters calls."""
    found: bool = torch.Tag.pointwise in func.tags and func._schema.name.endswith("_")
    return found


def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` on local parts, where all tensors are alike and none is a term of a sum."""
    first = args[0]
    if not isinstance(first, DTensor) or not _are_whole_or_split([first._spec.placements]):
        return NotImplemented
    if any(isinstance(each, torch.Tensor) for each in kwargs.values()):
        return NotImplemented
    local: list[Any] = []
    for each in args:
        if isinstance(each, DTensor):
            of = each._spec
            if of.placements != first._spec.placements or of.mesh is not first._spec.mesh or each.shape != first.shape:
                return NotImplemented
            local.append(each._local_tensor)
        elif isinstance(each, torch.Tensor):
            return NotImplemented
        else:
            local.append(each)
    func(*local, **kwargs)
    return first


def _elementwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` on local parts, where the lists lie alike and what is no list is whole on each rank."""
    layouts = [each._spec.placements for each in args[0] if isinstance(each, DTensor)]
    if len(layouts) != len(args[0]) or not _are_whole_or_split(layouts):
        return NotImplemented
    if _broadcasts(func) and not all(_are_of_shape(args[0], value) for value in (*args[1:], *kwargs.values())):
        return NotImplemented
    local = [_local(value, layouts) for value in args]
    named = {key: _local(value, layouts) for key, value in kwargs.items()}
    if any(value is NotImplemented for value in (*local, *named.values())):
        return NotImplemented
    func(*local, **named)
    return None


def _local(value: Any, layouts: list[tuple[Placement, ...]]) -> Any:
    """The local parts of an argument, lists as `layouts` and tensors whole; NotImplemented where it lies otherwise."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], DTensor):
        if len(value) != len(layouts) or not all(isinstance(each, DTensor) for each in value):
            return NotImplemented
        found = [each._spec.placements for each in value]
        if not all(map(is_, found, layouts)) and found != layouts:
            return NotImplemented
        return [each._local_tensor for each in value]
    if isinstance(value, DTensor):
        return value._local_tensor if _is_whole(value._spec) else NotImplemented
    return value


def _are_of_shape(tensors: Sequence[Any], value: Any) -> bool:
    """Whether `value`, where it is a list of DTensors, has the shapes of `tensors`."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, DTensor) for each in value[:1]):
        return True
    return [each._spec.tensor_meta.shape for each in value] == [each._spec.tensor_meta.shape for each in tensors]


def _are_whole_or_split(layouts: Sequence[tuple[Placement, ...]]) -> bool:
    """Whether no part is a term of a sum."""
    last: Any = None
    for layout in layouts:
        if layout != last and any(placement.is_partial() for placement in layout):
            return False
        last = layout
    return True


_of_norms: dict[Any, DTensorSpec] = {}


def _norms(tensors: Sequence[DTensor], order: Any = 2, dtype: Any = None) -> Any:
    """Each tensor's norm, its term on this rank."""
    if dtype is not None or not all(isinstance(each, DTensor) for each in tensors):
        return NotImplemented
    if any(each._spec.mesh is not tensors[0]._spec.mesh for each in tensors):
        return NotImplemented
    made: list[Gradient] = []
    last: Any = None
    spec: Any = None
    parts = [each._local_tensor for each in tensors]
    if order == math.inf:  # torch has no largest entry of a rank's part that is empty
        parts = [part if part.numel() else part.new_zeros(1) for part in parts]
    for tensor, part, norm in zip(tensors, parts, torch._foreach_norm(parts, order), strict=True):
        of = tensor._spec
        if of.placements != last or norm.dtype != spec.tensor_meta.dtype:  # most lie as the one before
            last, spec = of.placements, _norm_spec(of, part, norm, order)
        made.append(_NEW(Gradient, norm, spec, requires_grad=False))  # type: ignore[arg-type]
    return made


def _norm_spec(of: DTensorSpec, part: torch.Tensor, norm: torch.Tensor, order: Any) -> DTensorSpec:
    """As DTensor has it, but that a sum over one rank is no sum."""
    key = of.mesh, of.placements, norm.dtype, order
    if key not in _of_norms:
        layout = _NORM([_NEW(DTensor, part, of, requires_grad=False)], order)[0]._spec.placements
        layout = tuple(p if size > 1 else Replicate() for p, size in zip(layout, of.mesh.shape, strict=True))
        meta = TensorMeta(norm.shape, norm.stride(), norm.dtype)
        _of_norms[key] = DTensorSpec(of.mesh, layout, tensor_meta=meta)
    return _of_norms[key]


def _unscale(gradients: Sequence[Any], found: torch.Tensor, factor: torch.Tensor) -> Any:
    """A `GradScaler`'s check: `found` becomes 1 on all ranks where any of them has an entry that is not finite.

    DTensor asks only the ranks over which the first of the tensors is split.
    """
    _UNSCALE([each._local_tensor if isinstance(each, DTensor) else each for each in gradients], found, factor)
    layouts = {(each._spec.mesh, each._spec.placements): None for each in gradients if isinstance(each, DTensor)}
    axes = {(mesh, i): None for mesh, layout in layouts for i, p in enumerate(layout) if not p.is_replicate()}
    for mesh, axis in axes:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return None


def _stacked(tensors: Sequence[DTensor], dim: int = 0) -> Any:
    """Scalars in a row. Terms of a sum stay terms; of what is whole beside them, each rank takes a part."""
    if any(not isinstance(each, DTensor) or each._local_tensor.dim() for each in tensors):
        return NotImplemented
    first = tensors[0]._spec
    row = torch.stack([each._local_tensor for each in tensors], dim)
    if all(each._spec is first for each in tensors):
        return Gradient.of(row, _like(first, row))
    numbers: dict[tuple[Placement, ...], int] = {}
    kinds = tuple(numbers.setdefault(each._spec.placements, len(numbers)) for each in tensors)
    layout, whole = _together(tuple(numbers), kinds, row.device)
    if layout is None:
        return NotImplemented
    for axis, of in whole:
        part = layout[axis]._partition_value(row, first.mesh, axis)  # type: ignore[attr-defined]
        row = torch.where(of, part, row)
    return Gradient.of(row, _like(first, row, layout))


@cache
def _together(
    layouts: tuple[tuple[Placement, ...], ...], kinds: tuple[int, ...], device: torch.device
) -> tuple[tuple[Placement, ...] | None, tuple[tuple[int, torch.Tensor], ...]]:
    """How a row of scalars that lie as `layouts[kind]` lies; per mesh axis that has terms, which of them are whole.

    The layout is None where terms are of different kinds.
    """
    layout: list[Placement] = []
    whole: list[tuple[int, torch.Tensor]] = []
    for axis, placed in enumerate(zip(*layouts, strict=True)):
        terms = {placement for placement in placed if not isinstance(placement, Replicate)}
        if len(terms) > 1:
            return None, ()
        layout.append(next(iter(terms), Replicate()))
        if terms and len(set(placed)) > 1:
            mask = [isinstance(placed[kind], Replicate) for kind in kinds]
            whole.append((axis, torch.tensor(mask, device=device)))
    return tuple(layout), tuple(whole)


def _whole(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` of scalars, or of a row of them, that are whole on each rank; norms of terms are made whole first."""
    if func is _TOTAL and isinstance(args[0], DTensor) and any(p.is_partial() for p in args[0]._spec.placements):
        # DTensor leaves a greatest of greatest ones as it is on this rank, and `float()` would give that.
        row = _plain(args[0])
        args = [row.redistribute(placements=[Replicate()] * row.device_mesh.ndim), *args[1:]]
    of = args[0]._spec if isinstance(args[0], DTensor) else args[1]._spec
    local = [each._local_tensor if isinstance(each, DTensor) and _is_whole(each._spec) else each for each in args]
    if any(isinstance(each, DTensor) or (isinstance(each, torch.Tensor) and each.dim() > 1) for each in local):
        return NotImplemented
    result = func(*local, **kwargs)
    return Gradient.of(result, _like(of, result))


def _is_whole(of: DTensorSpec) -> bool:
    """Whether each rank has all of a tensor."""
    return all(type(placement) is Replicate for placement in of.placements)


_specs: dict[Any, DTensorSpec] = {}


def _like(of: DTensorSpec, part: torch.Tensor, layout: tuple[Placement, ...] | None = None) -> DTensorSpec:
    """The spec of a tensor as `part`, placed as `of` or as `layout`, on all ranks of the same shape."""
    placements = layout or of.placements
    key = of.mesh, placements, part.shape, part.dtype
    if key not in _specs:
        _specs[key] = DTensorSpec(of.mesh, placements, tensor_meta=TensorMeta(part.shape, part.stride(), part.dtype))
    return _specs[key]
