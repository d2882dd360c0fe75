"""autopar: tensor parallelism and state sharding for unmodified PyTorch Transformers, chosen by a solver.

    model = autopar.parallelize(model, mesh, {"input_ids": ids, "labels": ids})

See `parallelize`, `plan`, `apply`, `search`, `price`, `verify` and `Options`; the command line is `autopar --help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar import planning
from autopar.api import apply_with, parallelize_with, plan_with
from autopar.certificate import Parity
from autopar.module import ParallelModule
from autopar.options import Options
from autopar.pipeline import Pipeline
from autopar.pricing import Price, price
from autopar.search import search
from autopar.search_result import SearchResult
from autopar.verify import verify
from costmodel.hardware import Hardware
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
    "SearchResult",
    "Setup",
    "UnsupportedOpError",
    "apply",
    "parallelize",
    "plan",
    "price",
    "search",
    "verify",
]

PIPELINE = Pipeline(
    planning.machine_of,
    planning.captured,
    planning.planned,
    planning.rewritten,
    Plan.from_json,
    planning.options_of,
    planning.hardware_in,
)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    hardware: str | Hardware | None = None,
    strategy: str | None = None,
    options: Options | None = None,
) -> ParallelModule:
    """`model` laid out over `mesh` by the fastest plan found, ready to train.

    mesh: one to five axes, named; `dp`, `dp_replicate`, `dp_shard`, `fsdp`, `data`, `batch` and the like split the
        batch. Each further axis that splits tensors makes planning several times as long.
    example_inputs: what one data-parallel rank feeds the model, a tuple of positional or a mapping of keyword
        arguments; None: taken from a Hugging Face model's config. plan: one made earlier, for this graph and mesh,
        with options, strategy and hardware of its own.
    hardware, strategy: as `plan` takes them ("auto").

    The returned module has the model's class, attributes and parameter names; parameters are DTensors on the whole
    mesh. The model itself stays as it was.

    Raises:
        ValueError: a mesh, input or option that cannot be; says what would do.
        CaptureError: the forward cannot be captured as one graph; names the line.
        NoFeasiblePlanError: no plan fits in memory; says by how much, and what would.
        PlanMismatchError: `plan` is for another graph or mesh.
    """
    return parallelize_with(
        PIPELINE, model, mesh, example_inputs, plan=plan, hardware=hardware, strategy=strategy, options=options
    )


def plan(
    model: nn.Module,
    mesh: DeviceMesh | Mapping[str, int],
    example_inputs: Any = None,
    *,
    hardware: str | Hardware | None = None,
    strategy: str = "auto",
    options: Options | None = None,
) -> Plan:
    """The plan for `model` on `mesh`; needs no process group and no GPU where the mesh is a mapping of axis sizes.

    hardware: a preset ("h100", ...), a calibrated file, `costmodel` figures, or None for the devices of a DeviceMesh,
        and for the machine we are on where the mesh is a mapping.
    strategy: "auto" solves; "ddp", "fsdp" and "megatron" are the plans people make by hand.

    Raises: as `parallelize`.
    """
    made: Plan = plan_with(PIPELINE, model, mesh, example_inputs, hardware=hardware, strategy=strategy, options=options)
    return made


def apply(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> ParallelModule:
    """`model` laid out as `plan` says, on `mesh`.

    Raises:
        PlanMismatchError: the plan is for another graph or mesh; says what differs.
    """
    return apply_with(PIPELINE, model, plan, mesh)
