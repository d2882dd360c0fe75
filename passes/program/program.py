"""A captured training step: one ATen graph and what each of its inputs and outputs is.

`Program` is the value every later stage reads. Its graph holds forward, loss and backward of the *global* batch on
fake CPU tensors, is functional (no mutation, no aliasing that matters), and has one placeholder per `Input` and one
flat output tuple with one entry per `Output`, both in order.

Node metadata that later stages may rely on (set by `capture`, kept by every pass):

    val        the fake tensor (or tuple of them) the node yields
    phase      "forward" or "backward"
    module     FQN of the module whose forward ran the op ("" at the root); a backward node has that of its forward op
    source     "file.py:line" of the model code that ran it, or ""
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import fx

from passes.program.precision import Dtypes
from passes.program.spans import Span

if TYPE_CHECKING:
    from passes.program.local import Storage

InputKind = Literal["parameter", "buffer", "input", "tangent", "seed"]
OutputKind = Literal["output", "buffer", "gradient"]


@dataclass(frozen=True, slots=True)
class Input:
    """What a placeholder stands for.

    `name` is an FQN for a parameter or buffer (the first of its names, where it is tied), a path such as `input_ids`
    or `args.0` for what the user passes, and the path of the output for a tangent. What the user passes under the name
    of a parameter or buffer has another, and `path` is what it is passed under: a name is of one of these three. A
    "seed" comes last, where the program has random ops (`randomness.own_randomness`): int64 of shape (2,), the user's
    seed and the step's number.
    `requires_grad`: its gradient is among the outputs. `batch_dim` is the dim that the batch axes split, for inputs and
    tangents that have one. `shape` is that of a parameter or input outside the graph, where its placeholder (and a
    parameter's gradient) is larger: padded with zeros at the end of its dims (`pad.pad`). `dtypes`, of a parameter
    under mixed precision: the placeholder is what is computed with, at rest it is another. `at_rest`: how a
    parameter is stored, where an earlier program of the model laid it out.
    """

    kind: InputKind
    name: str
    requires_grad: bool = False
    batch_dim: int | None = None
    shape: tuple[int, ...] | None = None
    dtypes: Dtypes | None = None
    at_rest: Storage | None = None
    passed_as: str | None = None

    @property
    def path(self) -> str:
        """Where the user's arguments have it."""
        return self.name if self.passed_as is None else self.passed_as


@dataclass(frozen=True, slots=True)
class Output:
    """What an entry of the graph's output tuple is.

    `output`: a tensor of what the model returned, `name` its path (`loss`, `logits`, `0`). `buffer`: the new value of
    a buffer, or parameter, that the forward changed. `gradient`: of the parameter or input `name`. `shape` is that of
    an output outside the graph, where what the graph gives is larger (`pad.pad`); a parameter's gradient is as large as
    its placeholder. `memory`: of an output that is in a copy's memory where the graph has no copy (`normalize` drops
    it), the first output that is in it.
    """

    kind: OutputKind
    name: str
    requires_grad: bool = False
    batch_dim: int | None = None
    shape: tuple[int, ...] | None = None
    memory: str = ""


@dataclass(frozen=True)
class Fixed:
    """A value that the model read while it was captured; the graph is that of inputs which give the same."""

    where: str
    """The line that read it."""
    what: str
    value: Any
    """A number, a tensor, or, where `is_shape`, the shape of an op's result (of each, where it has several)."""
    is_shape: bool = False
    buffers: tuple[str, ...] = ()
    """Buffers from which the value follows, where it follows from no input."""
    written: tuple[str, ...] = ()
    """Buffers that the step changes and from which the value follows: the next step may find another."""


@dataclass(frozen=True)
class Guards:
    """Computes again, from whole inputs and buffers, what was read: one result per `fixed`."""

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    """Paths of the program's inputs, by placeholder."""
    buffers: tuple[str, ...]
    """Names of its buffers, whose placeholders come behind."""
    fixed: tuple[Fixed, ...]


class Constant(NamedTuple):
    """A tensor that the model's code read and that is no input: the line that read it first, and where it lay."""

    where: str
    span: Span


@dataclass(frozen=True, slots=True)
class Repeated:
    """Layers `first` to `first + length` of the list `stack` stand for `more` copies of theirs that come right behind
    them and are not in the graph (`passes/prepare/shorten.py`)."""

    stack: str
    first: int
    length: int
    more: int

    @property
    def unit(self) -> range:
        """Numbers of the layers that stand for others."""
        return range(self.first, self.first + self.length)

    def layer(self, module: str) -> int:
        """Number of the layer that a module or parameter is of; -1 where it is of none."""
        head, _, rest = module.partition(f"{self.stack}.")
        number = rest.partition(".")[0]
        return int(number) if not head and number.isdigit() else -1


@dataclass(frozen=True)
class Program:
    """One training step (or one forward, where nothing asks for a gradient)."""

    graph: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    out_spec: Any
    """pytree spec of what the model returned."""
    out_constants: dict[int, Any]
    """Leaf index in `out_spec` -> value, for outputs that are no tensors; the others match the "output" Outputs."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied names: every further FQN of a parameter or buffer -> the name its `Input` carries."""
    notes: tuple[str, ...] = ()
    """What a user should know about the capture; shown in the report."""
    left: tuple[str, ...] = ()
    """Attributes of modules where the forward leaves tensors that a loss may be made of, see `left_behind.py`."""
    attends: str = ""
    """A note where samples attend to one another (`passes/analysis/batch_dims.py`): their dim may be another one."""
    has_loss: bool = False
    """A scalar among the outputs is differentiated, by a tangent of its own; then it alone has a tangent. Else every
    differentiable output has one."""
    fingerprint: str = ""
    """Hash of the graph's structure, shapes and dtypes; equal for equal captures in any process."""
    guards: Guards | None = None
    """What the graph takes for granted about its inputs' values; None: nothing."""
    settings: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    """Plain values of modules that the forward read: see `passes/capture/settings.py`."""
    constants: tuple[Constant, ...] = ()
    """Tensors that the model's code read besides, whose values the graph has."""
    repeated: tuple[Repeated, ...] = ()
    """Layers that stand for others, where some were left out."""

    def of_stored(self, storages: Mapping[str, Storage]) -> Program:
        """The same program of a model whose parameters are stored so, by name."""
        return replace(self, inputs=tuple(replace(given, at_rest=storages.get(given.name)) for given in self.inputs))

    @property
    def stored(self) -> dict[str, Storage]:
        """How parameters are stored that an earlier program laid out, by name."""
        return {given.name: given.at_rest for given in self.inputs if given.at_rest is not None}

    @property
    def placeholders(self) -> dict[fx.Node, Input]:
        """What each placeholder of the graph is, in order."""
        return dict(zip(self.graph.graph.find_nodes(op="placeholder"), self.inputs, strict=True))

    def placeholders_of(self, *kinds: InputKind) -> list[fx.Node]:
        """The placeholders of these kinds, in order."""
        return [node for node, given in self.placeholders.items() if given.kind in kinds]

    @property
    def batch_dims(self) -> dict[fx.Node, int]:
        """Inputs that have a batch: placeholder -> its dim."""
        given = self.placeholders.items()
        return {n: what.batch_dim for n, what in given if what.kind == "input" and what.batch_dim is not None}

    @property
    def batch_size(self) -> int | None:
        """How many samples the inputs have that have a batch; None where there is none, or they have not as many."""
        sizes = {node.meta["val"].shape[dim] for node, dim in self.batch_dims.items()}
        return sizes.pop() if len(sizes) == 1 else None

    def weights(self) -> Mapping[fx.Node, int]:
        """Node -> how many alike ones it stands for, itself included; those that stand for themselves are left out."""
        found: dict[fx.Node, int] = {}
        if not self.repeated:
            return found
        given = iter(self.inputs)
        for node in self.graph.graph.nodes:
            name = next(given).name if node.op == "placeholder" else node.meta.get("module", "")
            for each in self.repeated:
                if each.layer(name) in each.unit:
                    found[node] = each.more + 1
        return found
