"""Process groups for the mesh axes that a graph's collectives name.

One axis has the mesh's own group. Several (`"dp,tp"`) get a group of their own, made by `new_group` on every rank in
the same order; DTensor never learns of it, unlike a flattened mesh, whose presence changes how DTensor redistributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh


class Groups:
    """Names of process groups by mesh axes, made on first use and kept for later programs."""

    def __init__(self, mesh: DeviceMesh, axis_names: tuple[str, ...]) -> None:
        self.mesh = mesh
        self.axis_names = axis_names
        self.names: dict[str, str] = {}

    def names_for(self, wanted: Iterable[str]) -> dict[str, str]:
        """Group name per entry of `wanted` ("tp", "dp,tp"). Collective: every rank asks for the same, in order."""
        return {axes: self._name(axes) for axes in wanted}

    def share_memory(self, axes: str) -> None:
        """Lets kernels of the ranks along `axes` reach each other's memory, where torch's passes ask for it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, but what those passes look up
            enable_symm_mem_for_group(self._name(axes))  # type: ignore[arg-type]

    def _name(self, axes: str) -> str:
        if axes not in self.names:
            dims = [self.axis_names.index(name) for name in axes.split(",")]
            group = self.mesh.get_group(dims[0]) if len(dims) == 1 else self._joint_group(dims)
            self.names[axes] = group.group_name
        return self.names[axes]

    def _joint_group(self, dims: list[int]) -> dist.ProcessGroup:
        rest = [dim for dim in range(self.mesh.ndim) if dim not in dims]
        ranks = self.mesh.mesh
        rows = ranks.permute(*rest, *dims).reshape(-1, int(torch.tensor([ranks.shape[d] for d in dims]).prod()))
        mine = None
        for row in rows.tolist():
            if row != sorted(row):
                raise ValueError(f"mesh axes {dims} join ranks {row}: their order must rise; lay the mesh out by rank")
            group = dist.new_group(row)
            if dist.get_rank() in row:
                mine = group
        assert mine is not None
        return cast(dist.ProcessGroup, mine)
