"""Parts at rest against DTensor's own cutting and FSDP2's, on real ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from local_steps import stored_rows
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from autopar.modules.stored import cut, distributed, is_stored_as, local_part, pad, placements, spec, unpad
from passes.program.local import DimShard, Storage

ROWS, COLUMNS = DimShard(0), DimShard(1)


def storages(rows: int) -> list[Storage]:
    """Every way to hold a (rows, 8) tensor on a (2, 2) mesh."""
    ways: list[Storage] = []
    for first, second in itertools.product((None, ROWS, COLUMNS), repeat=2):
        split = (first == ROWS) + (second == ROWS)
        free = tuple(axis for axis, shard in enumerate((first, second)) if shard is None)
        state_dim = 1 if rows % (2**split) else 0  # an uneven split of the rows is not cut again
        for count in range(len(free) + 1):
            states = itertools.combinations(free, count)
            ways += [Storage((rows, 8), (first, second), state, state_dim if state else 0) for state in states]
    return ways


def _as_dtensor_cuts(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for rows in (1, 2, 3, 9, 10, 12):
        full = torch.arange(rows * 8.0).view(rows, 8)
        for storage in storages(rows):
            layout = placements(storage, (2, 2))
            part = cut(full, storage, (2, 2), coordinate)
            of = spec(mesh, layout, full.shape, full.dtype)
            made = distributed(part.clone(), of)
            assert compute_local_shape_and_global_offset(full.shape, mesh, layout)[0] == part.shape
            # Without a scatter: the one that distribute_tensor makes asserts for uneven strided parts.
            wanted = distribute_tensor(full, mesh, layout, src_data_rank=None)
            assert torch.equal(part, wanted.to_local()), (storage, layout)
            assert is_stored_as(wanted, of)
            assert torch.equal(made.full_tensor(), full), (storage, layout)
            padded = pad(part, storage, (2, 2))
            assert tuple(padded.shape) == storage.padded_shape((2, 2))
            assert torch.equal(unpad(padded, part.shape), part)
            if storage.state_axes:
                index = 0
                for axis in storage.state_axes:
                    index = index * 2 + coordinate[axis]
                assert stored_rows(storage, (2, 2))[index] == part.shape[storage.state_dim]
            assert padded.abs().sum() == part.abs().sum()


def test_cuts_are_dtensors() -> None:
    run_ranks(_as_dtensor_cuts, 4)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 12)
        self.down = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(3)


def _as_fsdp_cuts(rank: int, ranks: int, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    torch.manual_seed(0)
    original = _Block()
    wanted: Any = _Block()
    wanted.load_state_dict(original.state_dict())
    tp = names.index("tp") if "tp" in names else None
    if tp is not None:
        parallelize_module(wanted, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    data = tuple(name for name in names if name != "tp")
    fully_shard(wanted, mesh=mesh[data])
    state = tuple(names.index(name) for name in data if name != "dp_replicate")
    split: dict[str, DimShard] = {"up.weight": ROWS, "up.bias": ROWS, "down.weight": COLUMNS} if tp is not None else {}
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for name, parameter in original.named_parameters():
        shards = tuple(split.get(name) if axis == tp else None for axis in range(mesh.ndim))
        storage = Storage(tuple(parameter.shape), shards, state)
        found = wanted.get_parameter(name)
        part = cut(parameter.detach(), storage, shape, coordinate)
        assert torch.equal(part, local_part(found)), name
        layout = placements(storage, shape)
        on_axes = [layout[names.index(n)] for n in found.device_mesh.mesh_dim_names]
        assert list(found.placements) == on_axes, name


@pytest.mark.parametrize(
    ("shape", "names"),
    [((4,), ("fsdp",)), ((2, 2), ("dp", "tp")), ((2, 2), ("dp_replicate", "dp_shard"))],
)
def test_cuts_are_fsdp2s(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    run_ranks(_as_fsdp_cuts, 4, shape, names)


def test_uneven_rows_by_hand() -> None:
    def rows(n: int, sizes: tuple[int, ...], state: tuple[int, ...]) -> tuple[int, ...]:
        return stored_rows(Storage((n, 2), (None,) * len(sizes), state), sizes)

    assert rows(10, (4,), (0,)) == (3, 3, 3, 1)
    assert rows(3, (4,), (0,)) == (1, 1, 1, 0)
    assert rows(9, (2, 4), (0, 1)) == (2, 2, 1, 0, 1, 1, 1, 1)
    assert rows(9, (2, 4), (1,)) == (3, 3, 3, 0)
    assert Storage((9, 2), (None, None), (0, 1)).padded_shape((2, 4)) == (2, 2)


def test_strided_cut_takes_each_blocks_part() -> None:
    full = torch.arange(12)
    storage = Storage((12,), (DimShard(0, stride=3),))
    assert cut(full, storage, (2,), (1,)).tolist() == [2, 3, 6, 7, 10, 11]
    with pytest.raises(ValueError, match=r"qkv: dim 0 is stored in 3 strided blocks"):
        placements(storage, (2,), "qkv")


def _strided_checkpoints(rank: int, ranks: int, folder: str) -> None:
    """Why `placements` refuses strides: DTensor gathers them right (torch 2.11: not at all), and its checkpoints load
    them wrong."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    full = torch.arange(12.0)
    layout = [_StridedShard(0, split_factor=3)]
    part = cut(full, Storage((12,), (DimShard(0, stride=3),)), (2,), (rank,))
    made = distributed(part.clone(), spec(mesh, layout, (12,), full.dtype))
    if torch.__version__.startswith("2.11."):
        with pytest.raises(ValueError, match="unable to be interpreted into a corresponding shard_order"):
            made.full_tensor()
    else:
        assert torch.equal(made.full_tensor(), full)
    save({"w": distribute_tensor(full, mesh, [Shard(0)])}, checkpoint_id=folder)
    into = distributed(torch.zeros_like(part), spec(mesh, layout, (12,), full.dtype))
    load({"w": into}, checkpoint_id=folder)
    assert not torch.equal(local_part(into), part)


def test_torch_still_cannot_checkpoint_strides(tmp_path: Any) -> None:
    run_ranks(_strided_checkpoints, 2, str(tmp_path))


def _private_names(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (1,))
    made = distributed(torch.ones(2, 3), spec(mesh, (Replicate(),), (2, 3), torch.float32))
    assert type(made) is DTensor
    assert made.stride() == (3, 1)
    assert local_part(made).shape == (2, 3)
    assert made.placements == (Replicate(),)


def test_private_torch_api_is_where_it_was() -> None:
    run_ranks(_private_names, 1)
