"""Published closed forms against the graph of a real model, captured and laid out; where one differs, a test says why.

tensor parallelism, with and without SP     test_passes_schedule.py, test_passes_candidate_memory.py (what is kept)
DDP, ZeRO-1, ZeRO-2, FSDP                   here: test_data_parallelism_and_fsdp
pipeline messages, bubble                   test_costmodel_symbolic.py, test_costmodel_pipeline.py (no plan has any)
experts' all-to-all                         here: test_experts
state bytes                                 here: test_state_bytes; stages: test_passes_candidate_memory.py
activations, Eq 1, 2, 4, 6                  here: test_activations; Eq 2 and 4 also: test_passes_candidate_memory.py
full recompute                              here: test_full_recompute_keeps_the_layers_inputs
first stage, Eq 5                           test_passes_candidate_memory.py; interleaved: test_costmodel_pipeline.py
logits, model and hardware FLOPs            here
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from parity import captured

from costmodel import symbolic as sym
from costmodel.hardware import topology
from costmodel.layout import Shard
from costmodel.presets import hardware
from passes.analysis.analysis import Analysis, analyse
from passes.analysis.moves import Run
from passes.analysis.strategies import Option
from passes.play.itinerary import itinerary
from passes.play.schedule import Schedule, play
from passes.price.per_rank import local_work, option_local_shapes
from passes.price.price import price
from passes.program.program import Program
from passes.solver.solve import solve
from passes.space.recompute import recomputation
from passes.space.space import Space, search_space

CASE: dict[str, Any] = {"b": 2, "s": 512, "h": 256, "a": 8, "L": 3, "V": 2048, "B": 8}


@lru_cache
def program() -> Program:
    """GPT-2 in bf16, a global batch of 8: four times as wide inside as outside, tied embeddings, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = GPT2Config(
        n_embd=CASE["h"], n_layer=CASE["L"], n_head=CASE["a"], vocab_size=CASE["V"], n_positions=CASE["s"],
        bos_token_id=0, eos_token_id=0, **off,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = GPT2LMHeadModel(config).to(torch.bfloat16), torch.empty(CASE["B"], CASE["s"], dtype=torch.long)
    return captured(model, {"input_ids": ids, "labels": ids})


@lru_cache
def analysis() -> Analysis:
    return analyse(program())


@lru_cache
def planned(strategy: str, **mesh: int) -> tuple[Space, tuple[int, ...], Schedule]:
    space = search_space(program(), topology(hardware("h100"), mesh), (0,), strategy=strategy, analysis=analysis())
    priced = price(space)
    picks = priced.assignment(solve(priced.problem, gap=1e-3).picks, len(space.sites))
    return space, picks, play(space, picks)


def sent(schedule: Schedule, role: str, where: str, ranks: int, item_bytes: int) -> float:
    """Elements that a rank sends in collectives of `role` whose place is in `where`."""
    return sum(
        float(sym.ring_elements(c.kind, c.bytes // item_bytes, ranks))
        for c in schedule.collectives
        if c.role == role and where in c.module
    )


def parameters() -> int:
    return sum(
        torch.Size(node.meta["val"].shape).numel()
        for node, given in zip(program().graph.graph.find_nodes(op="placeholder"), program().inputs, strict=True)
        if given.kind == "parameter"
    )


def test_data_parallelism_and_fsdp() -> None:
    """2 Psi and 3 Psi, times (d - 1) / d. FSDP gathers what backward does not read (positions, biases) once."""
    share = 3 / 4
    _, _, ddp = planned("ddp", dp=4)
    assert sent(ddp, "gradient", "", 4, 2) == pytest.approx(
        float(sym.ddp_elements().subs(sym.Psi, parameters())) * share
    )
    _, _, fsdp = planned("fsdp", dp=4)
    moved = sent(fsdp, "gradient", "", 4, 2) + sent(fsdp, "parameter", "", 4, 2)
    form = sym.number(sym.fsdp_elements(), {"Psi": parameters(), "m": 1}) * share
    gathered = {
        phase: sum(c.bytes // 2 for c in fsdp.collectives if c.role == "parameter" and c.phase == phase)
        for phase in ("forward", "backward")
    }
    assert gathered["forward"] == parameters()
    skipped = gathered["forward"] - gathered["backward"]
    assert moved == pytest.approx(form - share * skipped)
    assert 0 < skipped < 0.1 * parameters()


def test_full_recompute_keeps_the_layers_inputs() -> None:
    """2·s·b·h bytes per layer (Table 2), for the whole batch."""
    found = recomputation(analysis(), "full")
    inside = 0
    for value in found.held:
        node = analysis().folding.members[value.op][0]
        if node.meta.get("module", "").startswith("transformer.h."):
            size = torch.Size(analysis().shape_of(value)).numel() * analysis().itemsize_of(value)
            inside += size * analysis().places[value.op].count
    layer = sym.number(sym.activation_bytes_per_layer("full"), {**CASE, "b": CASE["B"]})
    assert inside == CASE["L"] * layer


def test_logits() -> None:
    """Half of 4·s·b·V / t bytes: kept is what the bf16 product gave; backward casts it to fp32 again."""
    space, picks, _ = planned("megatron", dp=4, tp=2)
    kept = []
    for value in space.recomputed.held:
        site = space.sites[value.op]
        option = site.options[picks[value.op]]
        assert isinstance(option, Option)
        _, results = option_local_shapes(site, option, space.topology.sizes)
        kept.append(space.itemsize_of(value) * torch.Size(results[value.result]).numel())
    assert max(kept) == sym.number(sym.logits_bytes(), {**CASE, "t": 2}) / 2


def test_model_flops() -> None:
    """72·B·L·s·h²·(1 + V / (12·h·L)) in products with weights. The paper's attention term counts all scores; a causal
    kernel computes half, so it is left out on both sides."""
    space, picks, _ = planned("ddp", dp=4)
    flops = 0.0
    for site, pick in zip(space.sites, picks, strict=True):
        option = site.options[pick]
        if site.call is not None and isinstance(option, Option):
            work, _ = local_work(site, option, space.topology.sizes)
            flops += work.flops * site.count if work.kind == "matmul" else 0.0
    form = sym.number(sym.model_flops(), CASE)
    attention = 12 * CASE["B"] * CASE["L"] * CASE["s"] ** 2 * CASE["h"]
    assert 4 * flops == pytest.approx(form - attention)


def test_state_bytes() -> None:
    """14 of the 18 bytes per parameter are at rest: gradients come and go, in bf16. A distributed optimizer keeps
    6 + 12 / d; FSDP shards parameters too: 14 / d. Each allocation is rounded up to 512 bytes, hence the 1%."""
    space, picks, _ = planned("ddp", dp=4)
    kinds = play(space, picks, optimizer="adamw-master").memory.by_kind
    whole = sym.number(sym.state_bytes_per_parameter(), {}) * parameters()
    assert kinds["parameters"] + kinds["optimizer"] == pytest.approx(whole - 4 * parameters(), rel=0.01)
    space, picks, _ = planned("fsdp", dp=4)
    kinds = play(space, picks, optimizer="adamw-master").memory.by_kind
    assert 4 * (kinds["parameters"] + kinds["optimizer"]) == pytest.approx(whole - 4 * parameters(), rel=0.01)


def test_hardware_flops() -> None:
    """96·B·L·s·h²·(1 + V / (16·L·h)) with full recompute, where layers run again to their end. Here a layer's last
    product (8·B·s·h²) does not: backward reads nothing that follows it. Attention is left out on both sides."""
    space = search_space(
        program(), topology(hardware("h100"), {"dp": 4}), (0,), strategy="ddp", recompute="full", analysis=analysis()
    )
    priced = price(space)
    picks = priced.assignment(solve(priced.problem, gap=1e-3).picks, len(space.sites))
    flops = 0.0
    for item in itinerary(space, picks):
        site = space.sites[item.site] if isinstance(item, Run) else None
        if isinstance(item, Run) and site is not None and site.call is not None:
            work, _ = local_work(site, item.option, space.topology.sizes)
            flops += work.flops if work.kind == "matmul" else 0.0
    form = sym.number(sym.hardware_flops(), CASE)
    attention = 16 * CASE["B"] * CASE["L"] * CASE["s"] ** 2 * CASE["h"]
    last = 8 * CASE["B"] * CASE["L"] * CASE["s"] * CASE["h"] ** 2
    assert 4 * flops == pytest.approx(form - attention - last)


def kept_per_layer(analysis_: Analysis) -> int:
    """Bytes that a layer keeps with nothing computed again, of the whole batch on one device."""
    found = 0
    for value in recomputation(analysis_, "none").held:
        place = analysis_.places[value.op]
        if place.call is not None and analysis_.folding.members[value.op][0].meta["module"].startswith(
            "transformer.h."
        ):
            found += torch.Size(analysis_.shape_of(value)).numel() * analysis_.itemsize_of(value) * place.count
    return found // CASE["L"]


def test_activations() -> None:
    """s·b·h·(34 + 5·a·s/h) less what this graph has not, as fused attention computes scores again (Eq 6: 34 s·b·h):

    2 bytes of masks (dropout is off; else they are made again from counters), and attention's scores. On top, what
    `gelu_new` keeps, as it is written out in Python: three tensors of 4h beside its input and result.
    """
    batch = {**CASE, "b": CASE["B"], "t": 1}
    selective = sym.number(sym.activation_bytes_per_layer("selective"), batch)
    whole = sym.number(sym.activation_bytes_per_layer("none"), batch)
    sbh = CASE["s"] * CASE["B"] * CASE["h"]
    assert whole - selective == 5 * CASE["a"] * CASE["s"] / CASE["h"] * sbh
    assert kept_per_layer(analysis()) == pytest.approx(selective - 2 * sbh + 3 * 2 * 4 * sbh, rel=0.01)


def test_experts() -> None:
    """2·b·s·k·h elements, (e - 1) / e of which leave a rank: as many travel here, where experts are split over 4 ranks,
    as a gather of the rows and a sum over ranks of what each made of its experts' rows.

    A token all-to-all sends no more; here every rank has all rows, and gate and up (2f wide) are summed before what
    is not linear, its result (f wide) gathered after it.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    batch, length, hidden, width, ranks, chosen = 4, 512, 512, 1024, 4, 2
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, num_attention_heads=8, vocab_size=1024,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=chosen, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = MixtralForCausalLM(config).to(torch.bfloat16), torch.empty(batch, length, dtype=torch.long)
    mesh = topology(hardware("h100"), {"ep": ranks})
    space = search_space(
        captured(model, {"input_ids": ids, "labels": ids}), mesh, (), strategy="megatron",
        pins={"*.experts.*": (Shard(0),)},
    )  # fmt: skip
    priced = price(space)
    schedule = play(space, priced.assignment(solve(priced.problem, gap=1e-3).picks, len(space.sites)))
    rows = batch * length * chosen
    sent = [
        (c.bytes // 2 // rows, float(sym.ring_elements(c.kind, c.bytes // 2, ranks)))
        for c in schedule.collectives
        if c.role == "activation" and c.phase == "forward" and c.module.endswith("mlp.experts")
    ]
    assert sorted(wide for wide, _ in sent) == [hidden, hidden, width, 2 * width]
    form = sym.number(sym.moe_elements_sent(), {"b": batch, "s": length, "k": chosen, "h": hidden, "e": ranks})
    assert sum(elements for wide, elements in sent if wide == hidden) == form
