"""The collectives that a rank's graph issues, read off the graph: what is priced and played is compared with this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.program.local import COLLECTIVES, TOGETHER, LocalProgram

c10d = torch.ops._c10d_functional

_KINDS: dict[Any, str] = {
    c10d.all_gather_into_tensor.default: "all_gather",
    c10d.reduce_scatter_tensor.default: "reduce_scatter",
    c10d.all_reduce.default: "all_reduce",
    c10d.all_to_all_single.default: "all_to_all",
}
_KINDS |= {together: _KINDS[single] for single, together in TOGETHER.items()}


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
    return tuple(_issued(node) for node in local.graph.graph.nodes if node.target in COLLECTIVES)


def _issued(node: fx.Node) -> Issued:
    kind = _KINDS[node.target]
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
