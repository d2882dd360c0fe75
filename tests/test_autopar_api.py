"""plan, apply and parallelize on real ranks."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from local_steps import Net
from parity import assert_near
from ranks import rank_outcomes, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import autopar
from autopar import examples, meshes, planning
from autopar.options import Options
from autopar.ranks.together import RankFailedError
from costmodel.presets import hardware
from passes.errors import PlanMismatchError

EAGER = Options(compile=False)


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] = ("dp", "tp")) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=names[: len(shape)])


def batch_of(rank: int, shape: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The global batch and this rank's, for a mesh whose first axis splits it."""
    generator = torch.Generator().manual_seed(5)
    whole = {name: torch.randint(0, 12, (2 * shape[0], 6), generator=generator) for name in ("ids", "labels")}
    index = rank // (torch.Size(shape).numel() // shape[0])
    return whole, {name: value[2 * index : 2 * index + 2] for name, value in whole.items()}


def compare_gradients(model: nn.Module, eager: nn.Module) -> None:
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_near(q.grad.full_tensor(), p.grad, name)


def _trains(rank: int, ranks: int, shape: tuple[int, ...], strategy: str) -> None:
    mesh = mesh_of(shape)
    torch.manual_seed(rank)  # every rank starts elsewhere; rank 0's values count
    mine_first = Net(rows=12, width=8)
    torch.manual_seed(0)
    eager = Net(rows=12, width=8)
    whole, mine = batch_of(rank, shape)
    model = autopar.parallelize(mine_first, mesh, mine, strategy=strategy, options=EAGER)
    optims = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (eager, model)]
    for _ in range(3):
        losses = [eager(**whole).loss, model(**mine).loss]
        torch.testing.assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
        compare_gradients(model, eager)
        for optim in optims:
            optim.step()
            optim.zero_grad()
    assert model.calls == 3
    # A loss of the user's own on plain logits: the mean over ranks of each rank's mean.
    logits = model(mine["ids"]).logits
    assert type(logits) is torch.Tensor
    nn.functional.cross_entropy(logits.flatten(0, 1), mine["labels"].flatten()).backward()
    eager(**whole).loss.backward()
    compare_gradients(model, eager)
    # Logits beside the loss: a DTensor, and differentiable.
    for m in (model, eager):
        m.zero_grad()
    out = model(**mine)
    assert isinstance(out.logits, DTensor)
    (out.loss + out.logits.full_tensor().square().sum() * 0.1).backward()
    out = eager(**whole)
    (out.loss + out.logits.square().sum() * 0.1).backward()
    compare_gradients(model, eager)
    model.eval()
    eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**mine).loss, eager(**whole).loss)


@pytest.mark.parametrize(("shape", "strategy"), [((4,), "fsdp"), ((2, 2), "megatron"), ((1,), "ddp")])
def test_trains_like_eager(shape: tuple[int, ...], strategy: str) -> None:
    run_ranks(_trains, torch.Size(shape).numel(), shape, strategy)


def _plan_then_apply(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    model = Net(rows=12, width=8)
    whole, mine = batch_of(rank, (2,))
    offline = autopar.plan(model, {"dp": 2}, mine, hardware="cpu", strategy="fsdp", options=EAGER)
    mesh = mesh_of((2,))
    plan = autopar.plan(model, mesh, mine, strategy="fsdp", options=EAGER)
    assert plan == offline
    with torch.device("meta"):
        empty = Net(rows=12, width=8)
    empty.scale = torch.full((8,), 1.5)
    parallel = autopar.apply(empty, plan, mesh)
    assert all(p.is_meta for p in parallel.parameters())
    parallel.to_empty(device="cpu")
    direct = autopar.parallelize(model, mesh, plan=plan)
    state = {k: v.clone() for k, v in direct.state_dict().items()}
    parallel.load_state_dict(state)
    torch.testing.assert_close(parallel(**mine).loss, model(**whole).loss)
    torch.testing.assert_close(direct(**mine).loss, parallel(**mine).loss)


def test_a_plan_is_made_in_one_place_and_applied_in_another() -> None:
    run_ranks(_plan_then_apply, 2)


def _refuses(rank: int, ranks: int) -> None:
    model, mesh = Net(rows=12, width=8), mesh_of((2,))
    _, mine = batch_of(rank, (2,))
    plan = autopar.plan(model, mesh, mine, strategy="fsdp", options=EAGER)
    with pytest.raises(PlanMismatchError, match=r"for the mesh \{'dp': 2\} but this one is \{'tp': 2\}"):
        autopar.apply(model, plan, mesh_of((2,), ("tp",)))
    with pytest.raises(PlanMismatchError, match="made for another graph"):
        autopar.apply(Net(rows=12, width=10), plan, mesh)
    with pytest.raises(PlanMismatchError, match="made for another graph"):
        autopar.apply(model, replace(plan, fingerprint="x" * 20), mesh)
    with pytest.raises(ValueError, match=r"ranks were given inputs of different shapes"):
        autopar.parallelize(model, mesh, {"ids": mine["ids"][:, : 3 + rank]}, options=EAGER)
    with pytest.raises(ValueError, match="example_inputs"):
        autopar.parallelize(model, mesh, options=EAGER)
    with pytest.raises(ValueError, match="needs a DeviceMesh"):
        autopar.parallelize(model, {"dp": 2}, mine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no names for its axes"):
        autopar.parallelize(model, init_device_mesh("cpu", (1, 2)), mine)
    with pytest.raises(ValueError, match=r"ranks fall along axis 'dp' of the mesh \[1, 0\]"):
        autopar.parallelize(model, DeviceMesh("cpu", [1, 0], mesh_dim_names=("dp",)), mine, options=EAGER)
    part = dist.new_group([0])
    assert part is not None
    if rank == 0:
        alone = DeviceMesh.from_group(
            dist.new_group([0], use_local_synchronization=True), "cpu", mesh_dim_names=("dp",)
        )
        with pytest.raises(ValueError, match="has 1 ranks but the job has 2"):
            autopar.parallelize(model, alone, mine)
    dist.barrier()
    with torch.device("cpu" if rank == 0 else "meta"):
        other = Net(rows=12, width=8)
    with pytest.raises(ValueError, match="meta device on some ranks and real on others"):
        autopar.parallelize(other, mesh, mine, options=EAGER)


def test_what_does_not_fit_is_refused() -> None:
    run_ranks(_refuses, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "zero"}, "unknown strategy 'zero'; known are auto, ddp, fsdp, megatron"),
        ({"options": {"compile": False}}, "options is a dict"),
        ({"options": Options(recompute="some")}, r"Options\(recompute='some'\): known are auto"),  # type: ignore[arg-type]
        ({"options": Options(optimizer="lamb2")}, r"Options\(optimizer='lamb2'\)"),
        ({"options": Options(accumulate=0)}, "at least 1 micro-batch"),
        ({"options": Options(batch_axes=3)}, r"batch_axes=3\): names of mesh axes"),  # type: ignore[arg-type]
        ({"options": Options(batch_dims={"ids": "a"})}, "a mapping of inputs' names to dims"),  # type: ignore[dict-item]
        ({"options": Options(progress="x")}, "True or False"),  # type: ignore[arg-type]
        ({"options": Options(accumulate=True)}, r"accumulate=True\): at least 1 micro-batch"),
        ({"options": Options(compile=1)}, r"compile=1\): True or False"),  # type: ignore[arg-type]
        ({"options": Options(memory_budget=-1)}, "a positive number"),
        ({"options": Options(memory_budget=math.inf)}, r"memory_budget=inf\): bytes per device"),  # type: ignore[arg-type]
        ({"options": Options(memory_budget="80GiB")}, r"memory_budget='80GiB'\): bytes per device"),  # type: ignore[arg-type]
        ({"options": Options(batch_axes=("cp",))}, r"batch_axes=\('cp',\): the mesh has no axis 'cp'; it has dp"),
        ({"options": Options(batch_axes=("dp", "dp"))}, r"batch_axes=\('dp', 'dp'\) names an axis more than once"),
        ({"options": Options(batch_dims={"mask": 0})}, r"batch_dims=\{'mask': 0\}: the inputs are"),
        ({"mesh": {"dp": 0}}, "mesh axis 'dp' has size 0"),
        ({"mesh": 4}, "mesh is a int"),
        ({"mesh": {}}, "the mesh has 0 axes"),
        ({"example_inputs": torch.zeros(2, 3)}, "example_inputs is a tensor"),
        ({"example_inputs": 3}, "example_inputs is a int"),
        ({"model": Net}, "model is the class Net; pass a module that was made of it"),
        ({"model": "net.py"}, "model is a str; pass a torch.nn.Module"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    inputs = (torch.zeros(2, 3, dtype=torch.int64),)
    given = {"model": Net(), "mesh": {"dp": 2}, "example_inputs": inputs, **arguments}
    with pytest.raises(ValueError, match=message):
        autopar.plan(**given)


_HERE = [0]
"""The rank of this process, which a forward cannot ask for."""


class _Breaks(Net):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        if _HERE[0] == 1 and (not self.training or ids.shape[1] > 6):
            raise RuntimeError("no such layer")
        return super().forward(ids, labels)


def _one_rank_raises(rank: int, ranks: int, when: str) -> None:
    _HERE[0] = rank
    _, mine = batch_of(rank, (2,))
    model = _Breaks(rows=12, width=8).train(when != "capture")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such layer")

    rewritten = broken if when == "rewrite" and rank == 1 else planning.rewritten
    with mock.patch.object(planning, "rewritten", rewritten):
        parallel = autopar.parallelize(model, mesh_of((2,)), mine, strategy="fsdp", options=EAGER)
    assert when == "call"
    longer = {name: torch.cat((value, value), 1) for name, value in mine.items()}
    parallel(**longer)


@pytest.mark.parametrize("when", ["capture", "rewrite", "call"])
def test_one_ranks_error_ends_all(when: str) -> None:
    outcomes = rank_outcomes(_one_rank_raises, 2, when, timeout_s=60)
    assert "no such layer" in str(outcomes[1].error)
    assert "rank 1 failed" in str(outcomes[0].error)
    assert "no such layer" in str(outcomes[0].error)
    assert max(outcome.seconds for outcome in outcomes) < 45


def _short_on_one_rank(rank: int, ranks: int) -> None:
    _, mine = batch_of(rank, (2,))
    parallel = autopar.parallelize(Net(), mesh_of((2,)), mine, strategy="fsdp", options=EAGER)
    with pytest.raises(ValueError, match=rf"different shapes \(this one ids \[{4 - rank}, 6\].*drop_last=True"):
        parallel(**{name: torch.cat((value, value))[: 4 - rank] for name, value in mine.items()})


def test_a_batch_that_is_short_on_one_rank_is_told() -> None:
    run_ranks(_short_on_one_rank, 2)


def test_calls_are_described_and_restored() -> None:
    call = (
        (torch.zeros(2, 3, dtype=torch.int64), [1, None]),
        {"mask": torch.ones(2, requires_grad=True), "k": {"s": 1.5}},
    )
    args, kwargs = examples.restored(examples.described(call))
    assert args[0].shape == (2, 3)
    assert args[0].dtype == torch.int64
    assert args[0].is_meta
    assert args[1] == [1, None]
    assert kwargs["mask"].requires_grad
    assert kwargs["k"] == {"s": 1.5}
    assert examples.described((args, kwargs)) == examples.described(call)
    with pytest.raises(PlanMismatchError, match="a plan cannot hold"):
        examples.restored(examples.described(((object(),), {})))


def test_axes_split_the_batch_by_name() -> None:
    axes = meshes.axes_of({"dp_replicate": 2, "tp": 4, "fsdp": 3})
    assert meshes.batch_axes_of(axes, None) == (0, 2)
    assert meshes.batch_axes_of([(name.upper(), size) for name, size in axes], None) == (0, 2)
    assert meshes.batch_ranks(axes, (0, 2)) == 6
    assert meshes.batch_axes_of(axes, ("tp",)) == (1,)
    elsewhere = meshes.axes_of({"replicate": 2, "shard": 2, "data_parallel": 2, "tensor_parallel": 2})
    assert meshes.batch_axes_of(elsewhere, None) == (0, 1, 2)
    assert meshes.batch_axes_of(axes, ()) == ()


def test_an_axis_that_looks_as_if_it_split_the_batch_is_named() -> None:
    batch = (torch.zeros(4, 4),)

    def notes(mesh: dict[str, int], **options: Any) -> list[str]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))
        made = autopar.plan(model, mesh, batch, hardware="h100", options=autopar.Options(progress=False, **options))
        return [note for note in made.notes if "splits no batch" in note]

    (note,) = notes({"edp": 2, "tp": 2})
    assert note.startswith("axis 'edp' splits no batch: those named batch, data, data_parallel, ddp, dp,")
    assert notes({"dp": 2, "tp": 2}) == notes({"edp": 2, "tp": 2}, batch_axes=("edp",)) == []


@pytest.mark.parametrize(
    ("mesh", "chosen", "told"),
    [
        ({"tp": 4}, None, True),
        ({"x": 2, "y": 2}, None, True),
        ({"tp": 1}, None, False),
        ({"dp": 2, "tp": 2}, None, False),
        ({"tp": 4}, (), False),
        ({"x": 2, "y": 2}, ("x",), False),
    ],
)
def test_a_mesh_that_splits_no_batch_is_told(mesh: dict[str, int], chosen: tuple[str, ...] | None, told: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))
    options = autopar.Options(progress=False, batch_axes=chosen)
    made = autopar.plan(model, mesh, (torch.zeros(4, 4),), hardware="h100", options=options)
    notes = [note for note in made.notes if "every rank is given the same" in note]
    assert len(notes) == told
    for note in notes:
        assert note.startswith("no axis splits the batch")
        for name in ("dp", "dp_replicate", "dp_shard", "fsdp", "data", "batch", "Options(batch_axes=...)"):
            assert name in note


def test_the_users_model_stays_as_it_was() -> None:
    run_ranks(_leaves_the_model, 1)


def _leaves_the_model(rank: int, ranks: int) -> None:
    model = Net(rows=12, width=8)
    before, kind, drawn = copy.deepcopy(model.state_dict()), type(model), torch.get_rng_state()
    _, mine = batch_of(rank, (1,))
    parallel = autopar.parallelize(model, mesh_of((1,)), mine, strategy="fsdp", options=EAGER)
    assert torch.get_rng_state().equal(drawn)
    parallel(**mine).loss.backward()
    with torch.no_grad():
        for p in parallel.parameters():
            p.zero_()
    assert type(model) is kind
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not isinstance(p, DTensor) for p in model.parameters())


class Twice(nn.Module):
    """A model that returns its loss under two names, as some masked language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.linear(x).square().mean()
        return {"loss": loss, "masked_loss": loss}


def _differentiates_either(rank: int, ranks: int) -> None:
    torch.manual_seed(3)
    eager, x = Twice(), torch.randn(4, 6)
    with mock.patch.object(planning, "captured", side_effect=planning.captured) as captured:
        parallel = autopar.parallelize(eager, mesh_of((1,)), (x,), strategy="fsdp", options=EAGER)
        for names in (("loss",), ("masked_loss",), ("loss", "masked_loss")):
            for model in (eager, parallel):
                model.zero_grad()
                out = model(x)
                sum(out[name] for name in names).backward()
            compare_gradients(parallel, eager)
    assert [call.kwargs["tangents"] for call in captured.mock_calls] == ["loss"], "the step was captured again"


def test_a_loss_with_two_names_is_one_loss() -> None:
    run_ranks(_differentiates_either, 1)


def test_a_model_that_gives_back_its_input_is_planned_and_verified() -> None:
    """A step without an op."""
    made = autopar.verify(nn.Identity(), {"dp": 2, "tp": 2}, (torch.randn(2, 8),), options=EAGER)
    assert made.ok
    assert not made.collectives


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": Options(optimizer="lamb2")}, r"Options\(optimizer='lamb2'\)"),
        ({"options": {"recompute": "full"}}, "options is a dict"),
        ({"strategy": "zero"}, "unknown strategy 'zero'"),
        ({"model": nn.Linear}, "model is the class Linear"),
        ({"mesh": {1: 2}}, "mesh axis 1: a name is letters"),
        ({"mesh": {"dp": True}}, "mesh axis 'dp' has size True"),
        ({"hardware": 3}, "hardware is a int; pass a name"),
    ],
)
def test_verify_refuses_what_plan_refuses(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "model": nn.Linear(8, 8), "mesh": {"dp": 2}, "example_inputs": (torch.zeros(2, 8),), "hardware": "h100",
        **arguments,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        autopar.verify(**given)


class Scaled(nn.Module):
    """A product whose columns are put in an order and scaled by buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8)
        self.register_buffer("order", torch.randperm(8))
        self.register_buffer("counts", torch.randint(1, 9, (8,), dtype=torch.int16))
        self.register_buffer("scales", torch.rand(8).to(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)[:, self.order] * self.counts * self.scales.to(torch.float32)
        return y.square().mean()


def _buffers_that_differ(rank: int, ranks: int, alike: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Buffers after `parallelize`, this rank's loss and that of rank 0's model; `alike`: in all but their order."""
    torch.manual_seed(0 if alike else rank)
    model = Scaled()
    torch.manual_seed(rank)
    model.order.copy_(torch.randperm(8))
    torch.manual_seed(9)
    x = torch.randn(4, 8)
    parallel = autopar.parallelize(model, mesh_of((ranks,)), (x,), strategy="ddp", options=EAGER)
    buffers = [buffer.float() for buffer in parallel.buffers()]
    return buffers, parallel(x).detach(), model(x).detach()


@pytest.mark.parametrize("alike", [True, False])
def test_rank_0s_buffers_count_where_ranks_differ_in_order_alone_too(alike: bool) -> None:
    first, second = run_ranks(_buffers_that_differ, 2, alike)
    for ours, others in zip(first[0], second[0], strict=True):
        assert torch.equal(ours, others)
    for loss in (first[1], second[1]):
        torch.testing.assert_close(loss, first[2])


class Remembered(nn.Module):
    """Scales by a tensor that gets a gradient in eager; `as_parameter`: as the error says."""

    def __init__(self, as_parameter: bool) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8)
        if as_parameter:
            self.memory = nn.Parameter(torch.ones(8))
        else:
            self.register_buffer("memory", torch.ones(8, requires_grad=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.product(x) * self.memory).square().mean()


def test_a_buffer_that_would_lose_its_gradient_is_named() -> None:
    x = (torch.randn(4, 8),)
    for made in (autopar.plan, autopar.verify):
        with pytest.raises(ValueError, match=r"^memory is a buffer that requires a gradient.*make it an nn\.Parameter"):
            made(Remembered(as_parameter=False), {"dp": 2}, x, hardware="cpu")
    parity = autopar.verify(Remembered(as_parameter=True), {"dp": 2}, x, hardware="cpu")
    assert parity.ok
    assert ("gradient", "memory") in {(tensor.kind, tensor.name) for tensor in parity.tensors}
    model = Remembered(as_parameter=True)
    model.register_buffer("alias", model.memory)  # a parameter under another name
    autopar.plan(model, {"dp": 2}, x, hardware="cpu")


def test_a_budget_may_be_written_as_a_float() -> None:
    assert Options(memory_budget=80e9).memory_budget == 80_000_000_000  # type: ignore[arg-type]
    assert isinstance(Options(memory_budget=80e9).memory_budget, int)  # type: ignore[arg-type]


class NeverRun(nn.Module):
    """A model that must not be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("captured, though what was asked for could not be")


@pytest.mark.parametrize("make", [autopar.plan, autopar.verify])
@pytest.mark.parametrize(
    ("hardware", "options", "message"),
    [
        ("h9", {}, "unknown hardware 'h9'; known are"),
        ("h100", {"pins": {"weight": "Q"}}, "pin 'weight': 'Q' is no layout"),
        ("h100", {"pins": {"weight": "R"}}, "R has 1 placement, but the mesh has 2 axes"),
        ("h100", {"pins": {"weight": "PR"}}, "PR, but a parameter is no partial sum"),
        ("cpu", {"async_tp": True}, r"Options\(async_tp=True\) is for GPUs"),
    ],
)
def test_what_needs_no_graph_to_be_wrong_is_told_before_a_capture(
    make: Any, hardware: str, options: dict[str, Any], message: str
) -> None:
    asked = Options(progress=False, **options)
    with pytest.raises(ValueError, match=message):
        make(NeverRun(), {"dp": 2, "tp": 2}, (torch.zeros(2, 2),), hardware=hardware, options=asked)


def _wrong_pin(rank: int, ranks: int) -> None:
    options = Options(progress=False, pins={"weight": "Q"} if rank else {})
    with pytest.raises((ValueError, RankFailedError), match="pin 'weight': 'Q' is no layout"):
        autopar.parallelize(NeverRun(), mesh_of((ranks,)), (torch.zeros(2, 2),), options=options)


def test_a_pin_that_one_rank_gave_wrong_is_told_on_all_before_a_capture() -> None:
    run_ranks(_wrong_pin, 2)


def _as_asked(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    inputs = (torch.randn(2, 8),)
    slow = replace(hardware("h100"), name="slow")
    for strategy, placement in (("ddp", Replicate()), ("fsdp", Shard(0))):
        made = autopar.parallelize(nn.Linear(8, 8), mesh, inputs, strategy=strategy, hardware=slow, options=EAGER)
        assert all(p.placements == (placement,) for p in made.parameters()), strategy
    plan = autopar.plan(nn.Linear(8, 8), mesh, inputs, options=EAGER)
    for name, given in (("strategy", "fsdp"), ("hardware", "h100"), ("options", EAGER)):
        with pytest.raises(ValueError, match=f"a plan has the {name} that it was made with; leave out {name}"):
            autopar.parallelize(nn.Linear(8, 8), mesh, inputs, plan=plan, **{name: given})
    with pytest.raises(ValueError, match="unknown strategy 'zero'; known are auto, ddp, fsdp, megatron"):
        autopar.parallelize(nn.Linear(8, 8), mesh, inputs, strategy="zero")
    with pytest.raises(ValueError, match="unknown hardware 'h9'"):
        autopar.parallelize(nn.Linear(8, 8), mesh, inputs, hardware="h9")


def test_parallelize_plans_by_the_strategy_and_the_hardware_that_it_is_given() -> None:
    run_ranks(_as_asked, 2)
