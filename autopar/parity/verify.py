"""The parity check: a planned step, every rank played in this process, against the unmodified model on one device.

model, inputs -copies with values-> eager step on the whole batch                                 the reference
the same -capture, plan, rewrite-> every rank's program -simulate-> full tensors                  what is checked
where they part -> the captured graph on one device, and the first node at which the ranks leave it
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar import examples, meshes, planning
from autopar.api import skeleton
from autopar.machine import priced_for
from autopar.mixed import precision_of
from autopar.options import Options, check_options
from autopar.overlaps import check_apart, placed
from autopar.parity.certificate import Parity, TensorError, Tolerances
from autopar.parity.one_device import Values, eager, held_buffers, on_one_device, restore
from autopar.parity.tensor_errors import compare, limits, rounding
from autopar.parity.varied import Batch, Variety, real_copy, varied_batch
from autopar.unwrapped import check_unwrapped
from costmodel.hardware import Hardware
from passes.capture.autocast import autocast_as, autocast_dtype
from passes.capture.one_process import as_one_process
from passes.parity.bisect import Divergence, first_divergence
from passes.parity.double import doubled, in_double
from passes.parity.scattered import SimulationError
from passes.parity.simulate import StepValues, local_inputs, simulate_step
from passes.plan.plan import Plan, check_plan
from passes.planner.pipeline import Manner, Progress
from passes.program.local import LocalProgram
from passes.program.precision import Precision, default_dtype, dtype_text
from passes.program.program import Program
from passes.program.provenance import place_of
from passes.rewrite.ledger import ledger
from passes.space.named import check_strategy

__all__ = ["Parity", "Tolerances", "verify"]


_LOW = (torch.bfloat16, torch.float16)


def verify(
    model: nn.Module,
    mesh: DeviceMesh | Mapping[str, int],
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    strategy: str = "auto",
    options: Options | None = None,
    hardware: str | Hardware | None = None,
    tolerances: Tolerances | None = None,
    progress: Progress = lambda stage: None,
) -> Parity:
    """A certificate that `model`, laid out over `mesh`, computes what it does on one device.

    All ranks are played in this one process on the CPU; no process group, no GPU. Compared are the outputs, every
    gradient, the parameters after a step of AdamW, and the buffers. Where they part, the certificate names the first
    node that differs and the model's line. `plan` is checked where it is given, else one is made under `strategy`.
    The model is left as it is; one on the meta device is given random values in a copy.

    Under `Options(mp_policy=...)` the reference casts parameters, inputs and outputs by hand around the unmodified
    model. In half precision every layout rounds otherwise: a loss may then differ by 2e-2 (relative), any other tensor
    by 5e-2 of its norm, where `tolerances` (`autopar.Tolerances`) says nothing else; in float32 by 1e-5 and 1e-4. A
    part of the step in half precision (`torch.autocast` inside the forward) makes it one in half precision, with a
    note; gradients that are added over ranks in half precision (`reduce_dtype`) may differ as much there.

    Where the step draws random numbers (dropout), the ranks are held against the captured graph on one device with the
    same seed, and in eval mode against the unmodified model.

    Raises:
        ValueError, CaptureError, NoFeasiblePlanError, PlanMismatchError: as `autopar.plan` and `autopar.apply`.
    """
    check_unwrapped(model)
    check_strategy(strategy)
    options = planning.options_of(plan) if plan is not None else options or Options()
    check_options(options)
    axes = meshes.axes_of(mesh)
    autocast = autocast_dtype()
    with autocast_as(None):
        batch_axes = meshes.batch_axes_of(axes, options.batch_axes)
        if plan is None:
            hardware = priced_for(hardware, mesh)
            planning.machine_of(hardware, axes, batch_axes, options)
        progress("copying the model")
        copied, notes = real_copy(model, options.seed)
        held = (*placed(model), *placed(copied))
        call_args, call_kwargs = examples.on_cpu(examples.call_of(model, example_inputs))
        ways = meshes.batch_ranks(axes, batch_axes)
        for batch in _batches(copied, call_args, call_kwargs, ways, options):
            check = _Check(
                copied, batch, axes, batch_axes, options, hardware, strategy, tolerances or Tolerances(), progress,
                autocast,
            )  # fmt: skip
            program = check.captured()
            check_apart(held, program)
            if plan is None or program.fingerprint == plan.fingerprint or program.guards is None:
                break  # else the plan is for a graph that follows from other values
        return check.parity(program, plan, (*notes, *batch.notes))


def _batches(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ways: int, options: Options
) -> Iterator[Batch]:
    """Global batches that the model takes, the one that differs most from rank to rank first."""
    varieties: tuple[Variety, ...] = ("values", "order", "none") if ways > 1 else ("values",)
    for variety in varieties:
        batch = varied_batch(args, kwargs, ways, options.batch_dims, _vocabulary(model), options.seed + 1, variety)
        if variety == varieties[-1] or _takes(model, batch):
            yield batch


def _takes(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's forward runs on a batch."""
    before = held_buffers(model)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), as_one_process():
            warnings.simplefilter("ignore")
            model(*batch.args, **batch.kwargs)
    except Exception:  # whatever a model raises on inputs that it does not take
        return False
    finally:
        restore(before)
    return True


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class _InDouble:
    """Worst errors in float64: of the ranks against the captured graph on one device, and of that against the
    unmodified model; None of what does not run so, or was not tried."""

    ranks: float | None = None
    model: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Check:
    """One call of `verify`; `model` is a copy of our own, with values."""

    model: nn.Module
    batch: Batch
    axes: meshes.Axes
    batch_axes: tuple[int, ...]
    options: Options
    hardware: str | Hardware | None
    strategy: str
    tolerances: Tolerances
    progress: Progress
    autocast: torch.dtype | None
    """What `torch.autocast` around the call computes in."""

    def captured(self) -> Program:
        """The step of the batch."""
        batch = self.batch
        self.progress("capturing the step")
        with autocast_as(self.autocast):
            return planning.captured(
                skeleton(self.model), batch.args, batch.kwargs, batch_dims=batch.batch_dims, batch_size=batch.size,
                precision=self.precision,
            )  # fmt: skip

    def parity(self, program: Program, plan: Plan | None, notes: tuple[str, ...]) -> Parity:
        """Plan, play and compare."""
        model, batch = self.model, self.batch
        if plan is None:
            plan = self._planned(program)
        check_plan(plan, program.fingerprint, self.axes)
        self.progress("writing each rank's program")
        local = planning.rewritten(program, plan)
        values = Values.of(program, model, batch, self.options.seed)
        random = any(given.kind == "seed" for given in program.inputs)
        self.progress("running the reference")
        reference = self._reference(program, values, random)
        self.progress(f"playing {math.prod(size for _, size in self.axes)} ranks")
        tensors: tuple[TensorError, ...] = ()
        failure, step = "", ""
        try:
            found = simulate_step(
                local, values.parameters, values.buffers, values.inputs, values.tangents, (self.options.seed, 0)
            )
            tensors, step = self._compared(found, reference, values, program)
        except SimulationError as error:
            failure = str(error)
        failed = bool(failure) or any(not tensor.ok for tensor in tensors)
        divergence, captured_error = self._explained(local, values, reference, random) if failed else (None, None)
        rounding_error = self._moved_by_rounding(program, values, reference) if failed and not random else None
        double = self._in_double(local, values, random) if failed and not failure else _InDouble()
        without = self._without_randomness(plan) if random and model.training else None
        return Parity(
            model=type(model).__name__,
            parameters=sum(p.numel() for p in model.parameters()),
            dtype=self._dtypes(),
            training=model.training,
            axes=self.axes,
            batch_size=batch.size,
            batch_ranks=meshes.batch_ranks(self.axes, self.batch_axes),
            strategy=plan.strategy,
            hardware=plan.hardware,
            fingerprint=program.fingerprint,
            seed=self.options.seed,
            reference=_CAPTURED if random else _EAGER,
            optimizer=step,
            collectives=dict(Counter(each.kind for each in ledger(local))),
            tensors=tensors,
            divergence=divergence,
            failure=failure,
            captured_error=captured_error,
            rounding_error=rounding_error,
            double_error=double.ranks,
            model_double_error=double.model,
            notes=(
                *_doubts(reference),
                *double.notes,
                *self._limits_told(program),
                *notes,
                *program.notes,
                *filter(None, [local.program.attends]),
            ),
            without_randomness=without,
        )

    def _compared(
        self, found: StepValues, wanted: StepValues, values: Values, program: Program
    ) -> tuple[tuple[TensorError, ...], str]:
        differentiated = [given.name for given in program.inputs if given.kind == "tangent"]
        return compare(
            found, wanted, values.parameters, self.tolerances, _is_low(program), added_low=_adds_low(program),
            differentiated=differentiated,
        )  # fmt: skip

    def _reference(self, program: Program, values: Values, random: bool) -> StepValues:
        """What the step gives on one device: by the model, or by its captured graph where random numbers are drawn.

        Raises:
            ValueError: it cannot be run on these values, which capture has not seen.
        """
        try:
            with autocast_as(None if random else self.autocast), as_one_process():
                if random:
                    return on_one_device(program, values)
                return eager(self.model, self.batch, program, values.tangents, self.precision)
        except Exception as error:  # whatever a model's ops make of values
            raise ValueError(
                f"{type(self.model).__name__} fails on one device, before any rank is played: {_first_line(error)}; "
                "pass example inputs that it can run on"
            ) from error

    @property
    def precision(self) -> Precision | None:
        """What the options ask the step to compute in."""
        return precision_of(self.options.mp_policy)

    def _dtypes(self) -> str:
        """The parameters', at rest and in compute."""
        found = set()
        for parameter in self.model.parameters():
            dtypes = self.precision.dtypes_of(parameter) if self.precision is not None else None
            computed = f" computed in {dtype_text(dtypes.computed)}" if dtypes is not None else ""
            found.add(dtype_text(parameter.dtype) + computed)
        return ", ".join(sorted(found))

    def _limits_told(self, program: Program) -> Iterator[str]:
        """Where the model computes in half precision of itself, which what it was given does not show."""
        first = _first_low(program)
        if first is not None and first.op != "placeholder" and self.autocast is None and self.precision is None:
            yield f"{place_of(first)}: computed in half precision, whose rounding the limits allow"

    def _planned(self, program: Program) -> Plan:
        return planning.planned(
            program, self.axes, batch_axes=self.batch_axes, hardware=self.hardware, strategy=self.strategy,
            options=self.options, example="", manner=Manner(self.progress),
        )  # fmt: skip

    def _explained(
        self, local: LocalProgram, values: Values, reference: StepValues, random: bool
    ) -> tuple[Divergence | None, float | None]:
        """Where the ranks leave the captured graph, and how far that is from the reference."""
        self.progress("looking for the first node that differs")
        seed = (self.options.seed, 0)
        per_rank = local_inputs(local, values.parameters, values.buffers, values.inputs, values.tangents, seed)
        limit, _ = limits(self.tolerances, _is_low(local.program))
        found = first_divergence(local, per_rank, values.placeholders, limit)
        if random:
            return found, None
        alone = on_one_device(local.program, values)
        tensors, _ = self._compared(alone, reference, values, local.program)
        return found, max((tensor.error for tensor in tensors), default=0.0)

    def _moved_by_rounding(self, program: Program, values: Values, reference: StepValues) -> float:
        """How far the reference moves where each of its parameters is moved by a rounding, up or down."""
        self.progress("moving the reference by a rounding")
        low = _is_low(program)
        random = torch.Generator().manual_seed(self.options.seed)
        before = [(parameter, parameter.detach().clone()) for parameter in self.model.parameters()]
        try:
            with torch.no_grad():
                for parameter, _ in before:
                    signs = torch.randint(0, 2, parameter.shape, generator=random) * 2 - 1
                    parameter.add_((parameter * signs * rounding(low)).to(parameter.dtype))
            moved = self._reference(program, values, random=False)
        finally:
            for parameter, old in before:
                parameter.data.copy_(old)
        tensors, _ = self._compared(moved, reference, values, program)
        return max((tensor.error for tensor in tensors), default=0.0)

    def _in_double(self, local: LocalProgram, values: Values, random: bool) -> _InDouble:
        """The check in float64, where rounding all but vanishes."""
        if _is_low(local.program) or _adds_low(local.program):
            return _InDouble()
        self.progress("again in float64")
        wide, held = in_double(local), values.doubled()

        def worst(found: StepValues, wanted: StepValues) -> float:
            tensors, _ = self._compared(found, wanted, held, wide.program)
            return max((tensor.error for tensor in tensors), default=0.0)

        seed = (self.options.seed, 0)
        ranks = model = None
        try:
            with default_dtype(torch.float64):
                alone = on_one_device(wide.program, held)
                found = simulate_step(wide, held.parameters, held.buffers, held.inputs, held.tangents, seed)
                ranks = worst(found, alone)
                if not random:
                    args, kwargs = doubled((self.batch.args, self.batch.kwargs))
                    batch, (twin, _) = (
                        replace(self.batch, args=args, kwargs=kwargs),
                        real_copy(self.model, self.options.seed),
                    )
                    model = worst(alone, eager(twin.double(), batch, wide.program, held.tangents))
        except Exception as error:  # an op or a model that takes no float64
            what = "the ranks' programs do" if ranks is None else "the model does"
            return _InDouble(ranks, model, (f"{what} not run in float64: {_first_line(error)}",))
        return _InDouble(ranks, model)

    def _without_randomness(self, plan: Plan) -> Parity:
        self.progress("again in eval mode")
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        again = _Check(
            self.model, self.batch, self.axes, self.batch_axes, self.options, planning.topology_of(plan).hardware,
            plan.strategy, self.tolerances, self.progress, self.autocast,
        )  # fmt: skip
        try:
            return again.parity(again.captured(), None, ())
        finally:
            for module, training in modes:
                module.training = training


_EAGER = "the unmodified model run eagerly on the whole batch"
_CAPTURED = (
    "the captured graph run on one device with the same seed: the step draws random numbers, and eager's are its own"
)


def _is_low(program: Program) -> bool:
    """Whether the step computes in half precision, if a part of it."""
    return _first_low(program) is not None


def _adds_low(program: Program) -> bool:
    """Whether the ranks' parts of gradients are added in half precision."""
    return any(given.dtypes is not None and given.dtypes.reduced in _LOW for given in program.inputs)


def _first_low(program: Program) -> fx.Node | None:
    """The first node that is in half precision."""
    values = ((node, pytree.tree_leaves(node.meta.get("val"))) for node in program.graph.graph.nodes)
    return next((node for node, found in values if any(getattr(t, "dtype", None) in _LOW for t in found)), None)


def _doubts(reference: StepValues) -> tuple[str, ...]:
    """What makes a certificate say less than it seems to."""
    if reference.gradients and not any(bool(gradient.any()) for gradient in reference.gradients.values()):
        return (
            "every gradient of the reference is zero, which proves nothing about them; give other inputs or weights",
        )
    return ()


def _first_line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"
