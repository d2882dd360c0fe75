"""Which moves of stored state go together: one collective for a layer's parameters, one for its gradients.

The items of a plan are reordered so that what goes together stands together. A layer's gathers stand where its first
stood. What happens to its gradients once they are computed (their moves, and ops on one gradient alone) stands behind
the layer's last other op. What lies between layers is a layer of its own; where no layer repeats, each module is.

A bucket is one collective over several tensors, which keep their own memory: nothing is packed.

Small partial sums that are needed at once (a loss's sum and its count) are added up as one, too. These are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import TypeVar

from torch import fx

from costmodel.reshard import Step
from passes.analysis.dims import is_getitem, outputs_of
from passes.analysis.layers import layer_pattern
from passes.analysis.moves import Move, Run
from passes.program.program import Program

TOGETHER = ("state_gather", "state_scatter", "all_reduce", "state_slice", "state_pad", "state_cut", "cast")
"""Steps that a bucket can do for all its tensors at once (the last four are local)."""

_SMALL_BYTES = 1 << 16
"""Of a sum that takes its latency to add up, whatever its size."""

T = TypeVar("T")


def bucketed(program: Program, items: Sequence[Run | Move], gradients: Gradients) -> list[Run | Move]:
    """`items` reordered, so that moves which go together are adjacent and have the same `bucket` number."""
    labels = layer_labels(program, items)
    gathers, late, last = _by_layer(items, labels, gradients)
    before = {indices[0]: indices for indices in gathers.values()}
    behind: dict[int, list[int]] = {}
    for label, indices in late.items():
        behind.setdefault(last.get(label, indices[-1]), []).extend(indices)
    moved = {index for indices in (*gathers.values(), *late.values()) for index in indices}
    sums = _small_sums(items, moved)
    moved |= {index for first, moves in sums.items() for index in range(first, first + len(moves))}
    numbers = count()
    found: list[Run | Move] = []
    for index, item in enumerate(items):
        if index in before:
            found += _numbered([items[i] for i in before[index]], numbers)
        if index in sums:
            number = next(numbers)
            found += [replace(move, bucket=number, packed=True) for move in sums[index]]
        if index not in moved:
            found.append(item)
        if index in behind:
            for level in _levels([items[i] for i in behind[index]]):
                found += _numbered(level, numbers)
    return found


Indices = dict[object, list[int]]


def _by_layer(
    items: Sequence[Run | Move], labels: Sequence[object], gradients: Gradients
) -> tuple[Indices, Indices, dict[object, int]]:
    """Per layer: its gathers, what is done to its finished gradients, and the last of its other items."""
    gathers: Indices = {}
    late: Indices = {}
    last: dict[object, int] = {}
    home: dict[fx.Node, object] = {}
    """Of a value, the layer that computed it."""
    for index, (item, label) in enumerate(zip(items, labels, strict=True)):
        if isinstance(item, Move) and _is_gather(item):
            gathers.setdefault(label, []).append(index)
        elif gradients.is_late(item):
            at = _home(item, home, label)
            home[item.node if isinstance(item, Run) else item.value] = at
            late.setdefault(at, []).append(index)
        else:
            last[label] = index
            if isinstance(item, Run):
                home[item.node] = label
    return gathers, late, last


def layer_labels(program: Program, items: Sequence[Run | Move]) -> list[object]:
    """Per item, the layer it belongs to: (phase, layer), or what it lies in between layers.

    What no module is named for belongs to the layer around it; backward never to the layer that forward ended with.
    """
    pattern = layer_pattern(program)
    found: list[object] = []
    between, last_phase = 0, ""
    label: object = None
    for item in items:
        node = item.node if isinstance(item, Run) else item.reader or item.value
        name = node.meta.get("module", "")
        phase = item.phase
        if layer := pattern.layer(name):
            between += 1
            label = (phase, layer)
        elif not pattern.layers:
            label = (phase, name)
        elif name or phase != last_phase:
            label = (phase, between)
        last_phase = phase
        found.append(label)
    return found


def _home(item: Run | Move, home: Mapping[fx.Node, object], label: object) -> object:
    """The layer that computed what an item works on; `label` where none did."""
    node = _read(item)
    while is_getitem(node):
        node = node.all_input_nodes[0]
    return home.get(node, label)


def _read(item: Run | Move) -> fx.Node:
    """What an item works on that works on one value."""
    return item.node.all_input_nodes[0] if isinstance(item, Run) else item.value


def _is_gather(move: Move) -> bool:
    return move.reader is not None and sends_one_gather(move.steps)


def _small_sums(items: Sequence[Run | Move], moved: Container[int]) -> dict[int, list[Move]]:
    """Moves that follow one another and add up small partial sums alike, by where the first stands."""
    found: dict[int, list[Move]] = {}
    first, last = 0, None
    for index, item in enumerate(items):
        kind = None
        if isinstance(item, Move) and index not in moved and (kind := _small_sum(item)) is not None:
            first = first if kind == last else index
            found.setdefault(first, []).append(item)
        last = kind
    return {first: moves for first, moves in found.items() if len(moves) > 1}


def _small_sum(move: Move) -> tuple[object, ...] | None:
    """What small partial sums agree in that can be added up as one; None: it is no such sum."""
    if len(move.steps) != 1:
        return None
    (step,) = move.steps
    if step.kind != "all_reduce" or not step.is_collective or step.full_bytes > _SMALL_BYTES:
        return None
    return move.phase, step.axes, step.op, move.value.meta["val"].dtype


def sends_one_gather(path: Sequence[Step]) -> bool:
    """Whether steps from a stored parameter can share a collective with others of its layer: a gather is all they
    send."""
    return [step.kind for step in path if step.is_collective] == ["state_gather"]


class Gradients:
    """Finds values that lead to one parameter's gradient and to nothing else; results are cached."""

    def __init__(self, program: Program) -> None:
        self.names = {
            node: given.name
            for out, node, _, given in outputs_of(program)
            if out.kind == "gradient" and node is not None and given is not None and given.kind == "parameter"
        }
        self._found: dict[fx.Node, fx.Node | None] = {}

    def of(self, node: fx.Node) -> fx.Node | None:
        """The parameter whose gradient a value leads to, through ops on it alone; None where it leads to anything
        else."""
        if node not in self._found:
            found: fx.Node | None = None
            if node in self.names:
                found = node if all(user.op == "output" for user in node.users) else None
            elif len(node.users) == 1:
                (user,) = node.users
                if len(user.all_input_nodes) == 1 and not is_getitem(user):
                    found = self.of(user)
            self._found[node] = found
        return self._found[node]

    def is_late(self, item: Run | Move) -> bool:
        """Whether an item works only on finished gradients."""
        if isinstance(item, Move):
            return (item.stores or item.reader is not None) and self.of(item.value) is not None
        return any(self.of(operand) is not None for operand in item.node.all_input_nodes)  # then it has no other


def _levels(items: Sequence[Run | Move]) -> Iterable[list[Run | Move]]:
    """Items in few groups, ops and moves in turn: a move waits for all ops that need no move, to go with the others."""
    made: dict[fx.Node, int] = {}
    levels: dict[int, list[Run | Move]] = {}
    for item in items:
        is_run = isinstance(item, Run)
        level = made.get(_read(item), 0)
        level += level % 2 if is_run else 1 + level % 2  # ops on even levels, moves on odd ones
        made[item.node if isinstance(item, Run) else item.value] = level
        levels.setdefault(level, []).append(item)
    return [levels[level] for level in sorted(levels)]


def _numbered(items: Sequence[Run | Move], numbers: Iterable[int]) -> list[Run | Move]:
    """Items that do not read one another: those that go together side by side."""
    fresh: Callable[[], int] = iter(numbers).__next__
    groups: dict[object, list[Move]] = {}
    rest: list[Run | Move] = []
    for item in items:
        if isinstance(item, Move) and item.steps and all(step.kind in TOGETHER for step in item.steps):
            kind = tuple((step.kind, step.axes, step.op, step.dtype) for step in item.steps)
            groups.setdefault((kind, item.value.meta["val"].dtype), []).append(item)
        else:
            rest.append(item)
    found: list[Run | Move] = []
    for members in groups.values():
        number = fresh()
        found += [replace(member, bucket=number) for member in members]
    return found + rest
