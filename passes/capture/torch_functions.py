"""Functions of torch that are captured as others, which compute the same.

Their own code reads values, writes where functionalisation does not see it, or takes a slow path on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


def _one_hot(classes: Tensor, num_classes: int = -1) -> Tensor:
    """`F.one_hot`, which looks whether all classes are below `num_classes`."""
    if num_classes <= 0:
        return nn.functional.one_hot(classes, num_classes)
    return (classes.unsqueeze(-1) == torch.arange(num_classes, device=classes.device)).to(torch.int64)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.scaled_dot_product_attention`. Where values have a smaller head size than queries (multi-head latent
    attention), they get zeros up to it and the result loses them again, as `transformers` does for FlashAttention: the
    CPU's fused op wants one size, else all scores are written out in fp32."""
    attend, size = nn.functional.scaled_dot_product_attention, value.shape[-1]
    if size >= query.shape[-1]:
        return attend(query, key, value, *args, **kwargs)
    value = nn.functional.pad(value, (0, query.shape[-1] - size))
    return attend(query, key, value, *args, **kwargs)[..., :size]


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`F.batch_norm`, whose op writes the running statistics where functionalisation does not see it."""
    if not training or mean is None or var is None:
        return nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    out, _, _, new_mean, new_var = aten._native_batch_norm_legit_functional.default(
        x, weight, bias, mean.detach().clone(), var.detach().clone(), training, momentum, eps
    )
    mean.copy_(new_mean.detach())
    var.copy_(new_var.detach())
    return out


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`F.instance_norm`: a batch norm of every sample's channels; the running statistics are their means."""
    if not use_input_stats or running_mean is None or running_var is None:
        return nn.functional.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    samples, channels = x.shape[:2]
    means, variances = running_mean.repeat(samples), running_var.repeat(samples)
    weight, bias = (None if t is None else t.repeat(samples) for t in (weight, bias))
    out = _batch_norm(
        x.reshape(1, samples * channels, *x.shape[2:]), means, variances, weight, bias, True, momentum, eps
    )
    running_mean.copy_(means.detach().view(samples, channels).mean(0))
    running_var.copy_(variances.detach().view(samples, channels).mean(0))
    return out.view(x.shape)


def _tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.tensor`, of tensors too: a list of scalars is stacked."""
    if not _holds_tensor(data):
        return torch.tensor(data, *args, **kwargs)
    made = _stacked(data)
    return made.to(kwargs["dtype"]) if kwargs.get("dtype") else made


def _holds_tensor(data: Any) -> bool:
    return isinstance(data, (list, tuple)) and any(isinstance(d, Tensor) or _holds_tensor(d) for d in data)


def _stacked(data: Any) -> Tensor:
    if isinstance(data, (list, tuple)):
        return torch.stack(torch.broadcast_tensors(*(_stacked(d) for d in data)))
    return data.detach() if isinstance(data, Tensor) else torch.tensor(data)


INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.tensor: _tensor,
    nn.functional.batch_norm: _batch_norm,
    nn.functional.instance_norm: _instance_norm,
    nn.functional.one_hot: _one_hot,
    nn.functional.scaled_dot_product_attention: _attention,
}
"""A function -> what runs in its place."""
