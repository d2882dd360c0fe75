"""Executes a rule: each way it lets one or two mesh axes lay an op out, run on shards and put together again.

What cuts tensors apart and puts results together here shares no code with what it checks: a dim is a list of atoms, a
layout says per axis which atom is cut, and that is all.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from costmodel.hardware import topology
from costmodel.layout import Layout, Partial, Shard, local_shape
from costmodel.presets import hardware
from passes.analysis.dims import ExpandedOp, expand, unified
from passes.analysis.layers import fold
from passes.analysis.strategies import Option, op_options
from passes.program.emit import Emitter, Parts
from passes.program.program import Input, Program
from passes.rewrite.local_op import LocalOp
from passes.rewrite.localize import run_locally
from passes.rules.call import Call, call_of, facts_of, is_tensor
from passes.rules.form import Form, FormBuilder
from passes.rules.table import form_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Sample:
    """An op on real arguments.

    `splits`: how many ways an axis of two must at least have to split it (its leaves), so that a rule cannot pass by
    forbidding everything. `skip`: results that are not compared, because nothing is promised about their values.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    splits: int = 0
    skip: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = [
            "x".join(map(str, leaf.shape)) if isinstance(leaf, Tensor) else str(leaf)
            for leaf in pytree.tree_leaves((self.args, self.kwargs))
        ]
        return f"{self.target}({', '.join(shapes)})"


_WITHOUT_KERNEL = get_decompositions([aten._fused_rms_norm_backward])
"""Ops that a CPU does not run."""


def run(target: Any, args: Any, kwargs: Any) -> Any:
    """The op on real tensors."""
    return _WITHOUT_KERNEL.get(target, target)(*args, **kwargs)


@dataclass(frozen=True)
class OneOp:
    """A graph around one op: its node, call, form, and its expanded form once its neighbours cut its dims."""

    node: fx.Node
    call: Call
    form: Form
    op: ExpandedOp


def _cuts(shape: Sequence[int]) -> list[int]:
    """The shape with each composite dim as two: 4 as 2, 2 and 12 as 2, 6."""
    return [part for n in shape for part in ((2, n // 2) if n > 2 and n % 2 == 0 else (n,))]


def one_op(sample: Sample, cut: str = "", form: Callable[[Call], Form] = form_of) -> OneOp:
    """The op in a graph; `cut` "operands" or "results" has views beside it that see each even dim as two."""
    graph, mode = fx.Graph(), FakeTensorMode()
    inputs: list[Input] = []

    def node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        try:
            with mode:
                value = target(*given[0], **given[1])
        except DynamicOutputShapeException:
            value = pytree.tree_map_only(Tensor, mode.from_tensor, run(sample.target, sample.args, sample.kwargs))
        made.meta.update(val=value, phase="forward", module="", source="")
        return made

    def operand(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        seen = _cuts(shape) if cut == "operands" else shape
        made = graph.placeholder(f"x{len(inputs)}")
        with mode:
            made.meta["val"] = torch.empty(seen, dtype=value.dtype)
        inputs.append(Input("input", made.name))
        return made if seen == shape else node(aten.view.default, made, shape)

    args, kwargs = pytree.tree_map(operand, (sample.args, sample.kwargs))
    checked = node(sample.target, *args, **kwargs)
    value = checked.meta["val"]
    results = (
        [checked] if isinstance(value, Tensor) else [node(operator.getitem, checked, i) for i in range(len(value))]
    )
    if cut == "results":
        for result in results:
            if is_tensor(result) and result.meta["val"].is_contiguous() and result.meta["val"].numel():
                node(aten.view.default, result, _cuts(result.meta["val"].shape))
    graph.output(())
    program = Program(fx.GraphModule(torch.nn.Module(), graph), tuple(inputs), (), None, {}, None, {})
    folding = fold(program)
    forms = [_form(members[0]) for members in folding.members]
    index = folding.of[checked]
    forms[index] = form(call_of(checked))
    ops = expand(unified(program, folding, forms))
    return OneOp(checked, call_of(checked), forms[index], ops[index])


def _form(node: fx.Node) -> Form:
    build = FormBuilder()
    if node.op == "call_function":
        return form_of(call_of(node)) if node.target is aten.view.default else build.form([], [])
    facts = facts_of(node.meta["val"])
    assert facts is not None
    return build.form([], [build.dims(facts.shape)])


# ----------------------------------------------------------------------------------------- cutting and putting together
def parts_of(x: Tensor, dims: Sequence[Sequence[int]], layout: Layout, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Every rank's part of `x`: cut along atoms; terms of a sum where the layout is partial."""
    generator = torch.Generator().manual_seed(seed)
    parts = [x.reshape([n for dim in dims for n in dim])]
    for placement, size in zip(layout, sizes, strict=True):
        cut: list[Tensor] = []
        for part in parts:
            if isinstance(placement, Shard):
                cut += part.chunk(size, placement.dim)
            elif isinstance(placement, Partial):
                terms = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for _ in range(size - 1)]
                terms = [term.to(part.dtype) for term in terms]
                cut += [*terms, part - sum(terms)] if terms else [part]
            else:
                cut += [part] * size
        parts = cut
    return [part.reshape(_merged(dims, part.shape)).contiguous() for part in parts]


def _merged(dims: Sequence[Sequence[int]], shape: Sequence[int]) -> list[int]:
    left = list(shape)
    merged = []
    for dim in dims:
        n = 1
        for _ in dim:
            n *= left.pop(0)
        merged.append(n)
    return merged


def together(
    parts: Sequence[Tensor], dims: Sequence[Sequence[int]], layout: Layout, sizes: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """The tensor that the ranks' parts form; asserts that replicas agree."""
    local = local_shape([n for dim in dims for n in dim], layout, sizes)
    values = [part.reshape(local) for part in parts]
    for placement, size in reversed(list(zip(layout, sizes, strict=True))):
        joined = []
        for start in range(0, len(values), size):
            group = values[start : start + size]
            if isinstance(placement, Shard):
                joined.append(torch.cat(group, placement.dim))
            elif isinstance(placement, Partial):
                stacked = torch.stack(group)
                joined.append(stacked.sum(0, dtype=stacked.dtype) if placement.op == "sum" else stacked.amax(0))
            else:
                for other in group[1:]:
                    torch.testing.assert_close(other, group[0], equal_nan=True)
                joined.append(group[0])
        values = joined
    return values[0].reshape(shape)


# -------------------------------------------------------------------------------------------------------------- running
def run_option(
    one: OneOp,
    option: Option,
    sizes: Sequence[int],
    operands: Sequence[Tensor],
    localizer: Callable[[LocalOp], fx.Node] = run_locally,
) -> list[list[Any]]:
    """Per rank, what the op's local form gives on that rank's operands (one list entry per result)."""
    names = "abcd"[: len(sizes)]
    emit = Emitter(fx.Graph(), FakeTensorMode(), topology(hardware("cpu"), dict(zip(names, sizes, strict=True))))
    parts = [
        parts_of(x, dims, layout, sizes, seed)
        for seed, (x, dims, layout) in enumerate(zip(operands, one.op.operands, option.operands, strict=True))
    ]
    nodes = [emit.placeholder(f"x{i}", part[0].shape, part[0].dtype) for i, part in enumerate(parts)]
    emit.coordinates = tuple(emit.placeholder(f"coordinate_{name}", (), torch.int64) for name in names)
    shapes = tuple(
        tuple(_merged(dims, local_shape([n for dim in dims for n in dim], layout, sizes)))
        for dims, layout in zip(one.op.results, option.results, strict=True)
    )
    made = localizer(LocalOp(emit, one.node, one.call, one.op, tuple(nodes), option.operands, option.results, shapes))
    ranks = list(itertools.product(*map(range, sizes)))
    found = []
    for rank, coordinate in enumerate(ranks):
        env: dict[fx.Node, Any] = {node: part[rank] for node, part in zip(nodes, parts, strict=True)}
        env |= {node: torch.tensor(c) for node, c in zip(emit.coordinates, coordinate, strict=True)}
        for node in emit.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = run(node.target, args, kwargs)
        value = [env[part] for part in made.nodes] if isinstance(made, Parts) else env[made]
        found.append(list(value) if isinstance(value, list | tuple) else [value])
    for values in found:
        for value, facts, shape in zip(values, one.call.results, shapes, strict=True):
            if facts is not None:
                assert tuple(value.shape) == shape, f"local shape {tuple(value.shape)}, planned {shape}"
                assert value.dtype == facts.dtype
    return found


def check(
    sample: Sample, sizes: Sequence[int], cut: str = "", limit: int = 60, form: Callable[[Call], Form] | None = None
) -> int:
    """Run every option of the sample's op on a mesh of `sizes` (at most `limit`, drawn); how many were run.

    With a `form` the op runs on its parts as it is, as an op without a rule does.
    """
    one = one_op(sample, cut, form or form_of)
    localizer = run_locally if form is None else LocalOp.as_is
    operands = [leaf for leaf in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(leaf, Tensor)]
    whole = run(sample.target, sample.args, sample.kwargs)
    wholes = list(whole) if isinstance(whole, list | tuple) else [whole]
    options = list(op_options(one.op, sizes))
    if len(options) > limit:
        options = random.Random(0).sample(options, limit)
    for option in options:
        try:
            found = run_option(one, option, sizes, operands, localizer)
            for r, expected in enumerate(wholes):
                if expected is None or r in sample.skip:
                    continue
                parts = [values[r] for values in found]
                joined = together(parts, one.op.results[r], option.results[r], sizes, expected.shape)
                rtol, atol = (0.05, 0.1) if expected.dtype == torch.bfloat16 else (None, None)
                torch.testing.assert_close(joined, expected, equal_nan=True, rtol=rtol, atol=atol)
        except Exception as error:
            raise AssertionError(
                f"{sample} on {tuple(sizes)}{' cut ' + cut if cut else ''}: {option}: {error}"
            ) from error
    return len(options)


def leaves(sample: Sample, cut: str = "") -> int:
    """How many leaves an axis of two can split."""
    return sum(leaf.size % 2 == 0 for leaf in one_op(sample, cut).op.leaves)
