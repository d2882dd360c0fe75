"""Runs a function in a forked child process, so that a crash of native code does not take this process along."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

import torch

T = TypeVar("T")


def in_child(work: Callable[[], T], refused: type[Exception], longest_s: float) -> T:
    """What `work` returns when a child process runs it; it has to be picklable. Its output is thrown away.

    Raises:
        refused: `work` raises that, crashes, or takes longer than `longest_s`.
    """
    if not hasattr(os, "fork"):
        raise refused("this platform has no fork, under which it could be tried")
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child runs one thread and never returns to the caller's code
        child = os.fork()
    if child == 0:
        _run(work, refused, sender)
    os.close(sender)
    written = _read(receiver, child, longest_s)
    os.waitpid(child, 0)
    if not written:
        raise refused(f"it crashed, or took longer than {longest_s:g} seconds, when it was tried on parts")
    result, refusal = pickle.loads(written)
    if refusal:
        raise refused(refusal)
    return cast(T, result)


def _run(work: Callable[[], object], refused: type[Exception], sender: int) -> NoReturn:
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        faulthandler.disable()
        torch.set_num_threads(1)
        try:
            result = work(), ""
        except refused as refusal:
            result = None, str(refusal)
        with os.fdopen(sender, "wb") as pipe:
            pipe.write(pickle.dumps(result))
    finally:
        os._exit(0)


def _read(receiver: int, child: int, longest_s: float) -> bytes:
    """All that the child writes; nothing where it has not finished in time, and then it is stopped."""
    written, deadline = b"", time.monotonic() + longest_s
    with os.fdopen(receiver, "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                return b""
            piece = pipe.read(65536)
            if not piece:
                return written
            written += piece
