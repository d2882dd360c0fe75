"""Layers left out: against the whole model played node by node, and names and counts by hand."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import fx, nn

import passes.planner.pipeline
from passes.analysis.moves import Run
from passes.capture.capture import capture
from passes.plan.plan import Plan
from passes.planner.decisions import assignment_of
from passes.planner.fitting import Request
from passes.planner.pipeline import Manner, compile_plan, on_mesh, prepare, space_of
from passes.play.blocks import Block as Unit
from passes.play.blocks import NotPeriodicError, blocks
from passes.play.player import Player
from passes.play.schedule import Schedule, play
from passes.play.tracks import Slot, Tracks
from passes.prepare.shorten import all_names, shorten
from passes.program.program import Program, Repeated
from passes.space.recompute import Mode
from passes.space.words import unfold_names

LAYERS = 11


class Block(nn.Module):
    """A residual MLP; `post`: with a norm behind it, on the branch; `waves`: times a wave over positions."""

    def __init__(self, hidden: int, ffn: int, *, post: bool = False, waves: bool = False) -> None:
        super().__init__()
        self.post = post
        self.waves = waves
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, ffn)
        self.down = nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor, waves: torch.Tensor) -> torch.Tensor:
        if self.waves:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x * waves[:, None]))))
        if self.post:  # scaled to a root mean square of 1, by ops that fuse
            branch = self.down(torch.nn.functional.gelu(self.up(x))).float()
            return x + (self.norm.weight * branch * branch.square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, ffns: list[int], *, collects: bool = False, post: bool = False, waves: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 256)
        self.layers = nn.ModuleList(Block(256, ffn, post=post, waves=waves and ffn > 512) for ffn in ffns)
        self.head = nn.Linear(256, 512)
        self.collects = collects

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x, seen = self.embed(ids), []
        waves = torch.arange(ids.shape[1], device=ids.device).float().sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, waves)
            seen.append(x.mean())
        loss = torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())
        return loss + torch.stack(seen).sum() if self.collects else loss


@lru_cache(maxsize=8)
def program(*ffns: int, collects: bool = False, post: bool = False, waves: bool = False) -> Program:
    with torch.device("meta"):
        model = Stack(list(ffns), collects=collects, post=post, waves=waves).to(torch.bfloat16)
        ids = torch.empty(16, 128, dtype=torch.long)
    return prepare(capture(model, (ids, ids), {}, batch_dims=[0, 0], batch_size=16))


def layer_by_layer(whole: Program, plan: Plan, request: Request) -> Schedule:
    """The plan's step with every layer's nodes in the graph."""
    space = space_of(whole, plan, on_mesh(plan.hardware, plan.axes), request.pins)
    return play(space, assignment_of(plan, space), accumulate=plan.accumulate)


@pytest.mark.parametrize(
    ("strategy", "hardware", "recompute"),
    [("fsdp", "h100", "pointwise"), ("megatron", "h100", "full"), ("ddp", "a100-40gb", "none"),
     ("auto", "h100", "selective"), ("fsdp", "cpu", "pointwise"), ("megatron", "cpu", "full")],
)  # fmt: skip
def test_a_few_layers_take_what_all_take(strategy: str, hardware: str, recompute: str) -> None:
    """Step time, its parts, every stream and the peak, as played with all layers; gradients that pile up (ddp over a
    slow network), and what gloo packs of the first layers in backward, too."""
    whole = program(*[1024] * LAYERS)
    request = Request(strategy=strategy, recompute=recompute)  # type: ignore[arg-type]
    plan = compile_plan(whole, on_mesh(hardware, (("dp", 16), ("tp", 2))), (0,), request)
    assert shorten(whole).repeated
    played = layer_by_layer(whole, plan, request)
    assert plan.step_time_s == pytest.approx(played.step_time_s, rel=1e-9)
    assert plan.peak_memory_bytes == played.peak_memory_bytes
    assert plan.breakdown.compute_s == pytest.approx(played.compute_s, rel=1e-9)
    assert plan.breakdown.contention_s == pytest.approx(played.contention_s, rel=1e-9)
    for group, seconds in played.exposed_s.items():
        assert plan.breakdown.exposed_s[group] == pytest.approx(seconds, rel=1e-9, abs=1e-12)
    short = layer_by_layer(shorten(whole), plan, request)
    assert short.micro_batch_s == pytest.approx(played.micro_batch_s, rel=1e-9)
    assert short.kernels == pytest.approx(played.kernels)
    assert short.memory.by_kind == played.memory.by_kind
    assert short.memory.top == played.memory.top
    assert sum(c.count for c in plan.collectives) == len(played.collectives)
    assert sum(c.count * c.bytes for c in plan.collectives) == sum(c.bytes for c in played.collectives)


def test_layers_are_played_until_they_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and in backward some of them are copies."""
    copies: list[int] = []
    right = Player._copy

    def copied(player: Player, block: Unit, marks: Any, runs: int) -> None:
        copies.append(runs)
        right(player, block, marks, runs)

    monkeypatch.setattr(Player, "_copy", copied)
    short, request = shorten(program(*[1024] * LAYERS)), Request(strategy="fsdp")
    plan = compile_plan(short, on_mesh("h100", (("dp", 4),)), (0,), request)
    copies.clear()
    layer_by_layer(short, plan, request)
    assert len(copies) == 2
    assert min(copies) >= 1


@pytest.mark.parametrize("recompute", ["pointwise", "selective"])
def test_norms_on_branches_make_no_chain_through_all_layers(recompute: Mode) -> None:
    """The residual stream could be computed again from branches' results, which are kept for their norms; but all of
    it at once, as backward begins, with every layer's parameters gathered. By hand: each layer's sum is kept, and no
    more than two layers' parameters are whole at a time beside the head's."""
    plan = compile_plan(
        program(*[1024] * LAYERS, post=True), on_mesh("h100", (("dp", 16),)), (0,),
        Request(strategy="fsdp", recompute=recompute),
    )  # fmt: skip
    layer, head, embed = 2 * (2 * 256 * 1024 + 1024 + 3 * 256), 2 * (256 * 512 + 512), 2 * 256 * 512
    assert plan.breakdown.memory_bytes["gathered"] <= 2 * layer + head + embed
    assert not any("computed again" in tensor.name and tensor.count > 2 for tensor in plan.breakdown.top_tensors)


def test_layers_that_alternate_repeat_in_pairs() -> None:
    whole = program(*[512, 1024] * 6)
    (repeated,) = shorten(whole).repeated
    assert (repeated.length, repeated.more) == (2, 2)
    request = Request(strategy="fsdp")
    plan = compile_plan(whole, on_mesh("h100", (("dp", 16), ("tp", 2))), (0,), request)
    played = layer_by_layer(whole, plan, request)
    assert plan.step_time_s == pytest.approx(played.step_time_s, rel=1e-9)
    assert plan.peak_memory_bytes == played.peak_memory_bytes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "megatron"])
def test_what_wide_layers_share_is_made_once(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wide layer makes it in forward; backward makes it again for the last, behind a narrow one: neither is
    like its copies, and the rest still repeats."""
    whole = program(*[512, 512, 1024] * 8, 512, waves=True)
    (repeated,) = shorten(whole).repeated
    assert (repeated.length, repeated.more) == (3, 4)
    monkeypatch.setattr(
        passes.planner.pipeline, "NotPeriodicError", KeyboardInterrupt
    )  # no way out: it has to be played short
    request = Request(strategy=strategy)
    plan = compile_plan(whole, on_mesh("h100", (("dp", 16), ("tp", 2))), (0,), request)
    played = layer_by_layer(whole, plan, request)
    assert plan.step_time_s == pytest.approx(played.step_time_s, rel=1e-9)
    assert plan.peak_memory_bytes == played.peak_memory_bytes
    assert len(plan.collectives) < len(played.collectives) / 2


def test_layers_that_give_other_results_are_not_alike() -> None:
    """The copy of the unit gives two results where the others give one: such a plan is played layer by layer."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"layer{i}") for i in (0, 1, 4)]
    for node, layer in zip(nodes, (0, 1, 4), strict=True):
        node.meta["module"] = f"layers.{layer}"
    items = tuple(Run(node, None, 0, "forward") for node in nodes)  # type: ignore[arg-type]
    slots = tuple(Slot(node, 8, index, "") for index, node in enumerate((*nodes, nodes[1])))
    found = Tracks(items, slots, ((), (), ()), ((0,), (1, 3), (2,)), {}, ())
    with pytest.raises(NotPeriodicError):
        blocks(found, (Repeated("layers", 1, 1, 2),), [[], [], [], []], frozenset())


def test_a_plan_names_the_layers_that_are_not_in_its_graph() -> None:
    whole = program(*[1024] * LAYERS)
    plan = compile_plan(whole, on_mesh("h100", (("dp", 4),)), (0,), Request(strategy="fsdp"))
    placed = plan.parameters["layers.*.up.weight"]
    assert sorted(unfold_names(placed.names)) == sorted(f"layers.{i}.up.weight" for i in range(LAYERS))
    assert placed.count == LAYERS
    assert set(plan.placements) == {given.name for given in whole.inputs if given.kind == "parameter"}
    (repeated,) = shorten(whole).repeated
    names = [name for i in repeated.unit for name in all_names(f"layers.{i}.norm.bias", (repeated,))]
    assert names == [f"layers.{i}.norm.bias" for i in range(repeated.first, repeated.first + 1 + repeated.more)]


@pytest.mark.parametrize("ffns", [[1024] * 5, [512, 640, 768, 896, 1024, 1152, 1280, 1408], [512] * 3 + [1024] * 3])
def test_nothing_is_left_out_where_layers_do_not_repeat(ffns: list[int]) -> None:
    whole = program(*ffns)
    assert shorten(whole) is whole


def test_nothing_is_left_out_where_each_layer_shortens_what_it_reads() -> None:
    """As the convolutions do that wav2vec2 hears by: the same calls on ever shorter sounds."""

    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(8, 8, 2, stride=2), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(self.norm(self.conv(x).mT).mT)

    class Hearing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Halving() for _ in range(7))

        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                sound = layer(sound)
            return sound.square().mean()

    whole = prepare(capture(Hearing(), (torch.zeros(4, 8, 256),), batch_dims=[0], batch_size=4))
    assert shorten(whole) is whole
    plan = compile_plan(whole, on_mesh("h100", (("dp", 2), ("tp", 2))), (0,), Request())
    assert plan.peak_memory_bytes > 0


def test_nothing_is_left_out_where_a_result_of_every_layer_is_read() -> None:
    whole = program(*[1024] * LAYERS, collects=True)
    assert shorten(whole) is whole


def test_a_timeline_has_every_layer() -> None:
    whole = program(*[1024] * LAYERS)
    plan = compile_plan(
        whole, on_mesh("h100", (("dp", 4),)), (0,), Request(strategy="fsdp"), manner=Manner(keep_timeline=True)
    )
    assert plan.timeline is not None
    modules = {event.module for event in plan.timeline.events}
    assert {f"layers.{i}.up" for i in range(LAYERS)} <= modules
    assert plan.timeline.end_s + plan.timeline.optimizer_s == pytest.approx(plan.step_time_s, rel=1e-9)
