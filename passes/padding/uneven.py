"""Which dims a mesh's axes do not divide, and would split if they could: what padding is worth trying for.

These are the dims of matrix products, look-ups and attention: vocabularies, FFN widths, heads, the sequence. Not the
batch, which has to divide; not the hidden size, which every norm needs whole; and of a weight's dim that consists of
several (heads x head size), the one that costs least, never the innermost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import fx

from passes.analysis.analysis import Analysis
from passes.analysis.dims import Atom, is_getitem, value_of
from passes.analysis.strategies import Option
from passes.padding.pad import Pad
from passes.padding.paddings import Padding
from passes.program.local import Storage
from passes.rules.call import is_tensor
from passes.rules.index import EMBEDDINGS
from passes.rules.matmul import PRODUCTS
from passes.space.space import Space
from passes.space.words import Words

_MOST = 2.0
"""A dim is not made larger than this many times its size: beyond, most ranks would hold nothing but padding."""


def used_pads(padding: Padding, space: Space, assignment: Sequence[int]) -> tuple[Pad, ...]:
    """The pads whose dim is split by some axis under this assignment."""
    split = _split_atoms(space, assignment)
    return tuple(each for each in padding.pads if _new_atom(padding, each) in split)


def padding_notes(padding: Padding, space: Space, assignment: Sequence[int], untried: Sequence[Pad] = ()) -> list[str]:
    """A line per padded dim: what it is, which axes split it, how much more work it is, and whether there was no time
    to plan without it."""
    words, split = Words(space), _split_atoms(space, assignment)
    names = {node.name: what.name for node, what in space.program.placeholders.items()}
    notes = ["keys and values of grouped attention are repeated, so that query heads can be split"]
    notes = notes if padding.repeated_keys else []
    for each in padding.pads:
        atom = _new_atom(padding, each)
        word = words.named(atom) if atom is not None else ""
        axes = " and ".join(space.topology.axes[axis].name for axis in sorted(split.get(atom, set())))
        over = f" over {axes}" if axes else ", as it is stored"
        more = 100 * (each.padded - each.size) / each.size
        notes.append(
            f"{word or 'a dim of ' + names.get(each.node, each.node)} {each.size} padded to {each.padded}{over}, "
            f"{f'{more:.2g}' if more < 99 else f'{more:.0f}'}% more work"
            f"{'; there was no time to plan without that' if each in untried else ''}"
        )
    return notes


def _split_atoms(space: Space, assignment: Sequence[int]) -> dict[int | None, set[int]]:
    """Identities of dims that ops are split along, and by which axes."""
    found: dict[int | None, set[int]] = {}
    for site, pick in zip(space.sites, assignment, strict=True):
        option = site.options[pick]
        if isinstance(option, Option) and site.op is not None:
            for axis, leaf in enumerate(option.splits):
                if leaf is not None:
                    found.setdefault(site.op.leaves[leaf].atom, set()).add(axis)
    return found


def _new_atom(padding: Padding, each: Pad) -> int | None:
    """Identity of a padded dim in the padded program."""
    if each not in padding.seen:
        return None
    node, (dim, part) = padding.seen[each]
    atoms = padding.analysis.unified.dims(value_of(node, padding.analysis.folding))[dim]
    return next((id(atom) for atom in atoms[part:] if atom.size == each.padded), None)


def uneven_dims(
    analysis: Analysis,
    axis_sizes: Sequence[int],
    batch_axes: Sequence[int],
    strategy: str = "auto",
    *,
    alone: bool = False,
) -> tuple[Pad, ...]:
    """The dims to pad so that all axes that do not split the batch divide them together, or (`alone`) each by itself.

    These differ: 50260 is divided by 2 x 2 ranks, but half of it is not what `torch.chunk` cuts of 50257 for 2.
    `ddp` and `fsdp` want to split the sequence, and nothing else.
    """
    sizes = [size for axis, size in enumerate(axis_sizes) if axis not in batch_axes]
    parts = math.lcm(*sizes) if alone else math.prod(sizes)
    if parts == 1:
        return ()
    where = _first_places(analysis)
    kept = _candidates(analysis)
    if strategy in ("ddp", "fsdp"):
        kept &= analysis.sequence_atoms
    decided: set[int] = set()  # queries' heads (key-value heads x group) before the key-value heads alone
    for atoms in sorted(analysis.weight_dims, key=len, reverse=True) if strategy not in ("ddp", "fsdp") else ():
        kept -= {atom for atom, _ in atoms} - decided
        barred = analysis.blocked_atoms | analysis.batch_atoms
        outer = [(atom, size) for atom, size in atoms[:-1] if atom not in barred]
        new = not decided & {atom for atom, _ in outer}
        decided |= {atom for atom, _ in atoms}
        if outer and new and all(size % parts for _, size in outer):
            kept.add(min(outer, key=lambda each: -(-each[1] // parts) * parts / each[1])[0])
    pads = []
    for atom, (node, dim, part, size) in where.items():
        padded = -(-size // parts) * parts
        if atom in kept and size % parts and padded <= _MOST * size:
            pads.append(Pad(node, dim, part, size, padded))
    return tuple(pads)


def _candidates(analysis: Analysis) -> set[int]:
    """Identities of the dims that products, look-ups and attention split."""
    found: set[int] = set(analysis.sequence_atoms)
    contracted: Counter[int] = Counter()
    hidden: set[int] = set()
    for index, place in enumerate(analysis.places):
        if place.call is None or place.op is None or place.phase != "forward" or index not in analysis.from_data:
            continue
        if place.call.target in PRODUCTS:
            for leaf in place.op.leaves:
                found.add(leaf.atom)
                contracted[leaf.atom] += place.count * (leaf.results[0] is None)
        elif place.call.target in EMBEDDINGS:
            hidden.update(place.op.result_atoms[0][-1])
            found.update(leaf.atom for leaf in place.op.leaves if leaf.results[0] is None)
    if not hidden and contracted:
        hidden = {contracted.most_common(1)[0][0]}
    return found - hidden - analysis.batch_atoms


def _first_places(analysis: Analysis) -> dict[int, tuple[str, int, int, int]]:
    """Identity of a dim -> (node, dim, part, size) where it is found first."""
    found: dict[int, tuple[str, int, int, int]] = {}
    for members in analysis.folding.members:
        node = members[0]
        if not is_tensor(node) or is_getitem(node):
            continue
        for d, dim in enumerate(_dims(analysis, node)):
            for part, atom in enumerate(dim):
                found.setdefault(id(atom), (node.name, d, part, atom.size))
    return found


def _dims(analysis: Analysis, node: fx.Node) -> list[list[Atom]]:
    return analysis.unified.dims(value_of(node, analysis.folding))


def stored_pads(analysis: Analysis, stored: Mapping[str, Storage], axis_sizes: Sequence[int]) -> tuple[Pad, ...]:
    """The dims that parameters which already lie somewhere are stored padded along."""
    pads: dict[int, Pad] = {}
    for node, given in analysis.program.placeholders.items():
        storage = stored.get(given.name)
        if given.kind != "parameter" or storage is None:
            continue
        for d, dim in enumerate(_dims(analysis, node)):
            parts = math.prod(
                size for shard, size in zip(storage.shards, axis_sizes, strict=True) if shard and shard.dim == d
            )
            if storage.shape[d] % parts and len(dim) == 1:
                padded = -(-storage.shape[d] // parts) * parts
                pads.setdefault(id(dim[0]), Pad(node.name, d, 0, storage.shape[d], padded))
    return tuple(pads.values())
