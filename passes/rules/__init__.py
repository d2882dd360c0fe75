"""Sharding rules, one file per family of ops; importing the package fills the table."""

from passes.rules import (
    attention,
    create,
    experts,
    index,
    matmul,
    misc,
    norm,
    pointwise,
    random,
    reduction,
    view,
    window,
)

__all__ = [
    "attention",
    "create",
    "experts",
    "index",
    "matmul",
    "misc",
    "norm",
    "pointwise",
    "random",
    "reduction",
    "view",
    "window",
]
