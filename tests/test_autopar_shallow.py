"""Depth from a few layers: held against schedules of the whole model, and against sums by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_models import sized_llama, tokens
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import autopar
from autopar.runs.profiling import Captures, Profiler
from autopar.runs.shallow import Prefix, Shallow, _depths, shallow
from costmodel.memory import OPTIMIZERS
from costmodel.presets import hardware
from passes.runs.candidate_memory import sharded_peak_bytes
from passes.runs.depth import PLACES, Profile, _entered
from passes.runs.setup import Setup
from passes.space.recompute import Mode

LAYERS = 9


def llama(layers: int = LAYERS, vocabulary: int = 512) -> nn.Module:
    return sized_llama(256, 512, layers, 8, 4, vocabulary).to(torch.bfloat16)


inputs = tokens(512)


def peak_bytes(found: Profile) -> float:
    return sharded_peak_bytes(Setup(), found, None)


def profiler(*, whole: bool) -> Profiler:
    captures = Captures(llama(), inputs)
    if whole:
        prefix = captures.shallow.prefixes[0]
        captures.shallow = Shallow((type(prefix)(llama(), LAYERS, 1.0, 0.0),), LAYERS)
    return Profiler(captures, hardware("h100"), OPTIMIZERS["adamw-master"])


@pytest.mark.parametrize(
    ("setup", "replica"),
    [
        (Setup(dp_shard=8, micro_batch=2), False),
        (Setup(dp_shard=2, tp=4, micro_batch=2, recompute="full"), False),
        (Setup(tp=4, micro_batch=2), True),
    ],
)
def test_few_layers_tell_what_all_take(setup: Setup, replica: bool) -> None:
    """Seconds, bytes and counts of 9 layers from 3 and 4, exactly; the peak as the played one."""
    few = profiler(whole=False).profile(setup, replica=replica)
    many = profiler(whole=True).profile(setup, replica=replica)
    for name, value in many.whole.items():
        if name.startswith(("compute.", "exposed.")) or name in ("micro_s", "elements", "boundary", "optimizer_s"):
            assert few.whole.get(name, 0.0) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert peak_bytes(few) == pytest.approx(peak_bytes(many), rel=0.02)


class Mixed(nn.Module):
    """Residual MLPs with a norm on the branch, wide or narrow, between an embedding and a head."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 256)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, width), nn.GELU(), nn.Linear(width, 256), nn.LayerNorm(256))
            for width in widths
        )
        self.head = nn.Linear(256, 512)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())


@pytest.mark.parametrize(
    ("widths", "depths"), [([512, 512, 2048] * 7 + [512], [5, 7, 8]), ([512, 2048] * 8, [6, 8])], ids=["aab", "ab"]
)
@pytest.mark.parametrize("setup", [Setup(dp_shard=8, micro_batch=2), Setup(dp_shard=2, tp=4, recompute="full")])
def test_layers_that_alternate_are_told_from_few(widths: list[int], depths: list[int], setup: Setup) -> None:
    """Against the whole model played: narrow layers hide less of the next one's gather, so neighbours matter.

    Where the reduction of a number (12 us) hides at one depth and not at another, it counts as often as that depth.
    """

    def profile(captures: Captures) -> Profile:
        return Profiler(captures, hardware("h100"), OPTIMIZERS["adamw-master"]).profile(setup, replica=False)

    with torch.device("meta"):
        model = Mixed(widths).to(torch.bfloat16)
    captures, whole = Captures(model, inputs), Captures(model, inputs)
    assert [prefix.layers for prefix in captures.shallow.prefixes] == depths
    whole.shallow = Shallow((Prefix(model, len(widths), 1.0, 0.0),), len(widths))
    few, many = profile(captures), profile(whole)
    for name, value in many.whole.items():
        if not name.startswith("alive."):
            timed = name.startswith(("exposed", "hidden")) or name in ("micro_s", "forward_s", "slowed_s")
            near = 0.04 * many.whole["micro_s"] if timed else 1e-9
            assert few.whole.get(name, 0.0) == pytest.approx(value, rel=1e-6, abs=near), name
    assert peak_bytes(few) == pytest.approx(peak_bytes(many), rel=0.01)


def test_alike_layers_need_two_depths() -> None:
    found = shallow(llama())
    assert [prefix.layers for prefix in found.prefixes] == [3, 4]
    assert found.layers == LAYERS
    assert len(found.prefixes[0].model.model.layers) == 3  # type: ignore[union-attr, arg-type]
    assert sum(prefix.weight for prefix in found.prefixes) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "kinds", [[0] * 12, [0, 1] * 12, [0] * 3 + [1] * 30, [0, 0, 0, 0, 0, 1] * 12, [0] + [1] * 20]
)  # fmt: skip
def test_weights_reproduce_any_cost_that_adds_up(kinds: list[int]) -> None:
    """Outside 5, layers of kind k take 2 + 3 k: the whole by hand, from the prefixes' sums."""
    found = _depths(kinds)
    assert found is not None
    depths, weights, _ = found
    costs = [5.0 + sum(2 + 3 * kind for kind in kinds[:depth]) for depth in depths]
    assert sum(w * c for w, c in zip(weights, costs, strict=True)) == pytest.approx(5.0 + sum(2 + 3 * k for k in kinds))


@pytest.mark.parametrize(("layers", "told"), [(6, 0), (7, 7)])
def test_layers_are_told_apart_where_that_captures_no_more_than_all(layers: int, told: int) -> None:
    assert shallow(llama(layers)).layers == told


def test_a_model_without_layers_is_taken_whole() -> None:
    found = shallow(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert found.layers == 0
    assert len(found.prefixes) == 1


def test_a_vocabulary_that_no_axis_divides_is_padded() -> None:
    """As in a plan: each of 4 ranks has 128 of the 509 rows of the embedding and of the head, and all of the norm."""
    found = Profiler(Captures(llama(vocabulary=509), inputs), hardware("h100"), OPTIMIZERS["adamw-master"])
    outside = found.profile(Setup(tp=4, micro_batch=2), replica=True).outside
    assert outside["elements"] == pytest.approx(2 * 128 * 256 + 256)


def test_scales_computed_again_before_the_loss_are_no_layers_backward() -> None:
    """Gemma's norms multiply by 1 + weight, which backward computes again for all layers first: the peak as a plan has
    it at full depth, where a layer's backward outweighs the loss."""
    config = Gemma2Config(
        hidden_size=256, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, vocab_size=128, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config).to(torch.bfloat16)
    mine = Profiler(Captures(model, inputs), hardware("h100"), OPTIMIZERS["adamw-master"])
    found = mine.profile(Setup(dp_shard=2, micro_batch=2), replica=False)
    assert {f"alive.{place}" for place in PLACES} <= found.whole.keys()
    sample = torch.empty(2, 512, dtype=torch.long, device="meta")
    planned = autopar.plan(
        model, {"dp_shard": 2}, {"input_ids": sample, "labels": sample}, strategy="fsdp", hardware="h100",
        options=autopar.Options(optimizer="adamw-master"),
    )  # fmt: skip
    assert planned.recompute == "pointwise"
    assert peak_bytes(found) == pytest.approx(planned.peak_memory_bytes, rel=0.02)


def test_a_layer_is_entered_behind_the_next_one() -> None:
    """Not where it makes what all of them read, as a loop's masks are."""
    phases = [("forward", layer) for layer in "abcd "] + [("backward", layer) for layer in "dad dcba"]
    played = [(phase, layer.strip(), float(i)) for i, (phase, layer) in enumerate(phases)]
    assert _entered(SimpleNamespace(layers=played)) == [5.0, 10.0, 11.0, 12.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_peak_is_at_one_of_the_places(recompute: Mode) -> None:
    """As a plan has it: 4 layers whose backward outweighs the loss, played whole. In full recompute ops of no layer
    (the rotary angles') stand between those of the last one."""
    model, setup = llama(4, 128), Setup(dp_shard=2, micro_batch=16, recompute=recompute)
    captures = Captures(model, inputs)
    assert captures.shallow.layers == 0
    found = Profiler(captures, hardware("h100"), OPTIMIZERS["adamw-master"]).profile(setup, replica=False)
    sample = torch.empty(16, 512, dtype=torch.long, device="meta")
    planned = autopar.plan(
        model, {"dp_shard": 2}, {"input_ids": sample, "labels": sample}, strategy="fsdp", hardware="h100",
        options=autopar.Options(optimizer="adamw-master", recompute=recompute),
    )  # fmt: skip
    assert peak_bytes(found) == pytest.approx(planned.peak_memory_bytes, rel=1e-3)


class Weighed(nn.Module):
    """Multiplies its rows by an input that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (self.up(x) @ weight).square().mean()


def test_an_input_that_samples_share_is_as_large_at_every_batch() -> None:
    call = {"x": torch.empty(1, 8, device="meta"), "weight": torch.empty(8, 3, device="meta")}
    captures = Captures(Weighed(), lambda parts: call, batch_dims={"weight": None})
    program = captures.program(0, 6, 1)
    given = [each for each in program.inputs if each.kind == "input"]
    assert {each.name: each.batch_dim for each in given} == {"x": 0, "weight": None}
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.graph.find_nodes(op="placeholder")]
    assert (6, 8) in shapes
    assert (8, 3) in shapes
    options = autopar.Options(batch_dims={"weight": None})
    found = autopar.search(Weighed(), 2, "h100", 6, call, options=options)
    assert found.options().batch_dims == {"weight": None}


class Windowed(nn.Module):
    """MLPs on the first tokens alone: so many as a tuple or a buffer of the layer says."""

    def __init__(self, tokens: int, kind: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        if kind == "tuple":
            self.window: tuple[int, int] | torch.Tensor = (0, tokens)
        else:
            self.register_buffer("window", torch.ones(tokens, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.window[1] if isinstance(self.window, tuple) else len(self.window)
        near, far = x[:, :tokens], x[:, tokens:]
        return torch.cat([near + self.down(self.up(near).relu()), far], 1)


@pytest.mark.parametrize("kind", ["tuple", "buffer"])
def test_layers_that_differ_by_a_tuple_or_a_buffer_are_not_alike(kind: str) -> None:
    tokens = [8] * 8 + [256] * 8

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers = nn.Linear(64, 64), nn.ModuleList(Windowed(n, kind) for n in tokens)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    with torch.device("meta"):
        model = Stack()
    call = {"x": torch.empty(1, 256, 64, device="meta")}
    found = autopar.price(model, Setup(), "h100", call)
    product = 2 * 64 * 64  # of a token; backward takes two, but for the gradient of the inputs
    assert found.model_flops == pytest.approx(product * (2 * 256 + 3 * 2 * sum(tokens)))


@pytest.mark.parametrize("kind", ["frozen", "cast"])
def test_layers_that_are_frozen_or_in_another_dtype_are_not_alike(kind: str) -> None:
    """Half of sixteen are trained in fp32: 8 bytes of states for each of their parameters, and of the first product's;
    the others are frozen, or have 2 bytes a parameter and 8 of states and 4 of a master copy."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x.to(self.up.weight.dtype)).relu())

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers = nn.Linear(64, 128, bias=False), nn.ModuleList(Layer() for _ in range(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.first(x).chunk(2, -1)
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    with torch.device("meta"):
        model = Stack()
    for layer in model.layers[:8]:
        layer.requires_grad_(kind != "frozen")
        layer.to(torch.float32 if kind == "frozen" else torch.bfloat16)
    call = {"x": torch.empty(1, 256, 64, device="meta")}
    found = autopar.price(model, Setup(), "h100", call)
    each, low = 2 * 64 * 64, kind == "cast"
    assert found.bytes["parameters"] == pytest.approx(each * (9 * 4 + 8 * (2 if low else 4)))
    assert found.bytes["optimizer"] == pytest.approx(each * (9 * (8 + 4 * low) + 8 * 12 * low))
