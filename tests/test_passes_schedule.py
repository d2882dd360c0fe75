"""The schedule against schedules worked out by hand, closed forms, and the collectives that are really emitted."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from parity import captured, planned
from torch import fx, nn

from costmodel.compute import matmul, op_s, pointwise
from costmodel.hardware import Topology, topology
from costmodel.layout import Replicate
from costmodel.memory import OPTIMIZERS
from costmodel.presets import hardware
from costmodel.reshard import Step
from passes.analysis.moves import Move, Run
from passes.planner.decisions import option_text
from passes.play.by_parts import ByParts, by_parts
from passes.play.player import Player
from passes.play.schedule import Schedule, play
from passes.play.tracks import OpCost, Slot, Tracks, op_cost, tracks
from passes.price.price import price
from passes.program.program import Program
from passes.rewrite.ledger import ledger
from passes.solver.solve import solve
from passes.space.space import Site, Space, search_space

# -- by hand: ops and collectives of given seconds ---------------------------------------------------------------------


def quiet(sms: int = 0, **mesh: int) -> Topology:
    """A mesh whose collectives take `sms` of 132 SMs from compute."""
    machine = hardware("h100")
    links = {name: replace(getattr(machine, name), sms=sms) for name in ("intra_node", "inter_node")}
    device = replace(machine.device, sm_count=132)
    return topology(replace(machine, device=device, **links), mesh)


@dataclass
class Tape:
    """Writes a program by hand: `weight`, `op`, `gather`, `reduce` and `send` return slots."""

    topology: Topology

    def __post_init__(self) -> None:
        self.graph = fx.Graph()
        self.items: list[Run | Move] = []
        self.slots: list[Slot] = []
        self.reads: list[tuple[int, ...]] = []
        self.writes: list[tuple[int, ...]] = []
        self.costs: dict[int, OpCost] = {}
        self.leaving: list[tuple[int, str, bool]] = []

    def slot(self, producer: int, **kind: bool) -> int:
        self.slots.append(Slot(self.graph.placeholder(f"x{len(self.slots)}"), 0, producer, "", **kind))
        return len(self.slots) - 1

    def weight(self) -> int:
        return self.slot(-1, stored=True)

    def op(self, seconds: float, *reads: int, module: str = "", phase: str = "forward", kind: str = "other") -> int:
        node = self.graph.placeholder(f"op{len(self.items)}")
        node.meta = {"module": module, "phase": phase}
        site = len(self.items)
        self.costs[site] = OpCost(seconds, kind, "kernel", (0,))
        made = self.slot(site)
        self.items.append(Run(node, None, site, phase))  # type: ignore[arg-type]
        self.reads.append(reads)
        self.writes.append((made,))
        return made

    def move(
        self,
        seconds: float,
        source: int,
        axes: tuple[int, ...],
        module: str,
        phase: str,
        *,
        gathered: bool,
        stores: bool,
    ) -> int:
        reader = None
        if not stores:
            reader = self.graph.placeholder(f"r{len(self.items)}")
            reader.meta = {"module": module, "phase": phase}
        layout = (Replicate(),)
        step = Step("all_gather", axes, 0, None, "", 0, seconds, layout, layout)
        made = self.slot(len(self.items), gathered=gathered)
        value = self.slots[source].node
        self.items.append(Move(value, layout, layout, (step,), phase, "", reader, stores))
        self.reads.append((source,))
        self.writes.append((made,))
        if stores:
            self.leaving.append((made, phase, True))
        return made

    def gather(self, seconds: float, module: str, axes: tuple[int, ...] = (0,), phase: str = "forward") -> int:
        return self.move(seconds, self.weight(), axes, module, phase, gathered=True, stores=False)

    def send(
        self, seconds: float, source: int, module: str, axes: tuple[int, ...] = (0,), phase: str = "forward"
    ) -> int:
        return self.move(seconds, source, axes, module, phase, gathered=False, stores=False)

    def reduce(self, seconds: float, source: int, axes: tuple[int, ...] = (0,)) -> int:
        return self.move(seconds, source, axes, "", "backward", gathered=False, stores=True)

    def play(self, **parts: Any) -> Any:
        tracks = Tracks(
            tuple(self.items), tuple(self.slots), tuple(self.reads), tuple(self.writes), self.costs, tuple(self.leaving)
        )
        words = SimpleNamespace(
            layers={"layers.*": 9},
            pattern=lambda name: "layers.*" if name else "",
            instance=lambda name: name,
            gradient=lambda node: None,
        )
        space = SimpleNamespace(topology=self.topology, program=SimpleNamespace(repeated=()), async_tp=False)
        player = Player(space, words, tracks, False)  # type: ignore[arg-type]
        player.by_parts = ByParts(**parts)
        player.play()
        return player


def exposed(player: Any) -> list[float]:
    return [played.exposed_s for played in player.played]


def starts(player: Any) -> list[float]:
    return [played.start_s for played in player.played]


def test_a_gather_hides_behind_the_layer_before() -> None:
    tape = Tape(quiet(dp=4))
    for layer in range(2):
        tape.op(10, tape.gather(4, f"layers.{layer}"), module=f"layers.{layer}")
    played = tape.play()
    assert played.now_s == 24  # the first gather is waited for, the second runs from 4 to 8
    assert exposed(played) == [4, 0]


def test_a_gather_that_takes_longer_than_a_layer_is_exposed_in_part() -> None:
    tape = Tape(quiet(dp=4))
    for layer in range(2):
        tape.op(10, tape.gather(15, f"layers.{layer}"), module=f"layers.{layer}")
    played = tape.play()
    assert played.now_s == 40  # 0-15 gather, 15-25 op beside 15-30 gather, 30-40 op
    assert exposed(played) == [15, 5]


def test_gathers_run_one_layer_ahead_and_no_further() -> None:
    tape = Tape(quiet(dp=4))
    for layer in range(4):
        tape.op(10, tape.gather(1, f"layers.{layer}"), module=f"layers.{layer}")
    assert starts(tape.play()) == [0, 1, 11, 21]  # layer 2's when layer 1 begins, not at 2


def test_gathers_that_go_together_run_one_layer_ahead_too() -> None:
    tape = Tape(quiet(dp=4))
    for layer in range(3):
        both = [tape.gather(1, f"layers.{layer}") for _ in range(2)]
        tape.items[-2:] = [replace(move, bucket=layer) for move in tape.items[-2:]]  # type: ignore[call-arg]
        tape.op(10, *both, module=f"layers.{layer}")
    played = tape.play()
    took_s = played.played[0].step.seconds
    assert starts(played) == pytest.approx([0, 0, took_s, took_s, took_s + 10, took_s + 10])


def test_a_gather_is_issued_where_the_layer_before_begins_not_where_that_gathers() -> None:
    tape = Tape(quiet(dp=4))
    first = tape.op(10, tape.op(7, module="layers.0"), tape.gather(4, "layers.0"), module="layers.0")
    tape.op(10, first, tape.gather(4, "layers.1"), module="layers.1")
    played = tape.play()
    assert starts(played) == [0, 4]  # both at the start of layer 0, not at its second op
    assert played.now_s == 27


def test_a_partial_sum_is_waited_for_by_its_reader() -> None:
    tape = Tape(quiet(tp=2))
    tape.op(5, tape.send(3, tape.op(10, module="layers.0"), "layers.0"), module="layers.0")
    played = tape.play()
    assert played.now_s == 18
    assert exposed(played) == [3]


def test_an_activation_is_sent_while_other_ops_of_the_layer_run() -> None:
    tape = Tape(quiet(tp=2))
    made = tape.op(10, module="layers.0")
    tape.op(2, module="layers.0")
    tape.op(5, tape.send(3, made, "layers.0"), module="layers.0")
    played = tape.play()
    assert played.now_s == 18  # 10, then 2 beside 3, then 5
    assert exposed(played) == [1]


def test_packed_sums_are_sent_once_when_the_last_of_them_is_there() -> None:
    tape = Tape(quiet(tp=2))
    first, last = tape.op(10, module="layers.0"), tape.op(4, module="layers.0")
    tape.op(2, module="layers.0")
    brought = [tape.send(3, made, "layers.0") for made in (first, last)]
    for index in (3, 4):
        tape.items[index] = replace(tape.items[index], bucket=0, packed=True)  # type: ignore[arg-type]
    tape.op(5, *brought, module="layers.0")
    played = tape.play()
    took_s = played.played[0].step.seconds  # one collective of both: what it takes is worked out anew
    assert starts(played) == [14, 14]
    assert [each.counts for each in played.played] == [True, False]
    assert played.now_s == pytest.approx(14 + max(2, took_s) + 5)


def test_moves_that_go_together_wait_for_the_last_of_them_and_are_cut_once() -> None:
    """Of two sums the second is brought over a slower axis; behind their collective each is cut in 1 s."""
    tape = Tape(quiet(dp=2, tp=8))
    first, second = tape.op(1, module="layers.0"), tape.op(1, module="layers.0")
    came = tape.send(3, first, "layers.0", (0,)), tape.send(9, second, "layers.0", (1,))
    sums = [tape.send(3, each, "layers.0", (0,)) for each in came]
    for index in (4, 5):
        move: Any = tape.items[index]
        cut = replace(move.steps[0], kind="slice", seconds=1.0)
        tape.items[index] = replace(move, bucket=0, packed=True, steps=(*move.steps, cut))
    tape.op(5, *sums, module="layers.0")
    played = tape.play()
    sent = [each for each in played.played if each.item >= 4 and each.step.is_collective]
    assert [each.start_s for each in sent] == [11, 11]
    assert played.now_s == pytest.approx(11 + sent[0].step.seconds + 2 + 5)


@pytest.mark.parametrize(("gathered_s", "end_s"), [(6.0, 8.0), (7.0, 9.0), (10.0, 12.0)])
def test_a_product_multiplies_each_part_when_it_has_come(gathered_s: float, end_s: float) -> None:
    """8 s in 4 parts: the last part takes 2 s and starts when all has come, or when the other three are done."""
    step = Tape(quiet(tp=4))
    x = step.op(0.0, module="a")
    whole = step.send(gathered_s, x, "a")
    step.op(8.0, whole, module="a", kind="matmul")
    player = step.play(early_s={2: (whole, 6.0)}, gathers=frozenset({1}))
    assert player.now_s == pytest.approx(end_s)
    assert exposed(player) == pytest.approx([end_s - 8.0])


@pytest.mark.parametrize(("sent_s", "there_s"), [(4.0, 9.0), (6.0, 9.5), (10.0, 12.0)])
def test_each_part_of_a_product_is_sent_when_it_is_made(sent_s: float, there_s: float) -> None:
    """8 s in 4 parts: sending starts after 2 s, the last part is sent after 8 s and takes a quarter."""
    step = Tape(quiet(tp=4))
    product = step.op(8.0, module="a", kind="matmul")
    split = step.send(sent_s, product, "a")
    step.op(1.0, split, module="b")
    player = step.play(sent_early_s={1: 6.0}, added_s={1: 0.5})
    assert starts(player) == pytest.approx([2.0])
    assert player.now_s == pytest.approx(there_s + 0.5 + 1.0)


def test_gradients_are_reduced_behind_backward_and_waited_for_at_the_end() -> None:
    tape = Tape(quiet(dp=4))
    tape.reduce(4, tape.op(10, phase="backward"))
    tape.reduce(4, tape.op(2, phase="backward"))
    played = tape.play()
    assert played.now_s == 18  # 10-14 and 14-18; compute ends at 12
    assert exposed(played) == [2, 4]


def test_views_of_a_gradient_on_its_way_make_nothing_wait() -> None:
    tape = Tape(quiet(dp=4))
    sent = tape.send(5, tape.op(10, phase="backward"), "", phase="backward")
    turned = tape.op(0, sent, phase="backward")
    tape.costs[2] = OpCost(0, "other", "view", (0,))
    tape.leaving.append((turned, "backward", True))
    tape.op(10, phase="backward")
    played = tape.play()
    assert played.now_s == 20
    assert exposed(played) == [0]


def test_a_group_over_two_axes_occupies_both_streams() -> None:
    tape = Tape(quiet(dp=2, tp=8))
    made = tape.op(1, module="layers.0")
    both = tape.send(3, made, "layers.0", axes=(0, 1))
    one = tape.send(3, made, "layers.0", axes=(1,))
    tape.op(1, both, one, module="layers.0")
    apart = Tape(quiet(dp=2, tp=8))
    made = apart.op(1, module="layers.0")
    apart.op(1, *(apart.send(3, made, "layers.0", axes=(axis,)) for axis in (0, 1)), module="layers.0")
    assert tape.play().now_s == 8
    assert apart.play().now_s == 5


@pytest.mark.parametrize(
    ("mesh", "sent_s", "gathered_s"),
    [({"dp": 2, "tp": 2}, 5, 12), ({"dp": 16, "tp": 8}, 3, 10), ({"dp": 2, "tp": 2, "pp": 8}, 5, 12)],
    ids=["inside a node", "between nodes and inside", "both between nodes"],
)
def test_collectives_share_the_links_that_both_use(mesh: dict[str, int], sent_s: float, gathered_s: float) -> None:
    """A gather of 10 s runs from 0, 2 s are sent from 1 on: at half the rate from 1 to 5, the gather has 7 s left
    then. Where one goes between nodes and the other inside, neither is slowed."""
    tape = Tape(quiet(**mesh))
    weight = tape.gather(10, "layers.0", (0,))
    made = tape.op(1, module="layers.0")
    sent = tape.send(2, made, "layers.0", (1,))
    read = tape.op(1, sent, module="layers.0")
    tape.op(1, read, weight, module="layers.0")
    player = tape.play()
    assert {each.item: each.end_s for each in player.played if each.item in (0, 2)} == {0: gathered_s, 2: sent_s}
    assert player.now_s == gathered_s + 1
    assert sum(each.exposed_s for each in player.played) == player.now_s - 3


def test_the_last_of_what_is_queued_is_delayed_by_the_shorter() -> None:
    """Gathers of 2 and 2 s queue on one axis from 0; 8 s are sent beside them from 1 on, 3 s at half the rate: they
    end at 12, and the gathers, with 3 s left at 1, at 7."""
    tape = Tape(quiet(dp=2, tp=2))
    weights = [tape.gather(2, "layers.0", (0,)) for _ in range(2)]
    made = tape.op(1, module="layers.0")
    sent = tape.send(8, made, "layers.0", (1,))
    tape.op(1, sent, *weights, module="layers.0")
    assert [each.end_s for each in tape.play().played] == [2, 7, 12]


@pytest.mark.parametrize(
    ("sms", "kind", "share"), [(44, "matmul", 44 / 132), (44, "other", 0.26), (22, "matmul", 0.26)]
)
def test_compute_is_slower_beside_a_collective(sms: int, kind: str, share: float) -> None:
    """A product by the SMs that the collective takes, a memory-bound op by what its ring reads and writes (25.5%);
    either by 26% at least."""
    tape = Tape(quiet(sms, dp=4))
    tape.reduce(4, tape.op(1, phase="backward"))
    tape.op(10, phase="backward", kind=kind)
    played = tape.play()
    assert played.now_s == pytest.approx(11 + 4 * share)  # 1, then 4 beside the collective, then the rest alone
    assert played.contention_s == pytest.approx(4 * share)


# -- plans of real models ----------------------------------------------------------------------------------------------

MESHES: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "dp4": ({"dp": 4}, (0,)),
    "dp2-tp2": ({"dp": 2, "tp": 2}, (0,)),
    "hsdp-tp": ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, (0, 1)),
    "tp2": ({"tp": 2}, ()),
}


program_of = lru_cache(small_models.program_of)


@lru_cache
def llama(layers: int = 3) -> tuple[nn.Module, Program]:
    """LLaMA of 3 layers, large enough that parameters are worth splitting."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(8, 1024, dtype=torch.long)
    return model, captured(model, {"input_ids": ids, "labels": ids})


@lru_cache
def planned_llama(strategy: str, dp: int, tp: int) -> tuple[Space, tuple[int, ...]]:
    mesh = {"dp": dp, "tp": tp} if tp > 1 else {"dp": dp}
    space = search_space(llama()[1], topology(hardware("h100"), mesh), (0,), strategy=strategy)
    priced = price(space)
    return space, priced.assignment(solve(priced.problem, gap=1e-3).picks, len(space.sites))


@lru_cache
def played(strategy: str, dp: int, tp: int = 1, **options: Any) -> Schedule:
    return play(*planned_llama(strategy, dp, tp), **options)


@pytest.mark.parametrize(("name", "mesh"), [*(("llama", mesh) for mesh in MESHES), ("gpt2", "hsdp-tp")])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron", "auto"])
def test_what_is_priced_is_what_is_emitted(name: str, strategy: str, mesh: str) -> None:
    shape, batch_axes = MESHES[mesh]
    space, assignment, local = planned(program_of(name), shape, strategy, batch_axes)
    schedule = play(space, assignment)
    priced = [(c.kind, c.group, c.bytes, c.phase, c.module, c.source, c.tensors) for c in schedule.collectives]
    emitted = [(c.kind, c.group, c.full_bytes, c.phase, c.module, c.source, c.tensors) for c in ledger(local)]
    assert priced == emitted
    assert all(c.seconds > 0 and c.exposed_s >= 0 and c.hidden_s >= 0 for c in schedule.collectives)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron", "auto"])
def test_times_add_up(strategy: str) -> None:
    schedule = played(strategy, 4, 2)
    assert schedule.collectives
    for each in schedule.collectives:
        assert each.exposed_s + each.hidden_s == pytest.approx(each.seconds)
        assert each.exposed_s >= 0
        assert each.hidden_s >= 0
    total = sum(each.seconds for each in schedule.collectives)
    assert sum(schedule.exposed_s.values()) + sum(schedule.hidden_s.values()) == pytest.approx(total)
    busy = schedule.compute_s + schedule.contention_s
    assert schedule.micro_batch_s == pytest.approx(busy + sum(schedule.exposed_s.values()))
    assert schedule.step_time_s == pytest.approx(schedule.micro_batch_s + schedule.optimizer_s)
    assert sum(schedule.compute_by_kind.values()) == pytest.approx(schedule.compute_s)


def test_a_single_stream_cannot_hide_more_than_there_is_compute() -> None:
    schedule = played("fsdp", 8)
    total = sum(each.seconds for each in schedule.collectives)
    assert sum(schedule.exposed_s.values()) >= total - schedule.compute_s - schedule.contention_s - 1e-12


@pytest.mark.parametrize("strategy", ["ddp", "megatron"])
def test_every_product_runs_on_the_compute_stream(strategy: str) -> None:
    """A weight's gradient is computed where the program has it, though nothing but the optimizer needs it."""
    space, assignment = planned_llama(strategy, 2, 2)
    products = 0.0
    for index, (site, pick) in enumerate(zip(space.sites, assignment, strict=True)):
        if site.name == "aten.mm.default":
            products += site.count * op_cost(space, index, site.options[pick]).seconds  # type: ignore[arg-type]
    schedule = played(strategy, 2, 2, events=True)
    assert schedule.compute_by_kind["matmul"] == pytest.approx(products)
    products_s = [e for e in schedule.events if e.kind == "matmul"]
    assert len(products_s) == sum(site.count for site in space.sites if site.name == "aten.mm.default")


@pytest.mark.parametrize("strategy", ["fsdp", "auto"])
def test_the_solver_prices_each_op_as_the_schedule_plays_it(strategy: str) -> None:
    """Also where two ops are alike but for what they are fused with."""
    space, _ = planned_llama(strategy, 2, 2)
    priced = price(space)
    compared = 0
    for group, rows, seconds in zip(priced.groups, priced.table, priced.problem.option_s, strict=True):
        if any(space.sites[site].kind != "op" or site in space.recomputed.again for site in group):
            continue
        for row, found in zip(rows, seconds, strict=True):
            options = ((site, space.sites[site].options[number]) for site, number in zip(group, row, strict=True))
            parts = [space.sites[s].count * op_cost(space, s, option).seconds for s, option in options]  # type: ignore[arg-type]
            assert found == pytest.approx(sum(parts))
            compared += 1
    assert compared > 100


def parameter_bytes() -> int:
    return sum(p.numel() * p.element_size() for p in llama()[0].parameters())


def test_ddp_moves_every_gradient_twice_around_the_ring() -> None:
    gradients = [c for c in played("ddp", 4).collectives if c.role == "gradient"]
    volume = sum(c.bytes * (2 if c.kind == "all_reduce" else 1) for c in gradients)
    assert volume == 2 * parameter_bytes()


def test_ddp_sends_gradients_and_the_loss_and_its_count_as_one() -> None:
    others = [c for c in played("ddp", 4).collectives if c.role != "gradient"]
    assert [(c.kind, c.phase, c.bytes, c.tensors, c.count) for c in others] == [("all_reduce", "forward", 8, 2, 1)]


def test_ddp_scatters_nothing_that_was_summed_over_the_batch() -> None:
    space, assignment, local = planned(program_of("gpt2"), {"dp": 4}, "ddp")  # its positions' gradient
    assert {c.kind for c in play(space, assignment).collectives} == {"all_reduce"}
    assert {c.kind for c in ledger(local)} == {"all_reduce"}


def test_fsdp_gathers_every_parameter_twice_and_scatters_its_gradient_once() -> None:
    collectives = played("fsdp", 4).collectives
    gathered = {
        phase: [c for c in collectives if c.role == "parameter" and c.phase == phase]
        for phase in ("forward", "backward")
    }
    # The embedding is looked up in forward only; its gradient does not read it.
    names = {phase: {name for c in found for name in c.value.split(", ")} for phase, found in gathered.items()}
    assert names["forward"] - names["backward"] == {"model.embed_tokens.weight"}
    embedding = 1024 * 512 * 4
    assert sum(c.bytes for c in gathered["forward"]) == parameter_bytes()
    assert sum(c.bytes for c in gathered["backward"]) == parameter_bytes() - embedding
    scattered = [c for c in collectives if c.role == "gradient"]
    assert {c.kind for c in scattered} == {"reduce_scatter"}
    assert sum(c.bytes for c in scattered) == parameter_bytes()


def test_megatron_moves_each_layers_activations_four_times_a_phase() -> None:
    schedule = played("megatron", 2, 2)
    whole = 4 * 1024 * 512 * 4  # batch per data-parallel rank, sequence, hidden, float
    for phase in ("forward", "backward"):
        sent = [c for c in schedule.collectives if c.axes == ("tp",) and c.phase == phase and c.role == "activation"]
        inner = [c for c in sent if c.module.startswith("model.layers.1.")]
        assert {c.bytes for c in inner} == {whole}
        rings = sum(2 if c.kind == "all_reduce" else 1 for c in inner)
        assert rings == 4, [(c.kind, c.module) for c in inner]


def test_reasons_name_the_parameter_and_the_dim() -> None:
    found = played("megatron", 2, 2).collectives
    names = {name for c in found for name in c.value.split(", ")}
    assert {"model.layers.*.self_attn.q_proj.weight", "gradient of model.layers.*.mlp.up_proj.weight"} <= names
    reasons = {c.reason for c in found}
    assert "gather model.embed_tokens.weight for compute" in reasons
    assert any(re.fullmatch(r"gather model\.layers\.\*\.\S+ for compute, and \d more with it", r) for r in reasons)
    start = "add the partial sums of model.layers.*.mlp.down_proj: mm"
    assert any(reason.startswith(start) for reason in reasons)


# -- the optimizer and micro-batches -----------------------------------------------------------------------------------


def test_micro_batches_repeat_all_but_the_update() -> None:
    one, four = played("fsdp", 4), played("fsdp", 4, accumulate=4)
    assert four.step_time_s == pytest.approx(4 * one.micro_batch_s + 3 * one.added_s + one.optimizer_s)
    assert four.memory.by_kind.get("gradients", 0) > one.memory.by_kind.get("gradients", 0)
    with pytest.raises(ValueError, match="accumulate is 0"):
        played("fsdp", 4, accumulate=0)


@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1), ("fsdp", 4)])
def test_gradients_of_further_micro_batches_are_added(strategy: str, share: int) -> None:
    """By hand: of a rank's own fp32 gradients both terms are read and the sum is written, 12 bytes at 87% of H100's
    3.35 TB/s, in a kernel per parameter."""
    one, four = played(strategy, 4), played(strategy, 4, accumulate=4)
    parameters, elements = len(list(llama()[0].parameters())), parameter_bytes() / 4 / share
    added_s = 12 * elements / (0.87 * 3.35e12) + parameters * hardware("h100").device.kernel_launch_s
    assert four.step_time_s - (4 * one.micro_batch_s + one.optimizer_s) == pytest.approx(3 * added_s, rel=1e-6)
    assert 4 * (four.compute_s - one.compute_s) == pytest.approx(3 * added_s, rel=1e-6)


def test_the_update_moves_a_ranks_own_state() -> None:
    device = hardware("h100").device
    elements = parameter_bytes() // 4 // 4
    moved = elements * (3 * 4 + 2 * 8)  # parameter twice, gradient once, two fp32 states twice
    seconds = moved / (device.memory_bytes_per_s * device.memory_efficiency)
    assert played("fsdp", 4).optimizer_s == pytest.approx(seconds)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw-master", "sgd"])
def test_what_other_optimizers_keep_is_moved_and_the_solver_counts_the_same(optimizer: str) -> None:
    """A value per row and column of a matrix, 12 bytes per parameter, or nothing: read and written beside the rest."""
    device = hardware("h100").device
    shapes = [tuple(p.shape) for p in llama()[0].parameters()]
    elements = sum(math.prod(shape) for shape in shapes)
    factored = sum(4 * (sum(shape) if len(shape) > 1 else shape[0]) for shape in shapes)
    kept = {"adafactor": factored, "adamw-master": 12 * elements, "sgd": 0}[optimizer]
    seconds = (3 * 4 * elements + 2 * kept) / (device.memory_bytes_per_s * device.memory_efficiency)
    space, assignment = planned_llama("ddp", 4, 1)
    found = play(space, assignment, optimizer=optimizer)
    assert found.optimizer_s == pytest.approx(seconds)
    assert found.memory.by_kind.get("optimizer", 0) == kept
    priced = price(space, OPTIMIZERS[optimizer]).problem
    without = price(replace(space, sites=tuple(map(_frozen, space.sites)))).problem
    for told, wanted in (("option_s", seconds), ("option_bytes", 4 * elements + kept)):
        most = [sum(map(max, getattr(problem, told))) for problem in (priced, without)]
        assert most[0] - most[1] == pytest.approx(wanted)


def _frozen(site: Site) -> Site:
    given = site.given
    return site if given is None else replace(site, given=replace(given, requires_grad=False))


def test_the_update_of_each_parameter_takes_time_of_its_own() -> None:
    machine = hardware("h100")
    slow = replace(machine, device=replace(machine.device, update_s=1e-3))
    space, assignment = planned_llama("fsdp", 4, 1)
    slower = replace(space, topology=topology(slow, {"dp": 4}))
    more_s = play(slower, assignment).optimizer_s - play(space, assignment).optimizer_s
    assert more_s == pytest.approx(len(list(llama()[0].parameters())) * 1e-3)


# -- in parts ----------------------------------------------------------------------------------------------------------


def test_a_layers_products_go_in_parts_with_what_they_multiply_and_make() -> None:
    """By hand, as torch's pass has it: per layer q, k, v and gate, up are fed in parts, o and down are sent in parts,
    and these two's gradients of their inputs are fed in backward."""
    space, assignment = planned_llama("megatron", 1, 4)
    laid = tracks(space, assignment)
    assert by_parts(space, laid) == ByParts()
    pipelined = replace(space, async_tp=True)
    found = by_parts(pipelined, laid)
    layers = 3 - sum(repeated.more for repeated in space.program.repeated)
    fed = [laid.items[i].node.meta["module"] for i in found.early_s]
    last = [name.rsplit(".", 1)[-1] for name in fed if ".layers." in name]
    wanted = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]
    assert Counter(last) == dict.fromkeys(wanted, layers)
    assert len([i for i in found.sent_early_s if laid.items[i].phase == "forward"]) >= 2 * layers
    plain, quicker = play(space, assignment), play(pipelined, assignment)
    assert sum(quicker.exposed_s.values()) < sum(plain.exposed_s.values())
    assert quicker.micro_batch_s < plain.micro_batch_s
    assert len(quicker.collectives) == len(plain.collectives)


def test_what_products_in_parts_take_and_how_early_they_are() -> None:
    """By hand: four parts, each of a quarter of 8 x 1024 rows in fp32; a product is early by what it and those behind
    it take but for the last part."""
    space, assignment = planned_llama("megatron", 1, 4)
    laid, device = tracks(space, assignment), space.topology.device
    found = by_parts(replace(space, async_tp=True), laid)

    def in_parts_s(n: int, k: int) -> float:
        return 4 * op_s(matmul(2048, n, k, dtype="float32", item_bytes=4), device)

    q_s, kv_s = in_parts_s(512 // 4, 512), in_parts_s(256 // 4, 512)
    early_s = {laid.items[i].node.meta["module"]: each for i, (_, each) in found.early_s.items()}  # type: ignore[union-attr]
    of_first = {name.rsplit(".", 1)[-1]: each for name, each in early_s.items() if ".layers.0.self" in name}
    assert of_first["v_proj"] == pytest.approx(0.75 * kv_s)
    assert of_first["k_proj"] == pytest.approx(0.75 * 2 * kv_s)
    assert of_first["q_proj"] == pytest.approx(0.75 * (q_s + 2 * kv_s))
    item, sent_s = next(iter(found.sent_early_s.items()))
    assert laid.items[item].place.meta["module"] == "model.layers.0.self_attn.o_proj"  # type: ignore[union-attr]
    assert sent_s == pytest.approx(0.75 * in_parts_s(512, 512 // 4))
    whole_bytes = 8 * 1024 * 512 * 4
    assert found.added_s[item] == pytest.approx(op_s(pointwise(whole_bytes, whole_bytes / 4), device))


def test_what_cannot_go_in_parts_does_not() -> None:
    """Other moves at the place of one that does, and a product that something else reads too."""
    space, assignment = planned_llama("megatron", 1, 4)
    laid, pipelined = tracks(space, assignment), replace(space, async_tp=True)
    found = by_parts(pipelined, laid)
    gather, sent = min(found.gathers), min(found.sent_early_s)
    move: Any = laid.items[gather]
    (step,) = move.steps

    def left(**changed: Any) -> bool:
        items = (*laid.items[:gather], replace(move, **changed), *laid.items[gather + 1 :])
        return gather in by_parts(pipelined, replace(laid, items=items)).gathers

    assert left()
    assert not left(bucket=0)
    assert not left(stores=True)
    assert not left(steps=(step, step))
    assert not left(steps=(replace(step, axes=(0, 1)),))
    assert not left(steps=(replace(step, ranks=1),))
    assert not by_parts(replace(pipelined, batch_axes=(0, 1)), laid).gathers
    apart = topology(replace(hardware("h100"), ranks_per_node=1), {"dp": 1, "tp": 4})
    assert not by_parts(replace(pipelined, topology=apart), laid).gathers
    (made,) = laid.reads[sent]
    read = tuple((*slots, made) if i == len(laid.items) - 1 else slots for i, slots in enumerate(laid.reads))
    assert sent not in by_parts(pipelined, replace(laid, reads=read)).sent_early_s
    leaving = (*laid.leaving, (made, "forward", False))
    assert sent not in by_parts(pipelined, replace(laid, leaving=leaving)).sent_early_s
    whole: Any = laid.items[sent]
    whole = replace(whole, steps=(replace(whole.steps[0], kind="all_reduce"),))
    items = (*laid.items[:sent], whole, *laid.items[sent + 1 :])
    assert sent not in by_parts(pipelined, replace(laid, items=items)).sent_early_s


def test_the_first_op_of_a_step_may_be_sent_in_parts() -> None:
    space, assignment = planned_llama("megatron", 1, 4)
    laid, pipelined = tracks(space, assignment), replace(space, async_tp=True)
    found = by_parts(pipelined, laid)
    sent = min(found.sent_early_s)
    items = laid.items[max(item for item in found.products_s if item < sent)], laid.items[sent]
    slots = tuple(Slot(laid.slots[0].node, 0, producer, "") for producer in (-1, 0, 1))
    alone = replace(laid, items=items, slots=slots, reads=((0, 0), (1,)), writes=((1,), (2,)), leaving=())
    assert by_parts(pipelined, alone).sent_early_s == {1: found.sent_early_s[sent]}


# -- memory ------------------------------------------------------------------------------------------------------------


class Products(nn.Module):
    """Two products and a sum: nothing to fuse, nothing to compute again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(256, 1024, bias=False)
        self.b = nn.Linear(1024, 128, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.b(self.a(x)).sum()}


WHOLE = "()R,->[] "
"""What is told of options that are whole everywhere."""


def test_memory_of_two_products_by_hand() -> None:
    program = captured(Products(), {"x": torch.randn(64, 256)})
    space = search_space(program, topology(hardware("h100"), {"tp": 2}), ())
    assignment = [next(i for i, o in enumerate(x.options) if set(option_text(o)) <= set(WHOLE)) for x in space.sites]
    schedule = play(space, assignment, optimizer="sgd")
    assert not schedule.collectives
    a, b, x, hidden = 1024 * 256 * 4, 128 * 1024 * 4, 64 * 256 * 4, 64 * 1024 * 4
    # Most is alive while a's gradient is computed: parameters, x, the loss's tangent (a scalar takes 512 bytes), b's
    # gradient, and the hidden activation's.
    assert schedule.memory.by_kind == {
        "parameters": a + b,
        "gradients": a + b,
        "working": hidden,
        "inputs": x + 512,
    }
    assert schedule.peak_moment == "backward: mm in a"
    assert schedule.peak_memory_bytes == 2 * (a + b) + x + hidden + 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_on_a_gpu_has_one_temporary_per_parameter(dtype: torch.dtype) -> None:
    """All at once, beside parameters, gradients and two fp32 states: torch's Adam takes the roots of one of these of
    all parameters in one go."""
    program = captured(Products().to(dtype), {"x": torch.randn(64, 256, dtype=dtype)})
    held = 1024 * 256 + 128 * 1024
    for name, optimizer, each in (
        ("h100", "adamw", 4),
        ("h100", "adamw-master", 4),
        ("cpu", "adamw", 0),
        ("h100", "lion", 0),
    ):
        space = search_space(program, topology(hardware(name), {"tp": 2}), ())
        assignment = [
            next(i for i, o in enumerate(s.options) if set(option_text(o)) <= set(WHOLE)) for s in space.sites
        ]
        memory = play(space, assignment, optimizer=optimizer).memory
        assert memory.by_kind["parameters"] == memory.by_kind["gradients"] == dtype.itemsize * held
        if each == 0:
            assert memory.by_kind["working"] == 64 * 1024 * dtype.itemsize
        else:
            states = 12 if optimizer == "adamw-master" else 8
            assert (memory.by_kind["working"], memory.by_kind["optimizer"]) == (each * held, states * held)
            assert memory.moment_s == max(moment for moment, _ in memory.timeline)
            sizes = [top.bytes for top in memory.top]
            assert sizes == sorted(sizes, reverse=True)


def test_state_sharding_divides_what_is_at_rest() -> None:
    ddp, fsdp = played("ddp", 4).memory.by_kind, played("fsdp", 4).memory.by_kind
    assert ddp["parameters"] == parameter_bytes()
    assert fsdp["parameters"] == parameter_bytes() // 4
    assert ddp["optimizer"] == 2 * parameter_bytes()
    assert fsdp["optimizer"] == parameter_bytes() // 2


def test_two_layers_are_gathered_at_a_time() -> None:
    memory = played("fsdp", 4, events=True).memory
    layer = sum(p.numel() * 4 for n, p in llama()[0].named_parameters() if "layers.0." in n)
    ends = 2 * 1024 * 512 * 4 + 512 * 4
    assert memory.by_kind.get("gathered", 0) <= 2 * max(layer, ends)


def test_the_peak_is_the_highest_point_of_the_timeline() -> None:
    schedule = played("megatron", 2, 2, events=True)
    assert max(size for _, size in schedule.memory.timeline) == schedule.peak_memory_bytes
    assert sum(schedule.memory.by_kind.values()) == schedule.peak_memory_bytes


def test_a_pointwise_chain_is_computed_again_and_not_kept() -> None:
    """silu(gate) * up is no tensor of the forward's: backward reads gate and up, which are kept."""
    names = [top.name for top in played("ddp", 4).memory.top if top.kind == "activations"]
    assert any("gate_proj: mm" in name for name in names)
    assert not any("act_fn" in name for name in names)


def test_events_lie_on_their_streams_without_overlap() -> None:
    schedule = played("megatron", 2, 2, events=True)
    assert {event.stream for event in schedule.events} == {"compute", "dp", "tp"}
    for stream in ("compute", "dp", "tp"):
        mine = sorted((e.start_s, e.end_s) for e in schedule.events if e.stream == stream)
        assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(mine))
    assert not played("megatron", 2, 2).events
