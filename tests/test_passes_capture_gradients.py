"""Models that reach their parameters, or run their backward, in ways of their own; counts of what was chosen."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from parity import captured, planned
from test_passes_capture import gradients, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passes.capture.capture import capture
from passes.errors import CaptureError

aten = torch.ops.aten


def _assert_eagers(model: nn.Module, x: Tensor) -> None:
    """The captured step's loss, buffers and gradients are those of eager."""
    program = capture(model, (x,))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = run(program, model, (x,), {})
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    loss = model(x)
    loss.backward()
    torch.testing.assert_close(found["output", ""], loss.detach())
    wanted = gradients(model)
    assert {name for kind, name in found if kind == "gradient"} == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found["gradient", name], gradient)
    for kind, name in found:
        if kind == "buffer":
            torch.testing.assert_close(found[kind, name], model.get_buffer(name))


class Reentrant(nn.Module):
    """Checkpointed layers whose input needs no gradient of its own; one parameter is used twice."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8).requires_grad_(not frozen)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if not x.requires_grad:
            x.requires_grad_()  # what peft does, so that what is checkpointed is differentiated
        for layer in (*self.layers, self.layers[0]):
            x = checkpoint(lambda y, f=layer: f(y).tanh(), x, use_reentrant=True)
        return x.square().mean()


@pytest.mark.parametrize("frozen", [False, True])
def test_reentrant_checkpointing(frozen: bool) -> None:
    _assert_eagers(Reentrant(frozen), torch.randn(4, 6))


class Aside(nn.Module):
    """Parameters in a list and in a closure of a hook, beside where they are registered."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.scale, self.all = scale, [self.weight]
        self.norm = nn.LayerNorm(8)
        self.norm.register_forward_hook(lambda module, args, out: out * scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ self.all[0]).square().mean()


def test_parameters_that_are_held_elsewhere_too() -> None:
    model = Aside()
    _assert_eagers(model, torch.randn(4, 8))
    assert model.all[0] is model.weight


def test_a_parameter_that_is_none_of_the_models_is_an_error() -> None:
    class Unregistered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.known, self.layers = nn.Linear(8, 8), [nn.Linear(8, 8)]

        def forward(self, x: Tensor) -> Tensor:
            return self.known(self.layers[0](x)).sum()

    model = Unregistered()
    with pytest.raises(CaptureError, match=r"s.py:\d+: uses a \(8, 8\) tensor that .* is none of the"):
        capture(model, (torch.randn(2, 8),))
    model.layers[0].requires_grad_(False)
    _assert_eagers(model, torch.randn(2, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_ops_of_any_device(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = kind(5, 4, num_layers=2, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0].square().mean()

    model, x = Recurrent(), torch.randn(3, 6, 5)
    assert not any("mkldnn" in str(node.target) for node in capture(model, (x,)).graph.graph.nodes)
    _assert_eagers(model, x)


class Counting(nn.Module):
    """A router that counts how often it chose each expert, as balancing without a loss does."""

    def __init__(self, minlength: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.minlength = nn.Linear(8, 4), minlength
        self.register_buffer("load", torch.zeros(minlength))
        self.register_buffer("weight", torch.zeros(minlength))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        best, chosen = scores.topk(2, -1)
        self.load += torch.bincount(chosen.flatten(), minlength=self.minlength)
        self.weight += torch.bincount(
            scores.argmax(-1).to(torch.int32).flatten(), best[..., 0].detach().flatten(), minlength=self.minlength
        )
        return (best.sum(-1) * x.square().mean(-1)).mean()


@pytest.mark.parametrize("minlength", [4, 6])
def test_counts_of_what_a_router_chose(minlength: int) -> None:
    _assert_eagers(Counting(minlength), torch.randn(5, 3, 8))


def test_counts_are_added_over_ranks_and_not_gathered() -> None:
    program = captured(Counting(), {"x": torch.randn(8, 3, 8)})
    local = planned(program, {"dp": 4}, "ddp")[2]
    kinds = {str(node.target) for node in local.graph.graph.nodes if "c10d" in str(node.target)}
    assert kinds
    assert not [kind for kind in kinds if re.search("all_gather|all_to_all", kind)]


def test_a_shape_that_follows_from_a_parameter_is_refused_with_what_would_do() -> None:
    class Loop(nn.Module):
        """Goes over the experts that were chosen in the order they are found."""

        def __init__(self) -> None:
            super().__init__()
            self.router, self.expert = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x[: len(self.router(x).argmax(-1).unique())]).sum()

    wanted = r"capture_gradients.py:\d+: .*unique.* the parameter router.*Compute every row and multiply .* by zero"
    with pytest.raises(CaptureError, match=wanted):
        capture(Loop(), (torch.randn(6, 8),))


class Running(nn.Module):
    """Norms with running statistics, of a batch and of each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sample = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        self.batch = nn.BatchNorm1d(3, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return (self.batch(self.sample(x)).cumsum(-1) ** 2).mean()


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_of_batches_and_samples(training: bool) -> None:
    _assert_eagers(Running().train(training), torch.randn(4, 3, 5) + 1)


def test_running_statistics_that_would_be_lost_are_an_error() -> None:
    class Raw(Running):
        def forward(self, x: Tensor) -> Tensor:
            b = self.batch
            return torch.batch_norm(x, b.weight, b.bias, b.running_mean, b.running_var, True, 0.1, 1e-5, False).sum()

    with pytest.raises(CaptureError, match=r"capture_gradients.py:\d+: .*running statistics would be lost"):
        capture(Raw(), (torch.randn(4, 3, 5),))


class GoesBack(nn.Module):
    """Runs a backward in its forward."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.linear = of, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        loss = self.linear(x).square().mean()
        match self.of:
            case "method":
                (2 * loss).backward(retain_graph=True)
            case "function":
                torch.autograd.backward(loss, retain_graph=True)
            case _:
                loss.backward(inputs=[x], retain_graph=True)
                assert x.grad is not None
                return loss + x.grad.square().sum()
        return loss


@pytest.mark.parametrize("of", ["method", "function"])
def test_a_backward_in_the_forward_is_refused_with_its_line(of: str) -> None:
    where = r"test_passes_capture_gradients\.py:\d+" if of == "method" else "the model"
    with pytest.raises(CaptureError, match=f"{where}: .* gradients of linear.weight and 1 more, .*autograd.grad"):
        capture(GoesBack(of), (torch.randn(2, 4),))


def test_a_backward_in_the_forward_to_what_it_made_itself_is_captured() -> None:
    _assert_eagers(GoesBack("own"), torch.randn(2, 4))
