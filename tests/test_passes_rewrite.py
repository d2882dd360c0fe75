"""Planned and rewritten programs, every rank simulated, against the unmodified model on one device."""

from __future__ import annotations

from functools import lru_cache

import pytest
import small_models
import torch
from parity import captured, errors, planned
from small_models import MODELS, build

from passes.rewrite.ledger import Issued, ledger

MESHES = {
    "dp4": ({"dp": 4}, (0,)),
    "dp2-tp2": ({"dp": 2, "tp": 2}, (0,)),
    "hsdp-tp": ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, (0, 1)),
    "tp2": ({"tp": 2}, ()),
}


program_of = lru_cache(small_models.program_of)


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        (strategy, mesh)
        for strategy in ("ddp", "fsdp", "megatron", "auto")
        for mesh, (_, batch_axes) in MESHES.items()
        if batch_axes or strategy in ("megatron", "auto")  # the others leave a tensor axis idle
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_together_computes_what_one_device_does(name: str, strategy: str, mesh: str) -> None:
    model, args, kwargs = build(name)
    shape, batch_axes = MESHES[mesh]
    _, _, local = planned(program_of(name), shape, strategy, batch_axes)
    found = errors(model, local, kwargs, args)
    assert found.output < 1e-5, found
    assert found.gradient < 1e-4, found


def test_compute_is_split_over_the_tensor_axis_under_megatron() -> None:
    """Each matrix product of a layer is half as large on each of two tensor-parallel ranks."""
    model, args, kwargs = build("llama")
    del model, args, kwargs
    program = program_of("llama")
    _, _, local = planned(program, {"tp": 2}, "megatron", ())

    def flops(graph: torch.fx.Graph) -> int:
        total = 0
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            (m, k), (_, n) = (source.meta["val"].shape for source in node.args)
            total += m * n * k
        return total

    assert flops(local.graph.graph) * 2 == flops(program.graph.graph)


def collectives(strategy: str, mesh: dict[str, int], *, length: int = 1024, **sizes: int) -> list[Issued]:
    """What rank 0 issues in a step of a meta-device LLaMA of 3 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=8, vocab_size=8192, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(8, length, dtype=torch.long)
    program = captured(model, {"input_ids": ids, "labels": ids})
    _, _, local = planned(program, mesh, strategy)
    return list(ledger(local))


SMALL = {"hidden_size": 128, "intermediate_size": 256}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632}


def test_megatron_without_sequence_parallelism_all_reduces_twice_a_layer_each_way() -> None:
    """A sequence that the axis does not divide: whole activations, as in arXiv 1909.08053."""
    issued = collectives("megatron", {"dp": 2, "tp": 4}, length=1022, **SMALL)
    activation = 4 * 1022 * 128 * 4
    for layer in range(3):
        for phase in ("forward", "backward"):
            found = [
                (c.kind, c.full_bytes)
                for c in issued
                if c.group == "tp" and c.phase == phase and f"{c.module}.".startswith(f"model.layers.{layer}.")
            ]
            assert found == [("all_reduce", activation)] * 2


def test_megatron_with_sequence_parallelism_gathers_and_scatters_twice_a_layer_each_way() -> None:
    """arXiv 2205.05198: 2 all-gathers and 2 reduce-scatters of b*s*h forward, the same backward; norms' weights have
    gradients that are partial over tp, as in Megatron-LM."""
    issued = collectives("megatron", {"dp": 2, "tp": 4}, **LARGE)
    activation = 4 * 1024 * 2048 * 4
    for layer in range(3):
        for phase in ("forward", "backward"):
            found = [
                c
                for c in issued
                if (c.group == "tp" and c.phase == phase and c.module.startswith(f"model.layers.{layer}."))
                or (c.group == "tp" and c.phase == phase and c.module == f"model.layers.{layer}")
            ]
            # The norms' gradients of a layer go together.
            of_norms = 2 * 2048 * 4
            large = sorted((c.kind, c.full_bytes) for c in found if c.full_bytes > of_norms)
            assert large == [("all_gather", activation)] * 2 + [("reduce_scatter", activation)] * 2
            small = [c for c in found if c.full_bytes <= of_norms]
            assert all((c.kind, c.phase) == ("all_reduce", "backward") and "norm" in c.module for c in small)


def test_no_strategy_gathers_logits_that_are_split_by_class() -> None:
    issued = collectives("megatron", {"dp": 2, "tp": 4}, **LARGE)
    logits = 4 * 1024 * 8192 * 4
    assert max(c.full_bytes for c in issued if c.group == "tp") < logits
    of_loss = [c for c in issued if c.module in ("", "lm_head") and c.group == "tp" and c.phase == "forward"]
    statistics = [c for c in of_loss if c.kind == "all_reduce"]
    assert all(c.full_bytes == 4 * 1024 * 4 for c in statistics)  # max, sum and the target's logit: b*s numbers each
    assert len(statistics) == 3


@pytest.mark.parametrize("mesh", [{"dp": 8}, {"dp": 4, "tp": 2}])
def test_fsdp_gathers_every_weight_twice_and_scatters_every_gradient_once(mesh: dict[str, int]) -> None:
    """3 * Psi elements (arXiv 1910.02054); the token embedding's weight is not needed for its own gradient."""
    issued = collectives("fsdp", mesh, **SMALL)
    group = ",".join(mesh)
    embedding = 8192 * 128
    layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 128
    psi = 2 * embedding + 3 * layer + 128
    gathered = {
        p: sum(c.full_bytes for c in issued if c.kind == "all_gather" and c.phase == p) for p in ("forward", "backward")
    }
    scattered = sum(c.full_bytes for c in issued if c.kind == "reduce_scatter")
    assert gathered == {"forward": 4 * psi, "backward": 4 * (psi - embedding)}
    assert scattered == 4 * psi
    large = [c for c in issued if c.full_bytes > 8]  # the rest is the loss and its count of tokens
    assert {c.kind for c in large} == {"all_gather", "reduce_scatter"}
    assert {c.group for c in large} == {group}


@pytest.mark.parametrize("mesh", [{"dp": 8}, {"dp": 4, "tp": 2}])
def test_ddp_reduces_every_gradient_once(mesh: dict[str, int]) -> None:
    issued = collectives("ddp", mesh, **SMALL)
    psi = 2 * 8192 * 128 + 3 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 128) + 128
    assert {c.kind for c in issued} == {"all_reduce"}
    assert sum(c.full_bytes for c in issued if c.phase == "backward" and "dp" in c.group) == 4 * psi


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_gradients_of_a_layer_go_in_one_collective(name: str) -> None:
    """Weights', which may be transposed on their way out, with those of norms and biases, which are viewed."""
    model, _, _ = build(name)
    _, _, local = planned(program_of(name), {"dp": 4}, "fsdp")
    layers = model.model.layers if name == "llama" else model.transformer.h
    of_layers = [sum(p.numel() * 4 for p in layer.parameters()) for layer in layers]
    scattered = [c.full_bytes for c in ledger(local) if c.kind == "reduce_scatter"]
    assert sorted(b for b in scattered if b in of_layers) == sorted(of_layers)
    embeddings = sum(p.numel() * 4 for p in model.parameters()) - sum(of_layers)
    assert all(b in of_layers or b <= embeddings for b in scattered)
    assert len(scattered) <= len(of_layers) + 3  # what lies before, between and behind the layers
