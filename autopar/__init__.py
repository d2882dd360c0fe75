"""autopar: tensor parallelism and state sharding for unmodified PyTorch Transformers, chosen by a solver.

    model = autopar.parallelize(model, mesh, {"input_ids": ids, "labels": ids})

See `parallelize`, `plan`, `apply`, `search`, `price`, `verify` and `Options`; the command line is `autopar --help`.
"""

from __future__ import annotations

from autopar.api import apply, parallelize, plan
from autopar.modules.module import ParallelModule
from autopar.options import Options
from autopar.parity.certificate import Parity, Tolerances
from autopar.parity.verify import verify
from autopar.ranks.watch import RankFailedError
from autopar.runs.pricing import Price, price
from autopar.runs.search import search
from autopar.runs.search_result import SearchResult
from passes.errors import (
    AutoparError,
    CaptureError,
    NoFeasiblePlanError,
    PlanMismatchError,
    UnsupportedOpError,
)
from passes.plan.plan import Plan
from passes.runs.setup import Setup

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
