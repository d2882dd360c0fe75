"""Random numbers that do not depend on the mesh.

The value of element `i` of a random tensor is a function of (user's seed, step, number of the op, `i`), where `i` is
the element's row-major index in the *global* tensor. A rank that holds a part computes just its part, any two layouts
agree, and a mask that is recomputed for backward is the mask of forward.

`own_randomness` puts `autopar.uniform(seed, salt, size)` and ordinary ops in the place of a program's random ops, where
`salt` is the op's number. `emit_uniform` expands such a node, for one rank's part, into integer arithmetic that
Inductor fuses into its user. The arithmetic is written once: `_key` and `_bits` take tensors and nodes of a graph
under construction (`_Traced`) alike.

The generator is counter-based. With `mix` a bijection of 32-bit words of good avalanche, and (a, b) a 64-bit key:

    bits(i) = mix(mix(i ^ a) + b)            uniform(i) = (bits(i) >> 8) / 2^24

Words are kept in int64 and masked; multipliers have 31 bits, so that no product overflows in any backend.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.errors import UnsupportedOpError
from passes.program import Input, Program
from passes.provenance import place_of

aten = torch.ops.aten

_MASK = (1 << 32) - 1
_MULTIPLIERS = (0x5A48AAB7, 0x5D85AF15)
"""Of 150 random pairs, the one whose avalanche was measured least biased."""
_SALTS = (0x6C8E9CF5, 0x3C79AC49)
_SEED = (0x2545F491, 0x1B873593)
_HIGH = 0x7FEB352D
_BLOCK = 1 << 18
_MASK_OPS = 4
"""From random numbers to what they mask: compared, made a number, scaled, multiplied by."""
_MIN = 2.0**-25
"""Half of the smallest positive uniform number: stands for 0 where 0 has no image."""


# ---------------------------------------------------------------------------------------------------- the arithmetic
def _mix(x: Any) -> Any:
    """A bijection of 32-bit words; an int, a tensor or a traced node."""
    x = ((x ^ (x >> 16)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 15)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 16)


def _step_key(seed: Any) -> tuple[Any, Any]:
    """The 64-bit key of a (user's seed, step)."""
    words = _mix((_mix((seed & _MASK) ^ _SEED[0]) + ((seed >> 32) & _MASK)) & _MASK)
    of_seed, of_step = words[0], words[1]
    a = _mix(of_seed ^ ((of_step + _SEED[1]) & _MASK))
    return a, _mix((of_step + a) & _MASK)


def _key(step_key: tuple[Any, Any], salt: int) -> tuple[Any, Any]:
    """The key of one op in one step."""
    a, b = step_key
    return a ^ _mix(_mix(salt ^ _SALTS[0])), b ^ _mix(_mix(salt ^ _SALTS[1]))


def _bits(index: Any, key: tuple[Any, Any], count: int) -> Any:
    """32 random bits for each index below `count`."""
    a, b = key
    if count > _MASK + 1:
        b = (b + (index >> 32) * _HIGH) & _MASK
        index = index & _MASK
    return _mix((_mix(index ^ a) + b) & _MASK)


def uniform_values(seed: Tensor, salt: int, size: Sequence[int]) -> Tensor:
    """float32 numbers in [0, 1), multiples of 2^-24, for a whole tensor of `size`; `seed` is (user's seed, step)."""
    count = math.prod(size)
    key = _key(_step_key(seed), salt)
    values = torch.empty(count, dtype=torch.float32, device=seed.device)
    for start in range(0, count, _BLOCK):
        index = torch.arange(start, min(start + _BLOCK, count), device=seed.device)
        values[start : start + _BLOCK] = (_bits(index, key, count) >> 8).to(torch.float32) * 2.0**-24
    return values.view(list(size))


@torch.library.custom_op(
    "autopar::uniform", mutates_args=(), schema="(Tensor seed, int salt, int[] size, int[]? padded=None) -> Tensor"
)
def _uniform(seed: Tensor, salt: int, size: Sequence[int], padded: Sequence[int] | None = None) -> Tensor:
    values = uniform_values(seed, salt, size)
    if padded is None:
        return values
    pads = [n for whole, part in zip(reversed(padded), reversed(size), strict=True) for n in (0, whole - part)]
    return torch.nn.functional.pad(values, pads)


@_uniform.register_fake
def _(seed: Tensor, salt: int, size: Sequence[int], padded: Sequence[int] | None = None) -> Tensor:
    return seed.new_empty(size if padded is None else padded, dtype=torch.float32)


UNIFORM = torch.ops.autopar.uniform.default


# ----------------------------------------------------------------------------------------------------------- emission
@dataclass(frozen=True, slots=True)
class _Emitter:
    """Adds ops at the graph's insertion point, with `val` worked out and the rest of the metadata as given."""

    graph: fx.Graph
    meta: Mapping[str, Any]
    fake_mode: Any

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        with self.fake_mode:
            values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*values[0], **values[1])
        return node


@dataclass(frozen=True, slots=True)
class _Traced:
    """An int64 tensor in a graph under construction, with the operators that the arithmetic uses.

    With `shared`, an equal op that the graph already has is used again.
    """

    node: fx.Node
    emit: _Emitter
    shared: bool = False

    def _then(self, target: Any, *args: Any) -> _Traced:
        args = (self.node, *(arg.node if isinstance(arg, _Traced) else arg for arg in args))
        if self.shared:
            for user in self.node.users:
                if user.target is target and user.args == args:
                    return replace(self, node=user)
        return replace(self, node=self.emit(target, *args))

    def __xor__(self, other: Any) -> _Traced:
        overload = aten.bitwise_xor.Tensor if isinstance(other, _Traced) else aten.bitwise_xor.Scalar
        return self._then(overload, other)

    def __and__(self, mask: int) -> _Traced:
        return self._then(aten.bitwise_and.Scalar, mask)

    def __rshift__(self, bits: int) -> _Traced:
        return self._then(aten.bitwise_right_shift.Tensor_Scalar, bits)

    def __mul__(self, factor: int) -> _Traced:
        return self._then(aten.mul.Tensor, factor)

    def __add__(self, other: Any) -> _Traced:
        return self._then(aten.add.Tensor, other)

    def __getitem__(self, position: int) -> _Traced:
        return self._then(aten.select.int, 0, position)


def emit_uniform(
    graph: fx.Graph,
    seed: fx.Node,
    salt: int,
    local_size: Sequence[int],
    starts: Sequence[fx.Node | int],
    global_size: Sequence[int],
    meta: Mapping[str, Any] | None = None,
) -> fx.Node:
    """One rank's part of `autopar.uniform(seed, salt, global_size)`, as ops added at the graph's insertion point.

    The part has `local_size` and begins, in each dim, at the global index `starts` (an int, or a node that yields an
    int64 scalar tensor); of a padded tensor, it may reach beyond `global_size`, where any numbers are given. `meta`
    gives the new nodes' phase, module and source. What depends on `seed` alone is put behind the placeholders, once per
    graph.
    """
    local, whole = tuple(local_size), tuple(global_size)
    if not len(local) == len(whole) == len(starts):
        raise ValueError(f"sizes {local} and {whole} and {len(starts)} starts are not of one rank")
    for dim, (part, size, start) in enumerate(zip(local, whole, starts, strict=True)):
        if isinstance(start, int) and not 0 <= start <= max(0, size - part):
            raise ValueError(f"dim {dim}: a part of {part} that starts at {start} does not lie within {size}")
    fake_mode = seed.meta["val"].fake_mode
    emit = _Emitter(graph, _place(meta or {}), fake_mode)
    step_key = _emit_step_key(graph, seed, fake_mode)
    key = _key((replace(step_key[0], emit=emit, shared=False), replace(step_key[1], emit=emit, shared=False)), salt)
    index = _emit_index(emit, local, starts, whole, seed.meta["val"].device)
    bits = _bits(_Traced(index, emit), key, math.prod(whole)) >> 8
    return emit(aten.mul.Tensor, emit(aten._to_copy.default, bits.node, dtype=torch.float32), 2.0**-24)


def _emit_step_key(graph: fx.Graph, seed: fx.Node, fake_mode: Any) -> tuple[_Traced, _Traced]:
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    emit = _Emitter(graph, {"phase": "forward", "module": "", "source": ""}, fake_mode)
    traced = _Traced(seed, emit, shared=True)
    if first is None:
        return _step_key(traced)
    with graph.inserting_before(first):
        return _step_key(traced)


def _emit_index(
    emit: _Emitter,
    local: tuple[int, ...],
    starts: Sequence[fx.Node | int],
    whole: tuple[int, ...],
    device: torch.device,
) -> fx.Node:
    """Global row-major index of each element of the part, in the part's shape (or one that broadcasts to it)."""
    terms: list[fx.Node] = []
    offset_nodes: list[fx.Node] = []
    offset = 0
    stride = 1
    last = len(local)
    for dim in reversed(range(len(local))):
        # Dims that are held whole run on in the index, so they share one `arange` with the next dim to their left.
        if local[dim] == whole[dim] and dim > 0:
            continue
        count = math.prod(local[dim:last])
        rows = emit(aten.arange.default, count, dtype=torch.int64, device=device)
        rows = emit(aten.view.default, rows, [*local[dim:last], *[1] * (len(local) - last)])
        terms.append(rows if stride == 1 else emit(aten.mul.Tensor, rows, stride))
        inner = stride * math.prod(whole[dim + 1 : last])
        start = starts[dim]
        if isinstance(start, fx.Node):
            offset_nodes.append(start if inner == 1 else emit(aten.mul.Tensor, start, inner))
        else:
            offset += start * inner
        stride = inner * whole[dim]
        last = dim
    if not terms:
        terms.append(emit(aten.arange.default, 1, dtype=torch.int64, device=device))
        terms[0] = emit(aten.view.default, terms[0], [])
    index = terms[0]
    for term in (*terms[1:], *offset_nodes):
        index = emit(aten.add.Tensor, index, term)
    return index if offset == 0 else emit(aten.add.Tensor, index, offset)


# ------------------------------------------------------------------------------------------------ random ops replaced
@dataclass
class _Draws:
    """Replaces one random op: adds ops before it and draws numbers with salts of its own."""

    node: fx.Node
    emit: _Emitter
    seed: fx.Node
    next_salt: Callable[[], int]

    @property
    def val(self) -> Any:
        """Fake value of the op that is replaced."""
        return self.node.meta["val"]

    def bits24(self, size: Sequence[int]) -> fx.Node:
        """float32 in [0, 1)."""
        return self.emit(UNIFORM, self.seed, self.next_salt(), list(size))

    def uniform(self, size: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Numbers in [0, 1), float64 of 48 bits where `dtype` is, else float32."""
        low = self.bits24(size)
        if dtype != torch.float64:
            return low
        high = self.emit(aten._to_copy.default, self.bits24(size), dtype=torch.float64)
        low = self.emit(aten._to_copy.default, low, dtype=torch.float64)
        return self.emit(aten.add.Tensor, high, self.emit(aten.mul.Tensor, low, 2.0**-24))

    def normal(self, size: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Standard normal numbers by the inverse of their distribution, symmetric about 0."""
        centre = 2.0**-48 if dtype == torch.float64 else 2.0**-24
        draw = self.emit(aten.mul.Tensor, self.uniform(size, dtype), 2.0)
        draw = self.emit(aten.add.Tensor, self.emit(aten.sub.Tensor, draw, 1.0), centre)
        return self.emit(aten.mul.Tensor, self.emit(aten.erfinv.default, draw), math.sqrt(2.0))

    def exponential(self, size: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Positive numbers with rate 1."""
        draw = self.emit(aten.clamp_min.default, self.uniform(size, dtype), _MIN)
        return self.emit(aten.neg.default, self.emit(aten.log1p.default, self.emit(aten.neg.default, draw)))

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` as `dtype`."""
        return node if node.meta["val"].dtype == dtype else self.emit(aten._to_copy.default, node, dtype=dtype)

    def scale(self, node: fx.Node, factor: Any, shift: Any) -> fx.Node:
        """`node * factor + shift`, numbers or nodes."""
        if factor is not None and not _is_number(factor, 1):
            node = self.emit(aten.mul.Tensor, node, factor)
        if shift is not None and not _is_number(shift, 0):
            node = self.emit(aten.add.Tensor, node, shift)
        return node

    def done(self, node: fx.Node) -> fx.Node:
        """`node` in the dtype of what it replaces."""
        return self.cast(node, self.val.dtype)


Arguments = Mapping[str, Any]
Replacement = fx.Node | tuple[fx.Node, ...]


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def _rand(draws: _Draws, arguments: Arguments) -> Replacement:
    """Also of `uniform(self, from, to)`."""
    val, low, high = draws.val, arguments.get("from", 0.0), arguments.get("to", 1.0)
    draw = draws.uniform(val.shape, val.dtype)
    if val.dtype in (torch.bfloat16, torch.float16):
        # Rounding to few bits would give 1.0; cut instead.
        levels = 2.0 ** (8 if val.dtype == torch.bfloat16 else 11)
        draw = draws.emit(aten.mul.Tensor, draws.emit(aten.floor.default, draws.scale(draw, levels, 0)), 1 / levels)
    return draws.done(draws.scale(draw, high - low, low))


def _bernoulli(draws: _Draws, arguments: Arguments) -> Replacement:
    chances = arguments.get("p", arguments["self"])
    draw = draws.uniform(draws.val.shape, draws.val.dtype)
    if isinstance(chances, fx.Node):
        return draws.done(draws.emit(aten.lt.Tensor, draw, chances))
    return draws.done(draws.emit(aten.lt.Scalar, draw, chances))


def _native_dropout(draws: _Draws, arguments: Arguments) -> Replacement:
    x, p = arguments["input"], arguments["p"]
    keep = draws.emit(aten.ge.Scalar, draws.bits24(draws.val[0].shape), p)
    kept = draws.emit(aten.mul.Tensor, x, draws.cast(keep, draws.val[0].dtype))
    return draws.emit(aten.mul.Tensor, kept, 0.0 if p == 1 else 1.0 / (1.0 - p)), keep


def _normal(draws: _Draws, arguments: Arguments) -> Replacement:
    draw = draws.normal(draws.val.shape, draws.val.dtype)
    return draws.done(draws.scale(draw, arguments.get("std", 1.0), arguments.get("mean", 0.0)))


def _log_normal(draws: _Draws, arguments: Arguments) -> Replacement:
    draw = draws.normal(draws.val.shape, draws.val.dtype)
    draw = draws.scale(draw, arguments.get("std", 2.0), arguments.get("mean", 1.0))
    return draws.done(draws.emit(aten.exp.default, draw))


def _exponential(draws: _Draws, arguments: Arguments) -> Replacement:
    draw = draws.exponential(draws.val.shape, draws.val.dtype)
    return draws.done(draws.scale(draw, 1.0 / arguments.get("lambd", 1.0), 0))


def _cauchy(draws: _Draws, arguments: Arguments) -> Replacement:
    draw = draws.emit(aten.clamp_min.default, draws.uniform(draws.val.shape, draws.val.dtype), _MIN)
    angle = draws.emit(aten.mul.Tensor, draws.emit(aten.sub.Tensor, draw, 0.5), math.pi)
    draw = draws.emit(aten.tan.default, angle)
    return draws.done(draws.scale(draw, arguments.get("sigma", 1.0), arguments.get("median", 0.0)))


def _geometric(draws: _Draws, arguments: Arguments) -> Replacement:
    p = arguments["p"]
    trials = draws.exponential(draws.val.shape, draws.val.dtype)
    # At p = 1 the rate of failing is infinite, and every first trial succeeds.
    rate = -math.log1p(-p) if p < 1 else math.inf
    trials = draws.emit(aten.ceil.default, draws.scale(trials, 1.0 / rate, 0))
    return draws.done(draws.emit(aten.clamp_min.default, trials, 1.0))


def _randint(draws: _Draws, arguments: Arguments) -> Replacement:
    """`random(self, from, to)` too; without bounds, every integer that the dtype holds exactly and is not negative."""
    dtype = draws.val.dtype
    low = arguments.get("low", arguments.get("from")) or 0
    high = arguments.get("high", arguments.get("to"))
    if high is None:
        high = int(2 / torch.finfo(dtype).eps) + 1 if dtype.is_floating_point else torch.iinfo(dtype).max
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        raise _unsupported(draws.node, "its bounds are tensors; pass numbers")
    if high - low > 1 << 47:
        if "from" in arguments or "to" in arguments or "high" in arguments:
            raise _unsupported(draws.node, f"its range has {high - low} values; at most 2^47 are drawn")
        high = low + (1 << 47)
    # 24 bits over a small range leave less bias than 2^-8 of a value's chance; larger ranges take 48 bits.
    draw = draws.uniform(draws.val.shape, torch.float32 if high - low <= 1 << 16 else torch.float64)
    draw = draws.emit(aten.floor.default, draws.emit(aten.mul.Tensor, draw, float(high - low)))
    draw = draws.emit(aten._to_copy.default, draw, dtype=torch.int64)
    return draws.done(draws.scale(draw, 1, low))


def _randperm(draws: _Draws, arguments: Arguments) -> Replacement:
    ordered = draws.emit(aten.sort.default, draws.uniform(draws.val.shape, torch.float64), 0)
    return draws.done(_item(draws, ordered, 1))


def _multinomial(draws: _Draws, arguments: Arguments) -> Replacement:
    weights, count = arguments["self"], arguments["num_samples"]
    facts = weights.meta["val"]
    wide = torch.float64 if facts.dtype == torch.float64 else torch.float32
    weights = draws.cast(weights, wide)
    if not arguments.get("replacement", False) or count == 1:
        # The first of independent exponential clocks to ring, the second, ...: sampling without replacement.
        clocks = draws.exponential(facts.shape, wide)
        best = draws.emit(aten.topk.default, draws.emit(aten.div.Tensor, weights, clocks), count)
        return draws.done(_item(draws, best, 1))
    sums = draws.emit(aten.cumsum.default, weights, -1)
    total = draws.emit(aten.slice.Tensor, sums, facts.dim() - 1, facts.shape[-1] - 1, facts.shape[-1])
    points = draws.emit(aten.mul.Tensor, draws.uniform(draws.val.shape, wide), total)
    found = draws.emit(aten.searchsorted.Tensor, sums, points, right=True)
    return draws.done(draws.emit(aten.clamp_max.default, found, facts.shape[-1] - 1))


def _rrelu(draws: _Draws, arguments: Arguments) -> Replacement:
    x = arguments["self"]
    lower, upper = arguments.get("lower", 0.125), arguments.get("upper", 1 / 3)
    dtype = draws.val[0].dtype
    slope = draws.cast(draws.scale(draws.uniform(draws.val[0].shape, dtype), upper - lower, lower), dtype)
    one = draws.emit(aten.full.default, [], 1.0, dtype=dtype, device=_cpu(draws))
    noise = draws.emit(aten.where.self, draws.emit(aten.le.Scalar, x, 0), slope, one)
    return draws.emit(aten.mul.Tensor, x, noise), noise


def _item(draws: _Draws, node: fx.Node, position: int) -> fx.Node:
    return draws.emit(operator.getitem, node, position)


def _cpu(draws: _Draws) -> torch.device:
    device: torch.device = draws.seed.meta["val"].device
    return device


_REPLACED: dict[str, Callable[[_Draws, Arguments], Replacement]] = {
    "aten::rand": _rand,
    "aten::rand_like": _rand,
    "aten::uniform": _rand,
    "aten::randn": _normal,
    "aten::randn_like": _normal,
    "aten::normal": _normal,
    "aten::normal_functional": _normal,
    "aten::log_normal": _log_normal,
    "aten::bernoulli": _bernoulli,
    "aten::native_dropout": _native_dropout,
    "aten::exponential": _exponential,
    "aten::cauchy": _cauchy,
    "aten::geometric": _geometric,
    "aten::randint": _randint,
    "aten::randint_like": _randint,
    "aten::random": _randint,
    "aten::randperm": _randperm,
    "aten::multinomial": _multinomial,
    "aten::rrelu_with_noise_functional": _rrelu,
}


def own_randomness(program: Program) -> Program:
    """The program with its random ops replaced by `autopar.uniform` nodes and ordinary ops.

    Where it has any, it gets one more input, last, of kind "seed": an int64 tensor of shape (2,), the user's seed and
    the number of the step. A program without random ops comes back as it is.

    Raises:
        UnsupportedOpError: a random op that has no replacement, or one that runs in backward.
    """
    graph = program.graph.graph
    random = [node for node in graph.nodes if node.op == "call_function" and _is_random(node)]
    if not random:
        return program
    for node in random:
        _check(node)
    notes = dict.fromkeys(_attention_note(node) for node in random if _is_of_attention(node))
    seed = _add_seed(graph)
    fake_mode = seed.meta["val"].fake_mode
    salts = itertools.count()
    for node in random:
        with graph.inserting_before(node):
            draws = _Draws(node, _Emitter(graph, _place(node.meta), fake_mode), seed, salts.__next__)
            _substitute(graph, node, _REPLACED[node.target._schema.name](draws, _arguments(node)))
    graph.lint()
    return replace(program, inputs=(*program.inputs, Input("seed", "seed")), notes=(*program.notes, *notes))


def _is_of_attention(node: fx.Node) -> bool:
    """Whether the op draws for attention that a fused kernel would compute, but for what it draws: the mask that is
    made of it, in a few ops, is for scores of `scaled_dot_product_attention`."""
    reached = {node}
    for _ in range(_MASK_OPS):
        reached = {user for each in reached for user in each.users}
        if any(operand.target is aten._safe_softmax.default for user in reached for operand in user.all_input_nodes):
            return True
    return False


def _attention_note(node: fx.Node) -> str:
    return (
        f"{place_of(node)}: attention with dropout is computed op by op and keeps its scores for backward, as fused "
        "kernels draw numbers of their own, others on each mesh; without that dropout it takes less time and memory"
    )


def _add_seed(graph: fx.Graph) -> fx.Node:
    fake_mode = next(v.fake_mode for n in graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))
    behind = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(behind):
        seed = graph.placeholder("seed")
    with fake_mode:
        val = torch.empty(2, dtype=torch.int64)
    seed.meta.update(val=val, phase="forward", module="", source="")
    return seed


def _is_random(node: fx.Node) -> bool:
    """Whether the op draws numbers; one that could but is told not to (dropout of 0) does not."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if schema is None:
        return False
    tagged = torch.Tag.nondeterministic_seeded in target.tags
    if not tagged and not any(argument.name == "generator" for argument in schema.arguments):
        return False
    arguments = _arguments(node)
    off = arguments.get("dropout_p") == 0.0 or arguments.get("train") is False or arguments.get("training") is False
    return not off


def _check(node: fx.Node) -> None:
    target: Any = node.target
    if target._schema.name not in _REPLACED:
        known = ", ".join(sorted(name.removeprefix("aten::") for name in _REPLACED))
        raise _unsupported(node, f"only these can be made equal on every mesh: {known}")
    if _arguments(node).get("generator") is not None:
        raise _unsupported(node, "it draws from a generator of its own; leave the generator out")
    if node.meta.get("phase") == "backward":
        raise _unsupported(
            node,
            "it runs in backward, where it would draw other numbers than the forward op it may repeat; turn gradient "
            "checkpointing off in the model (autopar chooses what to recompute)",
        )


def _unsupported(node: fx.Node, why: str) -> UnsupportedOpError:
    return UnsupportedOpError(f"{place_of(node)}: random op {node.target}: {why}")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the op's schema, those with a default included."""
    target: Any = node.target
    schema = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)


def _place(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a new node takes over from the one it stands for."""
    kept = {key: value for key, value in meta.items() if key not in ("val", "tensor_meta")}
    return {"phase": "forward", "module": "", "source": ""} | kept


def _substitute(graph: fx.Graph, node: fx.Node, by: Replacement) -> None:
    """Make users of `node` use `by`; remove it, and what only gave it a shape."""
    operands = node.all_input_nodes
    if isinstance(by, tuple):
        for user in list(node.users):
            user.replace_all_uses_with(by[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(by)
    graph.erase_node(node)
    for operand in operands:
        if not operand.users and operand.op == "call_function":
            graph.erase_node(operand)
