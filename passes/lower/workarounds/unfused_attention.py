"""Attention that a model writes out is compiled as it is written.

Inductor looks for products around a softmax and puts fused attention there. It knows them by ops alone, whatever dims
they permute and divide over: a softmax over queries becomes one over keys. Numbers that are wrong, and no error (torch
2.11 to 2.14). It finds them where no backward reads the softmax: in evaluation, and where a checkpoint computes it
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._inductor import pattern_matcher
from torch._inductor.fx_passes import fuse_attention
from torch._inductor.pattern_matcher import Match, ReplacementPatternEntry


@contextlib.contextmanager
def attention_as_written() -> Iterator[None]:
    """While it lasts, Inductor replaces nothing by fused attention."""
    made = ReplacementPatternEntry.apply

    def apply(entry: ReplacementPatternEntry, match: Match, graph: fx.Graph, node: fx.Node) -> None:
        if not _is_attention(entry):
            made(entry, match, graph, node)

    ReplacementPatternEntry.apply = apply  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ReplacementPatternEntry.apply = made  # type: ignore[method-assign]


def _is_attention(entry: ReplacementPatternEntry) -> bool:
    known: list[Any] = pattern_matcher._known_precompiled_patterns
    # Each is a tuple of what it looks for, ..., its pattern; from torch 2.14 on an object of these.
    told = [(e[0], e[-1]) if isinstance(e, tuple) else (e.search_fn, e.search_fn_pattern) for e in known]
    return any(entry.pattern is pattern and found.__module__ == fuse_attention.__name__ for found, pattern in told)
