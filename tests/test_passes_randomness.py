from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from passes.errors import UnsupportedOpError
from passes.parity.simulate import simulate_step
from passes.prepare.randomness import own_randomness
from passes.program.local import DimShard, LocalInput, LocalOutput, LocalProgram, Storage
from passes.program.program import Input, Output, Program
from passes.program.uniform import UNIFORM, emit_uniform, uniform_values

aten = torch.ops.aten
Step = Callable[[Tensor], Any]
U32 = 0xFFFFFFFF


def seed_of(seed: int, step: int) -> Tensor:
    return torch.tensor([seed, step], dtype=torch.int64)


# --------------------------------------------------------------------------- the generator in plain Python integers
def scramble(word: int) -> int:
    word ^= word >> 16
    word = word * 0x5A48AAB7 % 2**32
    word ^= word >> 15
    word = word * 0x5D85AF15 % 2**32
    return word ^ (word >> 16)


def expected_uniform(seed: int, step: int, salt: int, index: int) -> float:
    def absorbed(word: int) -> int:
        return scramble((scramble((word & U32) ^ 0x2545F491) + ((word >> 32) & U32)) & U32)

    a = scramble(absorbed(seed) ^ ((absorbed(step) + 0x1B873593) & U32))
    b = scramble((absorbed(step) + a) & U32)
    a ^= scramble(scramble(salt ^ 0x6C8E9CF5))
    b ^= scramble(scramble(salt ^ 0x3C79AC49))
    b = (b + (index >> 32) * 0x7FEB352D) & U32
    return (scramble((scramble((index & U32) ^ a) + b) & U32) >> 8) / 2**24


@pytest.mark.parametrize(("seed", "step", "salt"), [(0, 0, 0), (1, 2, 3), (2**63 - 1, 10**6, 400), (-5, 2**40, 7)])
def test_values_are_those_of_the_integer_definition(seed: int, step: int, salt: int) -> None:
    values = uniform_values(seed_of(seed, step), salt, [3, 5, 7])
    expected = [expected_uniform(seed, step, salt, i) for i in range(105)]
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == expected


def test_values_across_blocks() -> None:
    size = (1 << 18) + 5
    values = uniform_values(seed_of(9, 1), 2, [size])
    for i in (0, (1 << 18) - 1, 1 << 18, size - 1):
        assert values[i].item() == expected_uniform(9, 1, 2, i)


# ------------------------------------------------------------------------------------------------------ their quality
def draws(seed: int = 0, step: int = 0, salt: int = 0, count: int = 1 << 18) -> Tensor:
    return uniform_values(seed_of(seed, step), salt, [count]).double()


@pytest.mark.parametrize("salt", range(4))
def test_values_are_uniform(salt: int) -> None:
    values = draws(seed=3, step=salt * 7, salt=salt)
    n, bins = len(values), 256
    counts = torch.histc(values, bins, 0, 1)
    chi_square = ((counts - n / bins) ** 2 / (n / bins)).sum().item()
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    ranks = torch.arange(1, n + 1) / n
    largest_gap = (values.sort().values - ranks).abs().max().item()
    assert largest_gap * math.sqrt(n) < 2.2  # Kolmogorov-Smirnov: exceeded with probability 1e-4
    assert values.min() >= 0
    assert values.max() < 1


def test_low_bits_are_uniform() -> None:
    low = (draws(salt=11) * 2**24).long() & 255
    counts = torch.bincount(low, minlength=256).double()
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, in standard deviations of what independent samples give."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1]) * math.sqrt(len(x))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 256, 768, 1024, 4096, 65536])
def test_neighbours_are_independent(lag: int) -> None:
    values = draws(seed=1)
    assert abs(correlation(values[:-lag], values[lag:])) < 5
    # Joint distribution of pairs, which a correlation alone would not see.
    cells = ((values[:-lag] * 16).long() * 16 + (values[lag:] * 16).long()).bincount(minlength=256).double()
    chi_square = ((cells - cells.mean()) ** 2 / cells.mean()).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize(
    "other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 1 << 20, 0), (1, 1, 0), (0, 1, 1)]
)
def test_streams_are_independent(other: tuple[int, int, int]) -> None:
    x, y = draws(), draws(*other)
    assert abs(correlation(x, y)) < 5
    assert (x == y).double().mean() < 1e-5
    bits_equal = 0.0
    for bit in range(24):
        bits_equal += (((x * 2**24).long() ^ (y * 2**24).long()) >> bit & 1 == 0).double().mean().item()
    assert bits_equal == pytest.approx(12, abs=5 * math.sqrt(24 / 4 / len(x)))


def test_seed_and_step_do_not_commute() -> None:
    assert not torch.equal(draws(seed=4, step=9, count=64), draws(seed=9, step=4, count=64))


# ---------------------------------------------------------------------------------------------- parts of a tensor
def emitted(
    salt: int, local: Sequence[int], starts: Sequence[int | None], whole: Sequence[int]
) -> tuple[fx.GraphModule, list[int]]:
    """A graph that takes a seed and one scalar per `None` start, and gives the part."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def placeholder(name: str, shape: tuple[int, ...]) -> fx.Node:
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=torch.int64)
        return node

    seed = placeholder("seed", (2,))
    given = [placeholder(f"start_{d}", ()) if start is None else start for d, start in enumerate(starts)]
    node = emit_uniform(graph, seed, salt, local, given, whole, {"phase": "backward", "module": "m", "source": "f:1"})
    graph.output((node,))
    graph.lint()
    return fx.GraphModule({}, graph), [d for d, start in enumerate(starts) if start is None]


@pytest.mark.parametrize(
    ("whole", "local", "starts"),
    [
        ((8,), (4,), (4,)),
        ((), (), ()),
        ((4, 6), (4, 6), (0, 0)),
        ((4, 6), (2, 6), (2, 0)),
        ((4, 6), (4, 3), (0, 3)),
        ((4, 6, 8), (2, 6, 2), (2, 0, 6)),
        ((4, 6, 8, 3), (1, 6, 4, 3), (3, 0, 4, 0)),
        ((2, 1, 5, 1, 4), (1, 1, 5, 1, 2), (1, 0, 0, 0, 2)),
        ((1, 3, 4), (1, 1, 4), (0, 2, 0)),
        ((0, 3), (0, 3), (0, 0)),
    ],
)
@pytest.mark.parametrize("as_nodes", [False, True])
def test_a_part_is_a_slice_of_the_whole(
    whole: tuple[int, ...], local: tuple[int, ...], starts: tuple[int, ...], as_nodes: bool
) -> None:
    moving = [
        None if as_nodes and part != size else start for part, size, start in zip(local, whole, starts, strict=True)
    ]
    module, dims = emitted(5, local, moving, whole)
    (part,) = module(seed_of(7, 3), *(torch.tensor(starts[d]) for d in dims))
    full = uniform_values(seed_of(7, 3), 5, whole)
    assert torch.equal(part, full[tuple(slice(s, s + n) for s, n in zip(starts, local, strict=True))])


def test_indices_beyond_32_bits() -> None:
    whole, starts = (1 << 20, 1 << 14), (1 << 19, 100)
    module, _ = emitted(0, (2, 3), starts, whole)
    (part,) = module(seed_of(1, 1))
    first = [
        expected_uniform(1, 1, 0, row * whole[1] + column)
        for row in (1 << 19, (1 << 19) + 1)
        for column in (100, 101, 102)
    ]
    assert part.flatten().tolist() == first


def test_emitted_nodes_have_metadata() -> None:
    module, _ = emitted(5, (2, 6), (None, 0), (4, 6))
    for node in module.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], torch.Tensor)
            assert node.meta["phase"] in ("forward", "backward")
    last = next(iter(module.graph.find_nodes(op="output"))).args[0][0]
    assert last.meta["val"].shape == (2, 6)
    assert last.meta["val"].dtype == torch.float32
    assert (last.meta["phase"], last.meta["module"], last.meta["source"]) == ("backward", "m", "f:1")


def test_ops_of_one_graph_share_the_work_on_the_seed() -> None:
    def nodes(count: int) -> int:
        graph, mode = fx.Graph(), FakeTensorMode()
        seed = graph.placeholder("seed")
        with mode:
            seed.meta["val"] = torch.empty(2, dtype=torch.int64)
        graph.output(tuple(emit_uniform(graph, seed, salt, (4,), (0,), (4,)) for salt in range(count)))
        graph.lint()
        module = fx.GraphModule({}, graph)
        for salt, values in enumerate(module(seed_of(2, 2))):
            assert torch.equal(values, uniform_values(seed_of(2, 2), salt, [4]))
        return len(graph.nodes)

    one, two, three = nodes(1), nodes(2), nodes(3)
    assert three - two == two - one < one - 40


@pytest.mark.parametrize("starts", [(0, -1), (3, 0)])
def test_a_part_outside_the_whole_is_refused(starts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not lie within 4"):
        emitted(0, (2, 2), starts, (4, 4))


def test_inductor_gives_the_same_values() -> None:
    whole, huge = (256, 8, 99), (1 << 20, 1 << 14)
    module, _ = emitted(3, (64, 8, 33), (None, 0, 66), whole)
    far, _ = emitted(4, (2, 300), (1 << 19, 100), huge)

    def dropout(seed: Tensor, start: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (draw,) = module(seed, start)
        return draw, torch.where(draw >= 0.25, x / 0.75, 0.0), far(seed)[0]

    args = (seed_of(-11, 5), torch.tensor(128), torch.rand(64, 8, 33))
    torch._dynamo.reset()
    compiled = torch.compile(dropout, fullgraph=True)(*args)
    for got, expected in zip(compiled, dropout(*args), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(compiled[0], uniform_values(args[0], 3, whole)[128:192, :, 66:])
    assert compiled[2][1, 299].item() == expected_uniform(-11, 5, 4, ((1 << 19) + 1) * huge[1] + 399)


def test_dropout_on_a_mesh_is_dropout_on_one_device() -> None:
    """Rows over dp and columns over tp, both placed by the ranks' coordinates, played on four ranks."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def add(node: fx.Node, val: Callable[[], Tensor]) -> fx.Node:
        with mode:
            node.meta["val"] = val()
        return node

    def coordinate(name: str) -> fx.Node:
        return add(graph.placeholder(name), lambda: torch.empty((), dtype=torch.int64))

    x = add(graph.placeholder("x"), lambda: torch.empty(3, 5))
    seed = add(graph.placeholder("seed"), lambda: torch.empty(2, dtype=torch.int64))
    rows, columns = (
        add(graph.call_function(aten.mul.Tensor, (coordinate(name), size)), lambda: torch.empty((), dtype=torch.int64))
        for name, size in (("dp", 3), ("tp", 5))
    )
    draw = emit_uniform(graph, seed, 0, (3, 5), (rows, columns), (6, 10))
    kept = graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.ge.Scalar, (draw, 0.3))))
    graph.output((graph.call_function(aten.mul.Tensor, (kept, 1 / 0.7)),))
    whole, parts = (None, None), Storage((6, 10), (DimShard(0), DimShard(1)))
    local = LocalProgram(
        fx.GraphModule({}, graph),
        (
            LocalInput("input", "x", parts),
            LocalInput("seed", "seed", Storage((2,), whole)),
            LocalInput("coordinate", "dp", Storage((), whole)),
            LocalInput("coordinate", "tp", Storage((), whole)),
        ),
        (LocalOutput("output", "0", parts),),
        (("dp", 2), ("tp", 2)),
        program_of(lambda x: x, 6, 10),
    )
    x_full = torch.randn(6, 10)
    program = owned(lambda x: torch.native_dropout(x, 0.3, True)[0], 6, 10)
    (expected,) = run(program, x_full, seed=8, step=3)
    assert torch.allclose(simulate_step(local, {}, {}, [x_full], seed=(8, 3)).outputs["0"], expected)
    assert 0 < (expected == 0).sum() < 40


# ------------------------------------------------------------------------------------------ random ops of a program
def program_of(step: Step, *shape: int, dtype: torch.dtype = torch.float32) -> Program:
    """A captured `step(x)`; functional, every node marked as `model.py:7`."""
    mode = FakeTensorMode()

    def faked(function: Step) -> Step:
        def run(x: Tensor) -> Any:
            with mode:
                return function(x)

        return run

    with mode:
        example = torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)
    traced = make_fx(faked(step))(example)
    module = make_fx(torch.func.functionalize(faked(traced)))(example)
    for node in module.graph.nodes:
        node.meta |= {"phase": "forward", "module": "block", "source": "model.py:7"}
        if node.op == "output" and not isinstance(node.args[0], tuple | list):
            node.args = ((node.args[0],),)
    module.recompile()
    count = len(next(iter(module.graph.find_nodes(op="output"))).args[0])
    outputs = tuple(Output("output", str(i)) for i in range(count))
    return Program(module, (Input("input", "x"),), outputs, None, {}, None, {})


def owned(step: Step, *shape: int, dtype: torch.dtype = torch.float32) -> Program:
    program = own_randomness(program_of(step, *shape, dtype=dtype))
    program.graph.recompile()
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and node.target is not UNIFORM:
            assert torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()), node
        if node.op != "output":
            assert "val" in node.meta, node
            assert node.meta["phase"] == "forward"
    return program


def run(program: Program, x: Tensor, seed: int = 0, step: int = 0) -> list[Tensor]:
    if program.inputs[-1].kind != "seed":
        return list(program.graph(x))
    got = list(program.graph(x, seed_of(seed, step)))
    declared = next(iter(program.graph.graph.find_nodes(op="output"))).args[0]
    for value, node in zip(got, declared, strict=True):
        assert (value.shape, value.dtype) == (node.meta["val"].shape, node.meta["val"].dtype)
    return got


def test_a_program_without_random_ops_stays() -> None:
    program = program_of(lambda x: F.dropout(x, 0.3, training=False) + 1, 4)
    assert own_randomness(program) is program
    program = program_of(lambda x: F.scaled_dot_product_attention(x, x, x), 1, 2, 8, 8)
    assert own_randomness(program) is program


def test_attention_with_dropout_is_told_and_attention_without_is_not() -> None:
    def attends(dropout: float) -> Step:
        return lambda x: F.dropout(F.scaled_dot_product_attention(x, x, x, dropout_p=dropout), 0.1)

    (note,) = owned(attends(0.2), 1, 2, 8, 8).notes
    assert note.startswith("model.py:7: attention with dropout is computed op by op")
    assert own_randomness(program_of(attends(0.0), 1, 2, 8, 8)).notes == ()
    assert owned(lambda x: F.dropout(torch.softmax(x, -1), 0.1), 4, 4).notes == ()  # not what a kernel would fuse


def test_seed_comes_last_and_once() -> None:
    program = owned(lambda x: F.dropout(F.dropout(x, 0.5), 0.5), 4, 4)
    assert program.inputs == (Input("input", "x"), Input("seed", "seed"))
    placeholders = list(program.graph.graph.find_nodes(op="placeholder"))
    assert len(placeholders) == 2
    assert placeholders[-1].meta["val"].shape == (2,)
    uniforms = list(program.graph.graph.find_nodes(op="call_function", target=UNIFORM))
    assert [(node.args[0], node.args[1]) for node in uniforms] == [(placeholders[-1], 0), (placeholders[-1], 1)]
    assert all(node.meta["source"] == "model.py:7" and node.meta["module"] == "block" for node in uniforms)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_and_scales(p: float) -> None:
    (out,) = run(owned(lambda x: F.dropout(x, p), 400, 500), torch.full((400, 500), 3.0))
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / 200_000))
    assert torch.allclose(out[kept], torch.tensor(3.0 / (1 - p)))


def test_native_dropout_drops_what_the_generator_says() -> None:
    program = owned(lambda x: torch.native_dropout(x, 0.3, True), 6, 8)
    x = torch.randn(6, 8)
    out, mask = run(program, x, seed=5, step=2)
    expected = torch.tensor([expected_uniform(5, 2, 0, i) >= 0.3 for i in range(48)]).view(6, 8)
    assert torch.equal(mask, expected)
    assert torch.allclose(out, torch.where(expected, x / 0.7, 0.0))


@pytest.mark.parametrize(("p", "kept"), [(1.0, 0.0), (0.0, 1.0)])
def test_native_dropout_of_all_or_nothing(p: float, kept: float) -> None:
    out, mask = run(owned(lambda x: torch.native_dropout(x, p, True), 6), torch.ones(6))
    assert mask.float().mean() == kept
    assert torch.equal(out, torch.full((6,), kept))


def test_masks_change_with_step_seed_and_op() -> None:
    program = owned(lambda x: (F.dropout(x), F.dropout(x)), 64)
    first, second = run(program, torch.ones(64))
    assert not torch.equal(first, second)
    assert torch.equal(first, run(program, torch.ones(64))[0])
    assert not torch.equal(first, run(program, torch.ones(64), step=1)[0])
    assert not torch.equal(first, run(program, torch.ones(64), seed=1)[0])


@pytest.mark.parametrize("native", [False, True])
def test_backward_uses_the_mask_of_forward(native: bool) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.native_dropout(x, 0.4, True)[0] if native else F.dropout(x, 0.4)
        return out, torch.autograd.grad(out.sum(), x)[0]

    out, gradient = run(owned(step, 32, 32), torch.ones(32, 32))
    assert torch.allclose(out, gradient)
    assert 0.5 < (gradient != 0).float().mean() < 0.7


def test_attention_dropout_forward_and_backward() -> None:
    """Attention with dropout is captured in the open; the oracle applies the mask that the generator gives."""

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(x, x, x, dropout_p=0.25, is_causal=True)
        return out, torch.autograd.grad(out.sin().sum(), x)[0]

    shape = (2, 3, 8, 4)
    program = owned(step, *shape)
    x = torch.randn(shape, requires_grad=True)
    out, gradient = run(program, x.detach(), seed=1, step=4)
    draws = torch.tensor([expected_uniform(1, 4, 0, i) for i in range(2 * 3 * 8 * 8)]).view(2, 3, 8, 8)
    causal = torch.full((8, 8), -math.inf).triu(1)
    chances = (x @ x.transpose(-1, -2) / 2 + causal).softmax(-1) * (draws < 0.75) / 0.75
    expected = chances @ x
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sin().sum(), x)[0], atol=1e-5)


def moments(values: Tensor) -> tuple[float, float]:
    return values.double().mean().item(), values.double().std().item()


N = 40_000
LIKE: dict[str, tuple[Step, float, float]] = {
    "rand": (lambda x: torch.rand(N), 0.5, 12**-0.5),
    "rand of float64": (lambda x: torch.rand(N, dtype=torch.float64), 0.5, 12**-0.5),
    "rand of bfloat16": (lambda x: torch.rand(N, dtype=torch.bfloat16), 0.498, 12**-0.5),
    "rand_like": (lambda x: torch.rand_like(x), 0.5, 12**-0.5),
    "uniform": (lambda x: torch.empty(N).uniform_(-1, 3), 1.0, 4 * 12**-0.5),
    "randn": (lambda x: torch.randn(N), 0.0, 1.0),
    "randn of float64": (lambda x: torch.randn(N, dtype=torch.float64), 0.0, 1.0),
    "randn_like": (lambda x: torch.randn_like(x, dtype=torch.bfloat16), 0.0, 1.0),
    "normal_": (lambda x: torch.empty(N).normal_(2, 3), 2.0, 3.0),
    "normal of mean": (lambda x: torch.normal(x + 2, 0.5), 3.0, 0.5),
    "normal of std": (lambda x: torch.normal(2.0, x * 0.5), 2.0, 0.5),
    "normal of both": (lambda x: torch.normal(x, x * 0.5), 1.0, 0.5),
    "normal of numbers": (lambda x: torch.normal(2.0, 0.5, (N,)), 2.0, 0.5),
    "log_normal": (
        lambda x: torch.empty(N).log_normal_(0.1, 0.3),
        math.exp(0.145),
        math.exp(0.145) * math.expm1(0.09) ** 0.5,
    ),
    "exponential": (lambda x: torch.empty(N).exponential_(2.0), 0.5, 0.5),
    "geometric": (lambda x: torch.empty(N).geometric_(0.25), 4.0, math.sqrt(12)),
    "bernoulli_": (lambda x: torch.empty(N).bernoulli_(0.3), 0.3, 0.21**0.5),
    "bernoulli of chances": (lambda x: torch.bernoulli(x * 0.3), 0.3, 0.21**0.5),
    "randint": (lambda x: torch.randint(0, 10, (N,)), 4.5, math.sqrt(99 / 12)),
    "randint_like": (lambda x: torch.randint_like(x, -3, 7), 1.5, math.sqrt(99 / 12)),
    "randint of many": (lambda x: torch.randint(-(2**33), 2**33, (N,)), 0.0, 2**34 * 12**-0.5),
    "random_": (lambda x: torch.empty(N).random_(10), 4.5, math.sqrt(99 / 12)),
    "gumbel": (lambda x: -torch.empty(N).exponential_().log(), 0.57722, math.pi / 6**0.5),
}


@pytest.mark.parametrize("name", LIKE)
def test_distributions(name: str) -> None:
    step, mean, std = LIKE[name]
    (values,) = run(owned(step, N), torch.ones(N), seed=3)
    assert values.isfinite().all()
    got_mean, got_std = moments(values)
    assert got_mean == pytest.approx(mean, abs=5 * std / math.sqrt(N))
    assert got_std == pytest.approx(std, rel=0.05)


def test_normal_has_normal_quantiles() -> None:
    (values,) = run(owned(lambda x: torch.randn(N), N), torch.ones(N))
    for sigmas, below in [(-2.0, 0.02275), (-1.0, 0.15866), (0.0, 0.5), (1.5, 0.93319), (3.0, 0.99865)]:
        share = (values < sigmas).double().mean().item()
        assert share == pytest.approx(below, abs=5 * math.sqrt(below * (1 - below) / N))


def test_cauchy_has_its_quartiles() -> None:
    (values,) = run(owned(lambda x: torch.empty(N).cauchy_(1.0, 2.0), N), torch.ones(N))
    assert torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([-1, 1, 3], abs=0.1)


def test_randint_takes_every_value() -> None:
    (values,) = run(owned(lambda x: torch.randint(2, 7, (N,)), N), torch.ones(N))
    counts = torch.bincount(values, minlength=8).double()
    assert counts[[0, 1, 7]].sum() == 0
    assert ((counts[2:7] - N / 5) ** 2 / (N / 5)).sum() < 25


def test_low_precision_rand_stays_below_one() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (values,) = run(owned(lambda x, dtype=dtype: torch.rand(N, dtype=dtype), N), torch.ones(N))  # type: ignore[misc]
        assert values.min() >= 0
        assert values.max() < 1


def test_randperm_is_a_permutation() -> None:
    (values,) = run(owned(lambda x: torch.randperm(1000), 1), torch.ones(1))
    assert torch.equal(values.sort().values, torch.arange(1000))
    assert not torch.equal(values, torch.arange(1000))


@pytest.mark.parametrize("replacement", [False, True])
def test_multinomial_follows_the_weights(replacement: bool) -> None:
    weights = torch.tensor([0.1, 0.0, 0.4, 0.5]).expand(20_000, 4).contiguous()
    program = owned(lambda x: torch.multinomial(x, 2, replacement), 20_000, 4)
    (values,) = run(program, weights)
    shares = torch.bincount(values[:, 0], minlength=4).double() / 20_000
    assert shares.tolist() == pytest.approx([0.1, 0, 0.4, 0.5], abs=0.02)
    assert (values != 1).all()
    same = (values[:, 0] == values[:, 1]).double().mean().item()
    assert same == pytest.approx(0.42 if replacement else 0.0, abs=0.02)


def test_random_slopes_of_rrelu() -> None:
    def step(x: Tensor) -> Any:
        return aten.rrelu_with_noise_functional(x, torch.zeros_like(x), 0.1, 0.3, True)

    x = torch.linspace(-1, 1, 1000)
    out, noise = run(owned(step, 1000), x)
    assert torch.equal(out, x * noise)
    assert (noise[x > 0] == 1).all()
    assert torch.equal(noise[x < 0], noise[x < 0].clamp(0.1, 0.3))
    assert noise[x < 0].std() > 0.03


def test_dropout_in_low_precision_keeps_its_dtype() -> None:
    (out,) = run(owned(lambda x: F.dropout(x, 0.5), 1000, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert set(out.tolist()) == {0.0, 2.0}


def test_an_unknown_random_op_is_named_with_its_line() -> None:
    program = program_of(lambda x: torch.poisson(x.abs()), 4)
    with pytest.raises(UnsupportedOpError, match=r"model\.py:7: random op aten\.poisson\.default: .*native_dropout"):
        own_randomness(program)


def test_a_random_op_in_backward_is_refused() -> None:
    program = program_of(lambda x: torch.rand_like(x), 4)
    for node in program.graph.graph.nodes:
        node.meta["phase"] = "backward"
    with pytest.raises(UnsupportedOpError, match="turn gradient checkpointing off"):
        own_randomness(program)


def test_no_operand_is_left_without_a_user() -> None:
    program = owned(lambda x: F.dropout(x, 0.5), 8)
    for node in program.graph.graph.nodes:
        assert node.users or node.op in ("output", "placeholder"), node
