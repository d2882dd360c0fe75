"""Parameters, buffers and plain tensors of a model that are two tensors in the same memory.

On one device a write to one changes the other. A parallel module has each apart (a graph has a plain tensor's values),
so what training or the step writes to has to be alone; what is only read may share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from passes.capture.settings import attributes
from passes.program.program import Program


class Overlap(NamedTuple):
    """Two names, the model's first one first.

    `alike`: they are of one kind, shape, layout and dtype. `plain`: the other is a tensor that a module holds as it
    does a number (`self.w = self.embed.weight.data`).
    """

    one: str
    other: str
    alike: bool
    plain: bool = False


class _Placed(NamedTuple):
    device: str
    start: int
    end: int
    name: str
    tensor: Tensor


def overlapping(model: nn.Module) -> tuple[Overlap, ...]:
    """Pairs of parameters, buffers and plain tensors that share memory without being one tensor, no two of them plain.
    Tensors without memory (meta) share none."""
    held = [*model.named_parameters(), *model.named_buffers()]
    plain = {name: value for name, value in attributes(model).values() if isinstance(value, Tensor)}
    tensors = [*held, *plain.items()]
    names = {id(tensor): name for name, tensor in reversed(tensors)}
    placed = [_placed(name, tensor) for name, tensor in tensors if names[id(tensor)] == name and _has_memory(tensor)]
    order = {each.name: number for number, each in enumerate(placed)}
    found = []
    for _, of_one in groupby(sorted(placed, key=lambda p: p[:3]), key=lambda p: p.device):
        for pair in _touching(list(of_one)):
            one, other = sorted(pair, key=lambda p: order[p.name])
            if one.name not in plain:
                alike = _alike(one.tensor, other.tensor)
                found.append(Overlap(one.name, other.name, alike, other.name in plain))
    return tuple(found)


def check_apart(overlaps: Sequence[Overlap], program: Program) -> None:
    """Raise where training, or the step itself, writes to one of two tensors in the same memory.

    Raises:
        ValueError: with both names and what would do.
    """
    written = {entry.name for entry in program.inputs if entry.kind == "parameter" and entry.requires_grad}
    written |= {output.name for output in program.outputs if output.kind == "buffer"}
    for one, other, alike, plain in overlaps:
        if plain and other not in program.attributes:
            continue  # what the forward does not read may lie behind
        if one in written or other in written:
            helps = f"make them one, model.{other} = model.{one}" if alike else "clone one of them"
            if plain:
                helps = f"read {one} in the forward ({one}.detach() where it gets no gradient there), or clone {other}"
            raise ValueError(
                f"{one} and {other} are two tensors in the same memory, and what training writes to one would not "
                f"reach the other; {helps}"
            )


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _placed(name: str, tensor: Tensor) -> _Placed:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Placed(str(tensor.device), start, start + (last + 1) * tensor.element_size(), name, tensor)


def _touching(placed: Sequence[_Placed]) -> Iterator[tuple[_Placed, _Placed]]:
    """Pairs that share a byte; `placed` by where they begin."""
    before: list[_Placed] = []
    for each in placed:
        before = [other for other in before if other.end > each.start]
        yield from ((other, each) for other in before if _share(other, each))
        before.append(each)


def _share(one: _Placed, other: _Placed) -> bool:
    """Whether two that begin before the other ends share a byte, and do not lie between one another."""
    if all(p.tensor.numel() * p.tensor.element_size() == p.end - p.start for p in (one, other)):
        return True
    start = min(one.start, other.start)
    taken = torch.zeros(max(one.end, other.end) - start, dtype=torch.bool)
    _bytes_of(one, taken, start).fill_(True)
    return bool(_bytes_of(other, taken, start).any())


def _bytes_of(placed: _Placed, taken: Tensor, start: int) -> Tensor:
    tensor, size = placed.tensor, placed.tensor.element_size()
    shape = [1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return taken.as_strided((*shape, size), (*(n * size for n in tensor.stride()), 1), placed.start - start)


def _alike(one: Tensor, other: Tensor) -> bool:
    kinds = [(type(t), t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return kinds[0] == kinds[1]
