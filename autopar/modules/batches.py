"""Which ranks have which part of the global batch, and a check that they were given it.

Ranks that differ only in axes which do not split the batch (`tp`) compute one data-parallel rank's part together. A
loader that gives each of them its own batch, as samplers over all ranks do, would train on something that is no batch
at all, and nothing would look wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from passes.program.bytes_of import bytes_of, digest


@dataclass(frozen=True)
class BatchRanks:
    """A mesh, and its axes that split the batch, outermost first."""

    mesh: DeviceMesh
    axes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of parts that the global batch is cut into: data-parallel ranks."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def index(self) -> int:
        """Index of this rank's part."""
        index = 0
        for axis in self.axes:
            index = index * self.mesh.shape[axis] + self.mesh.get_local_rank(axis)
        return index

    @property
    def sharing(self) -> int:
        """Number of ranks that have the same part."""
        return self.mesh.size() // self.count

    @property
    def first(self) -> bool:
        """Whether this rank is the first of those that have its part."""
        return all(axis in self.axes or self.mesh.get_local_rank(axis) == 0 for axis in range(self.mesh.ndim))

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """The parts of all data-parallel ranks, concatenated in dim 0. A DTensor is of the global batch already, and is
        made whole."""
        if isinstance(part, DTensor):
            return part.full_tensor()
        rows = part[None] if part.dim() == 0 else part
        raw = bytes_of(rows)
        for axis in reversed(self.axes):
            parts = [torch.empty_like(raw) for _ in range(self.mesh.shape[axis])]
            dist.all_gather(parts, raw, group=self.mesh.get_group(axis))
            raw = torch.cat(parts)
        return raw.view(part.dtype).view(self.count * rows.shape[0], *rows.shape[1:])

    def summed(self, part: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """The sum, or another reduction `op`, over data-parallel ranks."""
        total = part.full_tensor() if isinstance(part, DTensor) else part.clone()
        for axis in self.axes:
            dist.all_reduce(total, op, group=self.mesh.get_group(axis))
        return total

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of dim 0 of a DTensor of the global batch; anything else as it is."""
        if not isinstance(whole, DTensor):
            return whole
        if whole.dim() == 0 or whole.shape[0] % self.count:
            return whole.full_tensor()
        layout = [Shard(0) if axis in self.axes else Replicate() for axis in range(self.mesh.ndim)]
        return whole.redistribute(placements=layout).to_local()

    def check(self, inputs: Sequence[tuple[str, int | None, torch.Tensor]]) -> None:
        """Check that ranks which should have the same values do; collective.

        inputs: per input its name, the dim that the batch axes split (None: one value for all ranks), and this rank's
        tensor.

        Raises:
            ValueError: on every rank, where values differ.
        """
        inputs = [each for each in inputs if each[2].numel()]
        axes = [axis for axis, size in enumerate(self.mesh.shape) if size > 1]
        if not inputs or not any(dim is None or axis not in self.axes for _, dim, _ in inputs for axis in axes):
            return
        digests = torch.stack([digest(tensor) for _, _, tensor in inputs])
        shared = torch.tensor([[dim is None or axis not in self.axes for _, dim, _ in inputs] for axis in axes])
        found = torch.zeros_like(shared, dtype=torch.int64, device=digests.device)
        for row, axis in enumerate(axes):
            both = torch.stack([digests, ~digests])  # greatest and least in one exchange
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.mesh.get_group(axis))
            found[row] = both[0] != ~both[1]
        found *= shared.to(found.device)
        for axis in axes:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.mesh.get_group(axis))
        if differ := found.nonzero().tolist():
            row, which = differ[0]
            name, dim, _ = inputs[which]
            raise ValueError(self._complaint(name, axes[row], is_part=dim is not None))

    def _complaint(self, name: str, axis: int, is_part: bool) -> str:
        names = self.mesh.mesh_dim_names or ("dp",)
        if not is_part:
            return (
                f"{name} has no dim that the batch is split in, so it is one value for the global batch, but ranks "
                f"along {names[axis]!r} were given different ones; give all ranks the same"
            )
        splitting = ", ".join(names[each] for each in self.axes)
        by = f"only {splitting} splits the batch" if splitting else "no axis of the mesh splits the batch"
        return (
            f"{name}: ranks along {names[axis]!r} were given different batches, but {by}; "
            f"give them the same one (DistributedSampler(num_replicas={self.count}, rank={self.index}) on rank "
            f"{dist.get_rank()}, or autopar.accelerator.Accelerator's loaders), and draw what is random in it alike"
        )
