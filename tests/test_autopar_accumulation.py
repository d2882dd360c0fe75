"""Several micro-batches per step, and the collectives really issued: real ranks, against eager on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from stacks import Stack
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import autopar


class Plain(nn.Module):
    """No layer repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.up = nn.Linear(8, 12)
        self.head = nn.Linear(12, 16)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.tanh(self.up(self.embed(ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())}


class Alike(nn.Module):
    """Parameters whose gradients are one tensor, a part of one, or what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.first = nn.Parameter(torch.randn(4))
        self.table, self.scale = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.left(x) + self.right(x.square()) + nn.functional.pad(self.first, (0, 4))
        return {"loss": self.head(hidden.tanh()).square().mean() + self.table.sum() + self.scale}


MODELS = {"stack": lambda: Stack(4), "plain": Plain}
MICRO_BATCHES = 3
ROWS = 2


class Moved(TorchDispatchMode):
    """Counts collectives by (kind, tensors) and adds up the bytes of their full buffers, below autopar."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("_c10d_functional.")
        kind = next(
            (
                k
                for k in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")
                if name.startswith(k)
            ),
            "",
        )
        if kind and str(func) != name:
            full = result if kind == "all_gather" else args[0]
            self.counts[kind] = self.counts.get(kind, 0) + 1
            size = sum(x.numel() * x.element_size() for x in tree_leaves(full))
            self.bytes[kind] = self.bytes.get(kind, 0) + size
        return result


def _is_broadcast(collective: Any) -> bool:
    """Whether gloo runs it as a broadcast from each rank."""
    return collective.kind == "all_gather" and collective.role == "parameter"


def _times(collective: Any, mesh: DeviceMesh) -> int:
    """How often gloo is asked in a step."""
    return collective.count * (mesh[collective.axes].size() if _is_broadcast(collective) else 1)


def _batches(ranks: int) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randint(0, 16, (ROWS * ranks, 6)) for _ in range(MICRO_BATCHES)]


def _accumulates(rank: int, ranks: int, name: str, shape: tuple[int, ...], strategy: str, syncs_last: bool) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    torch.manual_seed(0)
    eager = MODELS[name]()
    batches = _batches(shape[0])
    start = mesh.get_coordinate()[0] * ROWS  # type: ignore[index]
    mine = [batch[start : start + ROWS] for batch in batches]
    options = autopar.Options(compile=False, reshard_after_forward=False if strategy.endswith("kept") else None)
    plan = autopar.plan(eager, mesh, {"ids": mine[0]}, strategy=strategy.split()[0], options=options)
    model = autopar.apply(eager, plan, mesh)
    for batch in batches:
        eager(batch)["loss"].backward()
    reduced = {c.kind for c in plan.collectives if c.role == "gradient"}
    for index, batch in enumerate(mine):
        last = index == MICRO_BATCHES - 1
        if syncs_last:
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
        loss = model(batch)["loss"]
        with Moved() as moved:
            loss.backward()
        expected = [c for c in plan.collectives if c.phase == "backward"]
        if syncs_last and not last:
            expected = [c for c in expected if c.role != "gradient"]
        assert sum(moved.counts.values()) == sum(_times(c, mesh) for c in expected)
        assert sum(moved.bytes.values()) == sum(c.count * c.bytes for c in expected)
    assert reduced
    for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert q.grad.placements == q.placements
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=key)


CASES = [("stack", (4,), "fsdp"), ("stack", (2, 2), "megatron"), ("plain", (2,), "ddp"), ("plain", (2,), "fsdp kept")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "shape", "strategy"), CASES)
def test_the_last_micro_batch_exchanges_the_sum_of_gradients(name: str, shape: tuple[int, ...], strategy: str) -> None:
    ranks = torch.Size(shape).numel()
    run_ranks(_accumulates, ranks, name, shape, strategy, True, timeout_s=280)


def test_without_the_call_each_backward_exchanges_its_own() -> None:
    run_ranks(_accumulates, 2, "stack", (2,), "fsdp", False, timeout_s=280)


def _issues_its_ledger(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for strategy in ("fsdp", "megatron"):
        torch.manual_seed(0)
        model = Stack(4, dropout=0.5)
        ids = torch.randint(0, 16, (ROWS, 6))
        plan = autopar.plan(model, mesh, {"ids": ids}, strategy=strategy, options=autopar.Options(compile=False))
        parallel = autopar.apply(model, plan, mesh)
        for _ in range(2):
            with Moved() as moved:
                parallel(ids=ids)["loss"].backward()
            # Apart: under a dispatch mode the profiler sees each op twice.
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                parallel(ids=ids)["loss"].backward()
            # On gloo a reduce-scatter runs as an all-to-all of the same bytes, a gather of parameters as broadcasts.
            issued = {c: "all_to_all" if c.kind == "reduce_scatter" else c.kind for c in plan.collectives}
            issued |= {c: "broadcast" for c in plan.collectives if _is_broadcast(c)}
            times = {c: _times(c, mesh) for c in plan.collectives}
            kinds = set(issued.values())
            ops = {e.key: e.count for e in profiled.key_averages() if e.key.startswith("_c10d_functional::")}
            waits = {c: c.tensors if c.kind == "all_gather" else 1 for c in plan.collectives}  # others are packed
            assert ops.pop("_c10d_functional::wait_tensor") == sum(c.count * waits[c] for c in plan.collectives)
            assert sum(ops.values()) == sum(times.values())
            assert moved.counts == {k: sum(times[c] for c in plan.collectives if issued[c] == k) for k in kinds}
            sizes = {k: sum(c.count * c.bytes for c in plan.collectives if issued[c] == k) for k in kinds}
            assert moved.bytes == sizes, strategy


@pytest.mark.timeout(300)
def test_collectives_issued_are_the_plans_ledger() -> None:
    """Counts by torch's profiler; bytes by a dispatch mode of this test."""
    run_ranks(_issues_its_ledger, 4, timeout_s=280)


def _alike(rank: int, ranks: int, axis: str, compile: bool) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(axis,))
    torch.manual_seed(0)
    batches = [torch.randn(8, 8) for _ in range(MICRO_BATCHES)]
    eager = Alike()
    parts = [batch.chunk(ranks)[rank] if axis == "dp" else batch for batch in batches]
    model = autopar.parallelize(eager, mesh, {"x": parts[0]}, options=autopar.Options(compile=compile, progress=False))
    for syncs in (True, False):
        for index, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            eager(batch)["loss"].backward()
            model.set_requires_gradient_sync(syncs or index == MICRO_BATCHES - 1)
            model(part)["loss"].backward()
        for each in (eager, model):
            nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        for (name, p), q in zip(eager.named_parameters(), model.named_parameters(), strict=True):
            torch.testing.assert_close(q[1].grad.full_tensor(), p.grad, msg=lambda text, of=name: f"{of}: {text}")
            p.grad = q[1].grad = None


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "axis", "compile"), [(1, "dp", True), (2, "dp", True), (2, "dp", False), (2, "tp", False)]
)
def test_gradients_that_are_one_tensor_are_added_up_and_clipped_each_by_itself(
    ranks: int, axis: str, compile: bool
) -> None:
    run_ranks(_alike, ranks, axis, compile, timeout_s=280)


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].clamp(-1e-3, 1e-3)


class Uneasy(nn.Module):
    """Gradients whose exchange cannot run once on a sum: clamped, scaled by what each forward writes, divided by how
    often an id occurs; and one whose exchange can."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.clamped, self.scaled = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.counted = nn.Embedding(5, 8, scale_grad_by_freq=True)
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, 8))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = x @ _Clamped.apply(self.clamped) + x.tanh() @ (self.scaled * self.scale.clone()) + self.counted(ids)
        with torch.no_grad():
            self.scale.lerp_(x.detach().abs().amax(0), 0.5)
        return {"loss": self.head(hidden.tanh()).square().mean()}


def _uneasy(rank: int, ranks: int, axis: str, strategy: str, compile: bool) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(axis,))
    torch.manual_seed(0)
    batches = [(torch.randn(8, 8), torch.randint(0, 5, (8,))) for _ in range(MICRO_BATCHES)]
    eager = Uneasy()

    def part(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(ranks)[rank] if axis == "dp" else x

    example = {"x": part(batches[0][0]).requires_grad_(), "ids": part(batches[0][1])}
    options = autopar.Options(compile=compile, progress=False)
    model = autopar.parallelize(eager, mesh, example, strategy=strategy, options=options)
    for index, (x, ids) in enumerate(batches):
        whole, mine = x.detach().clone().requires_grad_(), part(x.detach()).clone().requires_grad_()
        eager(whole, ids)["loss"].backward()
        model.set_requires_gradient_sync(index == MICRO_BATCHES - 1)
        model(mine, part(ids))["loss"].backward()
        assert whole.grad is not None
        average = ranks if axis == "dp" else 1  # of losses over the ranks of the batch
        torch.testing.assert_close(mine.grad, part(whole.grad) * average, msg=lambda text, at=index: f"{at}: {text}")
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=lambda text, of=name: f"{of}: {text}")
    torch.testing.assert_close(model.get_buffer("scale"), eager.scale)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("axis", "strategy", "compile"),
    [(axis, strategy, False) for axis, strategy in (("dp", "ddp"), ("dp", "fsdp"), ("tp", "auto"), ("tp", "megatron"))]
    + [("dp", "ddp", True)],
)
def test_what_cannot_be_exchanged_as_a_sum_is_exchanged_by_each_backward(
    axis: str, strategy: str, compile: bool
) -> None:
    """With gradient sync off. An input's gradient is of its own micro-batch, whichever axis it is summed over."""
    run_ranks(_uneasy, 2, axis, strategy, compile, timeout_s=280)


def _frozen_between(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager = Plain()
    batches = _batches(ranks)
    parts = [batch.chunk(ranks)[rank] for batch in batches]
    options = autopar.Options(compile=False, progress=False)
    model = autopar.parallelize(eager, mesh, {"ids": parts[0]}, strategy="fsdp", options=options)
    for index, (whole, part) in enumerate(zip(batches, parts, strict=True)):
        model.set_requires_gradient_sync(index == MICRO_BATCHES - 1)
        for each, ids in ((eager, whole), (model, part)):
            each.head.requires_grad_(index == 0)  # type: ignore[union-attr]
            each(ids)["loss"].backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)


def test_a_gradient_held_back_is_given_to_a_parameter_frozen_since() -> None:
    run_ranks(_frozen_between, 2)
