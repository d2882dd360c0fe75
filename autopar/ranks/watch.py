"""What goes wrong in a step on one rank, told to the others, who wait for it in a collective.

A rank whose forward or backward raises writes why to the process group's store. The others are in a collective that it
will not join, and end in one of two ways. Its process ends and their connection breaks: the error of that is replaced
by the one in the store, which names the rank that failed. Or its process lives on: then their own watch, a thread that
looks at the store once a step takes longer than `PATIENCE_S`, ends their process, as NCCL's watchdog does, for nothing
wakes a thread that waits in gloo.

    failures    how many there are
    failure/i   one of them: which half of which step, the rank, why
    making      the half that a rank makes a program for; one that runs a known program in that half has other inputs
    doing       what a rank that waits runs in this half, and ran in the last ones; others run something else by mistake

Where nothing failed and a rank does not come, as one that has fewer batches, one of those who wait says so.

A healthy step costs no message, unless it takes longer than `PATIENCE_S`. Halves (a forward, a backward) have numbers,
equal on all ranks, as all ranks take the same steps. A failure that this rank had too in that half (a mistake that all
ranks made) is none of its business.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from passes.errors import AutoparError

PATIENCE_S = 5.0
GRACE_S = 20.0
"""After a failure is known, for the connection to break by itself, before this process is ended."""
_LET_GO_S = 0.1
"""Before this process ends, for gloo's threads to let go of their last collective. One of a backward holds an object of
Python's (torch 2.13), and a thread that frees it once there is no interpreter aborts the process."""
ENDED = "autopar/ended/{}"
"""Key of a rank whose process has come to its end; the exception that ended it, or nothing."""
_PREFIX = "autopar/watch"
_REMEMBERED = 8
"""Halves that a rank tells of; a rank that took another call is stuck a few halves later at most."""
_OF_A_COLLECTIVE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset")


class RankFailedError(AutoparError, RuntimeError):
    """Another rank failed; the message names it and holds its own message."""


@dataclass(frozen=True)
class Failure:
    """What `rank` says of half number `half`."""

    half: int
    rank: int
    text: str


class Watch:
    """The halves (forward or backward) of steps that this rank runs, and what the other ranks say of theirs.

    `end`: ends this process when it waits for a rank that will not come. `say`: tells the user what it waits for.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: int,
        *,
        patience_s: float = PATIENCE_S,
        grace_s: float = GRACE_S,
        end: Callable[[str], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self.patience_s = patience_s
        self.grace_s = grace_s
        self.end = end or _end
        self.say = say or say_on_stderr
        self.half = 0
        self.since_s: float | None = None
        self.making = False
        self.recent: tuple[tuple[int, Callable[[], str]], ...] = ()
        self.failed: set[int] = set()
        self.told = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context around one half of a step.

        Raises:
            RankFailedError: it failed because another rank did.
        """
        if self.ranks == 1 or self.since_s is not None:
            yield
            return
        self._start()
        self.half, self.making = self.half + 1, False
        self.since_s = time.monotonic()
        try:
            yield
        except RankFailedError:  # all ranks agreed that one failed
            self.failed.add(self.half)
            raise
        except BaseException as error:
            if _of_a_collective(error):
                other = self.another()
                self.failed.add(self.half)
                if other is not None:
                    raise RankFailedError(other.text) from error
                error.add_note("Another rank's process ended without a word, or lost its connection.")
            else:  # this rank's own, also where others failed alike
                self.failed.add(self.half)
                self.tell(self._of(error))
            raise
        finally:
            self.since_s = None

    def doing(self, what: Callable[[], str]) -> None:
        """Say what this rank runs in this half, in words that are equal on all ranks that run the same."""
        if self.ranks > 1:
            self.recent = (*self.recent[1 - _REMEMBERED :], (self.half, what))

    @contextlib.contextmanager
    def making_program(self) -> Iterator[None]:
        """Context in which this rank, with all others, makes the program for a call of a new kind."""
        if self.ranks == 1:
            yield
            return
        key = f"{_PREFIX}/making/{self.rank}"
        self.making = True
        self.store.set(key, str(self.half))
        try:
            yield
        finally:
            self.store.set(key, "")

    def tell(self, text: str) -> None:
        """Write to the store why this rank fails."""
        with contextlib.suppress(RuntimeError):  # a store that is gone: its host's process has ended
            failure = Failure(self.half, self.rank, text)
            self.store.set(f"{_PREFIX}/failure/{self.store.add(f'{_PREFIX}/claims', 1)}", json.dumps(asdict(failure)))
            self.store.add(f"{_PREFIX}/failures", 1)
            self.told = True

    def another(self) -> Failure | None:
        """The first failure of another rank, in a half that this rank did not fail in."""
        with contextlib.suppress(RuntimeError):
            for number in range(1, self.store.add(f"{_PREFIX}/failures", 0) + 1):
                key = f"{_PREFIX}/failure/{number}"
                if not self.store.check([key]):
                    continue
                found = Failure(**json.loads(self.store.get(key)))
                if found.half not in self.failed and (found.rank != self.rank or found.half == self.half):
                    return found
        return None

    def check(self) -> None:
        """Raise if another rank is known to have failed.

        Raises:
            RankFailedError: another rank failed.
        """
        if self.ranks > 1 and self.since_s is not None and (other := self.another()) is not None:
            raise RankFailedError(other.text)

    # -- its thread ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="autopar-watch", daemon=True)
            self._thread.start()
            atexit.register(self.leave)

    def leave(self) -> None:
        """Stop watching; an exception that ends this process is told to the others first."""
        error = getattr(sys, "last_value", None)
        own = error is not None and not isinstance(error, RankFailedError) and not _of_a_collective(error)
        if own and not self.told:
            self.tell(self._of(error))
        tell_end(self.store, self.rank)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
            time.sleep(_LET_GO_S)

    def _of(self, error: object) -> str:
        return f"rank {self.rank} failed: {type(error).__name__}: {error}"

    def _look(self) -> None:
        known: tuple[int, float] | None = None
        said = 0
        while not self._stopped.wait(min(1.0, self.patience_s)):
            half, since_s = self.half, self.since_s
            if since_s is None or time.monotonic() - since_s < self.patience_s:
                continue
            self._compare_kinds()
            other = self.another()
            if other is None and not self.making:
                self._compare_calls()
                other = self.another()
            if other is None or self.half != half or self.since_s is None:
                known = None
                waited_s = time.monotonic() - since_s
                if said != half == self.half and not self.making and waited_s > self.patience_s + self.grace_s:
                    said = half
                    self._say_who_is_missing(half, waited_s)
            elif known is None or known[0] != half:
                known = (half, time.monotonic())
            elif time.monotonic() - known[1] > self.grace_s:
                self.end(other.text)
                return

    def _compare_kinds(self) -> None:
        """Tell of a rank that makes a program for this half, where this rank runs one that it has."""
        if self.making:
            return
        for rank in range(self.ranks):
            key = f"{_PREFIX}/making/{rank}"
            with contextlib.suppress(RuntimeError):
                if rank != self.rank and self.store.check([key]) and self.store.get(key).decode() == str(self.half):
                    self.making = True  # said once
                    self.tell(
                        f"rank {rank} was given inputs of another shape, dtype or mode than rank {self.rank} in the "
                        "same step, or another number; give all ranks equal shapes, dtypes and numbers"
                    )
                    return

    def _compare_calls(self) -> None:
        """Tell of a rank that waited, too, and ran something else in a half that is past or under way."""
        mine = {str(half): what() for half, what in self.recent}
        with contextlib.suppress(RuntimeError):
            self.store.set(f"{_PREFIX}/doing/{self.rank}", json.dumps(mine))
            for rank, theirs in self._doings():
                if half := next((each for each in mine if theirs.get(each, mine[each]) != mine[each]), None):
                    self.tell(
                        f"rank {rank} runs {theirs[half]} where rank {self.rank} runs {mine[half]}; all ranks have to "
                        "make the same calls in the same order"
                    )
                    return

    def _doings(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Other ranks that wait or did, with what they run by half."""
        for rank in range(self.ranks):
            key = f"{_PREFIX}/doing/{rank}"
            if rank != self.rank and self.store.check([key]):
                yield rank, json.loads(self.store.get(key))

    def _say_who_is_missing(self, half: int, waited_s: float) -> None:
        """Of the ranks that wait, the first says which have not come to this half."""
        there = {self.rank}
        with contextlib.suppress(RuntimeError):
            there |= {rank for rank, theirs in self._doings() if str(half) in theirs}
        missing = [str(rank) for rank in range(self.ranks) if rank not in there]
        if missing and self.rank == min(there):
            what = next((words() for at, words in self.recent if at == half), "a step")
            shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            who = f"rank {shown} has" if len(missing) == 1 else f"ranks {shown} have"
            self.say(
                f"rank {self.rank} has waited {waited_s:.0f} s in {what}, to which {who} not come: all ranks have to "
                "make the same calls, with as many batches each"
            )


def _of_a_collective(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_A_COLLECTIVE)


def tell_end(store: Any, rank: int) -> None:
    """Write to the store that this process comes to its end, and why if it raised."""
    error = getattr(sys, "last_value", None)
    with contextlib.suppress(RuntimeError):  # a store that is gone
        store.set(ENDED.format(rank), "" if error is None else f"{type(error).__name__}: {error}")


def say_on_stderr(text: str) -> None:
    """Tell the user, beside what raises."""
    print(f"autopar: {text}", file=sys.stderr, flush=True)


def _end(text: str) -> None:
    """The process ends here: its main thread waits in a collective that will never finish."""
    say_on_stderr(f"{text}; this rank waits for it in vain and ends")
    os._exit(1)
