"""Gradients of a step, clipped and applied, against the same DTensors without our class, on real ranks."""

import copy
import io
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from autopar.modules.gradient import Gradient, _plain
from autopar.modules.stored import spec

LAYOUTS = {
    "whole": [(Replicate(), Replicate())],
    "state": [(Shard(0), Shard(0))],
    "mixed": [(Replicate(), Replicate()), (Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(0), Shard(1))],
    "strided": [(_StridedShard(0, split_factor=2), Shard(0)), (Replicate(), Shard(0))],
}
OF_OUR_CLASS = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="takes every subclass of DTensor for one"
)


def parameters(layouts: list, mesh, ours: bool) -> list[nn.Parameter]:
    """Three parameters per layout, with gradients."""
    torch.manual_seed(0)
    made = []
    for index in range(3 * len(layouts)):
        layout = layouts[index % len(layouts)]
        strided = any(isinstance(p, _StridedShard) for p in layout)

        def whole(layout=layout, strided=strided) -> DTensor:
            full = torch.randn(8, 6)
            if not strided:
                return distribute_tensor(full, mesh, layout)
            part = full.chunk(2)[mesh.get_local_rank("tp")].chunk(2)[mesh.get_local_rank("dp")]
            return DTensor(part.clone(), spec(mesh, layout, (8, 6), torch.float32), requires_grad=False)

        parameter, gradient = nn.Parameter(whole()), whole()
        parameter.grad = Gradient.of(gradient._local_tensor, gradient._spec) if ours else gradient
        made.append(parameter)
    return made


def trained(ours: bool, layouts: list, mesh, order: float, how: dict) -> list[torch.Tensor]:
    """The norm and the parameters after two steps."""
    found = parameters(layouts, mesh, ours)
    optim = torch.optim.AdamW(found, lr=0.1, **how)
    norms = []
    for _ in range(2):
        norms.append(nn.utils.clip_grad_norm_(found, 1.0, order).full_tensor())
        optim.step()
    return [*norms, *(p.detach().full_tensor() for p in found)]


def compared(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name, layouts in LAYOUTS.items():
        for order, how in ((2.0, {"fused": True}), (2.0, {"foreach": True}), (float("inf"), {"foreach": False})):
            expected = trained(False, layouts, mesh, order, how)
            for a, b in zip(trained(True, layouts, mesh, order, how), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=f"{name} {order} {how}")


def test_clipping_and_optimizers_give_what_dtensors_give() -> None:
    run_ranks(compared, 4)


def _columns_scaled(rank: int, ranks: int) -> list[list[float]]:
    """A gradient whose columns are scaled by a vector that is split over the same ranks."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    rows, factors = (distribute_tensor(x, mesh, [Shard(0)]) for x in (torch.ones(4, 2), torch.tensor([2.0, 3.0])))
    torch._foreach_mul_([Gradient.of(rows.to_local(), rows._spec)], [factors])
    return rows.full_tensor().tolist()


def test_a_list_of_smaller_tensors_is_no_list_of_parts() -> None:
    assert run_ranks(_columns_scaled, 2) == [[[2.0, 3.0]] * 4] * 2


def _overflow(rank: int, ranks: int) -> list[tuple[float, float]]:
    """Scale and parameter after a step in which one rank overflows, by which gradient comes first."""
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
    seen = []
    for layouts in permutations([(Replicate(), Replicate()), (Replicate(), Shard(0))]):
        found = [nn.Parameter(distribute_tensor(torch.ones(ranks, 3), mesh, layout)) for layout in layouts]
        for parameter in found:
            parameter.grad = Gradient.of(torch.ones_like(parameter.to_local()), parameter._spec)
            if rank == 1 and parameter.placements[1].is_shard():
                parameter.grad.to_local()[0, 1] = float("inf")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        scaler.step(torch.optim.SGD(found, lr=0.5))
        scaler.update()
        seen.append((scaler.get_scale(), found[0].detach().full_tensor().sum().item()))
    return seen


def _largest_entry(rank: int, ranks: int) -> float:
    """The largest of the entries of a row, which one rank has, and of three."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    found = [nn.Parameter(distribute_tensor(torch.zeros(rows, 3), mesh, [Shard(0)])) for rows in (1, 3)]
    for parameter in found:
        of = parameter.grad = Gradient.of(torch.full_like(parameter.to_local(), -2.0 - rank), parameter._spec)
        assert of.to_local().numel() or rank == 1
    return nn.utils.clip_grad_norm_(found, 1.0, float("inf")).full_tensor().item()


@OF_OUR_CLASS
def test_the_largest_entry_where_a_rank_has_none_of_a_parameter() -> None:
    assert run_ranks(_largest_entry, 2) == [3.0, 3.0]


@OF_OUR_CLASS
def test_a_scaled_step_is_left_out_on_all_ranks_where_one_overflows() -> None:
    assert run_ranks(_overflow, 2) == [[(2.0, 6.0), (2.0, 6.0)]] * 2


@pytest.fixture
def gradient(tmp_path: Path) -> Iterator[Gradient]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    full = distribute_tensor(torch.arange(6.0).view(2, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
    yield Gradient.of(full._local_tensor, full._spec)
    dist.destroy_process_group()


def test_it_is_copied_pickled_and_computed_with_as_a_dtensor(gradient: Gradient) -> None:
    assert type(copy.deepcopy(gradient)) is DTensor
    behind = Gradient.of(torch.arange(12.0)[6:].view(2, 3), gradient._spec)  # a part of a larger tensor
    assert copy.deepcopy([behind, behind])[1].to_local().tolist() == [[6, 7, 8], [9, 10, 11]]
    assert type(gradient * 2) is DTensor
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is DTensor
    total = gradient
    total += gradient
    assert total is gradient
    assert gradient.full_tensor().tolist() == [[0, 2, 4], [6, 8, 10]]
    gradient.zero_()
    assert not gradient.to_local().any()
    parameter = nn.Parameter(distribute_tensor(torch.ones(2, 3), gradient.device_mesh, [Shard(0)]))
    parameter.grad = gradient + 1
    parameter.grad = Gradient.of(parameter.grad._local_tensor, parameter.grad._spec)
    twice = copy.deepcopy(parameter)
    assert torch.equal(twice.grad.to_local(), torch.ones(2, 3))


@OF_OUR_CLASS
def test_what_clips_and_updates_is_done_on_local_parts(gradient: Gradient, monkeypatch: pytest.MonkeyPatch) -> None:
    """DTensor's own way takes Python per tensor; what it gives is the same."""
    asked: list[object] = []

    def plain(value: object) -> object:
        asked.extend([value] if isinstance(value, Gradient) else [])
        return _plain(value)

    parameter = nn.Parameter(distribute_tensor(torch.ones(2, 3), gradient.device_mesh, [Shard(0)]))
    parameter.grad = gradient
    ours, other = gradient, Gradient.of(torch.ones(2, 3), gradient._spec)
    held = DTensor(torch.ones(2, 3), gradient._spec, requires_grad=False)
    nn.utils.clip_grad_norm_([parameter], 100.0)  # asks DTensor once how a norm lies
    monkeypatch.setattr("autopar.modules.gradient._plain", plain)
    total = nn.utils.clip_grad_norm_([parameter, parameter], 100.0)
    with torch.no_grad():
        torch._foreach_mul_([ours, other], 2.0)
        torch._foreach_add_([held], [ours], alpha=-0.5)
        held.sub_(other)
        ours.add_(other).mul_(0.5)
    assert not asked
    assert total.to_local().item() == pytest.approx((2 * 55) ** 0.5)
    assert (torch.tensor(2.0) * total).to_local().item() == pytest.approx(2 * (2 * 55) ** 0.5)
    assert not asked
    assert ours.to_local().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert held.to_local().tolist() == [[-1, -2, -3], [-4, -5, -6]]
    rows = torch.stack([ours, other])  # of matrices a dim comes before the one that is split
    assert len(asked) == 2
    assert (type(rows), rows.placements) == (DTensor, (Shard(1),))


def test_a_compiled_optimizer_takes_them_after_dtensors(gradient: Gradient) -> None:
    """Torch keeps compiled code by what a tensor says of itself."""
    found = []
    for each in (gradient.plain(), gradient):
        parameter = nn.Parameter(distribute_tensor(torch.ones(2, 3), gradient.device_mesh, [Shard(0)]))
        parameter.grad = each
        torch.compile(torch.optim.SGD([parameter], lr=0.5).step, backend="aot_eager")()
        found.append(parameter.detach().full_tensor())
    assert torch.equal(found[0], 1 - 0.5 * torch.arange(6.0).view(2, 3))
    assert torch.equal(found[0], found[1])
