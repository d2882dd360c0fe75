"""Models distributed as people write it: `parallelize_module` over an axis "tp", `fully_shard` over an axis "dp"."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def sharded(
    model: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, *, compiled: bool = False, reshard: bool = True
) -> nn.Module:
    """`model`, layer by layer; over tp (LLaMA only: Conv1D is no Linear) where the mesh has it.

    compiled: each layer by itself. reshard: `fully_shard`'s `reshard_after_forward`, of the layers.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    column = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    styles: dict[str, Any] = {name: ColwiseParallel() for name in column}
    styles |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in layers:
        if "tp" in (mesh.mesh_dim_names or ()):
            parallelize_module(layer, mesh["tp"], styles)
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh["dp"])
    return model
