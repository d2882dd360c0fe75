"""Rows of the batch taken in turns: the numbers of one device, and each rank's turns of its own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity import assert_near, captured, errors, planned
from ranks import run_ranks
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autopar
from autopar import Options
from passes.padding.paddings import PaddingsOf
from passes.program.program import Program
from passes.rewrite.ledger import ledger
from passes.tokens.turns import take_turns_by_blocks, turns_of

aten = torch.ops.aten
BATCH, LENGTH, WIDTH, VOCAB, IGNORED = 8, 8, 16, 32, 3
Loss = Callable[[Tensor, nn.Linear, Tensor], Tensor]


class Tokens(nn.Module):
    """Tokens that see those before them, and a loss on all of them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.embed, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        return {"loss": self.loss((x + self.mix(x).cumsum(1)).tanh(), self.head, labels)}


def _turns(h: Tensor, labels: Tensor, turns: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(h.flatten(0, 1).chunk(turns), labels.flatten().chunk(turns), strict=True)


def _chunks(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    total = sum(F.cross_entropy(head(x), y, reduction="sum") for x, y in _turns(h, labels))
    return total / labels.numel()  # type: ignore[return-value]


def _slices(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The last has fewer rows."""
    flat, targets = h.reshape(-1, WIDTH), labels.view(-1)
    total, count = torch.zeros(()), 0
    for i in range(0, len(flat), 24):
        total = total + F.cross_entropy(head(flat[i : i + 24]), targets[i : i + 24], reduction="sum", ignore_index=3)
        count = count + (targets[i : i + 24] != IGNORED).sum()
    return total / count


def _shifted(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Turns of 14 rows, which 4 does not divide."""
    losses = [F.cross_entropy(head(x), y, reduction="sum") for x, y in _turns(h[:, :-1], labels[:, 1:])]
    return torch.stack(losses).mean() / 50


def _checkpointed(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    def one(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, ignore_index=IGNORED, reduction="sum")

    total = sum(checkpoint(one, x, y, use_reentrant=False) for x, y in _turns(h, labels))
    return total / (labels != IGNORED).sum()


def _each(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """A loss for each token, whose square counts; and a reward that a linear layer adds in each turn."""
    losses = torch.cat([F.cross_entropy(head(x), y, reduction="none") for x, y in _turns(h, labels)])
    reward = sum(head(x.sin())[:, 0].sum() + head(x).sum() for x, _ in _turns(h, labels))
    return losses.view_as(labels)[:, 1:].square().mean() + reward / 100


def _layer(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    h = torch.cat([head(x).relu() @ head.weight for x in h.flatten(0, 1).split(16)]).view_as(h)
    return F.cross_entropy(head(h).flatten(0, 1), labels.flatten())


class Fused(torch.autograd.Function):
    """Gradients made in forward and written where they belong, as kernels do that fuse a layer with its loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        of_x, of_weight, loss = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros(())
        for i in range(0, len(x), 16):
            rows, wanted = x[i : i + 16], target[i : i + 16, None]
            scores = (rows @ weight.t()).log_softmax(-1)
            loss -= scores.gather(1, wanted).sum()
            gradient = scores.exp().scatter_add_(1, wanted, torch.full(wanted.shape, -1.0))
            of_x[i : i + 16] = gradient @ weight
            of_weight += gradient.t() @ rows
        ctx.save_for_backward(of_x, of_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of_x, of_weight = ctx.saved_tensors
        return grads[0] * of_x, grads[0] * of_weight, None


def _fused(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return Fused.apply(h.flatten(0, 1), head.weight, labels.flatten()) / labels.numel()  # type: ignore[no-any-return, no-untyped-call]


def _best(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Each token's highest score, by an op that gives two results, in turns of 14 rows; and their sums in a list."""
    made = [head(x).max(-1).values for x, _ in _turns(h[:, :-1], labels)]
    return torch.cat(made).square().mean() + torch.stack([x.sum() for x in made]).neg().mean() / 9


def _accurate(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Right answers are counted: each turn's argmax numbers the classes by itself."""
    right = sum((head(x).argmax(-1) == y).sum() for x, y in _turns(h, labels))
    return _chunks(h, head, labels) + right


def _summed(of: Callable[[Tensor, Tensor, int], Tensor], length: int = 16) -> Loss:
    """The sum of what turns make of their rows' scores and targets, and of their number."""

    def loss(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        turns = zip(h.flatten(0, 1).split(length), labels.flatten().split(length), strict=True)
        return sum(of(head(x), y, i) for i, (x, y) in enumerate(turns)) / 64  # type: ignore[return-value]

    return loss


def _mean(x: Tensor, y: Tensor, i: int = 0) -> Tensor:
    """Over those of a turn that are not ignored."""
    return F.cross_entropy(x, y, ignore_index=IGNORED, label_smoothing=0.1)


def _each_loss(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, reduction="none")


def _means(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Four turns of 14 rows, computed again in backward."""
    turns = _turns(h[:, :-1], labels[:, 1:])
    return torch.stack([checkpoint(lambda x, y: _mean(head(x), y), x, y, use_reentrant=False) for x, y in turns]).mean()


def _chunk_dim(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Chunks that are a dim of their own, fewer than ranks; a layer before, whose rows are put together again."""
    h = torch.stack([head(x).relu() @ head.weight for x in h.view(2, -1, WIDTH)]).view_as(h)
    return sum(_mean(head(x), y) for x, y in zip(h.view(2, -1, WIDTH), labels.view(2, -1), strict=True))  # type: ignore[return-value]


def _picked(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """As many chunks as samples, by their index."""
    rows, wanted = h.view(BATCH, -1, WIDTH), labels.view(BATCH, -1)
    return torch.stack([_mean(head(rows[i]), wanted[i]) for i in range(BATCH)]).mean()


def _running(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    total = torch.zeros(())
    for x, _ in _turns(h, labels):
        total = (total + head(x).square().sum()) * 0.9
    return total


def _spread(of: Callable[[Tensor], Tensor]) -> Loss:
    """What is made of a list of the turns' losses, or of their right answers; it has no gradient, which would read the
    list too."""

    def loss(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(head(x), y, reduction="sum") for x, y in _turns(h, labels)])
        return losses.mean() / 16 + of(losses.detach()).sum()

    return loss


def _twice(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The first turn's loss counts once more, in the place of the last's."""
    first, *others, last = (F.cross_entropy(head(x), y, reduction="sum") for x, y in _turns(h, labels))
    return torch.stack([first, *others, last]).mean() + torch.stack([first, *others, first]).mean()


MOVED: list[Loss] = [_chunks, _slices, _shifted, _checkpointed, _each, _layer, _fused, _best, _accurate]
NUMBERS: dict[str, Loss] = {
    "means": _means,
    "uneven": _summed(lambda x, y, i: _mean(x, y) * len(y), 24),
    "chunks": _chunk_dim,
    "samples": _picked,
    "weights": _summed(lambda x, y, i: (i + 1) * x.square().sum()),
    "places": _summed(lambda x, y, i: (_each_loss(x, y) * torch.arange(len(y))).sum()),
    "squares": _summed(lambda x, y, i: x.sum().square()),
    "hardest": _summed(lambda x, y, i: _each_loss(x, y).topk(3).values.sum()),
    "smooth": _summed(lambda x, y, i: _each_loss(x, y).logsumexp(0)),
    "shares": _summed(lambda x, y, i: (_each_loss(x, y).softmax(0).detach() * _each_loss(x, y)).sum()),
    "running": _running,
    "twice": _twice,
    "spread": _spread(lambda losses: losses.square()),
    "so far": _spread(lambda losses: losses.cumsum(0)),
    "above": _spread(lambda losses: losses > 50),
}
"""Where it matters to a number of each row which come together."""
ALL_MOVED = {loss.__name__: loss for loss in MOVED} | NUMBERS


def _batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"ids": torch.randint(VOCAB, (BATCH, LENGTH)), "labels": torch.randint(6, (BATCH, LENGTH))}


@pytest.mark.parametrize("loss", [_slices, _shifted, _checkpointed, _fused, _means, _chunk_dim])
def test_ranks_take_turns_with_their_own_rows(loss: Loss) -> None:
    kwargs = _batch()
    model = Tokens(loss)
    program = captured(model, kwargs)
    for strategy, mesh in (("ddp", {"dp": 4}), ("megatron", {"dp": 2, "tp": 2})):
        space, _, local = planned(program, mesh, strategy)
        found = errors(model, local, kwargs)
        assert found.output < 1e-5, found
        assert found.gradient < 1e-4, found
        assert not space.program.notes
        products = local.graph.graph.find_nodes(op="call_function", target=aten.mm.default)
        rows = BATCH * LENGTH // mesh["dp"]
        assert all(rows >= size for node in products for size in node.meta["val"].shape if size not in (WIDTH, VOCAB))
        if strategy == "ddp":
            assert {issued.kind for issued in ledger(local)} == {"all_reduce"}
            held = sum(parameter.numel() for parameter in model.parameters()) * 4
            assert sum(issued.full_bytes for issued in ledger(local)) < held + 200


def _through(program: Program, model: nn.Module, kwargs: dict[str, Tensor]) -> list[Tensor]:
    """What the program's graph gives on real tensors."""
    known = dict(model.named_parameters()) | kwargs
    values = [torch.ones(()) if one.kind == "tangent" else known[one.name].detach() for one in program.inputs]
    return list(fx.Interpreter(program.graph).run(*values))


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", ALL_MOVED)
def test_any_number_of_parts_gives_the_same(name: str, parts: int) -> None:
    kwargs = _batch()
    model = Tokens(ALL_MOVED[name])
    program = captured(model, kwargs)
    found = take_turns_by_blocks(program, parts)
    assert found is not program
    assert not found.notes
    assert found.fingerprint == program.fingerprint
    for one, other in zip(_through(found, model, kwargs), _through(program, model, kwargs), strict=True):
        assert_near(one, other, "")


def test_what_is_planned_takes_turns_in_each_part() -> None:
    program = captured(Tokens(_chunks), _batch())
    planned_for = PaddingsOf(program, (4, 2), (0,)).under("ddp").whole.program
    assert str(planned_for.graph.graph) == str(take_turns_by_blocks(program, 4).graph.graph) != str(program.graph.graph)


def _across(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    x, y = h.flatten(0, 1).chunk(2)
    return (head(x) * head(y)).mean()


def _scaled(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Numbers that both halves' scores are weighted by, across in one and down in the other."""
    x, y = (head(each).view(-1, 4, 4, 2) for each in h.flatten(0, 1).chunk(2))
    return (x * torch.arange(4.0).view(4, 1, 1)).sum() + (y * torch.arange(4.0).view(1, 4, 1)).sum()


def _behind(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Each turn's rows are scaled by what those before it came to."""
    total = head.weight.mean()
    for x, y in _turns(h, labels):
        total = total + _mean(head(x) * total, y)
    return total


def _mixed(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """Half of each of two tensors is written."""
    x, y = h.flatten(0, 1).chunk(2)
    one, other = torch.zeros(64, VOCAB), torch.zeros(64, VOCAB)
    one[:32], other[32:] = head(x), head(y)
    return ((one + other) * one.roll(1, 0)).mean()


def _piled(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The first rows of all turns are added to one another, and so on."""
    rows: Any = sum(head(x) for x, _ in _turns(h, labels))
    return rows.square().mean()  # type: ignore[no-any-return]


def _turned(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The second half first."""
    x, y = h.flatten(0, 1).chunk(2)
    return (torch.cat([head(y), head(x)]) * torch.arange(64)[:, None]).mean()


STAY: dict[str, tuple[Loss, str]] = {
    "ops": (_summed(lambda x, y, i: (x.sin() if i else x.cos()).square().sum()), "not made alike in each turn"),
    "most": (_summed(lambda x, y, i: x.amax((0, 1))), "mixes rows"),
    "pairs": (_summed(lambda x, y, i: (x @ x.t()).sin().sum()), "mixes rows"),
    "statistics": (_summed(lambda x, y, i: (x - x.mean(0)).pow(3).sum()), "sum over rows"),
    "order": (_summed(lambda x, y, i: x.flatten().cumsum(0).sin().sum()), "mixes rows"),
    "dropout": (_summed(lambda x, y, i: F.dropout(x, 0.5).sum()), "each of a turn has its own of"),
    "behind": (_behind, "follows from others"),
    "rounded": (_summed(lambda x, y, i: (x.bfloat16() * _mean(x, y)).sum()), "casts a number"),
    "filled": (_summed(lambda x, y, i: x.masked_fill(x > 0, _mean(x, y)).sum()), "told how many"),
    "across": (_across, "several turns"),
    "scaled": (_scaled, "leaves the program"),
    "mixed": (_mixed, ""),
    "turned": (_turned, ""),
    "piled": (_piled, "several turns"),
}


@pytest.mark.parametrize("name", STAY)
def test_turns_stay_where_it_tells_which_rows_come_together(name: str) -> None:
    loss, why = STAY[name]
    program = captured(Tokens(loss), _batch())
    assert turns_of(program)
    found = take_turns_by_blocks(program, 4)
    assert found.graph is program.graph
    (note,) = set(found.notes) - set(program.notes)
    assert "test_passes_turns.py" in note
    assert why in note, note


def test_other_slices_are_no_turns() -> None:
    """Positions left out, a part of the batch, rows of a weight."""

    def loss(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        weights = head.weight.chunk(2)
        rows = h.flatten(0, 1)[: BATCH * LENGTH // 2]
        return (h[:, 1:] @ weights[0].t()).mean() + (rows @ weights[1].t()).mean()

    program = captured(Tokens(loss), _batch())
    assert not turns_of(program)
    assert take_turns_by_blocks(program, 4) is program


def test_steps_of_a_sequence_are_no_turns() -> None:
    """Also where there are as many of them as samples."""

    def loss(h: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        state = torch.zeros(BATCH, VOCAB)
        for x in h.transpose(0, 1):
            state = (head(x) + state).tanh()
        return F.cross_entropy(state, labels[:, 0])

    assert BATCH == LENGTH
    program = captured(Tokens(loss), _batch())
    assert take_turns_by_blocks(program, 4) is program


def _on_real_ranks(rank: int, ranks: int) -> None:
    kwargs = _batch()
    torch.manual_seed(1)
    eager = Tokens(_means)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = {name: value.chunk(2)[rank // 2] for name, value in kwargs.items()}
    model = autopar.parallelize(eager, mesh, mine, strategy="megatron", options=Options(compile=False))
    found, wanted = model(**mine)["loss"], eager(**kwargs)["loss"]
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert_near(q.grad.full_tensor(), p.grad, name)


def test_real_ranks_give_the_numbers_of_one_device() -> None:
    run_ranks(_on_real_ranks, 4)


class Picked(nn.Module):
    """Of each sample the tokens that are not ignored: how many these are follows from the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        picked = [self.head(self.embed(row[row > IGNORED])) for row in ids.flatten().chunk(len(ids))]
        return {"loss": torch.stack([each.square().mean() for each in picked]).mean()}


def test_a_turn_may_pick_rows_by_their_values() -> None:
    torch.manual_seed(0)
    model, inputs = Picked(), {"ids": torch.randint(0, VOCAB, (4, LENGTH))}
    program = captured(model, inputs)
    assert turns_of(take_turns_by_blocks(program, 1))
    assert errors(model, planned(program, {"dp": 2, "tp": 2}, "fsdp")[-1], inputs).gradient < 1e-5


class Cancelled(nn.Module):
    """Squares of what turns of 48 rows add up to: in each half of the batch much, in both together 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": sum(rows.sum().square() for rows in (x.flatten(0, 1) * self.weight).split(48))}  # type: ignore[dict-item]


def test_sums_in_half_precision_are_rounded_once() -> None:
    """As eager's, neither each row's nor each rank's: of these, 257 is no bf16, nor is any sum of a rank."""
    x = torch.zeros(8, 8, 2, dtype=torch.bfloat16)
    x[:4] = torch.tensor([256.0, 1.0])
    x[4:6] = torch.tensor([-512.0, -2.0])
    x[0, 0, 1] = 2.0
    model = Cancelled()
    assert model(x)["loss"] == 1.0
    _, _, local = planned(captured(model, {"x": x}), {"dp": 2}, "ddp")
    assert errors(model, local, {"x": x}).output == 0.0
