"""Words for atoms: batch, sequence, hidden, heads, ffn, vocab, experts, as the ops that use them tell.

What a dim is called in a model's code is not in its graph; what an embedding, an attention or a product does with it
is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch

from passes.analysis.dims import ExpandedOp
from passes.program.routed_ops import ROUTED_MM
from passes.rules.matmul import PRODUCTS
from passes.space.space import Space

aten = torch.ops.aten


def stored_atoms(space: Space) -> dict[int, list[int | None]]:
    """Per stored or given site, the identity of the atom at each expanded dim, as far as a reader names it."""
    found: dict[int, list[int | None]] = {}
    for wire in space.wires:
        if space.sites[wire.value.op].kind == "op":
            continue
        atoms = found.setdefault(wire.value.op, [None] * len(space.shape_of(wire.value)))
        for port in wire.ports:
            op = space.sites[port.site].op
            if op is None or port.stores:
                continue
            for leaf in op.leaves:
                position = leaf.operands[port.operand]
                if position is not None:
                    atoms[position] = atoms[position] or leaf.atom
    return found


def atom_names(space: Space, stored: dict[int, list[int | None]]) -> dict[int, str]:
    """Words for atoms, from what the ops that use them mean by them."""
    analysis = space.analysis
    heard = _Heard(dict.fromkeys(analysis.batch_atoms, "batch") | dict.fromkeys(analysis.sequence_atoms, "sequence"))
    for index, place in enumerate(analysis.places):
        if place.call is not None and place.op is not None and place.phase == "forward":
            heard.from_op(place.op, place.call.target, on_data=index in analysis.from_data)
    names, sizes = heard.names, heard.sizes
    weights = [positions for site, positions in stored.items() if _is_weight(space, site)]
    vocabularies = {sizes[atom] for atom, word in names.items() if word == "vocab"}
    for atom in analysis.class_atoms - heard.routed:
        if sizes.get(atom) in vocabularies:
            names.setdefault(atom, "vocab")
    if "hidden" not in names.values() and heard.contracted:
        names.setdefault(heard.contracted.most_common(1)[0][0], "hidden")
    for site, positions in stored.items():
        if _is_weight(space, site) and len(space.sites[site].dims) == 3:
            names |= {atom: "experts" for atom in positions[:1] if atom in heard.stacked and atom not in names}
    _name_routers(names, sizes, weights, analysis.weight_dims)
    for dims in analysis.weight_dims:
        if len(dims) >= 2 and dims[-1][0] in heard.contracted and dims[-2][0] not in heard.contracted:
            names.setdefault(dims[-2][0], "parts")  # of a fused product, each with the columns that another contracts
        elif len(dims) >= 2:
            _name_heads(names, [atom for atom, _ in dims])
    _name_inner(names, weights, set(heard.contracted) | heard.routed)
    return names


@dataclass
class _Heard:
    """What forward's ops say of atoms: words, sizes, and how products use them."""

    names: dict[int, str]
    sizes: dict[int, int] = field(default_factory=dict)
    contracted: Counter[int] = field(default_factory=Counter)
    """By products of data: how often."""
    stacked: set[int] = field(default_factory=set)
    """In both operands of a product and in its result."""
    routed: set[int] = field(default_factory=set)
    """Columns of routed products."""

    def from_op(self, op: ExpandedOp, target: Any, *, on_data: bool) -> None:
        """Note what an op says; `on_data`: it reads what follows from the inputs' data."""
        if target is aten.embedding.default and op.result_atoms and op.result_atoms[0]:
            self._from_embedding(op, on_data)
        elif "scaled_dot_product" in str(target) and op.result_atoms:
            self._from_attention(op)
        elif target in PRODUCTS and on_data:
            self._from_product(op, routed=target is ROUTED_MM)

    def _from_embedding(self, op: ExpandedOp, on_data: bool) -> None:
        if on_data:
            self.names |= {atom: "hidden" for atom in op.result_atoms[0][-1] if atom not in self.names}
        for leaf in op.leaves:
            if leaf.operands[0] == 0:
                self.names.setdefault(leaf.atom, "vocab" if on_data else "positions")
                self.sizes[leaf.atom] = leaf.size

    def _from_attention(self, op: ExpandedOp) -> None:
        _, heads, _, head_size = op.result_atoms[0][:4]
        for atom, word in zip(heads, ("heads",) if len(heads) == 1 else ("kv_heads", "group"), strict=False):
            self.names.setdefault(atom, word)
        for atom in head_size:
            self.names.setdefault(atom, "head_size")

    def _from_product(self, op: ExpandedOp, *, routed: bool) -> None:
        self.contracted.update(leaf.atom for leaf in op.leaves if leaf.results and leaf.results[0] is None)
        self.sizes |= {leaf.atom: leaf.size for leaf in op.leaves}
        if routed:
            self.names |= {leaf.atom: "experts" for leaf in op.leaves if leaf.operands[1] == 0}
            self.routed.update(leaf.atom for leaf in op.leaves if leaf.operands[1] and leaf.results[0] is not None)
        self.stacked.update(leaf.atom for leaf in op.leaves if None not in (*leaf.operands, leaf.results[0]))


def _name_heads(names: dict[int, str], atoms: Sequence[int]) -> None:
    """What a dim of heads consists of: behind the heads, where an op named them, all is of a head (rotary pairs)."""
    named = [place for place, atom in enumerate(atoms) if names.get(atom) in ("heads", "kv_heads", "group")]
    for atom in atoms[named[-1] + 1 if named else -1 :]:
        names.setdefault(atom, "head_size")
    names.setdefault(atoms[-2], "heads")


def _name_routers(
    names: dict[int, str],
    sizes: Mapping[int, int],
    weights: Sequence[Sequence[int | None]],
    weight_dims: Sequence[Sequence[tuple[int, int]]],
) -> None:
    """A router's columns are the experts, or groups of them."""
    counts = {sizes[atom] for atom, word in names.items() if word == "experts" and atom in sizes}
    for dims in weight_dims:
        if math.prod(size for _, size in dims) in counts and not any(atom in names for atom, _ in dims):
            names |= dict(zip((atom for atom, _ in dims[-2:]), ("groups", "experts"), strict=False))
    for columns, rows in (positions for positions in weights if len(positions) == 2):
        if columns is not None and rows is not None and names.get(rows) == "hidden" and sizes.get(columns) in counts:
            names.setdefault(columns, "experts")


def _name_inner(names: dict[int, str], weights: Sequence[Sequence[int | None]], inner: AbstractSet[int]) -> None:
    """What one weight makes and another contracts: an FFN's width lies between hidden and hidden, others elsewhere."""
    beside: dict[int, set[str]] = {}
    for positions in weights:
        for atom in positions:
            if atom is not None and atom in inner and atom not in names:
                others = {names.get(other, "") for other in positions if other is not None and other != atom}
                beside.setdefault(atom, set()).update(others - {"parts"})
    for atom, others in beside.items():
        if "vocab" not in others and "hidden" in others:
            names[atom] = "ffn" if others <= {"hidden", "experts"} else "latent"


def _is_weight(space: Space, site: int) -> bool:
    return space.sites[site].parameter is not None and len(space.sites[site].dims) >= 2
