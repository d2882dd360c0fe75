"""What reads a tensor that was written in place stays behind that write in what Inductor makes.

Inductor has collectives and waits write in place, and knows what reads a result after them by a new name of the tensor.
Its C++ backend lays an op's loops out anew to fuse it with others and finds its reads again by their old names. The op
may then run before the wait, or before the collective has begun: numbers of one rank alone, and no error (torch 2.11 to
2.13; mended in pull request 185873 of pytorch). Torch 2.11 loses what else had to come before, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch._inductor.dependencies import Dep, StarDep, WeakDep
from torch._inductor.scheduler import SchedulerNode
from torch.utils._ordered_set import OrderedSet


@contextlib.contextmanager
def behind_writes() -> Iterator[None]:
    """Within it, Inductor keeps an op's dependencies on earlier writes when it lays out the op's loops anew."""
    made = SchedulerNode.recompute_size_and_body

    @functools.wraps(made)
    def recompute(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        ordered: OrderedSet[Dep] = OrderedSet(
            dep for dep in node.read_writes.reads if isinstance(dep, (StarDep, WeakDep))
        )
        made(node, *args, **kwargs)
        node.set_read_writes(node.read_writes.with_read(ordered).rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        SchedulerNode.recompute_size_and_body = made  # type: ignore[method-assign]
