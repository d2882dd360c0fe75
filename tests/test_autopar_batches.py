"""Which ranks share a batch, and the check that they were given the same one."""

from __future__ import annotations

import torch
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from autopar.modules.batches import BatchRanks


def _checked(rank: int, ranks: int) -> list[str]:
    """What is said of a batch of its own on each data-parallel rank, of one that rank 3 has by itself, of a value."""
    ranks_of = BatchRanks(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), (0,))
    assert (ranks_of.count, ranks_of.index, ranks_of.sharing, ranks_of.first) == (2, rank // 2, 2, rank % 2 == 0)
    mine = torch.arange(6.0).view(2, 3) + rank // 2
    said = []
    for batch, value in ((mine, 1.0), (mine.flip(0) if rank == 3 else mine, 1.0), (mine, 1.0 + rank // 2)):
        try:
            ranks_of.check([("ids", 0, batch), ("scale", None, torch.tensor(value))])
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_all_ranks_hear_of_a_batch_that_one_has_by_itself() -> None:
    found = run_ranks(_checked, 4)
    for alike, alone, value in found:
        assert alike == ""
        assert alone.startswith("ids: ranks along 'tp' were given different batches, but only dp splits the batch")
        assert value.startswith("scale has no dim that the batch is split in")
        assert "ranks along 'dp' were given different ones" in value
