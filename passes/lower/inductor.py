"""Inductor: a graph in, code out, without what Inductor puts around it.

Importing it takes a second, so `lower.py` imports this file when a program is compiled: plans and searches never are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import compile as inductor_compile
from torch._inductor.output_code import CompiledFxGraph
from torch.compiler import config as compiler_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes.lower.workarounds.scaled_sums import with_scales_apart
from passes.lower.workarounds.shared_parts import with_parts_apart
from passes.lower.workarounds.unfused_attention import attention_as_written
from passes.lower.workarounds.write_order import behind_writes
from passes.program.fakes import FakeTensorMode
from passes.program.graphs import graph_module
from passes.program.local import COLLECTIVES
from passes.program.strides import laid_out
from passes.program.walks import results_of

# What a pointwise op reads stays in memory until it runs. A sum over a few rows is one to Inductor, so that a sum of
# layers' gradients (of a bias of attention scores, say) keeps what all of them read. Torch 2.13 allows 12 on a CPU.
_FEW_READS = {"realize_acc_reads_threshold": 8}
# Inductor moves ops to where results are read or memory is freed: what is to run beside a collective ends up behind it.
_AS_ORDERED = {"reorder_for_locality": False, "reorder_for_peak_memory": False}

# Its cache knows nothing of what we mend of it: a graph that was compiled without would be found there.
_MENDED = "autopar: behind writes, attention as written"


def through_inductor(gm: fx.GraphModule, pipelined: bool) -> Callable[[list[torch.Tensor]], Any]:
    """`gm` compiled for a list of tensors like its placeholders' fake values, which it empties; `pipelined`: products
    and the collectives beside them as one op (torch's micro-pipelining pass)."""
    gm, constants = _lifted(gm)
    with FakeTensorMode(shape_env=ShapeEnv()):  # Inductor's cache of compiled graphs asks for one
        examples = [_fake_like(node.meta["val"]) for node in gm.graph.find_nodes(op="placeholder")]
    sends = any(node.target in COLLECTIVES for node in gm.graph.nodes)
    with_scales_apart(gm.graph)
    if sends:
        with_parts_apart(gm.graph)
    gm.recompile()
    settings = _FEW_READS | ({**_AS_ORDERED, "_micro_pipeline_tp": pipelined} if sends else {})
    tag = f"{compiler_config.cache_key_tag} {_MENDED}"
    tagged = compiler_config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with torch.no_grad(), behind_writes(), attention_as_written(), tagged:
        made = inductor_compile(_of_a_list(gm), [examples], settings)  # type: ignore[list-item]
    inner = _as_read(_within(made), gm)
    return functools.partial(_with, inner, constants) if constants else inner


def _lifted(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """`gm` with its constants as placeholders behind the others, and these: what Inductor compiles has none of its own,
    it takes them from what is around it."""
    read = gm.graph.find_nodes(op="get_attr")
    if not read:
        return gm, []
    graph = fx.Graph()
    copies = {}
    for node in (*gm.graph.find_nodes(op="placeholder"), *read):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    graph.output(graph.graph_copy(gm.graph, copies))
    return graph_module(gm, graph), [getattr(gm, node.target) for node in read]


def _with(made: Callable[[list[torch.Tensor]], Any], constants: list[torch.Tensor], values: list[torch.Tensor]) -> Any:
    """`made` of `values` and `constants`; `values` is emptied, so that what was used can be freed."""
    given = [*values, *constants]
    values.clear()
    return made(given)


def _within(made: Callable[[list[torch.Tensor]], Any]) -> Callable[[list[torch.Tensor]], Any]:
    """The compiled code in what Inductor gives; `made` itself where it is not found.

    What is around it (flattening, autograd's and autocast's states, mutations and aliases to restore) does nothing for
    a functional graph of plain tensors that runs without gradients, and takes longer than a small layer's kernels.
    """
    found: dict[int, CompiledFxGraph] = {}
    seen: set[int] = set()
    stack: list[Any] = [made]
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, CompiledFxGraph):
            found[id(each)] = each
        elif inspect.isfunction(each):
            stack += _closed_over(each)
        elif isinstance(each, functools.partial):
            stack += [each.func, *each.args]
        elif inspect.ismethod(each):
            stack += [each.__func__, each.__self__]
        elif callable(inner := getattr(each, "compiled_fn", None)):
            stack.append(inner)
    if len(found) != 1:
        return made
    (graph,) = found.values()
    return lambda values: graph(values)  # a function, as `made` is: copies of a module share it


def _as_read(run: Callable[[list[torch.Tensor]], Any], gm: fx.GraphModule) -> Callable[[list[torch.Tensor]], Any]:
    """`run`, with results in the strides that capture saw where Inductor gives others, as its decompositions may (of
    `lerp`): what reads them was compiled for those."""
    given = next((each.output_strides for each in _closed_over(run) if isinstance(each, CompiledFxGraph)), None)
    outputs = results_of(gm.graph)
    results = [node.meta["val"] if isinstance(node, fx.Node) else None for node in outputs]
    if given is None or len(given) != len(results):
        return run

    def differs(value: Any, strides: Sequence[str] | None) -> bool:
        if not isinstance(value, torch.Tensor) or strides is None:
            return False
        found = zip(value.shape, value.stride(), map(int, strides), strict=True)
        return any(wanted != made for size, wanted, made in found if size > 1)

    pairs = zip(results, given, strict=True)
    others = {i: value.stride() for i, (value, made) in enumerate(pairs) if value is not None and differs(value, made)}
    if not others:
        return run
    return lambda values: tuple(
        laid_out(value, others[i]) if i in others else value for i, value in enumerate(run(values))
    )


def _closed_over(function: Callable[..., Any]) -> list[Any]:
    """What `function` reads of the scopes around it; names that are not bound yet are left out."""
    values = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    return values


def _of_a_list(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with one list in the place of its inputs; Inductor's callable empties it and frees what it has used."""
    graph = fx.Graph()
    values = graph.placeholder("values")
    values.meta["steal_arg"] = True
    copies = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        copies[node] = graph.call_function(operator.getitem, (values, index))
        copies[node].meta = dict(node.meta)
    graph.output(graph.graph_copy(gm.graph, copies))
    return graph_module(gm, graph)


def _fake_like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
