"""Chunks of stored state against `torch.chunk`, without a list of every rank's."""

from __future__ import annotations

import math

import pytest
import torch

from costmodel.state import chunks, cut_evenly, largest_chunk


def _chunked(rows: int, sizes: tuple[int, ...]) -> list[list[int]]:
    """Each rank's rows, `torch.chunk` along each axis in turn, none for the ranks it gives none."""
    parts = [torch.arange(rows)]
    for size in sizes:
        cut = [torch.chunk(part, size) if len(part) else () for part in parts]
        parts = [some[i] if i < len(some) else torch.arange(0) for some in cut for i in range(size)]
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("sizes", [(1,), (2,), (7,), (2, 3), (3, 2), (1, 5), (2, 2, 3), (3, 1, 2)])
def test_the_largest_chunk_and_even_cuts_are_those_of_torch(sizes: tuple[int, ...]) -> None:
    for rows in range(1, 30):
        parts = _chunked(rows, sizes)
        assert chunks(rows, sizes) == tuple(map(len, parts))
        assert largest_chunk(rows, sizes) == max(map(len, parts))
        for each in range(1, rows + 2):
            whole = list(range(rows))
            even = [whole[i * each : (i + 1) * each] for i in range(math.prod(sizes))]
            assert cut_evenly(rows, each, sizes) == (parts == even), (rows, each)


def test_nothing_is_listed_for_each_of_many_ranks() -> None:
    sizes = (10**9, 10**9)  # a list would not end
    assert largest_chunk(5 * 10**18 + 1, sizes) == 6  # 5e9 + 1 rows, then 6 of them
    assert cut_evenly(10**18, 1, sizes)
    assert not cut_evenly(3, 1, sizes)  # one row to each of three blocks of ranks
