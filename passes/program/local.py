"""One rank's program: what `rewrite` emits, `lower` compiles, the module runs and the simulator plays.

Every rank runs the same graph. What differs between ranks are its inputs: their parts of the tensors, and their
coordinates on the mesh (an int64 scalar tensor per axis, used for offsets).

Collectives in the graph are `torch.ops._c10d_functional` ops, each followed by `wait_tensor`, or by one per tensor
where several go together. Until `bind_groups` puts a process group's name there, a group is named by its mesh axes,
`"tp"` or `"dp,tp"` (mesh order), so that a graph can be made, printed, priced and simulated without a process group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from passes.program.program import Program

TOGETHER = {
    torch.ops._c10d_functional.all_gather_into_tensor.default: (
        torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default
    ),
    torch.ops._c10d_functional.reduce_scatter_tensor.default: (
        torch.ops._c10d_functional.reduce_scatter_tensor_coalesced.default
    ),
    torch.ops._c10d_functional.all_reduce.default: torch.ops._c10d_functional.all_reduce_coalesced.default,
}
"""A collective of one tensor -> the same of a list of tensors, as one."""
COLLECTIVES = (*TOGETHER, torch.ops._c10d_functional.all_to_all_single.default, *TOGETHER.values())
WAIT = torch.ops._c10d_functional.wait_tensor.default


@dataclass(frozen=True, slots=True)
class DimShard:
    """Dim `dim` is split by one mesh axis.

    With `stride` s the dim is read as (s, n / s) and each of the s blocks is split, as a fused QKV weight is split
    by heads (s = 3); 1 is plain contiguous sharding. DTensor calls s > 1 `_StridedShard(dim, split_factor=s)`.
    """

    dim: int
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Storage:
    """How a tensor of global `shape` is held by the ranks of a mesh, outside the compiled graph.

    `shards`: per mesh axis, how it splits the tensor for computation (`None`: it does not). Where two axes split one
    dim with equal stride, the earlier axis splits first.
    `state_axes`: mesh axes that further split dim `state_dim` of that part, in mesh order, only to store it (FSDP's
    sharding).
    All splits are in chunks of ceil(n / ranks) rows as `torch.chunk` cuts them, so the last ranks may hold fewer rows
    or none. The graph takes and gives such parts zero-padded to the full chunk (`padded_shape`).
    """

    shape: tuple[int, ...]
    shards: tuple[DimShard | None, ...]
    state_axes: tuple[int, ...] = ()
    state_dim: int = 0

    def computed_shape(self, axis_sizes: Sequence[int]) -> tuple[int, ...]:
        """Shape of one rank's part as it is computed with: state axes gathered, uneven splits padded."""
        local = list(self.shape)
        for shard, size in zip(self.shards, axis_sizes, strict=True):
            if shard is not None:
                local[shard.dim] = -(-local[shard.dim] // size)
        return tuple(local)

    def padded_shape(self, axis_sizes: Sequence[int]) -> tuple[int, ...]:
        """Shape of what the graph takes: the stored part, padded to equal chunks.

        Each state axis in mesh order cuts ceil(n / size) rows, so nested cuts pad to a multiple at each level.
        """
        local = list(self.computed_shape(axis_sizes))
        for axis in self.state_axes:
            local[self.state_dim] = -(-local[self.state_dim] // axis_sizes[axis])
        return tuple(local)

    def uneven_dims(self, axis_sizes: Sequence[int]) -> tuple[int, ...]:
        """Dims whose split for computation leaves some ranks with less than a full chunk."""
        split = [
            math.prod(size for shard, size in zip(self.shards, axis_sizes, strict=True) if shard and shard.dim == dim)
            for dim in range(len(self.shape))
        ]
        return tuple(dim for dim, ways in enumerate(split) if self.shape[dim] % ways)


LocalInputKind = Literal["parameter", "buffer", "input", "tangent", "seed", "coordinate"]


@dataclass(frozen=True, slots=True)
class LocalInput:
    """A placeholder of the local graph.

    The first ones are the program's `inputs`, one for one, with their storage. Then, where the program has random ops,
    `seed` (an int64 tensor of shape (2,): the user's seed and the step's number, equal on every rank), and one
    `coordinate` per mesh axis (named by the axis).
    A "parameter" stored with state axes arrives padded. A "tangent" of an output with a batch dim is scaled by the
    graph itself (the average over the batch axes), so the caller passes autograd's value as it is.
    """

    kind: LocalInputKind
    name: str
    storage: Storage


@dataclass(frozen=True, slots=True)
class LocalOutput:
    """An entry of the local graph's output tuple; the same order and names as the program's `outputs`.

    "output": the model returned it; its storage is how the computed parts lie (a loss is whole on every rank).
    "buffer": the new value of a buffer or parameter, whole on every rank. "gradient": stored (and padded) as its
    parameter.
    """

    kind: Literal["output", "buffer", "gradient"]
    name: str
    storage: Storage


@dataclass(frozen=True)
class LocalProgram:
    """One rank's step. Node metadata is that of `Program` (val holds local shapes).

    A node that holds a rank's part of a node of the program says so: `part_of` is (that node's name, the layout of the
    part on the tensor's expanded dims).
    """

    graph: fx.GraphModule
    inputs: tuple[LocalInput, ...]
    outputs: tuple[LocalOutput, ...]
    axes: tuple[tuple[str, int], ...]
    """The mesh: (name, size) per axis."""
    program: Program
    """What it was made from: specs of inputs and outputs, aliases, has_loss."""

    @property
    def placeholders(self) -> dict[fx.Node, LocalInput]:
        """What each placeholder of the graph is, in order."""
        return dict(zip(self.graph.graph.find_nodes(op="placeholder"), self.inputs, strict=True))

    def placeholders_of(self, *kinds: LocalInputKind) -> list[fx.Node]:
        """The placeholders of these kinds, in order."""
        return [node for node, given in self.placeholders.items() if given.kind in kinds]


def bind_groups(graph: fx.GraphModule, group_names: Mapping[str, str]) -> fx.GraphModule:
    """Put process groups' names where collectives name mesh axes; `group_names` maps "dp,tp" to a group's name."""
    for node in graph.graph.nodes:
        if node.target in COLLECTIVES:
            node.args = (*node.args[:-1], group_names[node.args[-1]])
    graph.recompile()
    return graph


def groups_used(graph: fx.GraphModule) -> tuple[str, ...]:
    """The axis groups ("tp", "dp,tp") whose collectives the graph issues, in order of first use."""
    return tuple(dict.fromkeys(node.args[-1] for node in graph.graph.nodes if node.target in COLLECTIVES))
