"""Repeated layers: which nodes of the graph are copies of one another and share every decision.

Two nodes share a class when they run the same call, in the same phase, at the same place of modules whose names differ
only in a layer's index (`layers.3.mlp.up` and `layers.7.mlp.up`). Places are counted; where one layer makes a call more
often than another (what all take of an encoder's states, made once), they must be made of alike nodes too. An index
counts as a layer's where the indexed modules have submodules with parameters of their own, and the layers at that place
have the same parameters; the members of a plain `nn.Sequential` stay apart. So do parameters that an earlier program of
the model stored differently. Folding restricts plans (layers are laid out alike) and never makes one wrong.
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.program.local import LocalProgram
from passes.program.program import Program
from passes.rules.call import call_key, facts_of


@dataclass(frozen=True)
class Folding:
    """Classes of alike nodes. `members[c]` are in graph order; the first is the class's representative."""

    members: tuple[tuple[fx.Node, ...], ...]
    of: Mapping[fx.Node, int]
    layers: Mapping[str, int]
    """Name pattern of a repeated module (`model.layers.*`) -> how many there are."""


_Place = tuple[Any, str, str]
"""(phase, module, call)"""
_SALT = re.compile(r"'salt': \d+")
"""The number of a random op: a name, no difference."""


def fold(program: Program) -> Folding:
    """Group the graph's nodes, placeholders included (the output node is left out)."""
    pattern = layer_pattern(program)
    classes: dict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
    seen: dict[tuple[object, ...], int] = defaultdict(int)
    calls = [node for node in program.graph.graph.nodes if node.op not in ("placeholder", "output")]
    places = {node: (node.meta.get("phase"), node.meta.get("module", ""), _key(node)) for node in calls}
    uneven = _uneven(places.values(), pattern)
    of: dict[fx.Node, int] = {}
    numbers: dict[tuple[object, ...], int] = {}
    placeholders = iter(program.inputs)
    for node in program.graph.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            given = next(placeholders)
            known = given.requires_grad, given.at_rest, facts_of(node.meta["val"])
            key: tuple[object, ...] = (given.kind, pattern(given.name), *known)
            if given.kind not in ("parameter", "buffer"):
                key = (given.kind, given.name)
            classes[key].append(node)
            continue
        phase, module, call = place = places[node]
        made_of: tuple[int | None, ...] = ()
        if (phase, pattern(module), call) in uneven:
            layer = pattern.instance(module)
            made_of = tuple(
                of[operand] if operand in places and pattern.instance(places[operand][1]) == layer else None
                for operand in node.all_input_nodes
            )
        ordinal = seen[*place, *made_of]
        seen[*place, *made_of] += 1
        key = (phase, pattern(module), call, ordinal, *made_of)
        classes[key].append(node)
        of[node] = numbers.setdefault(key, len(numbers))
    members = tuple(tuple(nodes) for nodes in classes.values())
    return Folding(members, {node: c for c, nodes in enumerate(members) for node in nodes}, pattern.layers)


def _uneven(places: Iterable[_Place], pattern: LayerPattern) -> set[_Place]:
    """Calls that some layers make more often than others, which take what those share from them: counting does not tell
    which is which, but what they are made of in their layer does."""
    counts: dict[_Place, Counter[str]] = defaultdict(Counter)
    for phase, module, call in places:
        counts[phase, pattern(module), call][module] += 1
    return {alike for alike, by_module in counts.items() if len(set(by_module.values())) > 1}


def _key(node: fx.Node) -> str:
    """Equal for nodes that make equal calls."""
    if node.op != "call_function":
        return f"{node.target}"
    if node.target is operator.getitem:  # of an op with several results: its operand is no tensor with facts
        return f"getitem {node.args[1]} {call_key(node.all_input_nodes[0])}"
    return _SALT.sub("", call_key(node))


class LayerPattern:
    """Names of modules and parameters with the indices of repeated layers replaced by `*`.

    `layers`: pattern of a repeated module (`model.layers.*`) -> how many there are.
    """

    def __init__(self, layers: Mapping[str, int]) -> None:
        self.layers = layers
        self.prefixes = {pattern.removesuffix(".*") for pattern in layers}
        self.cache: dict[str, str] = {}
        self.layer_of: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name not in self.cache:
            done: list[str] = []
            for part in name.split("."):
                index = part.isdigit() and ".".join(done) in self.prefixes
                done.append("*" if index else part)
            self.cache[name] = ".".join(done)
        return self.cache[name]

    def layer(self, name: str) -> str:
        """The outermost repeated layer that a module is part of (`model.layers.3`); "" where there is none."""
        if name not in self.layer_of:
            parts = self(name).split(".")
            self.layer_of[name] = ".".join(name.split(".")[: parts.index("*") + 1]) if "*" in parts else ""
        return self.layer_of[name]

    def instance(self, name: str) -> str:
        """That layer; the module itself where there is none."""
        return self.layer(name) or name


def layer_pattern(program: Program | LocalProgram) -> LayerPattern:
    """The repeated layers of a program's model, told by its parameters and buffers."""
    return layer_pattern_of([given.name for given in program.inputs if given.kind in ("parameter", "buffer")])


def layer_pattern_of(names: Sequence[str]) -> LayerPattern:
    """The repeated layers of a model with parameters of these names."""
    layers: dict[str, int] = {}
    while True:
        pattern = LayerPattern(dict(layers))
        children: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name in names:
            parts = pattern(name).split(".")
            for depth, part in enumerate(parts):
                if part.isdigit():
                    children[".".join(parts[:depth])][part].add(".".join(parts[depth + 1 :]))
                    break
        for prefix, members in children.items():
            deep = [index for index, leaves in members.items() if any(re.search(r"\.", leaf) for leaf in leaves)]
            if len(deep) > 1 and len(deep) == len(members):
                layers[f"{prefix}.*"] = len(members)
        if len(layers) == len(pattern.layers):
            return pattern


def unique(key: str, taken: Mapping[str, Any]) -> str:
    """`key`, or `key#2` and so on where it is taken."""
    found, number = key, 1
    while found in taken:
        number += 1
        found = f"{key}#{number}"
    return found
