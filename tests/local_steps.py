"""Small local programs made by hand, for tests of what runs them: no capture, no solver, no rewrite.

`Net` is a two-layer network with a tied weight, an unused and a frozen parameter, and a buffer that counts its calls.
`local_step` traces its step with `make_fx` and puts FSDP's collectives around it: every parameter's rows are chunked
over all mesh axes, gathered in the forward and again in the backward, and its gradient is reduce-scattered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from passes.program.local import DimShard, LocalInput, LocalOutput, LocalProgram, Storage
from passes.program.program import Input, Output, Program

gather = torch.ops._c10d_functional.all_gather_into_tensor.default
scatter = torch.ops._c10d_functional.reduce_scatter_tensor.default
reduce = torch.ops._c10d_functional.all_reduce.default
wait = torch.ops._c10d_functional.wait_tensor.default
aten = torch.ops.aten


@dataclass
class NetOutput:
    """What `Net` returns."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    name: str = "net"


pytree.register_dataclass(NetOutput)


class Net(nn.Module):
    """Embedding, an MLP with a residual, and a head tied to the embedding."""

    def __init__(self, rows: int = 10, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = {"rows": rows, "width": width}
        self.embed = nn.Embedding(rows, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((width,), 1.5), persistent=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> NetOutput:
        self.calls.add_(1)
        x = self.embed(ids) * self.frozen * self.scale
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        logits = self.head(x)
        if self.training:
            logits = logits * 2
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return NetOutput(loss, logits)


def stored_rows(storage: Storage, axis_sizes: Sequence[int]) -> tuple[int, ...]:
    """Rows of the computed part that each rank of the state axes stores, first state axis slowest.

    A gather over those axes gives each rank's rows padded to `padded_shape`'s, so the part is the concatenation
    of the first `stored_rows` of each. That matters where nested cuts are uneven: 9 rows over axes of 2 and 4 lie
    as 2, 2, 1, 0, 1, 1, 1, 1, and padding is not all at the end.
    """
    rows = [storage.computed_shape(axis_sizes)[storage.state_dim]] if storage.state_axes else []
    for axis in storage.state_axes:
        size = axis_sizes[axis]
        rows = [min(max(n - i * -(-n // size), 0), -(-n // size)) for n in rows for i in range(size)]
    return tuple(rows)


def local_step(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    axes: tuple[tuple[str, int], ...],
    *,
    tangents: str = "loss",
    backward: bool = True,
) -> LocalProgram:
    """The step of a `Net`-like model on one rank's batch `(args, kwargs)`, FSDP over all `axes`."""
    ranks = math.prod(size for _, size in axes)
    sizes = [size for _, size in axes]
    group = ",".join(name for name, _ in axes)
    parameters = dict(model.named_parameters())
    every_name = dict(model.named_parameters(remove_duplicate=False))
    aliases = {
        n: next(k for k, v in parameters.items() if v is p) for n, p in every_name.items() if n not in parameters
    }
    buffers = dict(model.named_buffers())
    leaves, in_spec = pytree.tree_flatten((args, dict(kwargs)))
    tensor_leaves = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    trained = [name for name, p in parameters.items() if p.requires_grad and backward]
    found: dict[str, Any] = {}

    def forward(values: list[torch.Tensor]) -> tuple[list[Any], dict[str, torch.Tensor]]:
        state = dict(zip([*parameters, *buffers], values, strict=False))
        state |= {name: state[target] for name, target in aliases.items()}
        mine = {name: state[name].clone() for name in buffers}
        call_leaves = iter(values[len(parameters) + len(buffers) :])
        flat = [next(call_leaves) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call_args, call_kwargs = pytree.tree_unflatten(flat, in_spec)
        out = functional_call(model, {**state, **mine}, call_args, call_kwargs, tie_weights=False)
        found["out"] = out
        return pytree.tree_flatten(out), mine

    def step(*values: torch.Tensor) -> Any:
        n = len(parameters) + len(buffers) + len(tensor_leaves)
        values_ = [v.detach().requires_grad_(i < len(parameters) and list(parameters)[i] in trained)
                   for i, v in enumerate(values[:n])]  # fmt: skip
        with torch.set_grad_enabled(backward):
            (flat, out_spec), new = forward(values_)
        tensors = {i: t for i, t in enumerate(flat) if isinstance(t, torch.Tensor)}
        found.update(flat=flat, out_spec=out_spec, tensors=tensors)
        scalars = [i for i, t in tensors.items() if t.requires_grad and t.ndim == 0]
        asked = [i for i, t in tensors.items() if t.requires_grad]
        if tangents == "loss" and scalars:
            asked = scalars[:1]
        found.update(asked=asked, has_loss=tangents == "loss" and bool(scalars))
        wrt = [values_[list(parameters).index(name)] for name in trained]
        grads: tuple[Any, ...] = ()
        if wrt and asked:
            given = list(values[n : n + len(asked)])
            grads = torch.autograd.grad([tensors[i] for i in asked], wrt, given, allow_unused=True)
        found["grads"] = [name for name, g in zip(trained, grads, strict=False) if g is not None]
        return (*(t.detach() for t in tensors.values()), *new.values(), *(g for g in grads if g is not None))

    examples = [*parameters.values(), *buffers.values(), *tensor_leaves]
    examples = [torch.zeros(e.shape, dtype=e.dtype) for e in examples]
    with torch.no_grad():
        (flat, _), _ = forward(examples)
    outputs = [t for t in flat if isinstance(t, torch.Tensor)]
    examples += [torch.zeros_like(t) for t in outputs] if backward else []
    table = {aten.detach.default: lambda x: x}
    gm = make_fx(step, tracing_mode="fake", decomposition_table=table)(*examples)
    gm = make_fx(torch.func.functionalize(gm), tracing_mode="fake")(*examples)
    asked = found["asked"] if backward else []
    surplus = len(outputs) - len(asked) if backward else 0
    for node in list(gm.graph.find_nodes(op="placeholder"))[len(examples) - surplus :] if surplus else []:
        gm.graph.erase_node(node)

    names = [f"output.{i}" for i in found["tensors"]]
    flat_tensors = dict(zip(found["tensors"], outputs, strict=True))
    inputs = [Input("parameter", n, p.requires_grad) for n, p in parameters.items()]
    inputs += [Input("buffer", n) for n in buffers]
    inputs += [Input("input", f"input.{i}", batch_dim=0) for i, t in enumerate(leaves) if isinstance(t, torch.Tensor)]
    inputs += [Input("tangent", f"output.{i}", batch_dim=0 if flat_tensors[i].ndim else None) for i in asked]
    results = [
        Output("output", name, i in asked or (backward and t.is_floating_point()), 0 if t.ndim else None)
        for name, (i, t) in zip(names, flat_tensors.items(), strict=True)
    ]
    results += [Output("buffer", n) for n in buffers]
    results += [Output("gradient", n) for n in found["grads"]]

    # --- FSDP ---------------------------------------------------------------------------------------------------------
    graph = gm.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    whole = (None,) * len(axes)
    storages: dict[str, Storage] = {}

    def call(target: Any, *call_args: Any, phase: str) -> fx.Node:
        node = graph.call_function(target, call_args)
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), mode:
            node.meta["val"] = target(*fx.map_arg(call_args, lambda n: n.meta["val"]))
        node.meta["phase"] = phase
        return node

    mode = placeholders[0].meta["val"].fake_mode
    tangent_nodes = {p for p, i in zip(placeholders, inputs, strict=True) if i.kind == "tangent"}
    behind = set(tangent_nodes)
    for node in graph.nodes:
        if node.op == "call_function":
            late = any(o in behind for o in node.all_input_nodes)
            if late:
                behind.add(node)
            node.meta["phase"] = "backward" if late else "forward"

    for node, entry in zip(placeholders, inputs, strict=True):
        value = node.meta["val"]
        if entry.kind != "parameter":
            full = list(value.shape)
            if entry.batch_dim is not None:
                full[0] *= ranks
            split = whole if entry.batch_dim is None else (DimShard(0),) * len(axes)
            storages[entry.kind + entry.name] = Storage(tuple(full), split)
            continue
        storage = Storage(tuple(value.shape), whole, tuple(range(len(axes))) if ranks > 1 else ())
        storages["parameter" + entry.name] = storage
        if ranks == 1:
            continue
        rows, padded = stored_rows(storage, sizes), storage.padded_shape(sizes)[0]
        users = list(node.users)
        with mode:
            node.meta["val"] = torch.empty(storage.padded_shape(sizes))
        for phase in ("forward", "backward"):
            mine = [u for u in users if u.meta.get("phase") == phase]
            if not mine:
                continue
            first = min(mine, key=list(graph.nodes).index)
            with graph.inserting_before(first):
                got = call(gather, node, ranks, group, phase=phase)
                got = call(wait, got, phase=phase)
                parts = [
                    call(aten.slice.Tensor, got, 0, i * padded, i * padded + n, phase=phase) for i, n in enumerate(rows)
                ]
                got = call(aten.cat.default, parts, phase=phase)
            for user in mine:
                user.replace_input_with(node, got)

    output = graph.output_node()
    final: list[Any] = []
    for node, result in zip(output.args[0], results, strict=True):
        with graph.inserting_before(output):
            if ranks == 1:
                pass
            elif result.kind == "gradient":
                storage = storages["parameter" + result.name]
                rows, padded = stored_rows(storage, sizes), storage.padded_shape(sizes)[0]
                starts = [sum(rows[:i]) for i in range(len(rows))]
                parts = []
                for start, n in zip(starts, rows, strict=True):
                    part = call(aten.slice.Tensor, node, 0, start, start + n, phase="backward")
                    pad = [0, 0] * (part.meta["val"].ndim - 1) + [0, padded - n]
                    parts.append(call(aten.constant_pad_nd.default, part, pad, phase="backward"))
                node = call(aten.cat.default, parts, phase="backward")
                node = call(aten.div.Tensor, node, ranks, phase="backward")
                node = call(wait, call(scatter, node, "sum", ranks, group, phase="backward"), phase="backward")
            elif result.kind == "output" and result.batch_dim is None:
                node = call(aten.div.Tensor, node, ranks, phase="forward")
                node = call(wait, call(reduce, node, "sum", group, phase="forward"), phase="forward")
        final.append(node)
    output.args = (tuple(final),)
    graph.lint()
    gm.recompile()

    program = Program(
        graph=gm,
        inputs=tuple(inputs),
        outputs=tuple(results),
        out_spec=found["out_spec"],
        out_constants={i: leaf for i, leaf in enumerate(found["flat"]) if not isinstance(leaf, torch.Tensor)},
        aliases=aliases,
        has_loss=found["has_loss"],
        fingerprint="by hand",
    )
    return LocalProgram(
        graph=gm,
        inputs=tuple(LocalInput(i.kind, i.name, storages[i.kind + i.name]) for i in inputs),
        outputs=tuple(
            LocalOutput(r.kind, r.name, _output_storage(r, storages, flat_tensors, names, axes)) for r in results
        ),
        axes=axes,
        program=program,
    )


def _output_storage(
    result: Output, storages: dict[str, Storage], tensors: dict[int, torch.Tensor], names: list[str],
    axes: tuple[tuple[str, int], ...],
) -> Storage:  # fmt: skip
    if result.kind == "gradient":
        return storages["parameter" + result.name]
    if result.kind == "buffer":
        return storages["buffer" + result.name]
    shape = list(dict(zip(names, tensors.values(), strict=True))[result.name].shape)
    if result.batch_dim is None:
        return Storage(tuple(shape), (None,) * len(axes))
    shape[0] *= math.prod(size for _, size in axes)
    return Storage(tuple(shape), tuple(DimShard(0) for _ in axes))
