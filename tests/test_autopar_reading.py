"""Models that read values of their inputs, on real ranks whose batches give different values, against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autopar
from autopar import examples
from autopar.modules import reading
from autopar.modules.reading import MOST_GRAPHS
from passes.errors import CaptureError

OPTIONS = autopar.Options(compile=False)


class Branches(nn.Module):
    """Takes another way where some batch row has padding, and cuts the sequence at the longest row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(-1).max().item())
        x = self.embed(ids[:, :longest])
        if not mask.all():
            x = x * mask[:, :longest].unsqueeze(-1)
        return self.down(torch.relu(self.up(x))).square().mean()


def batch(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(6) < torch.tensor(lengths).unsqueeze(-1)


BATCHES = [
    batch(1, [6, 6, 5, 2]),  # rank 0's part alone has no padding
    batch(2, [3, 4, 2, 4]),
    batch(3, [6, 6, 6, 6]),
    batch(4, [1, 2, 6, 5]),  # the same graph as the first
]


def eager(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids, mask)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _train(rank: int, ranks: int, planned: bool) -> int:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    part = mesh.get_local_rank("dp")
    model = Branches()

    def mine(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return ids.chunk(2)[part], mask.chunk(2)[part]

    if planned:
        plan = autopar.plan(model, mesh, mine(*BATCHES[0]), strategy="megatron", options=OPTIONS)
        module = autopar.apply(model, autopar.Plan.from_json(plan.to_json()), mesh)
    else:
        module = autopar.parallelize(model, mesh, mine(*BATCHES[0]), options=OPTIONS)
    for ids, mask in [*BATCHES, *BATCHES]:
        wanted, gradients = eager(model, ids, mask)
        module.zero_grad()
        loss = module(*mine(ids, mask))
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
    (graphs,) = module.__dict__["_autopar"].executables.values()
    return len(graphs)


@pytest.mark.parametrize("planned", [False, True])
def test_each_batch_runs_the_graph_of_its_values(planned: bool) -> None:
    assert run_ranks(_train, 4, planned) == [3] * 4


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum() * float(x.max())


def _never_the_same(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    module = autopar.parallelize(Grows(), mesh, (torch.zeros(2, 2),), options=OPTIONS)
    try:
        for step in range(MOST_GRAPHS + 1):
            module(torch.full((2, 2), float(step)))
    except CaptureError as error:
        return str(error)
    return ""


def test_a_value_that_is_never_the_same_is_an_error_that_names_the_line() -> None:
    (told,) = run_ranks(_never_the_same, 1)
    assert "test_autopar_reading.py" in told
    assert "16 different" in told


class Queue(nn.Module):
    """Compares each batch with the last rows, which it writes at a place that it keeps in a buffer."""

    def __init__(self, keeps_tensors: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.keeps_tensors = nn.Linear(4, 4), keeps_tensors
        self.register_buffer("rows", torch.randn(80, 4))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y, (count, size) = self.linear(x), (len(x), len(self.rows))
        loss = (y @ self.rows.clone().T).logsumexp(-1).mean()
        with torch.no_grad():
            if self.keeps_tensors:  # as the error says
                self.rows.index_copy_(0, (self.position + torch.arange(count)) % size, y)
                self.position.copy_((self.position + count) % size)
            else:
                place = int(self.position)
                self.rows[place : place + count] = y
                self.position[0] = (place + count) % size
        return loss


def _queued(rank: int, ranks: int, keeps_tensors: bool) -> tuple[str, tuple[str, ...], int]:
    """The error, the notes of the plan, and how many graphs there are."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    batches = torch.randn(MOST_GRAPHS + 6, 4, 4, generator=torch.Generator().manual_seed(1))
    model, alone = Queue(keeps_tensors), Queue(keeps_tensors)
    module = autopar.parallelize(model, mesh, (batches[0].chunk(ranks)[rank],), options=OPTIONS)
    told = ""
    try:
        for x in batches:
            torch.testing.assert_close(module(x.chunk(ranks)[rank]).detach(), alone(x).detach())
    except CaptureError as error:
        told = str(error)
    (graphs,) = module.__dict__["_autopar"].executables.values()
    return told, graphs[-1].local.program.notes, len(graphs)


def test_a_position_in_a_buffer_is_told_with_what_does_instead() -> None:
    for told, notes, graphs in run_ranks(_queued, 2, False):
        assert graphs == MOST_GRAPHS
        assert "writes to the buffer position: keep it a tensor" in told
        assert "pad the inputs" not in told
        assert any("writes to the buffer position" in note for note in notes)


def test_a_position_that_stays_a_tensor_is_one_graph() -> None:
    assert run_ranks(_queued, 2, True) == [("", (), 1)] * 2


class Curriculum(nn.Module):
    """Reads buffers that are written between calls: by a user, a checkpoint, and training for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("kept", torch.tensor(2))
        self.register_buffer("spans", torch.tensor([1.0, 2.0]))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.scale.copy_(y.detach().std())
            self.ready.fill_(True)
        elif self.ready:
            y = y / self.scale
        return y[:, : int(self.kept)].square().sum() * sum(self.spans.tolist())


def _kept_by_hand(model: Any, kept: int) -> None:
    with torch.no_grad():
        model.kept.fill_(kept)


def _kept_of_checkpoint(model: Any, kept: int) -> None:
    model.load_state_dict({"kept": torch.tensor(kept)}, strict=False)


def _kept_through_data(model: Any, kept: int) -> None:
    model.kept.data.fill_(kept)


def _kept_as_another(model: Any, kept: int) -> None:
    model.kept = torch.tensor(kept)


def _spans(model: Any, span: int) -> None:
    with torch.no_grad():
        model.spans.mul_(span)


WRITES = [_kept_by_hand, _kept_of_checkpoint, _kept_through_data, _kept_as_another, _spans]


def _curriculum(rank: int, ranks: int) -> tuple[int, ...]:
    """How often guards were computed: in a second call of a kind, in more of them, and in what follows writes."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    alone = Curriculum().eval()
    model = autopar.parallelize(Curriculum().eval(), mesh, (x.chunk(ranks)[rank],), options=OPTIONS)
    computed, compute = [0], reading.broken

    def counted(*args: Any) -> Any:
        computed[-1] += 1
        return compute(*args)

    def same() -> None:
        torch.testing.assert_close(model(x.chunk(ranks)[rank]).detach(), alone(x).detach())

    reading.broken = counted
    for _ in range(2):
        same()
        computed.append(0)
    for each in (model, alone):
        each.train()
    same()
    for each in (model, alone):
        each.eval()
    computed.append(0)
    same()
    for write, value in zip(WRITES * 2, (3, 2, 4, 1, 2, 2, 3, 1, 4, 3), strict=True):
        for each in (model, alone):
            write(each, value)
        same()
    return tuple(computed)


def test_a_value_of_a_buffer_is_read_again_where_it_was_written_to() -> None:
    for first, more, *_, after in run_ranks(_curriculum, 2):
        assert first == 1
        assert more == 0
        assert after > 0


def _never_the_same_buffer(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = autopar.parallelize(Curriculum(), mesh, (torch.ones(4, 4),), options=OPTIONS)
    try:
        for step in range(MOST_GRAPHS + 1):
            _kept_by_hand(model, step)
            model(torch.ones(4, 4))
    except CaptureError as error:
        return str(error)
    return ""


def test_a_buffer_that_is_never_the_same_is_an_error_that_says_what_would_do() -> None:
    (told,) = run_ranks(_never_the_same_buffer, 1)
    assert "test_autopar_reading.py" in told
    assert "the buffer kept, which is written to between calls: keep it a tensor" in told


def test_a_buffer_is_as_it_was_until_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, whose values are not looked at."""
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    buffer = torch.zeros(3)
    seen = reading.Seen.of(buffer)
    assert seen.is_now(buffer)
    assert not seen.is_now(buffer.clone())
    buffer[1:].fill_(1)
    assert not seen.is_now(buffer)
    assert seen.values.tolist() == [0, 0, 0]
    seen = reading.Seen.of(buffer)
    buffer.data = torch.ones(3)
    assert not seen.is_now(buffer)
    with torch.inference_mode():
        buffer = torch.zeros(3)
    assert not reading.Seen.of(buffer).is_now(buffer)


class Counts(nn.Module):
    """Scales by a number that it counts up in each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.tensor(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.linear(x) * int(self.calls)
        self.calls += 1
        return {"loss": scores.square().mean(), "scores": scores}


def _through_scores(rank: int, ranks: int) -> list[list[float]]:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    model = autopar.parallelize(Counts(), mesh, (torch.ones(3, 4),), options=OPTIONS)
    found = []
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(3, 4))["scores"].full_tensor().sum().backward()
        found.append(model.linear.bias.grad.full_tensor().tolist())
    return found


def test_a_gradient_beside_the_loss_is_that_of_the_number_which_the_forward_read() -> None:
    """Its program is made in backward, when the buffer holds the next call's number."""
    (found,) = run_ranks(_through_scores, 1)
    assert found == [[3.0] * 4, [6.0] * 4]


def test_a_plan_keeps_the_values_that_its_graph_follows_from() -> None:
    ids, mask = BATCHES[0]
    call: Any = examples.call_of(Branches(), (ids, mask))
    _, kept = examples.restored(examples.described(call, ("mask",)))
    assert kept["ids"].is_meta
    assert torch.equal(kept["mask"], mask)
