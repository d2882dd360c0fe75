"""A deep program at another batch, made of a shallower one's captures: held against a capture of its own."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from autopar.runs.profiling import Captures
from passes.capture.capture import capture
from passes.capture.inputs import global_inputs
from passes.planner.pipeline import prepare
from passes.program.program import Program
from passes.rules.call import facts_of
from passes.runs.rebatch import rebatched, told

SEQUENCE = 64


def ids(parts: int = 1) -> dict[str, Tensor]:
    one = torch.empty(1, SEQUENCE // parts, dtype=torch.long, device="meta")
    return {"input_ids": one, "labels": one}


def captured(model: nn.Module, batch: int) -> Program:
    whole = global_inputs((), ids(), batch)
    return capture(
        model, whole.args, whole.kwargs, batch_dims=whole.batch_dims, batch_size=whole.batch_size
    )  # fmt: skip


def expressions(program: Program) -> list[str]:
    """Of each output, in words that do not depend on the order of nodes, what is computed: by which ops, where, on
    which inputs, of which sizes."""
    inputs = iter(program.inputs)
    said: dict[fx.Node, str] = {}

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return said[value]
        if isinstance(value, list | tuple):
            return f"[{','.join(map(text, value))}]"
        return repr(value)

    for node in program.graph.graph.nodes:
        if node.op == "output":
            return [text(value) for value in node.args[0]]
        val = node.meta["val"]
        facts = [facts_of(each) for each in val] if isinstance(val, list | tuple) else [facts_of(val), val.stride()]
        what = str(next(inputs)) if node.op == "placeholder" else f"{node.target}"
        if node.op == "get_attr":
            what = str(getattr(program.graph, str(node.target)).tolist())
        arguments = f"{text(node.args)} {[(key, text(value)) for key, value in node.kwargs.items()]}"
        place = [node.meta.get(key) for key in ("phase", "module", "source")]
        said[node] = hashlib.sha256(f"{what} {arguments} {facts} {place}".encode()).hexdigest()
    raise AssertionError("no output")


def llama(layers: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=128, use_cache=False,
        )
    )  # fmt: skip


def gemma(layers: int) -> nn.Module:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=128, sliding_window=16, use_cache=False,
        )
    )  # fmt: skip


def gpt2(layers: int) -> nn.Module:
    """With dropout: each random op has a number of its own."""
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=128, n_positions=SEQUENCE, use_cache=False)
    )


def mixtral(layers: int) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, vocab_size=128, use_cache=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("make", "shallow", "deep"), [(llama, 3, 4), (gemma, 7, 13), (gpt2, 3, 4), (mixtral, 3, 4)])
def test_it_computes_what_a_capture_does(make: Callable[[int], nn.Module], shallow: int, deep: int) -> None:
    with torch.device("meta"):
        small, large = make(shallow).to(torch.bfloat16), make(deep).to(torch.bfloat16)
    like, other = told(captured(small, 2)), told(captured(small, 6))
    made = rebatched(told(captured(large, 2)), like, other)
    assert made is not None
    wanted = captured(large, 6)
    assert (made.inputs, made.outputs) == (wanted.inputs, wanted.outputs)
    assert (made.notes, made.aliases) == (wanted.notes, wanted.aliases)
    assert expressions(made) == expressions(wanted)
    assert made.fingerprint == wanted.fingerprint
    assert [node.name for node in made.graph.graph.nodes] == [node.name for node in wanted.graph.graph.nodes]


class Stack(nn.Module):
    """Residual layers between an embedding and a head; what a layer adds is multiplied by what `scale` says of its
    number and of the batch."""

    def __init__(self, layers: int, scale: Callable[[int, int], float | int]) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        layer = [nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)]
        self.layers = nn.ModuleList(nn.Sequential(*copy.deepcopy(layer)) for _ in range(layers))
        self.head = nn.Linear(32, 128)
        self.scale = scale

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            scale = self.scale(number, len(input_ids))
            x = x + (layer(x) * scale if scale else layer(x))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())


def made_of(scale: Callable[[int, int], float | int]) -> tuple[Program | None, Program]:
    """Four layers at a batch of 6, made of three and captured."""
    with torch.device("meta"):
        small, large = Stack(3, scale), Stack(4, scale)
    made = rebatched(told(captured(large, 2)), told(captured(small, 2)), told(captured(small, 6)))
    return made, captured(large, 6)


def test_a_number_that_follows_the_batch_is_that_of_the_other_batch() -> None:
    made, wanted = made_of(lambda number, batch: 1 / batch)
    assert made is not None
    assert expressions(made) == expressions(wanted)


@pytest.mark.parametrize(
    "scale",
    [
        lambda number, batch: 0.5 if batch > 4 else 0,  # another branch at the other batch
        lambda number, batch: 1.0 + number,  # the fourth layer does what none of three does
        lambda number, batch: float(batch) if number == 1 else 2.0,  # alike at a batch of 2 alone
    ],
    ids=["branch", "own layer", "by chance"],
)
def test_what_is_not_certain_is_not_made(scale: Callable[[int, int], float | int]) -> None:
    made, _ = made_of(scale)
    assert made is None


def test_a_value_that_was_read_is_not_taken_for_granted() -> None:
    class Reads(Stack):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            if bool((input_ids >= 0).all()):
                return super().forward(input_ids, labels) * 2
            return super().forward(input_ids, labels)

    def read(model: nn.Module, batch: int) -> Program:
        whole = global_inputs((), {k: torch.zeros(1, SEQUENCE, dtype=torch.long) for k in ids()}, batch)
        return capture(model, whole.args, whole.kwargs, batch_dims=whole.batch_dims, batch_size=batch)

    small, large = Reads(3, lambda *_: 0), Reads(4, lambda *_: 0)
    assert read(small, 2).guards is not None
    assert rebatched(told(read(large, 2)), told(read(small, 2)), told(read(small, 6))) is None


def test_a_further_batch_takes_one_capture_of_the_shallowest() -> None:
    told_: list[str] = []
    with torch.device("meta"):
        model = llama(9)
    captures = Captures(model, ids, progress=told_.append)
    for batch in (2, 4, 8):
        for prefix in (1, 0):
            captures.program(prefix, batch, 1)
    layers = [text.split(":")[1].split(",")[0].strip() for text in told_]
    assert layers == ["4 layers", "3 layers", "3 layers", "3 layers"]
    wanted = prepare(captured(captures.shallow.prefixes[1].model, 8))
    assert expressions(captures.program(1, 8, 1)) == expressions(wanted)
