"""Lowered steps against eager torch, and the choice of what is saved against brute force."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_steps import Net, NetOutput, local_step
from parity import captured, planned
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend

from passes.lower.cuda_attention import kernel_of
from passes.lower.lower import lower
from passes.lower.partition import split
from passes.lower.retarget import retarget
from passes.program.local import LocalInput, LocalOutput, LocalProgram, Storage
from passes.program.program import Input, Output, Program

aten = torch.ops.aten


def values_of(local: LocalProgram, model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    given = iter(inputs)
    return [
        state[i.name].detach() if i.kind in ("parameter", "buffer") else next(given)
        for i in local.inputs
        if i.kind != "tangent"
    ]


def eager_step(model: Net, ids: torch.Tensor, labels: torch.Tensor) -> tuple[NetOutput, dict[str, torch.Tensor]]:
    out = model(ids, labels)
    assert out.loss is not None
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compile", [False, True])
def test_lowered_step_is_eagers(compile: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    ids, labels = torch.randint(0, 10, (2, 2, 5))
    local = local_step(model, (ids,), {"labels": labels}, ())
    lowered = lower(local, compile=compile)
    results, saved = lowered.forward(values_of(local, model, ids, labels))
    gradients = lowered.backward(saved, [torch.tensor(1.0)])
    out, wanted = eager_step(model, ids, labels)

    named = dict(zip([o.name for o in local.outputs if o.kind != "gradient"], results, strict=True))
    torch.testing.assert_close(named["output.0"], out.loss)
    torch.testing.assert_close(named["output.1"], out.logits)
    assert named["calls"] == 1
    found = dict(zip([o.name for o in local.outputs if o.kind == "gradient"], gradients, strict=True))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


class Begun(nn.Module):
    """Keys behind those of an empty cache, as transformers begins one, times a table of numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = self.key(x).unflatten(-1, (2, 4)).transpose(1, 2)
        key = torch.cat([torch.tensor([]), key], dim=-2)
        return (key @ key.mT * torch.tensor([math.sin(i) for i in range(25)]).view(5, 5)).exp()


def test_a_cache_that_begins_and_a_table_in_the_code_are_compiled() -> None:
    torch.manual_seed(0)
    model, x, tangent = Begun(), torch.randn(3, 5, 6), torch.randn(3, 2, 5, 5)
    _, _, local = planned(captured(model, {"x": x}), {"dp": 1}, "ddp")
    assert any(node.op == "get_attr" for node in local.graph.graph.nodes)
    lowered = lower(local, compile=True)
    (result,), saved = lowered.forward(values_of(local, model, x, torch.tensor(0)))
    wanted = model(x)
    torch.testing.assert_close(result, wanted)
    wanted.backward(tangent)
    names = [o.name for o in local.outputs if o.kind == "gradient"]
    for name, gradient in zip(names, lowered.backward(saved, [tangent]), strict=True):
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_forward_alone_has_no_backward_and_takes_inputs_of_any_stride() -> None:
    model = Net()
    ids = torch.randint(0, 10, (5, 2)).t()
    local = local_step(model, (torch.zeros(2, 5, dtype=torch.int64),), {}, (), backward=False)
    lowered = lower(local, compile=True)
    results, saved = lowered.forward(values_of(local, model, ids))
    assert lowered.halves.backward is None
    assert saved == ()
    torch.testing.assert_close(results[0], model(ids).logits)
    with pytest.raises(ValueError, match="without gradients"):
        lowered.backward(saved, [])


def test_gathered_parameters_are_gathered_again_and_not_saved() -> None:
    model = Net()
    ids = torch.zeros(2, 5, dtype=torch.int64)
    halves = split(local_step(model, (ids,), {"labels": ids}, (("dp", 4),)))
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    assert halves.backward is not None
    forward = [n.args[0].name for n in halves.forward.graph.find_nodes(op="call_function", target=gather)]
    backward = [n.args[0].name for n in halves.backward.graph.find_nodes(op="call_function", target=gather)]
    assert len(forward) == 8  # every parameter but the unused one, once
    # What the program gathers for backward by itself, once; of the rest the backward keeps what it needs.
    assert len(backward) == len(set(backward)) == 3
    assert set(backward) < set(forward)
    waits = [n for n in halves.saved if n.target is torch.ops._c10d_functional.wait_tensor.default]
    assert not {n.args[0].args[0].name for n in waits} & set(backward)


def program_of(gm: fx.GraphModule, kinds: list[str], gradients: int) -> LocalProgram:
    """`gm` as a local program with inputs of `kinds`, its last `gradients` outputs being gradients."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    results = gm.graph.output_node().args[0]
    names = [f"x{i}" for i in range(len(results))]
    out = ["output"] * (len(results) - gradients) + ["gradient"] * gradients
    program = Program(gm, tuple(Input(k, p.name) for k, p in zip(kinds, placeholders, strict=True)),
                      tuple(Output(k, n) for k, n in zip(out, names, strict=True)), None, {}, None, {})  # type: ignore[arg-type] # fmt: skip
    storage = Storage((1,), ())
    return LocalProgram(
        gm,
        tuple(LocalInput(k, p.name, storage) for k, p in zip(kinds, placeholders, strict=True)),  # type: ignore[arg-type]
        tuple(LocalOutput(k, n, storage) for k, n in zip(out, names, strict=True)),  # type: ignore[arg-type]
        (),
        program,
    )


def traced(function: Any, *examples: torch.Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*examples)


def test_backward_keeps_what_it_reads() -> None:
    """By hand: a base and no view of it, an item and not its tuple, no constant, nothing made of parameters alone."""

    def step(w: torch.Tensor, x: torch.Tensor, tangent: torch.Tensor) -> Any:
        wide = w.double()  # of a parameter alone
        base = x.cumsum(0)
        turned = base.t()
        values, _ = base.sort(0)
        ones = torch.ones(3, 3)
        return turned * 1, (tangent * wide * turned).float(), (tangent * base) * (values + 1).sin() * ones

    kinds = ["parameter", "input", "tangent"]
    halves = split(program_of(traced(step, *(torch.rand(3, 3) for _ in kinds)), kinds, 2))
    assert [str(node.target) for node in halves.saved] == ["aten.cumsum.default", "aten.sin.default"]
    assert [halves.forward.graph.find_nodes(op="placeholder")[i].name for i in halves.saved_inputs] == ["w_1"]
    given = [torch.rand(3, 3) for _ in kinds]
    out, *saved = halves.forward(*given[:2])
    assert halves.backward is not None
    torch.testing.assert_close((out, *halves.backward(given[0], *saved, given[2])), step(*given))


def test_a_collective_of_activations_is_saved_and_never_repeated() -> None:
    reduce, wait = torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default

    def step(x: torch.Tensor, tangent: torch.Tensor) -> Any:
        whole = wait(reduce(x.sin(), "sum", "tp"))
        return whole * 1, tangent * whole.cos()

    halves = split(program_of(traced(step, torch.ones(3), torch.ones(3)), ["input", "tangent"], 1))
    assert halves.backward is not None
    assert not halves.backward.graph.find_nodes(op="call_function", target=reduce)


def attention(mask: bool, dtype: torch.dtype, causal: bool = False, dim: int = 16, groups: int = 1) -> fx.GraphModule:
    """Attention of four heads and its backward; `groups` query heads share a key's."""

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor, tangent: torch.Tensor) -> Any:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, m if mask else None, is_causal=causal, enable_gqa=groups > 1
        )
        merged = out.transpose(1, 2).contiguous().view(2, 5, -1) + torch.zeros(1)
        return (merged.detach(), *torch.autograd.grad(merged, (q, k, v), tangent))

    # Three tensors: one would be traced as one input.
    heads = [torch.ones(2, 4 // share, 5, dim, dtype=dtype) for share in (1, groups, groups)]
    examples = *heads, torch.ones(2, 1, 5, 5, dtype=torch.bool), torch.ones(2, 5, 4 * dim, dtype=dtype)
    return traced(step, *examples)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "groups"), [(16, 1), (6, 1), (16, 2), (6, 4)])
def test_attention_takes_cuda_kernels(mask: bool, dtype: torch.dtype, dim: int, groups: int) -> None:
    """On fake CUDA tensors: the kernels, and that the renewed values all lie on CUDA with the shapes they had."""
    gm = attention(mask, dtype, causal=not mask, dim=dim, groups=groups)
    assert any(n.target is aten._scaled_dot_product_flash_attention_for_cpu.default for n in gm.graph.nodes)
    moved = retarget(gm, torch.device("cuda"))
    targets = [str(n.target) for n in moved.graph.nodes]
    if torch.cuda.is_available() and not mask and dtype == torch.bfloat16 and dim == 16:
        return  # what eager takes on that device
    kernel = "efficient" if mask or dtype == torch.float32 else "flash"
    assert sum(f"{kernel}_attention.default" in t for t in targets) == 1
    assert sum(f"{kernel}_attention_backward.default" in t for t in targets) == 1
    assert not any("for_cpu" in t for t in targets)
    for before, after in zip(gm.graph.output_node().args[0], moved.graph.output_node().args[0], strict=True):
        assert before.meta["val"].shape == after.meta["val"].shape
        assert after.meta["val"].device.type == "cuda"
    for node in moved.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            assert node.meta["val"].device.type == "cuda", node
    local = program_of(moved, ["input"] * 4 + ["tangent"], 3)
    assert split(local).backward is not None


def test_a_step_with_a_shape_that_follows_from_values_is_moved_to_cuda() -> None:
    """Tokens that a mask picks, as in a masked language model: captured with the number that the example has."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.head(x)[mask].square().mean()

    mask = torch.tensor([[True, False, True], [False, True, True]])
    gm = planned(captured(Picked(), {"x": torch.ones(2, 3, 4), "mask": mask}), {"dp": 1}, "ddp")[2].graph
    moved = retarget(gm, torch.device("cuda"))
    for before, after in zip(gm.graph.nodes, moved.graph.nodes, strict=True):
        if isinstance(before.meta.get("val"), torch.Tensor):
            assert before.meta["val"].shape == after.meta["val"].shape
            assert after.meta["val"].device.type == "cuda", after


def test_the_kernel_that_runs_attention_is_one_that_has_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask that is not square begins elsewhere in flash attention; some devices have none."""

    def kernel(queries: int, *, causal: bool) -> str:
        shapes = [(2, 4, queries, 16), (2, 4, 5, 16), (2, 4, 5, 16)]
        return kernel_of(shapes, torch.bfloat16, False, 0.0, causal, torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [kernel(5, causal=True), kernel(3, causal=False)] == ["flash", "flash"]
    assert [kernel(3, causal=True), kernel(7, causal=True)] == ["efficient", "efficient"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for backend, taken in (("FLASH", "flash"), ("CUDNN", "cudnn"), ("EFFICIENT", "efficient")):
        chosen = getattr(SDPBackend, f"{backend}_ATTENTION").value
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, chosen=chosen, **__: chosen)
        assert kernel(5, causal=True) == taken


def test_compiled_backward_frees_saved_values_as_it_goes() -> None:
    """The first saved values are gone when the last gradient is made; a custom op looks."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    @torch.library.custom_op("autopar_test::look", mutates_args=())
    def look(x: torch.Tensor) -> torch.Tensor:
        alive.append(held[0]() is not None)
        return x.clone()

    @look.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    def step(x: torch.Tensor, tangent: torch.Tensor) -> Any:
        first = x.cumsum(0)
        return first * 1, torch.ops.autopar_test.look((tangent * first.cos()).cumsum(0))

    local = program_of(traced(step, torch.ones(64, 64), torch.ones(64, 64)), ["input", "tangent"], 1)
    lowered = lower(local, compile=True)
    for consumed in (True, False):
        _, saved = lowered.forward([torch.ones(64, 64)])
        kept = list(saved)
        held[:] = [weakref.ref(kept[0])]
        if consumed:
            del saved
        lowered.backward(kept, [torch.ones(64, 64)])
        assert kept == []
    assert alive == [False, True]


def test_private_torch_api_is_where_it_was() -> None:
    from torch._inductor import compile as inductor_compile

    gm = traced(lambda x: (x.sin(), x.t()), torch.ones(2, 3))
    with FakeTensorMode():
        example = torch.empty(2, 3)
    with torch.no_grad():
        compiled = inductor_compile(gm, [example])
    sine, turned = compiled(torch.ones(2, 3))
    torch.testing.assert_close(sine, torch.ones(2, 3).sin())
    assert turned.shape == (3, 2)
    assert replace(Storage((1,), ()), shape=(2,)).shape == (2,)
