"""The parity certificate: it passes where the ranks compute what one device does, and not where they were broken."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from small_models import BATCH, build
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autopar
from autopar import planning
from autopar.options import Options
from autopar.parity.certificate import Tolerances
from autopar.parity.tensor_errors import compare
from autopar.parity.varied import varied_batch
from autopar.parity.verify import verify
from passes.errors import PlanMismatchError
from passes.parity.simulate import StepValues
from passes.program.local import WAIT, LocalProgram

c10d = torch.ops._c10d_functional
MESH = {"dp": 2, "tp": 2}


def example(name: str) -> tuple[nn.Module, Any]:
    """A small model, and what each of two data-parallel ranks feeds it."""
    model, args, kwargs = build(name)

    def mine(value: Any) -> Any:
        return value[: BATCH // 2] if isinstance(value, torch.Tensor) else value

    names = ("ids", "targets")
    if args and kwargs:
        kwargs, args = {**dict(zip(names, args, strict=True)), **kwargs}, ()
    return model, tuple(map(mine, args)) or {key: mine(value) for key, value in kwargs.items()}


def check(name: str, strategy: str = "megatron", **more: Any) -> Any:
    model, inputs = example(name)
    return verify(model, MESH, inputs, strategy=strategy, hardware="h100", **more)


class Mlp(nn.Module):
    """Dropout, a buffer that the forward changes, a bias whose gradient is zero, a frozen weight."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.key = nn.Linear(16, 16)
        self.query = nn.Linear(16, 16)
        self.out = nn.Linear(16, 64)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.dropout(self.embed(ids))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        x = x + scores.softmax(-1) @ self.frozen(x) - self.mean
        return {"loss": F.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())}


def mlp(dropout: float = 0.0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 8))
    return Mlp(dropout), {"ids": ids, "labels": ids.roll(1, 1)}


@pytest.mark.parametrize(
    ("name", "strategy"), [("llama", "megatron"), ("gpt2", "fsdp"), ("plain", "auto"), ("hand", "auto")]
)
def test_a_right_plan_passes(name: str, strategy: str) -> None:
    model, inputs = example(name)
    found = verify(model, MESH, inputs, strategy=strategy, hardware="h100")
    assert found.ok, str(found)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {t.name for t in found.tensors if t.kind == "gradient"} == trained
    assert {t.name for t in found.tensors if t.kind == "parameter"} == trained
    assert any(t.kind == "output" for t in found.tensors)
    assert found.divergence is None
    assert found.ranks == 4
    assert "PASSED" in str(found)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = mlp()
    before = copy.deepcopy(model.state_dict())
    verify(model, MESH, inputs, hardware="h100")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_buffers_frozen_weights_and_gradients_that_are_zero() -> None:
    found = verify(*mlp_on(MESH), strategy="megatron", hardware="h100")
    assert found.ok, str(found)
    assert [t.name for t in found.tensors if t.kind == "buffer"] == ["mean"]
    gradients = {t.name: t for t in found.tensors if t.kind == "gradient"}
    assert not any(name.startswith("frozen") for name in gradients)
    # softmax does not see what a bias of the keys adds to every score of a query
    assert "zero but for rounding" in gradients["key.bias"].note


class Centred(nn.Module):
    """A batch norm of values whose mean over the batch is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.up(x)
        return {"loss": F.cross_entropy(self.down(self.norm(x - x.mean(0)).relu()), labels)}


def test_a_running_mean_that_is_zero_but_for_rounding_passes() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(8, 8), "labels": torch.randint(0, 4, (8,))}
    found = verify(Centred(), MESH, inputs, hardware="h100")
    assert found.ok, str(found)
    notes = {t.name: t.note for t in found.tensors if t.kind == "buffer"}
    assert notes == {
        "norm.running_mean": "zero but for rounding", "norm.running_var": "", "norm.num_batches_tracked": "",
    }  # fmt: skip


def test_a_buffer_that_is_off_by_more_than_a_rounding_of_those_beside_it_does_not_pass() -> None:
    zero, one, counted = torch.zeros(16), torch.ones(16), torch.tensor(10**9)
    rounding = 2.0**-23  # of 1 in float32

    def passes(**found: torch.Tensor) -> bool:
        wanted = {"norm.mean": zero, "norm.var": one, "norm.steps": counted, "other.scale": 1e6 * one}
        ours = wanted | {f"norm.{name}": value for name, value in found.items()}
        tensors, _ = compare(StepValues({}, ours, {}), StepValues({}, wanted, {}), {}, Tolerances())
        return all(tensor.ok for tensor in tensors)

    assert passes(mean=zero + rounding)
    assert not passes(mean=zero + 2 * rounding)
    assert not passes(mean=zero + 1e-3)
    assert passes(var=one + 2 * rounding)
    assert not passes(var=one + 1e-3)
    assert not passes(steps=counted // 2)


def mlp_on(mesh: dict[str, int], dropout: float = 0.0) -> tuple[nn.Module, dict[str, int], dict[str, torch.Tensor]]:
    model, inputs = mlp(dropout)
    return model, mesh, inputs


class Hooked(nn.Module):
    """A forward that only runs where gradients are wanted: it hooks a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        h.register_hook(lambda gradient: 2 * gradient)
        return self.out(h.tanh()).square().mean()


def test_ranks_of_a_model_that_runs_only_with_gradients_bring_different_values() -> None:
    torch.manual_seed(0)
    found = verify(Hooked(), {"dp": 2}, {"x": torch.randn(4, 8)}, hardware="h100")
    assert found.ok, str(found)
    assert not any("same on every" in note for note in found.notes)


class Policy(nn.Module):
    """A policy gradient of advantages that add up to nothing, so that its loss is zero whatever the parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
        chosen = self.out(x).log_softmax(-1)[:, 3]
        ratio = torch.exp(chosen - chosen.detach())
        return -(ratio * (reward - reward.mean()) / reward.std()).mean()


def test_a_loss_that_is_zero_but_for_rounding_passes() -> None:
    torch.manual_seed(0)
    found = verify(Policy(), {"dp": 4}, {"x": torch.randn(8, 8), "reward": torch.randn(8)}, hardware="h100")
    assert found.ok, str(found)
    assert [t.note for t in found.tensors if t.kind == "output"] == ["zero but for rounding"]


def test_a_loss_that_is_off_by_more_than_a_rounding_of_its_parameters_does_not_pass() -> None:
    small, parameter, gradient = torch.tensor(1e-10), torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0])
    rounding = 5 * 2.0**-23  # of 3 and 4 in float32

    def passes(loss: float, *differentiated: str) -> bool:
        found, wanted = (StepValues({"loss": small + value}, {}, {"p": gradient}) for value in (loss, 0.0))
        tensors, _ = compare(found, wanted, {"p": parameter}, Tolerances(), differentiated=differentiated)
        return all(tensor.ok for tensor in tensors)

    assert passes(0.99 * rounding, "loss")
    assert not passes(1.01 * rounding, "loss")
    assert not passes(0.99 * rounding, "other")


def test_gradients_that_are_all_zero_prove_nothing() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).relu().mul(0).mean()

    found = verify(Flat(), {"dp": 2}, (torch.randn(4, 16),), hardware="h100")
    assert any("every gradient of the reference is zero" in note for note in found.notes)
    assert not any("every gradient" in note for note in check("llama").notes)


def test_dropout_is_held_against_the_captured_graph_and_eval_mode_against_eager() -> None:
    found = verify(*mlp_on(MESH, dropout=0.5), strategy="megatron", hardware="h100", options=Options(seed=3))
    assert found.ok, str(found)
    assert "captured graph" in found.reference
    assert "same seed" in found.reference
    inner = found.without_randomness
    assert inner is not None
    assert inner.ok
    assert "unmodified model" in inner.reference
    assert not inner.training


def test_a_model_on_the_meta_device_gets_values() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(2, 8, dtype=torch.long)
    found = verify(model, MESH, {"input_ids": ids, "labels": ids}, strategy="megatron", hardware="h100")
    assert found.ok, str(found)
    assert any("meta device" in note for note in found.notes)
    assert all(p.is_meta for p in model.parameters())
    assert not any("same on every" in note for note in found.notes)


def test_inputs_that_the_model_cannot_run_on_are_told() -> None:
    ids = torch.full((2, 8), 64)
    with pytest.raises(ValueError, match=r"Mlp fails on one device.*IndexError: index out of range.*example inputs"):
        verify(Mlp(), MESH, {"ids": ids, "labels": ids % 64}, hardware="h100")


def test_bf16_is_allowed_its_own_rounding() -> None:
    model, inputs = example("llama")
    found = verify(model.bfloat16(), MESH, inputs, strategy="megatron", hardware="h100")
    assert found.ok, str(found)
    assert max(t.tolerance for t in found.tensors) == 5e-2
    assert max(t.error for t in found.tensors) > 1e-4


class PartlyLow(nn.Module):
    """Parameters, input and loss in float32; one matrix product that is cast by the model itself, or under autocast."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.cast, self.up, self.down = cast, nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.cast):
            up = self.up(x)
            low = up.bfloat16() @ self.down.weight.t().bfloat16() if self.cast else self.down(up)
        return low.float().square().mean()


@pytest.mark.parametrize("cast", [False, True])
def test_half_precision_inside_is_allowed_its_own_rounding(cast: bool) -> None:
    torch.manual_seed(0)
    found = verify(PartlyLow(cast), MESH, {"x": torch.randn(8, 16)}, strategy="megatron", hardware="h100")
    assert found.ok, str(found)
    assert max(t.error for t in found.tensors) > 1e-4
    assert any("test_autopar_verify.py" in note and "computed in half precision" in note for note in found.notes)


class Checkpointed(nn.Module):
    """Its own product is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = checkpoint(lambda x: self.two(self.one(x).tanh()), x, use_reentrant=False)
        return {"loss": y.square().mean()}


def test_what_a_model_computes_again_in_backward_reads_cast_parameters() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    made = verify(Checkpointed(), {"dp": 2}, {"x": torch.randn(4, 8)}, options=Options(mp_policy=policy))
    assert made.ok, str(made)


def test_tolerances_decide() -> None:
    found = check("hand", tolerances=Tolerances(loss=0.0, gradient=0.0))
    assert not found.ok
    assert "FAILED" in str(found)
    assert not any(t.ok and t.error > 0 for t in found.tensors)


def test_a_plan_made_earlier_is_checked_as_it_is() -> None:
    model, inputs = mlp()
    first = verify(model, MESH, inputs, strategy="fsdp", hardware="h100")
    batch = varied_batch((), inputs, 2, None, None, 1)
    program = planning.captured(model, (), batch.kwargs, batch_dims=batch.batch_dims, batch_size=8)
    plan = planning.planned(
        program, tuple(MESH.items()), batch_axes=(0,), hardware="h100", strategy="fsdp", options=Options(), example=""
    )
    again = verify(model, MESH, inputs, plan=plan)
    assert again.ok
    assert (again.fingerprint, again.collectives) == (first.fingerprint, first.collectives)
    with pytest.raises(PlanMismatchError, match="mesh"):
        verify(model, {"dp": 4}, inputs, plan=plan)
    with pytest.raises(PlanMismatchError, match="graph"):
        verify(model, MESH, {name: value[:, :4] for name, value in inputs.items()}, plan=plan)


def test_the_certificate_is_json() -> None:
    found = json.loads(check("hand", tolerances=Tolerances(gradient=0.0)).to_json())
    assert found["format"] == "autopar-parity"
    assert found["ok"] is False
    assert {t["kind"] for t in found["tensors"]} == {"output", "gradient", "parameter"}


# -- broken on purpose -------------------------------------------------------------------------------------------------


def breaking(monkeypatch: pytest.MonkeyPatch, harm: Any) -> list[str]:
    """Every rank's program is broken by `harm`, which says what it did."""
    done: list[str] = []
    right = planning.rewritten

    def wrong(*args: Any) -> LocalProgram:
        local = right(*args)
        done.append(harm(local.graph.graph))
        local.graph.recompile()
        return local

    monkeypatch.setattr(planning, "rewritten", wrong)
    return done


def test_a_dropped_reduction_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(graph: torch.fx.Graph) -> str:
        waits = [n for n in graph.nodes if n.target == WAIT and n.args[0].target == c10d.all_reduce.default]
        wait = next(n for n in waits if "part_of" in n.meta and n.meta["source"])
        wait.target, wait.args = torch.ops.aten.alias.default, (wait.args[0].args[0],)
        return str(wait.meta["part_of"][0])

    done = breaking(monkeypatch, harm)
    found = check("llama")
    assert not found.ok
    assert found.divergence is not None
    assert found.divergence.node == done[0]
    assert "modeling_llama.py:" in found.divergence.source or "loss" in found.divergence.source
    assert found.divergence.source in str(found)
    assert found.captured_error is not None
    assert found.captured_error < 1e-5
    assert found.double_error is not None
    assert found.double_error > 1e-4, "what is wrong is as wrong in float64"
    assert not found.is_rounding


def test_gradients_that_are_not_averaged_over_ranks_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would not, if all data-parallel ranks were given the same batch."""

    def harm(graph: torch.fx.Graph) -> str:
        results = [n for n in graph.output_node().args[0] if n.target == WAIT]
        wait = next(n for n in results if n.args[0].target == c10d.all_reduce.default)
        wait.target, wait.args = torch.ops.aten.mul.Tensor, (wait.args[0].args[0], 2.0)
        return ""

    breaking(monkeypatch, harm)
    model, inputs = mlp()
    found = verify(model, {"dp": 2}, inputs, strategy="ddp", hardware="h100")
    assert not found.ok
    wrong = [t.name for t in found.tensors if not t.ok and t.kind == "gradient"]
    assert len(wrong) == 1 or "replicas" in found.failure
    assert found.divergence is not None


def test_a_wrong_captured_graph_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks do what the graph says, but the graph is not the model: the line on capture says so."""
    right = planning.captured

    def wrong(*args: Any, **kwargs: Any) -> Any:
        program = right(*args, **kwargs)
        node = program.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
        with program.graph.graph.inserting_after(node):
            off = program.graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.01))
        off.meta = dict(node.meta)
        node.replace_all_uses_with(off, delete_user_cb=lambda user: user is not off)
        program.graph.recompile()
        return program

    monkeypatch.setattr(planning, "captured", wrong)
    found = check("hand")
    assert not found.ok
    assert found.divergence is None
    assert found.captured_error is not None
    assert found.captured_error > 1e-4
    assert found.double_error is not None
    assert found.model_double_error is not None
    assert found.double_error < 1e-12, "the ranks do what the graph says"
    assert found.model_double_error > 1e-4
    assert not found.is_rounding


def test_a_model_that_blows_up_roundings_is_told_apart() -> None:
    """Forty steps of a logistic map blow an error up a millionfold; ranks add a batch's mean up in another order."""

    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x)
            x = (x - x.mean(0)).sigmoid()
            for _ in range(40):
                x = 3.9 * x * (1 - x)
            return x.mean()

    torch.manual_seed(0)
    model = Chaotic()
    before = copy.deepcopy(model.state_dict())
    found = verify(model, {"dp": 2}, (torch.randn(32, 16),), strategy="ddp", hardware="h100")
    assert not found.ok
    assert found.rounding_error is not None
    assert found.rounding_error > 1e-3
    assert found.is_rounding
    assert found.double_error is not None
    assert found.double_error < 1e-6, "2^-29 of what a millionfold of 1e-7 is"
    assert "may be rounding alone" in " ".join(str(found).split())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Dropped(nn.Module):
    """Blows roundings up a thousandfold behind dropout, where only the captured graph can be held against."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.up(x))
        x = (x - x.mean(0)).sigmoid()
        for _ in range(40):
            x = 3.9 * x * (1 - x)
        return x.mean()


def test_roundings_are_told_apart_where_the_step_draws_random_numbers_too() -> None:
    torch.manual_seed(0)
    found = verify(Dropped(), {"dp": 2}, (torch.randn(32, 16),), strategy="ddp", hardware="h100")
    assert not found.ok
    assert found.rounding_error is None
    assert found.double_error is not None
    assert found.double_error < 1e-6
    assert found.model_double_error is None, "eager draws random numbers of its own"
    assert found.is_rounding
    assert "may be rounding alone" in " ".join(str(found).partition("In eval mode")[0].split())


class SingleOnly(nn.Module):
    """Refuses float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.up(x).square().mean()


def test_a_model_that_takes_no_float64_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(graph: torch.fx.Graph) -> str:
        power = graph.find_nodes(op="call_function", target=torch.ops.aten.pow.Tensor_Scalar)[0]
        power.args = (power.args[0], 2.01)
        return ""

    breaking(monkeypatch, harm)
    found = verify(SingleOnly(), {"dp": 2}, (torch.randn(8, 16),), strategy="ddp", hardware="h100")
    assert not found.ok
    assert found.double_error is not None
    assert found.double_error > 1e-4
    assert found.model_double_error is None
    assert "the model does not run in float64: TypeError: float32 only" in found.notes
    assert not found.is_rounding


# -- batches -----------------------------------------------------------------------------------------------------------


def test_ranks_bring_different_values_and_labels_stay_with_their_ids() -> None:
    ids = torch.arange(12).view(2, 6) * torch.tensor([1, 5, 3, 2, 4, 1])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    positions = torch.arange(6).expand(2, 6)
    given = {"ids": ids, "labels": ids + 100, "mask": mask, "positions": positions}
    made = varied_batch((), given, 3, None, None, 0, "order").kwargs
    assert made["ids"].shape == (6, 6)
    assert torch.equal(made["ids"][:2], ids)
    for rank in (1, 2):
        mine = made["ids"][2 * rank : 2 * rank + 2]
        assert not torch.equal(mine, ids)
        assert torch.equal(mine.sort().values, ids.sort().values)
    assert torch.equal(made["labels"], made["ids"] + 100)
    assert torch.equal(made["mask"], mask.repeat(3, 1))
    assert torch.equal(made["positions"], positions.repeat(3, 1))


def test_ids_are_exchanged_for_one_another() -> None:
    ids = torch.tensor([[3, 5, 5, 9, 7, 3], [5, 5, 5, 2, 3, 8]])
    labels = ids.clone()
    labels[:, 0] = -100
    made = varied_batch((), {"ids": ids, "targets": ids, "labels": labels}, 2, None, None, 0).kwargs
    assert torch.equal(made["ids"], made["targets"])
    mine = made["ids"][2:]
    assert set(mine.flatten().tolist()) == set(ids.flatten().tolist())
    assert not torch.equal(mine.sort().values, ids.sort().values)
    assert sorted(mine.flatten().bincount().tolist()) == sorted(ids.flatten().bincount().tolist())
    assert (made["labels"] == -100).sum() == 4
    assert set(made["labels"].flatten().tolist()) == set(labels.flatten().tolist())


def test_a_model_that_counts_ids_gets_another_order_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)

        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            if not ids.is_meta and type(ids) is torch.Tensor and int((ids == 7).sum()) % 3:
                raise ValueError("images and their placeholders differ in number")
            return {"loss": self.embed(ids).square().cumsum(1).mean()}

    ids = torch.tensor([[7, 7, 7, 1, 2, 3], [7, 7, 7, 3, 5, 2]])
    found = verify(Counts(), {"dp": 2}, {"ids": ids}, strategy="ddp", hardware="h100")
    assert found.ok, str(found)


def test_a_batch_that_is_the_same_on_every_rank_is_told() -> None:
    same = torch.ones(2, 6, dtype=torch.long)
    assert any("same on every" in note for note in varied_batch((same,), {}, 2, None, None, 0).notes)
    tokens = varied_batch((), {"input_ids": same}, 2, None, 50, 0)
    assert not tokens.notes
    assert not torch.equal(tokens.kwargs["input_ids"][:2], tokens.kwargs["input_ids"][2:])


class Pads(nn.Module):
    """A loss over the tokens that are no padding: how many there are shapes the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = (ids.flatten() != 0).nonzero().squeeze(1)
        return nn.functional.cross_entropy(self.head(self.embed(ids.flatten()[rows])), ids.flatten()[rows])


def test_a_plan_whose_graph_follows_from_values_is_checked_on_values_that_give_it() -> None:
    """Ranks of other values would have other numbers of padding; a plan for another model is refused as ever."""
    torch.manual_seed(0)
    ids = torch.tensor([[3, 0, 5, 0], [7, 7, 0, 2]])
    plan = autopar.plan(Pads(), {"dp": 2, "tp": 2}, (ids,), hardware="cpu")
    certificate = autopar.verify(Pads(), {"dp": 2, "tp": 2}, (ids,), plan=plan)
    assert certificate.ok, certificate
    with pytest.raises(PlanMismatchError):
        autopar.verify(Pads(), {"dp": 2, "tp": 2}, (ids[:, :3],), plan=plan)


def test_a_gradient_that_is_zero_but_for_rounding_leaves_its_parameter_equal() -> None:
    """A bias before a softmax over the sequence: as much of an error as its gradient may have may be in its step."""
    torch.manual_seed(0)
    parameters = {"weight": torch.randn(300, 300), "bias": torch.zeros(2)}
    weight = torch.randn(300, 300)
    wanted = StepValues({}, {}, {"weight": weight, "bias": torch.zeros(2)})
    for off, ok in ((1e-5, True), (1e-3, False)):
        found = StepValues({}, {}, {"weight": weight, "bias": torch.full((2,), off)})
        tensors, _ = compare(found, wanted, parameters, Tolerances())
        assert [tensor.ok for tensor in tensors if tensor.name == "bias"] == [ok, ok]


class OwnKind(nn.Module):
    """Returns a dataclass that each forward makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        @dataclasses.dataclass
        class Result:
            loss: torch.Tensor

        return Result(self.linear(x).square().mean())


def test_outputs_may_be_a_dataclass_that_each_forward_makes() -> None:
    assert verify(OwnKind(), {"dp": 2}, (torch.randn(2, 4),), strategy="ddp").ok
