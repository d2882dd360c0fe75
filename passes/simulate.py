"""Every rank of a mesh played in one process, without a process group.

The local graph is run node by node for all ranks in lockstep; a collective is plain arithmetic on the values of the
ranks of its group. Ranks whose operands of an op are the same tensor objects share its result, so replicated work is
done once; values are dropped after their last use.

    simulate       per-rank inputs -> per-rank outputs
    simulate_step  full tensors -> scatter -> simulate -> gather, replicas compared -> full tensors
    ledger         the collectives that the graph issues

A rank is its row-major coordinate on the mesh. The ranks of a group "dp,tp" differ only in these axes' coordinates and
are ordered by them, the first slowest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from passes.errors import AutoparError
from passes.local import COLLECTIVES, TOGETHER, WAIT, LocalInput, LocalProgram, Storage
from passes.walks import results_of

c10d = torch.ops._c10d_functional
Axes = Sequence[tuple[str, int]]


class SimulationError(AutoparError):
    """The local program does not do what its description says; the message names the node."""


class ReplicaMismatchError(SimulationError):
    """Ranks that should hold the same values do not."""


# ------------------------------------------------------------------------------------------------- ranks of a mesh
def coordinates(axes: Axes) -> list[tuple[int, ...]]:
    """Each rank's coordinate per axis."""
    return list(itertools.product(*(range(size) for _, size in axes)))


def groups(axes: Axes, group: str) -> list[list[int]]:
    """The ranks of every group that the axes in `group` ("tp", "dp,tp") form, each in the order of its members."""
    names = [name for name, _ in axes]
    chosen = group.split(",")
    unknown = [name for name in chosen if name not in names]
    if unknown or len(set(chosen)) < len(chosen) or chosen != [name for name in names if name in chosen]:
        raise ValueError(f"group {group!r}: a group is named by axes of the mesh ({', '.join(names)}), in that order")
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, coordinate in enumerate(coordinates(axes)):
        fixed = tuple(c for name, c in zip(names, coordinate, strict=True) if name not in chosen)
        found.setdefault(fixed, []).append(rank)
    return list(found.values())


# --------------------------------------------------------------------------------------------- full tensors and parts
def held(storage: Storage, axes: Axes, coordinate: Sequence[int]) -> tuple[Tensor | None, ...]:
    """Per dim, the global indices that the rank at `coordinate` holds (unpadded); None for a dim it holds whole."""
    sizes = [size for _, size in axes]
    indices: list[Tensor | None] = [None] * len(storage.shape)

    def of(dim: int) -> Tensor:
        known = indices[dim]
        return torch.arange(storage.shape[dim]) if known is None else known

    for shard, size, position in zip(storage.shards, sizes, coordinate, strict=True):
        if shard is None or size == 1:
            continue
        rows = of(shard.dim)
        if shard.stride == 1:
            indices[shard.dim] = _chunk(rows, size, position)
            continue
        if len(rows) % (shard.stride * size):
            raise ValueError(
                f"dim {shard.dim} of {storage}: {len(rows)} rows do not divide over {shard.stride} x {size}"
            )
        indices[shard.dim] = rows.view(shard.stride, size, -1)[:, position].flatten()
    for axis in storage.state_axes:
        if sizes[axis] > 1:
            indices[storage.state_dim] = _chunk(of(storage.state_dim), sizes[axis], coordinate[axis])
    return tuple(indices)


def _chunk(rows: Tensor, ranks: int, position: int) -> Tensor:
    chunk = -(-len(rows) // ranks)
    return rows[position * chunk : (position + 1) * chunk]


def scatter(full: Tensor, storage: Storage, axes: Axes) -> list[Tensor]:
    """Each rank's part of `full`, contiguous, zero-padded as the graph takes it; replicas are one object."""
    if tuple(full.shape) != storage.shape:
        raise ValueError(f"a tensor of shape {tuple(full.shape)} was given for {storage}")
    padded = storage.padded_shape([size for _, size in axes])
    parts: dict[tuple[int, ...], Tensor] = {}
    result = []
    for coordinate in coordinates(axes):
        key = _position(storage, coordinate)
        if key not in parts:
            part = full
            for dim, rows in enumerate(held(storage, axes, coordinate)):
                part = part if rows is None else part.index_select(dim, rows.to(full.device))
            if tuple(part.shape) != padded:
                sizes = zip(reversed(padded), reversed(part.shape), strict=True)
                missing = [n for whole, mine in sizes for n in (0, whole - mine)]
                part = torch.nn.functional.pad(part, missing)
            parts[key] = part.contiguous()
        result.append(parts[key])
    return result


def gather(
    parts: Sequence[Tensor], storage: Storage, axes: Axes, name: str = "tensor", *, zeros: bool = True
) -> Tensor:
    """The full tensor of which every rank holds a part; `zeros`: what pads it has to be zero.

    Raises:
        ReplicaMismatchError: ranks that hold the same part differ in it.
        SimulationError: a part has another shape than `storage` says, or padding that is not zero.
    """
    sizes = [size for _, size in axes]
    padded = storage.padded_shape(sizes)
    full = parts[0].new_empty(storage.shape)
    first: dict[tuple[int, ...], int] = {}
    for rank, (coordinate, part) in enumerate(zip(coordinates(axes), parts, strict=True)):
        if tuple(part.shape) != padded:
            raise SimulationError(f"{name}: rank {rank} holds shape {tuple(part.shape)}, but {storage} gives {padded}")
        holder = first.setdefault(_position(storage, coordinate), rank)
        if holder != rank:
            _check_equal(name, holder, parts[holder], rank, part, axes)
            continue
        indices = held(storage, axes, coordinate)
        for dim, index in enumerate(indices):
            rows = padded[dim] if index is None else len(index)
            if zeros and part.narrow(dim, rows, padded[dim] - rows).count_nonzero():
                raise SimulationError(
                    f"{name}: rank {rank} holds {rows} entries along dim {dim}, but its padding is not zero"
                )
            part = part.narrow(dim, 0, rows)
        if all(index is None for index in indices):
            full.copy_(part)
        else:
            full[_grid(indices, full)] = part
    return full


def _position(storage: Storage, coordinate: Sequence[int]) -> tuple[int, ...]:
    """What of a rank's coordinate decides which part it holds."""
    return tuple(
        c if storage.shards[axis] is not None or axis in storage.state_axes else 0 for axis, c in enumerate(coordinate)
    )


def _grid(indices: Sequence[Tensor | None], full: Tensor) -> tuple[Tensor, ...]:
    """Indices of a block: one per dim, shaped to broadcast against one another."""
    rank = len(indices)
    every = [torch.arange(n) if index is None else index for index, n in zip(indices, full.shape, strict=True)]
    return tuple(
        index.to(full.device).view([-1 if d == dim else 1 for d in range(rank)]) for dim, index in enumerate(every)
    )


def _check_equal(name: str, one: int, a: Tensor, other: int, b: Tensor, axes: Axes) -> None:
    """Replicas are computed by the same ops on the same values; only vectorised loops may round them apart."""
    if a is b or torch.equal(a, b):
        return
    if a.dtype.is_floating_point:
        eps = torch.finfo(a.dtype).eps
        if torch.allclose(a, b, rtol=64 * eps, atol=64 * eps * float(a.abs().max().nan_to_num()), equal_nan=True):
            return
    where = coordinates(axes)
    differ = ~((a == b) | ((a != a) & (b != b)))
    place = tuple(int(i) for i in differ.nonzero()[0])
    raise ReplicaMismatchError(
        f"{name}: ranks {one} and {other} (coordinates {where[one]} and {where[other]} on "
        f"{', '.join(axis for axis, _ in axes)}) hold replicas, but {int(differ.sum())} of {a.numel()} elements "
        f"differ; the first at {list(place)}: {a[place].item()} and {b[place].item()}"
    )


# --------------------------------------------------------------------------------------------------------- collectives
def _reduced(values: Sequence[Tensor], op: str) -> Tensor:
    stacked = torch.stack(list(values))
    match op:
        case "sum":
            return stacked.sum(0, dtype=stacked.dtype)
        case "avg":
            return stacked.sum(0, dtype=stacked.dtype) / len(values)
        case "max":
            return stacked.amax(0)
        case "min":
            return stacked.amin(0)
        case _:
            raise ValueError(f"reduce op {op!r}; known are sum, avg, max, min")


def _check_size(kind: str, said: int, ranks: int) -> None:
    if said != ranks:
        raise ValueError(f"{kind} says its group has {said} ranks, but it has {ranks}")


def _all_gather(values: Sequence[Tensor], args: Sequence[Any]) -> list[Tensor]:
    _check_size("all_gather", args[0], len(values))
    return [torch.cat(list(values))] * len(values)


def _reduce_scatter(values: Sequence[Tensor], args: Sequence[Any]) -> list[Tensor]:
    op, size = args[:2]
    _check_size("reduce_scatter", size, len(values))
    if values[0].shape[0] % size:
        raise ValueError(f"reduce_scatter of {values[0].shape[0]} rows over {size} ranks")
    return [part.contiguous() for part in _reduced(values, op).chunk(size)]


def _all_reduce(values: Sequence[Tensor], args: Sequence[Any]) -> list[Tensor]:
    return [_reduced(values, args[0])] * len(values)


def _all_to_all(values: Sequence[Tensor], args: Sequence[Any]) -> list[Tensor]:
    output_sizes, input_sizes = args[:2]
    ranks = len(values)
    pieces = [value.split(list(input_sizes) or value.shape[0] // ranks) for value in values]
    if any(len(parts) != ranks for parts in pieces):
        raise ValueError(f"all_to_all splits into {[len(parts) for parts in pieces]} pieces for {ranks} ranks")
    results = []
    for rank in range(ranks):
        mine = [parts[rank] for parts in pieces]
        expected = list(output_sizes) or [values[rank].shape[0] // ranks] * ranks
        if [part.shape[0] for part in mine] != expected:
            raise ValueError(f"all_to_all: rows {[part.shape[0] for part in mine]} arrive, but {expected} are expected")
        results.append(torch.cat(mine))
    return results


_PLAYED: dict[Any, tuple[str, Callable[[Sequence[Tensor], Sequence[Any]], list[Tensor]]]] = {
    c10d.all_gather_into_tensor.default: ("all_gather", _all_gather),
    c10d.reduce_scatter_tensor.default: ("reduce_scatter", _reduce_scatter),
    c10d.all_reduce.default: ("all_reduce", _all_reduce),
    c10d.all_to_all_single.default: ("all_to_all", _all_to_all),
}
_PLAYED |= {together: _PLAYED[single] for single, together in TOGETHER.items()}


# ---------------------------------------------------------------------------------------------------------- simulate
@dataclass(frozen=True, slots=True)
class _Instruction:
    """One node, worked out before any rank runs it. Values live in numbered slots."""

    node: fx.Node
    slot: int
    operands: tuple[int, ...]
    """Slots read, in order of appearance."""
    call: Callable[[list[Any]], Any] | None
    """The op as a function of its operands' values; None for a collective or wait."""
    shape: tuple[int, ...] | None
    """What the metadata promises; None where it promises nothing."""
    frees: tuple[int, ...]


def simulate(
    local: LocalProgram, inputs: Sequence[Sequence[Any]], observe: Callable[[fx.Node, list[Any]], None] | None = None
) -> list[list[Any]]:
    """What each rank's program returns; `inputs[rank]` has a value per placeholder.

    `observe` is called after each node with its value on every rank, in the graph's order.

    Raises:
        SimulationError: an op fails or yields another shape than its metadata promises; names node and source line.
    """
    ranks = math.prod(size for _, size in local.axes)
    placeholders = list(local.graph.graph.find_nodes(op="placeholder"))
    if len(inputs) != ranks or any(len(values) != len(placeholders) for values in inputs):
        given = [len(values) for values in inputs]
        raise ValueError(f"{ranks} ranks take {len(placeholders)} inputs each; given: {given}")
    slots = {node: i for i, node in enumerate(local.graph.graph.nodes)}
    values: list[list[Any]] = [[None] * len(slots) for _ in range(ranks)]
    for mine, own in zip(values, inputs, strict=True):
        for node, value in zip(placeholders, own, strict=True):
            mine[slots[node]] = value
    members: dict[str, list[list[int]]] = {}
    with torch.no_grad():
        for step in _instructions(local.graph, slots):
            try:
                if step.call is not None:
                    _run(step, values)
                elif step.node.target == WAIT:
                    for mine in values:
                        mine[step.slot] = mine[step.operands[0]]
                else:
                    group = step.node.args[-1]
                    if group not in members:
                        members[group] = groups(local.axes, group)  # type: ignore[arg-type, index]
                    _collect(step, values, members[group])  # type: ignore[index]
                if step.shape is not None:
                    _check_shape(step, values)
            except SimulationError:
                raise
            except Exception as error:
                raise SimulationError(f"{_place(step.node)}: {type(error).__name__}: {error}") from error
            if observe is not None:
                observe(step.node, [mine[step.slot] for mine in values])
            for mine in values:
                for slot in step.frees:
                    mine[slot] = None
    returned = results_of(local.graph.graph)
    return [list(fx.map_arg(returned, lambda n, mine=mine: mine[slots[n]])) for mine in values]  # type: ignore[misc]


def _run(step: _Instruction, values: list[list[Any]]) -> None:
    """Run an op once per distinct tuple of operands."""
    assert step.call is not None
    done: dict[tuple[int, ...], Any] = {}
    for mine in values:
        operands = [mine[slot] for slot in step.operands]
        key = tuple(map(id, operands))
        if key not in done:
            done[key] = step.call(operands)
        mine[step.slot] = done[key]


def _collect(step: _Instruction, values: list[list[Any]], members: list[list[int]]) -> None:
    play = _PLAYED[step.node.target][1]
    together = isinstance(step.node.args[0], list | tuple)
    for group in members:
        found: list[list[Tensor]] = [[] for _ in group]
        for slot in step.operands:
            operands = [values[rank][slot] for rank in group]
            facts = {(tuple(value.shape[1:]), value.dtype) for value in operands}
            if len(facts) > 1:
                raise ValueError(f"ranks {group} bring {facts}")
            for mine, value in zip(found, play(operands, step.node.args[1:]), strict=True):
                mine.append(value)
        for rank, mine in zip(group, found, strict=True):
            values[rank][step.slot] = mine if together else mine[0]


def _check_shape(step: _Instruction, values: list[list[Any]]) -> None:
    for rank, mine in enumerate(values):
        value = mine[step.slot]
        if value.shape != step.shape or value.dtype != step.node.meta["val"].dtype:
            expected = step.node.meta["val"]
            raise SimulationError(
                f"{_place(step.node)}: rank {rank} has {tuple(value.shape)} {value.dtype}, "
                f"but the metadata says {tuple(expected.shape)} {expected.dtype}"
            )


def _instructions(module: fx.GraphModule, slots: Mapping[fx.Node, int]) -> Iterator[_Instruction]:
    nodes = list(module.graph.nodes)
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            last[operand] = node
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        frees = tuple(slots[operand] for operand in node.all_input_nodes if last[operand] is node)
        if node not in last:
            frees = (*frees, slots[node])
        val = node.meta.get("val")
        shape = tuple(val.shape) if isinstance(val, Tensor) else None
        if node.target in COLLECTIVES or node.target == WAIT:
            sent: Any = node.args[0]  # a tensor, or those that go together, where one may be sent twice
            read = tuple(slots[x] for x in (sent if isinstance(sent, list | tuple) else [sent]))
            yield _Instruction(node, slots[node], read, None, shape, frees)
            continue
        operands: list[int] = []
        call = _compiled(module, node, slots, operands)
        yield _Instruction(node, slots[node], tuple(operands), call, shape, frees)


def _compiled(
    module: fx.GraphModule, node: fx.Node, slots: Mapping[fx.Node, int], operands: list[int]
) -> Callable[[list[Any]], Any]:
    """`node` as a function of its operands' values; appends the operands' slots."""
    target: Any = node.target
    if node.op == "get_attr":
        constant = attrgetter(target)(module)
        return lambda _: constant
    if node.op != "call_function":
        raise SimulationError(f"{_place(node)}: a node of kind {node.op}; a local graph has functions only")
    schema = getattr(target, "_schema", None)
    if getattr(target, "namespace", "") == "_c10d_functional":
        raise SimulationError(f"{_place(node)}: collective {target} is none of {', '.join(map(str, COLLECTIVES))}")
    if schema is not None and schema.is_mutable:
        raise SimulationError(f"{_place(node)}: {target} writes to its operands; a local graph is functional")
    if not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args):
        operands.extend(slots[arg] for arg in node.args)  # type: ignore[index]
        return lambda given: target(*given)
    args = _template(node.args, slots, operands)
    kwargs = {name: _template(arg, slots, operands) for name, arg in node.kwargs.items()}
    return lambda given: target(*args(given), **{name: arg(given) for name, arg in kwargs.items()})


def _template(arg: Any, slots: Mapping[fx.Node, int], operands: list[int]) -> Callable[[list[Any]], Any]:
    """`arg` as a function of the operands' values."""
    if isinstance(arg, fx.Node):
        position = len(operands)
        operands.append(slots[arg])
        return lambda given: given[position]
    if isinstance(arg, list | tuple) and any(isinstance(item, fx.Node | list | tuple) for item in arg):
        items = [_template(item, slots, operands) for item in arg]
        kind = tuple if isinstance(arg, tuple) else list
        return lambda given: kind([item(given) for item in items])
    return lambda _: arg


def _place(node: fx.Node) -> str:
    source = node.meta.get("source")
    return f"{node.name} ({source})" if source else node.name


# ------------------------------------------------------------------------------------------------------ a whole step
@dataclass(frozen=True)
class StepValues:
    """Full tensors that a step gives, by name. `outputs` keeps the order in which the model returned them."""

    outputs: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]


def simulate_step(
    local: LocalProgram,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None = None,
    inputs: Sequence[Tensor] = (),
    tangents: Sequence[Tensor] | None = None,
    seed: tuple[int, int] = (0, 0),
) -> StepValues:
    """One step of all ranks on full tensors; comparable with the unmodified model given the whole batch.

    `inputs` and `tangents` are global, in the order of the program's "input" and "tangent" Inputs. A gradient is that
    of sum(output * tangent) over the outputs that have one. Without `tangents`, those of scalars are 1. `seed` is the
    user's seed and the step's number.

    The graph averages over the ranks that split the batch (`LocalInput`), so a tangent with a batch dim reaches each
    rank multiplied by their number, as autograd would give it for a loss that is the mean over the rank's own part.

    Raises:
        ReplicaMismatchError: ranks disagree about an output; names it, its node and the ranks.
    """
    per_rank = local_inputs(local, parameters, buffers or {}, inputs, tangents, seed)
    results = simulate(local, per_rank)
    output = local.graph.graph.output_node()
    found = StepValues({}, {}, {})
    kinds = {"output": found.outputs, "buffer": found.buffers, "gradient": found.gradients}
    for position, described in enumerate(local.outputs):
        node = output.args[0][position]  # type: ignore[index]
        name = f"{described.kind} {described.name} (node {_place(node) if isinstance(node, fx.Node) else node})"
        parts = [mine[position] for mine in results]
        zeros = described.kind != "output"
        kinds[described.kind][described.name] = gather(parts, described.storage, local.axes, name, zeros=zeros)
    return found


def local_inputs(
    local: LocalProgram,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor] | None,
    seed: tuple[int, int],
) -> list[list[Tensor]]:
    """What `simulate` takes for these full tensors: per rank, a value per placeholder."""
    for kind, given in (("input", inputs), ("tangent", tangents)):
        wanted = sum(one.kind == kind for one in local.inputs)
        if given is not None and len(given) != wanted:
            raise ValueError(f"the program has {wanted} {kind}s, {len(given)} were given")
    left_inputs, left_tangents = iter(inputs), iter(tangents or ())
    batch_dims = {(one.kind, one.name): one.batch_dim for one in local.program.inputs}
    where = coordinates(local.axes)
    columns: list[list[Tensor]] = []
    nodes = local.graph.graph.find_nodes(op="placeholder")
    for described, node in zip(local.inputs, nodes, strict=True):
        device = node.meta["val"].device
        match described.kind:
            case "parameter" | "buffer":
                known = parameters if described.kind == "parameter" else buffers
                if described.name not in known:
                    raise ValueError(f"{described.kind} {described.name} was not given; given are {', '.join(known)}")
                full = known[described.name].detach()
            case "input":
                full = next(left_inputs)
            case "tangent":
                full = _one(described, node) if tangents is None else next(left_tangents)
                full = full * _batch_ranks(local, described, batch_dims.get(("tangent", described.name)))
            case "seed":
                columns.append([torch.tensor(seed, dtype=torch.int64, device=device)] * len(where))
                continue
            case "coordinate":
                axis = [name for name, _ in local.axes].index(described.name)
                each = [torch.tensor(position, device=device) for position in range(local.axes[axis][1])]
                columns.append([each[coordinate[axis]] for coordinate in where])
                continue
        columns.append(scatter(full, described.storage, local.axes))
    return [list(mine) for mine in zip(*columns, strict=True)] if columns else [[] for _ in where]


def _one(tangent: LocalInput, node: fx.Node) -> Tensor:
    if tangent.storage.shape:
        raise ValueError(f"tangent {tangent.name} has shape {tangent.storage.shape}; only that of a scalar is known")
    return torch.ones((), dtype=node.meta["val"].dtype, device=node.meta["val"].device)


def _batch_ranks(local: LocalProgram, tangent: LocalInput, batch_dim: int | None) -> int:
    """Number of parts that the batch dim of a tangent is split into; 1 without a batch dim."""
    parts = 1
    if batch_dim is not None:
        for shard, (_, size) in zip(tangent.storage.shards, local.axes, strict=True):
            if shard is not None and shard.dim == batch_dim:
                parts *= size
    return parts


# -------------------------------------------------------------------------------------------------------------- ledger
@dataclass(frozen=True, slots=True)
class Issued:
    """A collective that the graph issues.

    `group` names the mesh axes ("dp,tp"). `tensors` go together as one. `full_bytes` is the size of the full buffers on
    one rank: what is gathered, what is reduced, the whole buffer of an all-to-all.
    """

    kind: str
    group: str
    full_bytes: int
    phase: str
    source: str
    module: str
    node: str
    op: str = ""
    """How it reduces, "" for one that does not."""
    tensors: int = 1


def ledger(local: LocalProgram) -> tuple[Issued, ...]:
    """The collectives in the order in which the graph issues them."""
    return tuple(
        _issued(node) for node in local.graph.graph.nodes if node.op == "call_function" and node.target in COLLECTIVES
    )


def _issued(node: fx.Node) -> Issued:
    kind = _PLAYED[node.target][0]
    given = [operand.meta["val"] for operand in node.all_input_nodes]
    made = node.meta["val"]
    full = (made if isinstance(made, list | tuple) else [made]) if kind == "all_gather" else given
    op = node.args[1] if kind in ("reduce_scatter", "all_reduce") else ""
    return Issued(
        kind=kind,
        group=str(node.args[-1]),
        full_bytes=sum(value.numel() * value.dtype.itemsize for value in full),
        phase=node.meta.get("phase", ""),
        source=node.meta.get("source", ""),
        module=node.meta.get("module", ""),
        node=node.name,
        op=str(op),
        tensors=node.meta.get("packed", len(given)),
    )
