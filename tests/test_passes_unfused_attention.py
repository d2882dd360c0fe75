"""Products around a softmax over any dim, of dims in any order, compiled; against einsums in double precision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

from passes.lower import inductor
from passes.lower.lower import compiled

SIZE = 4  # of every dim, so that any order of dims can be multiplied


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(1), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.permute(1, 0, 2)).softmax(-1), v)


def of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q[None], k[None].transpose(-2, -1)).div(2.0).softmax(-2) @ v[None])[0]


@pytest.mark.parametrize(
    ("attention", "scores", "dim", "scale"),
    [
        (over_queries, "bqd,bkd->bqk", 1, 1.0),
        (keys_first, "bqd,dbk->bqk", 2, 1.0),
        (of_heads, "bqd,bkd->bqk", 1, 0.5),
    ],
    ids=["over_queries", "keys_first", "of_heads"],
)
def test_dims_are_those_of_the_model(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], scores: str, dim: int, scale: float
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(SIZE, SIZE, SIZE) for _ in range(3))
    gm = make_fx(lambda *given: (attention(*given),), tracing_mode="fake")(q, k, v)
    with config.patch(force_disable_caches=True):
        (found,) = compiled(gm)([q, k, v])
    weights = (scale * torch.einsum(scores, q.double(), k.double())).exp()
    wanted = torch.einsum("bqk,bkd->bqd", weights / weights.sum(dim, keepdim=True), v.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_was_compiled_without_that_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same graph twice, the first time as Inductor leaves it: `torch.compile` of a model may have done so."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    q, k, v = (torch.randn(SIZE, SIZE, SIZE) for _ in range(3))
    gm = make_fx(lambda *given: (over_queries(*given),), tracing_mode="fake")(q, k, v)
    with monkeypatch.context() as without:
        without.setattr(inductor, "attention_as_written", contextlib.nullcontext)
        without.setattr(inductor, "_MENDED", "")
        (before,) = compiled(copy.deepcopy(gm))([q, k, v])
    (found,) = compiled(gm)([q, k, v])
    torch.testing.assert_close(found, over_queries(q, k, v))
    assert torch.allclose(before, found) == (TorchVersion(torch.__version__) >= (2, 15))
