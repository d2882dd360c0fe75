"""`normalize`: the same program with what says nothing removed, and its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.program.bytes_of import bytes_of
from passes.program.graphs import drop_unread
from passes.program.order import settle_order
from passes.program.program import Output, Program
from passes.program.walks import results_of
from passes.rules.work import base_of

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.expand.default, aten.permute.default, aten._unsafe_view.default}


def normalize(program: Program) -> Program:
    """Drop ops that change nothing, equal ops and unused ops from the graph, settle its order; set the fingerprint."""
    graph = program.graph.graph
    bases = [base_of(node) for node in results_of(graph)]
    drop_no_ops(graph)
    copy_single_parts(graph)
    drop_written_slices(graph)
    drop_unread(graph)
    merge_equal(graph)
    drop_unread(graph)
    program.graph.recompile()
    return settled_in_order(dataclasses.replace(program, outputs=_with_memories(program, bases)))


def _with_memories(program: Program, bases: Sequence[fx.Node]) -> tuple[Output, ...]:
    """The outputs, each with the memory it is in where its base is no longer in the graph."""
    left = set(program.graph.graph.nodes)
    first: dict[fx.Node, str] = {}
    return tuple(
        dataclasses.replace(output, memory=first.setdefault(base, output.name))
        if output.kind == "output" and base not in left
        else output
        for output, base in zip(program.outputs, bases, strict=True)
    )


def settled_in_order(program: Program) -> Program:
    """What follows from inputs and buffers alone put in an order that is the same in every process; the fingerprint
    set."""
    given = program.placeholders.items()
    free = {node: f"{entry.kind} {entry.name}" for node, entry in given if entry.kind in ("input", "buffer")}
    settle_order(program.graph.graph, free, lambda node, known: _line(program, node, known))
    return dataclasses.replace(program, fingerprint=fingerprint(program))


def drop_no_ops(graph: fx.Graph) -> None:
    """Remove nodes whose value has the shape, strides and dtype of their operand and the same elements."""
    for node in list(graph.nodes):
        same = _same_as(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _same_as(node: fx.Node) -> fx.Node | None:
    """The operand that a node's value is, where it is one."""
    if node.op != "call_function" or not node.args:
        return None
    same = _one_part(node) if node.target is aten.cat.default else node.args[0]
    if not isinstance(same, fx.Node) or not isinstance(node.meta["val"], Tensor):
        return None
    old, new = same.meta["val"], node.meta["val"]
    if not isinstance(old, Tensor) or old.shape != new.shape or old.dtype != new.dtype:
        return None
    return same if _changes_nothing(node, old, new) else None


def _changes_nothing(node: fx.Node, old: Tensor, new: Tensor) -> bool:
    """Whether an op gives what it is given, where shapes and dtypes are the same."""
    target, args = node.target, node.args
    if target in _SAME_WHERE_SHAPES_ARE:
        return True
    if target in (aten.clone.default, aten._to_copy.default, aten.cat.default):
        return _same_strides(old, new)
    if target is aten.permute.default:
        dims: Any = args[1]
        return [dim % max(old.dim(), 1) for dim in dims] == list(range(old.dim()))
    if target is aten.transpose.int:
        one, other = (dim % max(old.dim(), 1) for dim in args[1:])  # type: ignore[operator]
        return bool(one == other)
    if target is aten.slice.Tensor:
        return len(args) < 5 or bool(args[4] == 1)
    if target is aten.sum.dim_IntList:
        return not old.dim()
    if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return _is_one(args[1]) and _same_strides(old, new)
    return False


_SAME_WHERE_SHAPES_ARE = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
}


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


def _one_part(node: fx.Node) -> fx.Node | None:
    """The only operand of a `cat` that is not empty, where it is as large and of the same dtype."""
    parts: Any = node.args[0]
    full = [p for p in parts if p.meta["val"].numel()]
    if len(full) != 1:
        return None
    part, whole = full[0].meta["val"], node.meta["val"]
    return full[0] if part.shape == whole.shape and part.dtype == whole.dtype else None


def copy_single_parts(graph: fx.Graph) -> None:
    """Write the `cat` of one tensor that is not empty as the contiguous copy that it is: Inductor passes that tensor on
    as it lies. A key-value cache begins so."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        part = _one_part(node)
        if part is not None and node.meta["val"].is_contiguous():
            node.target, node.args = aten.clone.default, (part,)
            node.kwargs = {"memory_format": torch.contiguous_format}


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Equal strides along dims that have more than one element."""
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def drop_written_slices(graph: fx.Graph) -> None:
    """Read what was just written to a slice from what was written: `select(select_scatter(x, y, d, i), d, i)` is y, but
    where writing cast it."""
    pairs = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}
    for node in list(graph.nodes):
        written = node.args[0] if node.op == "call_function" and node.target in pairs else None
        if not isinstance(written, fx.Node) or written.target is not pairs[node.target]:
            continue
        source: Any = written.args[1]
        cast = source.meta["val"].dtype != node.meta["val"].dtype
        if node.args[1:] == written.args[2:] and not node.kwargs and not written.kwargs and not cast:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def merge_equal(graph: fx.Graph) -> None:
    """Compute equal nodes of one phase once; a backward node is never merged into a forward one (it would be saved)."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or _is_random(node):
            continue
        key = (node.meta["phase"], node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(value: Any) -> Any:
    """A hashable stand-in for an argument, equal for equal arguments of the same type."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return ("list", *(_key(v) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, _key(v)) for k, v in sorted(value.items())))
    return (type(value).__name__, str(value))


# ------------------------------------------------------------------------------------------------------ fingerprint
def fingerprint(program: Program) -> str:
    """sha256 over ops, arguments, shapes, dtypes, inputs and outputs; node names and places do not count."""
    digest = hashlib.sha256()
    for line in _structure(program):
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _structure(program: Program) -> Iterator[str]:
    names: dict[fx.Node, str] = {}
    yield from (f"{i.kind} {i.name} {i.requires_grad} {i.batch_dim} {i.dtypes or ''}" for i in program.inputs)
    yield from (f"{o.kind} {o.name} {o.requires_grad} {o.batch_dim}" for o in program.outputs)
    for number, node in enumerate(program.graph.graph.nodes):
        names[node] = f"%{number}"
        yield _line(program, node, names)


def _line(program: Program, node: fx.Node, names: dict[fx.Node, str]) -> str:
    """What a node computes, from operands with these names."""
    if node.op == "placeholder":
        what = "placeholder"
    elif node.op == "get_attr":
        what = f"constant {content_of(program.graph.get_buffer(str(node.target)))}"
    elif node.op == "output":
        what = f"output {_text(node.args[0], names)}"
    else:
        what = f"{_name(node.target)} {_text(node.args, names)} {_text(node.kwargs, names)}"
    return f"{what} {_facts(node.meta.get('val'))}"


def _name(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target)


def _text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(v, names) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(v, names)}" for k, v in sorted(value.items())) + "}"
    return repr(value)


def _facts(val: Any) -> str:
    if isinstance(val, Tensor):
        return f"{val.dtype}{list(val.shape)}"
    if isinstance(val, (list, tuple)):
        return "(" + ",".join(_facts(v) for v in val) + ")"
    return ""


def content_of(constant: Tensor) -> str:
    """Equal for constants of the same bytes."""
    return hashlib.sha256(bytes_of(constant).numpy().tobytes()).hexdigest()
