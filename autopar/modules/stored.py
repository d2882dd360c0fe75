"""Parameters at rest: each rank's part of a tensor, and the DTensor that says so.

A `Storage` splits a tensor for computation (by mesh axes in their order, in chunks as `torch.chunk` cuts them) and
then, only to store it, cuts one dim of each part over the state axes: dim 0, or another where dim 0 is split unevenly.
DTensor reads placements from left to right, so a state axis that comes before axes which split dim 0 for computation
is `_StridedShard(0, split_factor)`, as FSDP2 writes it on top of tensor parallelism. This file and
`gradient.py` are those that use DTensor's private names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from passes.program.local import Storage


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
        dim = storage.state_dim
        later = [other for other in range(axis + 1, len(axis_sizes)) if _splits(storage, other, dim)]
        factor = math.prod(axis_sizes[other] for other in later)
        if factor > 1 and dim in storage.uneven_dims(axis_sizes):
            raise ValueError(
                f"{name}: dim {dim} is split unevenly for computation and again as state; DTensor has no word for it"
            )
        result.append(_StridedShard(dim, split_factor=factor) if factor > 1 else Shard(dim))
    return tuple(result)


def _splits(storage: Storage, axis: int, dim: int) -> bool:
    shard = storage.shards[axis]
    return shard is not None and shard.dim == dim


def cut(full: torch.Tensor, storage: Storage, axis_sizes: Sequence[int], coordinate: Sequence[int]) -> torch.Tensor:
    """The part of `full` that the rank at `coordinate` stores, unpadded; a view where that is one."""
    part = full
    for shard, size, index in zip(storage.shards, axis_sizes, coordinate, strict=True):
        if shard is not None and shard.stride == 1:
            part = _chunk(part, shard.dim, size, index)
        elif shard is not None:
            dim, stride = shard.dim, shard.stride
            rows = part.shape[dim] // (size * stride)
            blocks = part.unflatten(dim, (stride, size, rows))
            part = blocks.select(dim + 1, index).flatten(dim, dim + 1)
    for axis in storage.state_axes:
        part = _chunk(part, storage.state_dim, axis_sizes[axis], coordinate[axis])
    return part


def part_shape(storage: Storage, axis_sizes: Sequence[int], coordinate: Sequence[int]) -> tuple[int, ...]:
    """Shape of what `cut` gives the rank at `coordinate`."""
    whole = torch.empty(storage.shape, device="meta")
    return tuple(cut(whole, storage, axis_sizes, coordinate).shape)


def _chunk(part: torch.Tensor, dim: int, ranks: int, index: int) -> torch.Tensor:
    rows = -(-part.shape[dim] // ranks)
    start = min(index * rows, part.shape[dim])
    return part.narrow(dim, start, min(rows, part.shape[dim] - start))


def pad(part: torch.Tensor, storage: Storage, axis_sizes: Sequence[int]) -> torch.Tensor:
    """A stored part as the graph takes it: with zeros up to the full chunk; itself where it is full."""
    shape = storage.padded_shape(axis_sizes)
    if part.shape == shape:
        return part
    padded = part.new_zeros(shape)
    padded[tuple(map(slice, part.shape))] = part
    return padded


def unpad(padded: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The part of `shape` that the rank stores, cut from what the graph gives; all of it where it is full."""
    return padded if padded.shape == tuple(shape) else padded[tuple(map(slice, shape))].contiguous()


def spec(mesh: DeviceMesh, layout: Sequence[Placement], shape: Sequence[int], dtype: torch.dtype) -> DTensorSpec:
    """The spec of a contiguous DTensor of global `shape`."""
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensorSpec(mesh, tuple(layout), tensor_meta=TensorMeta(size, stride, dtype))


def distributed(part: torch.Tensor, of: DTensorSpec) -> DTensor:
    """The DTensor whose local part is `part`, with no dispatch, check or communication."""
    return DTensor.__new__(DTensor, part, of, requires_grad=False)  # __init__ does nothing, and takes longer


def local_part(tensor: DTensor) -> torch.Tensor:
    """This rank's local tensor, without autograd."""
    return tensor._local_tensor


def is_stored_as(tensor: torch.Tensor, of: DTensorSpec) -> bool:
    """Whether `tensor` is a DTensor of that mesh, placements and shape."""
    if not isinstance(tensor, DTensor):
        return False
    found = tensor._spec
    return found is of or (found.mesh == of.mesh and found.placements == of.placements and found.shape == of.shape)
