"""Where tensors lie in memory, and which of them share a byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Span(NamedTuple):
    """The bytes of a strided tensor, from the address of its first to behind its last."""

    device: str
    start: int
    end: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def span_of(tensor: Tensor) -> Span | None:
    """None of what has no memory (meta, empty), or not of its own kind (sparse, a subclass)."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    if tensor.is_meta or tensor.numel() == 0:
        return None
    shape, stride, start = tuple(tensor.shape), tensor.stride(), tensor.data_ptr()
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return Span(str(tensor.device), start, start + (last + 1) * tensor.itemsize, shape, stride, tensor.dtype)


def sharing(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Places in `spans` of any two that share a byte, in order."""
    ordered = sorted(range(len(spans)), key=lambda place: spans[place][:3])
    found = []
    for _, on_one in groupby(ordered, key=lambda place: spans[place].device):
        found += [(min(pair), max(pair)) for pair in _touching(spans, on_one)]
    return sorted(found)


def _touching(spans: Sequence[Span], ordered: Iterator[int]) -> Iterator[tuple[int, int]]:
    before: list[int] = []
    for place in ordered:
        before = [other for other in before if spans[other].end > spans[place].start]
        yield from ((other, place) for other in before if _share(spans[other], spans[place]))
        before.append(place)


def _share(one: Span, other: Span) -> bool:
    """Whether two that begin before the other ends share a byte, and do not lie between one another."""
    if all(torch.Size(each.shape).numel() * each.dtype.itemsize == each.end - each.start for each in (one, other)):
        return True
    start = min(one.start, other.start)
    taken = torch.zeros(max(one.end, other.end) - start, dtype=torch.bool)
    _bytes_of(one, taken, start).fill_(True)
    return bool(_bytes_of(other, taken, start).any())


def _bytes_of(span: Span, taken: Tensor, start: int) -> Tensor:
    size = span.dtype.itemsize
    shape = [1 if stride == 0 else n for n, stride in zip(span.shape, span.stride, strict=True)]
    return taken.as_strided((*shape, size), (*(n * size for n in span.stride), 1), span.start - start)
