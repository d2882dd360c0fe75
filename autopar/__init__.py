"""autopar: tensor parallelism and state sharding for unmodified PyTorch Transformers, chosen by a solver.

    model = autopar.parallelize(model, mesh, {"input_ids": ids, "labels": ids})

See `parallelize`, `plan`, `apply`, `search`, `price`, `verify` and `Options`; the command line is `autopar --help`.
"""

from __future__ import annotations

from autopar.api import apply, parallelize, plan
from autopar.certificate import Parity, Tolerances
from autopar.module import ParallelModule
from autopar.options import Options
from autopar.pricing import Price, price
from autopar.search import search
from autopar.search_result import SearchResult
from autopar.verify import verify
from autopar.watch import RankFailedError
from passes.errors import (
    AutoparError,
    CaptureError,
    NoFeasiblePlanError,
    PlanMismatchError,
    UnsupportedOpError,
)
from passes.plan import Plan
from passes.setup import Setup

__all__ = [
    "AutoparError",
    "CaptureError",
    "NoFeasiblePlanError",
    "Options",
    "ParallelModule",
    "Parity",
    "Plan",
    "PlanMismatchError",
    "Price",
    "RankFailedError",
    "SearchResult",
    "Setup",
    "Tolerances",
    "UnsupportedOpError",
    "apply",
    "parallelize",
    "plan",
    "price",
    "search",
    "verify",
]
