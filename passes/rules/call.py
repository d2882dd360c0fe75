"""An op on concrete arguments: what rules and prices look at instead of a graph node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        total = self.dtype.itemsize
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands for the tensor argument `index` in a call's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """`target` on tensors of given facts; equal calls have equal rules and costs.

    `arguments` maps the schema's argument names to values, tensors replaced by `Operand`s. `results` has one entry per
    tensor the op returns, None where it returns None.
    """

    target: Any
    arguments: dict[str, Any]
    operands: tuple[TensorFacts, ...]
    results: tuple[TensorFacts | None, ...]
    seen: float | None = None
    """Of an attention without its mask, the share of scores that a kernel computes (`masks.masks_as_shares`)."""

    @property
    def is_float(self) -> bool:
        """Whether all tensors that it takes and gives are of floating point: whole numbers may be rounded ones."""
        return all(facts.dtype.is_floating_point for facts in (*self.operands, *filter(None, self.results)))

    @property
    def result(self) -> TensorFacts:
        """Facts of the (first) tensor that it gives."""
        facts = self.results[0]
        assert facts is not None, self
        return facts

    def get(self, name: str, default: Any = None) -> Any:
        """The argument `name`, or `default` where it was not passed."""
        return self.arguments.get(name, default)

    def facts(self, name: str) -> TensorFacts:
        """Facts of the tensor passed as `name`."""
        operand = self.arguments[name]
        assert isinstance(operand, Operand)
        return self.operands[operand.index]


def facts_of(value: Any) -> TensorFacts | None:
    """Facts of a (fake) tensor; None for anything else."""
    if isinstance(value, torch.Tensor):
        return TensorFacts(tuple(int(size) for size in value.shape), value.dtype)
    return None


def is_tensor(node: fx.Node) -> bool:
    """Whether the node yields one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a node in the order they are passed; a tensor passed twice stands twice."""
    found: list[fx.Node] = []

    def visit(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if is_tensor(value):
                found.append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        return value

    for argument in node.args:
        visit(argument)
    for argument in node.kwargs.values():
        visit(argument)
    return found


def map_operands(node: fx.Node, replace: Callable[[int, fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's args and kwargs with the i-th tensor argument replaced by `replace(i, node)`."""
    count = 0

    def visit(value: Any) -> Any:
        nonlocal count
        if isinstance(value, fx.Node):
            if is_tensor(value):
                count += 1
                return replace(count - 1, value)
            return value
        if isinstance(value, list | tuple):
            return type(value)(visit(item) for item in value) if not isinstance(value, torch.Size) else tuple(value)
        return value

    args = tuple(visit(argument) for argument in node.args)
    return args, {name: visit(argument) for name, argument in node.kwargs.items()}


def call_of(node: fx.Node) -> Call:
    """The call a `call_function` node makes."""
    operands = tuple(facts_of(operand.meta["val"]) for operand in operand_nodes(node))
    args, kwargs = map_operands(node, lambda index, _: Operand(index))
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else [str(i) for i in range(len(args))]
    value = node.meta["val"]
    results = tuple(map(facts_of, value)) if isinstance(value, list | tuple) else (facts_of(value),)
    arguments = dict(zip(names, args, strict=False)) | kwargs
    return Call(node.target, arguments, operands, results, node.meta.get("seen"))  # type: ignore[arg-type]


def call_key(node: fx.Node) -> str:
    """Equal for nodes that make equal calls."""
    call = call_of(node)
    seen = "" if call.seen is None else call.seen
    return f"{call.target}{call.arguments}{call.operands}{call.results}{seen}"


def op_text(target: Any) -> str:
    """`mm` for `aten.mm.default`; kernels that are one op on different devices have one name."""
    name = str(target)
    name = name.split(".")[1] if "." in name else name
    return "attention" + ("_backward" if name.endswith("_backward") else "") if "dot_product" in name else name
