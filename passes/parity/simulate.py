"""Every rank of a mesh played in one process, without a process group.

The local graph is run node by node for all ranks in lockstep; a collective is plain arithmetic on the values of the
ranks of its group. Ranks whose operands of an op are the same tensor objects share its result, so replicated work is
done once; values are dropped after their last use.

    simulate       per-rank inputs -> per-rank outputs
    simulate_step  full tensors -> scatter -> simulate -> gather, replicas compared -> full tensors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from passes.parity.scattered import Axes, SimulationError, coordinates, gather, groups, scatter
from passes.program.local import COLLECTIVES, TOGETHER, WAIT, LocalInput, LocalProgram
from passes.program.walks import results_of

c10d = torch.ops._c10d_functional


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


_PLAYED: dict[Any, Callable[[Sequence[Tensor], Sequence[Any]], list[Tensor]]] = {
    c10d.all_gather_into_tensor.default: _all_gather,
    c10d.reduce_scatter_tensor.default: _reduce_scatter,
    c10d.all_reduce.default: _all_reduce,
    c10d.all_to_all_single.default: _all_to_all,
}
_groups = cache(groups)
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
    """The op as a function of its operands' values; None for a collective."""
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
    with torch.no_grad():
        for step in _instructions(local.graph, slots):
            _play(step, values, local.axes)
            if observe is not None:
                observe(step.node, [mine[step.slot] for mine in values])
            for mine in values:
                for slot in step.frees:
                    mine[slot] = None
    returned = results_of(local.graph.graph)
    return [list(fx.map_arg(returned, lambda n, mine=mine: mine[slots[n]])) for mine in values]  # type: ignore[misc]


def _play(step: _Instruction, values: list[list[Any]], axes: Axes) -> None:
    """Run one node on every rank: `values[rank][slot]`."""
    try:
        if step.call is not None:
            _run(step, step.call, values)
        else:
            _collect(step, values, axes)
        if step.shape is not None:
            _check_shape(step, values)
    except SimulationError:
        raise
    except Exception as error:
        raise SimulationError(f"{_place(step.node)}: {type(error).__name__}: {error}") from error


def _run(step: _Instruction, call: Callable[[list[Any]], Any], values: list[list[Any]]) -> None:
    """Run an op once per distinct tuple of operands."""
    done: dict[tuple[int, ...], Any] = {}
    for mine in values:
        operands = [mine[slot] for slot in step.operands]
        key = tuple(map(id, operands))
        if key not in done:
            done[key] = call(operands)
        mine[step.slot] = done[key]


def _collect(step: _Instruction, values: list[list[Any]], axes: Axes) -> None:
    name: Any = step.node.args[-1]
    play = _PLAYED[step.node.target]
    together = isinstance(step.node.args[0], list | tuple)
    for group in _groups(tuple(axes), name):
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
        if node.target in COLLECTIVES:
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
    if target is WAIT:
        operands.append(slots[node.all_input_nodes[0]])
        return lambda given: given[0]
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
    for node, described in local.placeholders.items():
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
