"""Tensors as bytes and as digests: equal for equal values however they lie in memory, others for others."""

from __future__ import annotations

import pytest
import torch

from passes.program.bytes_of import bytes_of, digest

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.int16, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (8,), (), (3, 1), (70_000,)], ids=str)
def test_equal_values_are_equal_wherever_they_lie(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    values = torch.randint(0, 2, (count + 1,), generator=torch.Generator().manual_seed(count)).to(dtype)
    alone = values[1:].clone().view(shape)
    assert torch.equal(bytes_of(alone).view(dtype).view(shape).to(torch.complex64), alone.to(torch.complex64))
    for same in (values[1:].view(shape), torch.stack([alone, alone], -1)[..., 0]):
        assert torch.equal(bytes_of(same), bytes_of(alone))
        assert int(digest(same)) == int(digest(alone))


@pytest.mark.parametrize("count", [3, 9, 200_000])
def test_the_same_values_in_another_order_have_another_digest(count: int) -> None:
    values = torch.arange(count)
    last_two = torch.tensor([*range(count - 2), count - 1, count - 2])
    assert len({int(digest(each)) for each in (values, values.flip(0), last_two, values + 1)}) == 4
