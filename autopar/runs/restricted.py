"""A strategy's space restricted to what a setup says: of a search's setups, each names more than a strategy fixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from passes.analysis.analysis import Analysis
from passes.analysis.strategies import Option, StoredOption
from passes.rules.index import EMBEDDINGS
from passes.rules.matmul import PRODUCTS
from passes.space.named import stored_choices
from passes.space.space import Site, Space, search_space


def with_data_parallel_state(space: Space) -> Space:
    """`space` with parameters stored over the batch axes as by hand, split over all of them, and no samples split by
    other axes: those would be batch axes of another mesh."""
    sizes, batch_axes = space.topology.sizes, space.batch_axes

    def splits_samples(option: Option, site: Site) -> bool:
        assert site.op is not None
        leaves = [leaf for axis, leaf in enumerate(option.splits) if axis not in batch_axes and leaf is not None]
        return any(site.op.leaves[leaf].atom in space.analysis.batch_atoms for leaf in leaves)

    def left(_: int, site: Site) -> Sequence[Any]:
        if site.parameter is not None:
            return stored_choices(_stored(site), "megatron", sizes, batch_axes)
        if site.op is None:
            return site.options
        return [o for o in site.options if isinstance(o, Option) and not splits_samples(o, site)]

    return _with(space, left)


def with_replicas(space: Space, strategy: str) -> Space:
    """`space` with parameters stored as HSDP does: sharded over `dp_shard`, alike on every rank of `dp_replicate`."""
    names = [axis.name for axis in space.topology.axes]
    shard = (names.index("dp_shard"),) if "dp_shard" in names else ()
    data = [axis for axis, name in enumerate(names) if name.startswith("dp")]
    free = _free(space)

    def left(index: int, site: Site) -> Sequence[Any]:
        if site.parameter is None:
            return site.options
        computed = {option.layout for option in _stored(site)}
        return [
            option
            for option in _stored(free.sites[index])
            if tuple(axis for axis in option.storage.state_axes if axis in data) == shard
            and not any(option.storage.shards[axis] for axis in data)
            and (strategy != "fsdp" or option.layout in computed)
        ]

    return _with(space, left)


def without_sequence_parallelism(space: Space) -> Space:
    """`space` where no tensor axis splits the sequence or samples, or the hidden dim of what is no operand of a
    product: between the layers' products each rank has the residual stream whole."""
    analysis = space.analysis
    tensor_axes = [axis for axis in range(len(space.topology.sizes)) if axis not in space.batch_axes]
    tokens = analysis.sequence_atoms | analysis.batch_atoms
    hidden = _hidden_atoms(analysis)
    free = _free(space)

    def splits(option: Option) -> list[int]:
        """The leaves that tensor axes split."""
        return [leaf for axis in tensor_axes if (leaf := option.splits[axis]) is not None]

    def is_whole(site: Site, option: Option | StoredOption) -> bool:
        if not isinstance(option, Option) or site.op is None:
            return False
        atoms = tokens if site.call and site.call.target in PRODUCTS else tokens | hidden
        return not any(site.op.leaves[leaf].atom in atoms for leaf in splits(option))

    def left(index: int, site: Site) -> Sequence[Any]:
        kept = [option for option in site.options if is_whole(site, option)]
        if index in analysis.from_data and not any(isinstance(o, Option) and splits(o) for o in kept):
            # The op on every rank.
            kept += [o for o in free.sites[index].options if is_whole(site, o) and o not in kept]
        return kept

    return _with(space, left)


def _hidden_atoms(analysis: Analysis) -> set[int]:
    """The dims of what embeddings give."""
    forward = [place for place in analysis.places if place.phase == "forward" and place.call and place.op]
    embedded = [
        place.op.result_atoms for place in forward if place.call and place.op and place.call.target in EMBEDDINGS
    ]
    return {atom for results in embedded for dims in results for dim in dims for atom in dim}


def _free(space: Space) -> Space:
    """The same sites with all that `auto` may choose."""
    return search_space(
        space.analysis.program, space.topology, space.batch_axes, strategy="auto", analysis=space.analysis
    )


def _with(space: Space, left: Callable[[int, Site], Sequence[Any]]) -> Space:
    """`space` with the options that are `left` of each site; all of them where that is none."""
    sites = (replace(site, options=tuple(left(index, site)) or site.options) for index, site in enumerate(space.sites))
    return replace(space, sites=tuple(sites))


def _stored(site: Site) -> tuple[StoredOption, ...]:
    return tuple(option for option in site.options if isinstance(option, StoredOption))
