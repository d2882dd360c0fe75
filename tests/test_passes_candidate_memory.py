"""Memory of setups against the formulas of Korthikanti et al. (arXiv 2205.05198) and of ZeRO, done by hand.

The model is a GPT with rotary positions and without dropout: 12 h^2 + 13 h parameters a layer. A figure that follows
from depth is the difference between two depths, so that nothing outside the layers is in it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from small_models import tokens
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from autopar.runs.profiling import Captures, Profiler
from costmodel.memory import OPTIMIZERS
from costmodel.presets import hardware
from passes.runs.candidate import estimate
from passes.runs.estimate import Estimate
from passes.runs.setup import Setup

B, S, H, HEADS, V = 2, 2048, 2048, 16, 65536
LAYER = 12 * H**2 + 13 * H
SBH = S * B * H


@lru_cache
def profiler(layers: int) -> Profiler:
    config = Starcoder2Config(
        hidden_size=H, intermediate_size=4 * H, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=V, max_position_embeddings=S, sliding_window=None, use_cache=False,
        hidden_act="gelu", residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = Starcoder2ForCausalLM(config).to(torch.bfloat16)

    return Profiler(Captures(model, tokens(S)), hardware("h100"), OPTIMIZERS["adamw-master"])


def priced(layers: int, setup: Setup) -> Estimate:
    return estimate(setup, profiler(layers))


def test_layers_run_again_as_a_whole_keep_their_input() -> None:
    """Table 2, full recompute: 2sbh a layer; and of the state, 2 + 12 bytes per parameter over 4 ranks (ZeRO-3).

    The peak is at the logits, where all layers have their inputs alone.
    """
    setup = Setup(dp_shard=4, micro_batch=B, recompute="full", whole_blocks=True)
    few, many = priced(9, setup), priced(13, setup)
    assert many.peak_bytes - few.peak_bytes == pytest.approx(4 * (2 * SBH + 14 * LAYER / 4), rel=0.01)


@pytest.mark.parametrize(("tensor", "part"), [(1, 1), (4, 4)])
def test_a_layer_hands_on_the_residual_stream_alone(tensor: int, part: int) -> None:
    """2sbh bytes, or a tensor-parallel rank's part of the sequence; rotary angles every stage makes for itself."""
    setup = Setup(tp=tensor, micro_batch=B, recompute="none")
    found = profiler(9).profile(setup, replica=True)
    assert found.layer("boundary") == pytest.approx(2 * SBH / part)


def test_one_layer_at_a_time_has_its_activations_back() -> None:
    """At a layer's backward the peak is above that of what all keep by one layer's activations: at least the residual
    stream twice, both norms' results, queries, keys, values, attention's result and the MLP's inner tensor: 2 bytes of
    (2 + 2 + 3 + 1 + 4) sbh."""
    setup = Setup(dp_shard=4, micro_batch=B, recompute="full", whole_blocks=True, in_block="none")
    shallow = profiler(9).profile(Setup(dp_shard=4, micro_batch=B, recompute="none"), replica=False)
    assert shallow.saved_bytes - shallow.layer("boundary") > 2 * 11 * SBH
    at_rest = 14 * shallow.whole["stored"]
    assert priced(9, setup).peak_bytes > at_rest + 9 * 2 * SBH + 2 * 11 * SBH


@pytest.mark.parametrize(("tensor", "split"), [(2, True), (4, True), (4, False)])
def test_what_a_layer_keeps_under_tensor_parallelism(tensor: int, split: bool) -> None:
    """Eq 2 without dropout masks and scores: both norms' inputs and results (8sbh) are whole on every rank. Eq 4: they
    are split with the sequence, but here their results (4sbh) are kept as gathered, not gathered again in backward."""
    mine = profiler(9).profile(Setup(tp=tensor, micro_batch=B, recompute="none", sequence_parallel=split), replica=True)
    alone = profiler(9).profile(Setup(micro_batch=B, recompute="none"), replica=True)
    whole = (4 if split else 8) * SBH
    assert mine.saved_bytes == pytest.approx(whole + (alone.saved_bytes - whole) / tensor, rel=0.01)


@pytest.mark.parametrize("tensor", [2, 4])
def test_what_is_gathered_again_is_kept_in_parts(tensor: int) -> None:
    """Eq 4: of all that a layer keeps a rank has its part. Backward has one layer's gathered results (4sbh) on top, and
    waits for none of them: two gathers a layer take less than its products, and less than all of themselves."""
    setup = Setup(tp=tensor, micro_batch=B, state="zero0", recompute="none")
    alone = profiler(12).profile(Setup(micro_batch=B, recompute="none"), replica=True)
    whole, parts = priced(12, setup), priced(12, replace(setup, gathers_again=True))
    spared = 4 * SBH * (1 - 1 / tensor)
    assert parts.bytes["activations"] == pytest.approx(12 * alone.saved_bytes / tensor, rel=0.01)
    assert whole.bytes["activations"] - parts.bytes["activations"] == pytest.approx(12 * spared, rel=0.01)
    assert parts.bytes["working"] - whole.bytes["working"] <= spared * 1.01
    sent_s = 12 * 4 * SBH * (1 - 1 / tensor) / 450e9  # NVLink 4, one way
    assert 0 < parts.step_s - whole.step_s < sent_s


@pytest.mark.parametrize(("state", "per_parameter"), [("zero0", 18.0), ("zero1", 6 + 12 / 4)])
def test_state_bytes_per_parameter(state: str, per_parameter: float) -> None:
    """Megatron-LM's table: 18 bytes; 6 + 12 / d with a distributed optimizer. The busiest of two
    stages has half of the layers and all of the embedding, which is the head too."""
    setup = Setup(dp_shard=4, pp=2, accumulate=4, state=state, gradient_bytes=4)  # type: ignore[arg-type]
    found = priced(12, setup).bytes
    held = found["parameters"] + found["gradients"] + found["optimizer"]
    assert held == pytest.approx(per_parameter * (6 * LAYER + V * H + H), rel=0.001)


@pytest.mark.parametrize(
    "setup",
    [
        Setup(dp_shard=4, accumulate=3, state="zero2"),
        Setup(dp_shard=4, pp=2, accumulate=1, state="zero2"),
        Setup(dp_shard=4, pp=2, accumulate=3, state="zero1"),
        Setup(dp_shard=4, pp=2, accumulate=3, state="zero2"),
        Setup(dp_shard=4, pp=2, accumulate=3, state="zero3"),
        Setup(dp_shard=4, pp=2, accumulate=3, state="zero3", reshard=False),
    ],
)
def test_gradients_that_are_reduced_once_are_kept_whole_until_then(setup: Setup) -> None:
    """What is sent of gradients tells whether the share of a sum over micro-batches can be all that is kept."""
    found, once = priced(12, setup), priced(12, replace(setup, accumulate=1))

    def sent_s(estimate: Estimate) -> float:
        return estimate.seconds["exposed state"] + estimate.hidden_s

    held = 6 * LAYER + V * H + H if setup.pp == 2 else 12 * LAYER + V * H + 2 * H
    is_sent_again = setup.accumulate == 1 or sent_s(found) > 1.5 * sent_s(once)
    shared = setup.state != "zero1" and is_sent_again
    assert found.bytes["gradients"] == pytest.approx(2 * held / (4 if shared else 1), rel=0.001)


def test_the_first_stage_keeps_all_layers_activations_whatever_the_stages() -> None:
    """Eq 5: p micro-batches in flight of L / p layers each. One stage alone has one micro-batch of all layers."""
    alone = priced(12, Setup(dp_shard=2, micro_batch=B, state="zero0")).bytes["activations"]
    for stages in (4, 6):
        found = priced(12, Setup(pp=stages, micro_batch=B, accumulate=8, state="zero0")).bytes
        assert found["activations"] == pytest.approx(alone)


def test_context_parallelism_shards_state_over_its_ranks_too() -> None:
    """ZeRO-3 on 2 x 2: 2 + 2 + 12 bytes per parameter over 4 ranks, and 2 for what is outside and two layers."""
    found = priced(12, Setup(dp_shard=2, cp=2, state="zero3", gradient_bytes=2)).bytes
    outside = V * H + 2 * H
    held = found["parameters"] + found["gradients"] + found["optimizer"]
    assert held == pytest.approx(16 * (12 * LAYER + outside) / 4 + 2 * (2 * LAYER + outside), rel=0.02)


def test_a_stage_has_one_layers_backward_at_a_time_however_deep() -> None:
    """Gradients of a layer (24 h^2 bytes) outweigh what it keeps (2sbh); they count with the stage's, not again."""
    setup = Setup(pp=2, micro_batch=1, accumulate=4, state="zero0", recompute="full")
    assert priced(24, setup).bytes["working"] == pytest.approx(priced(12, setup).bytes["working"], rel=0.01)


def test_what_products_alone_read_again_is_kept_in_fp8() -> None:
    """Without recompute both norms' results and the activation's: 6 of a layer's sbh, a byte less each; the norms' 2
    where pointwise ops are computed again. What attention keeps stays in 2, and under zero3 all does."""

    def spared(setup: Setup) -> float:
        return priced(9, setup).bytes["activations"] - priced(9, replace(setup, fp8=True)).bytes["activations"]

    plain = Setup(dp_shard=4, accumulate=4, micro_batch=B, state="zero1", recompute="none")
    assert spared(plain) == pytest.approx(9 * 6 * SBH)
    assert spared(replace(plain, recompute="pointwise")) == pytest.approx(9 * 2 * SBH)
    parts = replace(plain, tp=4, gathers_again=True)
    assert spared(parts) == pytest.approx(9 * 6 * SBH / 4)
    sharded = Setup(dp_shard=4, micro_batch=B, recompute="none")
    assert priced(9, replace(sharded, fp8=True)).peak_bytes == priced(9, sharded).peak_bytes
