"""What one rank does of an op under an option: its local shapes, and the work on them."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.compute import Work
from costmodel.layout import Layout, local_shape
from passes.analysis.dims import expanded_shape, own_shape
from passes.analysis.strategies import Option
from passes.rules.work import work_of
from passes.space.space import Site


def option_local_shapes(site: Site, option: Option, sizes: Sequence[int]) -> tuple[list[tuple[int, ...]], ...]:
    """Local shapes (on the tensors' own dims) of an op's operands and results."""
    assert site.op is not None

    def local(dims: tuple[tuple[int, ...], ...], layout: Layout) -> tuple[int, ...]:
        return own_shape(dims, local_shape(expanded_shape(dims), layout, sizes))

    return (
        [local(dims, layout) for dims, layout in zip(site.op.operands, option.operands, strict=True)],
        [local(dims, layout) for dims, layout in zip(site.op.results, option.results, strict=True)],
    )


def local_work(site: Site, option: Option, sizes: Sequence[int]) -> tuple[Work, list[tuple[int, ...]]]:
    """What one rank does of an op, and the local shapes of its results."""
    assert site.call is not None
    operands, results = option_local_shapes(site, option, sizes)
    return work_of(site.call, operands, results, site.traffic), results
