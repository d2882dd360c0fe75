"""What is going on, while it goes on: a bar on a terminal, a line per stage elsewhere, and Python's logging.

Loggers are named after modules, so `logging` and torch's own switch work: `TORCH_LOGS="+autopar"` shows every stage.
Under `TORCH_TRACE` the plan and the local graph are artefacts of the structured trace, where tlparse finds them. Only
rank 0 says anything.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from torch._logging._internal import trace_structured
from tqdm import tqdm

log = logging.getLogger(__name__)
_PART = re.compile(r"(\w+): ")
_SILENCE_S = 10.0
"""After so many seconds without a line a part of a stage is told again."""
_STILL_S = 30.0
"""After so many it is said that a stage goes on."""


class Stages:
    """Says which stage begins, when called with its name; a context that can be entered again.

    A stage of many parts (`playing: 1 x 8 x 4`) is told part by part by the bar; among lines it is told once, and again
    where nothing was told for a while. A stage that takes long is told again with the time it has taken; the bar shows
    the time all along.

    shown: whether to print; logging happens anyway. speaks: whether this rank says anything at all. prefix: of a line.
    """

    def __init__(self, *, shown: bool = True, speaks: bool = True, prefix: str = "") -> None:
        self._shown = shown and speaks and sys.stderr is not None  # None where a process has it closed
        self._speaks = speaks
        self._prefix = prefix
        self._start_s = time.monotonic()
        self._told_s = self._start_s
        self._known: set[str] = set()
        self._bar: tqdm | None = None
        self._stage, self._since_s = "", self._start_s
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Stages:
        self._start_s = self._told_s = time.monotonic()
        self._known.clear()
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(bar_format=self._prefix + "{desc} [{elapsed}]", leave=False, file=sys.stderr)
        if self._shown:
            self._ended.clear()
            self._watch = threading.Thread(target=self._tell_it_goes_on, name="autopar-progress", daemon=True)
            self._watch.start()
        return self

    def __call__(self, stage: str) -> None:
        if not self._speaks:
            return
        log.info(stage)
        self._stage, self._since_s = stage, time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(stage)
            self._bar.refresh()
        elif self._shown and self._is_news(stage):
            self._print(stage)

    def _print(self, text: str) -> None:
        self._told_s = time.monotonic()
        print(f"{self._prefix}[{self._told_s - self._start_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    def _tell_it_goes_on(self) -> None:
        """Run beside the stages until they end."""
        while not self._ended.wait(1.0):
            now_s = time.monotonic()
            if self._bar is not None:
                self._bar.refresh()
            elif self._stage and now_s - self._told_s > _STILL_S:
                self._print(f"still {self._stage}, {now_s - self._since_s:.0f} s so far")

    def _is_news(self, stage: str) -> bool:
        part = _PART.match(stage)
        if part is None:
            return True
        known = part[1] in self._known
        self._known.add(part[1])
        return not known or time.monotonic() - self._told_s > _SILENCE_S

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def artefact(self, name: str, text: Callable[[], str], encoding: str = "string") -> None:
        """Put a text into torch's structured trace, where one is written."""
        if self._speaks:
            trace_structured(
                "artifact",
                metadata_fn=lambda: {"name": name, "encoding": encoding},
                payload_fn=text,
                expect_trace_id=False,
            )
