"""The parallel module on real ranks against the unmodified model on one device; programs made by hand."""

from __future__ import annotations

import copy
import functools
import gc
import types
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from local_steps import Net, NetOutput, local_step
from parity import assert_near
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import prune

import autopar
from autopar.modules.groups import Groups
from autopar.modules.module import ParallelModule, parallel_module, preload
from autopar.modules.runtime import Executable
from passes.errors import PlanMismatchError
from passes.lower.lower import lower
from passes.program.local import Storage, bind_groups, groups_used

AXES = ("dp", "tp")


def made(model: nn.Module, mesh: DeviceMesh, compile: bool = False, calls: list[Any] | None = None) -> ParallelModule:
    """`model` under FSDP over every mesh axis; `calls` collects what was captured."""
    axes = tuple(zip(AXES, mesh.shape, strict=False))
    groups = Groups(mesh, AXES)

    def remake(plain: nn.Module, args: Any, kwargs: Any, tangents: Any, backward: bool) -> Executable:
        if calls is not None:
            calls.append((tangents, backward))
        local = local_step(plain, args, kwargs, axes, tangents=tangents, backward=backward)
        bind_groups(local.graph, groups.names_for(groups_used(local.graph)))
        return Executable(local, lower(local, compile=compile))

    every = tuple(range(mesh.ndim)) if mesh.size() > 1 else ()
    storages = {n: Storage(tuple(p.shape), (None,) * mesh.ndim, every) for n, p in model.named_parameters()}
    aliases = {"head.weight": "embed.weight"}
    return parallel_module(model, storages, mesh, remake, aliases=aliases, batch_axes=tuple(range(mesh.ndim)))


def batches(steps: int, ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(7)
    return [(torch.randint(0, 10, (2 * ranks, 5)), torch.randint(0, 10, (2 * ranks, 5))) for _ in range(steps)]


def mine(batch: tuple[torch.Tensor, torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0][2 * rank : 2 * rank + 2], batch[1][2 * rank : 2 * rank + 2]


def mesh_of(ranks: int) -> DeviceMesh:
    shape = {1: (1,), 2: (2,), 4: (2, 2)}[ranks]
    return init_device_mesh("cpu", shape, mesh_dim_names=AXES[: len(shape)])


def whole(gradient: Any) -> torch.Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor()


def _trains_like_eager(rank: int, ranks: int, compile: bool) -> None:
    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    eager = Net()
    before = copy.deepcopy(eager.state_dict())
    model = made(eager, mesh, compile)
    assert isinstance(model, Net)
    assert isinstance(model, ParallelModule)
    assert model.config == {"rows": 10, "width": 6}
    assert list(model.state_dict()) == list(eager.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in eager.named_parameters()]
    assert model.head.weight is model.embed.weight
    assert all(isinstance(p, DTensor) and p.device_mesh == mesh for p in model.parameters())
    options: list[dict[str, Any]] = [{"foreach": True}, {"fused": True}]
    optims = [torch.optim.AdamW(m.parameters(), lr=1e-2, **options[ranks % 2]) for m in (eager, model)]
    for step, batch in enumerate(batches(4, ranks)):
        wanted = eager(*batch)
        found = model(mine(batch, rank)[0], labels=mine(batch, rank)[1])
        assert type(found) is NetOutput
        assert type(found.loss) is torch.Tensor
        assert isinstance(found.logits, DTensor)
        assert found.name == "net"
        torch.testing.assert_close(found.loss, wanted.loss)
        torch.testing.assert_close(found.logits.full_tensor(), wanted.logits)
        wanted.loss.backward()
        found.loss.backward()
        for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert q.grad.placements == q.placements
                assert_near(whole(q.grad), p.grad, name)
        if step % 2:  # two batches accumulate
            norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (eager, model)]
            torch.testing.assert_close(whole(norms[1]), norms[0])
            for optim in optims:
                optim.step()
                optim.zero_grad()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert_near(whole(q), p.detach(), name)
    assert model.calls == eager.calls == 4
    assert model.head.weight is model.embed.weight
    assert model.frozen.grad is None
    assert model.unused.grad is None
    assert any(not torch.equal(before[k], v) for k, v in eager.state_dict().items())


@pytest.mark.parametrize(("ranks", "compile"), [(1, False), (4, False), (2, True)])
def test_trains_like_eager(ranks: int, compile: bool) -> None:
    run_ranks(_trains_like_eager, ranks, compile, timeout_s=280)


def _other_calls(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    eager = Net()
    original = copy.deepcopy(eager.state_dict())
    calls: list[Any] = []
    model = made(eager, mesh, calls=calls)
    batch = batches(1, ranks)[0]
    ids, labels = mine(batch, rank)
    rows = slice(2 * rank, 2 * rank + 2)

    # Without a gradient, in evaluation, and without a loss.
    model.eval()
    eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels).loss, eager(*batch).loss)
        found = model(ids, None)
        assert type(found.logits) is torch.Tensor
        assert not found.logits.requires_grad
        torch.testing.assert_close(found.logits, eager(batch[0]).logits[rows])
    model.train()
    eager.train()
    # The user's own loss: this rank's mean, averaged over the ranks.
    found = model(ids)
    nn.functional.cross_entropy(found.logits.flatten(0, 1), labels.flatten()).backward()
    eager(*batch).loss.backward()
    compare(model, eager)
    # A new shape.
    longer = torch.cat((batch[0], batch[0]), 1), torch.cat((batch[1], batch[1]), 1)
    torch.testing.assert_close(model(*mine(longer, rank)).loss, eager(*longer).loss)
    assert calls == [("loss", False), ("loss", False), ("loss", True), ("loss", True)]
    model(*mine(longer, rank))
    model(ids)
    assert len(calls) == 4
    # A gradient through the logits beside the loss; twice, as the program is made once.
    for _ in range(2):
        for m in (model, eager):
            m.zero_grad()
        out = model(ids, labels)
        (out.loss + (out.logits * out.logits).sum().full_tensor() * 0.1).backward()
        out = eager(*batch)
        (out.loss + (out.logits * out.logits).sum() * 0.1).backward()
        compare(model, eager)
    out = model(ids, labels)
    model.zero_grad()
    out.logits.full_tensor().sum().backward()
    eager.zero_grad()
    eager(*batch).logits.sum().backward()
    compare(model, eager)
    assert calls[4:] == [("loss", True), ("all", True)]
    # A second backward through one step.
    out = model(ids, labels)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()
    assert all(torch.equal(v, eager.state_dict()[k]) for k, v in original.items() if k != "calls")


def compare(model: nn.Module, eager: nn.Module) -> None:
    """Every gradient."""
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_near(whole(q.grad), p.grad, name)


def test_other_kinds_of_call() -> None:
    run_ranks(_other_calls, 4)


def _clear_errors(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    model = made(Net(), mesh)
    ids, labels = mine(batches(1, ranks)[0], rank)
    with pytest.raises(ValueError, match=r"labels is on meta but the mesh is on cpu"):
        model(ids, labels=labels.to("meta"))
    with pytest.raises(ValueError, match=r"ids is a DTensor"):
        model(DTensor.from_local(ids, mesh, [Replicate()] * mesh.ndim))
    kept = model.up.weight
    model.up.weight = nn.Parameter(torch.zeros(18, 6))
    with pytest.raises(PlanMismatchError, match=r"up.weight is no longer stored as planned"):
        model(ids)
    model.up.weight = kept
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(PlanMismatchError, match=r"head.weight was tied to embed.weight"):
        model(ids)
    model.head.weight = model.embed.weight
    model(ids)
    model.to(torch.float64)
    with pytest.raises(PlanMismatchError, match=r"float64 but the plan was made for torch\.float32"):
        model(ids)
    changed = Net()
    changed.up = nn.Linear(6, 17)
    every = {n: Storage(tuple(p.shape), (None,)) for n, p in Net().named_parameters()}
    with pytest.raises(PlanMismatchError, match=r"up.weight has shape \(17, 6\) but the plan was made for \(18, 6\)"):
        parallel_module(changed, every, mesh, None, aliases={})  # type: ignore[arg-type]


def test_errors_name_what_is_wrong() -> None:
    run_ranks(_clear_errors, 1)


def _meta(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    with torch.device("meta"):
        eager = Net()
    model = made(eager, mesh)
    assert all(p.is_meta for p in model.parameters())
    ids, _ = mine(batches(1, ranks)[0], rank)
    with pytest.raises(PlanMismatchError, match="to_empty"):
        model(ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.to_empty(device="cpu")
    assert any("['scale']" in str(w.message) for w in caught)
    assert model.scale.isnan().all()
    assert model.head.weight is model.embed.weight
    torch.manual_seed(3)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        model.unused.fill_(1)
        model.frozen.fill_(1)
        model.scale.fill_(1.5)
        model.calls.zero_()
    one = Net()
    with torch.no_grad():
        one.load_state_dict(
            {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
        )
    batch = batches(1, ranks)[0]
    torch.testing.assert_close(model(*mine(batch, rank)).loss, one(*batch).loss)
    # A real model's buffers outlast to_empty, and its ties too.
    real = made(Net(), mesh)
    real.to_empty(device="cpu")
    assert torch.equal(real.scale, torch.full((6,), 1.5))
    assert real.head.weight is real.embed.weight


def test_meta_models() -> None:
    run_ranks(_meta, 2)


def _checkpoints(rank: int, ranks: int, folder: str) -> None:
    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    model = made(Net(), mesh)
    optim = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = batches(2, ranks)
    for b in batch:
        model(*mine(b, rank)).loss.backward()
        optim.step()
    state, optim_state = get_state_dict(model, optim)
    dcp.save({"model": state, "optim": optim_state}, checkpoint_id=folder)
    torch.manual_seed(1)
    # Another layout: chunked over one axis, plain FSDP2 on the original model, and one device.
    from torch.distributed.fsdp import fully_shard

    flat = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    other = made(Net(), flat)
    fsdp: Any = fully_shard(Net(), mesh=flat)
    full = get_model_state_dict(model)
    for target in (other, fsdp):
        loaded = get_model_state_dict(target)
        dcp.load({"model": loaded}, checkpoint_id=folder)
        set_model_state_dict(target, loaded)
        for name, value in loaded.items():
            if isinstance(value, DTensor):
                assert torch.equal(value.full_tensor(), full[name].full_tensor()), name
    # And back from FSDP2.
    dcp.save({"model": get_model_state_dict(fsdp)}, checkpoint_id=folder + "/fsdp")
    again = made(Net(), mesh)
    loaded = get_model_state_dict(again)
    dcp.load({"model": loaded}, checkpoint_id=folder + "/fsdp")
    set_model_state_dict(again, loaded)
    losses = [m(*mine(batch[0], rank)).loss for m in (model, other, again)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    if rank == 0:
        one = Net()
        state = one.state_dict()
        dcp.load({"model": state}, checkpoint_id=folder, no_dist=True)
        one.load_state_dict(state)
        torch.testing.assert_close(one(*batch[0]).loss, losses[0])
    dist.barrier()


def test_checkpoints_go_between_layouts(tmp_path: Path) -> None:
    run_ranks(_checkpoints, 4, str(tmp_path))


def _forward_of_the_instance(rank: int, ranks: int) -> None:
    def shifted(self: Net, ids: torch.Tensor, labels: torch.Tensor | None = None) -> NetOutput:
        out = Net.forward(self, ids, labels)
        return NetOutput(None if out.loss is None else out.loss + 1, out.logits)

    mesh = mesh_of(ranks)
    torch.manual_seed(0)
    eager = Net()
    eager.forward = types.MethodType(shifted, eager)  # type: ignore[method-assign]
    model = made(eager, mesh)
    model.forward = functools.partial(model.forward)  # as what wraps the forward of a module does
    for rows in (4, 2):  # the model is captured once more
        (batch,) = batches(1, ranks)
        wanted, found = (each(batch[0][:rows], batch[1][:rows]).loss for each in (eager, model))
        torch.testing.assert_close(found, wanted)
        assert found > 2.5


def test_forward_of_the_instance() -> None:
    run_ranks(_forward_of_the_instance, 1)


def test_preloaded_program_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(_preloaded, 1)


def _preloaded(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    calls: list[Any] = []
    model = made(Net(), mesh, calls=calls)
    ids, labels = mine(batches(1, ranks)[0], rank)
    local = local_step(Net(), (ids,), {"labels": labels}, (("dp", 1),))
    preload(model, (ids,), {"labels": labels}, Executable(local, lower(local, compile=False)))
    model(ids, labels=labels).loss.backward()
    model(ids=ids, labels=labels)
    model(ids, labels)
    assert calls == []
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, ids=ids)


class Scaled(nn.Module):
    """A low-precision layer after a buffer in full precision, as frequencies of rotary positions are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        self.register_buffer("scale", torch.arange(1.0, 9.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((x * self.scale).bfloat16()).float().square().mean()


def _buffers_of_another_kind(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    eager, x = Scaled(), torch.randn(4, 8)
    model = autopar.parallelize(eager, mesh_of(ranks), (x,), options=autopar.Options(progress=False))
    torch.testing.assert_close(model(x), eager(x), rtol=1e-2, atol=0)
    for each in (eager, model):
        each.to(torch.bfloat16)  # converts the buffer alone
    torch.testing.assert_close(model(x), eager(x), rtol=1e-2, atol=0)
    for each in (eager, model):
        each.load_state_dict({**each.state_dict(), "scale": torch.ones(8, dtype=torch.int64)}, assign=True)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-2, atol=0)
    for each in (eager, model):
        each.scale = torch.full((1,), 2.0)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-2, atol=0)


def test_a_buffer_of_another_dtype_or_shape_is_another_kind_of_call() -> None:
    run_ranks(_buffers_of_another_kind, 1)


def _parameters_taken_out(rank: int, ranks: int) -> None:
    ids, labels = mine(batches(1, ranks)[0], rank)
    for taken_out, name in (
        (lambda model: setattr(model.up, "bias", None), "up.bias"),
        (lambda model: delattr(model.up, "bias"), "up.bias"),
        (lambda model: prune.identity(model.down, "weight"), "down.weight"),
        (lambda model: delattr(model.head, "weight"), "head.weight"),
    ):
        model = made(Net(), mesh_of(ranks))
        taken_out(model)
        with pytest.raises(PlanMismatchError, match=rf"^{name} was taken out"):
            model(ids, labels)


def test_a_parameter_that_is_gone_is_named() -> None:
    run_ranks(_parameters_taken_out, 1)


def _copies(rank: int, ranks: int) -> None:
    """A copy taken between two micro-batches trains by itself, by the same programs."""
    torch.manual_seed(0)
    eager, calls = Net(), []  # type: ignore[var-annotated]
    model = made(eager, mesh_of(ranks), calls=calls)
    first, second = batches(2, ranks)
    with model.no_sync():
        model(*mine(first, rank)).loss.backward()
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each(*mine(second, rank)).loss.backward()
    assert len(calls) == 1
    eager(*second).loss.backward()
    compare(copied, eager)
    assert copied.up.weight.grad.device_mesh is copied.up.weight.device_mesh  # else optimizers go DTensor's long way
    eager(*first).loss.backward()
    compare(model, eager)
    with torch.no_grad():
        for each in (copied, eager):
            each.up.weight.mul_(2)
    torch.testing.assert_close(copied(*mine(first, rank)).loss, eager(*first).loss)


def test_a_copy_runs_the_same_programs_and_has_no_gradients() -> None:
    run_ranks(_copies, 2)


class Renamed(nn.Linear):
    """A layer that takes its weight under the name that an older one had."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.register_load_state_dict_pre_hook(self._as_it_was)

    @staticmethod
    def _as_it_was(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


def _whole_tensors_inside(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    eager, other = Net(), Net()
    eager.up, other.up = Renamed(6, 18), Renamed(6, 18)
    model = made(eager, mesh_of(ranks))
    older = {name.replace("up.weight", "up.kernel"): value for name, value in other.state_dict().items()}
    for each in (model, copy.deepcopy(model)):
        each.load_state_dict(older)
        assert each.head.weight is each.embed.weight
        for name, value in each.state_dict().items():
            assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, other.state_dict()[name])
    model.up.load_state_dict(eager.up.state_dict())
    model.embed.load_state_dict({"weight": eager.embed.weight.double()}, assign=False)
    for name in ("up.weight", "up.bias", "embed.weight", "head.weight"):
        assert torch.equal(whole(model.state_dict()[name]), eager.state_dict()[name])
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        model.up.load_state_dict({"bias": torch.ones(3)}, strict=False)


def test_modules_inside_load_whole_tensors() -> None:
    run_ranks(_whole_tensors_inside, 2)


def _kept_for_a_backward(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    model = made(Net(), mesh_of(ranks))
    batch = batches(1, ranks)[0]

    def seen(through: str, retain: bool = False) -> tuple[torch.Tensor, weakref.ref[torch.Tensor]]:
        """What goes backward, kept as a list of losses keeps it, and the batch."""
        ids, labels = (x.clone() for x in mine(batch, rank))
        out = model(ids, labels)
        value = out.loss if through == "loss" else out.logits.sum().full_tensor()
        value.backward(retain_graph=retain)
        return value, weakref.ref(ids)

    gc.collect()
    gc.disable()
    try:
        for through in ("loss", "logits"):
            loss, ids = seen(through)
            assert ids() is None, through
            again, ids = seen(through, retain=True)
            assert ids() is not None
            again.backward()
            assert ids() is None, through
            for each in (loss, again):
                with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                    each.backward()
        with torch.no_grad():
            given = mine(batch, rank)[0].clone()
            ids, _ = weakref.ref(given), model(given, mine(batch, rank)[1])
            del given
        assert ids() is None
    finally:
        gc.enable()


def test_what_a_call_was_given_goes_with_its_backward() -> None:
    run_ranks(_kept_for_a_backward, 2)


class Turned(nn.Module):
    """Keeps for backward what lies transposed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.right = nn.Linear(6, 8), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.right(self.up(x).transpose(1, 2).tanh()).square().mean()}


def _packed_meanwhile(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    eager, x = Turned(), torch.randn(2, 5, 6)
    model = autopar.parallelize(eager, mesh_of(ranks), {"x": x}, options=autopar.Options(progress=False))
    turned: list[bool] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        """As `save_on_cpu(pin_memory=True)` has it."""
        turned.append(not value.is_contiguous())
        return torch.empty(value.shape, dtype=value.dtype).copy_(value)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = model(x=x)["loss"]
    assert any(turned)
    loss.backward()
    eager(x)["loss"].backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)


def test_what_backward_keeps_may_be_elsewhere_meanwhile() -> None:
    run_ranks(_packed_meanwhile, 1)
