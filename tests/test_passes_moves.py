"""What is named for a move, and for whom what a run makes is, by hand."""

from __future__ import annotations

from typing import Any

from torch import fx

from costmodel.layout import Partial, Replicate, Shard
from passes.analysis.moves import Move, Run
from passes.analysis.strategies import StoredOption

GRAPH = fx.Graph()
VALUE, READER = GRAPH.placeholder("value"), GRAPH.placeholder("reader")
WHOLE = (Replicate(), Replicate())
STORED: Any = StoredOption.__new__(StoredOption)


def _place(source: Any, reader: fx.Node | None = READER) -> fx.Node:
    return Move(VALUE, source, WHOLE, (), "forward", "", reader).place


def test_partial_sums_are_named_for_what_left_them_and_others_for_their_reader() -> None:
    assert _place((Replicate(), Partial("sum"))) is VALUE
    assert _place((Replicate(), Shard(0))) is READER
    assert _place(STORED) is READER
    assert _place((Replicate(), Shard(0)), None) is VALUE


def test_only_backward_sees_what_is_run_again() -> None:
    option: Any = None
    assert Run(VALUE, option, 0, "backward", again=True).era == "backward"
    assert Run(VALUE, option, 0, "backward").era == ""
