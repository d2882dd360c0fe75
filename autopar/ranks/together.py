"""Agreement between ranks: what one finds wrong, all raise, and at once; what one makes, all get.

Each exchange is a numbered set of keys in the process group's store. A rank that fails writes its error where the
others wait, so they wake without waiting for anyone who is still busy.

    n/value       what rank 0 hands out
    n/here/rank   that it came without an error; n/arrived: how many did
    n/end         "" once all did, else a rank that failed: the key everyone waits on
    n/text/rank   that rank's error
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from autopar.ranks.watch import ENDED, RankFailedError, Watch, say_on_stderr, tell_end

SILENCE_S = 1800.0
_ROUND_S = 5.0
"""How often a rank that waits looks whether others have failed or ended."""
_SAID_S = 25.0
"""After which a rank that waits for others to come says which have not."""
_PAUSE_S = 0.25
"""At most, between two looks for what it waits for."""
# Every rank makes its sessions in the same order, so equal numbers meet. One rank alone (a plan for a mesh that is only
# named, made on rank 0 to be printed) takes no number.
SESSIONS = itertools.count()


class Together:
    """The ranks of a job, as seen by one of them.

    silence_s: how long to wait for a rank that says nothing; a rank that fails is heard at once.
    check: raises what is known to have gone wrong outside; called now and then while waiting.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, silence_s: float = SILENCE_S, check: Callable[[], None] = lambda: None
    ) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self.silence_s = silence_s
        self.check = check
        self.round = 0
        self.session = next(SESSIONS) if ranks > 1 else None

    def agree(self, error: BaseException | None = None) -> None:
        """Return when every rank has called this without an error.

        Raises:
            RankFailedError: another rank failed. A rank's own `error` is raised as it is.
        """
        self.round += 1
        if self.ranks == 1:
            if error is not None:
                raise error
            return
        prefix = f"autopar/{self.session}/{self.round}"
        if error is not None:
            self.store.set(f"{prefix}/text/{self.rank}", f"{type(error).__name__}: {error}")
            self.store.set(f"{prefix}/end", str(self.rank))
            raise error
        self.store.set(f"{prefix}/here/{self.rank}", "1")
        if self.store.add(f"{prefix}/arrived", 1) == self.ranks:
            self.store.set(f"{prefix}/end", "")
        failed = self._read(f"{prefix}/end", prefix)
        if failed:
            text = self._read(f"{prefix}/text/{failed}", prefix)
            raise RankFailedError(f"rank {failed} failed: {text}")

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Context: the block ends on every rank, or raises on every rank."""
        try:
            yield
        except BaseException as error:
            self.agree(error)
            raise
        self.agree()

    def from_first(self, make: Callable[[], str]) -> str:
        """Rank 0's `make()`, on every rank; where it raises there, every rank raises."""
        key = f"autopar/{self.session}/{self.round + 1}/value"
        value = ""
        with self.agreeing():
            if self.rank == 0:
                value = make()
                if self.ranks > 1:
                    self.store.set(key, value)
        return value if self.rank == 0 else self.store.get(key).decode()

    def same(self, value: str) -> bool:
        """Whether `value` is the same on every rank."""
        first = self.from_first(lambda: value)
        key = f"autopar/{self.session}/{self.round}/different"
        if first != value:
            self.store.add(key, 1)
        self.agree()
        return self.ranks == 1 or self.store.add(key, 0) == 0

    def _read(self, key: str, prefix: str) -> str:
        """What stands there, once it does. It is looked for: of each wait that times out torch warns on stderr."""
        start, next_s, said = time.monotonic(), 0.0, False
        while not self.store.check([key]):
            waited_s = time.monotonic() - start
            if waited_s >= next_s:
                self.check()
                if next_s:
                    silent = self._silent(prefix)
                    if waited_s >= _SAID_S and not said and self.round == 1:
                        said = True
                        self._say_who_is_missing(silent, waited_s)
                next_s += _ROUND_S
            if waited_s > self.silence_s:
                raise TimeoutError(f"no word from ranks {self._silent(prefix)} for {self.silence_s:.0f} s")
            time.sleep(min(_PAUSE_S, 0.001 + waited_s / 20))
        return str(self.store.get(key).decode())

    def _silent(self, prefix: str) -> list[int]:
        """Ranks that have not come.

        Raises:
            RankFailedError: one of them has ended.
        """
        silent = [rank for rank in range(self.ranks) if not self.store.check([f"{prefix}/here/{rank}"])]
        if ended := [rank for rank in silent if self.store.check([ENDED.format(rank)])]:
            texts = {rank: self.store.get(ENDED.format(rank)).decode() for rank in ended}
            raise RankFailedError(
                f"ranks {ended} have ended while rank {self.rank} waits for them to capture or plan a call with it; "
                "all ranks have to make the same calls (an evaluation, too)"
                + "".join(f"; rank {rank} failed: {text}" for rank, text in texts.items() if text)
            )
        return silent

    def _say_who_is_missing(self, silent: Sequence[int], waited_s: float) -> None:
        """Of the ranks that have come where all begin, the first says which have not."""
        if silent and self.rank == min(rank for rank in range(self.ranks) if rank not in silent):
            shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
            who = f"rank {shown} has" if len(silent) == 1 else f"ranks {shown} have"
            say_on_stderr(
                f"rank {self.rank} has waited {waited_s:.0f} s in a call that all ranks have to make (parallelize, a "
                f"step of a new kind), to which {who} not come"
            )


def together(silence_s: float = SILENCE_S, check: Callable[[], None] = lambda: None) -> Together:
    """The ranks of the default process group; one lone rank where there is none, or where it is a fake one."""
    if _is_alone():
        return Together(None, 0, 1, silence_s)
    return Together(_get_default_store(), dist.get_rank(), dist.get_world_size(), silence_s, check)


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_backend() == "fake" or dist.get_world_size() == 1


def _tell_end() -> None:
    """As this process ends: others may wait for it, also where it never came to a call with them."""
    if not _is_alone():
        tell_end(_get_default_store(), dist.get_rank())


atexit.register(_tell_end)

_WATCHES: dict[int, tuple[Any, Watch]] = {}


def watch() -> Watch:
    """The watch over the steps of this process; one for each default process group there was."""
    if _is_alone():
        return Watch(None, 0, 1)
    store = _get_default_store()
    known = _WATCHES.get(id(store))
    if known is None or known[0] is not store:
        _WATCHES.clear()
        _WATCHES[id(store)] = known = store, Watch(store, dist.get_rank(), dist.get_world_size())
    return known[1]
