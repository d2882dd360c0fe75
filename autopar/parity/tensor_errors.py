"""How far each tensor of a step is off from the one that it is held against."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from autopar.parity.certificate import Kind, TensorError, Tolerances
from passes.parity.bisect import difference
from passes.parity.simulate import StepValues

_LEARNING_RATE = 1e-3
_EPS_OF_RMS = 1e-2
"""AdamW's eps as a share of the gradients' root mean square. AdamW divides by a gradient's own size, so that an element
that is zero but for rounding would move by the learning rate whichever way the rounding falls. Where a whole gradient
is, the eps is what is allowed of it."""


def rounding(low: bool) -> float:
    """A rounding, relative; `low`: in half precision."""
    return 2.0**-8 if low else 2.0**-23


def limits(tolerances: Tolerances, low: bool) -> tuple[float, float]:
    """(of scalar outputs, of all other tensors)."""
    loss, gradient = (2e-2, 5e-2) if low else (1e-5, 1e-4)
    return (
        loss if tolerances.loss is None else tolerances.loss,
        gradient if tolerances.gradient is None else tolerances.gradient,
    )


def compare(
    found: StepValues,
    wanted: StepValues,
    parameters: Mapping[str, Tensor],
    tolerances: Tolerances,
    low: bool = False,
    *,
    added_low: bool = False,
    differentiated: Collection[str] = (),
) -> tuple[tuple[TensorError, ...], str]:
    """Every tensor's error, and what the optimizer's step was.

    low: half precision rounded all of them. added_low: gradients alone, as the ranks' parts of them were added.
    differentiated: the outputs that the gradients are of.
    """
    of_loss, of_rest = limits(tolerances, low)
    _, of_gradients = limits(tolerances, low or added_low)

    def floor_of(norm: float, limit: float, low: bool = low) -> float:
        return rounding(low) * norm / limit if limit else 0.0

    total = _norm(wanted.gradients.values())
    least = floor_of(total, of_gradients, low or added_low)
    least_loss = floor_of(_moved(wanted.gradients, parameters), of_loss)
    errors = []
    for name, value in found.outputs.items():
        scalar = not value.dim()
        floor = least_loss if scalar and name in differentiated else 0.0
        errors.append(_error("output", name, value, wanted.outputs.get(name), of_loss if scalar else of_rest, floor))
    for name in dict.fromkeys([*wanted.gradients, *found.gradients]):
        pair = found.gradients.get(name), wanted.gradients.get(name)
        errors.append(_error("gradient", name, *pair, of_gradients, floor=least))
    for name in dict.fromkeys([*wanted.buffers, *found.buffers]):
        pair = found.buffers.get(name), wanted.buffers.get(name)
        floor = floor_of(_norm(_beside(name, wanted.buffers)), of_rest)
        errors.append(_error("buffer", name, *pair, of_rest, floor=floor))
    trained = {n: p for n, p in parameters.items() if n in wanted.gradients and n in found.gradients}
    if not trained or not total:
        return tuple(errors), ""
    count = sum(wanted.gradients[name].numel() for name in trained)
    step_eps = max(1e-8, _EPS_OF_RMS * total / math.sqrt(count))
    all_eps = {
        name: max(step_eps, least / math.sqrt(tensor.numel())) if _norm([wanted.gradients[name]]) < least else step_eps
        for name, tensor in trained.items()
    }
    after = [_stepped(trained, values.gradients, all_eps) for values in (found, wanted)]
    for name, tensor in trained.items():
        floor = _LEARNING_RATE * math.sqrt(tensor.numel())
        errors.append(_error("parameter", name, after[0][name], after[1][name], of_gradients, floor=floor))
    more = ", more where a gradient is zero but for rounding" if max(all_eps.values()) > step_eps else ""
    step = f"AdamW, lr {_LEARNING_RATE:g}, eps {step_eps:.1e} ({_EPS_OF_RMS:.0%} of the gradients' rms{more})"
    return tuple(errors), step


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all of them as one vector."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _moved(gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> float:
    """What a loss moves by, to first order, where each entry of each parameter moves by itself or its opposite, at
    random: a loss may be zero whatever the parameters are (a policy's advantages add up to nothing)."""
    return _norm(gradients[name].double() * p.double() for name, p in parameters.items() if name in gradients)


def _beside(name: str, buffers: Mapping[str, Tensor]) -> list[Tensor]:
    """The statistics that a module keeps of the same values, the buffer's own among them: a running mean that is zero
    but for rounding has the scale of the variance."""
    own, module = buffers.get(name), name.rpartition(".")[0]
    if own is None or not own.is_floating_point():
        return []
    return [
        value
        for other, value in buffers.items()
        if other.rpartition(".")[0] == module
        and (value.shape, value.dtype) == (own.shape, own.dtype)
        and bool(value.isfinite().all())
    ]


def _error(
    kind: Kind, name: str, found: Tensor | None, wanted: Tensor | None, tolerance: float, floor: float = 0.0
) -> TensorError:
    one = found if found is not None else wanted
    assert one is not None
    shape = tuple(one.shape)
    if found is None or wanted is None:
        missing = "the ranks" if found is None else "the unmodified model"
        return TensorError(kind, name, shape, math.inf, tolerance, f"{missing} gave none")
    if found.shape != wanted.shape:
        return TensorError(kind, name, shape, math.inf, tolerance, f"the reference has shape {list(wanted.shape)}")
    if wanted.dtype.is_floating_point and bool(wanted.isnan().any()):
        return TensorError(kind, name, shape, math.nan, tolerance, "the reference holds NaNs, which prove nothing")
    scale = float(torch.where(wanted.isfinite(), wanted, torch.zeros_like(wanted)).double().norm())
    error = difference(found, wanted)
    if floor > scale:
        note = "" if kind == "parameter" else "zero but for rounding"
        return TensorError(kind, name, shape, error * (scale or 1.0) / floor, tolerance, note)
    return TensorError(kind, name, shape, error, tolerance)


def _stepped(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], eps: Mapping[str, float]
) -> dict[str, Tensor]:
    """The parameters after a step of AdamW, each with its own eps."""
    stepped = {name: nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    for name, parameter in stepped.items():
        parameter.grad = gradients[name].detach().to(parameter.dtype).clone()
    groups = [{"params": [parameter], "eps": eps[name]} for name, parameter in stepped.items()]
    torch.optim.AdamW(groups, lr=_LEARNING_RATE).step()
    return {name: parameter.detach() for name, parameter in stepped.items()}
