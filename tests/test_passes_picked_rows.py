"""Mixtures whose code picks the rows of each expert: all ranks simulated, and real ones, against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity import captured, errors, planned
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from passes.capture.guards import broken
from passes.errors import CaptureError

HIDDEN, FFN, EXPERTS, VOCAB = 16, 32, 4, 48
Route = Callable[["Mixture", Tensor, Tensor, Tensor], Tensor]


class Mixture(nn.Module):
    """Top-2 experts, one of which no token is ever sent to."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, FFN), nn.LayerNorm(FFN), nn.Linear(FFN, HIDDEN)) for _ in range(EXPERTS)
        )
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, FFN) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, FFN, HIDDEN) / 4)
        self.register_buffer("avoided", torch.tensor([0.0, 0.0, -1e4, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = (self.gate(flat) + self.avoided).softmax(-1).topk(2, -1)
        return self.route(self, flat, weights, chosen).view_as(x)


class Model(nn.Module):
    """Two mixtures between an embedding and a head."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.mixtures = nn.ModuleList(Mixture(route) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(ids)
        for mixture in self.mixtures:
            x = x + mixture(F.rms_norm(x, (HIDDEN,)))
        logits = self.head(x)
        every = sum(p.sum() for p in self.parameters())  # an expert that is skipped would have no gradient, not zeros
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.0 * every, "logits": logits}


def _built(route: Route) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Model(route), {name: torch.randint(VOCAB, (4, 6)) for name in ("ids", "labels")}


def by_expert(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As `transformers` wrote Mixtral first."""
    out, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for e in range(EXPERTS):
        slot, token = torch.where(mask[e])
        if token.shape[0] == 0:
            continue
        rows = x[None, token].reshape(-1, HIDDEN)
        out.index_add_(0, token, self.experts[e](rows) * weights[token, slot, None])
    return out


def by_experts_hit(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As it did later; each expert's number is a tensor of one element."""
    out, mask = torch.zeros_like(x), F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask[e].squeeze(0))
        rows = x[None, token].reshape(-1, HIDDEN)
        out.index_add_(0, token, (self.experts[e](rows) * weights[token, slot, None]).to(x.dtype))
    return out


def by_numbers(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Weights of all experts in one tensor; one class more than there are experts, which is never hit."""
    out = torch.zeros_like(x)
    with torch.no_grad():
        mask = F.one_hot(chosen, EXPERTS + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for e in hit:
        e = e[0]
        if e == EXPERTS:
            continue
        slot, token = torch.where(mask[e])
        rows = F.silu(x[token] @ self.up[e]) @ self.down[e]
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def written_back(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As Mistral's own code."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        token, nth = torch.where(chosen == e)
        out[token] += weights[token, nth, None] * expert(x[token])
    return out


def by_mask(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Looked up, and written, by a mask; what weighs them is looked up by the same one, made again."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        mask = (chosen == e).any(-1)
        if not mask.any():
            continue
        share = torch.where(chosen == e, weights, 0.0).sum(-1)[(chosen == e).any(-1)]
        out[mask] = out[mask] + share[:, None] * expert(x[mask])
    return out


def by_score(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Picked by numbers that are not zero, by which rows are divided; looked up by row and by expert."""
    out, scores = torch.zeros_like(x), torch.zeros(len(x), EXPERTS).scatter(1, chosen, weights)
    for e, expert in enumerate(self.experts):
        if (scores[:, e] != 0).sum() == 0:
            continue
        (token,) = (scores[:, e] != 0).nonzero(as_tuple=True)
        out = out.index_add(0, token, expert(x[token] / scores[token, e, None]) * scores[token, e, None])
    return out


def written_twice(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Tokens that chose two experts of a group are written twice, the same."""
    out = torch.zeros_like(x)
    for group in range(2):
        token, _ = torch.where(chosen // 2 == group)
        out[token] = self.experts[group](x[token])
    return out * weights.amax(-1, keepdim=True)


def of_sequences(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Rows of tokens in their sequences."""
    shape = 4, 6, HIDDEN
    out, x, share, first = torch.zeros(shape), x.view(shape), weights[:, 0].view(4, 6, 1), chosen[:, 0].view(4, 6)
    for e, expert in enumerate(self.experts):
        mask = first == e
        out[mask] = expert(x[mask]) * share[mask]
    return out


ROUTES = (by_expert, by_experts_hit, by_numbers, written_back, by_mask, by_score, written_twice, of_sequences)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_a_step_is_eager_s(route: Route) -> None:
    model, inputs = _built(route)
    program = captured(model, inputs)
    assert any("a mask picks rows by what parameters or chance say" in note for note in program.notes)
    for mesh, strategy in (({"dp": 2, "tp": 2}, "megatron"), ({"dp": 2, "tp": 3}, "auto")):
        _, _, local = planned(program, mesh, strategy)
        found = errors(model, local, inputs)
        assert found.output < 1e-5, (strategy, found)
        assert found.gradient < 1e-4, (strategy, found)
        mine, whole = _products(local.graph), _products(program.graph)
        assert strategy == "auto" or 4 * mine <= 1.1 * whole, f"a rank of four does {mine / whole:.0%} of the products"


def _products(graph: torch.fx.GraphModule) -> int:
    return sum(
        node.args[-2].meta["val"].numel() * node.args[-1].meta["val"].shape[-1]
        for node in graph.graph.nodes
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
    )


def _trained(rank: int, ranks: int) -> None:
    model, inputs = _built(by_numbers)
    wanted, _ = _built(by_numbers)
    mesh = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
    parallel = autopar.parallelize(model, mesh, mine, strategy="fsdp", options=autopar.Options(compile=False))
    optimizers = [torch.optim.SGD(each.parameters(), 0.5) for each in (parallel, wanted)]
    for _ in range(4):  # the router sends tokens elsewhere from one step to the next
        losses = []
        for each, given, optimizer in zip((parallel, wanted), (mine, inputs), optimizers, strict=True):
            loss = each(**given)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def told(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Reads an expert's number beside a buffer, which may change."""
    for e in F.one_hot(chosen, EXPERTS).sum((0, 1)).nonzero():
        token, nth = torch.where(chosen == e)
        if float(e[0] + self.avoided[0]) < EXPERTS:
            x = x.index_add(0, token, self.experts[int(e)](x[token]) * weights[token, nth, None])
    return x


def test_what_is_read_of_positions_follows_from_no_parameter() -> None:
    for route, buffers in ((by_numbers, 0), (told, 2)):
        model, inputs = _built(route)
        program = captured(model, inputs)
        assert program.guards is None if not buffers else len(program.guards.buffers) == buffers
        if program.guards is not None:
            known = {name: buffer.clone() for name, buffer in model.named_buffers()}
            assert not broken(program.guards, inputs, known)
            known["mixtures.1.avoided"][0] = 7.0
            assert {fixed.value for fixed in broken(program.guards, inputs, known)} == {0.0, 1.0, 2.0, 3.0}


def test_training_on_ranks_is_that_of_one_device() -> None:
    run_ranks(_trained, 2)


def counted(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    token, _ = torch.where(chosen == 0)
    return x + x[token].sum(0) / token.shape[0]


def counted_in_a_tensor(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    token, _ = torch.where(chosen == 0)
    return x * torch.tensor(token.numel())


def counted_by_len(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    token, _ = torch.where(chosen == 0)
    return x + x[token].sum(0) / len(token)


def compared(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    token, _ = torch.where(chosen == 0)
    return x if token.size(0) > 4 else x + x[token].sum(0)


def made_of_as_many(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    token, _ = torch.where(chosen == 0)
    return x * torch.ones(token.shape[0], 1).sum()


def made_alike(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x * torch.ones_like(x[chosen[:, 0] == 0]).sum()


def put_elsewhere(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x.index_put((chosen[:, 0] == 1,), x[chosen[:, 0] == 0])


def put_at_numbers(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    rows = chosen[:, 0] == 0
    return x.index_put((chosen[rows, 1],), x[rows])


def mean_error(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    rows = x[chosen[:, 0] == 0]
    return x + F.mse_loss(rows, rows + 1)


def averaged(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x + x[chosen[:, 0] == 0].mean(0)


def reversed_rows(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x + x[chosen[:, 0] == 0].flip(0).sum(0)


def looked_up_in(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x + x[chosen[:, 0] == 0][torch.tensor([0, 1])].sum(0)


def two_masks(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x + (x[chosen[:, 0] == 0] + x[chosen[:, 0] == 1]).sum(0)


def picked_again(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    rows = x[chosen[:, 0] == 0]
    return x + rows[rows[:, 0] > 0].sum(0)


def added_if_hit(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    for e in F.one_hot(chosen, EXPERTS).sum((0, 1)).nonzero():
        x = x + self.up[e[0]].sum()
    return x


def asked(self: Mixture, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return x * 2 if (weights > 0.9).any() else x


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (counted, "computes with how many rows a mask picks"),
        (counted_in_a_tensor, "computes with how many rows a mask picks"),
        (counted_by_len, "computes with how many rows a mask picks"),
        (compared, "computes with how many rows a mask picks"),
        (averaged, "computes with how many rows a mask picks"),
        (made_of_as_many, "computes with how many rows a mask picks"),
        (made_alike, "computes with how many rows a mask picks"),
        (put_elsewhere, "are written in other places"),
        (put_at_numbers, "are written to places that are not known to differ"),
        (mean_error, "computes with how many rows a mask picks"),
        (reversed_rows, r"are mixed by aten\.flip"),
        (looked_up_in, "are put in another order"),
        (two_masks, "of two masks are taken together"),
        (picked_again, "are picked from again"),
        (added_if_hit, "are among what the step gives"),
        (asked, "reads"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_would_be_wrong_is_refused_with_its_line(route: Route, said: str) -> None:
    model, inputs = _built(route)
    with pytest.raises(CaptureError, match=rf"test_passes_picked_rows\.py:\d+: .*{said}"):
        captured(model, inputs)
