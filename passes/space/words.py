"""Names that people use for what a plan is about: logical dims, ops, layers, and why a collective is there."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import torch
from torch import fx

from costmodel.layout import Layout, Partial, Shard
from costmodel.reshard import Step
from passes.analysis.dims import Leaf, Value, is_getitem, value_of
from passes.analysis.layers import layer_pattern
from passes.analysis.moves import Move
from passes.analysis.strategies import StoredOption
from passes.rules.call import op_text
from passes.rules.work import VIEWS
from passes.space.atom_names import atom_names, stored_atoms
from passes.space.space import Space

aten = torch.ops.aten
_WHOLE = r"(?:0|[1-9]\d*)"
_NUMBER = re.compile(rf"(?<![^.])({_WHOLE})(?![^.])")
_COMMA = re.compile(r"(?<!\\), ")
_RANGES = re.compile(rf"{_WHOLE}(-{_WHOLE})?(,{_WHOLE}(-{_WHOLE})?)*")


class Words:
    """The names of one space's dims, ops and tensors; computed once, then looked up."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._pattern = layer_pattern(space.program)
        self.layers = self._pattern.layers
        self._tensor_atoms = stored_atoms(space)
        self._atoms = atom_names(space, self._tensor_atoms)
        self._gradients = space.analysis.gradients
        self._given = {node: given.name for node, given in space.program.placeholders.items()}

    def pattern(self, name: str) -> str:
        """`model.layers.*.mlp` for `model.layers.3.mlp`."""
        return self._pattern(name)

    def instance(self, module: str) -> str:
        """The repeated layer that a module is part of (`model.layers.3`); the module itself where there is none."""
        return self._pattern.instance(module)

    def layer(self, module: str) -> str:
        """The repeated layer that a module is part of; "" where there is none."""
        return self._pattern.layer(module)

    def dims(self, value: Value) -> tuple[str, ...]:
        """A word per expanded dim of a value: `batch`, `sequence`, `heads`; its size where there is no word."""
        place = self.space.analysis.places[value.op]
        if place.op is not None:
            atoms: Sequence[int | None] = [a for dim in place.op.result_atoms[value.result] for a in dim]
        else:
            atoms = self._tensor_atoms.get(value.op, [None] * sum(map(len, place.dims)))
        sizes = self.space.shape_of(value)
        return tuple(
            self._atoms.get(atom, str(size)) if atom is not None else str(size)
            for atom, size in zip(atoms, sizes, strict=True)
        )

    def named(self, atom: int) -> str:
        """The word for a logical dim, by its identity; "" where there is none."""
        return self._atoms.get(atom, "")

    def atom(self, leaf: Leaf) -> str:
        """A word for what splitting this leaf splits; its size where there is none."""
        word = self._atoms.get(leaf.atom, str(leaf.size))
        return "heads" if word == "kv_heads" else word

    def tensor_dims(self, site: int) -> tuple[str, ...]:
        """A word per dim of a stored, given or returned tensor: `heads*head_size`."""
        place = self.space.analysis.places[site]
        if place.kind == "returned":
            return tuple(str(math.prod(dim)) for dim in place.dims)
        words, found, start = self.dims(Value(site, 0)), [], 0
        for dim in place.dims:
            found.append("*".join(word for word, _ in itertools.groupby(words[start : start + len(dim)])) or "1")
            start += len(dim)
        return tuple(word.replace("kv_heads*group", "heads") for word in found)

    def value(self, node: fx.Node) -> str:
        """What a tensor is called: a parameter's pattern, an input's name, or the module and op that made it."""
        if node in self._given:
            return self._pattern(self._given[node])
        made = node
        while is_getitem(made) or made.target in VIEWS:
            made = made.all_input_nodes[0]
        if made in self._given:
            return self._pattern(self._given[made])
        module = self._pattern(made.meta.get("module", ""))
        if made.op != "call_function":
            return str(made.target)
        return f"{module}: {op_text(made.target)}" if module else op_text(made.target)

    def gradient(self, node: fx.Node) -> fx.Node | None:
        """The parameter's gradient that a value is on its way to and nothing else, through ops on it alone."""
        return self._gradients.of(node)

    def moved(self, move: Move) -> str:
        """What a move moves: `value`'s name, or that of the parameter whose gradient it is."""
        gradient = self.gradient_of(move)
        return f"gradient of {gradient}" if gradient else self.value(move.value)

    def gradient_of(self, move: Move) -> str:
        """Pattern of the parameter whose gradient is on its way to where it is stored; "" for other moves."""
        target = move.value if move.stores else self.gradient(move.value) if move.reader is not None else None
        return self._pattern(self._gradients.names[target]) if target in self._gradients.names else ""

    def reason(self, move: Move, step: Step) -> str:
        """Why a step of a move is there."""
        name = self.value(move.value)
        if step.kind == "state_gather":
            return f"gather {name} for compute"
        gradient = self.gradient_of(move)
        if gradient:
            verb = "bring" if step.kind in ("all_gather", "all_to_all") else "add up"
            where = " to where it is stored" if verb == "bring" else ""
            return f"{verb} the gradient of {gradient}{where}"
        words = self.dims(value_of(move.value, self.space.folding))
        wanted = self._reader(move.reader)
        if step.kind in ("reduce_scatter", "state_scatter"):
            split = f", kept split along {words[step.target]}" if step.target is not None else ""
            return f"add the partial sums of {name}{split}"
        if step.kind == "all_reduce":
            verb = "take the maximum of" if step.op == "max" else "add"
            return f"{verb} the partial results of {name}" if step.op == "max" else f"add the partial sums of {name}"
        if step.kind == "all_to_all":
            assert step.source is not None
            assert step.target is not None
            return f"{name}: from split along {words[step.source]} to {words[step.target]} for {wanted}"
        split = words[step.source] if step.source is not None else "state"
        return f"{name}, split along {split}, is needed whole by {wanted}"

    def _reader(self, node: fx.Node | None) -> str:
        """The op that needs a tensor, looking through views of it."""
        while node is not None and node.target in VIEWS and node.users:
            node = next(iter(node.users))
        if node is None or node.op != "call_function":
            return "what the step returns"
        where = self._pattern(node.meta.get("module", ""))
        return f"{op_text(node.target)} in {where}" if where else op_text(node.target)


# -- many names as one -------------------------------------------------------------------------------------------------


def fold_names(names: Sequence[str]) -> str:
    """`layers.0-31.w` for `layers.0.w` ... `layers.31.w`; names that are no such ranges are listed.

    A name that looks like these itself, as keys of a `ModuleDict` may, is written so that it does not: `edges.0\\-1.w`.
    """
    names = [_escaped(name) for name in names]
    if len(names) == 1:
        return names[0]
    split = [tuple(_NUMBER.split(name)) for name in names]
    if len({(len(parts), parts[::2]) for parts in split}) > 1:
        return ", ".join(names)
    first = list(split[0])
    numbers = {i: sorted({int(parts[i]) for parts in split}) for i in range(1, len(first), 2)}
    if math.prod(map(len, numbers.values())) != len(set(names)):
        return ", ".join(names)
    for i, found in numbers.items():
        first[i] = ranges(found)
    return "".join(first)


def unfold_names(text: str) -> list[str]:
    """The names that `fold_names` folded."""
    if len(listed := _COMMA.split(text)) > 1:
        return [_plain(name) for name in listed]
    parts = [
        [str(number) for number in _numbers(part)] if _RANGES.fullmatch(part) else [_plain(part)]
        for part in text.split(".")
    ]
    return [".".join(chosen) for chosen in itertools.product(*parts)]


def _escaped(name: str) -> str:
    return ".".join(
        re.sub(r"[-,]", r"\\\g<0>", part) if "," in part or ("-" in part and _RANGES.fullmatch(part)) else part
        for part in name.split(".")
    )


def _plain(name: str) -> str:
    return re.sub(r"\\([-,])", r"\1", name)


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


# -- placements --------------------------------------------------------------------------------------------------------


def tensor_layout_text(layout: Layout, dims: Sequence[Sequence[int]]) -> str:
    """A layout of expanded dims in a tensor's own: `S(0)`; `S(0.1)` where an inner part of dim 0 is split."""
    places = [(d, i) for d, dim in enumerate(dims) for i in range(len(dim))]

    def text(placement: object) -> str:
        if isinstance(placement, Shard):
            d, i = places[placement.dim]
            return f"S({d}.{i})" if i else f"S({d})"
        return str(placement)

    return "".join(map(text, layout))


def at_rest_text(option: StoredOption) -> str:
    """How a tensor is stored, an axis at a time: FSDP's chunks are `S(0)` too, or another dim's."""
    storage = option.storage
    parts = []
    for axis, shard in enumerate(storage.shards):
        if axis in storage.state_axes:
            parts.append(f"S({storage.state_dim})")
        elif shard is None:
            parts.append("P" if isinstance(option.layout[axis], Partial) else "R")
        else:
            parts.append(f"S({shard.dim})" if shard.stride == 1 else f"S({shard.dim}|{shard.stride})")
    return "".join(parts)
