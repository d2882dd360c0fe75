"""Ops on dims that were made larger for an axis to divide them: every op of the tables, every dim, the same results.

The oracle is the op itself on tensors of the real size; of what is claimed of added entries, the entries themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
from rule_check import Sample, run
from rule_samples import SAMPLES
from test_passes_zones import holds
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from passes.analysis.analysis import Analysis, analyse
from passes.analysis.dims import value_of
from passes.padding import harmless
from passes.padding.pad import Pad, _Padding, pad
from passes.program.program import Input, Output, Program
from passes.rules.work import VIEWS

aten = torch.ops.aten
STEADY = [s for s in SAMPLES if torch.Tag.nondeterministic_seeded not in getattr(s.target, "tags", ())]


Change = Callable[[Any, fx.Node], fx.Node]


def one_op(
    sample: Sample, random: Random | None = None, changes: Sequence[Change] = (), *, summed: bool = True
) -> tuple[Program, list[Tensor]]:
    """A program of the op alone, whose operands are inputs, and what it gives.

    With `random`, one of `changes` is made to an operand first, so that no zeros stand where it is padded, and what the
    op gives is added up as well where `summed`.
    """
    graph, mode = fx.Graph(), FakeTensorMode()
    inputs: list[Input] = []
    real: dict[fx.Node, Any] = {}

    def known(node: fx.Node, value: Any) -> fx.Node:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, value)
        node.meta.update(val=fake, phase="forward", module="", source="")
        real[node] = value
        return node

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        given = fx.map_arg((args, kwargs), real.__getitem__)
        return known(graph.call_function(target, args, kwargs), run(target, *given))

    def operand(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(inputs)}")
        inputs.append(Input("input", node.name))
        return known(node, value)

    def changed(value: Any) -> Any:
        if random is None or not isinstance(value, fx.Node):
            return value
        if real[value].dtype is not torch.float64 or not real[value].dim():
            return value
        return random.choice(changes)(call, value)

    operand(torch.zeros(()))  # a program has inputs, if its op has none
    args, kwargs = pytree.tree_map(changed, pytree.tree_map(operand, (sample.args, sample.kwargs)))
    made = call(sample.target, *args, **kwargs)
    whole = real[made]
    several = isinstance(whole, list | tuple)
    results = [
        call(operator.getitem, made, number) if several else made
        for number, value in enumerate(whole if several else [whole])
        if isinstance(value, Tensor) and number not in sample.skip
    ]
    for result in results if random is not None and summed else ():
        if real[result].dtype is torch.float64:
            results = [*results, call(aten.sum.dim_IntList, result, list(range(real[result].dim())))]
    graph.output(tuple(results))
    outputs = tuple(Output("output", str(number)) for number in range(len(results)))
    program = Program(fx.GraphModule(torch.nn.Module(), graph), tuple(inputs), outputs, None, {}, None, {})
    return program, [real[result] for result in results]


CHANGES: list[Change] = [
    lambda call, x: x,
    lambda call, x: call(aten.add.Tensor, x, 1.0),
    lambda call, x: call(aten.mul.Tensor, x, x),
    lambda call, x: call(aten.sub.Tensor, x, call(aten.mean.default, x)),
]


def beyond(number: float, dim: int) -> Change:
    """Puts a number where a position along a dim is below zero: in no entry but added ones."""

    def change(call: Any, x: fx.Node) -> fx.Node:
        rank, size = len(x.meta["val"].shape), x.meta["val"].shape[dim]
        below = call(aten.lt.Scalar, call(aten.arange.start_step, 0, size, 1), 0)
        if rank > 1:
            below = call(aten.view.default, below, [-1 if d == dim % rank else 1 for d in range(rank)])
        return call(aten.masked_fill.Scalar, x, below, number)

    return change


LEAST = torch.finfo(torch.float64).min
"""The sum of two is infinite."""
FAR: list[Change] = [
    lambda call, x: x,
    *(beyond(number, dim) for number in (LEAST, -torch.inf) for dim in (0, -1)),
    lambda call, x: call(aten.exp.default, x),
]


def pads(analysis: Analysis) -> Iterator[Pad]:
    """Each logical dim of the program, one larger than it is."""
    seen = set()
    for node in analysis.program.graph.graph.nodes:
        if node.op == "output" or not isinstance(node.meta["val"], Tensor):
            continue
        for dim, parts in enumerate(analysis.unified.dims(value_of(node, analysis.folding))):
            for part, atom in enumerate(parts):
                if atom.size > 1 and id(atom) not in seen:
                    seen.add(id(atom))
                    yield Pad(node.name, dim, part, atom.size, atom.size + 1)


def computed(program: Program, operands: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """What each node gives; operands get what padding puts behind them: zeros."""
    env: dict[fx.Node, Any] = {}
    values = iter(operands)
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            value = next(values)
            env[node] = torch.zeros(node.meta["val"].shape, dtype=value.dtype)
            env[node][tuple(map(slice, value.shape))] = value
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = run(node.target, args, kwargs)
    return env


def returned(program: Program, operands: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, cut to what they are outside."""
    env = computed(program, operands)
    found = [env[node] for node in program.graph.graph.output_node().args[0]]
    return [
        value if out.shape is None else value[tuple(map(slice, out.shape))]
        for value, out in zip(found, program.outputs, strict=True)
    ]


@pytest.mark.parametrize("sample", STEADY, ids=str)
def test_an_op_gives_the_same_on_padded_dims(sample: Sample) -> None:
    operands = [leaf for leaf in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(leaf, Tensor)]
    for random in (None, Random(str(sample))):
        program, wanted = one_op(sample, random, CHANGES)
        analysis = analyse(program)
        singly = list(pads(analysis))
        for each in [*([pad_] for pad_ in singly), *([singly] if len(singly) > 1 and random is not None else [])]:
            found = returned(pad(analysis, each).program, [torch.zeros(()), *operands])
            for value, right in zip(found, wanted, strict=True):
                rtol, atol = (0.05, 0.1) if right.dtype == torch.bfloat16 else (None, None)
                torch.testing.assert_close(
                    value, right, equal_nan=True, rtol=rtol, atol=atol, msg=lambda said, each=each: f"{each}: {said}"
                )


def claims(padding: _Padding, env: dict[fx.Node, Any]) -> Iterator[tuple[fx.Node, Any, Tensor]]:
    """What is claimed of added entries of each tensor, and the entries."""
    for tensor in padding.tensors.values():
        for (places, _), version in tensor.versions.items():
            value = env.get(version.node)
            for (d, part), zone in version.zones.items() if value is not None else ():
                sizes = [padding.versions.length(a, (d, j) in places) for j, a in enumerate(tensor.atoms[d])]
                real = tensor.atoms[d][part].size
                parts = value.unflatten(d, sizes) if len(sizes) > 1 else value
                yield version.node, zone, parts.narrow(d + part, real, sizes[part] - real)


_KNOWN = (
    *(harmless._PRODUCTS, harmless._SUMS, harmless._MAXIMA, harmless._NORMS, harmless._TIMES_GRADIENT),
    *(harmless._SOFTMAX, harmless._MOVES, harmless._MOVES_AMONG_ZEROS, harmless._LOOKUPS, harmless._ADDS_AT),
    *(harmless._ACCUMULATES, harmless._INDEX_OPERANDS, {harmless._FLASH}),
)
CLAIMED = [s for s in STEADY if s.target not in VIEWS and any(s.target in known for known in _KNOWN)]


@pytest.mark.parametrize("sample", CLAIMED, ids=str)
def test_what_is_claimed_of_an_op_s_added_entries_holds(sample: Sample) -> None:
    operands = [leaf for leaf in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(leaf, Tensor)]
    if not all(bool(x.isfinite().all()) for x in operands):
        return  # then nothing is claimed
    random = Random(str(sample))
    for _ in range(6):
        program, _ = one_op(sample, random, FAR, summed=False)
        analysis = analyse(program)
        for each in pads(analysis):
            padding = _Padding(analysis, [each])
            env = computed(padding.padded().program, [torch.zeros(()), *operands])
            for node, zone, entries in claims(padding, env):
                right = bool((entries < -100).all()) if zone == "nowhere" else holds(zone, entries)
                assert right, f"{each}, {node} ({node.target}): {zone}, {entries}"
