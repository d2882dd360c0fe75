"""Where a local program parts from the program it was made from: the first node that does something else.

All ranks are simulated. Nodes that hold a rank's part of a node of the program say so (`part_of`), so the parts can be
put together again: shards joined, partial sums added, replicas compared. What that gives for an op is held against the
op run whole on what its *operands* were put together to, and what a collective brings against what it was given. So
errors that came in upstream cancel out, and the first node that differs is the one at fault.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from costmodel.layout import Layout, Partial, Shard, layout_text, local_shape
from passes.analysis.analysis import Analysis, analyse
from passes.analysis.dims import expanded_shape, is_getitem, value_of
from passes.parity.scattered import SimulationError, gather
from passes.parity.simulate import simulate
from passes.program.emit import SAME_STRIDES
from passes.program.local import LocalProgram
from passes.program.program import Program
from passes.program.walks import results_of
from passes.rules.call import is_tensor
from passes.rules.matmul import PRODUCTS

aten = torch.ops.aten

How = Literal["op", "move", "input", "output", "replicas", "crash"]

_HOW: dict[How, str] = {
    "op": "the ranks' parts of its result, put together, are not what the op gives on the whole operands",
    "move": "a collective or slice on the way of its result to another layout changed its value",
    "input": "it does not arrive as it was given",
    "output": "what the ranks return, put together, is not what was computed",
    "replicas": "ranks that should hold the same values do not",
    "crash": "it could not be run",
}


_ROUNDINGS = 16
"""Units in the last place of an op's largest operand that its result may be off by."""

_EXACT_TO_THE_RESULT = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.neg.default,
    aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.exp.default, aten.where.self,
}  # fmt: skip
"""Ops in which nothing cancels: they round by units in the last place of what they give, however large an operand."""


@dataclass(frozen=True)
class Divergence:
    """The first node of the program at which the ranks part from one device."""

    node: str
    op: str
    module: str
    source: str
    phase: str
    how: How
    error: float
    layout: str
    """How the parts lay, on expanded dims: `S(0)P`."""
    local_node: str
    detail: str = ""

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.module and f"in {self.module}", self.source and f"at {self.source}")))
        text = f"{self.node} = {self.op}" + (f" ({where})" if where else "") + f", {self.phase}: {_HOW[self.how]}"
        facts = [f"local node {self.local_node}"] if self.local_node else []
        facts += [f"layout {self.layout}"] if self.layout else []
        facts += [f"relative error {self.error:.2g}"] if self.how != "crash" else []
        return text + (f" [{'; '.join(facts)}]" if facts else "") + (f": {self.detail}" if self.detail else "")


class _Reshaping(fx.Interpreter):
    """Runs a graph whose tensors may lie otherwise in memory than when it was captured."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(aten.reshape.default if target in SAME_STRIDES else target, args, kwargs)


def run_program(program: Program, values: Sequence[Any]) -> list[Any]:
    """What the program's outputs are on one device; `values` has one per placeholder.

    Parameters that the program has padded, and their gradients, are given and returned as they are outside.
    """
    outside = {given.name: given.shape for given in program.inputs if given.shape is not None}
    with torch.no_grad():
        found = list(_Reshaping(program.graph).run(*_padded(program, values), enable_io_processing=False))
    return [
        value if shape is None else value[tuple(map(slice, shape))]
        for out, value in zip(program.outputs, found, strict=True)
        for shape in [outside.get(out.name) if out.kind == "gradient" else out.shape]
    ]


def _padded(program: Program, values: Sequence[Any]) -> list[Any]:
    """The values with zeros up to their placeholders' shapes."""
    padded = list(values)
    for index, (node, given) in enumerate(program.placeholders.items()):
        if given.shape is not None:
            sizes = zip(reversed(node.meta["val"].shape), reversed(given.shape), strict=True)
            zeros = [n for whole, part in sizes for n in (0, int(whole) - part)]
            padded[index] = torch.nn.functional.pad(values[index], zeros)
    return padded


def difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; elements that are equal (infinities, NaNs) count 0."""
    off, scale = _distance(found, wanted)
    return off / (scale or 1.0)


def _distance(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(norm of the difference, norm of what is wanted), of finite elements; infinite where one alone is not finite."""
    a, b = found.detach().to(torch.float64), wanted.detach().to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    off = 0.0 if bool(same.all()) else torch.where(same, torch.zeros_like(a), a - b).norm().item()
    return math.inf if math.isnan(off) else off, _norm(b)


def _norm(value: Any) -> float:
    if not isinstance(value, Tensor):
        return 0.0
    wide = value.detach().to(torch.float64)
    return float(torch.where(wide.isfinite(), wide, torch.zeros_like(wide)).norm())


def first_divergence(
    local: LocalProgram, per_rank: Sequence[Sequence[Any]], whole: Sequence[Any], tolerance: float
) -> Divergence | None:
    """The first node whose parts differ from the whole by more than `tolerance` of its norm, and than rounding of its
    operands explains; None where there is none.

    `per_rank` is what each rank's placeholders get (`simulate.local_inputs`), `whole` what the program's get.
    """
    search = _Search(local, whole, tolerance)
    try:
        results = simulate(local, per_rank, search.observe)
    except _FoundError as found:
        return found.divergence
    except SimulationError as error:
        return search.crashed(error)
    return search.returned(results)


class _FoundError(Exception):
    """Ends the simulation at the first divergence."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence


class _Search:
    """Values of the program's nodes: as the ranks' parts make them up (`seen`), else computed from those."""

    def __init__(self, local: LocalProgram, whole: Sequence[Any], tolerance: float) -> None:
        self.local = local
        self.tolerance = tolerance
        self.analysis: Analysis = analyse(local.program)
        graph = local.program.graph.graph
        self.nodes: dict[str, fx.Node] = {node.name: node for node in graph.nodes}
        self.whole: dict[fx.Node, Any] = dict(
            zip(graph.find_nodes(op="placeholder"), _padded(local.program, whole), strict=True)
        )
        self.seen: dict[fx.Node, Any] = {}
        self.computed: dict[fx.Node, Any] = {}
        self.rounding: dict[fx.Node, float] = {}
        """What rounding may change a value by: a sum that cancels has an error of the size of its terms'."""
        self.last: fx.Node | None = None

    def observe(self, node: fx.Node, parts: list[Any]) -> None:
        """Check one local node's values on all ranks."""
        self.last = node
        part_of = node.meta.get("part_of")
        if part_of is None or part_of[0] not in self.nodes or not all(isinstance(part, Tensor) for part in parts):
            return
        of, layout = self.nodes[part_of[0]], part_of[1]
        joined, spread = self._joined(of, layout, parts)
        if spread > self.tolerance:
            raise _FoundError(self._divergence(of, "replicas", spread, layout, node))
        known = of in self.seen
        wanted = self.seen[of] if known else self.expected(of)
        if not known:
            self.rounding[of] = self._rounding(of, parts)
        near, error = self._judged(of, joined, wanted)
        if not near:
            how: How = "move" if known else "input" if of.op in ("placeholder", "get_attr") else "op"
            raise _FoundError(self._divergence(of, how, error, layout, node))
        if not known:
            self.seen[of] = joined

    def returned(self, results: Sequence[Sequence[Any]]) -> Divergence | None:
        """Check what the ranks return."""
        nodes = results_of(self.local.program.graph.graph)
        last = results_of(self.local.graph.graph)
        for position, (described, node) in enumerate(zip(self.local.outputs, nodes, strict=True)):
            if not isinstance(node, fx.Node):
                continue
            kind: How = "output"
            detail = f"{described.kind} {described.name}"
            try:
                parts = [mine[position] for mine in results]
                zeros = described.kind != "output"
                full = gather(parts, described.storage, self.local.axes, detail, zeros=zeros)
            except SimulationError as failed:
                return self._divergence(node, "replicas", float("inf"), None, last[position], str(failed))
            wanted = self.value(node)[tuple(map(slice, full.shape))]
            near, error = self._judged(node, full, wanted)
            if not near:
                return self._divergence(node, kind, error, None, last[position], detail)
        return None

    def crashed(self, error: SimulationError) -> Divergence:
        """The node after the last that ran."""
        after = self.last.next if self.last is not None else None
        name = after.name if after is not None else ""
        meta: Mapping[str, Any] = after.meta if after is not None else {}
        return Divergence(
            name,
            str(after.target) if after is not None else "",
            meta.get("module", ""),
            meta.get("source", ""),
            meta.get("phase", ""),
            "crash",
            float("inf"),
            "",
            name,
            str(error),
        )

    def expected(self, node: fx.Node) -> Any:
        """`node` run whole on its operands as they were seen."""
        if node.op == "placeholder":
            return self.whole[node]
        if node.op == "get_attr":
            return getattr(self.local.program.graph, str(node.target))
        if is_getitem(node):
            return operator.getitem(self.value(node.args[0]), node.args[1])  # type: ignore[arg-type]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def value(self, node: fx.Node) -> Any:
        """What is known of a node: its parts put together, or else what follows from its operands."""
        if node in self.seen:
            return self.seen[node]
        if node not in self.computed:
            self.computed[node] = self.expected(node)
        return self.computed[node]

    def _judged(self, node: fx.Node, found: Tensor, wanted: Tensor) -> tuple[bool, float]:
        """Whether a value is near enough, and its relative error."""
        off, scale = _distance(found, wanted)
        return off <= self.tolerance * (scale or 1.0) + self.rounding.get(node, 0.0), off / (scale or 1.0)

    def _rounding(self, node: fx.Node, parts: Sequence[Tensor]) -> float:
        if not parts[0].dtype.is_floating_point:
            return 0.0
        sources = [] if node.target in _EXACT_TO_THE_RESULT else node.all_input_nodes
        operands = [_norm(self.value(source)) for source in sources if is_tensor(source)]
        terms = math.prod(operands) if node.target in PRODUCTS else max(operands, default=0.0)
        return (
            _ROUNDINGS * torch.finfo(parts[0].dtype).eps * max([terms, *map(_norm, {id(p): p for p in parts}.values())])
        )

    def _joined(self, node: fx.Node, layout: Layout, parts: Sequence[Tensor]) -> tuple[Tensor, float]:
        """The whole of which the ranks hold these parts, and how far replicas are apart."""
        value = value_of(node, self.analysis.folding)
        place = self.analysis.places[value.op]
        dims = place.op.results[value.result] if place.op is not None else place.dims
        shape = expanded_shape(dims)
        sizes = [size for _, size in self.local.axes]
        mine = local_shape(shape, layout, sizes)
        level = [part.reshape(mine) for part in parts]
        spread = 0.0
        # The innermost axis first: where two axes split one dim, the earlier one splits first.
        for placement, size in zip(reversed(layout), reversed(sizes), strict=True):
            grouped = [level[i : i + size] for i in range(0, len(level), size)]
            if isinstance(placement, Shard):
                level = [torch.cat(group, placement.dim) for group in grouped]
            elif isinstance(placement, Partial):
                level = [_reduced(group, placement.op) for group in grouped]
            else:
                # A replica is one object where it was computed once.
                spread = max([spread, *(difference(x, g[0]) for g in grouped for x in g[1:] if x is not g[0])])
                level = [group[0] for group in grouped]
        return level[0].reshape([int(n) for n in node.meta["val"].shape]), spread

    def _divergence(
        self, node: fx.Node, how: How, error: float, layout: Layout | None, local: Any, detail: str = ""
    ) -> Divergence:
        made = node.args[0] if is_getitem(node) else node
        assert isinstance(made, fx.Node)
        return Divergence(
            node.name,
            str(made.target),
            made.meta.get("module", ""),
            made.meta.get("source", ""),
            made.meta.get("phase", "forward"),
            how,
            error,
            layout_text(layout) if layout is not None else "",
            local.name if isinstance(local, fx.Node) else "",
            detail,
        )


def _reduced(group: Sequence[Tensor], op: str) -> Tensor:
    stacked = torch.stack(list(group))
    if op == "max":
        return stacked.amax(0)
    return stacked.sum(0, dtype=stacked.dtype) if stacked.dtype != torch.bool else stacked.any(0)
