from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_models import MOE, build_moe
from parity import captured, errors, planned
from ranks import run_ranks
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

import autopar
from passes.capture.capture import capture
from passes.errors import CaptureError
from passes.padding.paddings import PaddingsOf
from passes.program.program import Program
from passes.program.routed_ops import ROUTED_MM, TAKE_ROWS
from passes.rewrite.ledger import ledger
from passes.rules.call import Call, TensorFacts
from passes.rules.work import work_of
from passes.tokens.routing import has_routed, route_by_blocks, token_parts

DP_TP = {"dp": 2, "tp": 2}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("mixtral", "auto"),
        ("mixtral", "megatron"),
        ("mixtral", "fsdp"),
        ("qwen3_moe", "auto"),
        ("deepseek_v3", "megatron"),
    ],
)
def test_routed_experts_compute_what_one_device_does(name: str, strategy: str) -> None:
    """The auxiliary loss of Mixtral's router is a product of two means over the global batch."""
    model, kwargs = build_moe(name)
    mesh = DP_TP if strategy == "auto" else {"dp": 2, "tp": 4}
    _, _, local = planned(captured(model, kwargs), mesh, strategy)
    found = errors(model, local, kwargs)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


def _targets(program: Program) -> list[object]:
    return [node.target for node in program.graph.graph.nodes]


def test_fewer_experts_than_ranks_are_not_padded() -> None:
    """4 experts on 8 ranks: an eighth each, along another dim; and the numbers of one device."""
    model, kwargs = build_moe("mixtral")
    inputs = {name: value[:1] for name, value in kwargs.items()}
    options = autopar.Options(progress=False)
    plan = autopar.plan(model, {"dp": 8}, inputs, hardware="h100", strategy="fsdp", options=options)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            placed = plan.placements[name]
            assert placed.bytes == placed.count * parameter.nbytes // 8
    assert autopar.verify(model, {"dp": 8}, inputs, hardware="h100", strategy="fsdp", options=options).ok


@pytest.mark.parametrize("name", MOE)
def test_tokens_of_a_split_batch_stay_where_they_are(name: str) -> None:
    """A model whose weights are whole on every rank exchanges sums alone: gradients, losses, the router's means."""
    model, kwargs = build_moe(name)
    _, _, local = planned(captured(model, kwargs), {"dp": 4}, "ddp")
    assert {issued.kind for issued in ledger(local)} == {"all_reduce"}
    assert not any("routed together" in note for note in local.program.notes)


def _through(program: Program, model: nn.Module, kwargs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the program's graph gives on real tensors."""
    known = dict(model.named_parameters()) | dict(model.named_buffers()) | kwargs
    values = [torch.ones(()) if one.kind == "tangent" else known[one.name].detach() for one in program.inputs]
    return list(fx.Interpreter(program.graph).run(*values))


def test_routing_by_blocks_is_exact() -> None:
    model, kwargs = build_moe("mixtral")
    program = captured(model, kwargs)
    assert has_routed(program)
    wanted = _through(program, model, kwargs)
    for blocks in (2, 8, 16):
        found = route_by_blocks(program, blocks)
        assert TAKE_ROWS in _targets(found)
        assert TAKE_ROWS not in _targets(program)
        for one, other in zip(_through(found, model, kwargs), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


COUNTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "histc": lambda expert, ordered: torch.histc(ordered.float(), bins=4, min=0, max=3),
    "histc, as torchtitan": lambda expert, ordered: torch.histc(expert.view(-1, 2).float(), bins=4, min=0, max=4),
    "bincount": lambda expert, ordered: torch.bincount(expert, minlength=4),
    "one_hot": lambda expert, ordered: F.one_hot(expert.view(-1, 2), 4).sum((0, 1)),
    "scatter_add": lambda expert, ordered: torch.zeros(4).scatter_add(0, ordered, torch.ones(ordered.shape)),
    "index_add": lambda expert, ordered: torch.zeros(4).index_add(0, ordered, torch.ones(ordered.shape)),
}
"""How many rows each of four experts has."""
UNTOLD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "each twice": lambda expert, ordered: torch.bincount(expert, minlength=4) // 2 * 2,
    "first rows": lambda expert, ordered: (expert[:4, None] == torch.arange(4)).sum(0),
    "of four rows": lambda expert, ordered: (expert.view(4, -1, 1) == torch.arange(4)).sum((1, 2)),
    "weighted": lambda expert, ordered: torch.bincount(expert, torch.full(expert.shape, 0.5), minlength=4),
    "two in a bin": lambda expert, ordered: torch.histc(ordered.float(), bins=4, min=0, max=7),
    "but the last": lambda expert, ordered: torch.histc(ordered.float(), bins=4, min=0, max=2),
    "half of each": lambda expert, ordered: torch.zeros(4).index_add(0, ordered, torch.ones(ordered.shape), alpha=0.5),
    "as many each": lambda expert, ordered: torch.tensor([12, 12, 12, 12]),
    "one more each": lambda expert, ordered: torch.ones(4).scatter_add(0, ordered, torch.ones(ordered.shape)),
}
"""Other numbers, which the groups of rows may follow from too."""


class Dropping(nn.Module):
    """Experts with a capacity over the whole batch: which rows are first matters."""

    def __init__(self, order_matters: bool, counted: str = "histc") -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.weight = nn.Parameter(torch.randn(4, 16, 16) / 4)
        self.order_matters, self.counted = order_matters, counted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 16)
        gate, expert = self.router(flat).softmax(-1).max(-1)
        ordered, places = torch.sort(expert, stable=True)
        rows = flat[places] * gate[places, None]
        if self.order_matters:
            rows = rows * (torch.arange(rows.shape[0]) % 3 != 0)[:, None]
        counts = COUNTS[self.counted](expert, ordered)
        made = torch.ops.transformers.grouped_mm_fallback(rows, self.weight, counts.cumsum(0).to(torch.int32))
        out = torch.zeros_like(flat).index_add(0, places, F.silu(made))
        return out.view_as(x)


@pytest.mark.parametrize("order_matters", [False, True])
def test_rows_are_put_in_another_order_only_where_nothing_can_tell(order_matters: bool) -> None:
    import transformers.integrations.moe  # noqa: F401  registers the op

    torch.manual_seed(0)
    model, x = Dropping(order_matters), torch.randn(8, 6, 16)
    program = captured(model, {"x": x})
    _, _, local = planned(program, {"dp": 2}, "ddp")
    found = errors(model, local, {"x": x})
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found
    assert (TAKE_ROWS in _targets(local.program)) != order_matters
    said = [note for note in local.program.notes if "routed together" in note]
    assert bool(said) == order_matters
    assert not order_matters or "test_passes_routing.py" in said[0]


@pytest.mark.parametrize("counted", [*COUNTS, *UNTOLD])
def test_rows_stay_with_their_tokens_however_experts_are_counted(counted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.moe  # noqa: F401  registers the op

    monkeypatch.setattr(sys.modules[__name__], "COUNTS", COUNTS | UNTOLD)
    torch.manual_seed(0)
    model, x = Dropping(False, counted), torch.randn(8, 6, 16)
    _, _, local = planned(captured(model, {"x": x}), {"dp": 2}, "ddp")
    found = errors(model, local, {"x": x})
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found
    assert (TAKE_ROWS in _targets(local.program)) == (counted not in UNTOLD)


class OfOneMatrix(nn.Module):
    """Experts of one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.weight = nn.Parameter(torch.randn(4, 16, 16) / 4)

    def rows(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts make of tokens, expert by expert, and each row's token."""
        ordered, places = torch.sort(self.router(flat).argmax(-1), stable=True)
        counts = torch.histc(ordered.float(), bins=4, min=0, max=3)
        ends = counts.cumsum(0).to(torch.int32)
        return torch.ops.transformers.grouped_mm_fallback(flat[places], self.weight, ends), places


class SortedBack(OfOneMatrix):
    """Experts whose rows go back by a sort of the places that they were taken from, the last ones first or not."""

    def __init__(self, descending: bool) -> None:
        super().__init__()
        self.descending = descending

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made, places = self.rows(x.reshape(-1, 16))
        back = made[places.argsort(descending=self.descending)]
        return (back.flip(0) if self.descending else back).view_as(x)


@pytest.mark.parametrize("descending", [False, True])
def test_rows_go_back_to_their_tokens_by_a_sort_of_places(descending: bool) -> None:
    import transformers.integrations.moe  # noqa: F401  registers the op

    torch.manual_seed(0)
    model, x = SortedBack(descending), torch.randn(8, 6, 16)
    local = planned(captured(model, {"x": x}), {"dp": 2}, "ddp")[2]
    assert errors(model, local, {"x": x}).output < 1e-5
    assert (TAKE_ROWS in _targets(local.program)) != descending
    assert any("routed together" in note for note in local.program.notes) == descending


def _norms_gradient(rows: torch.Tensor) -> torch.Tensor:
    """One of several results of an op, of which another is a sum over all rows."""
    x = rows.detach()
    _, mean, scale = torch.native_layer_norm(x, [16], None, None, 1e-5)
    weight = torch.ones(16)
    return torch.ops.aten.native_layer_norm_backward(x * x, x, [16], mean, scale, weight, None, [True, True, False])[0]


def _back(places: torch.Tensor) -> torch.Tensor:
    """Where each token's row stands among the experts' rows."""
    return torch.empty_like(places).index_put((places,), torch.arange(48))


TELLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sums so far": lambda rows, places: rows.cumsum(0),
    "the row before": lambda rows, places: rows + rows.roll(1, 0),
    "pairs of rows": lambda rows, places: rows + rows.view(-1, 2, 16).sum(1).repeat_interleave(2, 0),
    "the first rows": lambda rows, places: rows * rows[torch.tensor([0, 1, 5])].detach().sum(),
    "a row for each": lambda rows, places: rows[torch.arange(48).flip(0)],
    "counted rows": lambda rows, places: rows * torch.arange(48)[:, None],
    "counted rows, cast and viewed": lambda rows, places: rows * torch.arange(48).double().view(48, 1).float(),
    "rows times rows": lambda rows, places: rows + rows.repeat(1, 3) @ rows / 16,
    "a norm's gradients, counted": lambda rows, places: (
        rows * (_norms_gradient(rows) * torch.arange(48)[:, None]).sum()
    ),
    "a number put where rows stand": lambda rows, places: (
        rows * torch.zeros(48, 16).index_put((_back(places),), rows.mean())
    ),
    "one row of two": lambda rows, places: (
        rows + torch.zeros(24, 16).index_put((places // 2,), rows).repeat_interleave(2, 0)[places]
    ),
}
"""What notices the order that experts' rows are in."""
KEEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean of all rows": lambda rows, places: rows + rows.square().mean(),
    "mean row": lambda rows, places: rows * rows.mean(0),
    "largest of all rows": lambda rows, places: rows + rows.amax(0),
    "each row's token": lambda rows, places: rows * places[:, None].float().cos(),
    "rows halved": lambda rows, places: rows.view(48, 2, 8).softmax(-1).flatten(1),
}
"""What does not."""


class Ordered(OfOneMatrix):
    """Such experts, with something done to their rows behind them."""

    def __init__(self, done: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.done = done

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 16)
        made, places = self.rows(flat)
        return torch.zeros_like(flat).index_add(0, places, self.done(made, places), alpha=2).view_as(x)


@pytest.mark.parametrize("name", [*TELLS, *KEEPS])
def test_rows_stay_in_the_batchs_order_where_an_op_notices_it(name: str) -> None:
    import transformers.integrations.moe  # noqa: F401  registers the op

    torch.manual_seed(0)
    model, x = Ordered((TELLS | KEEPS)[name]), torch.randn(8, 6, 16)
    program = captured(model, {"x": x})
    blocks = route_by_blocks(program, 4)
    assert (TAKE_ROWS in _targets(blocks)) == (name in KEEPS)
    known = {"x": x, **dict(model.named_parameters())}
    values = [known[one.name].detach() if one.name in known else x for one in program.inputs]
    for one, other in zip(*(fx.Interpreter(p.graph).run(*values) for p in (blocks, program)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class EqualGroups(Ordered):
    """Experts that take a quarter of the sorted rows each, wherever one expert's end."""

    def rows(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.sort(self.router(flat).argmax(-1), stable=True)[1]
        ends = torch.arange(12, 49, 12, dtype=torch.int32)
        return torch.ops.transformers.grouped_mm_fallback(flat[places], self.weight, ends), places


def test_groups_that_no_count_ends_are_of_the_whole_batch() -> None:
    import transformers.integrations.moe  # noqa: F401  registers the op

    program = captured(EqualGroups(lambda rows, places: rows), {"x": torch.randn(8, 6, 16)})
    blocks = route_by_blocks(program, 4)
    assert TAKE_ROWS not in _targets(blocks)
    assert any("groups are not counted from the sorted experts" in note for note in blocks.notes)


def test_what_is_planned_routes_the_tokens_of_each_part() -> None:
    program = captured(Ordered(lambda rows, places: rows), {"x": torch.randn(8, 6, 16)})
    found = PaddingsOf(program, (4, 2), (0,)).under("ddp").whole.program.graph.graph
    takes = found.find_nodes(op="call_function", target=TAKE_ROWS)
    assert {node.args[-1] for node in takes} == {4}


def test_rows_are_added_into_a_table_of_more_than_the_tokens() -> None:
    """A rank's tokens are no half of it."""
    import transformers.integrations.moe  # noqa: F401  registers the op

    torch.manual_seed(0)
    model = Ordered(lambda rows, places: torch.zeros(96, 16).index_add(0, places, rows)[places])
    x = torch.randn(8, 6, 16)
    local = planned(captured(model, {"x": x}), {"dp": 2}, "ddp")[2]
    assert TAKE_ROWS in _targets(local.program)
    assert errors(model, local, {"x": x}).output < 1e-5


def _routed(experts: int, rows: int, k: int, n: int) -> Call:
    facts = [TensorFacts(shape, torch.bfloat16) for shape in ((rows, k), (experts, k, n), (1, experts + 1))]
    return Call(ROUTED_MM, {}, tuple(facts), (TensorFacts((rows, n), torch.bfloat16),))


def test_the_arithmetic_of_experts_is_priced() -> None:
    """Each of 1024 rows is multiplied once; a rank with 2 of 8 experts multiplies a quarter of the rows."""
    call = _routed(8, 1024, 64, 32)
    whole = work_of(call, [(1024, 64), (8, 64, 32), (1, 9)], [(1024, 32)])
    assert whole.flops == 2 * 1024 * 64 * 32
    share = work_of(call, [(1024, 64), (2, 64, 32), (1, 9)], [(1024, 32)])
    assert share.flops == whole.flops / 4
    inner = work_of(call, [(1024, 32), (8, 32, 32), (1, 9)], [(1024, 32)])
    assert inner.flops == whole.flops / 2


def test_pinned_experts_are_split_by_expert() -> None:
    """Half of the experts per rank, in masked groups: their rows' outputs are summed over the axis."""
    model, kwargs = build_moe("mixtral")
    pins = {"model.layers.*.mlp.experts.*": "RS(0)"}
    made = autopar.verify(model, DP_TP, kwargs, options=autopar.Options(pins=pins))
    assert made.ok, made


def _step(rank: int, ranks: int) -> float:
    """Worst relative error of the loss and of the gradients on real ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model, kwargs = build_moe("mixtral")
    reference, _ = build_moe("mixtral")
    wanted = reference(**kwargs).loss
    wanted.backward()
    local = {name: x.chunk(2)[mesh.get_local_rank("dp")] for name, x in kwargs.items()}
    options, worst = autopar.Options(compile=False), 0.0
    for strategy in ("auto", "megatron"):
        plan = autopar.plan(model, mesh, local, strategy=strategy, options=options)
        parallel = autopar.apply(model, plan, mesh)
        loss = parallel(**local).loss
        loss.backward()
        worst = max(worst, abs((loss - wanted) / wanted).item())
        for name, parameter in parallel.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            expected = dict(reference.named_parameters())[name].grad
            worst = max(worst, ((parameter.grad.full_tensor() - expected).norm() / expected.norm()).item())
    return worst


def test_experts_on_real_ranks() -> None:
    assert max(run_ranks(_step, 4, timeout_s=200)) < 1e-4


def test_experts_in_a_python_loop_are_refused_with_what_to_do() -> None:
    model, kwargs = build_moe("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(CaptureError, match=r"modeling_mixtral.py:\d+.*set_experts_implementation\('grouped_mm'\)"):
        capture(model, (), kwargs)


def test_experts_whose_widths_a_grouped_product_refuses_get_its_own_error_alone() -> None:
    sizes = {"hidden_size": 20, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=32)).bfloat16()
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(CaptureError, match="multiple of 16 bytes") as caught:
        capture(model, (), {"input_ids": ids, "labels": ids})
    assert "5.23" not in str(caught.value)


def test_products_of_groups_of_any_number_of_rows() -> None:
    """Two blocks, groups of 0 to 70 rows and some behind the last: each row times its expert's matrix, by hand."""
    torch.manual_seed(0)
    rows, matrices, gradient = torch.randn(208, 128), torch.randn(3, 128, 256), torch.randn(208, 256)
    bounds = torch.tensor([[0, 70, 70, 102], [0, 1, 65, 104]], dtype=torch.int32)
    made = torch.ops.autopar.routed_mm(rows, matrices, bounds)
    by_matrix = torch.ops.autopar.routed_mm_weight(rows, gradient, bounds)
    wanted = torch.zeros_like(matrices)
    for block, cuts in enumerate(bounds.tolist()):
        for row in range(104):
            expert = sum(row >= cut for cut in cuts) - 1
            at = 104 * block + row
            if expert < 3:
                assert torch.allclose(made[at], rows[at] @ matrices[expert], rtol=1e-4, atol=1e-4)
                wanted[expert] += torch.outer(rows[at], gradient[at])
    assert torch.allclose(by_matrix, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "shape", "parts"),
    [
        ("ddp", (16, 6), 4),  # the batch axis alone splits the batch
        ("fsdp", (16, 6), 8),  # both axes do
        ("fsdp", (4, 6), 8),  # a sample per data-parallel rank, its sequence in two
        ("fsdp", (4, 7), 4),
        ("fsdp", (4,), 4),  # no sequence
        ("fsdp", (12, 6), 4),  # three samples per rank
        ("fsdp", None, 4),  # no batch
    ],
)
def test_under_fsdp_all_axes_split_the_batch_else_the_sequence(
    strategy: str, shape: tuple[int, ...] | None, parts: int
) -> None:
    given = fx.Graph().placeholder("ids")
    given.meta["val"] = torch.empty(shape or (), device="meta")
    program: Any = SimpleNamespace(batch_dims={given: 0} if shape else {})
    assert token_parts(program, strategy, (4, 2), (0,)) == parts
