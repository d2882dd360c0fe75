"""Collectives of CUDA tensors through the CPU, for ranks that share one GPU: NCCL refuses two on one, and gloo takes
few collectives of CUDA tensors. Kernels for the CUDA key take the place of torch's; they are done when they return."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

_OPS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def through_the_cpu() -> torch.library.Library:
    """Registers the kernels, until what this gives is dropped."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    for function in (
        all_reduce, all_reduce_, all_reduce_coalesced, all_reduce_coalesced_, all_gather_into_tensor,
        all_gather_into_tensor_out, all_gather_into_tensor_coalesced, reduce_scatter_tensor,
        reduce_scatter_tensor_coalesced, all_to_all_single,
    ):  # fmt: skip
        library.impl(function.__name__, function, "CUDA")
    return library


def all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    whole, members = x.cpu(), _resolve_process_group(group)
    dist.all_reduce(whole, _OPS[op], members)
    return (whole / members.size() if op == "avg" else whole).to(x.device)


def all_reduce_(x: Tensor, op: str, group: str) -> Tensor:
    return x.copy_(all_reduce(x, op, group))


def all_reduce_coalesced(xs: list[Tensor], op: str, group: str) -> list[Tensor]:
    return [all_reduce(x, op, group) for x in xs]


def all_reduce_coalesced_(xs: list[Tensor], op: str, group: str) -> list[Tensor]:
    return [all_reduce_(x, op, group) for x in xs]


def all_gather_into_tensor(x: Tensor, ranks: int, group: str) -> Tensor:
    parts = [torch.empty_like(x, device="cpu") for _ in range(ranks)]
    dist.all_gather(parts, x.cpu().contiguous(), _resolve_process_group(group))
    return torch.cat(parts).to(x.device)


def all_gather_into_tensor_out(x: Tensor, ranks: int, group: str, *, out: Tensor) -> Tensor:
    return out.copy_(all_gather_into_tensor(x, ranks, group))


def all_gather_into_tensor_coalesced(xs: list[Tensor], ranks: int, group: str) -> list[Tensor]:
    return [all_gather_into_tensor(x, ranks, group) for x in xs]


def reduce_scatter_tensor(x: Tensor, op: str, ranks: int, group: str) -> Tensor:
    return all_reduce(x, op, group).chunk(ranks)[_resolve_process_group(group).rank()].clone()


def reduce_scatter_tensor_coalesced(xs: list[Tensor], op: str, ranks: int, group: str) -> list[Tensor]:
    return [reduce_scatter_tensor(x, op, ranks, group) for x in xs]


def all_to_all_single(x: Tensor, output_sizes: list[int], input_sizes: list[int], group: str) -> Tensor:
    received = torch.empty(sum(output_sizes), *x.shape[1:], dtype=x.dtype)
    dist.all_to_all_single(received, x.cpu(), output_sizes, input_sizes, _resolve_process_group(group))
    return received.to(x.device)
