"""What is kept for backward, and what runs again: by hand, by what is emitted, and against eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import get_args

import pytest
import small_models
import torch
from parity import captured, errors
from small_models import build
from torch import nn

from costmodel.hardware import topology
from costmodel.presets import hardware
from passes.analysis.analysis import Analysis, analyse
from passes.analysis.moves import Run
from passes.analysis.strategies import Option
from passes.lower.partition import split
from passes.play.schedule import play
from passes.play.tracks import Tracks, tracks
from passes.price.price import price
from passes.rewrite.ledger import ledger
from passes.rewrite.rewrite import rewrite
from passes.solver.solve import solve
from passes.space.recompute import Mode, recomputation
from passes.space.space import Space, search_space

program_of = lru_cache(small_models.program_of)


@lru_cache
def analysed(name: str) -> Analysis:
    return analyse(program_of(name))


@lru_cache
def planned(name: str, strategy: str, mode: Mode) -> tuple[Space, tuple[int, ...]]:
    analysis = analysed(name)
    mesh = topology(hardware("h100"), {"dp": 2, "tp": 2})
    space = search_space(analysis.program, mesh, (0,), strategy=strategy, recompute=mode, analysis=analysis)
    priced = price(space)
    return space, priced.assignment(solve(priced.problem, gap=1e-3).picks, len(space.sites))


def held_ops(name: str, mode: Mode) -> set[str]:
    """`module: op` of every site whose result is kept."""
    analysis = analysed(name)
    found = recomputation(analysis, mode)
    nodes = [analysis.folding.members[value.op][0] for value in found.held]
    return {f"{node.meta.get('module', '')}: {str(node.target).split('.')[1]}" for node in nodes}


def test_what_a_llama_keeps() -> None:
    """By hand. Pointwise: what products and attention make, and the residual stream (for the norms); not what silu,
    the products with a norm's weight or rotary positions make. Full: a layer's input alone, and what is outside of
    layers."""
    layer = "model.layers.0"
    pointwise = held_ops("llama", "pointwise")
    assert {f"{layer}.mlp.gate_proj: mm", f"{layer}.mlp.up_proj: mm"} <= pointwise
    assert not any("act_fn" in name or "rotary" in name for name in pointwise)
    attention = {name for name in pointwise if "scaled_dot_product" in name}
    assert len(attention) == 1  # alike layers are one
    selective = held_ops("llama", "selective")
    assert not attention & selective
    widening = held_ops("llama", "widening")
    wide = {f"{layer}.mlp.gate_proj: mm", f"{layer}.mlp.up_proj: mm"}
    assert not wide & widening
    assert pointwise - widening == wide  # beside attention's, the other products' results stay
    full = held_ops("llama", "full")
    inside = {name for name in full if name.startswith(layer)}
    assert inside == {f"{layer}: add"}, inside
    assert held_ops("llama", "none") > pointwise - inside


class Latent(nn.Module):
    """Heads from a latent, scores that are kept, and experts that are one batch of products."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, 8, bias=False), nn.Linear(8, 64, bias=False)
        self.out = nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.up(self.down(x)).unflatten(-1, (4, 16)).transpose(1, 2)
        scores = (heads @ heads.transpose(-1, -2)).softmax(-1)
        return x + self.out((scores @ heads).transpose(1, 2).flatten(2))


class Latents(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Latent() for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": x.square().mean()}


def test_what_widens_is_told_by_sizes() -> None:
    """By hand: `up` gives 64 of 8, scores 24 of 16 per row; `down` 8 of 32, `out` 32 of 64, and scores times values 16
    of 24 stay. The softmax follows from the scores."""
    torch.manual_seed(0)
    model, x = Latents(), torch.randn(4, 24, 32)
    analysis = analyse(captured(model, {"x": x}))

    def products(mode: Mode) -> set[str]:
        nodes = [analysis.folding.members[value.op][0] for value in recomputation(analysis, mode).held]
        kept = {f"{node.meta['module']}: {str(node.target).split('.')[1]}" for node in nodes}
        return {name.removeprefix("blocks.0") for name in kept}

    stream, values = ": add", ": clone"  # of scores times values, as it is flattened
    assert products("pointwise") == {".down: mm", ".up: mm", ": _softmax", values, stream}
    assert products("widening") == {".down: mm", values, stream}
    space = search_space(
        analysis.program, topology(hardware("h100"), {"dp": 2}), (0,), recompute="widening", analysis=analysis
    )
    priced = price(space)
    picks = priced.assignment(solve(priced.problem).picks, len(space.sites))
    found = errors(model, rewrite(space, picks), {"x": x}, ())
    assert found.gradient < 1e-5, found


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_each_mode_keeps_no_more_than_the_one_before(name: str) -> None:
    analysis = analysed(name)
    sizes = []
    for mode in get_args(Mode):
        found = recomputation(analysis, mode)
        held = found.held
        sizes.append(
            sum(
                torch.Size(analysis.shape_of(v)).numel() * analysis.itemsize_of(v) * analysis.places[v.op].count
                for v in held
            )
        )
    none, pointwise, selective, widening, full = sizes
    assert none > pointwise >= selective > full
    assert pointwise > widening > full


def kept_bytes(tracks: Tracks) -> int:
    """Bytes that forward hands to backward: buffers made in forward that an op or a move of backward reads."""
    bases: list[int] = []
    for index, slot in enumerate(tracks.slots):
        producer = tracks.items[slot.producer] if slot.producer >= 0 else None
        view = isinstance(producer, Run) and tracks.costs[producer.site].fusing == "view"
        bases.append(bases[tracks.reads[slot.producer][0]] if view and tracks.reads[slot.producer] else index)
    crossing = {
        bases[slot]
        for index, item in enumerate(tracks.items)
        if item.phase == "backward"
        for slot in tracks.reads[index]
        if tracks.slots[slot].producer >= 0 and tracks.items[tracks.slots[slot].producer].phase == "forward"
    }
    return sum(tracks.slots[slot].bytes for slot in crossing if tracks.slots[slot].producer >= 0)


@pytest.mark.parametrize(("name", "mode", "strategy"), [
    *(("llama", mode, strategy) for mode in get_args(Mode) for strategy in ("fsdp", "megatron")),
    ("gpt2", "selective", "megatron"), ("gpt2", "widening", "megatron"), ("t5", "full", "megatron"),
    ("hand", "pointwise", "fsdp"),
])  # fmt: skip
def test_what_is_computed_again_is_what_is_emitted(name: str, mode: Mode, strategy: str) -> None:
    """The ledger, and the bytes that the forward hands to backward, are those of the program that is emitted."""
    space, assignment = planned(name, strategy, mode)
    local = rewrite(space, assignment)
    schedule = play(space, assignment)
    priced = [(c.kind, c.group, c.bytes, c.phase, c.module) for c in schedule.collectives]
    assert priced == [(c.kind, c.group, c.full_bytes, c.phase, c.module) for c in ledger(local)]
    saved = {node: node.meta["val"] for node in split(local).saved}
    bytes_ = sum(value.numel() * value.element_size() for value in saved.values() if isinstance(value, torch.Tensor))
    assert kept_bytes(tracks(space, assignment)) == bytes_


@pytest.mark.parametrize(("name", "mode", "strategy"), [
    ("llama", "full", "megatron"), ("gpt2", "selective", "fsdp"), ("t5", "full", "fsdp"), ("llama", "none", "fsdp"),
    ("llama", "widening", "megatron"), ("t5", "widening", "fsdp"),
])  # fmt: skip
def test_numbers_are_those_of_eager(name: str, mode: Mode, strategy: str) -> None:
    model, args, kwargs = build(name)
    space, assignment = planned(name, strategy, mode)
    found = errors(model, rewrite(space, assignment), kwargs, args)
    assert found.output < 1e-5
    assert found.gradient < 1e-5, found


def test_full_runs_each_product_of_a_layer_once_more() -> None:
    """Six products of a layer feed a backward (the last one's result nothing reads), and are paid for again."""
    space, assignment = planned("llama", "fsdp", "full")
    again = [item for item in tracks(space, assignment).items if isinstance(item, Run) and item.again]
    products = [item.node.meta["module"] for item in again if "mm" in str(item.node.target)]
    assert len(products) == len(set(products)) == 6 * 2
    assert not any("down_proj" in module for module in products)
    space_of, without = planned("llama", "fsdp", "pointwise")
    assert play(space, assignment).compute_by_kind["matmul"] > play(space_of, without).compute_by_kind["matmul"]


class Dropped(nn.Module):
    """Dropout in repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.5))) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return {"loss": x.square().mean()}


def test_a_random_mask_computed_again_is_the_same_mask() -> None:
    from passes.parity.simulate import simulate_step

    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(8, 16)
    program = captured(model, {"x": x})
    space = search_space(program, topology(hardware("h100"), {"dp": 2}), (0,), recompute="none")
    priced = price(space)
    picks = priced.assignment(solve(priced.problem).picks, len(space.sites))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = []
    for mode in ("none", "full"):
        played = replace(space, recomputed=recomputation(space.analysis, mode))
        found.append(simulate_step(rewrite(played, picks), parameters, {}, [x], None).gradients)
        random = [i for i in tracks(played, picks).items if isinstance(i, Run) and "uniform" in str(i.node.target)]
        assert len(random) == (2 if mode == "none" else 4)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_an_axis_of_one_rank_changes_nothing_that_is_kept() -> None:
    """Nothing moves over it, so nothing that was moved is kept beside what is computed again."""
    analysis, peaks = analysed("llama"), []
    for axes in ({"dp": 2}, {"dp": 2, "tp": 1}):
        mesh = topology(hardware("h100"), axes)
        space = search_space(analysis.program, mesh, (0,), strategy="ddp", recompute="full", analysis=analysis)
        splits = [o.splits for site in space.sites for o in site.options if isinstance(o, Option)]
        assert not any(split is not None for of in splits for split in of[1:])
        priced = price(space)
        schedule = play(space, priced.assignment(solve(priced.problem).picks, len(space.sites)))
        peaks.append(schedule.peak_memory_bytes)
    assert peaks[0] == peaks[1]


def test_one_rank_gathers_and_cuts_nothing() -> None:
    """Alone it has in memory what `ddp` has, and outputs are no copies: that is what a mesh without the axis takes."""
    analysis = analysed("llama")

    def memory(strategy: str, batch_axes: tuple[int, ...], **axes: int) -> Mapping[str, int]:
        mesh = topology(hardware("h100"), axes)
        space = search_space(analysis.program, mesh, batch_axes, strategy=strategy, analysis=analysis)
        priced = price(space)
        picks = priced.assignment(solve(priced.problem).picks, len(space.sites))
        return play(space, picks).memory.by_kind

    alone = memory("fsdp", (0,), dp=1)
    assert "gathered" not in alone
    assert alone == memory("ddp", (0,), dp=1) == memory("fsdp", (0,), dp=1, tp=1)
    two = memory("fsdp", (0,), dp=2)
    assert two == memory("fsdp", (0,), dp=2, tp=1) == memory("fsdp", (0, 1), dp_replicate=1, dp_shard=2)
    assert two == memory("fsdp", (0, 1), dp_shard=2, dp_replicate=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dropout_mask_is_not_kept(ranks: int) -> None:
    """It follows from the seed. On an axis of one rank all layouts are one, and none is worth keeping for backward."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.dropout, self.down = nn.Linear(8, 32), nn.Dropout(0.1), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.down(self.dropout(nn.functional.gelu(self.up(x)))).square().mean()}

    program = captured(Dropping(), {"x": torch.randn(4, 8)})
    space = search_space(
        program, topology(hardware("h100"), {"dp": ranks}), (0,), strategy="ddp", recompute="pointwise"
    )
    priced = price(space)
    assignment = priced.assignment(solve(priced.problem, gap=1e-3).picks, len(space.sites))
    saved = [node for node in split(rewrite(space, assignment)).saved if node.meta["val"].dim()]
    assert [str(node.target) for node in saved] == ["aten.add.Tensor"] * 2  # what goes into gelu, and what is squared
