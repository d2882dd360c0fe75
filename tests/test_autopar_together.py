"""Agreement between real ranks: an error on one ends all, at once and by name."""

from __future__ import annotations

import atexit
import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from local_steps import Net
from ranks import RankError, rank_outcomes, run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import autopar
from autopar.modules.groups import Groups
from autopar.modules.module import ParallelModule
from autopar.options import Options
from autopar.ranks.together import RankFailedError, Together, together, watch
from autopar.ranks.watch import Watch


def _agrees(rank: int, ranks: int) -> tuple[str, bool, bool, str]:
    if rank == 0:
        Together(None, 0, 1).agree()  # as a plan for a mesh that is only named, which concerns nobody else
    ours = together()
    ours.agree()
    assert watch() is watch()
    text = ours.from_first(lambda: f"plan of {rank}")
    again = together()
    return text, ours.same("alike"), ours.same(f"rank {rank}"), again.from_first(lambda: "second session")


def test_ranks_share_what_the_first_makes() -> None:
    assert run_ranks(_agrees, 3) == [("plan of 0", True, False, "second session")] * 3


def _block(ours: Together, rank: int, culprit: int, busy_s: float) -> None:
    with ours.agreeing():
        if rank == culprit:
            raise KeyError("layers.3")
        if rank == 2:
            time.sleep(busy_s)  # the others do not wait for it


def _one_fails(rank: int, ranks: int, culprit: int) -> float:
    ours = together()
    start = time.monotonic()
    for attempt in range(2):
        other = RankFailedError, f"^rank {culprit} failed: KeyError: 'layers.3'$"
        kind, text = (KeyError, "layers.3") if rank == culprit else other
        with pytest.raises(kind, match=text):
            _block(ours, rank, culprit, busy_s=0 if attempt else 5)
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


def _after_a_step(ranks: int) -> tuple[ParallelModule, torch.Tensor]:
    """A model over all ranks that has made its first step, and what it was fed."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (2, 6))
    model = autopar.parallelize(
        Net(rows=12, width=8), mesh, {"ids": ids, "labels": ids}, strategy="fsdp", options=Options(compile=False)
    )
    model(ids=ids, labels=ids).loss.backward()
    return model, ids


def _ends_early(rank: int, ranks: int) -> None:
    """Rank 1 makes one step and ends; the others make another call, which has to be captured."""
    model, ids = _after_a_step(ranks)
    if rank == 1:
        atexit._run_exitfuncs()  # what the process does as it ends, which a fork of a server leaves out
        return
    with torch.no_grad():
        model.eval()(ids=ids, labels=ids)


def test_a_rank_that_has_ended_is_not_waited_for() -> None:
    found = rank_outcomes(_ends_early, 3, timeout_s=60)
    assert found[1].error is None
    for outcome in (found[0], found[2]):
        assert str(outcome.error).startswith("RankFailedError: ranks [1] have ended"), found


def _never_comes(rank: int, ranks: int) -> None:
    """Rank 1 raises before its first call."""
    if rank == 1:
        sys.last_value = ValueError("no such data set")
        atexit._run_exitfuncs()
        return
    together().agree()


def test_a_rank_that_ends_before_its_first_call_is_not_waited_for() -> None:
    found = rank_outcomes(_never_comes, 3, timeout_s=60)
    for outcome in (found[0], found[2]):
        assert str(outcome.error).startswith("RankFailedError: ranks [1] have ended"), found
        assert str(outcome.error).endswith("; rank 1 failed: ValueError: no such data set"), found
    assert max(outcome.seconds for outcome in found) < 30


def test_a_rank_that_waits_says_for_whom(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.ranks.together._ROUND_S", 0.1)
    monkeypatch.setattr("autopar.ranks.together._SAID_S", 0.3)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second, third = (Together(store, rank, 3) for rank in range(3))
    first.session = second.session = third.session
    waiting = [threading.Thread(target=one.agree) for one in (second, third)]
    for thread in waiting:
        thread.start()
    time.sleep(1.0)
    first.agree()
    for thread in waiting:
        thread.join()
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("autopar: rank 1 has waited ")
    assert said.endswith("to which rank 0 has not come")


def _silent(rank: int, ranks: int) -> None:
    if rank != 1:
        together(silence_s=2).agree()
    else:
        time.sleep(4)


def test_a_silent_rank_is_named() -> None:
    outcomes = rank_outcomes(_silent, 3, timeout_s=60)
    assert [o.error for o in outcomes] == ["TimeoutError: no word from ranks [1] for 2 s", None,
                                           "TimeoutError: no word from ranks [1] for 2 s"]  # fmt: skip


def test_a_long_wait_for_another_rank_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """torch's TCPStore prints two warnings for each of its waits that times out."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (Together(store, rank, 2) for rank in range(2))
    second.session = first.session

    def late() -> None:
        time.sleep(5.5)
        first.agree()

    thread = threading.Thread(target=late)
    thread.start()
    second.agree()
    thread.join()
    assert capfd.readouterr().err == ""


def test_one_rank_agrees_with_itself() -> None:
    alone = together()
    assert alone.from_first(lambda: "x") == "x"
    assert alone.same("y")
    with pytest.raises(KeyError), alone.agreeing():
        raise KeyError("mine")
    assert isinstance(alone, Together)
    with watch().watching(), watch().making_program():
        watch().doing(lambda: "a step")


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


def test_axes_are_not_joined_where_ranks_do_not_rise_along_them() -> None:
    """torch sorts a group's ranks, so parts would be gathered in another order than the mesh has them in."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp"))
        groups = Groups(mesh, ("dp", "tp"))
        assert groups.names_for(("tp", "dp")) == {axis: mesh.get_group(axis).group_name for axis in ("tp", "dp")}
        with pytest.raises(ValueError, match=r"join ranks \[0, 2, 1, 3\]: their order must rise"):
            groups.names_for(("dp,tp",))
    finally:
        dist.destroy_process_group()


def _raises_on_one(rank: int, ranks: int) -> int:
    if rank == 1:
        raise ValueError("by design")
    return rank


def test_ranks_helper_reports_each_failed_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1:\n(.|\n)*by design"):
        run_ranks(_raises_on_one, 2)
    assert not dist.is_initialized()


# -- steps -------------------------------------------------------------------------------------------------------------


def _steps(rank: int, ranks: int, what: str, folder: str) -> str:
    """Trains; in the second step rank 1 does something that the others do not."""
    model, ids = _after_a_step(ranks)
    start = time.monotonic()
    ours = watch()
    ours.patience_s, ours.grace_s, end = 0.5, 60.0 if what in ("device", "backward", "shape") else 1.0, ours.end
    ours.end = lambda text: (Path(folder, str(rank)).write_text(text), end(text))
    if rank == 1 and what == "backward":
        ((key, (made,)),) = model._autopar.executables.items()
        broken = replace(made, lowered=replace(made.lowered, call_backward=_out_of_memory))
        model._autopar.executables[key] = [broken]
    if rank == 1 and what in ("device", "lingers"):
        ids = ids.to("meta")
    if rank == 1 and what == "shape":
        ids = ids[:, :4]
    if rank == 1 and what == "unsynced":
        model.set_requires_gradient_sync(False)
    try:
        model(ids=ids, labels=ids).loss.backward()
    except BaseException as error:
        if rank == 1 and what == "lingers":
            time.sleep(12)
        return f"{type(error).__name__}: {error} after {time.monotonic() - start:.0f} s"
    return "no error"


def _out_of_memory(values: object) -> None:
    raise MemoryError("no 2 GiB left")


OTHER = "rank 1 was given inputs of another shape, dtype or mode than rank"


@pytest.mark.parametrize(("what", "own", "others"), [
    ("device", "ValueError: ids is on meta", "RankFailedError: rank 1 failed: ValueError: ids is on meta"),
    ("backward", "MemoryError: no 2 GiB left", "RankFailedError: rank 1 failed: MemoryError: no 2 GiB left"),
    ("shape", f"RankFailedError: {OTHER}", f"RankFailedError: {OTHER}"),
])  # fmt: skip
def test_what_goes_wrong_in_one_ranks_step_ends_all_and_names_it(
    what: str, own: str, others: str, tmp_path: Path
) -> None:
    found = rank_outcomes(_steps, 3, what, str(tmp_path), timeout_s=110)
    assert all(outcome.error is None for outcome in found), found
    assert str(found[1].result).startswith(own)
    for outcome in (found[0], found[2]):
        assert str(outcome.result).startswith(others), found
        assert int(str(outcome.result).split()[-2]) < 60


def test_ranks_that_wait_for_one_that_lives_on_are_ended(tmp_path: Path) -> None:
    """Nothing wakes a thread that waits in gloo: the process ends, and says why."""
    found = rank_outcomes(_steps, 3, "lingers", str(tmp_path), timeout_s=110)
    assert str(found[1].result).startswith("ValueError: ids is on meta")
    assert [found[rank].error for rank in (0, 2)] == ["EOFError: the process ended without a word"] * 2
    assert found[0].seconds < found[1].seconds
    for rank in (0, 2):
        assert (tmp_path / str(rank)).read_text().startswith("rank 1 failed: ValueError: ids is on meta")


def test_ranks_that_make_another_call_than_others_are_ended_and_named(tmp_path: Path) -> None:
    """All know both calls, so each runs its own, and they wait for one another in collectives that do not match."""
    found = rank_outcomes(_steps, 3, "unsynced", str(tmp_path), timeout_s=60)
    texts = [path.read_text() for path in tmp_path.iterdir()]
    texts += [str(outcome.result) for outcome in found if outcome.error is None and outcome.result != "no error"]
    assert len(texts) >= 2, found
    held, usual = "a backward that exchanges no gradients", "a backward that exchanges gradients"
    either = rf"rank 1 runs {held} where rank [02] runs {usual}|rank [02] runs {usual} where rank 1 runs {held}"
    assert all(re.search(either, text) for text in texts), texts


class _Store(dict[str, bytes]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def add(self, key: str, amount: int) -> int:
        self[key] = str(int(super().get(key, b"0")) + amount).encode()
        return int(self[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def _wait_for(happened: Callable[[], bool]) -> None:
    """Until it has, ten seconds at most."""
    end_s = time.monotonic() + 10.0
    while not happened() and time.monotonic() < end_s:
        time.sleep(0.02)


def test_a_mistake_that_all_ranks_made_does_not_end_a_later_step() -> None:
    store = _Store()
    watches = [Watch(store, rank, 2, end=lambda text: None) for rank in range(2)]
    for each in watches:
        with pytest.raises((ValueError, RankFailedError), match="wrong device"), each.watching():
            raise ValueError("wrong device")
    for each in watches:
        with each.watching():
            assert each.another() is None


@pytest.mark.parametrize("second", ["evaluates", "trains"])
def test_a_rank_that_is_stuck_a_half_later_is_told_of_its_other_call(second: str) -> None:
    """Rank 1's evaluation met what rank 0's forward sent, and now both wait: in a training forward, in a backward."""
    store, calls = _Store(), {0: ["trains", "goes back"], 1: [second, "goes back" if second == "trains" else "trains"]}
    watches = [Watch(store, rank, 2, patience_s=0.05, end=lambda text: None) for rank in range(2)]
    for each in watches:
        for call in calls[each.rank][:1]:
            with each.watching():
                each.doing(lambda call=call: call)
    with watches[0].watching(), watches[1].watching():
        for each in watches:
            each.doing(lambda each=each: calls[each.rank][1])
        if second == "trains":
            time.sleep(0.5)
        else:
            _wait_for(lambda: all(each.another() for each in watches))
        told = [failure.text for each in watches if (failure := each.another())]
    if second == "trains":
        assert not told
    else:
        assert all("rank 1 runs evaluates where rank 0 runs trains" in text or
                   "rank 0 runs trains where rank 1 runs evaluates" in text for text in told)  # fmt: skip
        assert len(told) == 2


def test_a_rank_that_waits_for_a_failed_one_ends_after_a_grace() -> None:
    store, ended = _Store(), list[str]()
    waiting, failing = (Watch(store, r, 2, patience_s=0.05, grace_s=1.0, end=ended.append) for r in range(2))
    start = time.monotonic()
    with waiting.watching():
        with pytest.raises(ValueError, match="no such file"), failing.watching():
            raise ValueError("no such file")
        _wait_for(lambda: bool(ended))
    assert time.monotonic() - start > 1.0
    assert ended == ["rank 1 failed: ValueError: no such file"]


def test_a_rank_that_runs_what_it_has_is_told_of_one_that_makes_a_program() -> None:
    store = _Store()
    watches = [Watch(store, rank, 2, patience_s=0.05, end=lambda text: None) for rank in range(2)]
    with watches[0].watching(), watches[1].watching():
        with watches[0].making_program(), watches[1].making_program():
            pass
        time.sleep(0.3)
        assert not any(each.another() for each in watches)  # both have made it
    with watches[0].watching(), watches[1].watching(), watches[1].making_program():
        _wait_for(lambda: all(each.another() for each in watches))
        told = [failure.text for each in watches if (failure := each.another())]
    assert len(told) == 2
    assert all(text.startswith(f"{OTHER} 0 in the same step") for text in told)


def test_a_lost_connection_that_nobody_explains_is_raised_as_it_is() -> None:
    ours = Watch(_Store(), 0, 2, end=lambda text: None)
    with pytest.raises(RuntimeError, match="reset") as raised, ours.watching():
        raise RuntimeError("gloo: Connection reset")
    assert not isinstance(raised.value, RankFailedError)
    assert "ended without a word" in raised.value.__notes__[0]


def test_who_waits_says_once_who_has_not_come() -> None:
    """Rank 1 is out of batches; rank 2 comes, and leaves it to rank 0 to tell."""
    store, said = _Store(), {rank: list[str]() for rank in range(3)}
    watches = [
        Watch(store, rank, 3, patience_s=0.05, grace_s=1.0, end=lambda text: None, say=said[rank].append)
        for rank in range(3)
    ]
    with watches[0].watching(), watches[2].watching():
        for each in (watches[0], watches[2]):
            each.doing(lambda: "a training forward")
        time.sleep(2.0)
    assert not said[1]
    assert not said[2]
    (text,) = said[0]
    assert re.match(r"rank 0 has waited \d+ s in a training forward, to which rank 1 has not come", text)
    with watches[1].watching():
        pass
    with contextlib.ExitStack() as all_come:
        for each in watches:
            all_come.enter_context(each.watching())
            each.doing(lambda: "a backward")
        time.sleep(2.0)
    assert len(said[0]) == 1
    assert not said[1]


def test_an_error_outside_a_step_is_told_as_the_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own code raised between two steps of rank 1; rank 0's connection breaks in the next."""
    store = _Store()
    watches = [Watch(store, rank, 2, end=lambda text: None) for rank in range(2)]
    for each in watches:
        with each.watching():
            pass
    monkeypatch.setattr(sys, "last_value", KeyError("no such file"), raising=False)
    watches[1].leave()
    assert store.get("autopar/ended/1") == b"KeyError: 'no such file'"
    with pytest.raises(RankFailedError, match="rank 1 failed: KeyError: 'no such file'"), watches[0].watching():
        raise RuntimeError("gloo: Connection closed by peer")


def test_errors_that_users_meet_are_of_one_kind() -> None:
    errors = [getattr(autopar, name) for name in autopar.__all__ if name.endswith("Error")]
    assert RankFailedError in errors
    assert all(issubclass(each, autopar.AutoparError) for each in errors)
    assert issubclass(RankFailedError, RuntimeError)  # as what is raised in its place, a collective's
