"""What a mesh means: its axes by name, and which of them split the batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Axes = tuple[tuple[str, int], ...]

BATCH_NAMES = frozenset(
    {"dp", "dp_replicate", "dp_shard", "fsdp", "data", "batch", "ddp", "replicate", "shard", "data_parallel"}
)
"""As autopar's, torch's and Lightning's documents name axes over which data differ."""
MAX_AXES = 5
MAX_RANKS = 2**31


def axes_of(mesh: DeviceMesh | Mapping[str, int]) -> Axes:
    """(name, size) per axis, outermost first; one axis without a name is `dp`.

    Raises:
        ValueError: several axes without names, a size that is no positive number, or more ranks than can be counted.
    """
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names
        if names is None:
            if mesh.ndim > 1:
                raise ValueError(
                    f"the mesh {tuple(mesh.shape)} has no names for its axes, and they decide what the batch is split "
                    "over; pass mesh_dim_names=('dp', 'tp') or the like to init_device_mesh"
                )
            names = ("dp",)
        axes = tuple(zip(names, mesh.shape, strict=True))
    elif isinstance(mesh, Mapping):
        axes = tuple(mesh.items())
    else:
        raise ValueError(
            f"mesh is a {type(mesh).__name__}; pass a DeviceMesh or a mapping such as {{'dp': 4, 'tp': 2}}"
        )
    if not 1 <= len(axes) <= MAX_AXES:
        raise ValueError(f"the mesh has {len(axes)} axes; 1 to {MAX_AXES} work")
    for name, size in axes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"mesh axis {name!r} has size {size!r}; it must be a positive number")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"mesh axis {name!r}: a name is letters, digits and underscores")
    if (ranks := math.prod(size for _, size in axes)) > MAX_RANKS:
        raise ValueError(f"the mesh has {ranks:,} ranks; at most {MAX_RANKS:,} work")
    return axes


def batch_axes_of(axes: Axes, chosen: Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the axes that split the batch: by name, in either case, or those `chosen`.

    Raises:
        ValueError: `chosen` has an axis that the mesh does not, or one twice.
    """
    names = [name for name, _ in axes]
    if chosen is None:
        return tuple(index for index, name in enumerate(names) if name.lower() in BATCH_NAMES)
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(
            f"batch_axes={tuple(chosen)!r}: the mesh has no axis {unknown[0]!r}; it has {', '.join(names)}"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"batch_axes={tuple(chosen)!r} names an axis more than once")
    return tuple(index for index, name in enumerate(names) if name in chosen)


def axis_notes(axes: Sequence[tuple[str, int]], batch_axes: Sequence[int]) -> list[str]:
    """Of axes that split no batch, as none of the known names is theirs, but may be meant to; or that no axis does."""
    known = ", ".join(sorted(BATCH_NAMES))
    meant = [
        f"axis {name!r} splits no batch: those named {known} do, or Options(batch_axes=...) names them"
        for index, (name, _) in enumerate(axes)
        if index not in batch_axes and re.search("dp|data|batch|shard|replica", name.lower())
    ]
    if meant or batch_axes or all(size == 1 for _, size in axes):
        return meant
    return [
        f"no axis splits the batch, so every rank is given the same: an axis named {known} would, or one that "
        "Options(batch_axes=...) or --batch-axes names"
    ]


def batch_ranks(axes: Axes, batch_axes: Sequence[int]) -> int:
    """How many parts the global batch has."""
    return math.prod(axes[index][1] for index in batch_axes)


def check_world(mesh: DeviceMesh) -> None:
    """Raises ValueError where the mesh is not the whole job, each rank once, or an axis has ranks in another order.

    A process group numbers its ranks as they rise, so along such an axis each would get another one's part.
    """
    world = dist.get_world_size()
    if mesh.size() != world:
        raise ValueError(
            f"the mesh {dict(axes_of(mesh))} has {mesh.size()} ranks but the job has {world}; make their product "
            f"{world}, or start {mesh.size()} processes"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not on the mesh {dict(axes_of(mesh))}")
    for axis, (name, _) in enumerate(axes_of(mesh)):
        if (mesh.mesh.diff(dim=axis) < 0).any():
            raise ValueError(
                f"ranks fall along axis {name!r} of the mesh {mesh.mesh.tolist()}, and torch's process groups have "
                "them as they rise; lay the mesh out by rank, as init_device_mesh does"
            )
