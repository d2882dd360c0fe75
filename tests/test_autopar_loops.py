"""Training loops as people write them, on real ranks beside the same loop on one device with the whole batch."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_near
from ranks import run_ranks
from small_models import llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import autopar
from autopar.ranks.together import RankFailedError
from passes.errors import PlanMismatchError

BATCH = 8


def _batches(count: int, parts: int = 1, index: int = 0) -> list[dict[str, Tensor]]:
    """This part of each global batch."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 96, (BATCH, 16), generator=generator) for _ in range(count)]
    return [dict.fromkeys(("input_ids", "labels"), each.chunk(parts)[index]) for each in ids]


def _loop(model: Any, batches: list[dict[str, Tensor]]) -> tuple[list[float], nn.Module]:
    """Unfreezes the head, then the layer, then freezes the head; adds up micro-batches, clips by the largest entry."""
    seen: list[float] = []
    average = copy.deepcopy(model).eval().requires_grad_(False)
    head, layer = model.lm_head, model.model.layers[0]
    sync = getattr(model, "no_sync", contextlib.nullcontext)
    for part, trained in ((head, True), (layer, True), (head, False)):
        part.requires_grad_(trained)
        optim = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        with sync():
            (model(**batches.pop()).loss / 2).backward()
        loss = model(**batches.pop()).loss / 2
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=float("inf"))
        if isinstance(norm, DTensor) and torch.__version__.startswith("2.11."):  # does not ask the gradients' class
            norm = norm.full_tensor()
        seen += [loss.item(), float(norm)]
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optim.step()
        optim.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.5)
    seen.append(average(**batches.pop()).loss.item())
    return seen, average


def _unfrozen_averaged_and_accumulated(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager: Any = llama(layers=1)[0]
    eager.requires_grad_(False).lm_head.requires_grad_(True)
    mine = _batches(7, ranks, rank)
    options = autopar.Options(compile=False, progress=False)
    model = autopar.apply(eager, autopar.plan(eager, mesh, mine[0], strategy="fsdp", options=options), mesh)
    wanted, wanted_average = _loop(eager, _batches(7))
    found, found_average = _loop(model, mine)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    for one, other in ((model, eager), (found_average, wanted_average)):
        for (name, p), q in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert isinstance(p, DTensor)
            assert_near(p.detach().full_tensor(), q[1].detach(), name)


def test_unfrozen_averaged_and_accumulated() -> None:
    run_ranks(_unfrozen_averaged_and_accumulated, 2)


def _layer_by_layer(model: Any, batches: list[dict[str, Tensor]]) -> list[float]:
    """Layers unfrozen from the top, with an evaluation before each training step."""
    seen: list[float] = []
    for layer in reversed(model.model.layers):
        layer.requires_grad_(True)
        optim = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        with torch.no_grad():
            seen.append(model.eval()(**batches.pop()).loss.item())
        loss = model.train()(**batches.pop()).loss
        loss.backward()
        seen.append(loss.item())
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optim.step()
        optim.zero_grad()
    return seen


def _layers_of_one_kind_stored_in_two_ways(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager: Any = llama(layers=3)[0]
    eager.requires_grad_(False).model.layers[2].requires_grad_(True)
    options = autopar.Options(compile=False, progress=False, pins={"model.layers.[01].*": "R"})
    mine = _batches(6, ranks, rank)
    model = autopar.apply(eager, autopar.plan(eager, mesh, mine[0], strategy="fsdp", options=options), mesh)
    at_rest = [layer.mlp.up_proj.weight.placements for layer in model.model.layers]  # type: ignore[union-attr]
    assert at_rest[0] == at_rest[1] != at_rest[2], "frozen ones were to lie whole"
    torch.testing.assert_close(_layer_by_layer(model, mine), _layer_by_layer(eager, _batches(6)), rtol=1e-4, atol=0)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert_near(p.detach().full_tensor(), q.detach(), name)


def test_layers_of_one_kind_may_be_stored_in_two_ways() -> None:
    """Of layers that are alike, frozen ones lie whole on every rank and a trained one in parts; what is planned later
    trains both, or neither."""
    run_ranks(_layers_of_one_kind_stored_in_two_ways, 2)


class _Following(nn.Module):
    """Writes to its parameters: rows of a table are cut to their norm, a second layer follows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, max_norm=1.0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, parameter in zip(self.second.parameters(), self.first.parameters(), strict=True):
                mean.lerp_(parameter, 0.2)
        x = self.table(ids)
        return (self.first(x) * self.second(x.tanh())).square().mean()


def _parameters_that_forward_writes_to(rank: int, ranks: int, axes: tuple[str, ...], strategy: str) -> None:
    mesh = init_device_mesh("cpu", (2,) * len(axes), mesh_dim_names=axes)
    torch.manual_seed(0)
    eager, batches = _Following(), torch.randint(0, 9, (6, BATCH, 4))
    part = mesh.get_local_rank("dp")
    mine = [batch.chunk(2)[part] for batch in batches]
    options = autopar.Options(compile=False, progress=False)
    plan = autopar.plan(eager, mesh, (mine[0],), strategy=strategy, options=options)
    model = autopar.apply(eager, plan, mesh)
    losses = []
    for each, given in ((eager, batches), (model, mine)):
        optim = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5)
        for one, other in zip(given[::2], given[1::2], strict=True):
            for ids in (one, other):
                loss = each(ids)
                loss.backward()
                losses.append(loss.item())
            optim.step()
            optim.zero_grad()
    torch.testing.assert_close(losses[6:], losses[:6], rtol=1e-5, atol=0)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert_near(p.detach().full_tensor(), q.detach(), name)


@pytest.mark.parametrize(("axes", "strategy"), [(("dp",), "fsdp"), (("dp", "tp"), "megatron")])
def test_parameters_that_forward_writes_to(axes: tuple[str, ...], strategy: str) -> None:
    run_ranks(_parameters_that_forward_writes_to, 2 ** len(axes), axes, strategy)


class _Annealed(nn.Module):
    """A loss with weights that the loop sets, of which one is the class's, and a dropout that it turns off."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.beta, self.epoch = nn.Linear(6, 8), nn.Dropout(0.0), 0.1, 0
        self.range = (0.0, 9.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.up(x))
        return self.gain * y.square().mean() + self.beta * y.abs().clamp(*self.range).mean()


def _values_set_between_steps(rank: int, ranks: int) -> list[str]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager, x = _Annealed(), torch.randn(4, 6)
    model = autopar.parallelize(
        eager, mesh, (x.chunk(ranks)[rank],), options=autopar.Options(compile=False, progress=False)
    )
    found: dict[bool, list[float]] = {True: [], False: []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch, (beta, p) in enumerate(((0.1, 0.0), (5.0, 0.0), (0.1, 0.0), (5.0, 1.0))):
            for each, given in ((eager, x), (model, x.chunk(ranks)[rank])):
                each.beta, each.drop.p, each.epoch = beta, p, epoch + rank  # no forward reads the last
                found[each is model].append(each(given).item())
        for each, given in ((eager, x), (model, x.chunk(ranks)[rank])):
            each.drop.p, each.gain, each.range = 0.0, 3.0, (0.2, 0.4)
            found[each is model].append(each(given).item())
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=0)
    return [str(one.message) for one in caught if "captured and planned anew" in str(one.message)]


def test_values_set_between_steps() -> None:
    first, second = run_ranks(_values_set_between_steps, 2)
    assert [message.split(" changed")[0] for message in first] == [
        "beta (0.1, now 5.0)", "drop.p (0.0, now 1.0)",
        "drop.p (1.0, now 0.0), gain (1.0, now 3.0), range ((0.0, 9.0), now (0.2, 0.4))",
    ]  # fmt: skip
    assert not second


class _Divided(nn.Module):
    """A sum over as many targets as the loop says."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: Tensor, count: int, scale: float = 1.0, name: str = "") -> Tensor:
        return scale * self.up(x).square().sum() / count


def _numbers_given(rank: int, ranks: int) -> list[str]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager, x = _Divided(), torch.randn(4, 6)
    mine = x.chunk(ranks)[rank]
    options = autopar.Options(compile=False, progress=False)
    model = autopar.parallelize(eager, mesh, {"x": mine, "count": 3}, options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for given in ((3,), (5,), (3,), (3, 2.0), (7, 4.0), (True,), (3, 2.0, "a"), (3, 2.0, "b"), (3, 2.0, "a")):
            torch.testing.assert_close(model(mine, *given), eager(x, *given))
        for _ in range(3):  # one number, though none is equal to it
            assert model(mine, 3, float("nan")).isnan().all()
    return [str(one.message) for one in caught if "captured and planned anew" in str(one.message)]


def test_numbers_that_a_call_is_given() -> None:
    first, second = run_ranks(_numbers_given, 2)
    assert [message.split(" changed")[0] for message in first] == [
        "count (3, now 5)", "count (3, now 7), scale (2.0, now 4.0)", "name ('a', now 'b')",
        "count (7, now 3), scale (4.0, now nan)",
    ]  # fmt: skip
    assert not second


class _Given(nn.Module):
    """Its loss is a function that the call is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: Tensor, score: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return self.up(x).mean() if score is None else score(self.up(x))


def _functions_given(rank: int, ranks: int) -> list[str]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager, x = _Given(), torch.randn(4, 6)
    mine = x.chunk(ranks)[rank]
    options = autopar.Options(compile=False, progress=False)
    model = autopar.parallelize(eager, mesh, {"x": mine, "score": _score}, options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for given in (_score, None, lambda y: y.square().mean(), _score):
            torch.testing.assert_close(model(mine, given), eager(x, given))
    return [str(one.message) for one in caught if "captured and planned anew" in str(one.message)]


def _score(y: Tensor) -> Tensor:
    return y.exp().mean()


def test_functions_that_a_call_is_given() -> None:
    (message,), second = run_ranks(_functions_given, 2)
    assert re.match(r"score \(<function _score at \w+>, now <function .*<lambda> at \w+>\) changed: ", message)
    assert not second


class _Normed(nn.Module):
    """Features and their loss, by layers that depend on the mode, on a number and on autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.act: nn.Module = nn.GELU()
        self.beta = 0.5

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.act(self.norm(self.up(x)))) * self.beta
        y = 3 * y if y.dtype == torch.bfloat16 else y
        return {"y": y, "loss": y.square().mean()}


def _all_changed_before_backward(rank: int, ranks: int) -> None:
    """A backward is of the forward that it belongs to, whatever was set in between; what cannot be is refused."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager, x = _Normed(), torch.randn(8, 6)
    mine = x.chunk(ranks)[rank]
    model = autopar.parallelize(eager, mesh, (mine,), options=autopar.Options(compile=False, progress=False))

    def gradients(each: nn.Module, given: Tensor, cast: bool) -> Tensor:
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = each(given)
        y = out["y"].full_tensor() if isinstance(out["y"], DTensor) else out["y"]
        each.eval()
        each.beta = 7.0
        (out["loss"] + y.float().abs().mean()).backward()
        each.train()
        each.beta = 0.5
        found = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in each.parameters()]
        return torch.cat([gradient.flatten() for gradient in found])  # type: ignore[union-attr]

    for cast, tolerance in ((False, 1e-5), (True, 2e-2)):
        assert_near(gradients(model, mine, cast), gradients(eager, x, cast), f"gradients, cast={cast}", tolerance)
    for each, given in ((eager, x), (model, mine)):
        for of in ("loss", "y"):
            value = each(given)[of].square().mean()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            with torch.no_grad():
                each.up.bias.mul_(2)  # not read by a backward
                each.down.weight.mul_(2)
            with pytest.raises(RuntimeError, match=r"inplace operation|\w+\.\w+ was changed in place after a forward"):
                value.backward()

    for each, given in ((eager, x.clone()), (model, mine.clone())):
        value = each(given)["y"].square().mean()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        given.zero_()
        with pytest.raises(RuntimeError, match=r"inplace operation|^x was changed in place"):
            value.backward()

    model.act = nn.ReLU()
    with pytest.raises(PlanMismatchError, match=r"^act was replaced or taken out"):
        model(mine)


def test_all_changed_before_backward() -> None:
    run_ranks(_all_changed_before_backward, 2)


class _Shown(nn.Module):
    """Beside a loss what its backward reads (`hidden`), and what it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.gelu(self.up(x))
        y = self.down(hidden)
        return {"loss": (y - x).sin().mean(), "hidden": hidden, "y": y, "copy": hidden.clone()}


def _outputs_changed_before_backward(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager, x = _Shown(), torch.randn(8, 6)
    options = autopar.Options(compile=False, progress=False, recompute="none")
    model = autopar.parallelize(eager, mesh, (x.chunk(ranks)[rank],), options=options)
    for name in ("hidden", "y", "copy"):
        for each, given in ((eager, x), (model, x.chunk(ranks)[rank])):
            out = each(given)
            with torch.no_grad():
                out[name].zero_()
            read = pytest.raises(RuntimeError, match="modified by an inplace operation")
            with read if name == "hidden" else contextlib.nullcontext():
                out["loss"].backward()
        if name != "hidden":
            for (of, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
                assert isinstance(p.grad, DTensor)
                assert_near(p.grad.full_tensor(), q.grad, f"{of} with {name} changed")
        model.zero_grad()
        eager.zero_grad()


def test_outputs_changed_before_backward() -> None:
    run_ranks(_outputs_changed_before_backward, 2)


def _shifted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {"x": kwargs["x"] + 1}


def _doubled(module: nn.Module, args: tuple[Any, ...], out: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**out, "loss": 2 * out["loss"]}


class _Leaves(nn.Module):
    """Leaves a loss beside the one that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.aux = nn.Linear(6, 6), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.aux = y.sum()
        return y.square().mean()


def _hooks(rank: int, ranks: int) -> None:
    """Hooks that the model comes with are captured once; those registered later run on the parallel module itself."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    eager, x = _Normed().eval(), torch.randn(8, 6)
    eager.register_forward_pre_hook(_shifted, with_kwargs=True)
    eager.register_forward_hook(_doubled)
    eager.up.register_forward_hook(lambda module, args, out: out * 3)
    eager.down.register_full_backward_hook(lambda module, before, after: tuple(2 * g for g in before))
    model = autopar.parallelize(
        eager, mesh, {"x": x.chunk(ranks)[rank]}, options=autopar.Options(compile=False, progress=False)
    )
    for rows in (8, 4):  # the second kind of call is captured anew
        for later in (False, True):
            handles = [each.register_forward_hook(_doubled) for each in (eager, model) if later]
            loss, whole = model(x=x[:rows].chunk(ranks)[rank])["loss"], eager(x=x[:rows])["loss"]
            assert_near(loss, whole.detach(), f"loss of {rows} rows")
            loss.backward()
            whole.backward()
            for handle in handles:
                handle.remove()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        autopar.parallelize(
            _Leaves(), mesh, {"x": x.chunk(ranks)[rank]}, options=autopar.Options(compile=False, progress=False)
        )
    assert [str(each.message)[:14] for each in caught if "leaves there" in str(each.message)] == ["attribute aux:"] * (
        rank == 0
    )
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad.full_tensor(), eager.get_parameter(name).grad, name)
    for each in (eager, model):  # with gradients; torch copies none of a parameter's
        assert all(p.grad is None for p in copy.deepcopy(each).parameters())
        assert all(p.grad is not None for p in each.parameters())


def test_hooks_of_modules() -> None:
    run_ranks(_hooks, 2)


class _Scored(nn.Module):
    """Features, or their loss."""

    def __init__(self, loss: bool) -> None:
        super().__init__()
        self.up, self.down, self.loss = nn.Linear(6, 8), nn.Linear(8, 6), loss

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.down(nn.functional.gelu(self.up(x)))
        return (y if scale is None else y * scale).square().mean() if self.loss else y


def _one_feeds_the_other(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    whole, part = torch.randn(2 * ranks, 5, 6), slice(2 * rank, 2 * rank + 2)
    mine = whole[part].clone().requires_grad_()
    options = autopar.Options(compile=False, progress=False)
    eager = _Scored(False), _Scored(True)
    models = [autopar.parallelize(model, mesh, (mine,), options=options) for model in eager]
    models[1](models[0](mine)).backward()
    given = whole.clone().requires_grad_()
    eager[1](eager[0](given)).backward()
    for found, wanted in zip(models, eager, strict=True):
        for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
            assert isinstance(p.grad, DTensor)
            assert_near(p.grad.full_tensor(), q.grad, name)
    assert mine.grad is not None
    assert given.grad is not None
    assert_near(mine.grad, ranks * given.grad[part], "the gradient of this rank's mean")
    # What every rank shares has the gradient of the whole on each of them.
    scored, shared = _Scored(True), torch.full((6,), 2.0, requires_grad=True)
    autopar.parallelize(scored, mesh, (mine.detach(), shared), options=options)(mine.detach(), shared).backward()
    other = shared.detach().clone().requires_grad_()
    scored(whole, other).backward()
    assert shared.grad is not None
    assert other.grad is not None
    assert_near(shared.grad, other.grad, "the gradient of what is shared")


def test_gradients_go_from_one_parallel_module_to_another() -> None:
    run_ranks(_one_feeds_the_other, 2)


class _Two(nn.Module):
    """Two losses over one embedding, each with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x).relu()
        return self.one(y).square().mean(), self.other(y).square().mean()


def _alternating(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    torch.manual_seed(0)
    whole, part = torch.randn(2 * ranks, 6), slice(2 * rank, 2 * rank + 2)
    eager = _Two()
    model = autopar.parallelize(eager, mesh, (whole[part],), options=autopar.Options(compile=False, progress=False))
    for synced in (True, False):  # between micro-batches nothing is exchanged
        for which in (0, 1, 0):
            with contextlib.nullcontext() if synced else model.no_sync():
                model(whole[part])[which].backward()
            eager(whole)[which].backward()
            for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
                assert not synced or (p.grad is None) == (q.grad is None), name
                assert synced or p.grad is None, name
                if p.grad is not None:
                    assert_near(p.grad.full_tensor(), q.grad, name)
            if synced:
                for each in (model, eager):
                    each.zero_grad()
    sum(model(whole[part])).backward()
    sum(eager(whole)).backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert_near(p.grad.full_tensor(), q.grad, name)


def test_a_loss_leaves_what_it_does_not_depend_on() -> None:
    run_ranks(_alternating, 2)


class _Overflowing(nn.Module):
    """Of its scalars the second has infinite derivatives, and both meet in sums over ranks; none is called loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.up(x).relu()
        y, z = self.down(h), self.other(h)
        return {"mse": y.square().mean(), "exponent": (1e4 * z).exp().mean() + y.square().mean().add(200).exp()}


class _Beside(_Overflowing):
    """The same, with what may be differentiated instead."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.up(x).relu()
        return {"loss": (1e4 * self.other(h)).exp().mean(), "hidden": self.down(h)}


def _one_of_several(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(2 * ranks, 8)
    eager = _Overflowing()
    beside = _Beside()
    beside.load_state_dict(eager.state_dict())
    options = autopar.Options(compile=False, progress=False)
    for axis, part in (("dp", slice(2 * rank, 2 * rank + 2)), ("tp", slice(None))):
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(axis,))
        model = autopar.parallelize(eager, mesh, (whole[part],), strategy="megatron", options=options)
        for apart in (False, True):  # a micro-batch whose gradients are held back, then one that exchanges them
            with model.no_sync() if apart else contextlib.nullcontext():
                model(whole[part])["mse"].backward()
            if apart:
                model(whole[part])["mse"].backward()
            _compare_with(model, eager, lambda m, times=1 + apart: (times * m(whole)["mse"]).backward())
        other = autopar.parallelize(beside, mesh, (whole[part],), strategy="megatron", options=options)
        other(whole[part])["hidden"].full_tensor().square().mean().backward()
        _compare_with(other, beside, lambda m: m(whole)["hidden"].square().mean().backward())


def _compare_with(model: nn.Module, eager: nn.Module, backward: Callable[[nn.Module], None]) -> None:
    """Gradients of `model` with those that `backward` leaves in `eager`; both are cleared."""
    backward(eager)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert isinstance(p.grad, DTensor)
            assert_near(p.grad.full_tensor(), q.grad, name)
    model.zero_grad()
    eager.zero_grad()


def test_backward_through_one_of_several_outputs() -> None:
    run_ranks(_one_of_several, 2)


def _refused(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    mine = (torch.ones(2, 6),)
    options = autopar.Options(compile=False, progress=False)

    def inner(model: nn.Module) -> nn.Module:
        return nn.Sequential(_Scored(False), model)

    with pytest.raises(ValueError, match=r"plan is the path 'plan\.json'; pass autopar\.Plan\.load of it"):
        autopar.apply(_Scored(True), "plan.json", mesh)  # type: ignore[arg-type]
    plan = autopar.plan(_Scored(True), {"dp": ranks}, mine, hardware="h100", options=options)
    with pytest.raises(ValueError, match="a plan has the options that it was made with"):
        autopar.parallelize(_Scored(True), mesh, plan=plan, options=options)
    with pytest.raises(ValueError, match="apply needs a DeviceMesh"):
        autopar.apply(_Scored(True), plan, {"dp": ranks})  # type: ignore[arg-type]
    split = _Scored(True)
    split.up.weight = nn.Parameter(DTensor.from_local(split.up.weight.detach(), mesh))
    for model, message in (
        (autopar.parallelize(_Scored(True), mesh, mine, options=options), "^the model is parallel already"),
        (inner(fully_shard(_Scored(True), mesh=mesh)), "^1 is under FSDPModule; pass the model before any other"),
        (nn.parallel.DistributedDataParallel(_Scored(True)), "^the model is under DistributedDataParallel"),
        (inner(torch.jit.script(nn.Linear(4, 4))), "^1 is compiled TorchScript; pass the module that it was"),
        (inner(nn.LazyLinear(4)), "^1.weight has no shape yet, as of a lazy module; run the model once"),
        (split, r"^up\.weight is a DTensor already"),
    ):
        with pytest.raises(ValueError, match=message):
            autopar.parallelize(model, mesh, mine, options=options)


def test_models_plans_and_meshes_that_are_none_are_refused() -> None:
    run_ranks(_refused, 2)


def _mistakes(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    model, _, inputs = llama(layers=1)
    options = autopar.Options(compile=False, progress=False)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.Adam(copy.deepcopy(model).parameters())
    with pytest.warns(UserWarning, match="^SGD: an optimizer made before") if rank == 0 else contextlib.nullcontext():
        parallel = autopar.parallelize(model, mesh, inputs, options=options)
    del early, other
    loss = parallel(**inputs).loss
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, list(parallel.parameters()), create_graph=True)
    shorter = {name: value[:, :8] for name, value in inputs.items()}
    if rank == 0:
        shorter["attention_mask"] = torch.ones_like(shorter["input_ids"])
    with pytest.raises((ValueError, RankFailedError), match="attention_mask, which rank 0 has and rank 1 has not"):
        parallel(**shorter)
    for register in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
        hooked = copy.deepcopy(model)
        register(hooked.model.norm.weight, lambda _: None)  # type: ignore[union-attr, arg-type]
        with pytest.raises(ValueError, match=r"model\.norm\.weight has a hook on its gradient"):
            autopar.parallelize(hooked, mesh, inputs, options=options)


def test_what_would_go_wrong_without_a_word_is_an_error() -> None:
    run_ranks(_mistakes, 2)
