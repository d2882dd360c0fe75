"""Mixed precision in planned programs: what travels, what is added up, what is kept; against a model cast by hand."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest
import torch
from parity import captured, planned, relative
from random_plans import every_option, random_plan
from small_models import build
from torch import fx, nn

from passes.parity.simulate import simulate_step
from passes.play.schedule import play
from passes.play.tracks import tracks
from passes.program.local import COLLECTIVES, LocalProgram
from passes.program.precision import Dtypes, Precision
from passes.program.program import Program
from passes.rewrite.ledger import ledger
from passes.space.space import Space

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MIXED = Precision(BF16, FP32)
MESHES = {"dp4": {"dp": 4}, "dp2-tp2": {"dp": 2, "tp": 2}}
POLICIES = {
    "bf16, sums in fp32": MIXED,
    "bf16 throughout": Precision(BF16),
    "fp16": Precision(FP16, FP32),
    "sums alone in bf16": Precision(reductions=BF16),
}


@lru_cache
def program_of(name: str, policy: Precision) -> Program:
    model, args, kwargs = build(name)
    return captured(model, kwargs, args, policy)


def by_hand(model: nn.Module, kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss, and gradients of the fp32 parameters, of a model that autograd casts to `dtype`."""
    model.zero_grad()
    cast = {name: p.to(dtype) for name, p in model.named_parameters()}
    loss: torch.Tensor = torch.func.functional_call(model, cast, (), kwargs)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(name: str, local: LocalProgram, computed: torch.dtype, tolerance: float) -> None:
    model, _, kwargs = build(name)
    _, exact = by_hand(model, kwargs, FP32)
    loss, gradients = by_hand(model, kwargs, computed)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = simulate_step(local, parameters, dict(model.named_buffers()), list(kwargs.values()))
    assert relative(found.outputs["loss"], loss) < tolerance
    assert {g.dtype for g in found.gradients.values()} == {FP32}
    assert set(found.gradients) == set(gradients)
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for key, wanted in gradients.items():
        off = (found.gradients[key] - wanted).norm()
        rounding = (wanted - exact[key]).norm()  # what computing in half precision costs by hand
        assert off < max(tolerance * wanted.norm(), 3 * rounding, 1e-5 * total), (key, off / wanted.norm())


@lru_cache
def plan_of(name: str, policy: Precision, mesh: str, strategy: str) -> tuple[Space, tuple[int, ...], LocalProgram]:
    return planned(program_of(name, policy), MESHES[mesh], strategy)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron", "auto"])
def test_every_rank_together_computes_what_a_model_cast_by_hand_does(strategy: str, mesh: str) -> None:
    _, _, local = plan_of("llama", MIXED, mesh, strategy)
    check("llama", local, BF16, 3e-2)


CASES = [("gpt2", policy) for policy in POLICIES] + [("t5", "bf16, sums in fp32")]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_policies_on_models_with_tied_weights(name: str, policy: str) -> None:
    precision = POLICIES[policy]
    _, _, local = plan_of(name, precision, "dp2-tp2", "megatron")
    computed = precision.parameters or FP32
    sums_in_bf16 = precision.reductions == BF16
    check(name, local, computed, 3e-2 if computed == BF16 or sums_in_bf16 else 1e-2)


# -- what travels ------------------------------------------------------------------------------------------------------


LLAMA = [("llama", MIXED, mesh, strategy) for mesh in MESHES for strategy in ("ddp", "fsdp", "megatron", "auto")]
GPT2 = [("gpt2", precision, "dp2-tp2", "megatron") for precision in POLICIES.values()]


@pytest.mark.parametrize("case", [*LLAMA, *GPT2], ids=str)
def test_what_is_priced_is_what_is_emitted(case: tuple[str, Precision, str, str]) -> None:
    space, assignment, local = plan_of(*case)
    priced = Counter((c.kind, c.group, c.bytes, c.phase) for c in play(space, assignment).collectives)
    assert priced == Counter((c.kind, c.group, c.full_bytes, c.phase) for c in ledger(local))


@pytest.mark.parametrize(("policy", "gathered_in", "scattered_in"), [
    (None, 4, 4), (Precision(BF16, FP32), 2, 4), (Precision(BF16), 2, 2), (Precision(reductions=BF16), 4, 2),
])  # fmt: skip
def test_bytes_of_fsdp_are_those_of_the_dtypes(policy: Precision | None, gathered_in: int, scattered_in: int) -> None:
    """3 * Psi elements (arXiv 1910.02054), each in the dtype it travels in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1024}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=16, num_key_value_heads=8, **sizes))
    ids = torch.zeros(8, 64, dtype=torch.long)
    _, _, local = planned(captured(model, {"input_ids": ids, "labels": ids}, (), policy), {"dp": 8}, "fsdp")
    embedding = 1024 * 128
    psi = 2 * embedding + 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 128) + 128
    issued = [c for c in ledger(local) if c.full_bytes > 8]
    gathers = sum(c.full_bytes for c in issued if c.kind == "all_gather")
    assert gathers == gathered_in * (2 * psi - embedding)  # the embedding's weight is not needed for its own gradient
    assert sum(c.full_bytes for c in issued if c.kind == "reduce_scatter") == scattered_in * psi


def chain(node: fx.Node) -> list[Any]:
    """Ops from a placeholder to a node that has one operand each."""
    found: list[Any] = []
    while node.op == "call_function":
        found.append(node.target)
        node = node.all_input_nodes[0]
    return [node, *reversed(found)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron", "auto"])
def test_a_parameter_is_cast_before_all_else(strategy: str, mesh: str) -> None:
    """The first thing that is done to what is stored is the cast; nothing of a parameter travels in fp32."""
    _, _, local = plan_of("llama", MIXED, mesh, strategy)
    nodes = local.graph.graph.find_nodes(op="placeholder")
    stored = [node for node, given in zip(nodes, local.inputs, strict=True) if given.kind == "parameter"]
    assert stored
    for node in stored:
        assert node.meta["val"].dtype == FP32
        assert {user.target for user in node.users} == {torch.ops.aten._to_copy.default}
        assert {user.meta["val"].dtype for user in node.users} == {BF16}
    gathers = [n for n in local.graph.graph.nodes if n.target == COLLECTIVES[0]]
    assert {n.meta["val"].dtype for n in gathers if chain(n)[0] in stored} <= {BF16}


def adding(local: LocalProgram) -> list[tuple[fx.Node, torch.dtype]]:
    """Collectives that add, with the dtype that they add in."""
    nodes = [n for n in local.graph.graph.nodes if n.target in COLLECTIVES and "sum" in n.args]
    return [(n, n.all_input_nodes[0].meta["val"].dtype) for n in nodes]


def leads_to_gradients_alone(node: fx.Node, local: LocalProgram) -> bool:
    """Whether all that is made of a node are gradients, through ops on that alone."""
    gradients = {
        value for value, out in zip(local.graph.graph.output_node().args[0], local.outputs, strict=True)
        if out.kind == "gradient"
    }  # fmt: skip
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user.op != "output" and user not in seen:
                seen.add(user)
                queue.append(user)
    ends = {n for n in seen if any(user.op == "output" for user in n.users)}
    alone = all(operand in seen or operand.op == "placeholder" for n in seen - {node} for operand in n.all_input_nodes)
    return ends <= gradients and alone and bool(ends)


@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_added_in_the_reductions_dtype_wherever_a_plan_adds_them(seed: int) -> None:
    """Also before a transpose or an addition that stands between the product and the finished gradient."""
    space = every_option(program_of(("llama", "gpt2")[seed % 2], MIXED), MESHES["dp2-tp2"])
    found: list[torch.dtype] = []
    for attempt in range(seed, seed + 60, 6):  # a plan may add no gradient over ranks
        if not found:
            _, local = random_plan(space, attempt)
            found = [dtype for node, dtype in adding(local) if leads_to_gradients_alone(node, local)]
    assert found
    assert set(found) == {FP32}


def test_sums_of_activations_are_in_the_dtype_of_compute() -> None:
    _, _, local = planned(program_of("llama", MIXED), {"tp": 2}, "megatron", ())
    layers = [dtype for node, dtype in adding(local) if node.meta["phase"] == "forward" and node.meta["module"]]
    assert set(layers) == {BF16}


# -- what is computed --------------------------------------------------------------------------------------------------


class Casts(nn.Module):
    """Records dtypes in its outputs: of its input, its weight, its buffer, and of what it upcasts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 1.5))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        self.count += 1
        made = self.linear(x.to(self.linear.weight.dtype))
        exact = made.float().square().mean(-1, keepdim=True)
        return {"x": x * 1, "made": made, "exact": exact, "scaled": made * self.scale, "mask": mask & mask}


@pytest.mark.parametrize(("precision", "expected"), [
    (Precision(BF16), {"x": BF16, "made": BF16, "exact": FP32, "scaled": FP32, "mask": torch.bool}),
    (Precision(BF16, cast_inputs=False), {"x": FP32, "made": BF16, "exact": FP32, "scaled": FP32, "mask": torch.bool}),
    (Precision(BF16, outputs=FP32), {"x": FP32, "made": FP32, "exact": FP32, "scaled": FP32, "mask": torch.bool}),
    (Precision(outputs=FP16), {"x": FP16, "made": FP16, "exact": FP16, "scaled": FP16, "mask": torch.bool}),
])  # fmt: skip
def test_dtypes_are_those_of_fsdp2(precision: Precision, expected: dict[str, torch.dtype]) -> None:
    """Inputs and outputs as the policy says; buffers, integers and what the model itself upcasts stay as they are."""
    kwargs = {"x": torch.randn(4, 8), "mask": torch.ones(4, 8, dtype=torch.bool)}
    program = captured(Casts(), kwargs, (), precision)
    nodes: Any = program.graph.graph.output_node().args[0]
    found = {
        out.name: node.meta["val"].dtype
        for out, node in zip(program.outputs, nodes, strict=True)
        if out.kind == "output"
    }
    assert found == expected
    assert [n.meta["val"].dtype for n, out in zip(nodes, program.outputs, strict=True) if out.kind == "buffer"] == [
        FP32
    ]


def test_norms_and_losses_that_upcast_keep_that() -> None:
    graph = program_of("llama", MIXED).graph.graph
    roots = list(graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default))
    assert len(roots) == 5
    assert {node.meta["val"].dtype for node in roots} == {FP32}
    products = list(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))
    assert {node.meta["val"].dtype for node in products} == {BF16}
    assert next(iter(graph.output_node().args[0])).meta["val"].dtype == FP32  # the loss, of logits.float()


def test_frozen_parameters_are_cast_and_integers_are_not() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["a"].requires_grad_(False)
    assert MIXED.dtypes_of(model["a"].weight) == Dtypes(FP32, BF16, FP32)
    assert MIXED.dtypes_of(torch.zeros(2, dtype=torch.int8)) is None
    assert Precision(BF16).dtypes_of(torch.zeros(2, dtype=BF16)) is None
    assert Precision(FP32).dtypes_of(torch.zeros(2, dtype=BF16)) == Dtypes(BF16, FP32, FP32)


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "gathered"), [(MIXED, 2), (None, 4)])
def test_memory_by_hand(policy: Precision | None, gathered: int) -> None:
    """fp32 parameters and two AdamW states at rest; a gathered weight in the dtype of compute; gradients in fp32."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    program = captured(model, {}, (torch.randn(4, 512),), policy)
    space, assignment, _ = planned(program, {"dp": 4}, "fsdp", name="h100")
    memory = play(space, assignment, optimizer="adamw").memory
    psi = 2 * 512 * 512
    assert memory.by_kind["parameters"] == psi // 4 * 4
    assert memory.by_kind["optimizer"] == psi // 4 * 8
    buffers = play(space, assignment, optimizer="adamw", accumulate=2).memory
    assert buffers.by_kind["gradients"] >= psi // 4 * 4
    made = tracks(space, assignment)
    assert {slot.bytes for slot in made.slots if slot.gathered} == {512 * 512 * gathered}
    assert {made.slots[slot].bytes for slot, _, stores in made.leaving if stores} == {512 * 512 // 4 * 4}


def test_the_dtypes_are_part_of_the_fingerprint() -> None:
    prints = {program_of("gpt2", precision).fingerprint for precision in POLICIES.values()}
    assert len(prints) == len(POLICIES)


def test_notes_say_what_is_stored_and_computed() -> None:
    assert any("gathered and computed with in bfloat16" in note for note in program_of("gpt2", MIXED).notes)
    assert any("GradScaler" in note for note in program_of("gpt2", POLICIES["fp16"]).notes)
    model = nn.Linear(4, 4, dtype=BF16)
    program = captured(model, {}, (torch.randn(4, 4),), Precision(FP32))
    assert any("no float32 copy for the optimizer" in note for note in program.notes)
