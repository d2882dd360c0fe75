"""`own_randomness`: a program whose random ops draw numbers that are the same on every mesh.

Each random op becomes `autopar.uniform(seed, salt, size)`, where `salt` is the op's number (`uniform`), and ordinary
ops that make the op's distribution of that (`random_ops`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from passes.prepare.random_ops import REPLACED, Draws, Replacement, unsupported
from passes.program.adder import Adder, kept_meta
from passes.program.program import Input, Program
from passes.program.provenance import place_of

aten = torch.ops.aten

_MASK_OPS = 4
"""From random numbers to what they mask: compared, made a number, scaled, multiplied by."""


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
            draws = Draws(node, Adder(graph, kept_meta(node.meta), fake_mode), seed, salts.__next__)
            _substitute(graph, node, REPLACED[node.target._schema.name](draws, _arguments(node)))
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
    if target._schema.name not in REPLACED:
        known = ", ".join(sorted(name.removeprefix("aten::") for name in REPLACED))
        raise unsupported(node, f"only these can be made equal on every mesh: {known}")
    if _arguments(node).get("generator") is not None:
        raise unsupported(node, "it draws from a generator of its own; leave the generator out")
    if node.meta.get("phase") == "backward":
        raise unsupported(
            node,
            "it runs in backward, where it would draw other numbers than the forward op it may repeat; turn gradient "
            "checkpointing off in the model (autopar chooses what to recompute)",
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by the names of the op's schema, those with a default included."""
    target: Any = node.target
    schema = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)


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
