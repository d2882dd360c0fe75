"""Agreement between real ranks: an error on one ends all, at once and by name."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, rank_outcomes, run_ranks
from torch.distributed.device_mesh import init_device_mesh

from autopar.groups import Groups
from autopar.together import RankFailedError, Together, together


def _agrees(rank: int, ranks: int) -> tuple[str, bool, bool, str]:
    ours = together()
    ours.agree()
    text = ours.from_first(lambda: f"plan of {rank}")
    again = together()
    return text, ours.same("alike"), ours.same(f"rank {rank}"), again.from_first(lambda: "second session")


def test_ranks_share_what_the_first_makes() -> None:
    assert run_ranks(_agrees, 3) == [("plan of 0", True, False, "second session")] * 3


def _block(ours: Together, rank: int, culprit: int) -> None:
    with ours.agreeing():
        if rank == culprit:
            raise KeyError("layers.3")
        if rank == 2:
            time.sleep(5)  # busy: the others do not wait for it


def _one_fails(rank: int, ranks: int, culprit: int) -> float:
    ours = together()
    start = time.monotonic()
    for attempt in range(2):
        other = RankFailedError, f"^rank {culprit} failed: KeyError: 'layers.3'$"
        kind, text = (KeyError, "layers.3") if rank == culprit else other
        with pytest.raises(kind, match=text):
            _block(ours, rank, culprit)
        if attempt == 0:
            waited_s = time.monotonic() - start
    ours.agree()
    return waited_s


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_on_one_rank_is_every_ranks(culprit: int) -> None:
    waited_s = run_ranks(_one_fails, 3, culprit)
    assert waited_s[0] < 3
    assert waited_s[1] < 3


def _first_fails_to_make(rank: int, ranks: int) -> None:
    def make() -> str:
        raise ValueError("no plan fits")

    together().from_first(make)


def test_the_first_ranks_error_ends_all_within_seconds() -> None:
    outcomes = rank_outcomes(_first_fails_to_make, 3, timeout_s=60)
    assert outcomes[0].error == "ValueError: no plan fits"
    assert [o.error for o in outcomes[1:]] == ["RankFailedError: rank 0 failed: ValueError: no plan fits"] * 2
    assert max(o.seconds for o in outcomes) < 30


def _silent(rank: int, ranks: int) -> None:
    if rank != 1:
        together(silence_s=2).agree()
    else:
        time.sleep(4)


def test_a_silent_rank_is_named() -> None:
    outcomes = rank_outcomes(_silent, 3, timeout_s=60)
    assert [o.error for o in outcomes] == ["TimeoutError: no word from ranks [1] for 2 s", None,
                                           "TimeoutError: no word from ranks [1] for 2 s"]  # fmt: skip


def test_one_rank_agrees_with_itself() -> None:
    alone = together()
    assert alone.from_first(lambda: "x") == "x"
    assert alone.same("y")
    with pytest.raises(KeyError), alone.agreeing():
        raise KeyError("mine")
    assert isinstance(alone, Together)


def _groups(rank: int, ranks: int) -> list[list[int]]:
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "tp", "ep"))
    groups = Groups(mesh, ("dp", "tp", "ep"))
    names = groups.names_for(("tp", "dp", "dp,tp", "dp,ep", "tp"))
    assert groups.names_for(("dp,tp",))["dp,tp"] == names["dp,tp"]
    found = []
    for axes in ("tp", "dp", "dp,tp", "dp,ep"):
        gather = torch.ops._c10d_functional.all_gather_into_tensor.default
        size = {"tp": 2, "dp": 2, "dp,tp": 4, "dp,ep": 2}[axes]
        got = torch.ops._c10d_functional.wait_tensor.default(gather(torch.tensor([rank]), size, names[axes]))
        found.append(got.tolist())
    return found


def test_groups_join_the_ranks_of_their_axes() -> None:
    found = run_ranks(_groups, 4)
    assert found[0] == [[0, 1], [0, 2], [0, 1, 2, 3], [0, 2]]
    assert found[3] == [[2, 3], [1, 3], [0, 1, 2, 3], [1, 3]]


def _raises_on_one(rank: int, ranks: int) -> int:
    if rank == 1:
        raise ValueError("by design")
    return rank


def test_ranks_helper_reports_each_failed_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1:\n(.|\n)*by design"):
        run_ranks(_raises_on_one, 2)
    assert not dist.is_initialized()
