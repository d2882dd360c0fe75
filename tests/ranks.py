"""Runs a function on N real ranks: one process each, a gloo process group between them, and a time limit.

    def check(rank: int, ranks: int, size: int) -> float: ...      # at the top level of a test file

    losses = run_ranks(check, 4, 128)                              # one result per rank, or RankError

Processes come from a fork server that has imported what tests need: four ranks that each import torch, autopar and a
model's code would spend twenty seconds of CPU time before their first line.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

PRELOAD = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._inductor.compile_fx",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "autopar.cli",
    "passes.lower.inductor",
    "autopar.trainer",
    "hypothesis",
    "pytest",
    "fork_server",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: its result, or its error as "Type: message" with the traceback, and how long it took."""

    result: Any
    error: str | None
    traceback: str
    seconds: float


class RankError(AssertionError):
    """Some rank raised or did not end in time."""


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 120, start: str = "forkserver"
) -> list[Any]:
    """Results of `function(rank, ranks, *args)`, one per rank.

    start: how processes are started; CUDA wants "spawn".

    Raises:
        RankError: with every failed rank's traceback.
    """
    outcomes = rank_outcomes(function, ranks, *args, timeout_s=timeout_s, grace_s=10, start=start)
    failed = [f"rank {rank}:\n{o.traceback or o.error}" for rank, o in enumerate(outcomes) if o.error is not None]
    if failed:
        raise RankError("\n".join(failed))
    return [outcome.result for outcome in outcomes]


def rank_outcomes(
    function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 120, grace_s: float | None = None,
    start: str = "forkserver",
) -> list[Outcome]:  # fmt: skip
    """What became of each rank of `function(rank, ranks, *args)`.

    grace_s: how long the others may go on after a rank failed; None: until `timeout_s`.
    """
    context: Any = _fork_server() if start == "forkserver" else multiprocessing.get_context(start)
    outcomes: dict[int, Outcome] = {}
    began = time.monotonic()
    deadline = began + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        processes, readers = [], {}
        for rank in range(ranks):
            reader, writer = context.Pipe(duplex=False)
            work = pickle.dumps((function, args))
            process = context.Process(target=_child, args=(rank, ranks, folder, work, writer, timeout_s), daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            readers[reader] = rank
        try:
            while readers and (left_s := deadline - time.monotonic()) > 0:
                for reader in multiprocessing.connection.wait(list(readers), timeout=left_s):
                    rank = readers.pop(reader)
                    outcomes[rank] = _received(reader, time.monotonic() - began)
                    if outcomes[rank].error is not None and grace_s is not None:
                        deadline = min(deadline, time.monotonic() + grace_s)
        finally:
            for process in processes:
                process.join(timeout=2 if not readers else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    waited_s = time.monotonic() - began
    late = Outcome(None, f"TimeoutError: still running after {waited_s:.0f} s", "", waited_s)
    return [outcomes.get(rank, late) for rank in range(ranks)]


def run_script(ranks: int, script: Path, *arguments: str, folder: Path, timeout_s: float = 200) -> str:
    """What a script prints whose ranks run in `folder` with what `torchrun` tells them: forks, which import nothing.

    Raises:
        RankError: a rank raised or ended with another code than 0.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    with tempfile.TemporaryDirectory() as printed:
        run_ranks(_as_script, ranks, store.port, str(script), arguments, str(folder), printed, timeout_s=timeout_s)
        return "".join((Path(printed) / str(rank)).read_text() for rank in range(ranks))


def _as_script(
    rank: int, ranks: int, port: int, script: str, arguments: tuple[str, ...], folder: str, printed: str
) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()  # a script makes its own
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    with open(Path(printed) / str(rank), "w") as out, contextlib.redirect_stdout(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{script} ended with code {end.code}") from end


def forked(function: Callable[..., Any], *args: Any, timeout_s: float = 200) -> Any:
    """Result of `function(*args)` in a process of its own."""
    reader, writer = _fork_server().Pipe(duplex=False)
    process = _fork_server().Process(target=_alone, args=(pickle.dumps((function, args)), writer), daemon=True)
    process.start()
    writer.close()
    try:
        if not reader.poll(timeout_s):
            raise RankError(f"still running after {timeout_s:.0f} s")
        outcome = _received(reader, 0.0)
        if outcome.error is not None:
            raise RankError(outcome.traceback or outcome.error)
        return outcome.result
    finally:
        process.join(timeout=2)
        process.kill()
        process.join()


def _alone(work: bytes, writer: Any) -> None:
    result, error, trace = None, None, ""
    try:
        function, args = pickle.loads(work)
        result = function(*args)
    except BaseException as raised:
        error, trace = f"{type(raised).__name__}: {raised}", traceback.format_exc()
    writer.send_bytes(pickle.dumps((result, error, trace)))
    writer.close()


def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # what it is told of the path holds for its processes alone
        multiprocessing.forkserver.ensure_running()
    return context


def _received(reader: Any, seconds: float) -> Outcome:
    try:
        result, error, trace = pickle.loads(reader.recv_bytes())
    except EOFError:
        return Outcome(None, "EOFError: the process ended without a word", "", seconds)
    return Outcome(result, error, trace, seconds)


def _child(rank: int, ranks: int, folder: str, work: bytes, writer: Any, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    result, error, trace = None, None, ""
    try:
        function, args = pickle.loads(work)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
        result = function(rank, ranks, *args)
    except BaseException as raised:  # a rank's failure is data here
        error, trace = f"{type(raised).__name__}: {raised}", traceback.format_exc()
    writer.send_bytes(pickle.dumps((result, error, trace)))
    writer.close()
    if error is None and dist.is_initialized():
        dist.destroy_process_group()
