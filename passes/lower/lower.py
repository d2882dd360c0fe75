"""One rank's step, ready to run: two callables, forward and backward, compiled or not.

    LocalProgram -retarget-> graph for the device -as_pairs, for_gloo, for_onednn, as_bytes-> its ops
        -split-> forward, backward -cut-> regions and what is between -Inductor, once per distinct region-> callables
        -arranged-> outer programs

A step is captured on fake CPU tensors; `retarget` makes it one of another device. Where no layer repeats, forward and
backward are one region each, collectives and all, but for ops that cannot be compiled. `inductor.py` is the one file
that calls Inductor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd  # ops go to their kernels at once

from passes.analysis.layers import layer_pattern
from passes.lower.booleans import as_bytes
from passes.lower.complex_pairs import as_pairs
from passes.lower.gloo import for_gloo, gloo_step
from passes.lower.linear_ops import is_linear
from passes.lower.outer import Boxed, Planned, assembled, op_step, region_step
from passes.lower.overlap import arranged
from passes.lower.partial_backward import of_arrived
from passes.lower.partition import CONSTANT_KINDS, Halves, parameter_chain, split
from passes.lower.products import for_onednn
from passes.lower.regions import Call, Cut, Region, calls, cut, is_shaped_by_values
from passes.lower.retarget import retarget
from passes.program.local import LocalInputKind, LocalProgram
from passes.program.strides import laid_out
from passes.program.walks import made_of, results_of

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]
_FIXED_KINDS: tuple[LocalInputKind, ...] = ("parameter", "coordinate")
"""Of placeholders that are the same in all backwards of a step: a forward may write buffers, and so may the user."""


@dataclass(frozen=True)
class Apart:
    """A backward in two parts, for gradients that are added up over several backwards before ranks exchange them.

    `first` takes what the backward takes. It gives the gradients that are had without `second` (None for the others),
    then the partial gradients, then what else `second` needs. `second` takes these two, and gives the other gradients:
    parameters' whose exchange may run on a sum (`on_sums.py`). The others are exchanged in `first`.
    """

    first: Boxed
    second: Boxed
    gradients: int
    partial: int


@dataclass
class Unreduced:
    """This rank's terms of gradients, and other values that their exchange needs."""

    partial: list[torch.Tensor]
    others: list[torch.Tensor]


@dataclass(frozen=True)
class Lowered:
    """A step that runs.

    Placeholders are those of the local program without its tangents, in order; `outputs` counts what comes before the
    saved values: the model's outputs and the new buffers.
    """

    halves: Halves
    call_forward: Callable[[list[torch.Tensor]], Any]
    call_backward: Callable[[list[torch.Tensor]], Any] | None
    """Each takes its values as one list, which it may empty."""
    strides: tuple[tuple[int, ...], ...]
    """Of every placeholder, tangents last; compiled code relies on them."""
    bodies: int = 1
    """How many distinct graphs were compiled."""
    make_apart: Callable[[], Apart] | None = None
    of_arrived: Callable[[frozenset[str]], Lowered] | None = None
    """Given the outputs at which gradients arrived, not all that have tangents: the step whose backward takes these
    tangents alone."""

    @property
    def outputs(self) -> int:
        """How many values the forward gives before the saved ones."""
        return self.halves.outputs

    def forward(self, values: Tensors) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
        """Outputs and new buffers, and what `backward` needs of the step: saved placeholders, then saved values."""
        values = [laid_out(value, stride) for value, stride in zip(values, self.strides, strict=False)]
        with torch.no_grad(), BelowAutograd():
            inputs = tuple(values[index] for index in self.halves.saved_inputs)
            results = tuple(self.call_forward(values))
        return results[: self.outputs], inputs + results[self.outputs :]

    def backward(self, saved: Tensors, tangents: Tensors) -> tuple[Any, ...]:
        """Gradients, in the order of the program's "gradient" outputs.

        A list of saved values is emptied, so that compiled code can free each after its last use.
        """
        if self.call_backward is None:
            raise ValueError("this program was made without gradients")
        with torch.no_grad(), BelowAutograd():
            return tuple(self.call_backward(self._backward_values(saved, tangents)))

    def backward_alone(self, saved: Tensors, tangents: Tensors) -> tuple[tuple[Any, ...], Unreduced]:
        """Gradients without the exchange between ranks: None where there is one, and what it needs."""
        apart = self._apart()
        with torch.no_grad(), BelowAutograd():
            found = apart.first(self._backward_values(saved, tangents))
        end = apart.gradients + apart.partial
        return tuple(found[: apart.gradients]), Unreduced(list(found[apart.gradients : end]), list(found[end:]))

    def reduce(self, held: Unreduced) -> tuple[Any, ...]:
        """The gradients that ranks exchange, from what `backward_alone` left; None for the others."""
        with torch.no_grad(), BelowAutograd():
            return tuple(self._apart().second([*held.partial, *held.others]))

    def _apart(self) -> Apart:
        if self.make_apart is None:
            raise ValueError("this program was made without gradients")
        return self.make_apart()

    def _backward_values(self, saved: Tensors, tangents: Tensors) -> list[torch.Tensor]:
        strides = self.strides[len(self.strides) - len(tangents) :]
        tangents = [laid_out(value, stride) for value, stride in zip(tangents, strides, strict=True)]
        values = [*saved, *tangents]
        if isinstance(saved, list):
            saved.clear()
        return values


def lower(
    local: LocalProgram, *, device: torch.device | str = "cpu", compile: bool,
    rank: int = 0, pipelined: bool = False,
) -> Lowered:  # fmt: skip
    """Forward and backward of `local` on `device`, through Inductor where `compile`.

    Collectives must already name process groups (`bind_groups`). Every rank makes the same graphs; by its `rank` each
    compiles them in another order, and finds in Inductor's cache what others on its machine have done by then.
    pipelined: products beside collectives of regions are micro-pipelined, in groups that share memory.
    """
    device = torch.device(device)
    local = replace(local, graph=retarget(local.graph, device))
    as_pairs(local.graph)
    if device.type == "cpu":
        for_gloo(local.graph)
        for_onednn(local.graph)
    as_bytes(local.graph)
    halves = split(local)
    tangents = local.placeholders_of("tangent")
    ordered = [*(node for node in local.placeholders if node not in tangents), *tangents]
    strides = tuple(tuple(node.meta["val"].stride()) for node in ordered)
    run = _Runner(local, device, functools.partial(compiled, pipelined=pipelined) if compile else _interpreted)
    run.compile_all(halves, rank)
    forward = run(halves.forward, backward=False)
    if halves.backward is None:
        return Lowered(halves, forward, None, strides, len(run.bodies))
    backward = run(halves.backward, backward=True)
    make_apart = functools.cache(functools.partial(run.apart, halves.backward))
    lowered = Lowered(halves, forward, backward, strides, len(run.bodies), make_apart)
    of_some = functools.partial(_of_some, lowered, local, run, halves.backward)
    return replace(lowered, of_arrived=functools.cache(of_some))


def _of_some(
    lowered: Lowered, local: LocalProgram, run: _Runner, whole: fx.GraphModule, arrived: frozenset[str]
) -> Lowered:
    """`lowered` with a backward of the outputs `arrived` alone in the place of `whole`."""
    tangents = {node.name: given.name for node, given in local.placeholders.items() if given.kind == "tangent"}
    gm = of_arrived(local.program, whole, tangents, arrived)
    missing = {name for name, output in tangents.items() if output not in arrived}
    there = [n.name for n in whole.graph.find_nodes(op="placeholder") if n.name not in missing]
    wanted = [there.index(n.name) for n in gm.graph.find_nodes(op="placeholder")]
    first = len(lowered.strides) - len(tangents)
    of_tangents = zip(tangents, lowered.strides[first:], strict=True)

    def apart() -> Apart:
        made = run.apart(gm)
        return replace(made, first=_of_these(made.first, wanted))

    return replace(
        lowered,
        call_backward=_of_these(run(gm, backward=True), wanted),
        strides=(*lowered.strides[:first], *(stride for name, stride in of_tangents if name not in missing)),
        make_apart=functools.cache(apart),
        of_arrived=None,
    )


def _of_these(run: Boxed, wanted: Sequence[int]) -> Boxed:
    """`run` of some of the values that it is given; it empties their list."""

    def picking(values: list[torch.Tensor]) -> Any:
        some = [values[index] for index in wanted]
        values.clear()
        return run(some)

    return picking


class _Runner:
    """Makes callables of graphs; what is alike is compiled once."""

    def __init__(self, local: LocalProgram, device: torch.device, run: Callable[[fx.GraphModule], Boxed]) -> None:
        self.device = device
        self.run = run
        self.layer_of = layer_pattern(local).layer
        self.constants = {node.name for node in local.placeholders_of(*CONSTANT_KINDS)}
        self.fixed = {node.name for node in local.placeholders_of(*_FIXED_KINDS)}
        parameters = {given.name for given in local.inputs if given.kind == "parameter"}
        self.owned = [out.name in parameters for out in local.outputs if out.kind == "gradient"]
        """Of each gradient, whether it is a parameter's."""
        self.bodies: dict[fx.GraphModule, Boxed] = {}

    def compile_all(self, halves: Halves, rank: int) -> None:
        """Every body that the two halves call, from another one on every rank, odd ranks backwards."""
        bodies: dict[fx.GraphModule, None] = {}
        for gm, backward in ((halves.forward, False), (halves.backward, True)):
            if gm is not None:
                _, each = self._parts(gm, backward)
                bodies |= dict.fromkeys([call.body for call in each.values()] if _in_regions(each) else [gm])
        order = list(bodies)
        for index in range(len(order)):
            self._body(order[(rank + (index if rank % 2 == 0 else -index)) % len(order)])

    def __call__(self, gm: fx.GraphModule, backward: bool) -> Boxed:
        parts, each = self._parts(gm, backward)
        if not _in_regions(each):
            return self._body(gm)
        return self._outer(gm, parts, each, results_of(gm.graph))

    @functools.cache  # noqa: B019 (lives as long as what it makes)
    def _parts(self, gm: fx.GraphModule, backward: bool, whole: bool = False) -> tuple[Cut, dict[Region, Call]]:
        """The regions of a graph and their calls; one region where `whole`."""
        constants = [n for n in gm.graph.find_nodes(op="placeholder") if n.name in self.constants]
        parts = cut(gm, constants, (lambda _: "") if whole else self.layer_of, backward)
        return parts, dict(zip(parts.regions, calls(gm, parts.regions), strict=True))

    def _outer(self, gm: fx.GraphModule, parts: Cut, each: Mapping[Region, Call], results: Any) -> Boxed:
        attributes = {node: attrgetter(str(node.target))(gm) for node in gm.graph.find_nodes(op="get_attr")}
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        step = gloo_step if self.device.type == "cpu" else op_step
        planned = (
            self._region_step(each[part]) if isinstance(part, Region) else step(part) for part in arranged(parts)
        )
        return assembled(inputs, (each for each in planned if each is not None), results, attributes)

    def apart(self, gm: fx.GraphModule) -> Apart:
        """The backward `gm` in two: up to the reductions of gradients, and these."""
        parts, each = self._parts(gm, True)
        if not _in_regions(each):
            parts, each = self._parts(gm, True, whole=True)
        results = results_of(gm.graph)
        drains, placeholders = set(parts.drains), gm.graph.find_nodes(op="placeholder")
        same = parameter_chain(gm.graph, [n for n in placeholders if n.name in self.fixed], gathered=False)
        linear: set[fx.Node] = set(same)
        for node in parts.drains:
            if is_linear(node, same) and all(x in linear for x in node.all_input_nodes if x in drains):
                linear.add(node)
        late = [mine and node in linear for mine, node in zip(self.owned, results, strict=True)]
        ours = [None if later else node for node, later in zip(results, late, strict=True)]
        rest = [node if later else None for node, later in zip(results, late, strict=True)]

        def exchanges(wanted: Sequence[Any]) -> tuple[fx.Node, ...]:
            found = made_of(wanted, stop=lambda node: node not in drains)
            return tuple(node for node in parts.drains if node in found)

        held = dict.fromkeys(exchanges(rest))
        read = dict.fromkeys(x for n in held for x in n.all_input_nodes if x not in held)
        constant = [x for x in read if x in same]
        partial = [x for x in read if x not in same]
        first = self._outer(gm, replace(parts, drains=exchanges(ours)), each, [*ours, *partial, *constant])
        second = assembled([*partial, *constant], map(op_step, held), rest, {})
        return Apart(first, second, len(ours), len(partial))

    def _body(self, gm: fx.GraphModule) -> Boxed:
        if gm not in self.bodies:
            self.bodies[gm] = self.run(gm)
        return self.bodies[gm]

    def _region_step(self, call: Call) -> Planned:
        body = self._body(call.body)
        scalars = [torch.tensor(value, dtype=torch.int64, device=self.device) for value in call.scalars]
        return region_step(body, [*call.reads, *scalars], call.gives)


def _in_regions(each: Mapping[Region, Call]) -> bool:
    """Whether regions run apart: some are alike, or hold an op that cannot be compiled."""
    bodies = {call.body for call in each.values()}
    return len(bodies) < len(each) or any(map(_is_eager, bodies))


def _is_eager(gm: fx.GraphModule) -> bool:
    return any(map(is_shaped_by_values, gm.graph.nodes))


def _interpreted(gm: fx.GraphModule) -> Callable[[list[torch.Tensor]], Any]:
    """`gm` as it is, op by op; empties the list of its inputs, so that each is freed after its last use."""
    return lambda values: fx.Interpreter(gm).boxed_run(values)


def _as_captured(gm: fx.GraphModule) -> Callable[[list[torch.Tensor]], Any]:
    """`gm` op by op, with the strides that capture saw, which compiled code relies on (`nonzero` gives others)."""
    run = _interpreted(gm)
    strides = [node.meta["val"].stride() for node in gm.graph.output_node().all_input_nodes]
    return lambda values: tuple(map(laid_out, run(values), strides))


def compiled(gm: fx.GraphModule, pipelined: bool = False) -> Callable[[list[torch.Tensor]], Any]:
    """`gm` through Inductor, for inputs like its placeholders' fake values."""
    if _is_eager(gm):
        return _as_captured(gm)
    if not any(node.op == "call_function" for node in gm.graph.nodes):
        return _interpreted(gm)
    from passes.lower.inductor import through_inductor

    return through_inductor(gm, pipelined)
