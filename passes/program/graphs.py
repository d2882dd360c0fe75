"""Graph modules whose Python code is generated when somebody asks for it: no stage runs it, and it takes long.

The one file that knows torch's private lazy graph module.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule


def graph_module(root: Any, graph: fx.Graph, class_name: str = "GraphModule") -> fx.GraphModule:
    """`graph` over the attributes of `root` (a module, or a mapping of names to values)."""
    return _LazyGraphModule(root, graph, class_name)


def drop_unread(graph: fx.Graph) -> None:
    """Take out what nothing reads, draws of random numbers too, but for inputs."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
