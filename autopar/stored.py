"""Parameters at rest: each rank's part of a tensor, and the DTensor that says so.

A `Storage` splits a tensor for computation (evenly, by mesh axes in their order) and then, only to store it, cuts
dim 0 of each part over the state axes. DTensor reads placements from left to right, so a state axis that comes before
axes which split dim 0 for computation is `_StridedShard(0, split_factor)`, as FSDP2 writes it on top of tensor
parallelism. This is the one file that uses DTensor's private names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from passes.local import Storage


def placements(storage: Storage, axis_sizes: Sequence[int], name: str = "tensor") -> tuple[Placement, ...]:
    """DTensor's placements for `storage`, one per mesh axis.

    Raises:
        ValueError: the tensor is split in strides (`DimShard.stride` > 1), which DTensor's checkpoints get wrong.
    """
    result: list[Placement] = []
    for axis, shard in enumerate(storage.shards):
        if shard is not None and shard.stride != 1:
            raise ValueError(
                f"{name}: dim {shard.dim} is stored in {shard.stride} strided blocks, which "
                "torch.distributed.checkpoint cannot save; store it contiguous and split it in the graph"
            )
        if axis not in storage.state_axes:
            result.append(Replicate() if shard is None else Shard(shard.dim))
            continue
        if shard is not None:
            raise ValueError(f"{name}: mesh axis {axis} splits it both for computation and as state")
        later = [other for other in range(axis + 1, len(axis_sizes)) if _splits_rows(storage, other)]
        factor = math.prod(axis_sizes[other] for other in later)
        result.append(_StridedShard(0, split_factor=factor) if factor > 1 else Shard(0))
    return tuple(result)


def _splits_rows(storage: Storage, axis: int) -> bool:
    shard = storage.shards[axis]
    return shard is not None and shard.dim == 0


def cut(full: torch.Tensor, storage: Storage, axis_sizes: Sequence[int], coordinate: Sequence[int]) -> torch.Tensor:
    """The part of `full` that the rank at `coordinate` stores, unpadded; a view where that is one."""
    part = full
    for shard, size, index in zip(storage.shards, axis_sizes, coordinate, strict=True):
        if shard is not None:
            dim, stride = shard.dim, shard.stride
            rows = part.shape[dim] // (size * stride)
            blocks = part.unflatten(dim, (stride, size, rows))
            part = blocks.select(dim + 1, index).flatten(dim, dim + 1)
    for axis in storage.state_axes:
        rows = -(-part.shape[0] // axis_sizes[axis])
        start = min(coordinate[axis] * rows, part.shape[0])
        part = part[start : start + rows]
    return part


def pad(part: torch.Tensor, storage: Storage, axis_sizes: Sequence[int]) -> torch.Tensor:
    """A stored part as the graph takes it: with zero rows up to the full chunk; itself where it is full."""
    rows = storage.padded_shape(axis_sizes)[0] if storage.state_axes else None
    if rows is None or part.shape[0] == rows:
        return part
    padded = part.new_zeros((rows, *part.shape[1:]))
    padded[: part.shape[0]] = part
    return padded


def unpad(padded: torch.Tensor, rows: int | None) -> torch.Tensor:
    """The `rows` that the rank stores of what the graph gives; all of it where `rows` is None."""
    return padded if rows is None or padded.shape[0] == rows else padded[:rows]


def spec(
    mesh: DeviceMesh, layout: Sequence[Placement], shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] = ()
) -> DTensorSpec:
    """What a DTensor of global `shape` carries; contiguous unless `stride` says otherwise."""
    size = torch.Size(shape)
    strides = tuple(stride) or torch.empty(size, device="meta").stride()
    return DTensorSpec(mesh, tuple(layout), tensor_meta=TensorMeta(size, strides, dtype))


def distributed(part: torch.Tensor, of: DTensorSpec) -> DTensor:
    """The DTensor whose local part is `part`, with no dispatch, check or communication."""
    return DTensor(part, of, requires_grad=False)


def local_part(tensor: DTensor) -> torch.Tensor:
    """This rank's part, without autograd."""
    return tensor._local_tensor


def is_stored_as(tensor: torch.Tensor, of: DTensorSpec) -> bool:
    """Whether `tensor` is a DTensor of that mesh, placements and shape."""
    if not isinstance(tensor, DTensor):
        return False
    found = tensor._spec
    return found is of or (found.mesh == of.mesh and found.placements == of.placements and found.shape == of.shape)
