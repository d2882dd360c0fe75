"""Sharding rules, one file per family of ops; importing the package fills the table."""

from passes.rules import attention, create, index, matmul, norm, pointwise, random, reduction, view

__all__ = ["attention", "create", "index", "matmul", "norm", "pointwise", "random", "reduction", "view"]
