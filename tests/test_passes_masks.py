from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passes.capture.capture import capture
from passes.prepare.masks import use_causal_flag
from passes.program.program import Program

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.graph.nodes if node.target in (FLASH, FLASH_BACKWARD)]


def flags(program: Program) -> set[tuple[bool, bool]]:
    """(has a mask, is_causal) of the calls, by the operator's schema."""
    found = set()
    for node in calls(program):
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        found.add((given.get("attn_mask") is not None, bool(given.get("is_causal", False))))
    return found


MASKED, CAUSAL, PLAIN = (True, False), (False, True), (False, False)


# ------------------------------------------------------------------------------------------------------------- models
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(  # type: ignore[no-any-return]
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def mistral(window: int = 5) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.MistralForCausalLM(  # type: ignore[no-any-return]
        transformers.MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=window,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForMaskedLM(  # type: ignore[no-any-return]
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(  # type: ignore[no-any-return]
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )  # fmt: skip


def run(program: Program, model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """What the program's graph gives on real data, by (kind, name)."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers()), **batch}
    values = [torch.ones(()) if i.kind == "tangent" else held[i.name].detach() for i in program.inputs]
    results = program.graph(*values)
    return {(o.kind, o.name): r for o, r in zip(program.outputs, results, strict=True)}


class OwnMask(nn.Module):
    """A model that is given a mask made on the way: 4 dims of it, as a compiled model makes them."""

    def __init__(self, model: nn.Module, window: int | None) -> None:
        super().__init__()
        self.model, self.window, self.both_ways = model, window, "Bert" in type(model).__name__

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        batch, length = input_ids.shape
        mask = hugging_face_mask(batch, length, self.window)
        if self.both_ways:
            mask = torch.zeros_like(mask)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, float("-inf"))
        return self.model(input_ids=input_ids, labels=labels, attention_mask=mask)


def batch_of(padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (3, 17))
    batch = {"input_ids": ids, "labels": ids}
    if padded:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, -4:] = 0
    return batch


def check_numbers(model: nn.Module, program: Program, batch: dict[str, Tensor], before: dict[Any, Tensor]) -> None:
    """Loss and gradients of the graph are what eager gives, and what they were."""
    after = run(program, model, batch)
    loss = model(**batch).loss
    loss.backward()
    eager = {("gradient", name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    eager["output", "loss"] = loss.detach()
    assert len(eager) > 15
    for key, value in eager.items():
        torch.testing.assert_close(after[key], value, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("build", "window", "expected"),
    [(llama, None, CAUSAL), (gpt2, None, CAUSAL), (llama, 5, MASKED), (llama, 40, CAUSAL), (bert, None, PLAIN)],
)
def test_models_that_make_a_mask_keep_their_numbers(
    build: Callable[[], nn.Module], window: int | None, expected: tuple[bool, bool], padded: bool
) -> None:
    torch.manual_seed(0)
    model, batch = OwnMask(build(), window), batch_of(padded)
    program = capture(model, (), batch, batch_size=3)
    assert flags(program) == {MASKED}
    before, fingerprint, nodes = run(program, model, batch), program.fingerprint, len(program.graph.graph.nodes)

    changed = use_causal_flag(program)

    assert len(calls(changed)) == 4
    assert flags(changed) == {MASKED if padded else expected}
    dropped = flags(changed) != {MASKED}
    assert (changed.fingerprint != fingerprint) == dropped
    assert (len(changed.graph.graph.nodes) < nodes) == dropped
    assert all({"val", "phase", "module", "source"} <= set(node.meta) for node in calls(changed))
    check_numbers(model, changed, batch, before)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("build", "expected"),
    [(llama, CAUSAL), (gpt2, CAUSAL), (mistral, MASKED), (lambda: mistral(window=40), CAUSAL), (bert, PLAIN)],
    ids=["llama", "gpt2", "mistral", "mistral-wide-window", "bert"],
)
def test_models_as_they_are(build: Callable[[], nn.Module], expected: tuple[bool, bool], padded: bool) -> None:
    """Whether the capture finds a mask that the model made or none."""
    torch.manual_seed(0)
    model, batch = build(), batch_of(padded)
    program = capture(model, (), batch, batch_size=3)
    before = run(program, model, batch)
    changed = use_causal_flag(program)
    assert flags(changed) == {MASKED if padded else expected}
    check_numbers(model, changed, batch, before)


def test_forward_alone() -> None:
    model, ids = llama(), torch.arange(12).view(2, 6)
    program = use_causal_flag(capture(model, (), {"input_ids": ids}, batch_size=2, backward=False))
    assert flags(program) == {CAUSAL}
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(run(program, model, {"input_ids": ids})["output", "logits"], expected)


# ------------------------------------------------------------------------------------------- masks written by hand
def masked_program(make: Callable[[], Tensor | None], shape: tuple[int, ...], keys: int | None = None) -> Program:
    """Attention on queries of `shape` with a mask made in the graph, on fake tensors: forward and backward."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        mask = make()
        out, lse = FLASH(q, k, v, 0.0, False, attn_mask=mask)
        return (out, *FLASH_BACKWARD(out, q, k, v, out, lse, 0.0, False, attn_mask=mask))

    keyed = (*shape[:2], keys or shape[2], shape[3])
    with FakeTensorMode():
        operands = [torch.empty(size) for size in (shape, keyed, keyed)]
        gm = make_fx(step)(*operands)
    for node in gm.graph.nodes:
        node.meta.update(phase="forward", module="", source="")
    return Program(gm, (), (), None, {}, None, {})


def attends(mask: Tensor | None, queries: int, keys: int) -> tuple[bool, bool]:
    """What the pass should make of a mask, from every one of its elements."""
    assert mask is not None
    sees, hides = (mask, ~mask) if mask.dtype is torch.bool else (mask == 0, mask <= -1e4)
    if bool(sees.all()):
        return PLAIN
    lower = torch.ones(queries, keys, dtype=torch.bool).tril()
    same = bool((sees == lower).all()) and bool((hides == ~lower).all())
    return CAUSAL if same and queries == keys else MASKED


def by(queries: int, keys: int, rule: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """`rule` of each query's position and each key's."""
    made: Tensor = rule(torch.arange(queries)[:, None], torch.arange(keys)[None, :])
    return made


def added(see: Tensor, hidden: float = float("-inf")) -> Tensor:
    return torch.where(see, 0.0, hidden)


def poked(see: Tensor, row: int, column: int) -> Tensor:
    """The mask with one element turned over."""
    return see ^ by(see.shape[-2], see.shape[-1], lambda i, j: (i == row) & (j == column))


def causal(n: int) -> Tensor:
    return by(n, n, lambda i, j: j <= i)


MAKERS: dict[str, Callable[[int], Tensor]] = {
    "bool": causal,
    "strict": lambda n: by(n, n, lambda i, j: j < i),
    "one ahead": lambda n: by(n, n, lambda i, j: j <= i + 1),
    "reversed": lambda n: by(n, n, lambda i, j: j >= i),
    "added": lambda n: added(causal(n)),
    "least float": lambda n: added(causal(n), torch.finfo(torch.float32).min),
    "too weak": lambda n: added(causal(n), -100.0),
    "bias": lambda n: added(causal(n)) + 0.5,
    "alibi": lambda n: added(causal(n)) + by(n, n, lambda i, j: (j - i) * 0.1),
    "not a number": lambda n: added(causal(n), float("nan")),
    "all": lambda n: torch.ones(n, n, dtype=torch.bool),
    "all zero": lambda n: torch.zeros(1, 1, n, n),
    "none": lambda n: torch.zeros(n, n, dtype=torch.bool),
    "row of zeros": lambda n: torch.zeros(1, n),
    "tril": lambda n: torch.ones(n, n).tril() == 1,
    "triu": lambda n: torch.full((n, n), float("-inf")).triu(1),
    "triu 0": lambda n: torch.full((n, n), float("-inf")).triu(),
    "product": lambda n: (1.0 - torch.ones(n, n).tril()) * torch.finfo(torch.float32).min,
    "negated": lambda n: ~by(n, n, lambda i, j: j > i),
    "filled": lambda n: torch.zeros(n, n).masked_fill(~causal(n), float("-inf")),
    "first element": lambda n: poked(causal(n), 0, 0),
    "last row": lambda n: poked(causal(n), n - 1, n - 2),
    "last column": lambda n: poked(causal(n), n - 2, n - 1),
    "corner": lambda n: poked(causal(n), n - 1, 0),
    "far corner": lambda n: poked(causal(n), 0, n - 1),
    "window": lambda n: causal(n) & by(n, n, lambda i, j: j > i - 100),
    "wide window": lambda n: causal(n) & by(n, n, lambda i, j: i - j < n),
    "nearly wide window": lambda n: causal(n) & by(n, n, lambda i, j: i - j < n - 1),
    "documents": lambda n: causal(n) & by(n, n, lambda i, j: i // 128 == j // 128),
    "tiles apart": lambda n: by(n, n, lambda i, j: i // 256 == j // 256),
    "tiles behind": lambda n: by(n, n, lambda i, j: i // 256 >= j // 256),
    "one document": lambda n: causal(n) & by(n, n, lambda i, j: i // 4096 == j // 4096),
    "per sample": lambda n: causal(n) & (torch.arange(2).view(2, 1, 1, 1) > 0),
    "samples alike": lambda n: causal(n) & (torch.arange(2).view(2, 1, 1, 1) >= 0),
    "moved": lambda n: causal(n + 3)[3:, 3:].unsqueeze(0).expand(2, n, n).unsqueeze(1),
    "shifted": lambda n: causal(n + 3)[3:, :-3],
    "transposed": lambda n: by(n, n, lambda i, j: i <= j).transpose(0, 1)[None, None],
    "viewed": lambda n: causal(n).view(1, n, 1, n).permute(0, 2, 1, 3),
    "flipped": lambda n: causal(n).flip(0),
    "twice flipped": lambda n: causal(n).flip((0, 1)).transpose(0, 1),
    "indexed": lambda n: causal(n)[torch.arange(n)[:, None], torch.arange(n)[None, :]],
    "counted": lambda n: (lambda c: c[None, :] <= c[:, None])(torch.ones(n, dtype=torch.int64).cumsum(0)),
    "joined": lambda n: (lambda c: c[None, :] <= c[:, None])(torch.cat([torch.arange(1), torch.arange(1, n)])),
    "by bytes": lambda n: causal(n).to(torch.uint8).to(torch.bool),
}


@pytest.mark.parametrize("length", [2, 300, 700])
@pytest.mark.parametrize("name", MAKERS)
def test_mask_by_hand_is_read_right(name: str, length: int) -> None:
    """Against the mask's own elements; 700 is past what is computed at once, and no multiple of a tile."""

    def make() -> Tensor:
        mask = MAKERS[name](length)
        return mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)

    expected = attends(make(), length, length)
    assert flags(use_causal_flag(masked_program(make, (2, 2, length, 8)))) == {expected}


def test_enough_of_them_are_read() -> None:
    found = [attends(make(300), 300, 300) for make in MAKERS.values()]
    assert min(found.count(kind) for kind in (CAUSAL, PLAIN, MASKED)) >= 3


def test_other_lengths() -> None:
    def make(queries: int, keys: int) -> Callable[[], Tensor]:
        return lambda: by(queries, keys, lambda i, j: j <= i)[None, None]

    assert flags(use_causal_flag(masked_program(make(8, 12), (2, 2, 8, 8), 12))) == {MASKED}
    assert flags(use_causal_flag(masked_program(make(12, 8), (2, 2, 12, 8), 8))) == {MASKED}
    seeing = masked_program(lambda: torch.zeros(1, 1, 8, 12), (2, 2, 8, 8), 12)
    assert flags(use_causal_flag(seeing)) == {PLAIN}
    assert flags(use_causal_flag(masked_program(make(1, 1), (2, 2, 1, 8)))) == {PLAIN}


def test_random_masks_stay() -> None:
    program = masked_program(lambda: added(torch.rand(1, 1, 8, 8) < 2.0), (2, 2, 8, 8))
    assert flags(use_causal_flag(program)) == {MASKED}


def test_unknown_values_stay() -> None:
    program = masked_program(lambda: torch.empty(1, 1, 8, 8), (2, 2, 8, 8))
    assert flags(use_causal_flag(program)) == {MASKED}


@pytest.mark.parametrize("kept", [False, True])
def test_constant_tensor(kept: bool) -> None:
    """A mask that the graph holds is dropped with its last use."""
    program = masked_program(lambda: torch.zeros(1, 1, 8, 8), (2, 2, 8, 8))
    gm = program.graph
    gm.register_buffer("constant", added(causal(8))[None, None])
    (made,) = gm.graph.find_nodes(op="call_function", target=aten.zeros.default)
    with gm.graph.inserting_before(made):
        node = gm.graph.get_attr("constant")
    node.meta = dict(made.meta)
    made.replace_all_uses_with(node)
    if kept:
        (output,) = gm.graph.find_nodes(op="output")
        output.args = ((*output.args[0], node),)
    changed = use_causal_flag(program)
    assert flags(changed) == {CAUSAL}
    assert hasattr(changed.graph, "constant") is kept
    q, k, v = torch.randn(3, 2, 2, 8, 8)
    torch.testing.assert_close(changed.graph(q, k, v)[0], F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_mask_beside_the_flag_stays() -> None:
    program = masked_program(lambda: added(causal(8))[None, None], (2, 2, 8, 8))
    for node in calls(program):
        node.args = (*node.args[: 3 if node.target is FLASH else 6], 0.0, True)
    assert flags(use_causal_flag(program)) == {(True, True)}


def hugging_face_mask(batch: int, length: int, window: int | None) -> Tensor:
    """The steps that `transformers` takes: packed documents found by a sum over positions, indexed per sample."""
    positions = torch.arange(length).unsqueeze(0).expand(batch, -1)
    before = torch.cat([positions[:, :1] - 1, positions], -1)
    document = (before[:, 1:] - before[:, :-1] != 1).cumsum(-1)
    sample = torch.arange(batch).view(batch, 1, 1, 1)
    q, k = torch.arange(length).view(1, 1, length, 1), torch.arange(length).view(1, 1, 1, length)
    see = document[sample, q] == document[sample, k]
    see = see & (positions[sample, k] <= positions[sample, q])
    if window is not None:
        see = see & (positions[sample, k] > positions[sample, q] - window)
    return added(see)


class Sizes(TorchDispatchMode):
    """Watches for the largest tensor that is made."""

    largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self.largest_bytes = max(self.largest_bytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("batch", "length", "window", "expected"),
    [
        (128, 8192, None, CAUSAL),
        (128, 8192, 4096, MASKED),
        (128, 8192, 8191, MASKED),
        (128, 8192, 8192, CAUSAL),
        (64, 131072, None, CAUSAL),
    ],
)
def test_large_masks_are_read_quickly_in_little_memory(
    batch: int, length: int, window: int | None, expected: tuple[bool, bool]
) -> None:
    program = masked_program(lambda: hugging_face_mask(batch, length, window), (batch, 1, length, 1))
    start_s = time.process_time()
    with Sizes() as sizes:
        changed = use_causal_flag(program)
    took_s = time.process_time() - start_s
    assert flags(changed) == {expected}
    assert took_s < (1.0 if length <= 8192 else 5.0)
    assert 0 < sizes.largest_bytes <= 16 * 2**20


def test_a_graph_without_attention_is_left() -> None:
    program = capture(nn.Linear(3, 2), (torch.ones(4, 3),), batch_size=4)
    before: Any = program.fingerprint, len(program.graph.graph.nodes)
    changed = use_causal_flag(program)
    assert (changed.fingerprint, len(changed.graph.graph.nodes)) == before
